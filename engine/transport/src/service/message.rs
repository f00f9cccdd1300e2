//! Requests, answers and one-way messages as a service sends and receives them.

use std::time::{Duration, Instant};

use bytes::Bytes;
use millrace_protocol::frame::{Class, FailureCode, Method};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_shards::chunk::Body;

use super::body::StreamedBody;

/// The body of a message. Up to 64 KiB it may be bytes; above, it is chunks and is never copied.
#[derive(Clone, Debug, Default)]
pub enum Payload {
    /// No body.
    #[default]
    Empty,
    /// A small body.
    Bytes(Bytes),
    /// A body in chunks, sent from where it lies.
    Chunks(Body),
}

impl Payload {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Chunks(body) => body.len() as u64,
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of a small body; `None` for chunks.
    pub fn as_slice(&self) -> Option<&[u8]> {
        match self {
            Self::Empty => Some(&[]),
            Self::Bytes(bytes) => Some(bytes),
            Self::Chunks(_) => None,
        }
    }

    /// The text of a small body in UTF-8; `None` for anything else.
    pub fn as_text(&self) -> Option<&str> {
        std::str::from_utf8(self.as_slice()?).ok()
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl From<Body> for Payload {
    fn from(body: Body) -> Self {
        Self::Chunks(body)
    }
}

/// When a request is given up. Its asker then hears
/// [`RpcError::Timeout`](millrace_protocol::rpc::RpcError::Timeout), and the peer a cancellation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// So long from now, whatever happens: for a question with a small answer.
    After(Duration),
    /// When nothing of it comes forward any more: for a long body, or a long answer.
    ///
    /// While bodies are sent or arrive, `stream_progress_bytes` in each `stream_progress_interval`
    /// are enough. A peer that has all of the request and says nothing has `body_patience`; a long
    /// answer may wait for longer while other bodies of the peer arrive. The rules are those of
    /// [`BodyDeadline`](millrace_protocol::body_deadline::BodyDeadline), the times of
    /// [`TransportConfig`](crate::TransportConfig).
    Progress {
        /// Longest body that the answer may have, bytes; 0 where it is small.
        answer_bytes_max: u64,
        /// What counts in place of `body_patience`, for an asker that has other peers to ask. It
        /// may be as short as a few round trips: it ends with the answer's first bytes.
        patience: Option<Duration>,
    },
}

impl From<Duration> for Deadline {
    fn from(after: Duration) -> Self {
        Self::After(after)
    }
}

/// A request to a peer.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which queue it travels in, and what may delay it.
    pub class: Class,
    /// What is asked; the meaning belongs to the code above.
    pub method: Method,
    /// The body.
    pub body: Payload,
    /// When it is given up. The peer learns it, in milliseconds.
    pub deadline: Deadline,
}

/// A message that arrived.
#[derive(Debug)]
pub struct Inbound<'a> {
    /// Who sent it, as its certificate proved.
    pub peer: NodeId,
    /// On which connection; larger is later.
    pub connection: ConnectionNumber,
    /// Its class.
    pub class: Class,
    /// What is asked.
    pub method: Method,
    /// When the sender stops waiting, as it announced; `None` for a one-way message. It may wait
    /// longer while bodies come forward: see [`Deadline::Progress`].
    pub deadline: Option<Instant>,
    /// The body.
    pub body: InboundBody<'a>,
}

/// The body of a message that arrived.
#[derive(Debug)]
pub enum InboundBody<'a> {
    /// At most 64 KiB, valid during the call.
    Slice(&'a [u8]),
    /// Received into chunks; keep or send them as they are. What is kept stays charged to the peer.
    Chunks(Body),
    /// Went to the sink that [`Service::on_body`](super::router::Service::on_body) gave, all of it.
    Streamed(StreamedBody),
}

impl InboundBody<'_> {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Slice(slice) => slice.len() as u64,
            Self::Chunks(body) => body.len() as u64,
            Self::Streamed(body) => body.len(),
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn into_payload(self) -> Payload {
        match self {
            Self::Slice([]) => Payload::Empty,
            Self::Slice(slice) => Payload::Bytes(Bytes::copy_from_slice(slice)),
            Self::Chunks(body) => Payload::Chunks(body),
            // Answers are taken whole.
            Self::Streamed(_) => Payload::Empty,
        }
    }
}

/// What a service says to a request.
#[derive(Debug)]
pub enum Answer {
    /// The answer, now. In place of one that is longer than
    /// [`answer_queue_bytes`](crate::TransportConfig::answer_queue_bytes) and not in chunks, the
    /// peer hears [`FailureCode::TooLarge`].
    Reply(Payload),
    /// Refused, now.
    Failure(FailureCode),
    /// Later, through the [`Responder`](super::responder::Responder) taken from
    /// [`Defer`](super::responder::Defer).
    Deferred,
}
