//! The registry that a config names, for commands that run beside a node.

use millrace_node::{Kept, Paths, PublicKey, RegistrySource, Versions, keys, registry};
use millrace_tuning::NodeConfig;

use crate::exit::Failure;

/// The versions that the node with the key `me` has kept, and those in its registry folder; read
/// once.
pub(crate) fn of_config(
    me: &PublicKey,
    config: &NodeConfig,
    paths: &Paths,
) -> Result<Versions, Failure> {
    let source = RegistrySource {
        public_key: keys::public_from_hex(&config.registry.public_key)?,
        folder: Some(paths.registry_dir.clone()),
        kept: Kept::ReadOnly(paths.kept_dir()),
    };
    Ok(registry::versions(me, config, source)?)
}
