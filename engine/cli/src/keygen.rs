//! `millrace keygen`: makes a node's identity key, or a TLS key for it.

use millrace_registry::keys;
use serde::Serialize;

use crate::cli::KeygenArgs;
use crate::exit::{Exit, Failure};
use crate::output;

#[derive(Serialize)]
struct MadeTls {
    node_id: String,
    tls_key: String,
    key_file: String,
}

#[derive(Serialize)]
struct Made {
    node_id: String,
    public_key: String,
    key_file: String,
}

/// `millrace keygen`
pub(crate) fn run(args: &KeygenArgs) -> Result<Exit, Failure> {
    if args.tls {
        return make_tls(args);
    }
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

/// Makes a TLS key beside the identity key.
fn make_tls(args: &KeygenArgs) -> Result<Exit, Failure> {
    let identity = keys::read(&args.file)?;
    let (key, file) = keys::create_tls(&args.file)?;
    let made = MadeTls {
        node_id: identity.node_id().to_string(),
        tls_key: keys::public_hex(&key.public_key()),
        key_file: file.display().to_string(),
    };
    if args.json {
        output::json(&made)?;
    } else {
        output::data(format_args!("node id  {}", made.node_id))?;
        output::data(format_args!("tls key  {}", made.tls_key))?;
        output::message(format_args!("wrote {}", made.key_file));
    }
    Ok(Exit::Ok)
}
