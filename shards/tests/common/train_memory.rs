//! Drives a datapath without a ring: its trains are built in a `Vec`. Other crates include this
//! file to test theirs.

use std::net::SocketAddr;
use std::slice::ChunksMut;
use std::time::Instant;

use millrace_shards::{Datapath, Slot, SocketId, Train, TrainBuffer, Trains, Transmit};

/// Slots of one size, lent anew in each turn.
pub(crate) struct TrainMemory {
    pub(crate) slots: usize,
    pub(crate) slot_bytes: usize,
    /// Trains that may be built in one slot.
    pub(crate) trains_max: usize,
    /// Sockets whose device does not segment.
    pub(crate) unsegmented: u16,
}

impl Default for TrainMemory {
    fn default() -> Self {
        Self {
            slots: 16,
            slot_bytes: 64 << 10,
            trains_max: 512,
            unsegmented: 0,
        }
    }
}

/// A packet that was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) socket: SocketId,
    pub(crate) to: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

/// One turn's trains, and the packets that they consist of.
#[derive(Debug)]
pub(crate) struct Turn {
    pub(crate) result: Transmit,
    pub(crate) trains: Vec<Train>,
    pub(crate) packets: Vec<Sent>,
}

impl TrainMemory {
    /// Lets a datapath transmit once.
    pub(crate) fn transmit(&self, datapath: &mut impl Datapath, now: Instant) -> Turn {
        self.build(|trains| datapath.transmit(trains, now))
    }

    /// Lets `build` fill trains as in one turn.
    pub(crate) fn build(&self, build: impl FnOnce(&mut Trains<'_>) -> Transmit) -> Turn {
        let mut memory = vec![0; self.slots * self.slot_bytes];
        let mut sent = Vec::new();
        let mut slots = Slots {
            free: memory.chunks_mut(self.slot_bytes),
            next: 0,
            trains_max: self.trains_max,
            unsegmented: self.unsegmented,
            sent: &mut sent,
        };
        let mut trains = Trains::new(&mut slots, Vec::new());
        let result = build(&mut trains);
        let last = trains.end();
        sent.extend(last);
        let packets = sent
            .iter()
            .flat_map(|train| {
                let start = usize::from(train.slot) * self.slot_bytes + train.start_bytes;
                let bytes = &memory[start..start + train.len_bytes];
                bytes.chunks(train.segment_bytes).map(|packet| Sent {
                    socket: train.socket,
                    to: train.to,
                    bytes: packet.to_vec(),
                })
            })
            .collect();
        Turn {
            result,
            trains: sent,
            packets,
        }
    }
}

struct Slots<'a> {
    free: ChunksMut<'a, u8>,
    next: u16,
    trains_max: usize,
    unsegmented: u16,
    sent: &'a mut Vec<Train>,
}

impl<'a> TrainBuffer<'a> for Slots<'a> {
    fn next_slot(&mut self, finished: &mut Vec<Train>) -> Option<Slot<'a>> {
        self.sent.append(finished);
        let memory = self.free.next()?;
        let index = self.next;
        self.next += 1;
        Some(Slot {
            index,
            memory,
            trains_max: self.trains_max,
            unsegmented: self.unsegmented,
        })
    }
}
