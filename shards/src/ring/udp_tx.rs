//! Transmit slots: 64 KiB each, filled with packets that leave as GSO trains.
//!
//! Cost per packet: a compare of size and address, and two additions. Per train: one record filled
//! in and one submission.
//!
//! Invariants:
//!
//! 1. A slot is free, or the one being filled, or held by trains in flight, or the latter two;
//!    `holds` counts its holders.
//! 2. Bytes of a submitted train are not written until its last completion.
//! 3. A train's record stays as it is until that completion: the kernel may read it again.
//! 4. Free slots are reused last in, first out, so that a quiet shard stays on one cached slot.

use std::io;
use std::net::SocketAddr;

use io_uring::{cqueue, opcode, squeue};

use super::{SOCKET, token};
use crate::buf::Mapping;
use crate::config::{ShardConfig, TX_SLOT_BYTES};
use crate::socket::ShardSocket;
use crate::stats::ShardStats;
use crate::sys::{self, AddrBytes};

/// The most UDP payload one train may carry: 65,535 less the IPv4 and UDP headers.
const TRAIN_BYTES_MAX: usize = 65_507;
/// Kernels before 6.9 take no more segments.
const SEGMENTS_MAX: u16 = 64;
/// The smallest train worth the extra completion of a send without copy.
const ZC_BYTES_MIN: usize = 16 * 1024;
/// `IORING_SEND_ZC_REPORT_USAGE`: the notification says whether the kernel copied.
const REPORT_USAGE: u16 = 1 << 3;
/// `IORING_NOTIF_USAGE_ZC_COPIED`: it did.
const USAGE_COPIED: u32 = 1 << 31;
/// One control message with a u16: header of 16 bytes, value, padding.
const CONTROL_BYTES: usize = 24;

/// What the kernel reads of a train, and where the train lies.
#[repr(C, align(64))]
struct Record {
    header: libc::msghdr,
    iov: libc::iovec,
    control: [u64; CONTROL_BYTES / 8],
    addr: AddrBytes,
    slot: u16,
    segments: u16,
    zero_copy: bool,
}

/// Whether trains are sent without a copy. Loopback and veth copy all the same, and then the second
/// completion is a pure loss; a send to oneself always takes loopback. So the probe is the first
/// large train to a real peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ZeroCopy {
    Never,
    Unknown,
    Probing,
    Works,
}

/// The slot being filled.
#[derive(Debug, Clone, Copy)]
struct Filling {
    slot: u16,
    /// Bytes used from the slot's start.
    used: usize,
}

/// The train being built, at the end of the slot being filled.
#[derive(Debug, Clone, Copy)]
struct Open {
    start: usize,
    segment_bytes: usize,
    segments: u16,
    to: SocketAddr,
}

pub(super) struct UdpTx {
    slots: Mapping,
    holds: Vec<u16>,
    free_slots: Vec<u16>,
    slots_max: u16,
    records: Box<[Record]>,
    free_records: Vec<u32>,
    filling: Option<Filling>,
    open: Option<Open>,
    offered: usize,
    per_turn: u16,
    left: u16,
    /// Cleared when the device turns out not to segment.
    gso: bool,
    zero_copy: ZeroCopy,
}

impl UdpTx {
    pub(super) fn new(
        config: &ShardConfig,
        records: u32,
        socket: Option<&ShardSocket>,
    ) -> io::Result<Self> {
        let count = if socket.is_some() {
            config.tx_slots.max(1)
        } else {
            0
        };
        let slots_max = if socket.is_some() {
            config.tx_slots_max.max(count)
        } else {
            0
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
            filling: None,
            open: None,
            offered: 0,
            per_turn: config.tx_slots_per_turn.max(1),
            left: 0,
            gso: true,
            zero_copy: if config.zero_copy {
                ZeroCopy::Unknown
            } else {
                ZeroCopy::Never
            },
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

    /// Whether the next packet fits the slot being filled and a train may be started.
    #[inline]
    pub(super) fn has_room(&self, max_bytes: usize) -> bool {
        assert!(
            max_bytes <= TRAIN_BYTES_MAX,
            "no datagram has {max_bytes} bytes"
        );
        let fits = self
            .filling
            .is_some_and(|slot| slot.used + max_bytes <= TRAIN_BYTES_MAX);
        // One record for the open train, one for a train this packet may start.
        fits && self.free_records.len() > usize::from(self.open.is_some())
    }

    /// The place of the next packet; only after `has_room`.
    #[inline]
    pub(super) fn offer(&mut self, max_bytes: usize) -> &mut [u8] {
        self.offered = max_bytes;
        let Some(Filling { slot, used }) = self.filling else {
            return &mut [];
        };
        // SAFETY: `used` is within the slot.
        let start = unsafe { self.slot_ptr(slot).add(used) };
        // SAFETY: `used + max_bytes` is within the slot (`has_room`); trains of this slot in flight
        // end at or before `used` (invariant 2); the borrow ends before the next call.
        unsafe { std::slice::from_raw_parts_mut(start, max_bytes) }
    }

    /// Whether a packet of `len` bytes to `to` extends the open train.
    #[inline]
    pub(super) fn extends(&self, len: usize, to: SocketAddr) -> bool {
        self.gso
            && self
                .open
                .is_some_and(|open| len <= open.segment_bytes && open.to == to)
    }

    /// Adds the offered packet to the open train; true when that closes it.
    #[inline]
    pub(super) fn extend(&mut self, len: usize) -> bool {
        self.take_offered(len);
        let Some(open) = self.open.as_mut() else {
            return false;
        };
        open.segments += 1;
        len < open.segment_bytes || open.segments == SEGMENTS_MAX
    }

    /// Starts a train with the offered packet; the previous one must have been closed.
    #[inline]
    pub(super) fn open_train(&mut self, len: usize, to: SocketAddr) {
        let start = self.filling.map_or(0, |slot| slot.used);
        self.take_offered(len);
        self.open = Some(Open {
            start,
            segment_bytes: len,
            segments: 1,
            to,
        });
    }

    fn take_offered(&mut self, len: usize) {
        assert!(
            len <= self.offered,
            "pushed {len} bytes of {} offered",
            self.offered
        );
        self.offered = 0;
        if let Some(slot) = self.filling.as_mut() {
            slot.used += len;
        }
    }

    /// Ends the open train: its submission, if there is one.
    pub(super) fn close_train(&mut self, stats: &ShardStats) -> Option<squeue::Entry> {
        let open = self.open.take()?;
        let filling = self.filling?;
        // Cannot be empty: `has_room` was asked before the train's first packet, and one packet
        // opens one train.
        let index = self.free_records.pop()?;
        let bytes = filling.used - open.start;
        // SAFETY: `start` is within the slot.
        let start = unsafe { self.slot_ptr(filling.slot).add(open.start) };
        self.holds[usize::from(filling.slot)] += 1;
        let record = &mut self.records[index as usize];
        record.slot = filling.slot;
        record.segments = open.segments;
        let header = record.fill(start, bytes, &open);
        stats.trains_sent.add(1);
        stats.packets_sent.add(u64::from(open.segments));
        stats.bytes_sent.add(bytes as u64);
        let zero_copy =
            bytes >= ZC_BYTES_MIN && matches!(self.zero_copy, ZeroCopy::Unknown | ZeroCopy::Works);
        self.records[index as usize].zero_copy = zero_copy;
        let entry = if zero_copy {
            stats.trains_sent_zc.add(1);
            if self.zero_copy == ZeroCopy::Unknown {
                self.zero_copy = ZeroCopy::Probing;
            }
            opcode::SendMsgZc::new(SOCKET, header)
                .ioprio(REPORT_USAGE)
                .build()
        } else {
            opcode::SendMsg::new(SOCKET, header).build()
        };
        Some(entry.user_data(token::SEND | u64::from(index)))
    }

    /// Stops filling the current slot.
    pub(super) fn seal(&mut self) {
        self.offered = 0;
        if let Some(filling) = self.filling.take() {
            self.release(filling.slot);
        }
    }

    /// Starts filling a free slot, within the turn's budget.
    pub(super) fn next_slot(&mut self) -> bool {
        if self.left == 0 || self.free_records.is_empty() {
            return false;
        }
        let Some(slot) = self.free_slots.pop() else {
            return false;
        };
        self.left -= 1;
        self.holds[usize::from(slot)] += 1;
        self.filling = Some(Filling { slot, used: 0 });
        true
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
        if cqueue::notif(flags) {
            // Also later, when the route to the peers has changed.
            let copied = result as u32 & USAGE_COPIED != 0;
            self.zero_copy = if copied {
                ZeroCopy::Never
            } else {
                ZeroCopy::Works
            };
        } else if result < 0 {
            stats.send_errors.add(1);
            if record.zero_copy {
                self.zero_copy = ZeroCopy::Never;
            }
            // A device that cannot checksum cannot segment: from now on packet by packet.
            if result == -libc::EIO && record.segments > 1 {
                self.gso = false;
            }
        }
        // A send without copy completes twice; its bytes are the kernel's until the second.
        if !cqueue::more(flags) {
            let slot = record.slot;
            self.free_records.push(index as u32);
            self.release(slot);
        }
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

    fn slot_ptr(&self, slot: u16) -> *mut u8 {
        // SAFETY: slots are numbered below `holds.len()`, and the mapping has room for `slots_max`.
        unsafe {
            self.slots
                .as_ptr()
                .as_ptr()
                .add(usize::from(slot) * TX_SLOT_BYTES)
        }
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
            control: [0; CONTROL_BYTES / 8],
            addr: AddrBytes::default(),
            slot: 0,
            segments: 0,
            zero_copy: false,
        }
    }

    /// Describes a train; the record does not move while the kernel may read it.
    fn fill(&mut self, start: *mut u8, bytes: usize, train: &Open) -> *const libc::msghdr {
        let (addr, addr_bytes) = sys::encode_addr(train.to);
        self.addr = addr;
        self.iov = libc::iovec {
            iov_base: start.cast(),
            iov_len: bytes,
        };
        self.header.msg_name = (&raw mut self.addr).cast();
        self.header.msg_namelen = addr_bytes as libc::socklen_t;
        self.header.msg_iov = &raw mut self.iov;
        self.header.msg_iovlen = 1;
        if train.segments > 1 {
            // struct cmsghdr { len: usize, level: i32, type: i32 }, then the segment size as u16.
            // As words of a little-endian machine, which glommio's targets are.
            self.control[0] = 16 + 2;
            self.control[1] = libc::SOL_UDP as u64 | (libc::UDP_SEGMENT as u64) << 32;
            self.control[2] = train.segment_bytes as u64;
            self.header.msg_control = (&raw mut self.control).cast();
            self.header.msg_controllen = CONTROL_BYTES;
        } else {
            self.header.msg_control = std::ptr::null_mut();
            self.header.msg_controllen = 0;
        }
        &raw const self.header
    }
}
