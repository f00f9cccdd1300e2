//! What drives the sessions of a node: the seam below which connections may be quiche's or a model.
//!
//! The endpoint of a shard is one driver. `engine/sim` is the other: whole nodes over a model of
//! QUIC and a virtual clock. Code above the transport needs nothing of this module; it is written
//! against [`Messenger`](crate::Messenger).
//!
//! A driver
//! 1. keeps one [`ShardState`] for each node, tells it the time before anything runs, and sends
//!    what the connections have that [`ShardState::next_dirty`] names;
//! 2. asks [`Peers`](millrace_protocol::peers::Peers), configured by [`peers_config`], who may be
//!    connected, and carries its actions out;
//! 3. begins a [`Session`] for each connection whose peer is proven, and calls it when something
//!    arrived, when something is to be sent, and when its time has come.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use millrace_protocol::backoff::BackoffConfig;
use millrace_protocol::peers::PeersConfig;
use millrace_protocol::time_grid::TimeGrid;

pub use crate::allocator::BodyAllocator;
pub use crate::buffers::StreamBuffer;
pub use crate::path::{PathStats, StreamError, StreamPath};
pub use crate::phase::{Expired, Phase};
pub use crate::service::handle::ShardState;
pub use crate::session::{Received, Session, Transmitted, linger};

use crate::config::TransportConfig;
use crate::counters::Counters;
use crate::session::VERIFY_TIMEOUT;

/// The MAC of dial requests.
pub mod dial_requests {
    pub use crate::dial_requests::{Key, open, seal};
}

/// How the machine of one shard and connection index manages connections under `config`.
pub fn peers_config(config: &TransportConfig, index: u8, shard: u8, shards: u8) -> PeersConfig {
    PeersConfig {
        shard,
        shards,
        index,
        peers_max: config.peers_max(shards.into()),
        dials_max: config.dials_max,
        backoff: BackoffConfig {
            base: config.redial_delay_min,
            cap: config.redial_delay_max,
        },
        connect_timeout: config.connect_timeout,
        drain_timeout: config.drain_timeout,
        drain_max: config
            .body_deadline()
            .time_for(config.limits.body_bytes_max.into()),
        verify_timeout: VERIFY_TIMEOUT,
        ..Default::default()
    }
}

impl ShardState {
    /// The state of a driver without connections.
    pub fn for_driver(config: TransportConfig, now: Instant) -> Rc<Self> {
        let grid = TimeGrid::through(now);
        Rc::new(Self::new(config, Arc::new(Counters::default()), grid, now))
    }

    /// Limits, windows and times.
    pub fn config(&self) -> &TransportConfig {
        &self.config
    }

    /// What this driver's transport counts.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// It is `now`.
    pub fn set_now(&self, now: Instant) {
        self.now.set(now);
    }

    /// The next connection with something to send, by the slot that its session was given.
    pub fn next_dirty(&self) -> Option<usize> {
        self.dirty.borrow_mut().pop_front()
    }

    /// The connection of this slot has something to send.
    pub fn mark_dirty(&self, slot: usize) {
        self.dirty.borrow_mut().push_back(slot);
    }

    /// From now on requests fail with
    /// [`RpcError::LocalShuttingDown`](crate::RpcError::LocalShuttingDown).
    pub fn stop(&self) {
        self.stopping.set(true);
    }
}
