//! Connections, from the dial or the first packet to the end.

use millrace_protocol::id::NodeId;
use millrace_protocol::peers::{Attempt, CloseKind, ConnKey};
use millrace_transport::CloseCode;
use millrace_transport::counters::{Counter, Family};
use millrace_transport::driver::Phase;

use super::{Connection, KEY_SHIFT, Running, slot_of};
use crate::memnet::Endpoint;
use crate::quic::{Connection as QuicConnection, End};

impl Running {
    pub(super) fn dial(&mut self, peer: NodeId, to: Endpoint, attempt: Attempt) {
        self.state.counters().add(Counter::Dials, 1);
        let key = self.next_key();
        let quic = QuicConnection::dial(key, self.state.config(), self.now);
        self.insert(quic, key, to, peer, Some(attempt));
    }

    pub(super) fn accept(&mut self, from: Endpoint, sender: NodeId, client: ConnKey) -> usize {
        let key = self.next_key();
        let quic = QuicConnection::accept(key, client, self.state.config(), self.now);
        self.insert(quic, key, from, sender, None);
        slot_of(key)
    }

    pub(in crate::node) fn replace(&mut self, peer: &NodeId) -> bool {
        let Some((key, _)) = self.peers.current(peer) else {
            return false;
        };
        let begun = self.peers.replace(key, self.now);
        self.run_actions();
        begun
    }

    fn next_key(&mut self) -> ConnKey {
        self.connections_made += 1;
        ConnKey(u64::from(self.endpoint.0) << KEY_SHIFT | self.connections_made)
    }

    fn insert(
        &mut self,
        quic: QuicConnection,
        key: ConnKey,
        remote: Endpoint,
        peer: NodeId,
        attempt: Option<Attempt>,
    ) {
        let until = self.now + self.state.config().connect_timeout;
        let connection = Connection {
            quic,
            key,
            remote,
            peer,
            attempt,
            phase: Phase::Handshake { until },
            session: None,
            timer: None,
            room_at: None,
            is_dirty: false,
        };
        self.connections.insert(slot_of(key), connection);
        self.mark_dirty(slot_of(key));
    }

    pub(super) fn close(&mut self, slot: usize, code: CloseCode) {
        if let Some(connection) = self.connections.get_mut(&slot)
            && connection.phase != Phase::Closing
        {
            connection.phase = Phase::Closing;
            connection.quic.close(code as u64);
            self.mark_dirty(slot);
        }
    }

    /// Forgets a connection that is gone, and tells every waiter of it.
    pub(super) fn remove(&mut self, slot: usize) {
        let Some(mut connection) = self.connections.remove(&slot) else {
            return;
        };
        if let Some(timer) = connection.timer {
            self.wheel.cancel(timer);
        }
        let (reason, kind) = match connection.quic.end() {
            Some(End::TimedOut) => ("timed_out", CloseKind::Lost),
            Some(End::Violation) => ("transport_error", CloseKind::Lost),
            Some(End::PeerClosed(code)) => CloseCode::end_by_peer(code),
            Some(End::Closed(code)) => CloseCode::end_by_us(code),
            None => ("lost", CloseKind::Lost),
        };
        self.state.counters().count(Family::Closed, reason);
        if let Some(session) = connection.session.take() {
            session.close(&mut self.router);
        }
        match connection.attempt {
            Some(attempt) => self.peers.dial_failed(attempt, self.now),
            None => self.peers.closed(connection.key, kind, self.now),
        }
        self.run_actions();
    }

    pub(super) fn mark_dirty(&mut self, slot: usize) {
        if let Some(connection) = self.connections.get_mut(&slot)
            && !std::mem::replace(&mut connection.is_dirty, true)
        {
            self.state.mark_dirty(slot);
        }
    }
}
