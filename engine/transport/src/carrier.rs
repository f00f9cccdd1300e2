//! How the bytes of a message with a body of its own cross: one trait, one module for each way.
//!
//! A message is enqueued, waits in its class's queue, becomes active, and is moved into the path a
//! slice at a time, straight from its chunks. `streams` carries messages on QUIC streams. A chunk
//! plane (datagrams keyed by the TLS exporter of the connection) is to be a second way; nothing
//! above knows which one is at work.

use std::rc::Rc;

use millrace_protocol::frame::{Class, Header};
use millrace_protocol::unread::UnreadError;

use crate::path::StreamPath;
use crate::service::message::Payload;
use crate::unread::UnreadAnswer;

/// A message on its way out.
#[derive(Debug)]
pub struct Outgoing {
    /// What it is; `body_bytes` is the body's length.
    pub header: Header,
    /// The body.
    pub body: Payload,
    /// What counts it while it is an answer in chunks.
    pub(crate) unread: Option<Rc<UnreadAnswer>>,
}

impl Outgoing {
    /// A message that no queue holds yet.
    pub fn new(header: Header, body: Payload) -> Self {
        Self {
            header,
            body,
            unread: None,
        }
    }
}

/// What stopped a [`Carrier::poll_transmit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing more can be moved until the path or the queue changes.
    Blocked,
    /// The path took all it was offered in this turn; more is waiting.
    More,
}

/// Why a message was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueFull {
    /// The queue of its class is at its bound, or those of all connections are.
    Queue,
    /// It is an answer, and the answers that are not read leave it no room.
    Unread(UnreadError),
}

/// Carries outgoing messages of one connection over its path.
pub trait Carrier {
    /// Queues a message.
    ///
    /// # Errors
    /// When there is no room for it now: see [`QueueFull`].
    fn enqueue(&mut self, message: Outgoing) -> Result<(), QueueFull>;

    /// Moves as many bytes as the path takes now, higher classes first.
    fn poll_transmit<P: StreamPath>(&mut self, path: &mut P) -> Progress;

    /// Takes a message back: before its first byte it leaves no trace, after that the peer sees it
    /// reset. False when it is not (or no longer) held, so that the peer may have it whole.
    fn cancel<P: StreamPath>(&mut self, path: &mut P, header: &Header) -> bool;

    /// Messages waiting or active in `class`.
    fn queued(&self, class: Class) -> usize;
}
