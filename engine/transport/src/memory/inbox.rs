//! What arrives on one connection of the memory network: packets of frames, and messages in pieces.
//!
//! Invariants
//! 1. Nothing is reserved for a body before its header was checked and the budget agreed; a refused
//!    message is stopped, and its later pieces are not kept.
//! 2. A packet and a message are handed over once, whatever the network duplicates or repeats.
//! 3. Whatever ends a message gives its reservation back.

use std::collections::{BTreeMap, BTreeSet};

use millrace_protocol::budget::{ReceiveBudget, Reservation};
use millrace_protocol::frame::{Carriage, Header, LaneParser, Limits};
use millrace_protocol::id::NodeId;
use millrace_shards::chunk::{BodyMut, ChunkPool};

use super::packet::{Content, MemoryLink, PIECE_BYTES, Piece, piece_count};
use crate::inbox::{Arrived, INLINE_BYTES_MAX, StreamFault};

/// Packets of frames that may be overtaken; one that comes later still is taken for a duplicate.
const OVERTAKEN_MAX: usize = 4_096;

/// Room for the bodies of one peer.
pub(super) struct Room<'a> {
    pub(super) budget: &'a mut ReceiveBudget,
    pub(super) pool: &'a ChunkPool,
    pub(super) peer: NodeId,
}

#[derive(Debug)]
enum Body {
    Small(Vec<u8>),
    Large(BodyMut),
}

#[derive(Debug)]
struct Incoming {
    header: Header,
    body: Body,
    reservation: Reservation,
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
        arrived: &mut impl FnMut(Arrived<'_>),
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
                arrived(Arrived::Frame(header, body));
            })
            .map_err(StreamFault::Frame)
    }

    /// Puts a piece into its place, and hands over the message that it completes.
    pub(super) fn on_piece(
        &mut self,
        piece: &Piece,
        room: &mut Room<'_>,
        link: &mut MemoryLink,
        arrived: &mut impl FnMut(Arrived<'_>),
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
        let result = self.put(piece, room);
        match result {
            Ok(is_whole) => {
                link.push(ack);
                if is_whole && let Some(incoming) = self.unfinished.remove(&transfer) {
                    self.ended.insert(transfer, Ended::Whole);
                    incoming.hand_over(room, arrived);
                }
                Ok(())
            }
            Err(fault) => {
                self.stop(transfer, room, link);
                Err((fault, Some(header)))
            }
        }
    }

    /// The sender takes a message back that is not whole. True when it had begun here.
    pub(super) fn on_reset(
        &mut self,
        transfer: u64,
        room: &mut Room<'_>,
        link: &mut MemoryLink,
    ) -> Option<Header> {
        let header = self
            .unfinished
            .get(&transfer)
            .map(|incoming| incoming.header);
        self.stop(transfer, room, link);
        header
    }

    /// Cuts every unfinished message that brought less than `progress_bytes` since the last call.
    pub(super) fn cut_stalled(
        &mut self,
        progress_bytes: u64,
        room: &mut Room<'_>,
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
            self.stop(transfer, room, link);
            cut(header);
        }
    }

    /// Gives back all that is held: the connection is gone.
    pub(super) fn clear(&mut self, budget: &mut ReceiveBudget) {
        for (_, incoming) in std::mem::take(&mut self.unfinished) {
            budget.release(incoming.reservation);
        }
    }

    fn stop(&mut self, transfer: u64, room: &mut Room<'_>, link: &mut MemoryLink) {
        if let Some(incoming) = self.unfinished.remove(&transfer) {
            room.budget.release(incoming.reservation);
        }
        self.ended.entry(transfer).or_insert(Ended::Stopped);
        link.push(Content::Stop { transfer });
    }

    /// True when the message is whole now.
    fn put(&mut self, piece: &Piece, room: &mut Room<'_>) -> Result<bool, StreamFault> {
        let incoming = match self.unfinished.entry(piece.transfer) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                piece
                    .header
                    .check(Carriage::Stream, &self.limits)
                    .map_err(StreamFault::Frame)?;
                entry.insert(Incoming::open(piece.header, room)?)
            }
        };
        incoming.put(piece.index, piece.bytes.as_ref())?;
        Ok(incoming.missing == 0)
    }
}

impl Incoming {
    fn open(header: Header, room: &mut Room<'_>) -> Result<Self, StreamFault> {
        let len = header.body_bytes as usize;
        let reserved = room.budget.try_reserve(room.peer, len as u64);
        let Ok(reservation) = reserved else {
            return Err(StreamFault::NoRoom);
        };
        let body = if len <= INLINE_BYTES_MAX {
            Body::Small(vec![0; len])
        } else {
            match BodyMut::with_len(room.pool, len) {
                Some(body) => Body::Large(body),
                None => {
                    room.budget.release(reservation);
                    return Err(StreamFault::NoRoom);
                }
            }
        };
        let pieces = piece_count(&header);
        Ok(Self {
            header,
            body,
            reservation,
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
            Body::Small(body) => {
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

    fn hand_over(self, room: &mut Room<'_>, arrived: &mut impl FnMut(Arrived<'_>)) {
        match self.body {
            Body::Small(body) => {
                arrived(Arrived::Frame(self.header, &body));
                room.budget.release(self.reservation);
            }
            Body::Large(body) => {
                arrived(Arrived::Message(
                    self.header,
                    body.freeze(),
                    self.reservation,
                ));
            }
        }
    }
}
