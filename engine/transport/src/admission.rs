//! The transport's side of admission: who may open a connection, and the count of those that are
//! open.
//!
//! Invariants
//! 1. A connection is counted from the end of its handshake until it is removed, for any reason:
//!    the connection owns the permit that counts it.
//! 2. A handshake that a peer began is counted from its first packet until it is done or the
//!    connection is removed.
//! 3. A packet of a known connection asks nothing of this module.

use std::fmt::Debug;
use std::net::SocketAddr;
use std::sync::Arc;

use millrace_edge_policy::admission::{Admission, Entitlement, First};
use millrace_edge_policy::cid::Keys;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::source::Source;

/// Hears of every counted connection: the edge implements it, and tells the kernel.
///
/// Called on the shards, once for each connection that opens or closes: must not block.
pub trait ConnectionCounts: Debug + Send + Sync {
    /// A connection from this source is open; its cap had room.
    fn opened(&self, source: Source);

    /// A connection that was [`opened`](Self::opened) is over.
    fn closed(&self, source: Source);

    /// A source that came without token or proof has shown that the address is its own. The
    /// implementor charges it now.
    fn validated(&self, source: Source);
}

/// Decides which connections may open, for one shard: the policy of the node, and the edge that
/// hears of its counts.
#[derive(Clone, Debug)]
pub(crate) struct AdmissionControl {
    pub(crate) policy: Arc<Admission>,
    pub(crate) counts: Option<Arc<dyn ConnectionCounts>>,
}

impl AdmissionControl {
    pub(crate) fn keys(&self) -> Keys {
        self.policy.keys()
    }

    /// Judges a packet that may begin a connection; see [`Admission::first_packet`]. The caller
    /// takes a permit for what is accepted, by [`Self::hold`], at once.
    pub(crate) fn first_packet(
        &self,
        header: &quiche::Header<'_>,
        from: SocketAddr,
        half_open: usize,
        now_ns: u64,
        wall_ns: u64,
    ) -> First {
        let token = header.token.as_deref().unwrap_or_default();
        self.policy
            .first_packet(from, &header.dcid, token, half_open, now_ns, wall_ns)
    }

    /// Counts a handshake that [`Self::first_packet`] accepted as half open, for as long as the
    /// permit lives.
    pub(crate) fn hold(&self, from: SocketAddr, by: Entitlement) -> HandshakePermit {
        HandshakePermit {
            policy: Arc::clone(&self.policy),
            from,
            by,
        }
    }

    /// A source that came without token or proof has shown its address.
    pub(crate) fn validated(&self, from: SocketAddr, now_ns: u64) {
        self.policy.validated(from, now_ns);
        if let Some(counts) = &self.counts {
            counts.validated(Source::of(from.ip()));
        }
    }

    /// Counts a connection for as long as the permit lives; refused at the cap of its source.
    pub(crate) fn open(&self, from: SocketAddr) -> Result<ConnectionPermit, Reason> {
        self.policy.opened(from)?;
        if let Some(counts) = &self.counts {
            counts.opened(Source::of(from.ip()));
        }
        Ok(ConnectionPermit {
            control: self.clone(),
            from,
        })
    }
}

/// Counts a handshake as half open while it lives.
#[derive(Debug)]
pub(crate) struct HandshakePermit {
    policy: Arc<Admission>,
    from: SocketAddr,
    by: Entitlement,
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        self.policy.handshake_over(self.from, self.by);
    }
}

/// Counts a connection while it lives.
#[derive(Debug)]
pub(crate) struct ConnectionPermit {
    control: AdmissionControl,
    from: SocketAddr,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.control.policy.closed(self.from);
        if let Some(counts) = &self.control.counts {
            counts.closed(Source::of(self.from.ip()));
        }
    }
}
