//! Waits for room to send: what refused a message says when it takes messages again.
//!
//! Invariant: a wait is completed once, by the first connection that has room, or by the end of the
//! last one that it waits for.

use std::cell::RefCell;
use std::rc::Rc;

use millrace_protocol::frame::Class;
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;

use super::{ConnectionHandle, ShardState};
use crate::service::completion::Completion;
use crate::service::message::Payload;

/// Futures of a connection that wait for room to send; more are refused.
const WRITABLE_WAITERS_MAX: usize = 1_024;

/// A future that waits for room to send on one of several connections: the first that has room
/// takes the completion out.
pub(super) type Waiter = Rc<RefCell<Option<Completion>>>;

impl ShardState {
    /// Completes `completion` once a connection that takes messages of `class` to `peer` has room:
    /// at once, if one of them is writable. Takes no turn.
    pub(crate) fn wait_writable(&self, peer: &NodeId, class: Class, completion: Completion) {
        let handles = self.handles_to(peer, class);
        if handles.is_empty() {
            return completion.complete(Err(RpcError::NotConnected));
        }
        if handles.iter().any(|handle| handle.is_writable(class)) {
            return completion.complete(Ok(Payload::Empty));
        }
        let waiter = Waiter::new(RefCell::new(Some(completion)));
        for handle in handles {
            handle.add_waiter(class, &waiter);
        }
        if Rc::strong_count(&waiter) == 1
            && let Some(completion) = waiter.take()
        {
            completion.complete(Err(RpcError::LocalBusy(class)));
        }
    }
}

impl ConnectionHandle {
    /// Whether all that refused a message of `class` has fallen under half of its bound: lanes,
    /// streams, and requests in flight.
    pub(super) fn is_writable(&self, class: Class) -> bool {
        let has_room = self.out.borrow_mut().is_writable(class);
        // Both are asked: each forgets its refusal when it has room.
        self.calls.borrow_mut().is_writable(class) && has_room
    }

    /// `waiter` is told when `class` is writable again, unless too many wait.
    fn add_waiter(&self, class: Class, waiter: &Waiter) {
        let mut waiters = self.writable.borrow_mut();
        if waiters.len() >= WRITABLE_WAITERS_MAX {
            waiters.retain(|(_, waiter)| is_waiting(waiter));
        }
        if waiters.len() < WRITABLE_WAITERS_MAX {
            waiters.push((class, Rc::clone(waiter)));
        }
    }

    /// Completes what waits for a class that has become writable. Called after queues or requests
    /// in flight have fallen.
    #[inline]
    pub(crate) fn wake_writable(&self) {
        if !self.writable.borrow().is_empty() {
            self.wake_waiters();
        }
    }

    fn wake_waiters(&self) {
        let ready = {
            let is_writable = Class::ALL.map(|class| self.is_writable(class));
            let mut waiters = self.writable.borrow_mut();
            let is_ready = |(class, _): &mut (Class, Waiter)| is_writable[class.index()];
            waiters.extract_if(.., is_ready).collect::<Vec<_>>()
        };
        for (_, waiter) in ready {
            if let Some(completion) = waiter.take() {
                completion.complete(Ok(Payload::Empty));
            }
        }
    }

    /// The connection is gone: ends the waits that no other connection can complete.
    pub(super) fn end_waits(&self) {
        for (_, waiter) in self.writable.take() {
            // Another connection of the peer may still have room for it.
            let is_last = Rc::strong_count(&waiter) == 1;
            if is_last && let Some(completion) = waiter.take() {
                completion.complete(Err(RpcError::ConnectionLost));
            }
        }
    }
}

/// Whether a future still waits for room.
fn is_waiting(waiter: &Waiter) -> bool {
    let completion = waiter.borrow();
    completion.as_ref().is_some_and(|held| !held.is_abandoned())
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};
    use std::time::{Duration, Instant};

    use millrace_protocol::frame::Method;

    use super::*;
    use crate::config::TransportConfig;
    use crate::service::message::Request;
    use crate::service::pending::PendingAnswer;

    const CLASS: Class = Class::Bulk;
    const IN_FLIGHT: u32 = 2;

    fn poll(answer: &mut PendingAnswer) -> Poll<Result<(), RpcError>> {
        let polled = Pin::new(answer).poll(&mut Context::from_waker(Waker::noop()));
        polled.map(|result| result.map(drop))
    }

    /// A shard with two connections to one peer.
    struct Testbed {
        state: Rc<ShardState>,
        peer: NodeId,
        handles: [Rc<ConnectionHandle>; 2],
    }

    impl Testbed {
        fn new() -> Self {
            let mut config = TransportConfig::default();
            config.requests_out_max.bulk = IN_FLIGHT;
            let state = ShardState::for_driver(config, Instant::now());
            let peer = NodeId::from_bytes([1; 29]);
            let handles = [0, 1].map(|slot| ConnectionHandle::new(&state, slot, peer, true));
            for handle in &handles {
                state.insert(Rc::clone(handle));
            }
            Self {
                state,
                peer,
                handles,
            }
        }

        fn request(&self) -> PendingAnswer {
            let request = Request {
                class: CLASS,
                method: Method(0),
                body: Payload::Empty,
                deadline: Duration::from_secs(1).into(),
            };
            self.state.request(&self.peer, request)
        }

        fn on_writable(&self) -> PendingAnswer {
            self.state.on_writable(&self.peer, CLASS)
        }

        /// As many requests as both connections take, one on each in turn.
        fn fill(&self) -> Vec<PendingAnswer> {
            let mut asked = Vec::new();
            for sent in 1..=IN_FLIGHT {
                for _ in &self.handles {
                    assert_eq!(poll(&mut self.on_writable()), Poll::Ready(Ok(())));
                    asked.push(self.request());
                }
                assert_eq!(self.in_flight(), [sent; 2]);
            }
            asked
        }

        fn in_flight(&self) -> [u32; 2] {
            let in_flight = |handle: &Rc<ConnectionHandle>| handle.calls.borrow().in_flight(CLASS);
            self.handles.each_ref().map(in_flight)
        }
    }

    // Protects a shard's thread: a wait that looks at another connection than the one that refused
    // is over at once, for ever.
    #[test]
    fn a_wait_for_room_ends_when_one_of_two_connections_has_it() {
        for at in 0..2 {
            let testbed = Testbed::new();
            let mut asked = testbed.fill();
            for _ in 0..3 {
                let refused = poll(&mut testbed.request());
                assert_eq!(refused, Poll::Ready(Err(RpcError::LocalBusy(CLASS))));
            }
            let mut waits = [(); 3].map(|()| testbed.on_writable());
            let mut polled = || waits.each_mut().map(poll);
            assert_eq!(polled(), [Poll::Pending; 3]);
            drop(asked.remove(at + 2));
            assert_eq!(polled(), [Poll::Pending; 3], "half is not under half");
            drop(asked.remove(at));
            assert_eq!(polled(), [Poll::Ready(Ok(())); 3]);
            // The other one is still full: turns pass it by.
            asked.extend([testbed.request(), testbed.request()]);
            assert_eq!(testbed.in_flight(), [IN_FLIGHT; 2]);
        }
    }

    // Protects memory and chunks: a future or a responder that is still held keeps the handle.
    #[test]
    fn a_closed_connection_holds_nothing_that_waited() {
        let testbed = Testbed::new();
        let handle = &testbed.handles[0];
        let small = Payload::from(vec![0; 100]);
        let large = Payload::from(vec![0; 100_000]);
        for body in [small, large] {
            handle.send(CLASS, Method(0), body.clone()).unwrap();
            handle.answer(CLASS, 1, Ok(body));
        }
        assert!(!handle.out.borrow().is_idle());
        handle.close();
        assert!(handle.out.borrow().is_idle());
        let queued = handle.out.borrow().queued_bytes();
        assert_eq!(Class::ALL.map(|class| queued.of(class)), [0; 3]);
    }

    #[test]
    fn a_wait_for_room_outlives_one_of_two_connections() {
        let testbed = Testbed::new();
        let _asked = testbed.fill();
        for _ in 0..2 {
            let refused = poll(&mut testbed.request());
            assert_eq!(refused, Poll::Ready(Err(RpcError::LocalBusy(CLASS))));
        }
        let mut wait = testbed.on_writable();
        for (at, left) in [Poll::Pending, Poll::Ready(Err(RpcError::ConnectionLost))]
            .into_iter()
            .enumerate()
        {
            let handle = &testbed.handles[at];
            testbed.state.remove(handle);
            handle.close();
            assert_eq!(poll(&mut wait), left);
        }
        let none = poll(&mut testbed.on_writable());
        assert_eq!(none, Poll::Ready(Err(RpcError::NotConnected)));
    }
}
