//! The inputs and outputs of [`super::Peers`]: settings, reports, refusals, actions.

use crate::{
    backoff::BackoffConfig,
    id::{ConnectionNumber, NodeId},
};
use std::{net::SocketAddr, time::Duration};
use thiserror::Error;

/// The most connections that a machine has with one peer: the current one, one that is to replace
/// it, and one that drains.
pub const CONNECTIONS_PER_PEER_MAX: usize = 3;

/// The shell's name for a connection; never used twice within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnKey(pub u64);

/// Names one dial of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt(pub u64);

/// Bounds and times of [`super::Peers`].
#[derive(Clone, Debug)]
pub struct PeersConfig {
    /// Number of this shard, from 0.
    pub shard: u8,
    /// Number of shards of this node, 1 to 255.
    pub shards: u8,
    /// Which of the connections of a pair of nodes this machine keeps.
    pub index: u8,
    /// Largest number of peers that get a connection; members beyond it are counted and left out.
    pub peers_max: usize,
    /// Attempts under way, but for those that have been slow; further peers wait for their turn.
    /// Many nodes that start on few cores would otherwise all time out.
    pub dials_max: usize,
    /// Delays between dials.
    pub backoff: BackoffConfig,
    /// Longest time from the dial to the peer's hello; on the listener, from the handshake to the
    /// hello.
    pub connect_timeout: Duration,
    /// How long a replaced connection may go on with the messages that it has begun, when none of
    /// them comes forward; see [`super::Peers::drains_on`].
    pub drain_timeout: Duration,
    /// How long it may go on at the longest.
    pub drain_max: Duration,
    /// Time after which an up connection resets the backoff: see invariant 5 of [`super`].
    pub stable_after: Duration,
    /// Longest time between two dial requests at a dialler that is not connected.
    pub dial_request_interval: Duration,
    /// How long a connection may stay silent after its peer requested a dial; longer on a path
    /// whose round trip asks for it: see [`super::Peers::verify_within`].
    pub verify_timeout: Duration,
}

impl Default for PeersConfig {
    fn default() -> Self {
        Self {
            shard: 0,
            shards: 1,
            index: 0,
            peers_max: 1024,
            dials_max: 32,
            backoff: BackoffConfig::default(),
            connect_timeout: Duration::from_secs(20),
            drain_timeout: Duration::from_secs(5),
            drain_max: Duration::from_secs(1_104),
            stable_after: Duration::from_secs(1),
            dial_request_interval: Duration::from_millis(500),
            verify_timeout: Duration::from_millis(600),
        }
    }
}

/// Who began a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The peer.
    Inbound {
        /// From here.
        from: SocketAddr,
    },
    /// This node, by this dial.
    Outbound(Attempt),
}

/// How a connection ended, or why a dial failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseKind {
    /// The peer closed it in good order: it restarts, or replaced the connection.
    Clean,
    /// A stateless reset: the peer runs, and does not know the connection.
    Reset,
    /// The peer, or its TLS, refused this node.
    Refused,
    /// Idle timeout or transport error.
    Lost,
}

/// Why a connection is refused after its handshake has proved the peer's identity.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The peer has the higher id: it must be dialled.
    #[error("the node with the lower id dials")]
    WrongDirection,
    /// The peer is not in the topology.
    #[error("peer is not a member of the subnet")]
    NotAMember,
    /// The peer has this node's own key.
    #[error("peer is this node")]
    SelfConnection,
    /// Another shard owns the peer.
    #[error("another shard owns this peer")]
    WrongShard,
    /// The shard has as many peers as [`PeersConfig::peers_max`] allows.
    #[error("too many peers")]
    TooMany,
    /// The dial was given up, or was of another peer.
    #[error("the dial was given up")]
    StaleAttempt,
    /// Another node has the peer's key: connections of the two come in turn.
    #[error("another node has the same key")]
    DuplicateIdentity,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::NotAMember,
        Self::SelfConnection,
        Self::WrongDirection,
        Self::WrongShard,
        Self::TooMany,
        Self::StaleAttempt,
        Self::DuplicateIdentity,
    ];

    /// For operators: what is wrong, in one sentence.
    pub fn describe(&self) -> &'static str {
        match self {
            Self::NotAMember => "The node left the registry while its handshake was under way.",
            Self::SelfConnection => "The node has the key of this one: it is this node, or a copy.",
            Self::WrongDirection => "The node with the higher id dialled; the lower one dials.",
            Self::WrongShard => {
                "The packets of the dial came to a shard that does not own the node."
            }
            Self::TooMany => "This node has no more room for members, or for connections to one.",
            Self::StaleAttempt => "This node gave the dial up before its handshake was done.",
            Self::DuplicateIdentity => "Two nodes have the key: see `docs/operating/restarts.md`.",
        }
    }

    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::WrongDirection => "wrong_direction",
            Self::NotAMember => "not_a_member",
            Self::SelfConnection => "self_connection",
            Self::WrongShard => "wrong_shard",
            Self::TooMany => "too_many_peers",
            Self::StaleAttempt => "stale_attempt",
            Self::DuplicateIdentity => "duplicate_identity",
        }
    }
}

/// Why this machine ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloseReason {
    /// The topology no longer has the peer, or this node.
    NotAMember,
    /// A newer connection of the peer replaced it before it was up.
    Superseded,
    /// The drain time of a replaced connection is over.
    Drained,
    /// The peer's hello did not come in time.
    HelloTimeout,
    /// The peer requested a dial and the connection stayed silent.
    Unresponsive,
}

impl CloseReason {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotAMember => "not_a_member",
            Self::Superseded => "superseded",
            Self::Drained => "drained",
            Self::HelloTimeout => "hello_timeout",
            Self::Unresponsive => "unresponsive",
        }
    }
}

/// What the shell must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Connect; ends in `handshake_done`, `dial_failed` or [`Action::Abandon`].
    Dial {
        /// The node whose key the listener must have.
        peer: NodeId,
        /// The address to dial.
        address: SocketAddr,
        /// Names the dial.
        attempt: Attempt,
    },
    /// Forget a dial whose handshake is not done; no report is due.
    Abandon {
        /// Names the dial.
        attempt: Attempt,
    },
    /// Send a [`crate::dial_request::DialRequest`].
    RequestDial {
        /// The peer that should dial.
        peer: NodeId,
        /// Its address.
        address: SocketAddr,
    },
    /// Send a probe at once, report [`super::Peers::verify_within`] how long its answer may take,
    /// and [`super::Peers::verified`] when anything comes back.
    Verify {
        /// The connection that may be dead.
        conn: ConnKey,
    },
    /// The connection is the peer's current one from now on.
    Up {
        /// The peer.
        peer: NodeId,
        /// Its connection.
        conn: ConnKey,
        /// Higher than that of every earlier one.
        number: ConnectionNumber,
    },
    /// The peer has no current connection any more.
    Down {
        /// The peer.
        peer: NodeId,
        /// Number of the connection that it had.
        number: ConnectionNumber,
    },
    /// Start nothing new on the connection; it is closed by a later action.
    Drain {
        /// The replaced connection.
        conn: ConnKey,
    },
    /// Close the connection; the machine has forgotten it, and a `closed` for it is ignored.
    Close {
        /// The connection.
        conn: ConnKey,
        /// What to tell the peer.
        reason: CloseReason,
    },
}

/// Counts of events since the machine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeersCounters {
    /// Dials begun.
    pub dials: u64,
    /// Dials that failed, timed out or were given up.
    pub dials_failed: u64,
    /// Connections that came up.
    pub ups: u64,
    /// Up connections that were replaced by newer ones.
    pub replaced: u64,
    /// Number of times that a peer was left without a connection.
    pub downs: u64,
    /// Handshakes refused.
    pub refused: u64,
    /// Dial requests sent.
    pub dial_requests_sent: u64,
    /// Dial requests received that changed something.
    pub dial_requests_heeded: u64,
    /// Members left out because of `peers_max`, at the last topology.
    pub members_left_out: u64,
}
