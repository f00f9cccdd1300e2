//! Timers of connections: each is armed at the earliest event that its connection waits for.

use std::time::Instant;

use super::{Endpoint, Timer};
use crate::counters::Family;
use crate::phase::Expired;
use crate::quic::CloseCode;

impl Endpoint {
    pub(super) fn arm(&mut self, slot: usize) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        match connection.next_timeout() {
            Some(at) => {
                connection.timer = Some(self.wheel.replace(
                    connection.timer,
                    Timer::Connection(slot),
                    at,
                ));
            }
            None => {
                if let Some(id) = connection.timer.take() {
                    self.wheel.cancel(id);
                }
            }
        }
    }

    pub(super) fn on_connection_timeout(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        connection.timer = None;
        if connection
            .quic
            .timeout_instant()
            .is_some_and(|at| at <= now)
        {
            connection.quic.on_timeout();
            connection.follow_mtu(&self.parts.state.counters, now);
        } else if connection.mtu.next_timeout().is_some_and(|at| at <= now) {
            connection.follow_mtu(&self.parts.state.counters, now);
        }
        let mut is_released = false;
        let mut close = match connection.phase.expired(now) {
            Some(Expired::Handshake) => {
                let counters = &self.parts.state.counters;
                counters.count(Family::Refused, "connect_timeout");
                Some(CloseCode::Done)
            }
            Some(Expired::Drained(code)) => Some(code),
            None => None,
        };
        if let Some(session) = &mut connection.session {
            let due = session.on_timeout(&mut connection.quic, now);
            close = due.or(close);
            is_released = session.take_release(now);
            let cut = session.take_unread_cut();
            if cut > 0
                && let Some(left_out) = self.log_limit.admit("answer_unread", now)
            {
                tracing::warn!(
                    peer = %session.peer(),
                    address = %connection.address.current(),
                    answers = cut,
                    left_out,
                    "answers are cut: their peer asked for them, and does not read them"
                );
            }
        }
        if let Some(code) = close {
            connection.close(code);
        }
        if is_released {
            self.on_packets(slot, now);
        } else {
            self.judge_flood(slot, now);
        }
        self.mark_dirty(slot);
    }
}
