//! Ends connections that make quiche hold more than they may.
//!
//! Invariants
//! 1. `heap_bytes` is the sum over the connections, as it was when packets last came for each.
//! 2. An honest peer never reaches the limit of its connection: what is lost and sent again leaves
//!    gaps of at most a window, and full packets cost quiche 1.2 times their bytes.
//! 3. A peer whose own connection is ended is refused for a while, as after a flood: otherwise it
//!    would begin anew at once.
//! 4. Where all of them together hold too much, the one that holds most is ended: a peer that holds
//!    little never pays for another.

use std::time::Instant;

use super::Endpoint;
use crate::connection::Connection;
use crate::phase::Phase;
use crate::quic::CloseCode;

/// What a connection may hold whose peer TLS does not know yet: several times what a handshake
/// needs. Its peer may send 64 KiB of CRYPTO frames in single bytes.
const HANDSHAKE_HEAP_BYTES_MAX: u64 = 256 << 10;

/// Room beside two windows: IDs, ranges of acknowledgements, and the connection itself.
const FIXED_HEAP_BYTES_MAX: u64 = 1 << 20;

/// What the packets of a peer may make a connection hold beyond what they pay for, beside a quarter
/// of its window: 28,000 bytes that come in frames of their own. A node's packets pay for what they
/// bring; an acknowledgement of a whole window makes quiche's recovery grow by 128 bytes for each
/// packet of it, a tenth of the window, and twice that where as many were lost.
const EXCESS_HEAP_BYTES_MAX: u64 = 4 << 20;

/// A fourth is added to the bytes that are counted: the allocator rounds blocks up, and has pages
/// that are not full. 17 % more were measured, with blocks of 550 bytes.
const ALLOCATOR_PART: u64 = 4;

impl Endpoint {
    /// After packets: brings the account of a connection up to date.
    pub(super) fn settle_heap(&mut self, slot: usize, now: Instant) {
        let config = &self.parts.state.config;
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        if connection.phase == Phase::Closing {
            return;
        }
        let holds = connection.quic.heap_bytes();
        self.heap_bytes = self.heap_bytes - connection.heap_bytes + holds;
        connection.heap_bytes = holds;
        let window = config.profile(connection.profile).connection_window_bytes;
        let limit = if connection.session.is_none() {
            HANDSHAKE_HEAP_BYTES_MAX
        } else {
            2 * window + FIXED_HEAP_BYTES_MAX
        };
        if connection.quic.heap_excess_bytes() > EXCESS_HEAP_BYTES_MAX + window / 4 {
            self.penalize_for_heap(slot, now);
            self.end_for_heap(slot, "much more than they bring");
        } else if holds > limit {
            self.penalize_for_heap(slot, now);
            self.end_for_heap(slot, "more than twice its window");
        } else if self.heap_bytes + self.heap_bytes / ALLOCATOR_PART > config.quic_heap_bytes_max
            && let Some(greatest) = self.holds_most()
        {
            self.end_for_heap(greatest, "most of all, and all of them too much");
        }
    }

    /// A connection has gone: with it goes what it held.
    pub(super) fn drop_heap(&mut self, connection: &Connection) {
        self.heap_bytes -= connection.heap_bytes;
    }

    fn holds_most(&self) -> Option<usize> {
        let slots = self.connections.iter().enumerate();
        let open = slots.filter_map(|(slot, connection)| {
            let connection = connection.as_deref()?;
            (connection.phase != Phase::Closing).then_some((slot, connection.heap_bytes))
        });
        open.max_by_key(|(_, holds)| *holds).map(|(slot, _)| slot)
    }

    fn penalize_for_heap(&mut self, slot: usize, now: Instant) {
        let connection = self.connections.get(slot).and_then(Option::as_ref);
        if let Some(session) = connection.and_then(|connection| connection.session.as_ref()) {
            self.penalties.cut(session.peer(), now);
        }
    }

    fn end_for_heap(&mut self, slot: usize, why: &str) {
        if let Some(Some(connection)) = self.connections.get_mut(slot) {
            // It is given back within the turn, when the closing frame is out.
            let holds = std::mem::take(&mut connection.heap_bytes);
            self.heap_bytes -= holds;
            let peer = connection.session.as_ref().map(|session| session.peer());
            tracing::warn!(
                peer = peer.map(tracing::field::display),
                address = %connection.address.current(),
                bytes = holds,
                "a connection is closed: the packets of its peer make this node hold {why}"
            );
        }
        self.close(slot, CloseCode::ExcessiveLoad);
    }
}
