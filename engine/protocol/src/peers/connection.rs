//! The life of one connection: pending, up, draining.

use super::{
    Action, CloseKind, CloseReason, ConnKey, Connection, ConnectionNumber, Dial, Direction, NodeId,
    Peers, State, Timer,
};
use std::time::Instant;

impl Peers {
    pub(super) fn add_pending(
        &mut self,
        conn: ConnKey,
        id: NodeId,
        direction: Direction,
        now: Instant,
    ) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let older = peer.pending.replace(conn);
        if let Some(older) = older {
            self.drop_connection(older);
            let reason = CloseReason::Superseded;
            self.actions.push_back(Action::Close {
                conn: older,
                reason,
            });
        }
        let state = State::Pending(direction);
        let from = match direction {
            Direction::Inbound { from } => Some(from),
            Direction::Outbound(_) => None,
        };
        let connection = Connection {
            peer: id,
            from,
            state,
            verifying: false,
            timer: None,
        };
        let reused = self.connections.insert(conn, connection);
        assert!(reused.is_none(), "{conn:?} names two connections");
        if from.is_some() {
            // The dialler's attempt has a deadline of its own; a listener's connection has only
            // this one.
            self.stop_peer_timer(id);
            self.set_connection_timer(conn, now + self.config.connect_timeout);
        }
    }

    pub(super) fn bring_up(&mut self, conn: ConnKey, now: Instant) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        let State::Pending(direction) = connection.state else {
            return;
        };
        let id = connection.peer;
        self.numbers_given += 1;
        // Two connections of a pair may lie on one shard, where each has its own machine.
        let shards = u64::from(self.config.shards.max(1));
        let given = self.numbers_given * shards + u64::from(self.config.shard);
        let offset = (given << u8::BITS) + u64::from(self.config.index);
        let number = ConnectionNumber(self.numbers_base + offset);
        connection.state = State::Up { number, since: now };
        self.stop_connection_timer(conn);
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        peer.pending = None;
        peer.dial_request_restarts = 0;
        peer.candidate.connected();
        match direction {
            Direction::Inbound { .. } => peer.backoff.reset(),
            Direction::Outbound(_) => peer.dial = Dial::Idle,
        }
        let older = peer.current.replace(conn);
        let oldest = if older.is_some() {
            peer.draining.take()
        } else {
            None
        };
        if let Some(older) = older {
            peer.draining = Some(older);
            self.drain(older, now);
        }
        if let Some(conn) = oldest {
            self.drop_connection(conn);
            self.actions.push_back(Action::Close {
                conn,
                reason: CloseReason::Drained,
            });
        }
        self.stop_peer_timer(id);
        self.counters.ups += 1;
        self.actions.push_back(Action::Up {
            peer: id,
            conn,
            number,
        });
    }

    fn drain(&mut self, conn: ConnKey, now: Instant) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        let until = now + self.config.drain_timeout;
        let latest = until.max(now + self.config.drain_max);
        connection.state = State::Draining { until, latest };
        connection.verifying = false;
        self.counters.replaced += 1;
        self.actions.push_back(Action::Drain { conn });
        self.set_connection_timer(conn, until);
    }

    pub(super) fn drain_on(&mut self, conn: ConnKey, wanted: Instant) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        if let State::Draining { until, latest } = &mut connection.state
            && *until < wanted.min(*latest)
        {
            let at = wanted.min(*latest);
            *until = at;
            self.set_connection_timer(conn, at);
        }
    }

    /// Forgets a connection that has ended, and dials again where the peer is left without one.
    pub(super) fn forget(&mut self, conn: ConnKey, kind: CloseKind, now: Instant) {
        let Some(Connection {
            peer: id, state, ..
        }) = self.drop_connection(conn)
        else {
            return;
        };
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        match state {
            State::Draining { .. } => peer.draining = None,
            State::Pending(Direction::Outbound(_)) => {
                peer.pending = None;
                self.redial_later(id, now);
            }
            State::Pending(Direction::Inbound { .. }) => {
                peer.pending = None;
                if peer.current.is_none() {
                    self.seek(id, now);
                }
            }
            State::Up { number, since } => {
                peer.current = None;
                self.counters.downs += 1;
                self.actions.push_back(Action::Down { peer: id, number });
                self.replace_lost(id, kind, now >= since + self.config.stable_after, now);
            }
        }
    }

    fn replace_lost(&mut self, id: NodeId, kind: CloseKind, stable: bool, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if peer.dial == Dial::Listening {
            if peer.pending.is_none() {
                self.seek(id, now);
            }
            return;
        }
        if stable {
            peer.backoff.reset();
        }
        // What was to replace the connection goes on, and has a deadline.
        if peer.dial.attempt().is_some() {
            return;
        }
        match kind {
            CloseKind::Clean | CloseKind::Reset if stable => self.dial(id, now),
            _ => self.wait(id, now),
        }
    }

    pub(super) fn connection_timeout(&mut self, conn: ConnKey, now: Instant) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        if connection
            .timer
            .is_some_and(|timer| self.timers.waits(timer))
        {
            return; // Set again by another timer of the same poll.
        }
        connection.timer = None;
        let (reason, kind) = match connection.state {
            State::Pending(_) => (CloseReason::HelloTimeout, CloseKind::Lost),
            // The peer runs and does not know the connection any more: treated as a reset.
            State::Up { .. } if connection.verifying => {
                (CloseReason::Unresponsive, CloseKind::Reset)
            }
            State::Up { .. } => return,
            State::Draining { .. } => (CloseReason::Drained, CloseKind::Clean),
        };
        self.actions.push_back(Action::Close { conn, reason });
        self.forget(conn, kind, now);
    }

    /// Removes a connection and its timer; the caller clears the peer's reference to it.
    pub(super) fn drop_connection(&mut self, conn: ConnKey) -> Option<Connection> {
        let mut connection = self.connections.remove(&conn)?;
        if let Some(timer) = connection.timer.take() {
            self.timers.cancel(timer);
        }
        Some(connection)
    }

    pub(super) fn set_connection_timer(&mut self, conn: ConnKey, at: Instant) {
        if let Some(connection) = self.connections.get_mut(&conn) {
            let timer = self
                .timers
                .replace(connection.timer, Timer::Connection(conn), at);
            connection.timer = Some(timer);
        }
    }

    pub(super) fn stop_connection_timer(&mut self, conn: ConnKey) {
        let connection = self.connections.get_mut(&conn);
        if let Some(timer) = connection.and_then(|connection| connection.timer.take()) {
            self.timers.cancel(timer);
        }
    }
}
