//! What leaves: the packets of connections, and datagrams outside of them.

use millrace_transport::CloseCode;
use millrace_transport::carrier::Progress;
use millrace_transport::counters::Counter;
use millrace_transport::driver::{Phase, Session, linger};

use super::Running;
use crate::memnet::MemNet;
use crate::quic::packet::Packet;
use crate::wire::room;

impl Running {
    pub(in crate::node) fn flush(&mut self, net: &mut MemNet<Packet>) -> bool {
        let mut any = !self.out.is_empty();
        for (to, packet) in std::mem::take(&mut self.out) {
            let bytes = packet.wire_bytes();
            // What the network drops it counts itself; here and below.
            let _ = net.send(self.endpoint, to, packet, bytes, self.now);
        }
        while let Some(slot) = self.state.next_dirty() {
            any = true;
            self.flush_connection(slot, net);
        }
        any
    }

    fn flush_connection(&mut self, slot: usize, net: &mut MemNet<Packet>) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        connection.is_dirty = false;
        if matches!(connection.phase, Phase::Draining { .. })
            && connection.session.as_ref().is_none_or(Session::is_idle)
        {
            let time = match &connection.session {
                Some(session) => session.linger(&connection.quic),
                None => linger(&connection.quic),
            };
            connection.phase.linger(now + time);
        }
        let mut is_more_waiting = false;
        if let Some(session) = &mut connection.session
            && connection.phase != Phase::Closing
        {
            let moved = session.poll_transmit(&mut connection.quic);
            is_more_waiting = moved.progress == Progress::More;
            if moved.is_stopped {
                connection.phase = Phase::Closing;
                connection.quic.close(CloseCode::Violation as u64);
            }
        }
        let (from, to) = (self.endpoint, connection.remote);
        let mut packets = 0;
        loop {
            let room = room(net, from, to, now);
            let Some(packet) = connection.quic.poll_transmit(now, room.bytes > 0) else {
                let is_blocked = room.bytes == 0 && connection.quic.wants_to_send();
                connection.room_at = is_blocked.then_some(room.again_at);
                break;
            };
            let bytes = packet.wire_bytes();
            let _ = net.send(from, to, packet, bytes, now);
            packets += 1;
        }
        self.state.counters().add(Counter::PacketsSent, packets);
        if connection.quic.end().is_some() {
            self.remove(slot);
            return;
        }
        if is_more_waiting {
            self.mark_dirty(slot);
        }
        self.arm(slot);
    }
}
