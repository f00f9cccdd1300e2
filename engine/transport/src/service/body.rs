//! Bodies that a service takes chunk by chunk, while they are received.
//!
//! A body over [`INLINE_BYTES_MAX`] of a request or a one-way message is announced to its service
//! before its space is reserved. The service takes it whole, refuses it, or gives a [`BodySink`].
//! The sink gets every chunk as it fills up, in order; then the service's handler is called with
//! the sink in place of the body, and owns what the sink made of it: a hash, a file, the chunks.
//!
//! Invariants
//! 1. A sink gets chunks without a gap from offset 0 on; all are full but the last.
//! 2. A sink either goes to the handler with its message, once all of the body is there, or hears
//!    [`BodySink::on_cut`] once. What it got before counts only in the first case.

use std::any::Any;
use std::fmt;
use std::time::Instant;

use millrace_protocol::frame::{Class, FailureCode, Method};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_shards::chunk::{Chunk, UNIT_BYTES};

/// Bodies up to this size travel and arrive as plain bytes; larger ones are chunks. One unit: what
/// a chunk takes at least.
pub const INLINE_BYTES_MAX: usize = UNIT_BYTES;

/// A body that a peer announced, before a byte of it is read.
#[derive(Clone, Copy, Debug)]
pub struct BodyHead {
    /// The peer, as its certificate proved.
    pub peer: NodeId,
    /// On which connection; larger is later.
    pub connection: ConnectionNumber,
    /// Class of the message.
    pub class: Class,
    /// What the message is about.
    pub method: Method,
    /// When the sender stops waiting; `None` for a one-way message.
    pub deadline: Option<Instant>,
    /// Bytes of the body: above [`INLINE_BYTES_MAX`], at most the transport's limit.
    pub body_bytes: u64,
}

/// How a service takes a body.
#[derive(Default)]
pub enum BodyMode {
    /// The handler is called with all of it.
    #[default]
    Whole,
    /// The sink gets it chunk by chunk; the handler is called with the sink.
    Stream(Box<dyn BodySink>),
    /// Not at all: a request is answered with this code at once, and what still comes of the body
    /// is thrown away.
    Refuse(FailureCode),
}

impl fmt::Debug for BodyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("Whole"),
            Self::Stream(_) => f.write_str("Stream"),
            Self::Refuse(code) => f.debug_tuple("Refuse").field(code).finish(),
        }
    }
}

/// Takes a body chunk by chunk. Called on the shard's thread while packets are received: calls must
/// not block, and long work (a hash of a chunk takes about a millisecond) belongs in a task.
pub trait BodySink: Any {
    /// The bytes from `offset` on: a full chunk, or the last. The space of the body that is still
    /// to come stays reserved; that of the chunk is given back when its last handle is dropped.
    fn on_chunk(&mut self, offset: u64, chunk: Chunk);

    /// The body will not become whole: the peer took it back, sent another length or stalled, there
    /// is no space for it, or its connection ended. `reason` is a stable label for logs.
    fn on_cut(&mut self, reason: &'static str) {
        let _ = reason;
    }
}

/// A body that went to a sink, all of it.
pub struct StreamedBody {
    body_bytes: u64,
    /// Always there.
    sink: Option<Box<dyn BodySink>>,
}

impl StreamedBody {
    /// Bytes of the body.
    pub fn len(&self) -> u64 {
        self.body_bytes
    }

    /// Whether the body has no bytes; a body of a sink has some.
    pub fn is_empty(&self) -> bool {
        self.body_bytes == 0
    }

    /// The sink that the service gave for it; `None` when it is of another type.
    pub fn into_sink<S: BodySink>(self) -> Option<Box<S>> {
        let sink: Box<dyn Any> = self.sink?;
        sink.downcast().ok()
    }
}

impl fmt::Debug for StreamedBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamedBody")
            .field("body_bytes", &self.body_bytes)
            .finish_non_exhaustive()
    }
}

/// The sink of a body that is not whole yet: cut when it is dropped.
pub(crate) struct OpenSink {
    sink: Option<Box<dyn BodySink>>,
}

impl OpenSink {
    pub(crate) fn new(sink: Box<dyn BodySink>) -> Self {
        Self { sink: Some(sink) }
    }

    pub(crate) fn on_chunk(&mut self, offset: usize, chunk: Chunk) {
        if let Some(sink) = &mut self.sink {
            sink.on_chunk(offset as u64, chunk);
        }
    }

    /// The body is whole.
    pub(crate) fn finish(mut self, body_bytes: u64) -> StreamedBody {
        StreamedBody {
            body_bytes,
            sink: self.sink.take(),
        }
    }

    /// The body will not become whole.
    pub(crate) fn cut(mut self, reason: &'static str) {
        if let Some(mut sink) = self.sink.take() {
            sink.on_cut(reason);
        }
    }
}

impl Drop for OpenSink {
    fn drop(&mut self) {
        if let Some(mut sink) = self.sink.take() {
            sink.on_cut("connection_lost");
        }
    }
}

impl fmt::Debug for OpenSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OpenSink")
    }
}
