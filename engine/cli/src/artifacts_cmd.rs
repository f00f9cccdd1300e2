//! `millrace put` and `millrace get`.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use indicatif::ProgressBar;
use millrace_node::ArtifactId;
use millrace_node::admin::client::{self, Progress};
use millrace_node::reference::Hasher;
use millrace_node::status::Published;
use serde::Serialize;

use crate::cli::{GetArgs, PutArgs};
use crate::exit::{Exit, Failure};
use crate::load::socket_of;
use crate::{output, progress};

pub(crate) fn put(args: &PutArgs) -> Result<Exit, Failure> {
    let socket = socket_of(&args.admin)?;
    let name = args.file.display();
    let file = File::open(&args.file).map_err(|error| Failure::io(&name, &error))?;
    let length = file
        .metadata()
        .map_err(|error| Failure::io(&name, &error))?
        .len();
    let bar = progress::bytes("put", length, args.json);
    let report = client::post_file(&socket, "/artifacts", file, length, shown_on(bar.clone()))?;
    bar.finish_and_clear();
    let published: Published = serde_json::from_str(&report)
        .map_err(|error| Failure::new(Exit::Failed, format!("the node's report: {error}")))?;
    if args.json {
        output::json(&published)?;
    } else {
        output::data(&published.id)?;
        for peer in &published.peers {
            output::message(format_args!("{}  {}", peer.node_id, peer.outcome));
        }
    }
    Ok(if published.peers.iter().all(|peer| peer.there) {
        Exit::Ok
    } else {
        Exit::Failed
    })
}

/// Moves a bar as a transfer goes on.
fn shown_on(bar: ProgressBar) -> impl Fn(Progress) + 'static {
    move |progress| match progress {
        Progress::Total(bytes) => bar.set_length(bytes),
        Progress::Moved(bytes) => bar.inc(bytes),
    }
}

#[derive(Serialize)]
struct Got {
    id: String,
    bytes: u64,
    file: String,
}

pub(crate) fn get(args: &GetArgs) -> Result<Exit, Failure> {
    let id: ArtifactId = args
        .id
        .parse()
        .map_err(|error| Failure::new(Exit::Usage, format!("\"{}\": {error}", args.id)))?;
    let socket = socket_of(&args.admin)?;
    // The file has its name only when it is whole and its hash is right.
    let folder = args
        .output
        .parent()
        .filter(|path| !path.as_os_str().is_empty());
    let file = tempfile::Builder::new()
        .prefix(".millrace-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(folder.unwrap_or_else(|| Path::new(".")))
        .map_err(|error| Failure::io(args.output.display(), &error))?;
    let mut checked = Checked {
        file,
        hasher: Hasher::new(),
    };
    let bar = progress::bytes("get", 0, args.json);
    let bytes = client::get_to(
        &socket,
        &format!("/artifacts/{id}"),
        &mut checked,
        shown_on(bar.clone()),
    )?;
    bar.finish_and_clear();
    if checked.hasher.finish() != id {
        return Err(Failure::new(
            Exit::Failed,
            "the node sent other bytes than the id promises",
        ));
    }
    checked
        .file
        .persist(&args.output)
        .map_err(|error| Failure::io(args.output.display(), &error.error))?;
    let got = Got {
        id: id.to_string(),
        bytes,
        file: args.output.display().to_string(),
    };
    if args.json {
        output::json(&got)?;
    } else {
        output::message(format_args!("wrote {} bytes to {}", got.bytes, got.file));
    }
    Ok(Exit::Ok)
}

/// A file that is hashed as it is written.
struct Checked {
    file: tempfile::NamedTempFile,
    hasher: Hasher,
}

impl Write for Checked {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}
