//! One connection of the memory network as one of its nodes sees it.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::inbox::MemoryInbox;
use super::packet::MemoryLink;
use crate::config::TransportConfig;
use crate::service::handle::ConnectionHandle;

/// How often a silent peer is asked whether it is there: QUIC's probes, which loss cannot silence.
const PING_INTERVAL: Duration = Duration::from_millis(100);

/// What a node has to do with another.
#[derive(Debug)]
pub(super) enum State {
    /// The other side dials.
    Idle,
    /// We dial, and say so again at `at`.
    Dialling { attempt: u64, at: Instant },
    /// Connected.
    Up(Box<Connection>),
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) attempt: u64,
    pub(super) link: Rc<ConnectionHandle>,
    pub(super) path: MemoryLink,
    pub(super) inbox: MemoryInbox,
    /// When the link will have room again, while something waits for that.
    pub(super) room_at: Option<Instant>,
    heard_at: Instant,
    ping_at: Instant,
    judge_at: Option<Instant>,
}

impl Connection {
    pub(super) fn new(attempt: u64, link: Rc<ConnectionHandle>, now: Instant) -> Self {
        let config = &link.state.config;
        Self {
            attempt,
            path: MemoryLink::new(now, config.udp_payload_bytes_max),
            inbox: MemoryInbox::new(config.limits),
            room_at: None,
            heard_at: now,
            ping_at: now + config.keep_alive,
            judge_at: None,
            link,
        }
    }

    /// The peer gave a sign of life.
    pub(super) fn heard(&mut self, now: Instant) {
        let config = &self.link.state.config;
        self.heard_at = now;
        self.ping_at = now + config.keep_alive;
        if self.judge_at.is_none() && self.inbox.unfinished() > 0 {
            self.judge_at = Some(now + config.stream_progress_interval);
        }
    }

    /// Whether the peer was silent too long.
    pub(super) fn is_lost(&self, now: Instant) -> bool {
        now >= self.heard_at + self.link.state.config.idle_timeout
    }

    /// Whether to ask for a sign of life now.
    pub(super) fn take_ping(&mut self, now: Instant) -> bool {
        let is_due = now >= self.ping_at;
        if is_due {
            self.ping_at = now + PING_INTERVAL;
        }
        is_due
    }

    /// Whether to judge the progress of unfinished messages now.
    pub(super) fn take_judgement(&mut self, now: Instant, config: &TransportConfig) -> bool {
        let is_due = self.judge_at.is_some_and(|at| at <= now);
        if is_due {
            let again = self.inbox.unfinished() > 0;
            self.judge_at = again.then(|| now + config.stream_progress_interval);
        }
        is_due
    }

    /// The earliest thing that this connection waits for.
    pub(super) fn next_timeout(&self) -> Instant {
        let carrier = match self.room_at {
            Some(at) => Some(at),
            None => self
                .link
                .out
                .borrow_mut()
                .memory()
                .and_then(|memory| memory.next_timeout()),
        };
        let idle = self.heard_at + self.link.state.config.idle_timeout;
        let rest = [carrier, self.link.next_deadline(), self.judge_at];
        rest.into_iter()
            .flatten()
            .fold(idle.min(self.ping_at), Instant::min)
    }
}
