//! What arrives: packets to their connections, and all that each of them makes possible.

use std::sync::Arc;

use millrace_protocol::frame::Hello;
use millrace_protocol::id::NodeId;
use millrace_protocol::peers::{ConnKey, Direction};
use millrace_transport::CloseCode;
use millrace_transport::counters::{Counter, Family};
use millrace_transport::driver::{Phase, Session, dial_requests};

use super::{Connection, Running, pair_key, slot_of};
use crate::memnet::Endpoint;
use crate::quic::packet::Packet;
use crate::wire::address_of;

impl Running {
    pub(in crate::node) fn receive(&mut self, from: Endpoint, sender: NodeId, packet: Packet) {
        let now = self.now;
        self.state.counters().add(Counter::DatagramsReceived, 1);
        match packet {
            Packet::Initial { client, repeat } => {
                let is_known = |connection: &&mut Connection| {
                    let is_client = connection.quic.remote() == Some(client);
                    is_client && connection.remote == from && connection.quic.is_server()
                };
                let held = self.connections.values_mut().find(is_known);
                let slot = match held {
                    Some(connection) => slot_of(connection.key),
                    None => self.accept(from, sender, client),
                };
                if let Some(connection) = self.connections.get_mut(&slot) {
                    connection.quic.on_initial(repeat, now);
                }
                self.mark_dirty(slot);
            }
            Packet::Accept {
                client,
                server,
                repeat,
            } => {
                let slot = slot_of(client);
                let Some(connection) = self.find(client) else {
                    return;
                };
                if connection.peer != sender {
                    // Its certificate has not the key that was pinned.
                    self.state.counters().count(Family::Refused, "wrong_key");
                    self.remove(slot);
                    return;
                }
                connection.quic.on_accept(server, repeat, now);
                self.on_packets(slot);
            }
            Packet::Protected {
                to,
                number,
                acked,
                frames,
            } => {
                let Some(connection) = self.find(to) else {
                    self.state.counters().add(Counter::DatagramsUnroutable, 1);
                    return;
                };
                connection.quic.on_protected(number, &acked, frames, now);
                self.on_packets(slot_of(to));
            }
            Packet::Close { to, code } => {
                if let Some(connection) = self.find(to) {
                    connection.quic.on_close(code);
                    self.remove(slot_of(to));
                }
            }
            Packet::DialRequest { datagram } => {
                let opened = dial_requests::open(&datagram, |claimed| {
                    (claimed.target == self.id).then(|| pair_key(&claimed.sender, &self.id))
                });
                let Some(request) = opened else {
                    self.state.counters().add(Counter::DialRequestsRefused, 1);
                    return;
                };
                let (from, wall_ms) = (address_of(from), self.wall_ms());
                self.peers.dial_requested(&request, from, wall_ms, now);
                self.run_actions();
            }
        }
    }

    pub(super) fn find(&mut self, key: ConnKey) -> Option<&mut Connection> {
        let connection = self.connections.get_mut(&slot_of(key));
        connection.filter(|connection| connection.key == key)
    }

    /// After a packet: everything that it made possible.
    pub(super) fn on_packets(&mut self, slot: usize) {
        let now = self.now;
        let Some(connection) = self.connections.get(&slot) else {
            return;
        };
        if connection.quic.end().is_some() {
            self.remove(slot);
            return;
        }
        if matches!(connection.phase, Phase::Handshake { .. }) && connection.quic.is_established() {
            self.on_established(slot);
        }
        self.confirm_liveness(slot);
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        if let Some(session) = &mut connection.session {
            let received = session.receive(
                &mut connection.quic,
                &mut self.router,
                &mut self.scratch,
                &mut self.bodies,
                now,
            );
            for sequence in received.probe_replies {
                session.on_probe_reply(sequence, now);
            }
            let flood = session.flood();
            if received.fault.is_some() {
                self.close(slot, CloseCode::Violation);
            } else if flood.is_some() {
                self.close(slot, CloseCode::Flood);
            }
        }
        self.mark_dirty(slot);
    }

    /// The handshake is done on our side, so that the peer is known: asks whether it may stay.
    fn on_established(&mut self, slot: usize) {
        let (now, topology) = (self.now, Arc::clone(&self.topology));
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        let (direction, counter) = match connection.attempt.take() {
            Some(attempt) => (Direction::Outbound(attempt), Counter::ConnectionsOut),
            None => {
                let from = address_of(connection.remote);
                (Direction::Inbound { from }, Counter::ConnectionsIn)
            }
        };
        self.state.counters().add(counter, 1);
        let (key, peer) = (connection.key, connection.peer);
        if let Err(refusal) = self.peers.handshake_done(key, peer, direction, now) {
            let counters = self.state.counters();
            counters.count(Family::Refused, refusal.reason());
            self.close(slot, CloseCode::of_refusal(refusal));
            return;
        }
        connection.phase = Phase::AwaitHello;
        let hello = Hello {
            versions: self.versions,
            ..Hello::new(topology.newest_version(), 1)
        };
        let is_server = connection.quic.is_server();
        let session = Session::new(&self.state, slot, peer, is_server, &hello);
        connection.session = Some(session);
        self.run_actions();
    }

    /// Brings a connection up when the peer's hello is there, before anything else is read; and
    /// takes a packet for the sign of life that a dial request made us ask for.
    fn confirm_liveness(&mut self, slot: usize) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        let Some(session) = &mut connection.session else {
            return;
        };
        let key = connection.key;
        if connection.phase == Phase::AwaitHello {
            match session.receive_hello(&mut connection.quic) {
                None => {}
                Some(Ok(_)) => {
                    self.peers.hello_received(key, now);
                    self.run_actions();
                }
                Some(Err(error)) => self.close(slot, CloseCode::of_hello(&error)),
            }
        } else if session.take_liveness(&connection.quic) {
            self.peers.verified(key);
        }
    }
}
