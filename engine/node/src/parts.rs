//! What a node is started with, besides its config.

use std::path::{Path, PathBuf};

use millrace_protocol::identity::{PublicKey, SigningKey};
use millrace_registry::{Versions, keys};
use millrace_shards::config::ShardConfig;
use millrace_tuning::NodeConfig;

use crate::edge::EdgeParts;
use crate::error::StartError;
use crate::paths::Paths;
use crate::registry;

/// Where a node gets registry versions from, besides its peers.
#[derive(Debug, Clone)]
pub struct RegistrySource {
    /// The key that signs the versions.
    pub public_key: PublicKey,
    /// A folder that is read every `registry.poll_interval`; none: the embedder offers versions.
    pub folder: Option<PathBuf>,
}

/// What a node is started with, besides its config.
#[derive(Debug)]
pub struct NodeParts {
    /// The node's key.
    pub identity: SigningKey,
    /// The versions that it holds already, and where it looks for more.
    pub versions: Versions,
    /// Unix socket of status, metrics and artifacts; none: no such socket, and no thread for it.
    pub admin_socket: Option<PathBuf>,
    /// One entry for each shard; none: as the config says, one for each of its cores.
    pub shards: Option<Vec<ShardConfig>>,
    /// The edge; `Default`: none.
    pub edge: EdgeParts,
}

impl NodeParts {
    /// Parts of a node without files: its versions come from the embedder, who signs them with the
    /// key `registry`, and from peers.
    ///
    /// # Errors
    /// [`StartError::Config`] for a subnet or a seed that is none.
    pub fn in_memory(
        config: &NodeConfig,
        identity: SigningKey,
        registry: PublicKey,
    ) -> Result<Self, StartError> {
        let source = RegistrySource {
            public_key: registry,
            folder: None,
        };
        Self::with(config, identity, source)
    }

    /// Parts of a node as `millrace node` starts it: key, registry folder and admin socket are the
    /// files that the config names. Makes the state folder if there is none.
    ///
    /// # Errors
    /// [`StartError::Key`] for a key that cannot be used, [`StartError::Config`] for a subnet that
    /// is none, [`StartError::NotPermitted`] or [`StartError::Host`] for the state folder.
    pub fn of_files(config: &NodeConfig, paths: &Paths) -> Result<Self, StartError> {
        make_folder(&paths.state_dir)?;
        let identity = keys::read(&paths.key_file)?;
        let source = RegistrySource {
            public_key: keys::public_from_hex(&config.registry.public_key)?,
            folder: Some(paths.registry_dir.clone()),
        };
        Ok(Self {
            admin_socket: Some(paths.admin_socket.clone()),
            ..Self::with(config, identity, source)?
        })
    }

    fn with(
        config: &NodeConfig,
        identity: SigningKey,
        source: RegistrySource,
    ) -> Result<Self, StartError> {
        Ok(Self {
            versions: registry::versions(&identity.public_key(), config, source)?,
            identity,
            admin_socket: None,
            shards: None,
            edge: EdgeParts::default(),
        })
    }
}

fn make_folder(folder: &Path) -> Result<(), StartError> {
    std::fs::create_dir_all(folder).map_err(|error| StartError::io(folder.display(), error))
}
