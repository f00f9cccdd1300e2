//! Ends connections whose peers flood them with work, and refuses their next ones for a while.
//!
//! A connection costs nothing for it but a counted datagram: quiche is asked for its numbers once
//! in [`PACKETS_PER_LOOK`].
//!
//! Invariant: what is cut was counted by its reason, has a log line that names the peer, unless one
//! of the same kind was written a moment ago, and is told to `status`.

use std::time::Instant;

use millrace_protocol::flood::Flood;

use super::Endpoint;
use crate::phase::Phase;
use crate::quic::CloseCode;

/// Packets of a connection between two looks at them: a fraction of a millisecond at the full rate
/// of a shard, and a small part of the allowance for packets that bring nothing.
const PACKETS_PER_LOOK: usize = 1_024;

impl Endpoint {
    /// After packets, or when a timer ran out: looks at the packets of a connection if that is due,
    /// and ends it if its peer floods it.
    pub(super) fn judge_flood(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let Some(session) = &mut connection.session else {
            return;
        };
        if connection.unjudged_packets >= PACKETS_PER_LOOK || connection.retired_ids > 0 {
            connection.unjudged_packets = 0;
            let mut packets = connection.quic.take_packet_counts();
            packets.retired_ids = std::mem::take(&mut connection.retired_ids);
            session.judge_packets(packets, now);
        }
        if let Some(flood) = session.flood()
            && connection.phase != Phase::Closing
        {
            self.end_for_flood(slot, flood, now);
        }
    }

    fn end_for_flood(&mut self, slot: usize, flood: Flood, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let Some(session) = &connection.session else {
            return;
        };
        connection.flood = Some(flood);
        let refused_for = self.penalties.cut(session.peer(), now);
        self.floods_cut += 1;
        if let Some(left_out) = self.log_limit.admit(flood.reason(), now) {
            tracing::warn!(
                peer = %session.peer(),
                address = %connection.address.current(),
                reason = flood.reason(),
                ?refused_for,
                left_out,
                "a connection is closed: its peer floods it, and is refused for a while"
            );
        }
        self.close(slot, CloseCode::Flood);
    }
}
