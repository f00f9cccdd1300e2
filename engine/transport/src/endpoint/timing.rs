//! Timers of connections: armed at the earliest thing a connection waits for, and what is due when they fire.

use std::time::Instant;

use super::{Endpoint, PeerRoom, Timer};
use crate::connection::Phase;
use crate::counters::Family;
use crate::quic::CloseCode;
use crate::service::message::Handler;

impl<H: Handler> Endpoint<H> {
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
        }
        let mut close = None;
        match connection.phase {
            Phase::Handshake { until } if until <= now => {
                self.parts
                    .state
                    .counters
                    .count(Family::Refused, "connect_timeout");
                close = Some(CloseCode::Done);
            }
            Phase::Draining {
                until: Some(until),
                code,
            }
            | Phase::Lingering { until, code }
                if until <= now =>
            {
                close = Some(code);
            }
            _ => {}
        }
        if let Some(handle) = &connection.handle {
            handle.expire(now);
        }
        connection.keep_alive(self.parts.state.config.keep_alive, now);
        if let Some(health) = &mut connection.health {
            health.handle_timeout(now);
            if connection.probe(now) {
                close = Some(CloseCode::Unhealthy);
            }
        }
        if let (Some(at), Some(peer)) = (connection.judge_at, connection.peer())
            && at <= now
        {
            let mut room = PeerRoom {
                budget: &mut self.parts.budget,
                pool: &self.parts.pool,
                peer,
            };
            connection.judge_streams(&mut room, now, &self.parts.state.config);
        }
        if let Some(code) = close {
            connection.close(code);
        }
        self.mark_dirty(slot);
    }
}
