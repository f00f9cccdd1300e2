//! A running node, and how it starts and ends.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use millrace_edge_control::EdgeAgent;
use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::identity::{PublicKey, SigningKey};
use millrace_protocol::registry::{RegistryError, SignedVersion};
use millrace_registry::follow::OfferSender;
use millrace_registry::wire::{FIRST_METHOD, LAST_METHOD};
use millrace_registry::{Events, Exchange, Follow, FollowThread, Versions};
use millrace_shards::chunk::Body;
use millrace_shards::heap;
use millrace_transport::{
    Payload, RemoteAnswer, Request, Router, RouterError, RpcError, ShardMessenger, Transport,
    TransportStart,
};
use millrace_tuning::NodeConfig;
use millrace_tuning::config::HeapCount;

use crate::admin::{self, AdminServer};
use crate::core::Core;
use crate::error::{NotConnected, NotReady, StartError, transport_failed};
use crate::parts::NodeParts;
use crate::path_memory::{PathFile, PathThread};
use crate::reference::Artifacts;
use crate::reference::announced::Announced;
use crate::reference::service::ArtifactService;
use crate::reference::store::Store;
use crate::reference::wire;
use crate::services::Services;
use crate::state_lock::StateLock;
use crate::status::Status;
use crate::tls_keys::{TlsKeeper, TlsThread};
use crate::topology::TopologyChanges;
use crate::{host, mapping, metrics, peers, status};

/// A running node. Any thread may hold and clone the handle.
///
/// # End of life
/// Dropping the last handle stops the node at once: its admin socket is removed, its peers are told
/// that their connections close, and within a second its threads (shards, admin, registry, paths,
/// keys, edge) have ended and the address can be bound again, when the drop returns. It does not
/// wait for what is under way: requests that hang, here or at a peer, end with
/// [`RpcError::ConnectionLost`] or [`RpcError::LocalShuttingDown`]. A [`Transport`] or a
/// [`RemoteAnswer`] that outlives the node answers with the latter.
///
/// [`shutdown`](Self::shutdown) is the orderly end: it gives connections time for what they carry.
/// Call it before the drop.
///
/// The drop waits for the node's threads, so the last handle must not be dropped on one of them: a
/// service that runs on a shard keeps no `Node`.
#[derive(Debug, Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    core: Arc<Core>,
    agent: Option<EdgeAgent>,
    admin: Option<AdminServer>,
    registry: Option<FollowThread>,
    paths: Mutex<Option<PathThread>>,
    tls: Option<TlsThread>,
    /// Last: the threads above use the folder.
    _state_lock: Option<StateLock>,
}

impl Inner {
    /// Takes up what the connections have measured: before they are gone. More than once does no
    /// harm.
    fn remember_paths(&self) {
        let mut paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        drop(paths.take());
    }

    fn apply_topology(&self) {
        if let Some(registry) = self
            .registry
            .as_ref()
            .filter(|_| !self.core.apply_topology())
        {
            registry.apply_again();
        }
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("id", &self.core.transport.node_id())
            .field("address", &self.core.transport.local_addr())
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.remember_paths();
        // Now peers hear of the end, whatever the threads below wait for.
        self.core.transport.close();
        drop(self.admin.take());
        drop(self.agent.take());
        drop(self.registry.take());
        drop(self.tls.take());
    }
}

impl Node {
    /// Binds the address, starts the shards, begins to dial the members, and starts the threads of
    /// the registry and of the admin socket.
    ///
    /// With port 0 in `listen.address` the kernel chooses; [`address`](Self::address) says which.
    ///
    /// # Errors
    /// [`StartError`], by whose fault it is. Nothing is left running then.
    pub fn start(config: &NodeConfig, parts: NodeParts) -> Result<Self, StartError> {
        let room = parts.check(config)?;
        if !heap::is_counted() && config.transport.heap_count == HeapCount::Require {
            return Err(StartError::Config {
                key: "transport.heap_count".into(),
                reason: "the allocator of this program does not count what peers make QUIC hold: \
                         make millrace_node::CountingAllocator its global allocator, or set \"optional\""
                    .into(),
            });
        }
        let cpus = host::usable_cpus();
        let shards = parts
            .shards
            .unwrap_or_else(|| mapping::shards(config, &cpus));
        let store = Arc::new(Store::new(config.artifacts.store_bytes.bytes()));
        let versions = Arc::new(parts.versions);
        let topology = Arc::new(versions.topology());
        let announced = Arc::new(Announced::new(&topology));
        let changes = TopologyChanges::new(&topology);
        let public_key = parts.identity.public_key();
        let record = topology.member(&public_key.node_id());
        let tls = TlsKeeper::new(
            parts.identity.clone(),
            parts.key_file,
            record.map(|record| record.tls_keys),
            config.node.certificate_lifetime.get(),
            config.registry.poll_interval.get(),
        );
        let tls = tls.map_err(|error| StartError::host("the node's certificate", error))?;
        let (edge, report, loops) = match parts.edge {
            Some(edge) => (edge.start, Some(edge.report), Some(edge.loops)),
            None => Default::default(),
        };
        let path_file = parts.paths_file.map(PathFile::read);
        let start = TransportStart {
            identity: parts.identity,
            tls: Some(tls.credentials().clone()),
            config: mapping::transport(config),
            udp: mapping::udp(config, shards.len()),
            shards,
            topology,
            paths: path_file.as_ref().map_or_else(Vec::new, PathFile::paths),
            edge,
        };
        let events = Events::default();
        let shard = Shard {
            store: Arc::clone(&store),
            announced: Arc::clone(&announced),
            versions: Arc::clone(&versions),
            offers: events.sender(),
            ask_interval: config.registry.poll_interval.get(),
            services: parts.services,
        };
        let transport = Transport::start(start, move |messenger| shard.router(messenger))
            .map_err(transport_failed)?;
        let body_bytes_max = config.transport.body_bytes_max.bytes();
        let core = Arc::new(Core {
            public_key,
            artifacts: Artifacts::new(transport.clone(), store, announced, body_bytes_max),
            transport,
            versions,
            started: Instant::now(),
            topology: changes,
            edge: report,
            room,
            tls: Arc::clone(tls.board()),
            applied: Mutex::default(),
        });
        // From here on, an error drops what was started.
        let mut inner = Inner {
            core: Arc::clone(&core),
            agent: None,
            admin: None,
            registry: None,
            paths: Mutex::default(),
            tls: None,
            _state_lock: parts.state_lock,
        };
        let follow = Follow {
            interval: config.registry.poll_interval.get(),
            resolver: parts.resolver,
        };
        let (applies, asked) = (Arc::clone(&core), Arc::clone(&core));
        let versions = Arc::clone(&core.versions);
        let apply = move || applies.apply_topology();
        let connected = move || peers::all(&asked.transport);
        let registry = FollowThread::start(versions, events, follow, connected, apply)
            .map_err(|error| StartError::io("the registry thread", error))?;
        inner.registry = Some(registry);
        let transport = inner.core.transport.clone();
        let tls = tls.start(transport.clone());
        inner.tls = Some(tls.map_err(|error| StartError::io("the thread of the keys", error))?);
        let paths = path_file.map(|file| PathThread::start(file, transport));
        let paths = paths
            .transpose()
            .map_err(|error| StartError::io("the thread of the paths", error))?;
        inner.paths = Mutex::new(paths);
        let agent = loops.map(|loops| loops.start(Arc::clone(&core), config));
        inner.agent = agent.transpose()?;
        let admin = parts.admin_socket;
        let admin = admin.map(|socket| admin::serve(socket, core, &config.admin));
        inner.admin = admin.transpose()?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The node's id.
    pub fn id(&self) -> NodeId {
        self.transport().node_id()
    }

    /// Holds a TLS key that no file has: it is used when the node's registry record names it. The
    /// last two are held. An embedder whose node has no key file rotates by it.
    pub fn hold_tls_key(&self, key: SigningKey) {
        self.inner.core.tls.give(key);
    }

    /// The node's identity key: what its registry record names.
    pub fn public_key(&self) -> PublicKey {
        self.inner.core.public_key
    }

    /// The address that the node listens on, with the port that the kernel chose for port 0.
    pub fn address(&self) -> SocketAddr {
        self.transport().local_addr()
    }

    /// The transport: counters, pools, status of connections.
    pub fn transport(&self) -> &Transport {
        &self.inner.core.transport
    }

    /// The registry versions that the node holds.
    pub fn versions(&self) -> &Versions {
        &self.inner.core.versions
    }

    /// The artifacts of the reference application.
    pub fn artifacts(&self) -> &Artifacts {
        &self.inner.core.artifacts
    }

    /// Asks `peer`. The request's deadline bounds the wait for the answer.
    pub fn request(&self, peer: NodeId, request: Request) -> RemoteAnswer {
        self.transport().request(peer, request)
    }

    /// Asks `peer` and blocks this thread until it has answered, at most `limit`. Not for shards.
    ///
    /// # Errors
    /// [`RpcError`], by whose fault it is; [`RpcError::Timeout`] after `limit`.
    pub fn ask(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: Payload,
        limit: Duration,
    ) -> Result<Payload, RpcError> {
        let request = Request {
            class,
            method,
            body,
            deadline: limit.into(),
        };
        self.request(peer, request).wait(limit)
    }

    /// Copies bytes into chunks, for a body of more than 64 KiB; none if the pools have no room.
    pub fn body(&self, bytes: &[u8]) -> Option<Body> {
        let mut body = self.artifacts().reserve(bytes.len())?;
        let mut rest = bytes;
        while !rest.is_empty() {
            let spare = body.spare();
            let (now, later) = rest.split_at(rest.len().min(spare.len()));
            spare[..now.len()].copy_from_slice(now);
            body.advance(now.len());
            rest = later;
        }
        Some(body.freeze())
    }

    /// The peers that are up, each once, by ascending round trip.
    pub fn peers(&self) -> Vec<NodeId> {
        peers::nearest(self.transport())
    }

    /// Waits until at least `wanted` peers are up.
    ///
    /// # Errors
    /// [`NotConnected::Few`] if they are not after `limit`.
    pub fn wait_for_peers(&self, wanted: usize, limit: Duration) -> Result<(), NotConnected> {
        let status = self.transport().status();
        let mut up = 0;
        let enough = status.wait(limit, |connections| {
            up = peers::distinct(connections);
            up >= wanted
        });
        if enough {
            Ok(())
        } else {
            Err(NotConnected::Few { up, wanted })
        }
    }

    /// Waits until `peer` is up.
    ///
    /// # Errors
    /// [`NotConnected::Peer`] if it is not after `limit`.
    pub fn wait_for_peer(&self, peer: NodeId, limit: Duration) -> Result<(), NotConnected> {
        let status = self.transport().status();
        let is_up = status.wait(limit, |connections| {
            connections.iter().any(|one| one.node_id == peer)
        });
        if is_up {
            Ok(())
        } else {
            Err(NotConnected::Peer { peer })
        }
    }

    /// Takes a registry version and applies its members; whether it was new. The node's peers ask
    /// for it.
    ///
    /// # Errors
    /// Why the version is refused; it is counted.
    pub fn offer_version(&self, version: SignedVersion) -> Result<bool, RegistryError> {
        let changed = self.versions().offer(version)?;
        if changed {
            self.inner.apply_topology();
        }
        Ok(changed)
    }

    /// Looks into the registry folder now, and applies what is new; whether something was.
    pub fn poll_registry(&self) -> bool {
        let changed = self.versions().poll_folder();
        if changed {
            self.inner.apply_topology();
        }
        changed
    }

    /// Whether the node lives: what `/healthz` says. A node that does not has to be restarted.
    ///
    /// # Errors
    /// [`NotReady::ShardEnded`].
    pub fn health(&self) -> Result<(), NotReady> {
        self.inner.core.health()
    }

    /// Whether the node can do its work.
    ///
    /// # Errors
    /// [`NotReady`]: why not.
    pub fn readiness(&self) -> Result<(), NotReady> {
        self.inner.core.readiness()
    }

    /// Closes all connections in good order and stops the shards: a connection that carries
    /// something gets `transport.drain_timeout` for it, an idle one needs none. Blocks until
    /// the shards' threads have ended. The registry's, the admin socket's and the edge's end with
    /// the last handle. Not for a shard's thread.
    pub fn shutdown(&self) {
        self.inner.remember_paths();
        self.transport().shutdown();
    }

    /// What `/status` shows.
    pub fn status(&self) -> Status {
        status::of(&self.inner.core)
    }

    /// What `/metrics` shows: OpenMetrics text.
    ///
    /// # Errors
    /// None that is known; formatting text may fail by its type.
    pub fn metrics(&self) -> Result<String, fmt::Error> {
        metrics::render(&self.inner.core)
    }
}

/// What the services of a shard are made from.
#[derive(Clone)]
struct Shard {
    store: Arc<Store>,
    announced: Arc<Announced>,
    versions: Arc<Versions>,
    offers: OfferSender,
    ask_interval: Duration,
    services: Services,
}

impl Shard {
    fn router(&self, messenger: ShardMessenger) -> Result<Router, RouterError> {
        let (store, announced) = (Arc::clone(&self.store), Arc::clone(&self.announced));
        let artifacts = ArtifactService::new(messenger.clone(), store, announced);
        let versions = Arc::clone(&self.versions);
        let exchange = Exchange::new(messenger.clone(), versions, self.offers.clone());
        if messenger.shard() == 0 {
            exchange.ask_every(self.ask_interval);
        }
        let router = Router::new()
            .serve(wire::METHODS, artifacts)?
            .serve(FIRST_METHOD..=LAST_METHOD, exchange)?;
        self.services.add_to(&messenger, router)
    }
}

#[cfg(test)]
mod tests {
    use millrace_registry::{Draft, keys};
    use millrace_tuning::ByteSize;
    use millrace_tuning::config::{Cores, HugePages};

    use super::*;

    /// Protects the memory of a program that embeds a node: without a count nothing bounds what
    /// peers make QUIC hold. The tests of this crate run on std's allocator.
    #[test]
    fn a_node_does_not_start_where_the_allocator_does_not_count() {
        let config = NodeConfig::default();
        let [key, registry] = [0, 1].map(|_| keys::generate().unwrap());
        let parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
        let error = Node::start(&config, parts).unwrap_err();
        assert!(
            error.to_string().contains("transport.heap_count"),
            "{error}"
        );
    }

    /// Protects a node whose threads apply two versions at once: members, counts and what peers
    /// announced follow the newer one, also if the thread with the older one comes last.
    #[test]
    fn an_older_topology_does_not_replace_a_newer_one() {
        let mut config = NodeConfig::default();
        config.listen.address = ([127, 0, 0, 1], 0).into();
        config.shards.cores = Cores::List(vec![0]);
        config.shards.defaults.chunk_pool_bytes = ByteSize::mib(8);
        config.shards.defaults.huge_pages = HugePages::Never;
        config.transport.heap_count = HeapCount::Optional;
        let [key, other, registry] = [0, 1, 2].map(|_| keys::generate().unwrap());
        let parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
        let node = Node::start(&config, parts).unwrap();

        let address = node.address();
        let both = [node.public_key(), other.public_key()].map(|key| (key, address));
        let first = Draft::with_nodes("test", &both).unwrap();
        assert!(node.offer_version(first.sign(&registry).unwrap()).unwrap());
        let older = Arc::new(node.versions().topology());
        let mut second = Draft::after(first.version().clone());
        second.remove_node(other.node_id()).unwrap();
        assert!(node.offer_version(second.sign(&registry).unwrap()).unwrap());

        let counted = || {
            let changes = &node.inner.core.topology;
            [&changes.members, &changes.changes, &changes.removed]
                .map(|count| count.load(std::sync::atomic::Ordering::Relaxed))
        };
        let before = counted();
        assert_eq!(before[0], 1);
        assert!(node.inner.core.apply(&older));
        assert_eq!(counted(), before);
        // The same one again is no older one.
        assert!(node.inner.core.apply_topology());
        assert_eq!(counted(), before);
    }
}
