//! What the connections of one shard share, and which of them takes the next message.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::Class;
use millrace_protocol::id::NodeId;
use millrace_protocol::time_grid::TimeGrid;
use millrace_protocol::unread::UnreadAnswers;

use super::ConnectionHandle;
use crate::config::TransportConfig;
use crate::counters::Counters;
use crate::queue_account::QueueAccount;
use crate::unread::SharedUnread;

/// What the connections of one shard share: limits, counters, the turn's time, which of them are
/// up, and which have something to send.
#[derive(Debug)]
pub struct ShardState {
    pub(crate) config: TransportConfig,
    pub(crate) counters: Arc<Counters>,
    /// The time of this turn.
    pub(crate) now: Cell<Instant>,
    /// When connections are probed, and kept alive.
    pub(crate) grid: TimeGrid,
    /// Connections with something to send, oldest first, by slot.
    pub(crate) dirty: RefCell<VecDeque<usize>>,
    /// Connections that take new messages.
    up: RefCell<BTreeMap<NodeId, PeerHandles>>,
    pub(crate) stopping: Cell<bool>,
    /// Requests and answers that arrived on lanes since packets were last sent.
    pub(crate) exchanged: Cell<usize>,
    /// What the connections hold queued together.
    pub(crate) queues: Rc<QueueAccount>,
    /// What the answers hold that the peers have not read.
    pub(crate) unread: SharedUnread,
    /// Serial number of the last connection.
    serial: Cell<u64>,
}

/// The connections to one peer; at least one.
#[derive(Debug, Default)]
struct PeerHandles {
    /// The one that has been up longest first.
    handles: Vec<Rc<ConnectionHandle>>,
    /// Which of them took the last body.
    turn: usize,
}

impl ShardState {
    pub(crate) fn new(
        config: TransportConfig,
        counters: Arc<Counters>,
        grid: TimeGrid,
        now: Instant,
    ) -> Self {
        Self {
            queues: Rc::new(QueueAccount::new(config.queue_bytes_max)),
            unread: Rc::new(RefCell::new(UnreadAnswers::new(
                config.unread_answers_bytes(),
            ))),
            config,
            counters,
            now: Cell::new(now),
            grid,
            dirty: RefCell::default(),
            up: RefCell::default(),
            stopping: Cell::new(false),
            exchanged: Cell::new(0),
            serial: Cell::new(0),
        }
    }

    pub(super) fn next_serial(&self) -> u64 {
        self.serial.set(self.serial.get() + 1);
        self.serial.get()
    }

    /// How often a connection is probed, or kept alive, that would be every `interval`.
    pub(crate) fn idle_interval(&self, interval: Duration) -> Duration {
        self.config.idle_interval(interval, self.up.borrow().len())
    }

    /// A connection is up: it takes new messages.
    pub(crate) fn insert(&self, handle: Rc<ConnectionHandle>) {
        let mut up = self.up.borrow_mut();
        up.entry(handle.peer).or_default().handles.push(handle);
    }

    /// A connection takes no new messages any more. More than once does no harm.
    pub(crate) fn remove(&self, handle: &ConnectionHandle) {
        let mut up = self.up.borrow_mut();
        if let Some(peer) = up.get_mut(&handle.peer) {
            peer.handles.retain(|held| held.serial != handle.serial);
            if peer.handles.is_empty() {
                up.remove(&handle.peer);
            }
        }
    }

    /// Whether a connection to `peer` takes new messages.
    pub(crate) fn contains(&self, peer: &NodeId) -> bool {
        self.up.borrow().contains_key(peer)
    }

    /// The peers that are up, in the order of their ids.
    pub fn peers(&self) -> Vec<NodeId> {
        self.up.borrow().keys().copied().collect()
    }

    /// The connection for the next message of `class` to `peer`: class bulk takes turns over all of
    /// them, past those that refused and are still full; the others take the one that has been up
    /// longest, so that they keep their order.
    pub(crate) fn handle_to(&self, peer: &NodeId, class: Class) -> Option<Rc<ConnectionHandle>> {
        let mut up = self.up.borrow_mut();
        let PeerHandles { handles, turn } = up.get_mut(peer)?;
        let count = handles.len();
        let at = match class {
            Class::Bulk if count > 1 => {
                let last = *turn;
                let mut in_turn = (1..=count).map(|step| (last + step) % count);
                let writable = in_turn.find(|at| handles[*at].is_writable(class));
                *turn = writable.unwrap_or((last + 1) % count);
                *turn
            }
            Class::Latency | Class::Normal | Class::Bulk => 0,
        };
        handles.get(at).map(Rc::clone)
    }

    /// The connections that may take the next message of `class` to `peer`.
    pub(super) fn handles_to(&self, peer: &NodeId, class: Class) -> Vec<Rc<ConnectionHandle>> {
        let up = self.up.borrow();
        let handles = up.get(peer).map_or(&[][..], |peer| &peer.handles);
        let taking = if class == Class::Bulk {
            handles.len()
        } else {
            1
        };
        handles.iter().take(taking).map(Rc::clone).collect()
    }
}
