//! What the machine decides, carried out.

use millrace_protocol::dial_request::DialRequest;
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::peers::{Action, ConnKey};
use millrace_transport::CloseCode;
use millrace_transport::driver::{Phase, dial_requests};

use super::{Connection, Running, Timer, pair_key, slot_of};
use crate::quic::packet::Packet;
use crate::wire::endpoint_of;

impl Running {
    pub(super) fn run_actions(&mut self) {
        while let Some(action) = self.peers.poll_action() {
            self.run_action(action);
        }
        if let Some(at) = self.peers.poll_timeout() {
            let timer = self.wheel.replace(self.peers_timer, Timer::Peers, at);
            self.peers_timer = Some(timer);
        }
    }

    fn run_action(&mut self, action: Action) {
        match action {
            Action::Dial {
                peer,
                address,
                attempt,
            } => self.dial(peer, endpoint_of(address), attempt),
            Action::Abandon { attempt } => {
                let is_it = |connection: &&Connection| connection.attempt == Some(attempt);
                let dialled = self.connections.values().find(is_it);
                if let Some(key) = dialled.map(|connection| connection.key) {
                    self.close(slot_of(key), CloseCode::Done);
                }
            }
            Action::RequestDial { peer, address } => {
                let request = DialRequest {
                    sender: self.id,
                    target: peer,
                    index: 0,
                    sent_ms: self.wall_ms(),
                };
                let datagram = dial_requests::seal(&request, pair_key(&self.id, &peer));
                let packet = Packet::DialRequest { datagram };
                self.out.push((endpoint_of(address), packet));
            }
            Action::Verify { conn } => {
                let Some(connection) = self.find(conn) else {
                    return;
                };
                let session = connection.session.as_mut();
                let wait = session.and_then(|s| s.probe_liveness(&mut connection.quic));
                match wait {
                    Some(wait) => {
                        self.peers.verify_within(conn, wait, self.now);
                        self.mark_dirty(slot_of(conn));
                    }
                    None => self.peers.verified(conn),
                }
            }
            Action::Close { conn, reason } => {
                self.take_down(conn);
                self.close(slot_of(conn), CloseCode::of_reason(reason));
            }
            Action::Drain { conn } => {
                self.take_down(conn);
                let connection = self.find(conn).expect("a connection that drains is there");
                connection.phase = Phase::Draining {
                    until: None,
                    code: CloseCode::Replaced,
                };
                self.drain_on(slot_of(conn));
                self.mark_dirty(slot_of(conn));
            }
            Action::Up { peer, conn, number } => self.up(peer, conn, number),
            Action::Down { peer, number } => {
                let up = self.ups.remove(&peer);
                assert_eq!(up.map(|(_, n)| n), Some(number), "down without its up");
            }
        }
    }

    fn up(&mut self, peer: NodeId, key: ConnKey, number: ConnectionNumber) {
        let before = self.ups.insert(peer, (key, number));
        let is_above = before.is_none_or(|(_, before)| before < number);
        assert!(is_above, "numbers must rise");
        let now = self.now;
        let connection = self.connections.get_mut(&slot_of(key));
        let connection = connection.expect("a connection that comes up is there");
        assert_eq!(connection.peer, peer);
        connection.phase = Phase::Up;
        let session = connection.session.as_mut();
        let session = session.expect("a connection that comes up has a session");
        session.up(&connection.quic, number, now);
        let hello = session.negotiated();
        let hello = hello.expect("a connection comes up by its hello");
        // Before the services hear of it: they may ask who is up.
        self.publish();
        self.router.on_up(peer, number, &hello);
    }

    fn take_down(&mut self, key: ConnKey) {
        let session = self.find(key).and_then(|held| held.session.as_ref());
        if let Some(session) = session {
            session.take_down();
        }
    }
}
