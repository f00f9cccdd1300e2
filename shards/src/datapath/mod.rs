//! What a protocol plugs into a shard's loop.
//!
//! The loop calls, in each turn and in this order: `on_message` for each waiting message,
//! `on_refused` for trains that were too large, `on_datagrams` for each receive completion,
//! `on_timeout` if the deadline has passed; then it runs the local tasks that these woke, then
//! calls `transmit`, then submits everything once. A request that comes in is answered in the same
//! turn.
//!
//! Nothing here knows the ring: [`Datagrams`] are bytes in memory, and [`Trains`] are built in
//! memory that a [`TrainBuffer`] lends. A test drives a datapath over a `Vec`.
//!
//! Invariants the loop keeps:
//!
//! 1. All methods run on the shard's thread, never one inside another.
//! 2. `now` never goes back.
//! 3. `transmit` is called in every turn that did anything, and again in the next turn after
//!    [`Transmit::More`].

mod datagrams;
mod trains;

use std::net::SocketAddr;
use std::time::Instant;

pub use datagrams::Datagrams;
pub use trains::{SEGMENTS_MAX, Slot, TRAIN_BYTES_MAX, Train, TrainBuffer, Trains};

/// A train that the kernel refused, as its packets are larger than the device's MTU (`EMSGSIZE`,
/// udp(7)). Nothing of it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// The peer that it was for.
    pub to: SocketAddr,
    /// Bytes of its first packet, the largest one.
    pub packet_bytes: usize,
}

/// A protocol on a shard.
///
/// The methods with a body do nothing, or say that there is nothing to do.
pub trait Datapath: 'static {
    /// What other threads send to this shard.
    type Message: Send + 'static;

    /// A message from the mailbox.
    fn on_message(&mut self, message: Self::Message, now: Instant);

    /// One receive completion: datagrams from one peer to one socket, to be decrypted in place.
    fn on_datagrams(&mut self, datagrams: Datagrams<'_>, now: Instant);

    /// The kernel refused a train as too large. Of many at once, some are not told; all are counted
    /// as errors of sending.
    fn on_refused(&mut self, _refused: &Refused, _now: Instant) {}

    /// Puts what is to be sent into trains.
    fn transmit(&mut self, trains: &mut Trains<'_>, now: Instant) -> Transmit;

    /// Whether a local task queued something since the last `transmit`: the loop must not park.
    fn has_pending(&self) -> bool;

    /// Whether what was received so far should be answered before more is received. The loop asks
    /// between completions.
    fn wants_to_send(&self) -> bool {
        false
    }

    /// When [`Self::on_timeout`] is due next. The loop asks once per turn: keep it cheap.
    fn next_timeout(&mut self) -> Option<Instant> {
        None
    }

    /// The deadline of [`Self::next_timeout`] has passed.
    fn on_timeout(&mut self, _now: Instant) {}

    /// Called once per [`ShardConfig::housekeeping`](crate::ShardConfig::housekeeping), 100 ms by
    /// default.
    fn on_housekeeping(&mut self, _now: Instant) {}

    /// The shard was asked to stop: close what is open. The loop goes on until
    /// [`Self::is_stopped`].
    fn on_stop(&mut self, _now: Instant) {}

    /// Whether a stop that was asked for is complete. Asked in each turn after `on_stop`.
    fn is_stopped(&self, _now: Instant) -> bool {
        true
    }
}

/// What `transmit` left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transmit {
    /// Nothing more to send now.
    Done,
    /// More to send: a budget or the slots were used up. Call again in the next turn.
    More,
}
