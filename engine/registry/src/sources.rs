//! Where a node's versions come from, and where the newest is kept.

use std::path::PathBuf;

use millrace_protocol::identity::PublicKey;
use millrace_protocol::registry::RegistryConfig;

use crate::kept::KeptVersion;

/// Where a node's versions come from besides its peers, and where the newest is kept.
#[derive(Debug)]
pub struct Sources {
    /// The key that signs versions.
    pub key: PublicKey,
    /// Bounds of the versions held.
    pub config: RegistryConfig,
    /// A folder of signed versions.
    pub folder: Option<PathBuf>,
    /// Where the newest version is kept for the next run; none: the node forgets it.
    pub kept: Option<KeptVersion>,
}

impl Sources {
    /// Peers and the embedder alone; nothing is kept.
    pub fn new(key: PublicKey, config: RegistryConfig) -> Self {
        Self {
            key,
            config,
            folder: None,
            kept: None,
        }
    }
}
