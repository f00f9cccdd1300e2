//! The memory carrier: messages in pieces, each repeated until the peer acknowledged it.
//!
//! Invariants
//! 1. Pieces are slices of the message's chunks; no byte is copied before the receiver's chunk.
//! 2. At most `active_max` messages of a class are being sent, in order of class, then age.
//! 3. First copies are made while less than a window is unacknowledged.
//! 4. Waiting plus unacknowledged messages of a class never exceed its bound.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use millrace_protocol::frame::{Class, Header};

use super::packet::{Content, MemoryLink, PIECE_BYTES, Piece, piece_count};
use crate::buffers::StreamBuffer;
use crate::carrier::{Outgoing, Progress, QueueFull};
use crate::config::{PerClass, TransportConfig};
use crate::service::message::Payload;

/// A piece is repeated no earlier than this after it was sent.
const REPEAT_AFTER_MIN: Duration = Duration::from_millis(25);
/// And after this while no round trip was measured.
const REPEAT_AFTER_FIRST: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Transfer {
    id: u64,
    message: Outgoing,
    /// The next piece that was never sent.
    next: u32,
    /// Pieces that are not acknowledged, and when to send them again.
    flights: BTreeMap<u32, Instant>,
}

impl Transfer {
    fn class(&self) -> Class {
        self.message.header.class
    }

    fn is_sent(&self) -> bool {
        self.next == piece_count(&self.message.header)
    }

    fn bytes(&self, index: u32) -> StreamBuffer {
        let offset = index as usize * PIECE_BYTES;
        let none = StreamBuffer::Small(Bytes::new());
        match &self.message.body {
            Payload::Empty => none,
            Payload::Bytes(bytes) => {
                StreamBuffer::Small(bytes.slice(offset..bytes.len().min(offset + PIECE_BYTES)))
            }
            Payload::Chunks(body) => body
                .slice_at(offset, PIECE_BYTES)
                .map_or(none, StreamBuffer::Chunk),
        }
    }

    fn piece(&self, index: u32, oldest: u64, sent_at: Instant) -> Content {
        let (transfer, header) = (self.id, self.message.header);
        Content::Piece(Piece {
            transfer,
            oldest,
            header,
            index,
            sent_at,
            bytes: self.bytes(index),
        })
    }
}

/// Outgoing messages of one connection of the memory network.
#[derive(Debug)]
pub(crate) struct MemoryCarrier {
    waiting: [VecDeque<Outgoing>; 3],
    /// Sent or being sent, not wholly acknowledged.
    transfers: Vec<Transfer>,
    /// Of them, by class: all, and those with a piece that was never sent.
    open_in: [usize; 3],
    sending_in: [usize; 3],
    /// Transfers taken back, until the peer knows; when to say it again.
    resets: BTreeMap<u64, Instant>,
    queue_max: PerClass<usize>,
    active_max: usize,
    window_pieces: usize,
    flights: usize,
    next_transfer: u64,
    /// No piece is to be repeated before.
    repeat_at: Option<Instant>,
    smoothed_rtt: Option<Duration>,
}

impl MemoryCarrier {
    pub(crate) fn new(config: &TransportConfig) -> Self {
        let window_pieces = config.connection_window_bytes as usize / PIECE_BYTES;
        Self {
            waiting: Default::default(),
            transfers: Vec::new(),
            open_in: [0; 3],
            sending_in: [0; 3],
            resets: BTreeMap::new(),
            queue_max: config.stream_queue_messages,
            active_max: config.streams_active_max,
            window_pieces: window_pieces.max(1),
            flights: 0,
            next_transfer: 0,
            repeat_at: None,
            smoothed_rtt: None,
        }
    }

    /// Whether nothing waits or flows.
    pub(crate) fn is_idle(&self) -> bool {
        self.transfers.is_empty() && self.waiting.iter().all(VecDeque::is_empty)
    }

    /// When something is to be repeated.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.repeat_at
            .into_iter()
            .chain(self.resets.values().copied())
            .min()
    }

    /// The peer has a piece.
    pub(super) fn on_ack(&mut self, id: u64, index: u32, sent_at: Instant, now: Instant) {
        let sample = now.saturating_duration_since(sent_at);
        self.smoothed_rtt = Some(
            self.smoothed_rtt
                .map_or(sample, |rtt| (rtt * 7 + sample) / 8),
        );
        let Some(at) = self.transfers.iter().position(|transfer| transfer.id == id) else {
            return;
        };
        let transfer = &mut self.transfers[at];
        if transfer.flights.remove(&index).is_some() {
            self.flights -= 1;
            if transfer.flights.is_empty() && transfer.is_sent() {
                self.remove(at);
            }
        }
    }

    /// The peer wants no more of a message, or knows that it was taken back.
    pub(super) fn on_stop(&mut self, id: u64) {
        self.resets.remove(&id);
        if let Some(at) = self.transfers.iter().position(|transfer| transfer.id == id) {
            self.remove(at);
        }
    }

    fn remove(&mut self, at: usize) {
        let transfer = self.transfers.remove(at);
        self.flights -= transfer.flights.len();
        self.open_in[transfer.class().index()] -= 1;
        self.sending_in[transfer.class().index()] -= usize::from(!transfer.is_sent());
    }

    /// Three round trips; a path that is dead ends its connection, so the wait need not grow.
    fn repeat_after(&self) -> Duration {
        self.smoothed_rtt
            .map_or(REPEAT_AFTER_FIRST, |rtt| (rtt * 3).max(REPEAT_AFTER_MIN))
    }

    fn oldest(&self) -> u64 {
        let oldest = self.transfers.iter().map(|transfer| transfer.id).min();
        let reset = self.resets.keys().next().copied();
        oldest
            .into_iter()
            .chain(reset)
            .min()
            .unwrap_or(self.next_transfer)
    }

    fn activate(&mut self) {
        for class in Class::ALL {
            let at = class.index();
            while self.sending_in[at] < self.active_max
                && let Some(message) = self.waiting[at].pop_front()
            {
                let id = self.next_transfer;
                self.next_transfer += 1;
                self.open_in[at] += 1;
                self.sending_in[at] += 1;
                let place = self.transfers.partition_point(|t| t.class() <= class);
                let flights = BTreeMap::new();
                self.transfers.insert(
                    place,
                    Transfer {
                        id,
                        message,
                        next: 0,
                        flights,
                    },
                );
            }
        }
    }

    /// Sends again what was not acknowledged in time, and finds when to look next.
    fn repeat(&mut self, path: &mut MemoryLink) {
        let (now, repeat_after) = (path.now(), self.repeat_after());
        for (id, at) in &mut self.resets {
            if *at <= now {
                path.push(Content::Reset { transfer: *id });
                *at = now + repeat_after;
            }
        }
        if self.repeat_at.is_none_or(|at| at > now) {
            return;
        }
        let oldest = self.oldest();
        self.repeat_at = None;
        for transfer in &mut self.transfers {
            let flights = transfer.flights.iter();
            let late: Vec<u32> = flights
                .filter(|(_, at)| **at <= now)
                .map(|(index, _)| *index)
                .collect();
            for index in late {
                if !path.has_room() {
                    break;
                }
                path.push(transfer.piece(index, oldest, now));
                transfer.flights.insert(index, now + repeat_after);
            }
            let next = transfer.flights.values().copied().min();
            self.repeat_at = self.repeat_at.into_iter().chain(next).min();
        }
    }

    /// Sends the pieces of a message that were never sent, while there is room. True when all are.
    fn send(&mut self, at: usize, path: &mut MemoryLink) -> bool {
        let (oldest, repeat_at) = (self.oldest(), path.now() + self.repeat_after());
        let transfer = &mut self.transfers[at];
        while !transfer.is_sent() {
            if self.flights >= self.window_pieces || !path.has_room() {
                return false;
            }
            path.push(transfer.piece(transfer.next, oldest, path.now()));
            transfer.flights.insert(transfer.next, repeat_at);
            transfer.next += 1;
            self.flights += 1;
            self.repeat_at = Some(self.repeat_at.map_or(repeat_at, |at| at.min(repeat_at)));
        }
        true
    }
}

impl MemoryCarrier {
    pub(crate) fn enqueue(&mut self, message: Outgoing) -> Result<(), QueueFull> {
        let class = message.header.class;
        if self.queued(class) >= self.queue_max.of(class) {
            return Err(QueueFull);
        }
        self.waiting[class.index()].push_back(message);
        Ok(())
    }

    pub(crate) fn poll_transmit(&mut self, path: &mut MemoryLink) -> Progress {
        self.repeat(path);
        self.activate();
        let mut at = 0;
        while at < self.transfers.len() {
            if self.transfers[at].is_sent() {
                at += 1;
                continue;
            }
            if !self.send(at, path) {
                // Neither the window nor the link has room for a less urgent one.
                break;
            }
            self.sending_in[self.transfers[at].class().index()] -= 1;
            self.activate();
            at = 0;
        }
        if path.is_blocked() {
            Progress::More
        } else {
            Progress::Blocked
        }
    }

    pub(crate) fn cancel(&mut self, path: Option<&mut MemoryLink>, header: &Header) -> bool {
        let same = |message: &Outgoing| {
            message.header.id == header.id && message.header.kind == header.kind
        };
        let queue = &mut self.waiting[header.class.index()];
        if let Some(at) = queue.iter().position(same) {
            queue.remove(at);
            return true;
        }
        let unsent = |transfer: &Transfer| same(&transfer.message) && !transfer.is_sent();
        let Some(at) = self.transfers.iter().position(unsent) else {
            return false;
        };
        let (id, has_begun) = (self.transfers[at].id, self.transfers[at].next > 0);
        self.remove(at);
        if has_begun && let Some(path) = path {
            // Said with the next pump, and until the peer knows.
            self.resets.insert(id, path.now());
        }
        true
    }

    pub(crate) fn queued(&self, class: Class) -> usize {
        self.waiting[class.index()].len() + self.open_in[class.index()]
    }
}
