//! Requests in flight on one connection: those that this node sent, and those that it answers.
//!
//! Called for every request and response. [`RpcTable`] holds the waiter of each response;
//! [`InFlight`] holds the server's state of each request, so that a cancel finds it.
//!
//! 1. A request has a deadline, and a waiter is handed back exactly once: by its response, its
//!    deadline, its cancel or the loss of the connection.
//! 2. Requests in flight are bounded per class, on both sides.
//! 3. An id comes back into use only after [`REUSE_AFTER`] others, with another generation: a late
//!    response finds no waiter, and never the waiter of another request.
//! 4. All is O(1): ids are slab positions, deadlines lie in a timer wheel.

mod in_flight;
mod table;
#[cfg(test)]
mod tests;

pub use in_flight::{InFlight, InFlightError};
pub use table::{REUSE_AFTER, RpcTable};

use crate::frame::{Class, FailureCode};
use thiserror::Error;

/// Bounds of requests in flight on one connection, by [`Class::index`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RpcLimits {
    /// Largest number of requests in flight per class. The sum is at most
    /// [`RpcLimits::SLOTS_MAX`]; what is above it is ignored.
    pub in_flight_max: [u32; 3],
}

impl RpcLimits {
    /// Largest sum: 16 of an id's 32 bits are its position.
    pub const SLOTS_MAX: u32 = 1 << 16;

    pub(crate) fn slots(&self) -> u32 {
        self.in_flight_max
            .iter()
            .fold(0, |sum: u32, n| sum.saturating_add(*n))
            .min(Self::SLOTS_MAX)
    }
}

impl Default for RpcLimits {
    fn default() -> Self {
        Self {
            in_flight_max: [2048, 1024, 256],
        }
    }
}

/// Why a request has no response.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RpcError {
    /// Too many of this class in flight to the peer.
    #[error("too many {} requests in flight to this peer", .0.label())]
    LocalBusy(Class),
    /// The body is longer than any peer accepts; or it is of a one-way message of class latency and
    /// longer than a frame on a lane, on which those messages keep their order.
    #[error("body of {body_bytes} bytes, at most {max_bytes} are sent")]
    LocalTooLarge {
        /// Length of the body.
        body_bytes: u64,
        /// Longest body allowed.
        max_bytes: u64,
    },
    /// This node has no space for the response now.
    #[error("receive budget is used up")]
    LocalNoBudget,
    /// This node never has space for a response of this length.
    #[error("response of {body_bytes} bytes is more than this node takes from one peer")]
    LocalAnswerTooLarge {
        /// Of its body.
        body_bytes: u64,
    },
    /// This node is shutting down.
    #[error("this node is shutting down")]
    LocalShuttingDown,
    /// The asker cancelled the request.
    #[error("cancelled")]
    LocalCancelled,
    /// No connection to the peer.
    #[error("not connected to the peer")]
    NotConnected,
    /// The connection ended before the response.
    #[error("connection lost")]
    ConnectionLost,
    /// The deadline passed before the response.
    #[error("deadline passed")]
    Timeout,
    /// The peer says that it failed.
    #[error("peer failed: {}", .0.reason())]
    Peer(FailureCode),
    /// The peer's response is not one, or ended early; or the peer stopped the request's stream and
    /// did not say why.
    #[error("peer broke the protocol")]
    PeerProtocol,
}

impl RpcError {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::LocalBusy(_) => "local_busy",
            Self::LocalTooLarge { .. } => "local_too_large",
            Self::LocalNoBudget => "local_no_budget",
            Self::LocalAnswerTooLarge { .. } => "local_answer_too_large",
            Self::LocalShuttingDown => "local_shutting_down",
            Self::LocalCancelled => "local_cancelled",
            Self::NotConnected => "not_connected",
            Self::ConnectionLost => "connection_lost",
            Self::Timeout => "timeout",
            Self::Peer(code) => code.reason(),
            Self::PeerProtocol => "peer_protocol",
        }
    }
}
