//! What a protocol plugs into a shard's loop.
//!
//! The loop calls, in each turn and in this order: `on_message` for each waiting message,
//! `on_datagrams` for each receive completion, `on_receive_batch_end` once after them, then runs the
//! local tasks these woke, then `on_timeout` if the deadline has passed, then `transmit`, then
//! submits everything once. A request that comes in is answered in the same turn.
//!
//! Invariants the loop keeps:
//!
//! 1. All methods run on the shard's thread, never one inside another.
//! 2. `now` never goes back.
//! 3. `transmit` is called in every turn that did anything, and again in the next turn after
//!    [`Transmit::More`].

use std::net::SocketAddr;
use std::time::Instant;

use crate::ring::Ring;
use crate::stats::ShardStats;

/// A protocol on a shard.
pub trait Datapath: 'static {
    /// What other threads send to this shard.
    type Message: Send + 'static;

    /// A message from the mailbox.
    fn on_message(&mut self, message: Self::Message, now: Instant);

    /// One receive completion: datagrams from one peer, to be decrypted in place.
    fn on_datagrams(&mut self, datagrams: Datagrams<'_>, now: Instant);

    /// All receive completions of this turn were handed over.
    fn on_receive_batch_end(&mut self, now: Instant);

    /// Whether what was received so far should be answered before more is received: asked between completions.
    fn wants_to_send(&self) -> bool {
        false
    }

    /// The deadline of [`Self::next_timeout`] has passed.
    fn on_timeout(&mut self, now: Instant);

    /// When [`Self::on_timeout`] is due next. Asked for once per turn: keep it cheap.
    fn next_timeout(&mut self) -> Option<Instant>;

    /// Puts what is to be sent into trains.
    fn transmit(&mut self, trains: &mut Trains<'_>, now: Instant) -> Transmit;

    /// Whether a local task queued something since the last `transmit`: the loop must not park.
    fn has_pending(&self) -> bool;

    /// About every 100 ms.
    fn on_housekeeping(&mut self, now: Instant, stats: &ShardStats);

    /// The shard was asked to stop: say farewell. The loop goes on until [`Self::is_stopped`].
    fn on_stop(&mut self, now: Instant);

    /// Whether a stop that was asked for is complete. Asked in each turn after `on_stop`.
    fn is_stopped(&self, now: Instant) -> bool;
}

/// What `transmit` left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transmit {
    /// Nothing more to send now.
    Done,
    /// More to send: a budget or the slots were used up. Call again in the next turn.
    More,
}

/// The datagrams of one receive completion: one peer, all of one size but the last.
#[derive(Debug)]
pub struct Datagrams<'a> {
    pub(crate) from: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) segment_bytes: usize,
    pub(crate) payload: &'a mut [u8],
}

impl<'a> Datagrams<'a> {
    /// The peer's address.
    #[must_use]
    pub fn from(&self) -> SocketAddr {
        self.from
    }

    /// The address of the socket they came to.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Bytes of all datagrams together.
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

/// Where `transmit` builds its GSO trains.
///
/// A train is packets of one size to one peer, of which the last may be shorter; the kernel takes it
/// in one call. Packets lie back to back in a 64 KiB slot, and a packet that does not fit the open
/// train starts the next one where it lies.
#[derive(Debug)]
pub struct Trains<'a> {
    pub(crate) ring: &'a mut Ring,
}

impl Trains<'_> {
    /// A buffer of exactly `max_bytes` for the next packet; `None` when this turn's slots are used
    /// up, and the rest must wait for the next turn. Asking again without a push gives the same
    /// place.
    ///
    /// Always ask for the full packet size: a protocol offered less splits its frames to fit.
    #[inline]
    pub fn packet(&mut self, max_bytes: usize) -> Option<&mut [u8]> {
        self.ring.packet(max_bytes)
    }

    /// Sends the first `len` bytes of the buffer that [`Self::packet`] gave.
    ///
    /// # Panics
    /// When that buffer was shorter, or none was asked for.
    #[inline]
    pub fn push(&mut self, len: usize, to: SocketAddr) {
        self.ring.push(len, to);
    }

    /// Ends the open train. Call it between connections that may share a peer's address: a train is
    /// steered as a whole, by its first packet's connection ID.
    #[inline]
    pub fn finish(&mut self) {
        self.ring.finish();
    }
}
