//! UDP in: one multishot receive per socket, into slots that all sockets of the shard share.
//!
//! The kernel takes a slot from a ring of provided buffers and fills it with a GRO message. A
//! socket whose receive ended for want of a slot is armed again once one came back; until then its
//! datagrams wait in its own buffer, so that a flood to one socket cannot lose those of another.
//!
//! Cost per message: a parse of fixed offsets and one entry written back.
//!
//! Invariants:
//!
//! 1. A slot is offered to the kernel at most once at a time; `offered` counts those.
//! 2. A slot's bytes are read and written here only between its completion and its return.
//! 3. Slots grow only when small messages waste them: bulk messages fill a slot each, and more
//!    slots would only leave the cache.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::{IoUring, opcode, squeue, types};

use super::Received;
use crate::buf::Mapping;
use crate::config::{RX_SLOT_BYTES, ShardConfig};
use crate::datapath::Datagrams;
use crate::socket::{SOCKETS_MAX, ShardSocket, SocketId};
use crate::stats::ShardStats;
use crate::sys;

/// The one buffer group of a shard's ring.
const GROUP: u16 = 0;
/// `struct io_uring_recvmsg_out`: four u32.
const HEADER_BYTES: usize = 16;
/// Room for the two control messages that the sockets ask for: an int of 24 bytes with its header,
/// and the local address, `struct in6_pktinfo`, of 40.
const CONTROL_BYTES: usize = 64;
/// `struct cmsghdr`: a length of a word, level, type.
const CMSG_HEADER_BYTES: usize = 16;

/// A socket that is received from.
struct Receiver {
    local: SocketAddr,
    /// Bytes of a peer's address in a slot: 16 or 28, by the socket's family.
    name_bytes: usize,
    /// Copied by the kernel when a receive is armed; says how a slot is laid out.
    template: Box<libc::msghdr>,
}

pub(super) struct UdpRx {
    slots: Mapping,
    entries: Mapping,
    mask: u16,
    tail: u16,
    /// Slots that exist.
    count: u16,
    count_max: u16,
    /// Slots in the kernel's hands.
    offered: u16,
    /// By their id.
    sockets: Vec<Receiver>,
    /// Sockets without a receive in the kernel, bit `n` for the socket with index `n`.
    unarmed: u16,
    starved: bool,
    window_messages: u64,
    window_bytes: u64,
}

impl UdpRx {
    pub(super) fn new(
        config: &ShardConfig,
        sockets: &[ShardSocket],
        uring: &IoUring,
    ) -> io::Result<Self> {
        let count = config.rx_slots.max(1);
        // The kernel takes rings of at most 32,768 buffers, a power of two.
        let count_max = config.rx_slots_max.clamp(count, 1 << 15);
        let ring_entries = count_max.next_power_of_two();
        let slots = Mapping::for_slots(usize::from(count_max) * RX_SLOT_BYTES)?;
        let entries_bytes = usize::from(ring_entries) * size_of::<types::BufRingEntry>();
        let entries = Mapping::for_slots(entries_bytes)?;
        entries.populate(0, entries_bytes);
        // SAFETY: the entries are mapped, page aligned, of the length given, and outlive the
        // registration: `unregister` or the ring's end comes first.
        unsafe {
            uring.submitter().register_buf_ring_with_flags(
                entries.as_ptr().as_ptr() as u64,
                ring_entries,
                GROUP,
                0,
            )
        }?;
        let mut rx = Self {
            slots,
            entries,
            mask: ring_entries - 1,
            tail: 0,
            count: 0,
            count_max,
            offered: 0,
            sockets: sockets.iter().map(Receiver::new).collect(),
            // As many low bits as there are sockets; `spawn` lets no more than 16 pass.
            unarmed: u16::MAX >> (SOCKETS_MAX - sockets.len().min(SOCKETS_MAX)),
            starved: false,
            window_messages: 0,
            window_bytes: 0,
        };
        rx.add_slots(count);
        Ok(rx)
    }

    pub(super) fn unregister(&self, uring: &IoUring) {
        // Fails only when the ring is gone already.
        let _ = uring.submitter().unregister_buf_ring(GROUP);
    }

    pub(super) fn slots_max(&self) -> u16 {
        self.count_max
    }

    /// Whether a socket has no receive in the kernel.
    pub(super) fn is_unarmed(&self) -> bool {
        self.unarmed != 0
    }

    /// Whether a socket has a receive in the kernel.
    pub(super) fn is_armed(&self) -> bool {
        self.unarmed.count_ones() as usize != self.sockets.len()
    }

    /// The multishot receive of a socket that has none, which now has one.
    pub(super) fn arm(&mut self) -> Option<(SocketId, squeue::Entry)> {
        let index = self.unarmed.trailing_zeros();
        let socket = self.sockets.get(index as usize)?;
        self.unarmed &= self.unarmed - 1;
        let file = types::Fixed(index);
        let entry = opcode::RecvMsgMulti::new(file, &raw const *socket.template, GROUP).build();
        Some((SocketId::new(index as u8), entry))
    }

    /// The receive of a socket ended.
    pub(super) fn ended(&mut self, socket: SocketId) {
        self.unarmed |= 1 << socket.index();
    }

    /// Whether a receive may be armed: a slot is offered. Grows first where that helps.
    pub(super) fn may_arm(&mut self, stats: &ShardStats) -> bool {
        if std::mem::take(&mut self.starved) {
            let small = self.window_bytes < self.window_messages * (RX_SLOT_BYTES as u64 / 4);
            self.window_messages = 0;
            self.window_bytes = 0;
            let more = self.count.min(self.count_max - self.count);
            if small && more > 0 {
                self.add_slots(more);
                stats.rx_slots_grown.add(u64::from(more));
            }
        }
        self.offered > 0
    }

    /// The kernel found no slot.
    pub(super) fn starved(&mut self) {
        self.starved = true;
    }

    /// The kernel took a slot for a completion of this many bytes.
    pub(super) fn taken(&mut self, bytes: usize) {
        self.offered -= 1;
        self.window_messages += 1;
        self.window_bytes += bytes as u64;
    }

    /// The datagrams in a slot, or `None` when they are cut or their sender has no address.
    pub(super) fn message(&mut self, received: Received) -> Option<Datagrams<'_>> {
        let socket = self.sockets.get(received.socket.index())?;
        let payload_at = HEADER_BYTES + socket.name_bytes + CONTROL_BYTES;
        let bytes = (received.bytes as usize).min(RX_SLOT_BYTES);
        if received.slot >= self.count || bytes < payload_at {
            return None;
        }
        // SAFETY: the slot's completion was reaped and it was not given back, so neither the kernel
        // nor other code touches its bytes (invariant 2), which are mapped and initialised.
        let slot = unsafe { std::slice::from_raw_parts_mut(self.slot_ptr(received.slot), bytes) };
        let (head, payload) = slot.split_at_mut(payload_at);
        let word =
            |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (name_len, control_len) = (word(0) as usize, word(4) as usize);
        let (payload_len, flags) = (word(8) as usize, word(12));
        if flags & (libc::MSG_TRUNC as u32) != 0 || payload_len != payload.len() {
            return None;
        }
        let (name, control) = head[HEADER_BYTES..].split_at(socket.name_bytes);
        let from = sys::decode_addr(&name[..name_len.min(socket.name_bytes)])?;
        let control = Control::read(&control[..control_len.min(CONTROL_BYTES)]);
        let mut local = socket.local;
        if let Some(ip) = control.local {
            local.set_ip(ip);
        }
        let segment_bytes = control.segment_bytes.unwrap_or(payload.len());
        Some(Datagrams::new(
            received.socket,
            from,
            local,
            segment_bytes,
            payload,
        ))
    }

    /// Offers a slot to the kernel again.
    pub(super) fn give_back(&mut self, slot: u16) {
        let at = usize::from(self.tail & self.mask);
        let base = self.entries.as_ptr().as_ptr().cast::<types::BufRingEntry>();
        // SAFETY: `at` is below the ring's entries, all of which are mapped.
        let entry = unsafe { base.add(at) };
        // SAFETY: the kernel reads an entry only below the tail, which is published after this;
        // at most as many slots as entries exist, so this one is not among those below.
        let entry = unsafe { &mut *entry };
        entry.set_addr(self.slot_ptr(slot) as u64);
        entry.set_len(RX_SLOT_BYTES as u32);
        entry.set_bid(slot);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: `base` is the first entry of the registered ring.
        let tail = unsafe { types::BufRingEntry::tail(base) };
        // SAFETY: the tail is an aligned u16 in the mapping; only this thread writes it, and the
        // kernel reads it atomically.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        tail.store(self.tail, Ordering::Release);
        self.offered += 1;
    }

    fn add_slots(&mut self, more: u16) {
        let from = self.count;
        self.slots.populate(
            usize::from(from) * RX_SLOT_BYTES,
            usize::from(more) * RX_SLOT_BYTES,
        );
        self.count += more;
        for slot in from..self.count {
            self.give_back(slot);
        }
    }

    fn slot_ptr(&self, slot: u16) -> *mut u8 {
        // SAFETY: slots are numbered below `count`, and the mapping has room for `count_max`.
        unsafe {
            self.slots
                .as_ptr()
                .as_ptr()
                .add(usize::from(slot) * RX_SLOT_BYTES)
        }
    }
}

impl Receiver {
    fn new(socket: &ShardSocket) -> Self {
        let local = socket.local_addr();
        let name_bytes = if local.is_ipv4() { 16 } else { 28 };
        // SAFETY: a message header of zeros is valid: no name, no buffers, no control data.
        let mut template: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        template.msg_namelen = name_bytes as libc::socklen_t;
        template.msg_controllen = CONTROL_BYTES;
        Self {
            local,
            name_bytes,
            template,
        }
    }
}

/// What the kernel says of a message beside its bytes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Control {
    /// Bytes of each datagram but the last; `None` when the message is one datagram.
    segment_bytes: Option<usize>,
    /// The address that it came to; said of sockets with an open address.
    local: Option<IpAddr>,
}

impl Control {
    /// Reads control messages up to the first that is none.
    fn read(control: &[u8]) -> Self {
        let mut this = Self::default();
        let mut rest = control;
        while let Some((level, kind, value, next)) = next_message(rest) {
            if level == libc::SOL_UDP && kind == libc::UDP_GRO {
                this.segment_bytes = segment_bytes(value);
            } else if let Some(local) = sys::decode_pktinfo(level, kind, value) {
                this.local = Some(local);
            }
            rest = next;
        }
        this
    }
}

/// The first control message: level, kind, value, and what is behind it.
fn next_message(control: &[u8]) -> Option<(i32, i32, &[u8], &[u8])> {
    let (header, _) = control.split_at_checked(CMSG_HEADER_BYTES)?;
    let len = usize::from_ne_bytes(header[..8].try_into().ok()?);
    let level = i32::from_ne_bytes(header[8..12].try_into().ok()?);
    let kind = i32::from_ne_bytes(header[12..16].try_into().ok()?);
    let value = control.get(CMSG_HEADER_BYTES..len)?;
    let next = control.get(len.next_multiple_of(8)..).unwrap_or_default();
    Some((level, kind, value, next))
}

fn segment_bytes(value: &[u8]) -> Option<usize> {
    let bytes = i32::from_ne_bytes(value.get(..4)?.try_into().ok()?);
    usize::try_from(bytes).ok().filter(|&bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cmsg(len: usize, level: i32, kind: i32, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(len.to_ne_bytes());
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    fn gro(len: usize, bytes: i32) -> Vec<u8> {
        cmsg(len, libc::SOL_UDP, libc::UDP_GRO, &bytes.to_ne_bytes())
    }

    /// Segment size and local address are found behind other control data, and nonsense is neither.
    #[test]
    fn control_messages() {
        let segments = |bytes| Control {
            segment_bytes: Some(bytes),
            local: None,
        };
        let other = cmsg(20, 0, 2, &7i32.to_ne_bytes());
        let (level, kind, value, len) = sys::encode_pktinfo(IpAddr::from([192, 0, 2, 1]), true);
        let local = cmsg(CMSG_HEADER_BYTES + len, level, kind, &value[..len]);
        let both = Control {
            segment_bytes: Some(1452),
            local: Some(IpAddr::from([192, 0, 2, 1])),
        };
        let cases = [
            (gro(20, 1452), segments(1452)),
            ([other.clone(), gro(20, 1452)].concat(), segments(1452)),
            ([gro(20, 1452), local.clone()].concat(), both),
            (other, Control::default()),
            (Vec::new(), Control::default()),
            (gro(3, 1452), Control::default()),
            (gro(400, 1452), Control::default()),
            (gro(20, -1), Control::default()),
            (gro(20, 1452)[..18].to_vec(), Control::default()),
            (local[..local.len() - 8].to_vec(), Control::default()),
        ];
        for (control, expected) in cases {
            assert_eq!(Control::read(&control), expected, "{control:?}");
        }
        assert!(gro(20, 1452).len() + local.len() <= CONTROL_BYTES);
    }
}
