//! What was received: the datagrams of one GRO message.

use std::net::SocketAddr;

use crate::socket::SocketId;

/// The datagrams of one receive completion: one peer, one socket, all of one size but the last,
/// which may be shorter.
#[derive(Debug)]
pub struct Datagrams<'a> {
    socket: SocketId,
    from: SocketAddr,
    local: SocketAddr,
    segment_bytes: usize,
    payload: &'a mut [u8],
}

impl<'a> Datagrams<'a> {
    /// Datagrams of `segment_bytes` each, back to back in `payload`, as the ring receives them or a
    /// test makes them. A `segment_bytes` of zero, or above the payload, means one datagram.
    #[must_use]
    pub fn new(
        socket: SocketId,
        from: SocketAddr,
        local: SocketAddr,
        segment_bytes: usize,
        payload: &'a mut [u8],
    ) -> Self {
        let segment_bytes = if segment_bytes == 0 {
            payload.len()
        } else {
            segment_bytes
        };
        Self {
            socket,
            from,
            local,
            segment_bytes,
            payload,
        }
    }

    /// The socket they came to. Answer from the same one: see [`Trains::select`].
    ///
    /// [`Trains::select`]: crate::Trains::select
    #[must_use]
    pub fn socket(&self) -> SocketId {
        self.socket
    }

    /// The peer's address. A peer that reached a dual-stack socket over IPv4 has its IPv4 address.
    #[must_use]
    pub fn from(&self) -> SocketAddr {
        self.from
    }

    /// The address that they came to: the one that the socket is bound to, or where that is open,
    /// the host's address that the peer chose. Answer from the same one: see
    /// [`Trains::set_source`].
    ///
    /// [`Trains::set_source`]: crate::Trains::set_source
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Bytes of all datagrams together; at most 65,535.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.payload.len()
    }

    /// How many datagrams there are. An empty datagram counts as none.
    #[must_use]
    pub fn count(&self) -> usize {
        self.payload.len().div_ceil(self.segment_bytes.max(1))
    }

    /// The datagrams, in order.
    pub fn segments(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.payload.chunks_mut(self.segment_bytes.max(1))
    }

    /// The datagrams, in order, for the buffer's whole life.
    pub fn into_segments(self) -> impl Iterator<Item = &'a mut [u8]> {
        self.payload.chunks_mut(self.segment_bytes.max(1))
    }
}
