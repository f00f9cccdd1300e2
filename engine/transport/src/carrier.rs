//! How the bytes of a message with a body of its own cross: one trait, one module for each way.
//!
//! A message is offered, waits in its class's queue, becomes active, and is pumped into the path a slice at a time, straight from its chunks.
//! `streams` carries messages on QUIC streams, [`crate::memory`] in pieces over the memory network. A chunk plane (datagrams keyed by
//! the TLS exporter of the connection) is to be a third; nothing above knows which one is at work.

use millrace_protocol::frame::{Class, Header};

use crate::service::message::Payload;

/// A message on its way out.
#[derive(Debug)]
pub struct Outgoing {
    /// What it is; `body_bytes` is the body's length.
    pub header: Header,
    /// The body.
    pub body: Payload,
}

/// What came of a pump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// Nothing more can be moved until the path or the queue changes.
    Blocked,
    /// The path took all it was offered in this turn; more is waiting.
    More,
}

/// Why a message was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFull;

/// Carries outgoing messages of one connection over a path of type `Path`.
pub trait Carrier {
    /// What the bytes go into: a QUIC connection, a link of the memory network.
    type Path;

    /// Queues a message; refused when its class's queue is at its bound.
    fn offer(&mut self, message: Outgoing) -> Result<(), QueueFull>;

    /// Moves as many bytes as the path takes now, higher classes first.
    fn pump(&mut self, path: &mut Self::Path) -> Pumped;

    /// Takes a message back: before its first byte it leaves no trace, after that the peer sees it reset. False when it is not (or no
    /// longer) held, so that the peer may have it whole.
    fn withdraw(&mut self, path: Option<&mut Self::Path>, header: &Header) -> bool;

    /// Messages waiting or active in `class`.
    fn queued(&self, class: Class) -> usize;
}
