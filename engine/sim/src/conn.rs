//! The model of a QUIC connection: what is repeated, and until when.

use crate::memnet::Endpoint;
use millrace_protocol::{
    dial_request::DialRequest,
    health::{Health, HealthAction},
    id::NodeId,
    peers::{Attempt, ConnKey},
};
use std::time::{Duration, Instant};

/// What QUIC starts with before it knows the round trip: 3 times 333 ms.
pub(crate) const INITIAL_PTO: Duration = Duration::from_millis(999);
/// Repeats of what an open connection has sent.
pub(crate) const OPEN_PTO: Duration = Duration::from_millis(200);
/// Probes go out every second, and what acknowledges them shows that something before is lost.
pub(crate) const OPEN_PTO_MAX: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Hash)]
pub(crate) enum Packet {
    Initial {
        client: ConnKey,
    },
    Accept {
        client: ConnKey,
        server: ConnKey,
    },
    Data {
        to: ConnKey,
        from: ConnKey,
        frame: Frame,
    },
    Close {
        to: ConnKey,
        refused: bool,
    },
    Reset {
        to: ConnKey,
    },
    DialRequest {
        datagram: [u8; DialRequest::BYTES],
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Frame {
    Finish,
    Hello,
    Ack { finish: bool, hello: bool },
    Probe(u32),
    ProbeReply(u32),
}

#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) remote: Endpoint,
    pub(crate) remote_key: Option<ConnKey>,
    /// Whom a client dials; whom a server took the client for.
    pub(crate) peer: NodeId,
    pub(crate) attempt: Option<Attempt>,
    /// Handshake done and accepted by the machine.
    pub(crate) open: bool,
    pub(crate) finish: Reliable,
    pub(crate) hello: Reliable,
    pub(crate) pto: Duration,
    pub(crate) repeat_at: Instant,
    pub(crate) heard_at: Instant,
    pub(crate) health: Health,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reliable {
    Unsent,
    Sent,
    Acknowledged,
}

impl Conn {
    pub(crate) fn repeats(&self) -> bool {
        let initial = self.attempt.is_some() && !self.open;
        initial || self.finish == Reliable::Sent || self.hello == Reliable::Sent
    }

    pub(crate) fn send_unacknowledged(&self, key: ConnKey, out: &mut Vec<(Endpoint, Packet)>) {
        let Some(to) = self.remote_key.filter(|_| self.open) else {
            out.push((self.remote, Packet::Initial { client: key }));
            return;
        };
        for (state, frame) in [(self.finish, Frame::Finish), (self.hello, Frame::Hello)] {
            if state == Reliable::Sent {
                out.push((
                    self.remote,
                    Packet::Data {
                        to,
                        from: key,
                        frame,
                    },
                ));
            }
        }
    }

    /// True if the connection has failed.
    pub(crate) fn send_probes(
        &mut self,
        key: ConnKey,
        now: Instant,
        out: &mut Vec<(Endpoint, Packet)>,
    ) -> bool {
        while let Some(action) = self.health.poll_action(now) {
            match (action, self.remote_key) {
                (HealthAction::CloseAndRedial, _) => return true,
                (HealthAction::Probe { sequence }, Some(to)) => {
                    let frame = Frame::Probe(sequence);
                    out.push((
                        self.remote,
                        Packet::Data {
                            to,
                            from: key,
                            frame,
                        },
                    ));
                }
                (HealthAction::Probe { .. }, None) => {}
            }
        }
        false
    }
}
