//! One simulated node: the real machines, and as much of QUIC as decides about connections.
//!
//! The model: the client repeats its Initial after 1, 3, 7 s; the server answers each. Finish and
//! hello are repeated until acknowledged. Closes are sent once. A packet for a connection that is
//! not known is answered by a reset. A connection without a packet for the idle timeout ends.

use crate::{
    conn::{Conn, Frame, INITIAL_PTO, OPEN_PTO, OPEN_PTO_MAX, Packet, Reliable},
    memnet::Endpoint,
};
use millrace_protocol::{
    dial_request::DialRequest,
    health::{Health, HealthConfig},
    id::{ConnectionNumber, NodeId},
    peers::{
        Action, Attempt, CloseKind, CloseReason, ConnKey, Direction, Peers, PeersConfig, Refusal,
    },
    topology::Topology,
};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

const PORT: u16 = 4100;

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) endpoint: Endpoint,
    pub(crate) topology: Arc<Topology>,
    /// None while crashed.
    pub(crate) peers: Option<Peers>,
    pub(crate) out: Vec<(Endpoint, Packet)>,
    pub(crate) ups: BTreeMap<NodeId, (ConnKey, ConnectionNumber)>,
    pub(crate) idle_timeout: Duration,
    pub(crate) health: HealthConfig,
    conns: BTreeMap<ConnKey, Conn>,
    conns_made: u64,
}

impl Node {
    pub(crate) fn new(id: NodeId, n: u32, idle_timeout: Duration, health: HealthConfig) -> Self {
        Self {
            id,
            endpoint: Endpoint(n),
            topology: Arc::new(Topology::empty()),
            peers: None,
            out: Vec::new(),
            ups: BTreeMap::new(),
            idle_timeout,
            health,
            conns: BTreeMap::new(),
            conns_made: 0,
        }
    }

    pub(crate) fn start(&mut self, config: PeersConfig, seed: u64, now: Instant) {
        let mut peers = Peers::new(self.id, config, 0, seed, now);
        peers.set_topology(Arc::clone(&self.topology), now);
        self.peers = Some(peers);
        self.drain(now);
    }

    /// As kill -9: nothing is sent, nothing is kept.
    pub(crate) fn crash(&mut self) {
        self.peers = None;
        self.conns.clear();
        self.ups.clear();
        self.out.clear();
    }

    pub(crate) fn set_topology(&mut self, topology: Arc<Topology>, now: Instant) {
        self.topology = topology;
        if let Some(peers) = &mut self.peers {
            peers.set_topology(Arc::clone(&self.topology), now);
        }
        self.drain(now);
    }

    /// The other end of the current connection to a peer, as both ends name it.
    pub(crate) fn current(&self, peer: &NodeId) -> Option<(ConnKey, Option<ConnKey>)> {
        let (conn, _) = self.peers.as_ref()?.current(peer)?;
        Some((conn, self.conns.get(&conn)?.remote_key))
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let conns = self.conns.values().flat_map(|conn| {
            let health = if conn.open {
                conn.health.poll_timeout()
            } else {
                None
            };
            [
                Some(conn.repeat_at).filter(|_| conn.repeats()),
                Some(conn.heard_at + self.idle_timeout),
                health,
            ]
        });
        let peers = self.peers.as_ref()?.poll_timeout();
        conns.chain([peers]).flatten().min()
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        let idle: Vec<ConnKey> = self
            .conns
            .iter()
            .filter(|(_, conn)| now >= conn.heard_at + self.idle_timeout)
            .map(|(key, _)| *key)
            .collect();
        for key in idle {
            self.end(key, CloseKind::Lost, now);
        }
        let mut failed = Vec::new();
        for (key, conn) in &mut self.conns {
            if conn.repeats() && now >= conn.repeat_at {
                conn.pto = (conn.pto * 2).min(if conn.open {
                    OPEN_PTO_MAX
                } else {
                    Duration::MAX
                });
                conn.repeat_at = now + conn.pto;
                conn.send_unacknowledged(*key, &mut self.out);
            }
            if conn.open {
                conn.health.handle_timeout(now);
                if conn.send_probes(*key, now, &mut self.out) {
                    failed.push(*key);
                }
            }
        }
        for key in failed {
            self.end(key, CloseKind::Lost, now);
        }
        if let Some(peers) = &mut self.peers {
            peers.handle_timeout(now);
        }
        self.drain(now);
    }

    /// Takes a packet. `sender` is what the sender's key proves, where a key is involved.
    pub(crate) fn receive(&mut self, from: Endpoint, sender: NodeId, packet: Packet, now: Instant) {
        if self.peers.is_none() {
            return;
        }
        match packet {
            Packet::Initial { client } => self.on_initial(from, sender, client, now),
            Packet::Accept { client, server } => self.on_accept(sender, client, server, now),
            Packet::Data {
                to,
                from: key,
                frame,
            } => match self.conns.get_mut(&to) {
                None => self.out.push((from, Packet::Reset { to: key })),
                Some(conn) => {
                    conn.heard_at = now;
                    if let Some(peers) = &mut self.peers {
                        peers.verified(to);
                    }
                    self.on_frame(to, frame, now);
                }
            },
            Packet::Close { to, refused } => {
                let kind = if refused {
                    CloseKind::Refused
                } else {
                    CloseKind::Clean
                };
                self.end(to, kind, now);
            }
            Packet::Reset { to } => self.end(to, CloseKind::Reset, now),
            Packet::DialRequest { datagram } => {
                if let (Some(dial_request), Some(peers)) =
                    (DialRequest::decode(&datagram), &mut self.peers)
                    && dial_request.target == self.id
                {
                    peers.dial_requested(dial_request.sender, now);
                }
            }
        }
        self.drain(now);
    }

    fn on_initial(&mut self, from: Endpoint, sender: NodeId, client: ConnKey, now: Instant) {
        let known = |(_, conn): &(&ConnKey, &Conn)| {
            conn.remote == from && conn.remote_key == Some(client) && conn.attempt.is_none()
        };
        let server = match self.conns.iter().find(known) {
            Some((key, _)) => *key,
            None => self.add_conn(from, Some(client), sender, None, now),
        };
        self.out.push((from, Packet::Accept { client, server }));
    }

    fn on_accept(&mut self, sender: NodeId, client: ConnKey, server: ConnKey, now: Instant) {
        let Some(conn) = self.conns.get_mut(&client) else {
            return;
        };
        let Some(attempt) = conn.attempt else { return };
        conn.heard_at = now;
        if conn.open {
            return;
        }
        conn.remote_key = Some(server);
        if conn.peer != sender {
            self.end(client, CloseKind::Refused, now);
            return;
        }
        self.handshake_done(client, Direction::Outbound(attempt), now);
    }

    fn handshake_done(&mut self, key: ConnKey, direction: Direction, now: Instant) {
        let (Some(peers), Some(conn)) = (&mut self.peers, self.conns.get_mut(&key)) else {
            return;
        };
        let judged: Result<(), Refusal> = peers.handshake_done(key, conn.peer, direction, now);
        if judged.is_err() {
            self.close(key, true);
            return;
        }
        conn.open = true;
        conn.pto = OPEN_PTO;
        conn.repeat_at = now + conn.pto;
        conn.hello = Reliable::Sent;
        if conn.attempt.is_some() {
            conn.finish = Reliable::Sent;
        }
        conn.send_unacknowledged(key, &mut self.out);
    }

    fn on_frame(&mut self, key: ConnKey, frame: Frame, now: Instant) {
        let Some(conn) = self.conns.get_mut(&key) else {
            return;
        };
        match frame {
            Frame::Finish => {
                if !conn.open {
                    self.handshake_done(key, Direction::Inbound, now);
                }
                self.send_frame(
                    key,
                    Frame::Ack {
                        finish: true,
                        hello: false,
                    },
                );
            }
            // Before the finish it cannot be read; its sender repeats it.
            Frame::Hello if !conn.open => {}
            Frame::Hello => {
                self.send_frame(
                    key,
                    Frame::Ack {
                        finish: true,
                        hello: true,
                    },
                );
                if let Some(peers) = &mut self.peers {
                    peers.hello_received(key, now);
                }
            }
            Frame::Ack { finish, hello } => {
                for (acknowledged, state) in [(finish, &mut conn.finish), (hello, &mut conn.hello)]
                {
                    if acknowledged && *state == Reliable::Sent {
                        *state = Reliable::Acknowledged;
                    }
                }
            }
            Frame::Probe(sequence) => self.send_frame(key, Frame::ProbeReply(sequence)),
            Frame::ProbeReply(sequence) => {
                conn.health.reply_received(sequence, now);
            }
        }
    }

    /// Does what the machine says until it has no more to say.
    fn drain(&mut self, now: Instant) {
        while let Some(action) = self.peers.as_mut().and_then(Peers::poll_action) {
            match action {
                Action::Dial {
                    peer,
                    address,
                    attempt,
                } => {
                    let to = endpoint_of(address);
                    let client = self.add_conn(to, None, peer, Some(attempt), now);
                    self.out.push((to, Packet::Initial { client }));
                }
                Action::Abandon { attempt } => {
                    self.conns.retain(|_, conn| conn.attempt != Some(attempt));
                }
                Action::RequestDial { peer, address } => {
                    let datagram = DialRequest {
                        sender: self.id,
                        target: peer,
                    }
                    .encode(0);
                    self.out
                        .push((endpoint_of(address), Packet::DialRequest { datagram }));
                }
                Action::Verify { conn: key } => {
                    if let Some(conn) = self.conns.get_mut(&key) {
                        conn.health.probe_now();
                        conn.send_probes(key, now, &mut self.out);
                    }
                }
                Action::Up { peer, conn, number } => self.note_up(peer, conn, number),
                Action::Down { peer, number } => {
                    let up = self.ups.remove(&peer);
                    assert_eq!(up.map(|(_, n)| n), Some(number), "down without its up");
                }
                Action::Drain { conn } => {
                    assert!(self.conns.contains_key(&conn), "drains what is gone");
                }
                Action::Close { conn, reason } => {
                    self.close(conn, reason == CloseReason::NotAMember);
                }
            }
        }
    }

    fn note_up(&mut self, peer: NodeId, conn: ConnKey, number: ConnectionNumber) {
        assert!(
            self.topology.member(&peer).is_some(),
            "connected to a non-member"
        );
        assert_eq!(self.conns.get(&conn).map(|conn| conn.peer), Some(peer));
        let before = self.ups.insert(peer, (conn, number));
        assert!(
            before.is_none_or(|(_, before)| before < number),
            "numbers must rise"
        );
    }

    /// The connection has ended by itself.
    fn end(&mut self, key: ConnKey, kind: CloseKind, now: Instant) {
        let Some(conn) = self.conns.remove(&key) else {
            return;
        };
        let Some(peers) = &mut self.peers else { return };
        match conn.attempt {
            Some(attempt) if !conn.open => peers.dial_failed(attempt, now),
            _ => peers.closed(key, kind, now),
        }
        self.drain(now);
    }

    fn close(&mut self, key: ConnKey, refused: bool) {
        if let Some(Conn {
            remote,
            remote_key: Some(to),
            ..
        }) = self.conns.remove(&key)
        {
            self.out.push((remote, Packet::Close { to, refused }));
        }
    }

    fn send_frame(&mut self, key: ConnKey, frame: Frame) {
        if let Some(Conn {
            remote,
            remote_key: Some(to),
            ..
        }) = self.conns.get(&key)
        {
            self.out.push((
                *remote,
                Packet::Data {
                    to: *to,
                    from: key,
                    frame,
                },
            ));
        }
    }

    fn add_conn(
        &mut self,
        remote: Endpoint,
        remote_key: Option<ConnKey>,
        peer: NodeId,
        attempt: Option<Attempt>,
        now: Instant,
    ) -> ConnKey {
        self.conns_made += 1;
        let key = ConnKey(u64::from(self.endpoint.0) << 48 | self.conns_made);
        let conn = Conn {
            remote,
            remote_key,
            peer,
            attempt,
            open: false,
            finish: Reliable::Unsent,
            hello: Reliable::Unsent,
            pto: INITIAL_PTO,
            repeat_at: now + INITIAL_PTO,
            heard_at: now,
            health: Health::new(self.health, now),
        };
        self.conns.insert(key, conn);
        key
    }

    /// What must hold after every step.
    pub(crate) fn check(&self) {
        let Some(peers) = &self.peers else { return };
        let current: BTreeMap<_, _> = peers
            .iter()
            .filter_map(|(id, current)| Some((id, current?)))
            .collect();
        assert_eq!(current, self.ups, "the machine and its actions disagree");
        for (peer, (conn, _)) in &current {
            assert!(
                self.topology.member(peer).is_some(),
                "connected to a non-member"
            );
            assert!(
                self.conns.contains_key(conn),
                "the current connection is gone"
            );
        }
    }
}

/// Node `n` listens at 10.0.0.0 + n.
pub(crate) fn address_of(n: u32) -> std::net::SocketAddr {
    let ip = std::net::Ipv4Addr::from_bits(0x0a00_0000 + n);
    (ip, PORT).into()
}

fn endpoint_of(address: std::net::SocketAddr) -> Endpoint {
    match address {
        std::net::SocketAddr::V4(v4) => Endpoint(v4.ip().to_bits() - 0x0a00_0000),
        std::net::SocketAddr::V6(_) => panic!("the simulator gives out no such address"),
    }
}
