//! After the packets of one receive completion: everything they made possible.

use std::time::Instant;

use millrace_protocol::knock::Knock;

use super::{Endpoint, PeerRoom};
use crate::connection::{Events, Phase};
use crate::counters::Counter;
use crate::message::Handler;
use crate::quic::CloseCode;

impl<H: Handler> Endpoint<H> {
    /// After the packets of one receive completion: everything they made possible.
    pub(super) fn on_packets(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        if matches!(connection.phase, Phase::Handshake { .. }) && connection.quic.is_established() {
            self.on_established(slot, now);
        }
        self.notice_life(slot, now);
        self.follow_peer(slot, now);
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        if let Some(peer) = connection.peer() {
            let mut events = Events::default();
            let mut room = PeerRoom {
                budget: &mut self.parts.budget,
                pool: &self.parts.pool,
                peer,
            };
            connection.read(
                &mut self.handler,
                &mut self.scratch,
                &mut room,
                now,
                &mut events,
            );
            for reservation in events.reservations.drain(..) {
                self.parts.budget.release(reservation);
            }
            let opened = connection.inbox.take_opened();
            if opened > 0 {
                self.parts.shared.counters.add(Counter::StreamsIn, opened);
                if connection.judge_at.is_none() && connection.inbox.unfinished() > 0 {
                    connection.judge_at =
                        Some(now + self.parts.shared.config.stream_progress_interval);
                }
            }
            if let Some(health) = &mut connection.health {
                for sequence in events.probe_replies.drain(..) {
                    health.reply_received(sequence, now);
                }
            }
            if events.fault.is_some() {
                self.close(slot, CloseCode::Violation);
            }
        }
        self.mark_received(slot);
    }

    /// Brings a connection up when the peer's first bytes are there, before they are read; and takes a packet for the sign of life
    /// that a knock made us ask for.
    pub(super) fn notice_life(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let key = connection.key;
        let peers = self.parts.peers.get_mut(connection.index);
        if connection.phase == Phase::AwaitHello
            && (connection.quic.is_readable() || connection.quic.dgram_recv_queue_len() > 0)
        {
            if let Some(peers) = peers {
                peers.hello_received(key, now);
            }
            self.run_actions(now);
        } else if connection
            .verify_from
            .is_some_and(|seen| connection.quic.stats().recv > seen)
        {
            connection.verify_from = None;
            if let Some(peers) = peers {
                peers.verified(key);
            }
        }
    }

    pub(super) fn on_knock(&mut self, knock: &Knock, now: Instant) {
        if knock.target == self.parts.me {
            for peers in &mut self.parts.peers {
                peers.knocked(knock.sender, now);
            }
            self.run_actions(now);
        }
    }
}
