//! The registry that a config names, for commands that run beside a node.

use std::path::Path;

use millrace_node::{PublicKey, RegistrySource, Versions, keys, registry};
use millrace_tuning::NodeConfig;

use crate::exit::Failure;

/// The versions in the folder of a config, for the node with the key `me`; read once.
pub(crate) fn of_config(
    me: &PublicKey,
    config: &NodeConfig,
    dir: &Path,
) -> Result<Versions, Failure> {
    let source = RegistrySource {
        public_key: keys::public_from_hex(&config.registry.public_key)?,
        folder: Some(dir.to_owned()),
    };
    Ok(registry::versions(me, config, source)?)
}
