//! `millrace keygen`: makes a node's key.

use millrace_registry::keys;
use serde::Serialize;

use crate::cli::KeygenArgs;
use crate::exit::{Exit, Failure};
use crate::output;

#[derive(Serialize)]
struct Made {
    node_id: String,
    public_key: String,
    key_file: String,
}

/// `millrace keygen`
pub(crate) fn run(args: &KeygenArgs) -> Result<Exit, Failure> {
    let key = keys::create(&args.file)?;
    let made = Made {
        node_id: key.node_id().to_string(),
        public_key: keys::public_hex(&key.public_key()),
        key_file: args.file.display().to_string(),
    };
    if args.json {
        output::json(&made)?;
    } else {
        output::data(format_args!("node id     {}", made.node_id))?;
        output::data(format_args!("public key  {}", made.public_key))?;
        output::message(format_args!("wrote {}", made.key_file));
    }
    Ok(Exit::Ok)
}
