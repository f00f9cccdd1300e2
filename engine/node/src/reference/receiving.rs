//! Hashes a body while it is received, beside the packets and not instead of them.
//!
//! The sink runs on the packets' path and only queues; a task of class bulk hashes, and gives the
//! shard its turn after every chunk (about a millisecond of hashing).
//!
//! Invariant: the task ends with the sink. It gives a result only for a body that came whole.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use millrace_protocol::id::ArtifactId;
use millrace_shards::chunk::{Body, Chunk};
use millrace_transport::{BodySink, Responder};

use super::hash::Hasher;

#[derive(Debug, Default)]
struct Progress {
    /// Chunks that are not hashed yet, in order.
    chunks: VecDeque<Chunk>,
    /// The request, once all of its body is there.
    request: Option<Responder>,
    has_ended: bool,
    waker: Option<Waker>,
}

impl Progress {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// Where the chunks of a body go.
#[derive(Debug)]
pub(super) struct HashingSink(Rc<RefCell<Progress>>);

/// The hash of the body, in the making.
#[derive(Debug)]
pub(super) struct Hashing(Rc<RefCell<Progress>>);

impl HashingSink {
    /// A sink, and what to await in a task.
    pub(super) fn new() -> (Self, Hashing) {
        let progress = Rc::<RefCell<Progress>>::default();
        (Self(Rc::clone(&progress)), Hashing(progress))
    }

    /// The body is whole; the task answers the request.
    pub(super) fn finish(self, request: Responder) {
        self.0.borrow_mut().request = Some(request);
    }
}

impl BodySink for HashingSink {
    fn on_chunk(&mut self, _offset: u64, chunk: Chunk) {
        let mut progress = self.0.borrow_mut();
        progress.chunks.push_back(chunk);
        progress.wake();
    }
}

impl Drop for HashingSink {
    fn drop(&mut self) {
        let mut progress = self.0.borrow_mut();
        progress.has_ended = true;
        progress.wake();
    }
}

impl Hashing {
    /// The body, its id and its request; `None` if the body did not come whole.
    pub(super) async fn result(self) -> Option<(ArtifactId, Body, Responder)> {
        let mut hasher = Hasher::new();
        let mut chunks = Vec::new();
        while let Some(chunk) = self.next().await {
            hasher.update(&chunk);
            chunks.push(chunk);
            futures_lite::future::yield_now().await;
        }
        let request = self.0.borrow_mut().request.take()?;
        Some((hasher.finish(), Body::from_chunks(chunks)?, request))
    }

    /// The next chunk; `None` when no more will come.
    async fn next(&self) -> Option<Chunk> {
        poll_fn(|context| {
            let mut progress = self.0.borrow_mut();
            match progress.chunks.pop_front() {
                Some(chunk) => Poll::Ready(Some(chunk)),
                None if progress.has_ended => Poll::Ready(None),
                None => {
                    progress.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}
