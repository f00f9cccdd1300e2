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

    /// The connection for the next message of `class` to `peer`: bodies take turns over all of
    /// them; small messages take the one that has been up longest, so that they keep their order.
    pub(crate) fn handle_to(&self, peer: &NodeId, class: Class) -> Option<Rc<ConnectionHandle>> {
        let mut up = self.up.borrow_mut();
        let peer = up.get_mut(peer)?;
        let at = match class {
            Class::Bulk => {
                peer.turn = (peer.turn + 1) % peer.handles.len().max(1);
                peer.turn
            }
            Class::Latency | Class::Normal => 0,
        };
        peer.handles.get(at).map(Rc::clone)
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
    writable: RefCell<Vec<(Class, Completion)>>,
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
        if self.is_closed.get() || self.calls.borrow_mut().cancel(header.id).is_none() {
            return;
        }
        self.out.borrow_mut().cancel(header, true);
        self.mark_dirty();
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
            Some((_, completion)) => completion.complete(result),
            None => self.state.counters.add(Counter::AnswersLate, 1),
        }
    }

    /// Completes `completion` once every queue of `class` that refused a message has fallen under
    /// half of its bound: at once, if none has refused.
    pub(crate) fn on_writable(&self, class: Class, completion: Completion) {
        if self.is_closed.get() {
            return completion.complete(Err(RpcError::NotConnected));
        }
        if self.out.borrow_mut().is_writable(class) {
            return completion.complete(Ok(Payload::Empty));
        }
        let mut waiters = self.writable.borrow_mut();
        if waiters.len() >= WRITABLE_WAITERS_MAX {
            waiters.retain(|(_, waiter)| !waiter.is_abandoned());
        }
        if waiters.len() >= WRITABLE_WAITERS_MAX {
            drop(waiters);
            return completion.complete(Err(RpcError::LocalBusy(class)));
        }
        waiters.push((class, completion));
    }

    /// Completes what waits for a class that has become writable. Called after the queues have
    /// fallen.
    #[inline]
    pub(crate) fn wake_writable(&self) {
        if !self.writable.borrow().is_empty() {
            self.wake_waiters();
        }
    }

    fn wake_waiters(&self) {
        let ready = {
            let mut out = self.out.borrow_mut();
            let is_writable = Class::ALL.map(|class| out.is_writable(class));
            let mut waiters = self.writable.borrow_mut();
            let is_ready = |(class, _): &mut (Class, Completion)| is_writable[class.index()];
            waiters.extract_if(.., is_ready).collect::<Vec<_>>()
        };
        for (_, completion) in ready {
            completion.complete(Ok(Payload::Empty));
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
    }

    /// Ends everything: the connection is gone.
    pub(crate) fn close(&self) {
        if self.is_closed.replace(true) {
            return;
        }
        let mut wakers = Vec::new();
        self.inbound
            .borrow_mut()
            .take_all(&mut |_, waker| wakers.extend(waker));
        wakers.into_iter().for_each(Waker::wake);
        for (_, waiter) in self.writable.take() {
            waiter.complete(Err(RpcError::ConnectionLost));
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

    /// The peer took its request back, or no longer wants the answer that is under way.
    pub(crate) fn on_cancel(&self, class: Class, id: u32) {
        let ended = self.inbound.borrow_mut().end(id);
        if let Some(waker) = ended {
            self.state.counters.add(Counter::RequestsCancelled, 1);
            if let Some(waker) = waker {
                waker.wake();
            }
        } else {
            self.withdraw(Kind::Response, class, id, false);
            let now = self.state.now.get();
            self.early_cancels.borrow_mut().insert(id, now);
        }
    }

    /// Whether the peer took the request `id` back before it arrived. It is then counted, and no
    /// service hears of it.
    #[inline]
    pub(crate) fn take_early_cancel(&self, id: u32) -> bool {
        let now = self.state.now.get();
        let is_cancelled = self.early_cancels.borrow_mut().take(id, now);
        if is_cancelled {
            self.state.counters.add(Counter::RequestsCancelled, 1);
        }
        is_cancelled
    }
}

fn too_large(body_bytes: u64, max_bytes: u32) -> RpcError {
    RpcError::LocalTooLarge {
        body_bytes,
        max_bytes: max_bytes.into(),
    }
}
