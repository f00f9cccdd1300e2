//! The handle of a node's transport that any thread may hold.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_edge_policy::admission::Admission;
use millrace_edge_policy::siphash::Key;
use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;
use millrace_protocol::topology::Topology;
use millrace_shards::chunk::ChunkPool;
use millrace_shards::runtime::ShardHandle;
use millrace_shards::stats::ShardStats;

use crate::config::TransportConfig;
use crate::counters::Counters;
use crate::pair_keys::PairKeys;
use crate::quic::ShardTls;
use crate::service::command::Command;
use crate::service::message::{Payload, Request};
use crate::service::remote::RemoteAnswer;
use crate::service::routes::Routes;
use crate::status::StatusBoard;
use crate::stop::StopMode;
use crate::tls::{Credentials, Members, TlsError};

/// A running transport: a handle that any thread may hold and clone.
///
/// The transport runs until [`shutdown`](Self::shutdown) or [`close`](Self::close), or until the
/// last clone is dropped. Only `shutdown` lets connections finish what they carry. A drop does as
/// `close`, but does not wait: the shards' threads end and the address is free within a second.
/// Messengers and services do not keep the transport running. A service must not hold a clone of
/// it: the transport would then never end.
#[derive(Clone, Debug)]
pub struct Transport {
    inner: Arc<Inner>,
}

/// What a transport is made of; see [`crate::start`].
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) me: NodeId,
    pub(crate) local: SocketAddr,
    pub(crate) routes: Arc<Routes>,
    pub(crate) shards: Shards,
    pub(crate) pools: Vec<ChunkPool>,
    pub(crate) stats: Vec<Arc<ShardStats>>,
    pub(crate) counters: Vec<Arc<Counters>>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) pair_keys: Mutex<PairKeys>,
    /// What hellos say.
    pub(crate) registry_version: Arc<AtomicU64>,
    /// What new TLS contexts are made from: the settings, and the members as each shard sees them.
    pub(crate) config: TransportConfig,
    pub(crate) members: Vec<Members>,
}

/// The threads of the shards. A drop asks them to stop and does not wait for them.
#[derive(Debug)]
pub(crate) struct Shards {
    handles: Mutex<Vec<ShardHandle<Command>>>,
    mode: Arc<StopMode>,
}

impl Shards {
    pub(crate) fn new(mode: Arc<StopMode>) -> Self {
        Self {
            handles: Mutex::default(),
            mode,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<ShardHandle<Command>>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, handle: ShardHandle<Command>) {
        self.lock().push(handle);
    }

    /// As [`Self::stop`], and connections close at once.
    pub(crate) fn close(&self) {
        self.mode.set_at_once();
        self.stop();
    }

    /// Asks all shards to stop, then waits for their threads.
    pub(crate) fn stop(&self) {
        // Held until the threads have ended: a second caller waits for them too.
        let mut handles = self.lock();
        handles.iter().for_each(ShardHandle::stop);
        for handle in handles.drain(..) {
            // A shard that panicked has said so; the others still end.
            handle.join().ok();
        }
    }
}

impl Drop for Shards {
    fn drop(&mut self) {
        self.mode.set_at_once();
        // Not joined: the last handle may be dropped where a wait is not allowed.
        self.lock().iter().for_each(ShardHandle::stop);
    }
}

impl Transport {
    pub(crate) fn new(inner: Inner) -> Self {
        Self {
            inner: Arc::new(inner),
        }
    }

    /// This node.
    pub fn node_id(&self) -> NodeId {
        self.inner.me
    }

    /// The address that the sockets are bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.inner.local
    }

    /// Number of shards.
    pub fn shards(&self) -> usize {
        self.inner.counters.len()
    }

    /// The chunk pool of a shard; `None` for an index that no shard has.
    pub fn pool(&self, shard: usize) -> Option<&ChunkPool> {
        self.inner.pools.get(shard)
    }

    /// The transport's counters, for each shard.
    pub fn counters(&self) -> &[Arc<Counters>] {
        &self.inner.counters
    }

    /// The runtime's counters, for each shard.
    pub fn shard_stats(&self) -> &[Arc<ShardStats>] {
        &self.inner.stats
    }

    /// The state of the connections, as the shards published it.
    pub fn status(&self) -> &StatusBoard {
        self.inner.routes.board()
    }

    /// Replaces the members: removed peers are cut, added ones dialled. A topology whose newest
    /// version is below that of the one in force is ignored: of concurrent calls the newest wins.
    /// False when a shard's mailbox was full, or a shard has stopped; call again then.
    #[must_use]
    pub fn update_topology(&self, topology: &Arc<Topology>) -> bool {
        // Held until the shards have it, so that all of them hear of topologies in one order.
        let mut pair_keys = self.pair_keys();
        if topology.newest_version() < pair_keys.version() {
            return true;
        }
        self.set_registry_version(topology.newest_version());
        let dial_keys = pair_keys.update(topology);
        self.inner.admission.set_peers(pair_keys.by_tag());
        let command = || Command::Topology(Arc::clone(topology), Arc::clone(&dial_keys));
        self.inner.routes.post_to_all(command)
    }

    /// Replaces the TLS key and certificate of handshakes to come, on either side. Handshakes that
    /// are under way end with the old ones, and connections go on. Those that this node dialled
    /// with another key are replaced, one after the other, within seconds; those that peers dialled
    /// are replaced by the peers, once their topology names the key as the newest of this node.
    /// False when a shard's mailbox was full, or a shard has stopped; call again then.
    ///
    /// # Errors
    /// When BoringSSL refuses a setting; nothing has changed then.
    pub fn set_credentials(&self, credentials: &Credentials) -> Result<bool, TlsError> {
        let Inner {
            config,
            members,
            routes,
            ..
        } = &*self.inner;
        let tls = members
            .iter()
            .map(|members| ShardTls::new(config, credentials, members));
        let tls: Vec<_> = tls.collect::<Result<_, _>>()?;
        Ok(routes.post_each(tls.into_iter().map(|tls| Command::Tls(Box::new(tls)))))
    }

    /// Sets the registry version that this node says it holds, on connections to come; a peer that
    /// holds an older one asks for it (see [`Service::on_up`](crate::Service::on_up)). It never
    /// falls: an older version is ignored. [`Self::update_topology`] sets it to the newest version
    /// of the topology.
    pub fn set_registry_version(&self, version: u64) {
        let held = &self.inner.registry_version;
        held.fetch_max(version, Ordering::Relaxed);
    }

    /// The keys that this node shares with the members, by the tag that stands for a node in its
    /// proofs: the edge checks proofs with them before packets come here.
    pub fn peer_keys(&self) -> BTreeMap<u32, Key> {
        self.pair_keys().by_tag()
    }

    /// The policy that decides which connections may open.
    pub fn admission(&self) -> &Arc<Admission> {
        &self.inner.admission
    }

    fn pair_keys(&self) -> MutexGuard<'_, PairKeys> {
        let pair_keys = self.inner.pair_keys.lock();
        pair_keys.unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks `peer`, from any thread. Returns at once; the errors come by the answer. Dropping the
    /// answer takes the request back.
    pub fn request(&self, peer: NodeId, request: Request) -> RemoteAnswer {
        self.inner.routes.request(peer, request)
    }

    /// Tells `peer`, from any thread; see [`Messenger`](crate::Messenger) for the order of
    /// messages.
    ///
    /// # Errors
    /// [`RpcError::LocalBusy`] when the shard's mailbox is full, [`RpcError::LocalShuttingDown`]
    /// when the shard has stopped. What the shard refuses later is counted there.
    pub fn send(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        self.inner.routes.send(peer, class, method, body)
    }

    /// Tells all `peers` the same: one mailbox message for each shard that owns some of them, and
    /// one buffer for all. Which peers were refused, and why; see [`Self::send`].
    #[must_use = "these peers are not told"]
    pub fn send_to_all(
        &self,
        peers: &[NodeId],
        class: Class,
        method: Method,
        body: Payload,
    ) -> Vec<(NodeId, RpcError)> {
        self.inner.routes.send_to_all(peers, class, method, &body)
    }

    /// Closes all connections cleanly and stops the shards. Blocks until their threads have ended,
    /// also when another thread shuts down already; the config's `drain_timeout` bounds it. Not for
    /// a shard's thread.
    pub fn shutdown(&self) {
        self.inner.shards.stop();
    }

    /// Closes all connections at once and stops the shards: peers are told, but what is under way
    /// is lost, and requests end with [`RpcError::ConnectionLost`] or
    /// [`RpcError::LocalShuttingDown`]. Blocks until the shards' threads have ended, within a
    /// second; a [`shutdown`](Self::shutdown) that is under way is cut short. Not for a shard's
    /// thread.
    pub fn close(&self) {
        self.inner.shards.close();
    }
}
