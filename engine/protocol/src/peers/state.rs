//! The states of a peer's dialling and of a connection.

use super::{Attempt, ConnectionNumber, Direction, NodeId};
use crate::timer::TimerId;
use std::{net::SocketAddr, time::Instant};

/// The state of dialling a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dial {
    /// The peer dials.
    Listening,
    /// Nothing: there is a connection.
    Idle,
    /// The timer will dial.
    Waiting,
    /// Its turn comes when an attempt at another peer ends, or is slow; the timer looks again.
    Queued {
        /// The peer has asked for the dial, so it is there.
        is_asked: bool,
    },
    /// A dial is under way; the timer is its deadline.
    Under {
        attempt: Attempt,
        address: SocketAddr,
        started: Instant,
    },
}

impl Dial {
    pub(super) fn attempt(&self) -> Option<Attempt> {
        match self {
            Self::Under { attempt, .. } => Some(*attempt),
            _ => None,
        }
    }
}

/// A connection whose handshake has proved its peer.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) peer: NodeId,
    /// Where the peer began it, if the peer did.
    pub(super) from: Option<SocketAddr>,
    pub(super) state: State,
    pub(super) verifying: bool,
    /// Hello, verification or drain deadline.
    pub(super) timer: Option<TimerId>,
}

#[derive(Debug)]
pub(super) enum State {
    /// Waits for the peer's hello.
    Pending(Direction),
    /// The current one.
    Up {
        number: ConnectionNumber,
        since: Instant,
    },
    /// Replaced; closed at `until`, which moves up to `latest` while its messages come forward.
    Draining { until: Instant, latest: Instant },
}
