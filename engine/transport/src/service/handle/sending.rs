//! One-way messages, answers, control frames: what is sent and not waited for.

use millrace_protocol::frame::{Class, FailureCode, Header, Kind, Method};
use millrace_protocol::rpc::RpcError;

use super::{ConnectionHandle, too_large};
use crate::carrier::QueueFull;
use crate::counters::Family;
use crate::service::message::Payload;

impl ConnectionHandle {
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
    /// becomes [`FailureCode::Busy`]; one that it never has room for, [`FailureCode::TooLarge`].
    pub(crate) fn answer(&self, class: Class, id: u32, answer: Result<Payload, FailureCode>) {
        if self.is_closed.get() {
            return;
        }
        let body = match answer {
            Ok(body) => body,
            Err(code) => return self.fail(class, id, code),
        };
        let max_bytes = self.answer_bytes_max(&body);
        if body.len() > max_bytes.into() {
            let error = too_large(body.len(), max_bytes);
            let counters = &self.state.counters;
            counters.count(Family::Failed, error.reason());
            return self.fail(class, id, FailureCode::TooLarge);
        }
        let body_bytes = body.len() as u32;
        let header = Header {
            kind: Kind::Response,
            class,
            method: Method(0),
            id,
            body_bytes,
            arg: 0,
        };
        let pushed = self.out.borrow_mut().push(header, body);
        if let Err(full) = pushed {
            let reason = match full {
                QueueFull::Queue => RpcError::LocalBusy(class).reason(),
                QueueFull::Unread(error) => error.reason(),
            };
            self.state.counters.count(Family::Failed, reason);
            return self.fail(class, id, FailureCode::Busy);
        }
        self.state.counters.sent(class, body_bytes as usize);
        self.mark_dirty();
    }

    /// The longest answer that is ever sent in memory of the kind of `body`.
    fn answer_bytes_max(&self, body: &Payload) -> u32 {
        let config = &self.state.config;
        match body {
            Payload::Empty | Payload::Chunks(_) => config.limits.body_bytes_max,
            Payload::Bytes(_) => config.plain_answer_bytes_max(),
        }
    }

    /// The answer with this header was cut, because the peer did not read it: it is told, in case
    /// that it still waits.
    pub(crate) fn on_unread(&self, answer: &Header) {
        self.state.counters.count(Family::Failed, "answer_unread");
        self.work.stalled();
        self.fail(answer.class, answer.id, FailureCode::DeadlineExceeded);
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
}
