//! How far a connection has come, and how long it may stay there.
//!
//! ```text
//! Handshake -> AwaitHello -> Up -> Draining -> Lingering -> Closing -> removed
//!      \____________\_________\________\_____________/
//! ```
//!
//! Invariants
//! 1. A connection is `Up` from the peer's hello on, not from the end of the handshake, which a
//!    client sees before the server judged it.
//! 2. Nothing leaves `Closing`.

use std::time::Instant;

use crate::quic::CloseCode;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// TLS is not done; given up at `until`.
    Handshake {
        /// When.
        until: Instant,
    },
    /// TLS is done; the peer's hello is still to come.
    /// [`Peers`](millrace_protocol::peers::Peers) bounds the wait.
    AwaitHello,
    /// In use.
    Up,
    /// Takes no new messages of ours; closed when idle, at `until`, or when
    /// [`Peers`](millrace_protocol::peers::Peers) says so.
    Draining {
        /// When at the latest.
        until: Option<Instant>,
        /// What the peer hears then.
        code: CloseCode,
    },
    /// As `Draining`, and idle: what the path still has to send gets until `until`.
    Lingering {
        /// When.
        until: Instant,
        /// What the peer hears then.
        code: CloseCode,
    },
    /// CONNECTION_CLOSE was queued; a path keeps the connection for three PTOs (RFC 9000, 10.2).
    Closing,
}

/// What ran out of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expired {
    /// The handshake.
    Handshake,
    /// The rest of a connection that drains: close it with this code.
    Drained(CloseCode),
}

impl Phase {
    /// When the phase is to be looked at again; see [`Self::expired`].
    pub fn next_timeout(&self) -> Option<Instant> {
        match *self {
            Self::Handshake { until } | Self::Lingering { until, .. } => Some(until),
            Self::Draining { until, .. } => until,
            Self::AwaitHello | Self::Up | Self::Closing => None,
        }
    }

    /// What has run out of time at `now`.
    pub fn expired(&self, now: Instant) -> Option<Expired> {
        self.next_timeout().filter(|until| *until <= now)?;
        match *self {
            Self::Handshake { .. } => Some(Expired::Handshake),
            Self::Draining { code, .. } | Self::Lingering { code, .. } => {
                Some(Expired::Drained(code))
            }
            Self::AwaitHello | Self::Up | Self::Closing => None,
        }
    }

    /// A connection that drains has nothing more to carry: it lingers, until `until` at the latest.
    pub fn linger(&mut self, until: Instant) {
        if let Self::Draining {
            until: latest,
            code,
        } = *self
        {
            *self = Self::Lingering {
                until: latest.map_or(until, |latest| latest.min(until)),
                code,
            };
        }
    }
}
