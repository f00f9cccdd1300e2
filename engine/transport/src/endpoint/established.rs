//! The end of a handshake: TLS has proven the peer's identity, and `Peers` decides whether it may
//! stay.
//!
//! Invariants
//! 1. Nothing is counted against a source before the handshake has shown that the address is its
//!    own.
//! 2. A peer that stays has a session and roaming IDs; one that may not is told why.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Instant;

use millrace_protocol::frame::Hello;
use millrace_protocol::id::NodeId;
use millrace_protocol::peers::{Attempt, Direction, Refusal};

use super::Endpoint;
use crate::connection::Connection;
use crate::counters::Counter;
use crate::phase::Phase;
use crate::quic::CloseCode;
use crate::session::Session;
use crate::tls;

/// Why a connection was refused whose peer flooded one a short while ago.
const FLOODED_BEFORE: &str = "flooded_before";

/// What a dial is made again with.
struct Redial {
    peer: NodeId,
    address: SocketAddr,
    attempt: Attempt,
}

impl Endpoint {
    /// TLS is done on our side: learns the peer's identity, and asks whether it may stay.
    pub(super) fn on_established(&mut self, slot: usize, now: Instant) {
        let Some(mut connection) = self.connections.get_mut(slot).and_then(Option::take) else {
            return;
        };
        if let Some(redial) = self.redial(&mut connection) {
            // Not at once: the peer's handshake is done when our last flight has reached it, and a
            // peer that never gets it holds the handshake open.
            connection.phase = Phase::Lingering {
                until: now + connection.linger(),
                code: CloseCode::Replaced,
            };
            let index = connection.index;
            self.connections[slot] = Some(connection);
            self.mark_dirty(slot);
            self.counters().add(Counter::PathsReplaced, 1);
            return self.dial(index, redial.peer, redial.address, redial.attempt, now);
        }
        let judged = self.judge(&mut connection, now);
        if let Ok(peer) = judged {
            self.end_unproven(&mut connection);
            self.introduce(slot, &mut connection, peer);
        }
        if let Err((code, reason)) = judged {
            let key = tls::peer_key(connection.quic.as_mut());
            let peer = key.and_then(|key| self.topology.node_of_key(&key));
            match peer.filter(|_| code == CloseCode::DuplicateIdentity) {
                Some(peer) => self.refuse_duplicate(&connection, &peer, now),
                None => self.refuse(reason, connection.address.first(), peer, now),
            }
            connection.close(code);
        }
        self.connections[slot] = Some(connection);
        self.mark_dirty(slot);
        if judged.is_ok() {
            self.renew_ids(slot, now);
            self.run_actions(now);
        }
    }

    /// The dial is to be made again, with the profile that the RTT of its handshake asks for: the
    /// peer was not known before, so this happens once.
    fn redial(&mut self, connection: &mut Connection) -> Option<Redial> {
        let attempt = connection.attempt.filter(|_| self.stop_at.is_none())?;
        let key = tls::peer_key(connection.quic.as_mut())?;
        let peer = self.topology.node_of_key(&key)?;
        if !self.is_other_path(connection, &peer) {
            return None;
        }
        connection.attempt = None;
        self.end_handshake(connection);
        Some(Redial {
            peer,
            address: connection.address.current(),
            attempt,
        })
    }

    /// The proven peer, if it may stay; else the code that closes the connection, and the reason
    /// that is counted.
    fn judge(
        &mut self,
        connection: &mut Connection,
        now: Instant,
    ) -> Result<NodeId, (CloseCode, &'static str)> {
        let steering = connection
            .initial
            .as_ref()
            .and_then(|id| id.first())
            .copied();
        self.end_handshake(connection);
        self.charge(connection, now);
        let key = tls::peer_key(connection.quic.as_mut());
        connection.peer_key = key;
        let Some(peer) = key.and_then(|key| self.topology.node_of_key(&key)) else {
            // The peer passed the callback, and has left the registry since.
            return Err((CloseCode::NotAMember, CloseCode::NotAMember.reason()));
        };
        if self.penalties.refuses(&peer, now) {
            return Err((CloseCode::Flood, FLOODED_BEFORE));
        }
        let direction = match connection.attempt.take() {
            Some(attempt) => {
                self.counters().add(Counter::ConnectionsOut, 1);
                Direction::Outbound(attempt)
            }
            None => {
                // The dialler says in its first connection ID which connection of the pair this is.
                connection.index =
                    steering.map_or(0, |byte| usize::from(byte.wrapping_sub(peer.spread())));
                self.counters().add(Counter::ConnectionsIn, 1);
                let from = connection.address.first();
                Direction::Inbound { from }
            }
        };
        if connection.is_server {
            let permit = self.parts.admission.open(connection.address.first());
            connection.connection_permit =
                Some(permit.map_err(|why| (CloseCode::NoRoom, why.label()))?);
        }
        let allowed = match self.parts.peers.get_mut(connection.index) {
            Some(peers) => peers.handshake_done(connection.key, peer, direction, now),
            None => Err(Refusal::TooMany),
        };
        allowed.map_err(|refusal| (CloseCode::of_refusal(refusal), refusal.reason()))?;
        Ok(peer)
    }

    /// Begins the session, with our hello.
    fn introduce(&self, slot: usize, connection: &mut Connection, peer: NodeId) {
        connection.phase = Phase::AwaitHello;
        // Relaxed: a number on its own; a peer that hears an older one asks a little later.
        let registry_version = self.parts.registry_version.load(Ordering::Relaxed);
        let hello = Hello::new(registry_version, self.parts.shards as u8);
        let session = Session::new(&self.parts.state, slot, peer, connection.is_server, &hello);
        if connection.pacing.is_some() {
            session.handle.out.borrow_mut().set_paced();
        }
        connection.session = Some(session);
    }

    /// Charges the source of a connection, which has shown that its address is its own. More than
    /// one call does no harm.
    pub(super) fn charge(&self, connection: &mut Connection, now: Instant) {
        if std::mem::take(&mut connection.is_uncharged) {
            let from = connection.address.first();
            self.parts
                .admission
                .validated(from, self.parts.clock.ns(now));
        }
    }

    /// The connection is a peer's, or is gone. More than one call does no harm.
    pub(super) fn end_unproven(&mut self, connection: &mut Connection) {
        self.unproven -= usize::from(std::mem::take(&mut connection.is_unproven));
    }

    /// Ends the handshake, whether it succeeded or not. More than one call does no harm.
    pub(super) fn end_handshake(&mut self, connection: &mut Connection) {
        if std::mem::take(&mut connection.is_handshaking) {
            self.handshakes -= 1;
            self.half_open -= usize::from(connection.is_server);
            connection.handshake_permit = None;
        }
        if let Some(initial) = connection.initial.take() {
            self.initial.remove(&initial);
        }
    }
}
