//! What arrived whole on a connection, handed to its recipient: a service, a waiting request, the
//! machines of the connection.
//!
//! Invariant: what a peer sends is checked before it gets here; what it cannot mean is counted with
//! its reason.

use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_protocol::budget::Reservation;
use millrace_protocol::frame::{Carriage, FailureCode, Header, Kind};
use millrace_protocol::rpc::RpcError;

use crate::counters::{Counter, Family};
use crate::inbox::{Arrived, StreamFault, wants_answer};
use crate::service::handle::ConnectionHandle;
use crate::service::message::{Answer, Inbound, InboundBody};
use crate::service::responder::Defer;
use crate::service::router::Dispatch;

/// Why a message was refused whose method no service owns.
const UNKNOWN_METHOD: &str = "unknown_method";

/// What arrived that the driver of the connection has to act on, gathered while that is borrowed.
#[derive(Debug, Default)]
pub struct Received {
    /// Numbers of probes that the peer answered.
    pub probe_replies: Vec<u32>,
    pub(crate) reservations: Vec<Reservation>,
    /// The peer broke the protocol: the connection is to be closed, for this reason.
    pub fault: Option<&'static str>,
}

pub(crate) fn on_arrived<D: Dispatch>(
    handle: &Rc<ConnectionHandle>,
    services: &mut D,
    arrived: Arrived<'_>,
    now: Instant,
    received: &mut Received,
) {
    match arrived {
        Arrived::Frame(header, body) => {
            on_message(
                handle,
                services,
                header,
                InboundBody::Slice(body),
                now,
                received,
            );
        }
        Arrived::Message(header, body, reservation) => {
            on_message(
                handle,
                services,
                header,
                InboundBody::Chunks(body),
                now,
                received,
            );
            received.reservations.push(reservation);
        }
    }
}

/// Datagrams carry probes, and one-way messages whose sender repeats them.
pub(crate) fn on_datagram<D: Dispatch>(
    handle: &Rc<ConnectionHandle>,
    services: &mut D,
    datagram: &[u8],
    now: Instant,
    received: &mut Received,
) {
    let limits = &handle.state.config.limits;
    let parsed = datagram
        .split_first_chunk()
        .map(|(header, body)| (Header::decode(header), body));
    let header = match parsed {
        Some((Ok(header), body)) if header.body_bytes as usize == body.len() => Ok((header, body)),
        Some((Err(error), _)) => Err(error.reason()),
        _ => Err("peer_datagram_length"),
    };
    match header {
        Ok((header, body)) if header.check(Carriage::Lane, limits).is_ok() => {
            on_message(
                handle,
                services,
                header,
                InboundBody::Slice(body),
                now,
                received,
            );
        }
        Ok(_) => handle
            .state
            .counters
            .count(Family::Rejected, "peer_datagram_kind"),
        Err(reason) => handle.state.counters.count(Family::Rejected, reason),
    }
}

fn on_message<D: Dispatch>(
    handle: &Rc<ConnectionHandle>,
    services: &mut D,
    header: Header,
    body: InboundBody<'_>,
    now: Instant,
    received: &mut Received,
) {
    let counters = &handle.state.counters;
    let inbound = |deadline, body| Inbound {
        peer: handle.peer,
        connection: handle.number.get(),
        class: header.class,
        method: header.method,
        deadline,
        body,
    };
    let exchanged = &handle.state.exchanged;
    match header.kind {
        Kind::Request => {
            exchanged.set(exchanged.get() + 1);
            counters.received(header.class, body.len() as usize);
            let deadline = now + Duration::from_millis(header.arg.into());
            let defer = Defer {
                handle,
                class: header.class,
                id: header.id,
            };
            let answer = match services.service_of(header.method) {
                Some(service) => service.on_request(inbound(Some(deadline), body), defer),
                None => {
                    counters.count(Family::Rejected, UNKNOWN_METHOD);
                    Answer::Failure(FailureCode::UnknownMethod)
                }
            };
            match answer {
                Answer::Reply(body) => handle.answer(header.class, header.id, Ok(body)),
                Answer::Failure(code) => handle.answer(header.class, header.id, Err(code)),
                Answer::Deferred => {}
            }
        }
        Kind::Send => {
            counters.received(header.class, body.len() as usize);
            match services.service_of(header.method) {
                Some(service) => service.on_send(inbound(None, body)),
                None => counters.count(Family::Rejected, UNKNOWN_METHOD),
            }
        }
        Kind::Response => {
            exchanged.set(exchanged.get() + 1);
            counters.received(header.class, body.len() as usize);
            handle.on_answer(header.id, Ok(body.into_payload()));
        }
        Kind::Failure => {
            // Refused before all of it was there: the rest need not be sent.
            handle.withdraw(Kind::Request, header.class, header.id, false);
            handle.on_answer(
                header.id,
                Err(RpcError::Peer(FailureCode::from_arg(header.arg))),
            );
        }
        Kind::Cancel => handle.on_cancel(header.class, header.id),
        Kind::Probe => handle.datagram(Kind::ProbeReply, header.arg),
        Kind::ProbeReply => received.probe_replies.push(header.arg),
        // The first was read before anything else. A later version may say it again.
        Kind::Hello => {}
    }
}

/// Counts a cut stream; a request among them is answered, since its sender may still wait.
pub(crate) fn on_fault(
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
    let Some(header) = header else { return };
    match fault {
        StreamFault::Reset => handle.state.counters.add(Counter::RequestsCancelled, 1),
        StreamFault::NoRoom if wants_answer(&header) => {
            handle.answer(header.class, header.id, Err(FailureCode::TooLarge));
        }
        _ if wants_answer(&header) => {
            handle.answer(header.class, header.id, Err(FailureCode::Malformed));
        }
        _ if header.kind == Kind::Response => {
            handle.withdraw(Kind::Request, header.class, header.id, true);
            let error = match fault {
                StreamFault::NoRoom => RpcError::LocalNoBudget,
                _ => RpcError::PeerProtocol,
            };
            handle.on_answer(header.id, Err(error));
        }
        _ => {}
    }
}
