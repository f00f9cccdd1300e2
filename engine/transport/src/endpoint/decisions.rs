//! Carries out what [`millrace_protocol::peers::Peers`] decided, and takes connections out of use.
//!
//! Invariants
//! 1. A connection that is removed gives back its slot, its timer and its callers, once.
//! 2. Services hear of a connection's end once it is gone, and of no connection that was never up.

use std::time::Instant;

use millrace_protocol::dial_request::DialRequest;
use millrace_protocol::id::ConnectionNumber;
use millrace_protocol::peers::{Action, CloseKind, ConnKey};

use super::{Arrival, Endpoint, REPLIES_MAX, Timer};
use crate::clock::wall_ms;
use crate::connection::Connection;
use crate::counters::Family;
use crate::dial_requests;
use crate::handshake_end::HandshakeEnd;
use crate::phase::Phase;
use crate::quic::CloseCode;
use crate::tls;

impl Endpoint {
    pub(super) fn run_actions(&mut self, now: Instant) {
        if self.stop_at.is_some() {
            return;
        }
        for index in 0..self.parts.peers.len() {
            while let Some(action) = self.parts.peers[index].poll_action() {
                self.run_action(index, action, now);
            }
            if let Some(at) = self.parts.peers[index].poll_timeout() {
                self.peers_timers[index] = Some(self.wheel.replace(
                    self.peers_timers[index],
                    Timer::Peers(index),
                    at,
                ));
            }
        }
    }

    pub(super) fn run_action(&mut self, index: usize, action: Action, now: Instant) {
        match action {
            Action::Dial {
                peer,
                address,
                attempt,
            } => self.dial(index, peer, address, attempt, now),
            Action::Abandon { attempt } => {
                let abandoned = |c: &Connection| c.index == index && c.attempt == Some(attempt);
                let slot = self
                    .connections
                    .iter()
                    .position(|c| c.as_deref().is_some_and(abandoned));
                if let Some(slot) = slot {
                    self.close(slot, CloseCode::Done);
                }
            }
            Action::RequestDial { peer, address } => {
                let Some(key) = self.parts.dial_keys.get(&peer) else {
                    return;
                };
                let dial_request = DialRequest {
                    sender: self.parts.me,
                    target: peer,
                    index: index as u8,
                    sent_ms: wall_ms(),
                };
                let sealed = dial_requests::seal(&dial_request, *key);
                // From the address that the kernel chooses now: the peer dials it.
                let to = Arrival {
                    from: address,
                    at: None,
                };
                self.reply(sealed.as_bytes().to_vec(), to);
            }
            Action::Verify { conn } => {
                if let Some(slot) = self.slot_of(conn)
                    && let Some(Some(connection)) = self.connections.get_mut(slot)
                    && let Some(session) = &mut connection.session
                {
                    let wait = session.probe_liveness(&mut connection.quic);
                    let peers = self.parts.peers.get_mut(index);
                    match (wait, peers) {
                        (Some(wait), Some(peers)) => {
                            peers.verify_within(conn, wait, now);
                            self.mark_dirty(slot);
                        }
                        (None, Some(peers)) => peers.verified(conn),
                        (_, None) => {}
                    }
                }
            }
            Action::Close { conn, reason } => {
                if let Some(slot) = self.slot_of(conn) {
                    self.take_down(slot);
                    self.close(slot, CloseCode::of_reason(reason));
                }
            }
            Action::Drain { conn } => {
                if let Some(slot) = self.slot_of(conn) {
                    self.take_down(slot);
                    if let Some(Some(connection)) = self.connections.get_mut(slot) {
                        connection.phase = Phase::Draining {
                            until: None,
                            code: CloseCode::Replaced,
                        };
                        let session = connection.session.as_mut();
                        let until =
                            session.and_then(|held| held.drains_until(&connection.quic, now));
                        if let Some(until) = until
                            && let Some(peers) = self.parts.peers.get_mut(index)
                        {
                            peers.drains_on(conn, until);
                        }
                    }
                    self.mark_dirty(slot);
                }
            }
            Action::Up { conn, number, .. } => self.on_up(conn, number, now),
            // Told connection by connection, when it is gone.
            Action::Down { .. } => {}
        }
    }

    pub(super) fn on_up(&mut self, conn: ConnKey, number: ConnectionNumber, now: Instant) {
        let Some(slot) = self.slot_of(conn) else {
            return;
        };
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let Some(session) = &mut connection.session else {
            return;
        };
        connection.phase = Phase::Up;
        session.up(&connection.quic, number, now);
        connection.mtu.start();
        let (peer, hello) = (session.peer(), session.negotiated());
        if let Some(hello) = hello {
            self.router.on_up(peer, number, &hello);
        }
        // After the services have heard of it: a thread that waits for the peer finds them ready.
        self.look_at(slot);
        self.publish();
    }

    pub(super) fn reply(&mut self, datagram: Vec<u8>, to: Arrival) {
        if self.replies.len() < REPLIES_MAX {
            self.replies.push((datagram, to));
        }
    }

    /// Takes a connection out of use for new messages.
    pub(super) fn take_down(&mut self, slot: usize) {
        let Some(Some(connection)) = self.connections.get(slot) else {
            return;
        };
        let Some(session) = &connection.session else {
            return;
        };
        let (board, shard) = (&self.parts.board, self.parts.shard);
        board.take_down(shard, &session.peer(), session.number());
        session.take_down();
    }

    pub(super) fn close(&mut self, slot: usize, code: CloseCode) {
        if let Some(Some(connection)) = self.connections.get_mut(slot) {
            connection.close(code);
        }
        self.mark_dirty(slot);
    }

    /// The connection is gone: tell everybody, and free its slot.
    pub(super) fn remove(&mut self, slot: usize, now: Instant) {
        self.take_down(slot);
        let Some(mut connection) = self.release(slot) else {
            return;
        };
        if let Some(refusal) = handshake_end(&mut connection).and_then(HandshakeEnd::refusal) {
            if refusal.is_of_validated_address() {
                self.charge(&mut connection, now);
            }
            self.refuse(refusal.reason(), connection.address.first(), None, now);
        }
        let kind = self.judge_end(&connection);
        self.tell_if_duplicate(&connection, now);
        if let Some(session) = connection.session.take() {
            session.close(&mut self.router);
        }
        if let Some(peers) = self.parts.peers.get_mut(connection.index) {
            match connection.attempt {
                Some(attempt) => peers.dial_failed(attempt, now),
                None => peers.closed(connection.key, kind, now),
            }
        }
        self.run_actions(now);
    }

    /// Takes a connection out of its slot, and gives back what it held of this shard. Tells
    /// neither services nor [`Peers`](millrace_protocol::peers::Peers).
    pub(super) fn release(&mut self, slot: usize) -> Option<Box<Connection>> {
        let mut connection = self.connections.get_mut(slot).and_then(Option::take)?;
        self.free.push(slot);
        self.drop_heap(&connection);
        self.live -= 1;
        if let Some(id) = connection.timer {
            self.wheel.cancel(id);
        }
        self.end_handshake(&mut connection);
        self.end_unproven(&mut connection);
        Some(connection)
    }

    /// Counts why a connection ended, and says whether it may be dialled again at once.
    pub(super) fn judge_end(&self, connection: &Connection) -> CloseKind {
        let counters = self.counters();
        let quic = &connection.quic;
        let (reason, kind) = match (quic.peer_error(), quic.local_error()) {
            _ if quic.is_timed_out() => ("timed_out", CloseKind::Lost),
            (Some(error), _) if error.is_app => CloseCode::end_by_peer(error.error_code),
            (Some(_), _) => ("peer_transport_error", CloseKind::Lost),
            (None, Some(error)) if error.is_app => CloseCode::end_by_us(error.error_code),
            (None, Some(_)) => ("transport_error", CloseKind::Lost),
            (None, None) => ("lost", CloseKind::Lost),
        };
        // The peer hears one code for all floods; what is counted tells them apart.
        let (reason, kind) = match connection.flood {
            Some(flood) => (flood.reason(), CloseKind::Refused),
            None => (reason, kind),
        };
        counters.count(Family::Closed, reason);
        kind
    }
}

/// How the handshake ended of a connection that never came up.
fn handshake_end(connection: &mut Connection) -> Option<HandshakeEnd> {
    if !matches!(
        connection.phase,
        Phase::Handshake { .. } | Phase::AwaitHello
    ) {
        return None;
    }
    let code = |error: &quiche::ConnectionError| (!error.is_app).then_some(error.error_code);
    Some(HandshakeEnd {
        is_server: connection.is_server,
        ours: connection.quic.local_error().and_then(code),
        theirs: connection.quic.peer_error().and_then(code),
        has_ed25519_key: tls::peer_key(connection.quic.as_mut()).is_some(),
        has_no_common_group: connection.has_no_common_group,
    })
}
