//! One established connection as the code above sees it: its requests in flight, and its end.
//! `sending` has the messages that are not waited for, `inbound` the peer's requests, `room` the
//! waits for room, and `shard` what the connections of a shard share.
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

mod inbound;
mod room;
mod sending;
mod shard;
mod work;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::Waker;
use std::time::{Duration, Instant};

use millrace_protocol::body_deadline::{BodyDeadline, Sighting, Stage, Verdict};
use millrace_protocol::frame::{Class, Header, Kind, Method};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::rpc::{InFlight, RpcError, RpcTable};

use super::completion::Completion;
use super::early_cancels::EarlyCancels;
use super::message::{Deadline, Payload, Request};
use crate::answers::Answers;
use crate::counters::{Counter, Family};
use crate::outbox::Outbox;
use room::Waiter;
use work::Work;

pub use shard::ShardState;

/// A request in flight.
#[derive(Debug)]
struct Call {
    class: Class,
    completion: Completion,
    /// What judges a request that is given up when it does not come forward.
    body: Option<Box<BodyDeadline>>,
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
    calls: RefCell<RpcTable<Call>>,
    /// Bytes that messages with streams of their own brought so far.
    received_bytes: Cell<u64>,
    /// Requests of the peer that are answered later, with who is to hear that one was cancelled.
    inbound: RefCell<InFlight<Option<Waker>>>,
    early_cancels: RefCell<EarlyCancels>,
    /// What the peer makes us do.
    pub(crate) work: Work,
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
        let plain_bytes_max = config.answer_queue_bytes;
        let answers = Answers::new(peer, plain_bytes_max, &state.queues, &state.unread);
        Rc::new(Self {
            state: Rc::clone(state),
            slot,
            serial: state.next_serial(),
            peer,
            number: Cell::new(ConnectionNumber(0)),
            out: RefCell::new(Outbox::new(config, &state.queues, answers, is_server)),
            calls: RefCell::new(RpcTable::new(
                config.requests_out_max.rpc_limits(),
                state.now.get(),
            )),
            received_bytes: Cell::new(0),
            inbound: RefCell::new(InFlight::new(config.requests_in_max.rpc_limits())),
            early_cancels: RefCell::default(),
            work: Work::default(),
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
        let config = &self.state.config;
        let (told, first) = match request.deadline {
            Deadline::After(after) => (after, after),
            Deadline::Progress {
                answer_bytes_max,
                patience,
            } => {
                let bytes = answer_bytes_max.saturating_add(body_bytes.into());
                let told = config.body_deadline().time_for(bytes);
                let interval = config.stream_progress_interval;
                (told, patience.map_or(interval, |time| time.min(interval)))
            }
        };
        let [arg, first_ms] =
            [told, first].map(|time| u32::try_from(time.as_millis()).unwrap_or(u32::MAX));
        let now = self.state.now.get();
        let call = Call {
            class: request.class,
            completion,
            body: None,
        };
        let first_at = now + Duration::from_millis(first_ms.into());
        let id = self
            .calls
            .borrow_mut()
            .insert_with(request.class, first_at, call)
            .map_err(|(error, call)| (error, call.completion))?;
        let header = Header {
            kind: Kind::Request,
            class: request.class,
            method: request.method,
            id,
            body_bytes,
            arg,
        };
        if self.out.borrow_mut().push(header, request.body).is_err() {
            let call = self.calls.borrow_mut().cancel(id);
            return match call {
                Some(call) => Err((RpcError::LocalBusy(request.class), call.completion)),
                None => Ok(header),
            };
        }
        if let Deadline::Progress {
            answer_bytes_max,
            patience,
        } = request.deadline
        {
            let has_long_answer = answer_bytes_max > config.limits.lane_body_bytes_max.into();
            let seen = self.sighting(&header, false);
            let body = BodyDeadline::new(config.body_deadline(), has_long_answer, seen, now)
                .with_patience(patience);
            if let Some(call) = self.calls.borrow_mut().get_mut(id) {
                call.body = Some(Box::new(body));
            }
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
            self.work.owe();
            self.out.borrow_mut().cancel(header, true);
            self.mark_dirty();
            self.wake_writable();
        }
    }

    /// Takes back the request `id` if it is still being sent. If it is not, and `tell`, the peer
    /// gets a cancellation.
    fn withdraw(&self, class: Class, id: u32, tell: bool) {
        self.work.owe();
        self.out
            .borrow_mut()
            .cancel(request_header(class, id), tell);
        self.mark_dirty();
    }

    /// How far a request of ours has come, and the bytes that it waits for.
    fn sighting(&self, request: &Header, is_answering: bool) -> Sighting {
        let sent = self.out.borrow().sighting(request);
        match sent.stage {
            Stage::Sent => Sighting {
                stage: if is_answering {
                    Stage::Answering
                } else {
                    Stage::Sent
                },
                moved_bytes: self.received_bytes.get(),
            },
            _ => sent,
        }
    }

    /// Messages with streams of their own brought so many bytes so far.
    pub(crate) fn set_received_bytes(&self, bytes: u64) {
        self.received_bytes.set(bytes);
    }

    /// Hands an answer to its asker; the class of the request, if one waited.
    pub(crate) fn on_answer(&self, id: u32, result: Result<Payload, RpcError>) -> Option<Class> {
        let call = self.calls.borrow_mut().complete(id);
        let Some(call) = call else {
            self.state.counters.add(Counter::AnswersLate, 1);
            return None;
        };
        call.completion.complete(result);
        self.wake_writable();
        Some(call.class)
    }

    /// Ends a request that will have no answer: what was not sent of it need not be. If all of it
    /// was, and `tell`, the peer gets a cancellation. A peer that says so of requests which no one
    /// waits for adds nothing to any queue.
    pub(crate) fn on_no_answer(&self, id: u32, error: RpcError, tell: bool) {
        match self.on_answer(id, Err(error)) {
            Some(class) => self.withdraw(class, id, tell),
            None => self.work.late_answer(),
        }
    }

    /// The peer stopped the stream of a message of ours before it had all of it. A peer that
    /// refuses a request says why in a frame, and must not stop the stream: a stop ends the request
    /// at once, and a failure that comes after it is late.
    pub(crate) fn on_stopped(&self, header: &Header) {
        self.state.counters.count(Family::Failed, "peer_stopped");
        if header.kind == Kind::Request {
            self.work.owe();
            self.on_answer(header.id, Err(RpcError::PeerProtocol));
        }
    }

    /// The next deadline of a request in flight.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.calls.borrow().poll_timeout()
    }

    /// Ends the requests whose deadline has passed, and those that do not come forward. `look` says
    /// whether the answer to a request has begun to arrive, and how long it has for progress.
    pub(crate) fn expire(&self, now: Instant, look: &mut impl FnMut(u32) -> (bool, Duration)) {
        let mut late = Vec::new();
        let mut extend = |id, call: &mut Call| {
            let body = call.body.as_mut()?;
            let (is_answering, interval) = look(id);
            let seen = self.sighting(&request_header(call.class, id), is_answering);
            match body.judge(seen, interval, now) {
                Verdict::Wait(at) => Some(at),
                Verdict::GiveUp => None,
            }
        };
        self.calls
            .borrow_mut()
            .expire_unless(now, &mut extend, &mut |id, call| late.push((id, call)));
        for (id, call) in late {
            self.withdraw(call.class, id, true);
            self.state
                .counters
                .count(Family::Failed, RpcError::Timeout.reason());
            call.completion.complete(Err(RpcError::Timeout));
        }
        self.wake_writable();
    }

    /// Takes back the requests whose asker has dropped its answer: those whose cancellation did not
    /// fit into the shard's mailbox.
    pub(crate) fn cancel_abandoned(&self) {
        let mut abandoned = Vec::new();
        self.calls.borrow_mut().take_if(
            &mut |call| call.completion.is_abandoned(),
            &mut |id, call| abandoned.push((id, call)),
        );
        for (id, call) in &abandoned {
            self.withdraw(call.class, *id, true);
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
        self.end_waits();
        let mut lost = Vec::new();
        self.calls
            .borrow_mut()
            .take_all(&mut |_, call| lost.push(call.completion));
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
}

/// What names a request of ours to its queue and to the peer.
fn request_header(class: Class, id: u32) -> Header {
    Header {
        kind: Kind::Request,
        class,
        method: Method(0),
        id,
        body_bytes: 0,
        arg: 0,
    }
}

fn too_large(body_bytes: u64, max_bytes: u32) -> RpcError {
    RpcError::LocalTooLarge {
        body_bytes,
        max_bytes: max_bytes.into(),
    }
}
