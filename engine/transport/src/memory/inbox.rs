//! What arrives on one connection of the memory network: packets of frames, and messages in pieces.
//!
//! Invariants
//! 1. Nothing is reserved for a body before its header was checked and the budget agreed; a refused
//!    message is stopped, and its later pieces are not kept.
//! 2. A packet and a message are handed over once, whatever the network duplicates or repeats.
//! 3. What a message holds is its own: whatever ends it gives that back, by dropping it.

use std::collections::{BTreeMap, BTreeSet};

use millrace_protocol::frame::{Carriage, Header, LaneParser, Limits};
use millrace_protocol::id::NodeId;
use millrace_shards::chunk::{BodyMut, Charge};

use super::packet::{Content, MemoryLink, PIECE_BYTES, Piece, piece_count};
use crate::allocator::{BodyAllocator, Space};
use crate::inbox::{Arrivals, StreamFault};
use crate::service::message::InboundBody;

/// Packets of frames that may be overtaken; one that comes later still is taken for a duplicate.
const OVERTAKEN_MAX: usize = 4_096;

/// Space for the bodies of one peer.
pub(super) struct PeerBodies<'a> {
    pub(super) bodies: &'a mut BodyAllocator,
    pub(super) peer: NodeId,
}

#[derive(Debug)]
enum Body {
    Small { bytes: Vec<u8>, _charge: Charge },
    Large(BodyMut),
}

#[derive(Debug)]
struct Incoming {
    header: Header,
    body: Body,
    has: Vec<bool>,
    missing: u32,
    /// Bytes since progress was last judged.
    progress_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Whole,
    Stopped,
}

/// The incoming side of a connection.
#[derive(Debug)]
pub(super) struct MemoryInbox {
    limits: Limits,
    parser: LaneParser,
    /// Packets of frames that arrived: all below `seen_below`, and these.
    seen_below: u64,
    seen: BTreeSet<u64>,
    /// Bounded by what the sender's carrier has open at a time.
    unfinished: BTreeMap<u64, Incoming>,
    /// How transfers ended that the sender may not know about.
    ended: BTreeMap<u64, Ended>,
}

impl MemoryInbox {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            parser: LaneParser::new(limits),
            seen_below: 0,
            seen: BTreeSet::new(),
            unfinished: BTreeMap::new(),
            ended: BTreeMap::new(),
        }
    }

    /// Messages that have begun and not ended.
    pub(super) fn unfinished(&self) -> usize {
        self.unfinished.len()
    }

    /// Hands over the frames of a packet, if it is the first of its number.
    pub(super) fn on_frames(
        &mut self,
        sequence: u64,
        frames: &[u8],
        arrivals: &mut impl Arrivals,
    ) -> Result<(), StreamFault> {
        if sequence < self.seen_below || !self.seen.insert(sequence) {
            return Ok(());
        }
        while self.seen.remove(&self.seen_below) {
            self.seen_below += 1;
        }
        if self.seen.len() > OVERTAKEN_MAX
            && let Some(first) = self.seen.pop_first()
        {
            self.seen_below = first + 1;
        }
        self.parser
            .push(frames, &mut |header, body| {
                arrivals.on_frame(header, body);
            })
            .map_err(StreamFault::Frame)
    }

    /// Puts a piece into its place, and hands over the message that it completes.
    pub(super) fn on_piece(
        &mut self,
        piece: &Piece,
        bodies: &mut PeerBodies<'_>,
        link: &mut MemoryLink,
        arrivals: &mut impl Arrivals,
    ) -> Result<(), (StreamFault, Option<Header>)> {
        let Piece {
            transfer,
            oldest,
            header,
            index,
            sent_at,
            ..
        } = *piece;
        self.ended = self.ended.split_off(&oldest);
        let ack = Content::Ack {
            transfer,
            index,
            sent_at,
        };
        match self.ended.get(&transfer) {
            Some(Ended::Whole) => {
                link.push(ack);
                return Ok(());
            }
            Some(Ended::Stopped) => {
                link.push(Content::Stop { transfer });
                return Ok(());
            }
            None if transfer < oldest => return Ok(()),
            None => {}
        }
        let result = self.put(piece, bodies);
        match result {
            Ok(is_whole) => {
                link.push(ack);
                if is_whole && let Some(incoming) = self.unfinished.remove(&transfer) {
                    self.ended.insert(transfer, Ended::Whole);
                    incoming.hand_over(arrivals);
                }
                Ok(())
            }
            Err(fault) => {
                self.stop(transfer, link);
                Err((fault, Some(header)))
            }
        }
    }

    /// The sender takes a message back that is not whole. True when it had begun here.
    pub(super) fn on_reset(&mut self, transfer: u64, link: &mut MemoryLink) -> Option<Header> {
        let header = self
            .unfinished
            .get(&transfer)
            .map(|incoming| incoming.header);
        self.stop(transfer, link);
        header
    }

    /// Cuts every unfinished message that brought less than `progress_bytes` since the last call.
    pub(super) fn cut_stalled(
        &mut self,
        progress_bytes: u64,
        link: &mut MemoryLink,
        cut: &mut impl FnMut(Header),
    ) {
        let mut stalled = Vec::new();
        for (transfer, incoming) in &mut self.unfinished {
            if std::mem::take(&mut incoming.progress_bytes) < progress_bytes {
                stalled.push((*transfer, incoming.header));
            }
        }
        for (transfer, header) in stalled {
            self.stop(transfer, link);
            cut(header);
        }
    }

    fn stop(&mut self, transfer: u64, link: &mut MemoryLink) {
        self.unfinished.remove(&transfer);
        self.ended.entry(transfer).or_insert(Ended::Stopped);
        link.push(Content::Stop { transfer });
    }

    /// True when the message is whole now.
    fn put(&mut self, piece: &Piece, bodies: &mut PeerBodies<'_>) -> Result<bool, StreamFault> {
        let incoming = match self.unfinished.entry(piece.transfer) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                piece
                    .header
                    .check(Carriage::Stream, &self.limits)
                    .map_err(StreamFault::Frame)?;
                entry.insert(Incoming::open(piece.header, bodies)?)
            }
        };
        incoming.put(piece.index, piece.bytes.as_ref())?;
        Ok(incoming.missing == 0)
    }
}

impl Incoming {
    fn open(header: Header, bodies: &mut PeerBodies<'_>) -> Result<Self, StreamFault> {
        let space = bodies.bodies.allocate(bodies.peer, header.body_bytes);
        let body = match space.map_err(StreamFault::Refused)? {
            Space::Inline(mut bytes, charge) => {
                bytes.resize(header.body_bytes as usize, 0);
                Body::Small {
                    bytes,
                    _charge: charge,
                }
            }
            Space::Chunks(body) => Body::Large(body),
        };
        let pieces = piece_count(&header);
        Ok(Self {
            header,
            body,
            has: vec![false; pieces as usize],
            missing: pieces,
            // What a message brings in its first interval counts: it is judged from the next.
            progress_bytes: u64::MAX / 2,
        })
    }

    fn put(&mut self, index: u32, bytes: &[u8]) -> Result<(), StreamFault> {
        let has = self.has.get_mut(index as usize).ok_or(StreamFault::Long)?;
        if std::mem::replace(has, true) {
            return Ok(());
        }
        let offset = index as usize * PIECE_BYTES;
        match &mut self.body {
            Body::Small { bytes: body, .. } => {
                let place = body
                    .get_mut(offset..offset + bytes.len())
                    .ok_or(StreamFault::Long)?;
                place.copy_from_slice(bytes);
            }
            Body::Large(body) => body
                .write_at(offset, bytes)
                .map_err(|_| StreamFault::Long)?,
        }
        self.missing -= 1;
        self.progress_bytes = self.progress_bytes.saturating_add(bytes.len() as u64);
        Ok(())
    }

    fn hand_over(self, arrivals: &mut impl Arrivals) {
        match self.body {
            Body::Small { bytes, .. } => arrivals.on_frame(self.header, &bytes),
            Body::Large(body) => {
                arrivals.on_message(self.header, InboundBody::Chunks(body.freeze()));
            }
        }
    }
}
