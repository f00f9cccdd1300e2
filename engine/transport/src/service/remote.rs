//! A request from a thread outside the shards, and the answer that it waits for.
//!
//! Invariant: whatever happens to the shard's side, the asker hears once.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use millrace_protocol::rpc::RpcError;

use crate::service::message::Payload;

#[derive(Debug, Default)]
struct RemoteSlot {
    result: Option<Result<Payload, RpcError>>,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct RemoteState {
    slot: Mutex<RemoteSlot>,
    ready: std::sync::Condvar,
}

/// The shard's side of a [`RemoteAnswer`]: whatever happens to it, the other side hears once.
#[derive(Debug)]
pub(crate) struct RemoteCompletion {
    state: Option<Arc<RemoteState>>,
}

impl RemoteCompletion {
    /// Both sides.
    pub(crate) fn new() -> (Self, RemoteAnswer) {
        let state = Arc::new(RemoteState::default());
        let answer = RemoteAnswer {
            state: Arc::clone(&state),
        };
        (Self { state: Some(state) }, answer)
    }

    pub(crate) fn complete(mut self, result: Result<Payload, RpcError>) {
        if let Some(state) = self.state.take() {
            state.complete(result);
        }
    }
}

impl Drop for RemoteCompletion {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            // The mailbox was full, or the shard stopped with the request in it or in flight.
            state.complete(Err(RpcError::LocalShuttingDown));
        }
    }
}

impl RemoteState {
    fn complete(&self, result: Result<Payload, RpcError>) {
        let waker = {
            let mut slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
            slot.result = Some(result);
            slot.waker.take()
        };
        self.ready.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The answer to a request from outside the shards: await it, or [`wait`](Self::wait) for it. Dropping it does not take the request back.
#[derive(Debug)]
#[must_use]
pub struct RemoteAnswer {
    state: Arc<RemoteState>,
}

impl RemoteAnswer {
    /// The request did not even get to the shard.
    pub(crate) fn fail(&self, error: RpcError) {
        self.state.complete(Err(error));
    }

    /// Blocks this thread until the answer is there. The request's deadline bounds the wait; `limit` is a belt.
    pub fn wait(self, limit: Duration) -> Result<Payload, RpcError> {
        let until = Instant::now() + limit;
        let mut slot = self
            .state
            .slot
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(result) = slot.result.take() {
                return result;
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return Err(RpcError::Timeout);
            };
            slot = self
                .state
                .ready
                .wait_timeout(slot, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Future for RemoteAnswer {
    type Output = Result<Payload, RpcError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut slot = self
            .state
            .slot
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match slot.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                slot.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}
