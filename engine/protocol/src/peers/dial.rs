//! When to dial, when to request a dial, and when to give up.

use super::{
    Action, Attempt, CloseReason, ConnKey, Dial, DialRequest, NodeId, Peer, Peers, State, Timer,
};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Dial requests bring dials forward, but not to less than this after the last one.
const DIAL_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// An attempt of this age whose peer requests a dial has lost its packets. It begins again, because
/// QUIC retransmits only after 1, 3 and 7 s. The age doubles with each restart, so that a handshake
/// on a path with a longer round trip completes.
const ATTEMPT_PATIENCE: Duration = Duration::from_millis(250);
/// For this time an attempt holds one of [`super::PeersConfig::dials_max`]. One at a peer that is
/// down takes until `connect_timeout`, and must not keep those that are up waiting.
const DIAL_TURN: Duration = Duration::from_secs(2);

impl Peer {
    /// The next address of the topology, each in turn.
    fn next_listed(&mut self) -> Option<SocketAddr> {
        let count = self.addresses.len();
        let address = *self.addresses.get(self.next_address.checked_rem(count)?)?;
        self.next_address = (self.next_address + 1) % count;
        Some(address)
    }

    /// The next address to dial.
    fn next_to_dial(&mut self) -> Option<SocketAddr> {
        let candidate = self.candidate.next(!self.addresses.is_empty());
        candidate.or_else(|| self.next_listed())
    }
}

impl Peers {
    /// Handles a peer without a connection: dials it, or requests a dial and waits.
    pub(super) fn seek(&mut self, id: NodeId, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if peer.dial != Dial::Listening {
            return self.dial(id, now);
        }
        let delay = peer.backoff.next(&mut self.rng);
        self.set_peer_timer(id, now + delay);
    }

    /// Queues a peer for a dial. Every input ends with [`Self::dial_queued`].
    pub(super) fn dial(&mut self, id: NodeId, now: Instant) {
        self.queue(id, false, now);
    }

    fn queue(&mut self, id: NodeId, is_asked: bool, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.dial = Dial::Queued { is_asked };
            // By then an attempt that holds a turn now does not any more.
            self.set_peer_timer(id, now + DIAL_TURN);
        }
    }

    fn begin_dial(&mut self, id: NodeId, now: Instant) {
        match self.peers.get_mut(&id).and_then(Peer::next_to_dial) {
            Some(address) => self.dial_at(id, address, now),
            // It will be dialled when an address is known: by the topology, or by a request.
            None => self.wait(id, now),
        }
    }

    /// Whether one more attempt may begin.
    fn has_turn(&self, now: Instant) -> bool {
        let holds_turn = |peer: &&Peer| match peer.dial {
            Dial::Under { started, .. } => now < started + DIAL_TURN,
            _ => false,
        };
        self.peers.values().filter(holds_turn).count() < self.config.dials_max
    }

    /// Dials peers that are queued while there are turns, those that asked for it first. Each
    /// node begins with the id that follows its own, so that not all dial the same peer at once.
    pub(super) fn dial_queued(&mut self, now: Instant) {
        while self.has_turn(now) {
            let queued = |is_asked: bool| {
                let wanted = Dial::Queued { is_asked };
                let mut peers = self.peers.iter();
                peers
                    .find(|(_, peer)| peer.dial == wanted)
                    .map(|(id, _)| *id)
            };
            let Some(id) = queued(true).or_else(|| queued(false)) else {
                return;
            };
            self.begin_dial(id, now);
        }
    }

    fn dial_at(&mut self, id: NodeId, address: SocketAddr, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        self.attempts += 1;
        self.counters.dials += 1;
        let attempt = Attempt(self.attempts);
        peer.dialled = Some(address);
        peer.dial = Dial::Under {
            attempt,
            address,
            started: now,
        };
        peer.last_dial = Some(now);
        self.actions.push_back(Action::Dial {
            peer: id,
            address,
            attempt,
        });
        self.set_peer_timer(id, now + self.config.connect_timeout);
    }

    /// Dials the peer of the current connection `conn` while that goes on.
    pub(super) fn dial_replacement(&mut self, conn: ConnKey, now: Instant) -> bool {
        let Some(id) = self.peer_of(conn) else {
            return false;
        };
        let Some(peer) = self.peers.get_mut(&id) else {
            return false;
        };
        // One that drains carries a body: a second replacement would cut it.
        let is_free = peer.current == Some(conn)
            && peer.pending.is_none()
            && peer.draining.is_none()
            && peer.dial == Dial::Idle;
        // The address that was dialled last, not the one after it.
        let Some(address) = peer.dialled.filter(|_| is_free) else {
            return false;
        };
        self.dial_at(id, address, now);
        true
    }

    /// An attempt has failed.
    pub(super) fn redial_later(&mut self, id: NodeId, now: Instant) {
        self.counters.dials_failed += 1;
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.candidate.failed();
        }
        match self.peers.get_mut(&id) {
            // It was to replace a connection that works.
            Some(peer) if peer.current.is_some() => {
                peer.dial = Dial::Idle;
                self.stop_peer_timer(id);
            }
            _ => self.wait(id, now),
        }
    }

    /// Dials after the backoff.
    pub(super) fn wait(&mut self, id: NodeId, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let delay = peer.backoff.next(&mut self.rng);
        peer.dial = Dial::Waiting;
        self.set_peer_timer(id, now + delay);
    }

    pub(super) fn peer_timeout(&mut self, id: NodeId, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        peer.timer = None;
        match (peer.dial, peer.pending) {
            (Dial::Idle, _) => {}
            (Dial::Waiting, _) => self.dial(id, now),
            (Dial::Queued { is_asked }, _) => self.queue(id, is_asked, now),
            (Dial::Under { attempt, .. }, None) => {
                self.actions.push_back(Action::Abandon { attempt });
                self.redial_later(id, now);
            }
            (Dial::Under { .. }, Some(conn)) => {
                peer.pending = None;
                self.drop_connection(conn);
                self.actions.push_back(Action::Close {
                    conn,
                    reason: CloseReason::HelloTimeout,
                });
                self.redial_later(id, now);
            }
            (Dial::Listening, _) => {
                if let Some(address) = peer.next_listed() {
                    self.counters.dial_requests_sent += 1;
                    self.actions
                        .push_back(Action::RequestDial { peer: id, address });
                }
                self.seek(id, now);
            }
        }
    }

    pub(super) fn heed_dial_request(
        &mut self,
        request: &DialRequest,
        from: SocketAddr,
        wall_ms: u64,
        now: Instant,
    ) {
        let id = request.sender;
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let dials_listed = !peer.candidate.is_dialled();
        let has_moved = peer.candidate.hear(from, request.sent_ms, wall_ms, now);
        match peer.dial {
            Dial::Listening => {}
            Dial::Idle => {
                let has_begun = self.verify_current(id, now);
                self.counters.dial_requests_heeded += u64::from(has_begun);
            }
            Dial::Waiting => {
                self.counters.dial_requests_heeded += 1;
                match peer.last_dial {
                    Some(last) if now < last + DIAL_INTERVAL_MIN => {
                        self.set_peer_timer(id, last + DIAL_INTERVAL_MIN);
                    }
                    _ => self.queue(id, true, now),
                }
            }
            Dial::Queued { .. } => peer.dial = Dial::Queued { is_asked: true },
            Dial::Under {
                attempt,
                address,
                started,
            } => {
                // The peer is elsewhere. An attempt of a candidate is left its time, so that a peer
                // whose address keeps changing gets through.
                let patience = if has_moved && dials_listed && from != address {
                    DIAL_INTERVAL_MIN
                } else {
                    ATTEMPT_PATIENCE.saturating_mul(1 << peer.dial_request_restarts.min(10))
                };
                if peer.pending.is_some() || now < started + patience {
                    return;
                }
                peer.dial_request_restarts += 1;
                self.counters.dial_requests_heeded += 1;
                self.counters.dials_failed += 1;
                self.actions.push_back(Action::Abandon { attempt });
                self.queue(id, true, now);
            }
        }
    }

    /// Handles a dial request of a connected peer, or a connection from another address: the peer
    /// may have restarted, or moved. Whether the current connection is asked for a sign of life.
    pub(super) fn verify_current(&mut self, id: NodeId, now: Instant) -> bool {
        let current = self.peers.get(&id).and_then(|peer| peer.current);
        let Some(conn) = current else { return false };
        let Some(connection) = self.connections.get_mut(&conn) else {
            return false;
        };
        let State::Up { since, .. } = connection.state else {
            return false;
        };
        // A dial request that was sent before the connection came up says nothing about it.
        if connection.verifying || now < since + DIAL_INTERVAL_MIN {
            return false;
        }
        connection.verifying = true;
        self.actions.push_back(Action::Verify { conn });
        self.set_connection_timer(conn, now + self.config.verify_timeout);
        true
    }

    pub(super) fn addresses_changed(&mut self, id: NodeId, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if peer.current.is_some() || peer.pending.is_some() || peer.dial == Dial::Listening {
            return;
        }
        peer.backoff.reset();
        if let Some(attempt) = peer.dial.attempt() {
            self.counters.dials_failed += 1;
            self.actions.push_back(Action::Abandon { attempt });
        }
        self.dial(id, now);
    }

    fn set_peer_timer(&mut self, id: NodeId, at: Instant) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.timer = Some(self.timers.replace(peer.timer, Timer::Peer(id), at));
        }
    }

    pub(super) fn stop_peer_timer(&mut self, id: NodeId) {
        if let Some(timer) = self.peers.get_mut(&id).and_then(|peer| peer.timer.take()) {
            self.timers.cancel(timer);
        }
    }
}
