//! A request from another shard or from a thread outside the shards, and the answer it waits for.
//!
//! Invariants
//! 1. The asker hears once, whatever happens on the shard that owns the connection.
//! 2. An answer that is dropped before it is there takes the request back, at whatever stage it is:
//!    in the mailbox it is not sent, in flight it is cancelled.

use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use millrace_protocol::frame::Header;
use millrace_protocol::rpc::RpcError;

use super::message::Payload;

/// A request in flight, as the shard that owns its connection finds it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallId {
    /// Slot of the connection.
    pub(crate) slot: usize,
    /// Which tenant of the slot; see [`ConnectionHandle`](super::handle::ConnectionHandle).
    pub(crate) serial: u64,
    pub(crate) header: Header,
}

/// Takes requests back at the shard that owns their connection.
pub(crate) trait Canceller: Debug + Send + Sync {
    fn cancel(&self, shard: usize, call: CallId);
}

#[derive(Debug, Default)]
struct RemoteSlot {
    result: Option<Result<Payload, RpcError>>,
    waker: Option<Waker>,
    /// Set while the request is in flight.
    call: Option<CallId>,
    is_dropped: bool,
}

#[derive(Debug, Default)]
struct RemoteState {
    slot: Mutex<RemoteSlot>,
    ready: Condvar,
}

impl RemoteState {
    fn lock(&self) -> MutexGuard<'_, RemoteSlot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complete(&self, result: Result<Payload, RpcError>) {
        let waker = {
            let mut slot = self.lock();
            slot.result = Some(result);
            slot.call = None;
            slot.waker.take()
        };
        self.ready.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The side of a [`RemoteAnswer`] that goes to the shard of the connection.
#[derive(Debug)]
pub(crate) struct RemoteCompletion {
    state: Option<Arc<RemoteState>>,
}

impl RemoteCompletion {
    /// Both sides. `canceller` is told when the answer is dropped while `shard` has the request in
    /// flight.
    pub(crate) fn new(shard: usize, canceller: Arc<dyn Canceller>) -> (Self, RemoteAnswer) {
        let state = Arc::new(RemoteState::default());
        let answer = RemoteAnswer {
            state: Arc::clone(&state),
            shard,
            canceller,
        };
        (Self { state: Some(state) }, answer)
    }

    pub(crate) fn complete(mut self, result: Result<Payload, RpcError>) {
        if let Some(state) = self.state.take() {
            state.complete(result);
        }
    }

    /// Whether the answer is still held.
    pub(crate) fn is_wanted(&self) -> bool {
        let state = self.state.as_ref();
        state.is_some_and(|state| !state.lock().is_dropped)
    }

    /// What tells the asker's side where the request is in flight.
    pub(crate) fn tracker(&self) -> CallTracker {
        CallTracker(self.state.clone())
    }
}

impl Drop for RemoteCompletion {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            // The shard stopped with the request in its mailbox or in flight.
            state.complete(Err(RpcError::LocalShuttingDown));
        }
    }
}

/// See [`RemoteCompletion::tracker`].
#[derive(Debug)]
pub(crate) struct CallTracker(Option<Arc<RemoteState>>);

impl CallTracker {
    /// The request is in flight as `call`. False when the answer was dropped meanwhile: the request
    /// is then to be taken back.
    pub(crate) fn began(self, call: CallId) -> bool {
        let Some(state) = self.0 else { return true };
        let mut slot = state.lock();
        if slot.result.is_none() {
            slot.call = Some(call);
        }
        !slot.is_dropped
    }
}

/// The answer to a request from outside its connection's shard: await it, or
/// [`wait`](Self::wait) for it.
///
/// Dropped before it is ready, it takes the request back: the peer's service sees the cancellation.
/// A mailbox that is full then delays the cancellation until its shard next keeps house
/// (`ShardConfig::housekeeping`, 100 ms), and the delay is counted.
#[derive(Debug)]
#[must_use = "a request is taken back when its answer is dropped"]
pub struct RemoteAnswer {
    state: Arc<RemoteState>,
    shard: usize,
    canceller: Arc<dyn Canceller>,
}

impl RemoteAnswer {
    /// The request did not get to the shard.
    pub(crate) fn fail(&self, error: RpcError) {
        self.state.complete(Err(error));
    }

    /// Blocks this thread until the answer is there. The request's deadline bounds the wait;
    /// `limit` bounds it a second time, for a shard that has hung. Not for a shard's thread.
    ///
    /// # Errors
    /// As the request's answer; [`RpcError::Timeout`] also at `limit`, which takes the request
    /// back.
    pub fn wait(self, limit: Duration) -> Result<Payload, RpcError> {
        let until = Instant::now() + limit;
        let mut slot = self.state.lock();
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
        let mut slot = self.state.lock();
        match slot.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                slot.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for RemoteAnswer {
    fn drop(&mut self) {
        let call = {
            let mut slot = self.state.lock();
            slot.is_dropped = true;
            slot.call.take()
        };
        if let Some(call) = call {
            self.canceller.cancel(self.shard, call);
        }
    }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::frame::{Class, Kind, Method};

    use super::*;

    /// Writes down what it is to cancel.
    #[derive(Debug, Default)]
    struct Cancelled(Mutex<Vec<(usize, CallId)>>);

    impl Canceller for Cancelled {
        fn cancel(&self, shard: usize, call: CallId) {
            self.0.lock().unwrap().push((shard, call));
        }
    }

    const SHARD: usize = 3;

    fn call() -> CallId {
        let header = Header {
            kind: Kind::Request,
            class: Class::Normal,
            method: Method(1),
            id: 7,
            body_bytes: 0,
            arg: 0,
        };
        CallId {
            slot: 1,
            serial: 2,
            header,
        }
    }

    fn sides() -> (RemoteCompletion, RemoteAnswer, Arc<Cancelled>) {
        let cancelled = Arc::new(Cancelled::default());
        let canceller = Arc::clone(&cancelled) as Arc<dyn Canceller>;
        let (completion, answer) = RemoteCompletion::new(SHARD, canceller);
        (completion, answer, cancelled)
    }

    fn taken(cancelled: &Cancelled) -> Vec<(usize, CallId)> {
        cancelled.0.lock().unwrap().clone()
    }

    #[test]
    fn an_answer_dropped_in_the_mailbox_is_not_wanted() {
        let (completion, answer, cancelled) = sides();
        assert!(completion.is_wanted());
        drop(answer);
        assert!(!completion.is_wanted());
        assert!(
            !completion.tracker().began(call()),
            "it is taken back at once"
        );
        assert_eq!(taken(&cancelled), []);
    }

    #[test]
    fn an_answer_dropped_in_flight_is_taken_back_where_it_is() {
        let (completion, answer, cancelled) = sides();
        assert!(completion.tracker().began(call()));
        drop(answer);
        assert_eq!(taken(&cancelled), [(SHARD, call())]);
        assert!(!completion.is_wanted());
    }

    #[test]
    fn an_answer_that_came_takes_nothing_back() {
        let (completion, answer, cancelled) = sides();
        let tracker = completion.tracker();
        assert!(completion.tracker().began(call()));
        completion.complete(Ok(Payload::Empty));
        // The shard answers before it says where the request was: it must not be cancelled later.
        assert!(tracker.began(call()));
        assert!(answer.wait(Duration::ZERO).unwrap().is_empty());
        assert_eq!(taken(&cancelled), []);
    }

    #[test]
    fn a_shard_that_stops_answers_all() {
        let (completion, answer, _) = sides();
        drop(completion);
        let error = answer.wait(Duration::ZERO).unwrap_err();
        assert_eq!(error, RpcError::LocalShuttingDown);
    }

    #[test]
    fn a_wait_that_runs_out_takes_the_request_back() {
        let (completion, answer, cancelled) = sides();
        assert!(completion.tracker().began(call()));
        let error = answer.wait(Duration::ZERO).unwrap_err();
        assert_eq!(error, RpcError::Timeout);
        assert_eq!(taken(&cancelled), [(SHARD, call())]);
    }
}
