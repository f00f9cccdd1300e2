//! What arrived whole on a connection, handed to its recipient: a service, a waiting request, the
//! machines of the connection.
//!
//! Invariant: what a peer sends is checked before it gets here; what it cannot mean is counted with
//! its reason.

use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Carriage, FailureCode, Header, Kind};
use millrace_protocol::rpc::RpcError;

use crate::allocator::Refusal;
use crate::counters::{Counter, Family};
use crate::inbox::{Arrivals, StreamFault, wants_answer};
use crate::service::body::{BodyHead, BodyMode, OpenSink};
use crate::service::handle::ConnectionHandle;
use crate::service::message::{Answer, Inbound, InboundBody};
use crate::service::responder::Defer;
use crate::service::router::Router;

/// Why a message was refused whose method no service owns.
const UNKNOWN_METHOD: &str = "unknown_method";

/// What arrived that the driver of the connection has to act on, gathered while that is borrowed.
#[derive(Debug, Default)]
pub struct Received {
    /// Numbers of probes that the peer answered.
    pub probe_replies: Vec<u32>,
    /// Requests that the peer took back and that are not in flight: their bodies may be arriving.
    /// Taken up after each stream that is read, and never more than
    /// [`cancellations_max`](crate::TransportConfig::cancellations_max).
    pub(super) cancelled: Vec<u32>,
    /// The peer broke the protocol: the connection is to be closed, for this reason.
    pub fault: Option<&'static str>,
}

/// Hands over what arrives on one connection.
pub(super) struct Delivery<'a> {
    pub(super) handle: &'a Rc<ConnectionHandle>,
    pub(super) router: &'a mut Router,
    pub(super) now: Instant,
    pub(super) received: &'a mut Received,
}

impl Arrivals for Delivery<'_> {
    fn on_frame(&mut self, header: Header, body: &[u8]) {
        self.deliver(header, InboundBody::Slice(body));
    }

    fn is_cancelled(&mut self, header: &Header) -> bool {
        wants_answer(header) && self.handle.take_early_cancel(header.id)
    }

    fn make_room(&mut self, header: &Header, bytes: u64) -> bool {
        let asks = matches!(header.kind, Kind::Request | Kind::Send);
        let service = self.router.service_of(header.method).filter(|_| asks);
        service.is_some_and(|service| service.make_room(self.handle.peer, bytes))
    }

    fn on_head(&mut self, header: &Header) -> Result<Option<OpenSink>, Refusal> {
        let deadline = match header.kind {
            Kind::Request => Some(self.deadline_of(header)),
            Kind::Send => None,
            // An answer belongs to its asker, who takes it whole.
            _ => return Ok(None),
        };
        let head = BodyHead {
            peer: self.handle.peer,
            connection: self.handle.number.get(),
            class: header.class,
            method: header.method,
            deadline,
            body_bytes: header.body_bytes.into(),
        };
        let Some(service) = self.router.service_of(header.method) else {
            return Err(Refusal {
                code: FailureCode::UnknownMethod,
                reason: UNKNOWN_METHOD,
            });
        };
        match service.on_body(&head) {
            BodyMode::Whole => Ok(None),
            BodyMode::Stream(sink) => Ok(Some(OpenSink::new(sink))),
            BodyMode::Refuse(code) => Err(Refusal {
                code,
                reason: "refused_by_service",
            }),
        }
    }

    fn on_message(&mut self, header: Header, body: InboundBody<'static>) {
        self.deliver(header, body);
    }
}

impl Delivery<'_> {
    /// Datagrams carry probes, and one-way messages whose sender repeats them.
    pub(super) fn on_datagram(&mut self, datagram: &[u8]) {
        let (limits, counters) = (
            &self.handle.state.config.limits,
            &self.handle.state.counters,
        );
        let parsed = datagram
            .split_first_chunk()
            .map(|(header, body)| (Header::decode(header), body));
        let header = match parsed {
            Some((Ok(header), body)) if header.body_bytes as usize == body.len() => {
                Ok((header, body))
            }
            Some((Err(error), _)) => Err(error.reason()),
            _ => Err("peer_datagram_length"),
        };
        match header {
            Ok((header, body)) if header.check(Carriage::Datagram, limits).is_ok() => {
                self.deliver(header, InboundBody::Slice(body));
            }
            Ok(_) => {
                self.handle.work.probe();
                counters.count(Family::Rejected, "peer_datagram_kind");
            }
            Err(reason) => {
                self.handle.work.probe();
                counters.count(Family::Rejected, reason);
            }
        }
    }

    /// Notes that the body of a request may be arriving which the peer took back.
    fn cancel_arriving(&mut self, id: u32) {
        let cancelled = &mut self.received.cancelled;
        if cancelled.len() >= self.handle.state.config.cancellations_max() {
            return self.handle.count_too_many_cancellations();
        }
        cancelled.push(id);
    }

    fn deadline_of(&self, header: &Header) -> Instant {
        self.now + Duration::from_millis(header.arg.into())
    }

    fn deliver(&mut self, header: Header, body: InboundBody<'_>) {
        let counters = &self.handle.state.counters;
        let inbound = |deadline, body| Inbound {
            peer: self.handle.peer,
            connection: self.handle.number.get(),
            class: header.class,
            method: header.method,
            deadline,
            body,
        };
        let (exchanged, work) = (&self.handle.state.exchanged, &self.handle.work);
        work.frame();
        match header.kind {
            Kind::Request => {
                work.request();
                exchanged.set(exchanged.get() + 1);
                counters.received(header.class, body.len() as usize);
                if self.handle.take_early_cancel(header.id) {
                    counters.add(Counter::RequestsCancelled, 1);
                    return;
                }
                let deadline = self.deadline_of(&header);
                let defer = Defer {
                    handle: self.handle,
                    class: header.class,
                    id: header.id,
                };
                let answer = match self.router.service_of(header.method) {
                    Some(service) => service.on_request(inbound(Some(deadline), body), defer),
                    None => {
                        counters.count(Family::Rejected, UNKNOWN_METHOD);
                        Answer::Failure(FailureCode::UnknownMethod)
                    }
                };
                match answer {
                    Answer::Reply(body) => self.handle.answer(header.class, header.id, Ok(body)),
                    Answer::Failure(code) => self.handle.answer(header.class, header.id, Err(code)),
                    Answer::Deferred => {}
                }
            }
            Kind::Send => {
                counters.received(header.class, body.len() as usize);
                match self.router.service_of(header.method) {
                    Some(service) => service.on_send(inbound(None, body)),
                    None => counters.count(Family::Rejected, UNKNOWN_METHOD),
                }
            }
            Kind::Response => {
                exchanged.set(exchanged.get() + 1);
                counters.received(header.class, body.len() as usize);
                let asked = self.handle.on_answer(header.id, Ok(body.into_payload()));
                if asked.is_none() {
                    work.late_answer();
                }
            }
            Kind::Failure => {
                // Refused before all of it was there: the rest need not be sent.
                let error = RpcError::Peer(FailureCode::from_arg(header.arg));
                self.handle.on_no_answer(header.id, error, false);
            }
            Kind::Cancel => {
                work.cancellation();
                if !self.handle.on_cancel(header.id) {
                    self.cancel_arriving(header.id);
                }
            }
            Kind::Probe => {
                work.probe();
                self.handle.datagram(Kind::ProbeReply, header.arg);
            }
            Kind::ProbeReply => {
                work.probe();
                self.received.probe_replies.push(header.arg);
            }
            // The first was read before anything else. A later version may say it again.
            Kind::Hello => {}
        }
    }
}

/// Counts a cut stream. A request among them is answered, since its sender may still wait; a cut
/// answer ends the wait of its asker.
pub(super) fn on_fault(
    handle: &Rc<ConnectionHandle>,
    fault: StreamFault,
    header: Option<Header>,
    received: &mut Received,
) {
    handle
        .state
        .counters
        .count(Family::Rejected, fault.reason());
    if fault.is_fatal() {
        received.fault = Some(fault.reason());
        return;
    }
    count_work(handle, fault, header.as_ref());
    let Some(header) = header else { return };
    match fault {
        _ if matches!(header.kind, Kind::Response | Kind::Failure) => {
            // A peer that took its answer back has nothing left to be told.
            let tell = fault != StreamFault::Reset;
            handle.on_no_answer(header.id, error_of(fault, &header), tell);
        }
        // The reason is counted above: only a request is one that was taken back.
        StreamFault::Reset | StreamFault::Cancelled => {
            let is_request = wants_answer(&header);
            let counters = &handle.state.counters;
            counters.add(Counter::RequestsCancelled, u64::from(is_request));
        }
        _ if wants_answer(&header) => {
            let code = match fault {
                StreamFault::Refused(refusal) => refusal.code,
                StreamFault::Stalled => FailureCode::DeadlineExceeded,
                _ => FailureCode::Malformed,
            };
            handle.answer(header.class, header.id, Err(code));
        }
        _ => {}
    }
}

/// What a cut stream counts for among the work of its peer. That an answer was cut is counted where
/// its request ends.
fn count_work(handle: &ConnectionHandle, fault: StreamFault, header: Option<&Header>) {
    let work = &handle.work;
    let is_answer = |header: &Header| matches!(header.kind, Kind::Response | Kind::Failure);
    if header.is_some_and(wants_answer) {
        work.request();
    }
    match fault {
        StreamFault::Stalled => work.stalled(),
        StreamFault::Reset | StreamFault::Short | StreamFault::Long
            if !header.is_some_and(is_answer) =>
        {
            work.unfinished(header.is_none());
        }
        _ => {}
    }
}

/// What an asker hears whose answer was cut.
fn error_of(fault: StreamFault, header: &Header) -> RpcError {
    match fault {
        StreamFault::Refused(refusal) if refusal.code == FailureCode::TooLarge => {
            RpcError::LocalAnswerTooLarge {
                body_bytes: header.body_bytes.into(),
            }
        }
        StreamFault::Refused(_) => RpcError::LocalNoBudget,
        StreamFault::Stalled => RpcError::Timeout,
        _ => RpcError::PeerProtocol,
    }
}
