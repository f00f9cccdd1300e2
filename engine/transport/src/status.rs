//! The published state of each shard's connections, for `/status`, metrics and waiting until
//! connected. A shard writes it in every housekeeping turn, about every 100 ms, and when a
//! connection comes up.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::path::{PathProfile, RememberedPath};

use crate::config::PerClass;
use crate::service::messenger::PathInfo;

/// A connection that is up.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// The peer.
    pub node_id: NodeId,
    /// The connection's number; larger is later.
    pub connection: ConnectionNumber,
    /// Where the peer is.
    pub address: Option<SocketAddr>,
    /// What the connection is tuned for.
    pub profile: PathProfile,
    /// What the node remembers of the path, for the next connection.
    pub remembered: Option<RememberedPath>,
    /// Smoothed RTT of the path, as QUIC measures it (RFC 9002, 5.3).
    pub rtt: Option<Duration>,
    /// Smoothed RTT of the health probes: it includes the delay of the peer's shard.
    pub probe_rtt: Option<Duration>,
    /// Congestion window, bytes.
    pub congestion_window_bytes: u64,
    /// UDP payload bytes of the largest packets sent now: what the path is known to carry.
    pub udp_payload_bytes: usize,
    /// Bytes that wait to be sent, for each class; small frames of class bulk count as normal.
    pub queued_bytes: PerClass<u64>,
    /// How often frames of the peer were read later, because they came too fast.
    pub frames_held: u64,
    /// Packets sent since the connection began.
    pub packets_sent: u64,
    /// Of them, packets that were declared lost.
    pub packets_lost: u64,
    /// UDP payload bytes sent.
    pub bytes_sent: u64,
    /// UDP payload bytes received.
    pub bytes_received: u64,
    /// Connections of another node with the peer's key that are being refused: how many were.
    pub duplicates_refused: u64,
    /// The shard that owns the connection.
    pub shard: usize,
}

/// The state that one shard published last.
#[derive(Clone, Debug, Default)]
pub struct ShardStatus {
    /// Its connections that are up.
    pub peers: Vec<PeerStatus>,
    /// All its connections, handshakes included.
    pub connections: usize,
    /// Its handshakes.
    pub handshakes: usize,
    /// Heap bytes that QUIC holds for its connections.
    pub quic_heap_bytes: u64,
    /// Its connections by another TLS key of this node than the newest that the registry names,
    /// drained ones included. While there are any, the older key must not be retired.
    pub by_older_key: usize,
    /// Connections that it closed because their peers flooded them.
    pub floods_cut: u64,
    /// Bytes that wait for peers on lanes, and of answers outside the chunk pool.
    pub queue_bytes: u64,
    /// Bytes of the chunk pool that answers hold which their peers have not read; each body once.
    pub unread_answer_bytes: u64,
    /// Whether its thread has ended by a panic.
    pub has_panicked: bool,
}

/// What a shard holds of connections.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    pub(crate) connections: usize,
    pub(crate) handshakes: usize,
    pub(crate) quic_heap_bytes: u64,
    pub(crate) by_older_key: usize,
    pub(crate) floods_cut: u64,
    pub(crate) queue_bytes: u64,
    pub(crate) unread_answer_bytes: u64,
}

/// The published state of all shards of a node.
#[derive(Debug)]
pub struct StatusBoard {
    shards: Mutex<Vec<ShardStatus>>,
    changed: Condvar,
    /// Set by the first shard that begins to stop.
    is_stopping: AtomicBool,
}

impl StatusBoard {
    pub(crate) fn new(shards: usize) -> Self {
        Self {
            shards: Mutex::new(vec![ShardStatus::default(); shards]),
            changed: Condvar::new(),
            is_stopping: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<ShardStatus>> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn publish(&self, shard: usize, peers: Vec<PeerStatus>, load: Load) {
        if let Some(held) = self.lock().get_mut(shard) {
            *held = ShardStatus {
                peers,
                connections: load.connections,
                handshakes: load.handshakes,
                quic_heap_bytes: load.quic_heap_bytes,
                by_older_key: load.by_older_key,
                floods_cut: load.floods_cut,
                queue_bytes: load.queue_bytes,
                unread_answer_bytes: load.unread_answer_bytes,
                has_panicked: false,
            };
        }
        self.changed.notify_all();
    }

    /// A shard's thread ends: what it published is no longer true.
    pub(crate) fn end(&self, shard: usize, has_panicked: bool) {
        if let Some(held) = self.lock().get_mut(shard) {
            *held = ShardStatus {
                has_panicked,
                ..ShardStatus::default()
            };
        }
        self.changed.notify_all();
    }

    /// The first shard whose thread has ended by a panic, if one has.
    pub fn first_panicked(&self) -> Option<usize> {
        self.lock().iter().position(|shard| shard.has_panicked)
    }

    /// A shard was asked to stop; all are.
    pub(crate) fn begin_stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
    }

    /// Whether the shards stop in good order, or have stopped.
    pub fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    /// The state of every shard.
    pub fn shards(&self) -> Vec<ShardStatus> {
        self.lock().clone()
    }

    /// The peers that are up, over all shards.
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.lock()
            .iter()
            .flat_map(|shard| shard.peers.iter().cloned())
            .collect()
    }

    /// The peers that are up, each once, in the order of their ids.
    pub fn peer_ids(&self) -> Vec<NodeId> {
        let shards = self.lock();
        let up = shards.iter().flat_map(|shard| &shard.peers);
        let mut ids: Vec<_> = up.map(|peer| peer.node_id).collect();
        drop(shards);
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// The connections to `peer` together: the shortest round trip, the sum of the rest.
    pub(crate) fn path(&self, peer: &NodeId) -> Option<PathInfo> {
        let shards = self.lock();
        let up = shards.iter().flat_map(|shard| &shard.peers);
        let paths = up
            .filter(|status| status.node_id == *peer)
            .map(|status| PathInfo {
                rtt: status.rtt,
                queued_bytes: status.queued_bytes,
                packets_sent: status.packets_sent,
                packets_lost: status.packets_lost,
            });
        paths.reduce(|one, other| one.beside(&other))
    }

    /// A connection takes no new messages; the shard publishes the rest in its next housekeeping.
    pub(crate) fn take_down(&self, shard: usize, peer: &NodeId, connection: ConnectionNumber) {
        if let Some(held) = self.lock().get_mut(shard) {
            held.peers
                .retain(|status| status.node_id != *peer || status.connection != connection);
        }
    }

    /// The shards that have a connection to `peer`.
    pub(crate) fn shards_of(&self, peer: &NodeId) -> Vec<usize> {
        let shards = self.lock();
        let has = |shard: &ShardStatus| shard.peers.iter().any(|status| status.node_id == *peer);
        (0..shards.len())
            .filter(|index| has(&shards[*index]))
            .collect()
    }

    /// Blocks this thread until `condition` holds for the peers that are up, at most for `timeout`.
    /// Returns whether it held. Not for a shard's thread.
    pub fn wait(
        &self,
        timeout: Duration,
        mut condition: impl FnMut(&[PeerStatus]) -> bool,
    ) -> bool {
        let until = Instant::now() + timeout;
        let mut shards = self.lock();
        loop {
            let peers: Vec<_> = shards
                .iter()
                .flat_map(|shard| shard.peers.iter().cloned())
                .collect();
            if condition(&peers) {
                return true;
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return false;
            };
            shards = self
                .changed
                .wait_timeout(shards, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}
