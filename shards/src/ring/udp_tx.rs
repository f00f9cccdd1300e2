//! UDP out: transmit slots of 64 KiB, and the GSO trains that leave from them.
//!
//! Sends are `SENDMSG` with a `UDP_SEGMENT` control message (udp(7), Linux 4.18), or `SENDMSG_ZC`
//! (Linux 6.1) where the kernel turned out not to copy.
//!
//! Cost per train: one record filled in and one submission.
//!
//! Invariants:
//!
//! 1. A slot is free, or lent to be filled, or held by trains in flight, or the latter two;
//!    `holds` counts its holders.
//! 2. A slot that is lent has no train in flight: its trains are sent after it came back.
//! 3. A train's record stays as it is until its last completion: the kernel may read it again.
//! 4. Free slots are reused last in, first out, so that a quiet shard stays on one cached slot.

use std::io;
use std::net::SocketAddr;

use io_uring::{cqueue, opcode, squeue, types};

use super::token;
use crate::buf::Mapping;
use crate::config::{ShardConfig, TX_SLOT_BYTES};
use crate::datapath::{Refused, Slot, Train};
use crate::socket::{ShardSocket, SocketId};
use crate::stats::ShardStats;
use crate::sys::{self, AddrBytes};

/// The smallest train worth the extra completion of a send without copy.
const ZC_BYTES_MIN: usize = 16 * 1024;
/// `IORING_SEND_ZC_REPORT_USAGE`: the notification says whether the kernel copied.
const REPORT_USAGE: u16 = 1 << 3;
/// `IORING_NOTIF_USAGE_ZC_COPIED`: it did.
const USAGE_COPIED: u32 = 1 << 31;
/// `struct cmsghdr`: a length of a word, level, type.
const CMSG_HEADER_BYTES: usize = 16;
/// Refused trains that may wait to be told. A device whose MTU shrank refuses many in a turn. What
/// is not told is refused again, or missed by the protocol.
const REFUSED_MAX: usize = 16;
/// Room for two control messages: the segment size, of 24 bytes with header and padding, and the
/// source, `struct in6_pktinfo`, of 40.
const CONTROL_BYTES: usize = 64;

/// What the kernel reads of a train, and where the train lies.
#[repr(C, align(64))]
struct Record {
    header: libc::msghdr,
    iov: libc::iovec,
    control: Control,
    addr: AddrBytes,
    to: SocketAddr,
    slot: u16,
    segments: u16,
    segment_bytes: u16,
    socket: SocketId,
    zero_copy: bool,
}

/// What was learnt of the device behind a socket.
#[derive(Debug, Clone, Copy)]
struct Device {
    zero_copy: ZeroCopy,
    /// Cleared when the device turns out not to segment.
    gso: bool,
    /// The socket's family.
    is_ipv6: bool,
}

/// Control messages of a train, aligned as `struct cmsghdr`.
#[repr(C, align(8))]
struct Control {
    bytes: [u8; CONTROL_BYTES],
    len_bytes: usize,
}

impl Control {
    const EMPTY: Self = Self {
        bytes: [0; CONTROL_BYTES],
        len_bytes: 0,
    };

    /// Adds a message. There is room for the two that a train may have.
    fn push(&mut self, level: i32, kind: i32, value: &[u8]) {
        let (at, len) = (self.len_bytes, CMSG_HEADER_BYTES + value.len());
        let message = &mut self.bytes[at..at + len];
        message[..8].copy_from_slice(&len.to_ne_bytes());
        message[8..12].copy_from_slice(&level.to_ne_bytes());
        message[12..16].copy_from_slice(&kind.to_ne_bytes());
        message[16..].copy_from_slice(value);
        self.len_bytes = (at + len).next_multiple_of(8);
    }
}

/// Whether trains are sent without a copy. Over loopback and veth the kernel copies in spite of the
/// flag, and then the second completion is a pure loss. A probe to this host would always take
/// loopback, so the first large train to a peer is the probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ZeroCopy {
    Never,
    Unknown,
    Probing,
    Works,
}

pub(super) struct UdpTx {
    slots: Mapping,
    holds: Vec<u16>,
    free_slots: Vec<u16>,
    slots_max: u16,
    records: Box<[Record]>,
    free_records: Vec<u32>,
    /// The slot that is lent.
    lent: Option<u16>,
    per_turn: u16,
    left: u16,
    /// By the index of their socket.
    devices: Vec<Device>,
    /// Trains that the kernel refused as too large, not told yet.
    refused: Vec<Refused>,
}

impl UdpTx {
    pub(super) fn new(
        config: &ShardConfig,
        records: u32,
        sockets: &[ShardSocket],
    ) -> io::Result<Self> {
        let (count, slots_max) = if sockets.is_empty() {
            (0, 0)
        } else {
            let count = config.tx_slots.max(1);
            (count, config.tx_slots_max.max(count))
        };
        let device = |socket: &ShardSocket| Device {
            zero_copy: if config.zero_copy {
                ZeroCopy::Unknown
            } else {
                ZeroCopy::Never
            },
            gso: true,
            is_ipv6: socket.local_addr().is_ipv6(),
        };
        let slots = Mapping::for_slots(usize::from(slots_max) * TX_SLOT_BYTES)?;
        let records: Box<[Record]> = (0..records).map(|_| Record::empty()).collect();
        let mut tx = Self {
            slots,
            holds: Vec::with_capacity(usize::from(slots_max)),
            free_slots: Vec::with_capacity(usize::from(slots_max)),
            slots_max,
            free_records: (0..records.len() as u32).rev().collect(),
            records,
            lent: None,
            per_turn: config.tx_slots_per_turn.max(1),
            left: 0,
            devices: sockets.iter().map(device).collect(),
            refused: Vec::with_capacity(REFUSED_MAX),
        };
        tx.add_slots(count);
        Ok(tx)
    }

    pub(super) fn begin_turn(&mut self) {
        self.left = self.per_turn;
    }

    pub(super) fn turn_is_over(&self) -> bool {
        self.left == 0
    }

    /// Trains in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.records.len() - self.free_records.len()
    }

    /// A train's submission. `None` when the shard has no such socket, or the train does not lie in
    /// the slot that is lent: then it is dropped and counted.
    pub(super) fn send(&mut self, train: &Train, stats: &ShardStats) -> Option<squeue::Entry> {
        // A `Train` is plain data, so that safe code could make up one that lies elsewhere.
        let end_bytes = train.start_bytes.saturating_add(train.len_bytes);
        let lies_in_slot = self.lent == Some(train.slot) && end_bytes <= TX_SLOT_BYTES;
        let device = self.devices.get_mut(train.socket.index());
        let (true, Some(device)) = (lies_in_slot, device) else {
            stats.send_errors.add(1);
            return None;
        };
        // Never empty: `lend` said how many trains there may be.
        let Some(index) = self.free_records.pop() else {
            stats.send_errors.add(1);
            return None;
        };
        // SAFETY: the train lies within the slot that is lent, as just checked.
        let start = unsafe { slot_ptr(&self.slots, train.slot).add(train.start_bytes) };
        self.holds[usize::from(train.slot)] += 1;
        stats.trains_sent.add(1);
        stats.packets_sent.add(u64::from(train.segments));
        stats.bytes_sent.add(train.len_bytes as u64);
        let zero_copy = train.len_bytes >= ZC_BYTES_MIN
            && matches!(device.zero_copy, ZeroCopy::Unknown | ZeroCopy::Works);
        let record = &mut self.records[index as usize];
        record.zero_copy = zero_copy;
        let header = record.fill(start, train, device.is_ipv6);
        let socket = types::Fixed(train.socket.index() as u32);
        let entry = if zero_copy {
            stats.trains_sent_zc.add(1);
            if device.zero_copy == ZeroCopy::Unknown {
                device.zero_copy = ZeroCopy::Probing;
            }
            opcode::SendMsgZc::new(socket, header)
                .ioprio(REPORT_USAGE)
                .build()
        } else {
            opcode::SendMsg::new(socket, header).build()
        };
        Some(entry.user_data(token::SEND | u64::from(index)))
    }

    /// Takes the slot back that is lent.
    pub(super) fn seal(&mut self) {
        if let Some(slot) = self.lent.take() {
            self.release(slot);
        }
    }

    /// Takes a free slot, within the turn's budget.
    pub(super) fn next_slot(&mut self) -> Option<u16> {
        if self.left == 0 || self.free_records.is_empty() {
            return None;
        }
        let slot = self.free_slots.pop()?;
        self.left -= 1;
        self.holds[usize::from(slot)] += 1;
        self.lent = Some(slot);
        Some(slot)
    }

    /// Lends the memory of a slot that [`Self::next_slot`] took.
    ///
    /// # Safety
    /// The memory is used no more when the slot is sealed or another one taken, and not beyond the
    /// life of `self`.
    pub(super) unsafe fn lend<'a>(&mut self, slot: u16) -> Slot<'a> {
        let start = slot_ptr(&self.slots, slot);
        // SAFETY: a slot has TX_SLOT_BYTES mapped and initialised bytes; it was free, so that no
        // train in flight lies in it (invariant 2), and the caller keeps it to one borrow.
        let memory = unsafe { std::slice::from_raw_parts_mut(start, TX_SLOT_BYTES) };
        let unsegmented = self
            .devices
            .iter()
            .enumerate()
            .fold(0, |mask, (index, device)| {
                mask | u16::from(!device.gso) << index
            });
        Slot {
            index: slot,
            memory,
            trains_max: self.free_records.len(),
            unsegmented,
        }
    }

    /// Doubles the slots, up to the config's bound.
    pub(super) fn grow(&mut self, stats: &ShardStats) -> bool {
        let count = self.holds.len() as u16;
        let more = count.min(self.slots_max - count);
        self.add_slots(more);
        stats.tx_slots_grown.add(u64::from(more));
        more > 0
    }

    /// A completion of a train's send.
    pub(super) fn completed(&mut self, index: usize, result: i32, flags: u32, stats: &ShardStats) {
        let Some(record) = self.records.get(index) else {
            return;
        };
        let Some(device) = self.devices.get_mut(record.socket.index()) else {
            return;
        };
        if cqueue::notif(flags) {
            // Also later, when the route to the peers has changed.
            let copied = result as u32 & USAGE_COPIED != 0;
            device.zero_copy = if copied {
                ZeroCopy::Never
            } else {
                ZeroCopy::Works
            };
        } else if result < 0 {
            stats.send_errors.add(1);
            if record.zero_copy {
                device.zero_copy = ZeroCopy::Never;
            }
            // A device that cannot checksum cannot segment: from now on packet by packet.
            if result == -libc::EIO && record.segments > 1 {
                device.gso = false;
            }
            if result == -libc::EMSGSIZE && self.refused.len() < REFUSED_MAX {
                self.refused.push(Refused {
                    to: record.to,
                    packet_bytes: usize::from(record.segment_bytes),
                });
            }
        }
        // A send without copy completes twice; its bytes are the kernel's until the second.
        if !cqueue::more(flags) {
            let slot = record.slot;
            self.free_records.push(index as u32);
            self.release(slot);
        }
    }

    /// A train that the kernel refused as too large, once.
    pub(super) fn take_refused(&mut self) -> Option<Refused> {
        self.refused.pop()
    }

    fn release(&mut self, slot: u16) {
        let holds = &mut self.holds[usize::from(slot)];
        *holds -= 1;
        if *holds == 0 {
            self.free_slots.push(slot);
        }
    }

    fn add_slots(&mut self, more: u16) {
        let from = self.holds.len() as u16;
        self.slots.populate(
            usize::from(from) * TX_SLOT_BYTES,
            usize::from(more) * TX_SLOT_BYTES,
        );
        for slot in (from..from + more).rev() {
            self.holds.push(0);
            self.free_slots.push(slot);
        }
    }
}

/// Where a slot begins. Slots are numbered below `slots_max`, for which the mapping has room.
fn slot_ptr(slots: &Mapping, slot: u16) -> *mut u8 {
    // SAFETY: see above; the caller's slot is one of them.
    unsafe {
        slots
            .as_ptr()
            .as_ptr()
            .add(usize::from(slot) * TX_SLOT_BYTES)
    }
}

impl Record {
    fn empty() -> Self {
        Self {
            // SAFETY: a message header of zeros is valid: no name, no buffers, no control data.
            header: unsafe { std::mem::zeroed() },
            iov: libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            },
            control: Control::EMPTY,
            addr: AddrBytes::default(),
            to: sys::NO_ADDR,
            slot: 0,
            segments: 0,
            segment_bytes: 0,
            socket: SocketId::FIRST,
            zero_copy: false,
        }
    }

    /// Describes a train; the record does not move while the kernel may read it.
    fn fill(&mut self, start: *mut u8, train: &Train, by_ipv6: bool) -> *const libc::msghdr {
        self.slot = train.slot;
        self.segments = train.segments;
        // At most 65,507: a train's length.
        self.segment_bytes = train.segment_bytes as u16;
        self.to = train.to;
        self.socket = train.socket;
        let (addr, addr_bytes) = sys::encode_addr(train.to);
        self.addr = addr;
        self.iov = libc::iovec {
            iov_base: start.cast(),
            iov_len: train.len_bytes,
        };
        self.header.msg_name = (&raw mut self.addr).cast();
        self.header.msg_namelen = addr_bytes as libc::socklen_t;
        self.header.msg_iov = &raw mut self.iov;
        self.header.msg_iovlen = 1;
        self.control.len_bytes = 0;
        if train.segments > 1 {
            let bytes = self.segment_bytes.to_ne_bytes();
            self.control.push(libc::SOL_UDP, libc::UDP_SEGMENT, &bytes);
        }
        if let Some(source) = train.source {
            let (level, kind, value, len) = sys::encode_pktinfo(source, by_ipv6);
            self.control.push(level, kind, &value[..len]);
        }
        self.header.msg_control = (&raw mut self.control.bytes).cast();
        self.header.msg_controllen = self.control.len_bytes;
        &raw const self.header
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::{UdpGroupConfig, bind_unsteered};

    /// The kernel is given no byte outside the slot that is lent, also when a train claims it.
    #[test]
    fn a_train_lies_in_the_lent_slot() {
        let config = ShardConfig::default();
        let stats = ShardStats::default();
        let local = "127.0.0.1:0".parse().unwrap();
        let group = UdpGroupConfig {
            local,
            ..UdpGroupConfig::default()
        };
        let sockets = bind_unsteered(&group).unwrap();
        let mut tx = UdpTx::new(&config, 64, &sockets).unwrap();
        tx.begin_turn();
        let slot = tx.next_slot().unwrap();
        let train = Train {
            socket: SocketId::FIRST,
            to: sys::NO_ADDR,
            source: None,
            slot,
            segments: 1,
            start_bytes: TX_SLOT_BYTES - 10,
            len_bytes: 10,
            segment_bytes: 10,
        };
        let outside = [
            Train {
                len_bytes: 11,
                ..train
            },
            Train {
                start_bytes: usize::MAX,
                ..train
            },
            Train {
                slot: slot + 1,
                ..train
            },
            Train {
                socket: SocketId::new(1),
                ..train
            },
        ];
        for train in outside {
            assert!(tx.send(&train, &stats).is_none(), "{train:?}");
        }
        assert_eq!(stats.snapshot().send_errors, 4);
        assert_eq!(tx.in_flight(), 0);
        assert!(tx.send(&train, &stats).is_some());
        assert_eq!(tx.in_flight(), 1);
        tx.seal();
        assert!(tx.send(&train, &stats).is_none());
    }
}
