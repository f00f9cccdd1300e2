//! What a node is started with, besides its config.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use millrace_protocol::frame::Method;
use millrace_protocol::identity::{PublicKey, SigningKey};
use millrace_registry::{HostResolver, Resolver, Versions, keys};
use millrace_shards::config::ShardConfig;
use millrace_transport::{Service, ShardMessenger};
use millrace_tuning::NodeConfig;

use crate::edge::PreparedEdge;
use crate::error::StartError;
use crate::host;
use crate::mapping;
use crate::path_memory;
use crate::paths::Paths;
use crate::registry::{self, Kept, RegistrySource};
use crate::room::Room;
use crate::services::Services;
use crate::state_lock::StateLock;

/// What a node is started with, besides its config.
#[derive(Debug)]
pub struct NodeParts {
    /// The node's identity key.
    pub identity: SigningKey,
    /// The file of that key: the TLS keys that the node's registry record names lie beside it.
    /// None: the node has those that [`Node::hold_tls_key`](crate::Node::hold_tls_key) gave it.
    pub key_file: Option<PathBuf>,
    /// The versions that it holds already, and where it looks for more.
    pub versions: Versions,
    /// Unix socket of status, metrics and artifacts; none: no such socket, and no thread for it.
    pub admin_socket: Option<PathBuf>,
    /// The lock of the state folder, until the node has ended; none: nothing keeps another node
    /// from the same files.
    pub state_lock: Option<StateLock>,
    /// File of the paths that the node remembers; none: all its peers are unknown at the start.
    pub paths_file: Option<PathBuf>,
    /// One entry for each shard; none: as the config says, one for each of its cores.
    pub shards: Option<Vec<ShardConfig>>,
    /// The edge, as [`edge::prepare`](crate::edge::prepare) made it; none: caps and rates of the
    /// transport's own alone, and no steering of packets.
    pub edge: Option<PreparedEdge>,
    /// Says what the names of hosts stand for; as made, the host's own resolver. It is asked on
    /// threads of its own.
    pub resolver: Arc<dyn Resolver>,
    /// The embedder's services; see [`serve`](Self::serve).
    pub services: Services,
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
            kept: Kept::Nowhere,
        };
        Self::with(config, identity, source)
    }

    /// Parts of a node as `millrace node` starts it: key, registry folder and admin socket are the
    /// files that the config names. Makes the state folder if there is none, and takes its lock
    /// before anything else.
    ///
    /// # Errors
    /// [`StartError::Taken`] if another node runs in the state folder, [`StartError::Key`] for a
    /// key that cannot be used, [`StartError::Config`] for a subnet that is none,
    /// [`StartError::NotPermitted`] or [`StartError::Host`] for the state folder.
    pub fn of_files(config: &NodeConfig, paths: &Paths) -> Result<Self, StartError> {
        make_folder(&paths.state_dir)?;
        let state_lock = StateLock::take(&paths.state_dir)?;
        let identity = keys::read(&paths.key_file)?;
        let source = RegistrySource {
            public_key: keys::public_from_hex(&config.registry.public_key)?,
            folder: Some(paths.registry_dir.clone()),
            kept: Kept::In(paths.kept_dir()),
        };
        Ok(Self {
            state_lock: Some(state_lock),
            key_file: Some(paths.key_file.clone()),
            admin_socket: Some(paths.admin_socket.clone()),
            paths_file: Some(paths.state_dir.join(path_memory::FILE_NAME)),
            ..Self::with(config, identity, source)?
        })
    }

    /// Adds a service that owns `methods`. `make` is called once on each shard.
    ///
    /// Methods below [`FIRST_FREE_METHOD`](crate::FIRST_FREE_METHOD) are reserved for the node's
    /// own services: a service that asks for one of them fails the start
    /// ([`StartError::ReservedMethods`]), and so does one that asks for a method of another service
    /// ([`StartError::Services`]).
    #[must_use]
    pub fn serve<S: Service>(
        mut self,
        methods: RangeInclusive<Method>,
        make: impl Fn(ShardMessenger) -> S + Send + Sync + 'static,
    ) -> Self {
        self.services.add(methods, make);
        self
    }

    /// What stands against a start with this config, before anything of the host is taken:
    /// services whose methods are not free, and members that have no room. [`Node::start`] asks the
    /// same.
    ///
    /// # Errors
    /// As [`Node::start`].
    ///
    /// [`Node::start`]: crate::Node::start
    pub fn obstacles(&self, config: &NodeConfig) -> Result<(), StartError> {
        self.check(config).map(drop)
    }

    /// As [`Self::obstacles`]; the room for peers.
    pub(crate) fn check(&self, config: &NodeConfig) -> Result<Room, StartError> {
        self.services.check()?;
        let shards = match &self.shards {
            Some(shards) => shards.len(),
            None => config.shards.cpus(&host::usable_cpus()).len(),
        };
        let room = Room::of(mapping::transport(config), shards);
        room.check(&self.versions.node_id(), &self.versions.topology())?;
        Ok(room)
    }

    fn with(
        config: &NodeConfig,
        identity: SigningKey,
        source: RegistrySource,
    ) -> Result<Self, StartError> {
        if let Err((text, error)) = mapping::peer_profiles(config) {
            return Err(StartError::Config {
                key: format!("transport.lan_peers or wan_peers: \"{text}\""),
                reason: format!("is no node id: {error}"),
            });
        }
        Ok(Self {
            versions: registry::versions(&identity.public_key(), config, source)?,
            identity,
            key_file: None,
            admin_socket: None,
            state_lock: None,
            paths_file: None,
            shards: None,
            edge: None,
            resolver: Arc::new(HostResolver),
            services: Services::default(),
        })
    }
}

fn make_folder(folder: &Path) -> Result<(), StartError> {
    std::fs::create_dir_all(folder).map_err(|error| StartError::io(folder.display(), error))
}
