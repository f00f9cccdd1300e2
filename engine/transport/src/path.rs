//! What lanes, message streams and incoming streams need of a connection: one trait, so that the
//! same code runs over quiche and over the simulator's model of QUIC.
//!
//! Every method is one call of quiche, with its meaning. Callers are generic over the path for each
//! method, so that the product is compiled for quiche alone: no call goes through a table.
//!
//! Invariants
//! 1. A path never blocks and never calls back: it takes, gives, or says [`StreamError::Blocked`].
//! 2. What a path took of a stream arrives in order and once, or the stream or the connection ends.

use std::time::Duration;

use crate::buffers::StreamBuffer;

/// Why a stream took or gave nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamError {
    /// Not now: flow control or congestion leaves no room, or nothing has arrived.
    Blocked,
    /// The peer asked us to stop sending (STOP_SENDING; RFC 9000, 19.5).
    Stopped,
    /// The peer reset the stream, the stream is gone, or the connection is closing.
    Ended,
}

impl From<quiche::Error> for StreamError {
    #[inline]
    fn from(error: quiche::Error) -> Self {
        match error {
            quiche::Error::Done => Self::Blocked,
            quiche::Error::StreamStopped(_) => Self::Stopped,
            _ => Self::Ended,
        }
    }
}

/// Packets of a connection since its start, and its round trip.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathStats {
    /// Packets sent.
    pub sent: usize,
    /// Packets received.
    pub received: usize,
    /// Packets lost on the way to the peer.
    pub lost: usize,
    /// Smoothed round-trip time of the path in use; `None` when no path is.
    pub rtt: Option<Duration>,
}

/// The streams and datagrams of one connection. Stream ids are those of RFC 9000, 2.1.
pub trait StreamPath {
    /// Sets how urgent a stream of ours is, 0 first (RFC 9218, with 256 levels); opens the stream
    /// if it is not open.
    ///
    /// # Errors
    /// When the peer's limit of streams is reached, or the connection is closing.
    fn stream_priority(&mut self, stream: u64, urgency: u8) -> Result<(), StreamError>;

    /// Appends a copy of `bytes` to a stream of ours; the bytes taken.
    ///
    /// # Errors
    /// When nothing was taken: see [`StreamError`].
    fn stream_send(&mut self, stream: u64, bytes: &[u8], fin: bool) -> Result<usize, StreamError>;

    /// Appends a buffer to a stream of ours without a copy; the bytes taken. `fin` counts only when
    /// all of it was taken.
    ///
    /// # Errors
    /// When nothing was taken: see [`StreamError`]. The buffer is dropped then.
    fn stream_send_buffer(
        &mut self,
        stream: u64,
        buffer: StreamBuffer,
        fin: bool,
    ) -> Result<usize, StreamError>;

    /// Bytes that a stream of ours would take now.
    ///
    /// # Errors
    /// [`StreamError::Stopped`] and [`StreamError::Ended`]: it will never take any. A stream that
    /// the peer stopped is freed by this call.
    fn stream_capacity(&mut self, stream: u64) -> Result<usize, StreamError>;

    /// Ends a stream of ours without its rest (RESET_STREAM; RFC 9000, 19.4). Nothing happens to
    /// one that has ended.
    fn stream_reset(&mut self, stream: u64, code: u64);

    /// Reads what has arrived in order on a stream of the peer; the bytes read, and whether the
    /// stream ends after them.
    ///
    /// # Errors
    /// [`StreamError::Blocked`] when nothing is there, [`StreamError::Ended`] when the peer reset
    /// it.
    fn stream_recv(&mut self, stream: u64, out: &mut [u8]) -> Result<(usize, bool), StreamError>;

    /// As [`Self::stream_recv`], and throws the bytes away.
    ///
    /// # Errors
    /// As [`Self::stream_recv`].
    fn stream_discard(&mut self, stream: u64, len: usize) -> Result<(usize, bool), StreamError>;

    /// The next stream that became readable, each once until more arrives.
    fn stream_readable_next(&mut self) -> Option<u64>;

    /// The next stream of ours that became writable, or was stopped while it was not, each once.
    /// One that was writable is not named again when the peer stops it.
    fn stream_writable_next(&mut self) -> Option<u64>;

    /// Unidirectional streams that the peer lets us open now.
    fn streams_left(&self) -> u64;

    /// Sends a datagram (RFC 9221). It may be lost, here too: its sender repeats it.
    fn datagram_send(&mut self, datagram: Vec<u8>);

    /// The next datagram that arrived.
    fn datagram_recv(&mut self) -> Option<Vec<u8>>;

    /// Sends a PING (RFC 9000, 19.2), unless the connection is closing; whether it will.
    fn send_ping(&mut self) -> bool;

    /// Packets so far, and the round trip. Not for every packet: it adds up over paths.
    fn stats(&self) -> PathStats;
}
