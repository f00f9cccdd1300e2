//! What crosses the memory network between two nodes, and the outgoing side of a connection.

use std::time::Instant;

use bytes::Bytes;
use millrace_protocol::frame::Header;

use crate::buffers::StreamBuffer;

/// Bytes of a body in a packet; a chunk is a whole number of pieces.
pub(super) const PIECE_BYTES: usize = 16 << 10;
/// Bytes that a connection lets wait for a link's capacity, one train: what bulk may delay latency
/// by. A link with a capacity must let a packet wait, [`PIECE_BYTES`] and two headers.
pub(super) const TRAIN_BYTES: u64 = 64 << 10;
/// What a packet without a body counts for on a link: IP, UDP and a short QUIC header.
const OVERHEAD_BYTES: usize = 48;

/// A packet between two nodes.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    /// The connection: the number of the attempt that opened it, larger is later.
    pub(super) attempt: u64,
    pub(super) content: Content,
}

#[derive(Clone, Debug)]
pub(super) enum Content {
    /// The dialler wants a connection; repeated until it hears.
    Open,
    /// The other side has it.
    Accept,
    /// Are you there?
    Ping,
    Pong,
    /// The sender has no such connection.
    Gone,
    /// Whole frames of a lane; lost when dropped, known again by their number.
    Frames {
        sequence: u64,
        frames: Bytes,
    },
    /// A part of a message; repeated until acknowledged.
    Piece(Piece),
    /// A piece arrived; `sent_at` is the piece's.
    Ack {
        transfer: u64,
        index: u32,
        sent_at: Instant,
    },
    /// The receiver wants no more of this message.
    Stop {
        transfer: u64,
    },
    /// The sender takes an unfinished message back; repeated until stopped.
    Reset {
        transfer: u64,
    },
}

#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) transfer: u64,
    /// No earlier transfer is open: the receiver may forget how they ended.
    pub(super) oldest: u64,
    pub(super) header: Header,
    pub(super) index: u32,
    pub(super) sent_at: Instant,
    pub(super) bytes: StreamBuffer,
}

impl Content {
    /// What it counts for on a link.
    pub(super) fn wire_bytes(&self) -> u64 {
        let body = match self {
            Self::Frames { frames, .. } => frames.len(),
            Self::Piece(piece) => Header::BYTES + piece.bytes.as_ref().len(),
            _ => 0,
        };
        (OVERHEAD_BYTES + body) as u64
    }
}

/// Pieces of a body.
pub(super) fn piece_count(header: &Header) -> u32 {
    (header.body_bytes as usize).div_ceil(PIECE_BYTES).max(1) as u32
}

/// The outgoing side of a connection: packets made in this turn, as many as the link has room for.
#[derive(Debug)]
pub(crate) struct MemoryLink {
    now: Instant,
    room_bytes: u64,
    is_blocked: bool,
    /// Lane frames are gathered into packets up to this.
    packet_bytes: usize,
    next_sequence: u64,
    packets: Vec<Content>,
}

impl MemoryLink {
    pub(super) fn new(now: Instant, packet_bytes: usize) -> Self {
        Self {
            now,
            room_bytes: 0,
            is_blocked: false,
            packet_bytes,
            next_sequence: 0,
            packets: Vec::new(),
        }
    }

    /// Starts a turn.
    pub(super) fn begin(&mut self, now: Instant, room_bytes: u64) {
        self.now = now;
        self.room_bytes = room_bytes;
        self.is_blocked = false;
    }

    pub(super) fn now(&self) -> Instant {
        self.now
    }

    /// Whether something waits that the link had no room for.
    pub(super) fn is_blocked(&self) -> bool {
        self.is_blocked
    }

    /// To be asked by who has something to send.
    pub(super) fn has_room(&mut self) -> bool {
        self.is_blocked |= self.room_bytes == 0;
        self.room_bytes > 0
    }

    /// Sends a packet, whether there is room or not.
    pub(super) fn push(&mut self, content: Content) {
        self.room_bytes = self.room_bytes.saturating_sub(content.wire_bytes());
        self.packets.push(content);
    }

    /// Sends frames while there is room; returns the bytes taken. No frame is torn.
    pub(crate) fn push_frames(&mut self, frames: &mut Bytes) -> usize {
        let before = frames.len();
        while !frames.is_empty() && self.has_room() {
            let packet = frames.split_to(whole_frames(frames, self.packet_bytes));
            let sequence = self.next_sequence;
            self.next_sequence += 1;
            self.push(Content::Frames {
                sequence,
                frames: packet,
            });
        }
        before - frames.len()
    }

    /// The packets made.
    pub(super) fn take(&mut self) -> Vec<Content> {
        std::mem::take(&mut self.packets)
    }
}

/// Bytes of the first frames that fit `max_bytes` together; one frame at least.
fn whole_frames(frames: &[u8], max_bytes: usize) -> usize {
    let mut end = 0;
    while let Some(header) = frames[end..].first_chunk() {
        let body_bytes = Header::decode(header).map_or(0, |header| header.body_bytes as usize);
        let next = end + Header::BYTES + body_bytes;
        if next > frames.len() || (end > 0 && next > max_bytes) {
            break;
        }
        end = next;
    }
    if end == 0 { frames.len() } else { end }
}
