//! The answer to a request that a service gives later.
//!
//! Invariants
//! 1. A request is answered once: a [`Responder`] that is dropped says [`FailureCode::Internal`].
//! 2. A service learns when its peer no longer waits: [`Responder::cancelled`].

use std::future::poll_fn;
use std::rc::Rc;

use millrace_protocol::frame::{Class, FailureCode};

use super::handle::ConnectionHandle;
use super::message::Payload;

/// Hands out the responder of a request that is answered later.
#[derive(Debug)]
pub struct Defer<'a> {
    pub(crate) handle: &'a Rc<ConnectionHandle>,
    pub(crate) class: Class,
    pub(crate) id: u32,
}

impl Defer<'_> {
    /// The responder; return [`Answer::Deferred`](super::message::Answer::Deferred) after taking
    /// it. `None` when the peer has too many requests of this class in flight: answer with
    /// [`FailureCode::Busy`] then.
    pub fn responder(&self) -> Option<Responder> {
        if !self.handle.open_inbound(self.class, self.id) {
            return None;
        }
        Some(Responder {
            handle: Rc::clone(self.handle),
            class: self.class,
            id: self.id,
            done: false,
        })
    }
}

/// Answers one request later. Dropped without an answer, it says [`FailureCode::Internal`].
#[derive(Debug)]
pub struct Responder {
    handle: Rc<ConnectionHandle>,
    class: Class,
    id: u32,
    done: bool,
}

impl Responder {
    /// Sends the answer.
    pub fn reply(mut self, body: Payload) {
        self.finish(Ok(body));
    }

    /// Refuses.
    pub fn fail(mut self, code: FailureCode) {
        self.finish(Err(code));
    }

    /// Whether the peer no longer waits: it took the request back, or its connection ended. An
    /// answer is then thrown away.
    pub fn is_cancelled(&self) -> bool {
        !self.handle.is_inbound_open(self.id)
    }

    /// Ready when the peer no longer waits; see [`Self::is_cancelled`]. One task may await it at a
    /// time: the last one to poll is woken.
    pub async fn cancelled(&self) {
        poll_fn(|context| self.handle.poll_cancelled(self.id, context)).await;
    }

    fn finish(&mut self, answer: Result<Payload, FailureCode>) {
        self.done = true;
        if self.handle.close_inbound(self.id) {
            self.handle.answer(self.class, self.id, answer);
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.done {
            self.finish(Err(FailureCode::Internal));
        }
    }
}
