//! A service that takes bodies in each way that there is, and checks what it is given.

use std::cell::RefCell;
use std::rc::Rc;

use millrace_protocol::frame::{FailureCode, Limits, Method};
use millrace_shards::chunk::Chunk;
use millrace_transport::{
    Answer, BodyHead, BodyMode, BodySink, Defer, INLINE_BYTES_MAX, Inbound, InboundBody, Service,
};

use crate::assert_label;

/// What the service heard of.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Messages, with their bodies.
    pub(super) taken: u64,
    /// Sinks that it gave.
    pub(super) sinks: u64,
    /// Of those, the ones that heard that their body will not become whole.
    pub(super) cut: u64,
    /// Of those, the ones that came back with a whole body.
    pub(super) streamed: u64,
}

/// Takes bodies in each way that there is, by the method.
pub(super) struct Taker(pub(super) Rc<RefCell<Heard>>);

pub(super) const WHOLE: Method = Method(1);
pub(super) const STREAMED: Method = Method(2);
pub(super) const REFUSED: Method = Method(3);
pub(super) const BUSY: Method = Method(4);

struct Sink {
    heard: Rc<RefCell<Heard>>,
    body_bytes: u64,
    got_bytes: u64,
}

impl BodySink for Sink {
    fn on_chunk(&mut self, offset: u64, chunk: Chunk) {
        assert_eq!(offset, self.got_bytes, "a gap");
        self.got_bytes += chunk.len() as u64;
        assert!(self.got_bytes <= self.body_bytes);
    }

    fn on_cut(&mut self, reason: &'static str) {
        assert_label(reason);
        self.heard.borrow_mut().cut += 1;
    }
}

impl Taker {
    fn take(&self, body: InboundBody<'_>) {
        assert!(body.len() <= LIMITS.body_bytes_max.into());
        self.0.borrow_mut().taken += 1;
        match body {
            InboundBody::Slice(bytes) => assert!(bytes.len() <= INLINE_BYTES_MAX),
            InboundBody::Chunks(body) => assert!(body.len() > INLINE_BYTES_MAX),
            InboundBody::Streamed(body) => {
                let body_bytes = body.len();
                let sink = body.into_sink::<Sink>().unwrap();
                assert_eq!((sink.got_bytes, sink.body_bytes), (body_bytes, body_bytes));
                self.0.borrow_mut().streamed += 1;
            }
        }
    }
}

impl Service for Taker {
    fn on_request(&mut self, request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        self.take(request.body);
        match request.method == BUSY {
            true => Answer::Failure(FailureCode::Busy),
            false => Answer::Reply(b"taken".to_vec().into()),
        }
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        self.take(message.body);
    }

    fn on_body(&mut self, head: &BodyHead) -> BodyMode {
        assert!(head.body_bytes > INLINE_BYTES_MAX as u64);
        assert!(head.body_bytes <= LIMITS.body_bytes_max.into());
        match head.method {
            STREAMED => {
                self.0.borrow_mut().sinks += 1;
                BodyMode::Stream(Box::new(Sink {
                    heard: Rc::clone(&self.0),
                    body_bytes: head.body_bytes,
                    got_bytes: 0,
                }))
            }
            REFUSED => BodyMode::Refuse(FailureCode::NotFound),
            _ => BodyMode::Whole,
        }
    }
}

/// Small, so that mutants exceed them.
pub(super) const LIMITS: Limits = Limits {
    lane_body_bytes_max: 1 << 10,
    body_bytes_max: 2 << 20,
};
