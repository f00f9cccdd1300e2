//! One established connection as the code above sees it, and what those of a shard share.
//!
//! A request, an answer or a one-way message goes straight into the handle's [`Outbox`] and marks
//! the handle dirty; the endpoint feeds dirty handles in the same turn. No command queue lies
//! between, and no lock: everything here lives on one shard.
//!
//! Invariants
//! 1. No `RefCell` here is borrowed while foreign code runs: services, wakers and completions are
//!    called with nothing held.
//! 2. A handle that is closed takes nothing more: its calls were answered with
//!    [`RpcError::ConnectionLost`].
//! 3. A handle is in `dirty` exactly when its flag says so, so that the list is bounded by the
//!    number of connections.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, FailureCode, Header, Kind, Method};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::rpc::{InFlight, RpcError, RpcTable};

use super::completion::Completion;
use super::early_cancels::EarlyCancels;
use super::message::{Payload, Request};
use crate::config::TransportConfig;
use crate::counters::{Counter, Counters, Family};
use crate::outbox::Outbox;

/// Futures of a connection that wait for room to send; more are refused.
const WRITABLE_WAITERS_MAX: usize = 1_024;

/// A future that waits for room to send on one of several connections: the first that has room
/// takes the completion out.
type Waiter = Rc<RefCell<Option<Completion>>>;

/// What the connections of one shard share: limits, counters, the turn's time, which of them are
/// up, and which have something to send.
#[derive(Debug)]
pub struct ShardState {
    pub(crate) config: TransportConfig,
    pub(crate) counters: Arc<Counters>,
    /// The time of this turn.
    pub(crate) now: Cell<Instant>,
    /// Connections with something to send, oldest first, by slot.
    pub(crate) dirty: RefCell<VecDeque<usize>>,
    /// Connections that take new messages.
    up: RefCell<BTreeMap<NodeId, PeerHandles>>,
    pub(crate) stopping: Cell<bool>,
    /// Requests and answers that arrived on lanes since packets were last sent.
    pub(crate) exchanged: Cell<usize>,
    /// Serial number of the last connection.
    serial: Cell<u64>,
}

/// The connections to one peer; at least one.
#[derive(Debug, Default)]
struct PeerHandles {
    /// The one that has been up longest first.
    handles: Vec<Rc<ConnectionHandle>>,
    /// Which of them took the last body.
    turn: usize,
}

impl ShardState {
    pub(crate) fn new(config: TransportConfig, counters: Arc<Counters>, now: Instant) -> Self {
        Self {
            config,
            counters,
            now: Cell::new(now),
            dirty: RefCell::default(),
            up: RefCell::default(),
            stopping: Cell::new(false),
            exchanged: Cell::new(0),
            serial: Cell::new(0),
        }
    }

    fn next_serial(&self) -> u64 {
        self.serial.set(self.serial.get() + 1);
        self.serial.get()
    }

    /// A connection is up: it takes new messages.
    pub(crate) fn insert(&self, handle: Rc<ConnectionHandle>) {
        let mut up = self.up.borrow_mut();
        up.entry(handle.peer).or_default().handles.push(handle);
    }

    /// A connection takes no new messages any more. More than once does no harm.
    pub(crate) fn remove(&self, handle: &ConnectionHandle) {
        let mut up = self.up.borrow_mut();
        if let Some(peer) = up.get_mut(&handle.peer) {
            peer.handles.retain(|held| held.serial != handle.serial);
            if peer.handles.is_empty() {
                up.remove(&handle.peer);
            }
        }
    }

    /// Whether a connection to `peer` takes new messages.
    pub(crate) fn contains(&self, peer: &NodeId) -> bool {
        self.up.borrow().contains_key(peer)
    }

    /// The peers that are up, in the order of their ids.
    pub fn peers(&self) -> Vec<NodeId> {
        self.up.borrow().keys().copied().collect()
    }

    /// The connection for the next message of `class` to `peer`: class bulk takes turns over all of
    /// them, past those that refused and are still full; the others take the one that has been up
    /// longest, so that they keep their order.
    pub(crate) fn handle_to(&self, peer: &NodeId, class: Class) -> Option<Rc<ConnectionHandle>> {
        let mut up = self.up.borrow_mut();
        let PeerHandles { handles, turn } = up.get_mut(peer)?;
        let count = handles.len();
        let at = match class {
            Class::Bulk if count > 1 => {
                let last = *turn;
                let mut in_turn = (1..=count).map(|step| (last + step) % count);
                let writable = in_turn.find(|at| handles[*at].is_writable(class));
                *turn = writable.unwrap_or((last + 1) % count);
                *turn
            }
            Class::Latency | Class::Normal | Class::Bulk => 0,
        };
        handles.get(at).map(Rc::clone)
    }

    /// Completes `completion` once a connection that takes messages of `class` to `peer` has room:
    /// at once, if one of them is writable. Takes no turn.
    pub(crate) fn wait_writable(&self, peer: &NodeId, class: Class, completion: Completion) {
        let handles: Vec<_> = {
            let up = self.up.borrow();
            let handles = up.get(peer).map_or(&[][..], |peer| &peer.handles);
            let taking = if class == Class::Bulk {
                handles.len()
            } else {
                1
            };
            handles.iter().take(taking).map(Rc::clone).collect()
        };
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

/// One established connection.
#[derive(Debug)]
pub(crate) struct ConnectionHandle {
    pub(crate) state: Rc<ShardState>,
    /// Slot of the connection in the endpoint.
    pub(crate) slot: usize,
    /// Tells this connection from all others of its shard, also from other tenants of the slot.
    pub(crate) serial: u64,
    pub(crate) peer: NodeId,
    pub(crate) number: Cell<ConnectionNumber>,
    pub(crate) out: RefCell<Outbox>,
    calls: RefCell<RpcTable<(Class, Completion)>>,
    /// Requests of the peer that are answered later, with who is to hear that one was cancelled.
    inbound: RefCell<InFlight<Option<Waker>>>,
    early_cancels: RefCell<EarlyCancels>,
    /// Who waits until a class is writable again.
    writable: RefCell<Vec<(Class, Waiter)>>,
    is_dirty: Cell<bool>,
    is_closed: Cell<bool>,
}

impl ConnectionHandle {
    pub(crate) fn new(
        state: &Rc<ShardState>,
        slot: usize,
        peer: NodeId,
        is_server: bool,
    ) -> Rc<Self> {
        let config = &state.config;
        Rc::new(Self {
            state: Rc::clone(state),
            slot,
            serial: state.next_serial(),
            peer,
            number: Cell::new(ConnectionNumber(0)),
            out: RefCell::new(Outbox::new(config, is_server)),
            calls: RefCell::new(RpcTable::new(
                config.requests_out_max.rpc_limits(),
                state.now.get(),
            )),
            inbound: RefCell::new(InFlight::new(config.requests_in_max.rpc_limits())),
            early_cancels: RefCell::default(),
            writable: RefCell::default(),
            is_dirty: Cell::new(false),
            is_closed: Cell::new(false),
        })
    }

    /// Puts the connection on the list of those to be fed this turn.
    pub(crate) fn mark_dirty(&self) {
        if !self.is_dirty.replace(true) {
            self.state.dirty.borrow_mut().push_back(self.slot);
        }
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.is_dirty.get()
    }

    /// Called by the endpoint when it took the connection from the list.
    pub(crate) fn clear_dirty(&self) {
        self.is_dirty.set(false);
    }

    /// Sends a request; its completion hears exactly once.
    pub(crate) fn request(
        &self,
        request: Request,
        completion: Completion,
    ) -> Result<Header, (RpcError, Completion)> {
        if self.is_closed.get() {
            return Err((RpcError::NotConnected, completion));
        }
        let max_bytes = self.state.config.limits.body_bytes_max;
        if request.body.len() > u64::from(max_bytes) {
            return Err((too_large(request.body.len(), max_bytes), completion));
        }
        let body_bytes = request.body.len() as u32;
        let arg = u32::try_from(request.deadline.as_millis()).unwrap_or(u32::MAX);
        let deadline = self.state.now.get() + Duration::from_millis(arg.into());
        let id = self
            .calls
            .borrow_mut()
            .insert_with(request.class, deadline, (request.class, completion))
            .map_err(|(error, (_, completion))| (error, completion))?;
        let header = Header {
            kind: Kind::Request,
            class: request.class,
            method: request.method,
            id,
            body_bytes,
            arg,
        };
        if self.out.borrow_mut().push(header, request.body).is_err() {
            let completion = self.calls.borrow_mut().cancel(id);
            return match completion {
                Some((_, completion)) => Err((RpcError::LocalBusy(request.class), completion)),
                None => Ok(header),
            };
        }
        self.state.counters.sent(request.class, body_bytes as usize);
        self.mark_dirty();
        Ok(header)
    }

    /// Takes a request back.
    pub(crate) fn cancel(&self, header: Header) {
        if self.is_closed.get() {
            return;
        }
        let cancelled = self.calls.borrow_mut().cancel(header.id);
        if cancelled.is_some() {
            self.out.borrow_mut().cancel(header, true);
            self.mark_dirty();
            self.wake_writable();
        }
    }

    /// Takes back the request or the answer `id` if it is still being sent. If it is not, and
    /// `tell`, the peer gets a cancellation.
    pub(crate) fn withdraw(&self, kind: Kind, class: Class, id: u32, tell: bool) {
        let header = Header {
            kind,
            class,
            method: Method(0),
            id,
            body_bytes: 0,
            arg: 0,
        };
        self.out.borrow_mut().cancel(header, tell);
        self.mark_dirty();
    }

    /// Sends a one-way message (Diem's DirectSend): it is lost with the connection.
    pub(crate) fn send(&self, class: Class, method: Method, body: Payload) -> Result<(), RpcError> {
        let result = self.try_send(class, method, body);
        if let Err(error) = &result {
            self.state.counters.count(Family::Failed, error.reason());
        }
        result
    }

    /// The largest body of a one-way message. Those of class latency keep their order because they
    /// all share one lane: what is too large for a lane is refused.
    fn send_bytes_max(&self, class: Class) -> u32 {
        let limits = &self.state.config.limits;
        match class {
            Class::Latency => limits.lane_body_bytes_max.min(limits.body_bytes_max),
            Class::Normal | Class::Bulk => limits.body_bytes_max,
        }
    }

    fn try_send(&self, class: Class, method: Method, body: Payload) -> Result<(), RpcError> {
        if self.is_closed.get() {
            return Err(RpcError::NotConnected);
        }
        let max_bytes = self.send_bytes_max(class);
        if body.len() > u64::from(max_bytes) {
            return Err(too_large(body.len(), max_bytes));
        }
        let body_bytes = body.len() as u32;
        let header = Header {
            kind: Kind::Send,
            class,
            method,
            id: 0,
            body_bytes,
            arg: 0,
        };
        self.out
            .borrow_mut()
            .push(header, body)
            .map_err(|_| RpcError::LocalBusy(class))?;
        self.state.counters.sent(class, body_bytes as usize);
        self.mark_dirty();
        Ok(())
    }

    /// Sends a small one-way message without taking it over: its bytes go straight into a lane.
    pub(crate) fn send_slice(
        &self,
        class: Class,
        method: Method,
        body: &[u8],
    ) -> Result<(), RpcError> {
        if self.is_closed.get() {
            return Err(RpcError::NotConnected);
        }
        let header = Header {
            kind: Kind::Send,
            class,
            method,
            id: 0,
            body_bytes: body.len() as u32,
            arg: 0,
        };
        if body.len() > self.state.config.limits.lane_body_bytes_max as usize {
            return self.send(
                class,
                method,
                Payload::Bytes(bytes::Bytes::copy_from_slice(body)),
            );
        }
        if self.out.borrow_mut().push_frame(header, body).is_err() {
            let busy = RpcError::LocalBusy(class);
            self.state.counters.count(Family::Failed, busy.reason());
            return Err(busy);
        }
        self.state.counters.sent(class, body.len());
        self.mark_dirty();
        Ok(())
    }

    /// Sends a control frame (hello, probe). A full lane loses it without harm.
    pub(crate) fn control(&self, kind: Kind, arg: u32, body: &[u8]) {
        let header = Header {
            kind,
            class: Class::Latency,
            method: Method(0),
            id: 0,
            body_bytes: body.len() as u32,
            arg,
        };
        if self.out.borrow_mut().push_frame(header, body).is_err() {
            self.state
                .counters
                .count(Family::Failed, RpcError::LocalBusy(Class::Latency).reason());
        }
        self.mark_dirty();
    }

    /// Sends a probe or its reply as a datagram.
    pub(crate) fn datagram(&self, kind: Kind, arg: u32) {
        let header = Header {
            kind,
            class: Class::Latency,
            method: Method(0),
            id: 0,
            body_bytes: 0,
            arg,
        };
        self.out.borrow_mut().push_datagram(header, &[]);
        self.mark_dirty();
    }

    /// Sends the answer to the peer's request `id`. An answer that its queue has no room for
    /// becomes [`FailureCode::Busy`].
    pub(crate) fn answer(&self, class: Class, id: u32, answer: Result<Payload, FailureCode>) {
        if self.is_closed.get() {
            return;
        }
        let body = match answer {
            Ok(body) if body.len() <= u64::from(self.state.config.limits.body_bytes_max) => body,
            Ok(_) => return self.fail(class, id, FailureCode::TooLarge),
            Err(code) => return self.fail(class, id, code),
        };
        let body_bytes = body.len() as u32;
        let header = Header {
            kind: Kind::Response,
            class,
            method: Method(0),
            id,
            body_bytes,
            arg: 0,
        };
        if self.out.borrow_mut().push(header, body).is_err() {
            let counters = &self.state.counters;
            counters.count(Family::Failed, RpcError::LocalBusy(class).reason());
            return self.fail(class, id, FailureCode::Busy);
        }
        self.state.counters.sent(class, body_bytes as usize);
        self.mark_dirty();
    }

    /// Refuses the peer's request `id`.
    fn fail(&self, class: Class, id: u32, code: FailureCode) {
        let header = Header {
            kind: Kind::Failure,
            class,
            method: Method(0),
            id,
            body_bytes: 0,
            arg: code.to_arg(),
        };
        if self.out.borrow_mut().push_frame(header, &[]).is_err() {
            // The peer has more requests in flight than it may, and does not read.
            self.state.counters.count(Family::Failed, "refusal_unsent");
            return;
        }
        self.state.counters.sent(class, 0);
        self.mark_dirty();
    }

    /// Hands an answer to its asker.
    pub(crate) fn on_answer(&self, id: u32, result: Result<Payload, RpcError>) {
        let completion = self.calls.borrow_mut().complete(id);
        match completion {
            Some((_, completion)) => {
                completion.complete(result);
                self.wake_writable();
            }
            None => self.state.counters.add(Counter::AnswersLate, 1),
        }
    }

    /// The peer stopped the stream of a message of ours before it had all of it. A peer that
    /// refuses a request says why in a frame; this one did not, or says so too late.
    pub(crate) fn on_stopped(&self, header: &Header) {
        self.state.counters.count(Family::Failed, "peer_stopped");
        if header.kind == Kind::Request {
            self.on_answer(header.id, Err(RpcError::PeerProtocol));
        }
    }

    /// Whether all that refused a message of `class` has fallen under half of its bound: lanes,
    /// streams, and requests in flight.
    fn is_writable(&self, class: Class) -> bool {
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

    /// The next deadline of a request in flight.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.calls.borrow().poll_timeout()
    }

    /// Ends the requests whose deadline has passed.
    pub(crate) fn expire(&self, now: Instant) {
        let mut late = Vec::new();
        self.calls
            .borrow_mut()
            .expire(now, &mut |id, completion| late.push((id, completion)));
        for (id, (class, completion)) in late {
            self.withdraw(Kind::Request, class, id, true);
            self.state
                .counters
                .count(Family::Failed, RpcError::Timeout.reason());
            completion.complete(Err(RpcError::Timeout));
        }
        self.wake_writable();
    }

    /// Takes back the requests whose asker has dropped its answer: those whose cancellation did not
    /// fit into the shard's mailbox.
    pub(crate) fn cancel_abandoned(&self) {
        let mut abandoned = Vec::new();
        self.calls.borrow_mut().take_if(
            &mut |(_, completion)| completion.is_abandoned(),
            &mut |id, call| abandoned.push((id, call)),
        );
        for (id, (class, _)) in &abandoned {
            self.withdraw(Kind::Request, *class, *id, true);
        }
        if !abandoned.is_empty() {
            self.wake_writable();
        }
    }

    /// Ends everything: the connection is gone.
    pub(crate) fn close(&self) {
        if self.is_closed.replace(true) {
            return;
        }
        // A responder or an answer that is still held holds no queue with it.
        self.out.borrow_mut().clear();
        let mut wakers = Vec::new();
        self.inbound
            .borrow_mut()
            .take_all(&mut |_, waker| wakers.extend(waker));
        wakers.into_iter().for_each(Waker::wake);
        for (_, waiter) in self.writable.take() {
            // Another connection of the peer may still have room for it.
            let is_last = Rc::strong_count(&waiter) == 1;
            if is_last && let Some(completion) = waiter.take() {
                completion.complete(Err(RpcError::ConnectionLost));
            }
        }
        let mut lost = Vec::new();
        self.calls
            .borrow_mut()
            .take_all(&mut |_, (_, completion)| lost.push(completion));
        for completion in lost {
            self.state
                .counters
                .count(Family::Failed, RpcError::ConnectionLost.reason());
            completion.complete(Err(RpcError::ConnectionLost));
        }
    }

    /// Whether nothing of ours is on its way, and no request waits on either side.
    pub(crate) fn is_idle(&self) -> bool {
        self.calls.borrow().is_empty() && self.inbound_count() == 0 && self.out.borrow().is_idle()
    }

    fn inbound_count(&self) -> u32 {
        let inbound = self.inbound.borrow();
        Class::ALL
            .iter()
            .map(|class| inbound.in_flight(*class))
            .sum()
    }

    pub(crate) fn open_inbound(&self, class: Class, id: u32) -> bool {
        self.inbound.borrow_mut().begin(id, class, None).is_ok()
    }

    pub(crate) fn close_inbound(&self, id: u32) -> bool {
        self.inbound.borrow_mut().end(id).is_some()
    }

    /// Ready when the peer no longer waits for the answer to its request `id`.
    pub(crate) fn poll_cancelled(&self, id: u32, context: &Context<'_>) -> Poll<()> {
        match self.inbound.borrow_mut().get_mut(id) {
            Some(waker) => {
                *waker = Some(context.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }

    pub(crate) fn is_inbound_open(&self, id: u32) -> bool {
        self.inbound.borrow_mut().get_mut(id).is_some()
    }

    /// The peer took its request back, or no longer wants the answer that is under way. False when
    /// the request is not in flight here: it was answered, or has not arrived whole. It is then
    /// remembered.
    pub(crate) fn on_cancel(&self, class: Class, id: u32) -> bool {
        let ended = self.inbound.borrow_mut().end(id);
        if let Some(waker) = ended {
            self.state.counters.add(Counter::RequestsCancelled, 1);
            if let Some(waker) = waker {
                waker.wake();
            }
            return true;
        }
        self.withdraw(Kind::Response, class, id, false);
        let now = self.state.now.get();
        self.early_cancels.borrow_mut().insert(id, now);
        false
    }

    /// Whether the peer took the request `id` back before it arrived: no service is to hear of it.
    #[inline]
    pub(crate) fn take_early_cancel(&self, id: u32) -> bool {
        let now = self.state.now.get();
        self.early_cancels.borrow_mut().take(id, now)
    }
}

/// Whether a future still waits for room.
fn is_waiting(waiter: &Waiter) -> bool {
    let completion = waiter.borrow();
    completion.as_ref().is_some_and(|held| !held.is_abandoned())
}

fn too_large(body_bytes: u64, max_bytes: u32) -> RpcError {
    RpcError::LocalTooLarge {
        body_bytes,
        max_bytes: max_bytes.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;

    use super::*;
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
            let state = Rc::new(ShardState::new(config, Arc::default(), Instant::now()));
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
                deadline: Duration::from_secs(1),
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
