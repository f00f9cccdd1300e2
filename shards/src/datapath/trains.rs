//! GSO trains: packets of one size to one peer, back to back, which the kernel takes in one call.
//!
//! [`Trains`] cuts lent memory into packets and describes each train by a [`Train`]. It makes no
//! system call and owns no ring: a [`TrainBuffer`] lends the memory slot by slot and sends the
//! trains that are finished. The shard's ring is one such buffer; a `Vec` in a test is another.
//!
//! Cost per packet: a compare of size and address, and two additions. The buffer is called once per
//! slot, and nothing else here is called through a pointer.
//!
//! Invariants:
//!
//! 1. A train lies in one slot; its packets have one size but the last, which may be shorter, one
//!    peer, one socket and one source.
//! 2. Trains do not overlap, and are sent in the order in which they were built.
//! 3. Between two calls of the buffer no more trains are finished than its last slot allowed.
//! 4. The memory of a slot is not touched after its trains were handed over.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::socket::SocketId;

/// The most UDP payload one train may carry: 65,535 less the IPv4 and UDP headers (RFC 768, RFC
/// 791).
pub const TRAIN_BYTES_MAX: usize = 65_507;

/// The most packets of one train: `UDP_MAX_SEGMENTS`, which kernels before 6.9 set to 64.
pub const SEGMENTS_MAX: u16 = 64;

/// Lends memory to [`Trains`], and sends what is finished.
pub trait TrainBuffer<'a> {
    /// Sends the trains of the slot lent before, in order, and empties the list; then lends the
    /// next slot. `None` when this turn has no more slots; a later call may lend one again.
    ///
    /// Called once per slot, not per packet.
    fn next_slot(&mut self, finished: &mut Vec<Train>) -> Option<Slot<'a>>;
}

/// Memory that is lent for packets.
#[derive(Debug)]
pub struct Slot<'a> {
    /// The buffer's own number for it; each [`Train`] built in it names it.
    pub index: u16,
    /// The memory, of which the first [`TRAIN_BYTES_MAX`] bytes are used.
    pub memory: &'a mut [u8],
    /// Trains that may be built in it.
    pub trains_max: usize,
    /// Sockets whose device does not segment, bit `n` for the socket with index `n`: their trains
    /// have one packet each.
    pub unsegmented: u16,
}

/// A finished train: where it lies, and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Train {
    /// The socket it leaves by.
    pub socket: SocketId,
    /// The peer.
    pub to: SocketAddr,
    /// The local address that it leaves from; `None`: the kernel chooses by the route.
    pub source: Option<IpAddr>,
    /// The slot it lies in.
    pub slot: u16,
    /// Packets of it, 1 to [`SEGMENTS_MAX`].
    pub segments: u16,
    /// Where it starts in the slot.
    pub start_bytes: usize,
    /// Its length, at most [`TRAIN_BYTES_MAX`].
    pub len_bytes: usize,
    /// Bytes of each packet but the last, which may be shorter.
    pub segment_bytes: usize,
}

/// The train being built.
#[derive(Debug, Clone, Copy)]
struct Open {
    start_bytes: usize,
    segment_bytes: usize,
    segments: u16,
    to: SocketAddr,
}

/// Where `transmit` builds its GSO trains.
///
/// Packets lie back to back in a slot of 64 KiB, and a packet that does not fit the open train
/// starts the next one where it lies.
pub struct Trains<'a> {
    buffer: &'a mut dyn TrainBuffer<'a>,
    finished: Vec<Train>,
    /// What is left of the slot being filled.
    memory: &'a mut [u8],
    slot: u16,
    slot_bytes: usize,
    /// Trains that may still be built in the slot, the open one included.
    trains_left: usize,
    unsegmented: u16,
    socket: SocketId,
    source: Option<IpAddr>,
    /// Whether the selected socket's device segments.
    segments: bool,
    open: Option<Open>,
    /// Bytes that [`Self::packet`] gave and [`Self::push`] has not taken.
    offered_bytes: Option<usize>,
}

impl<'a> Trains<'a> {
    /// Trains in the memory of `buffer`, with the first socket selected. `list` is room for the
    /// finished ones, so that a caller can use it again; what is in it counts as finished.
    pub fn new(buffer: &'a mut dyn TrainBuffer<'a>, list: Vec<Train>) -> Self {
        Self {
            buffer,
            finished: list,
            memory: &mut [],
            slot: 0,
            slot_bytes: 0,
            trains_left: 0,
            unsegmented: 0,
            socket: SocketId::FIRST,
            source: None,
            segments: true,
            open: None,
            offered_bytes: None,
        }
    }

    /// Ends the open train and the use of the lent memory. Returns the trains that the buffer has
    /// not taken yet.
    #[must_use]
    pub fn end(mut self) -> Vec<Train> {
        self.finish();
        self.finished
    }

    /// Selects the socket that packets pushed from here on leave by, and ends the open train if it
    /// leaves by another. Each call of `transmit` begins with the first socket.
    ///
    /// A train for a socket that the shard does not own is dropped, and counted as an error of
    /// sending.
    #[inline]
    pub fn select(&mut self, socket: SocketId) {
        if socket != self.socket {
            self.finish();
            self.socket = socket;
            self.segments = !socket.is_in(self.unsegmented);
        }
    }

    /// The local address that packets pushed from here on leave from; ends the open train if it
    /// leaves from another. `None`, with which each call of `transmit` begins: the kernel chooses
    /// by the route. For a socket at an open address: a peer drops answers that come from another
    /// address than it asked.
    #[inline]
    pub fn set_source(&mut self, source: Option<IpAddr>) {
        if source != self.source {
            self.finish();
            self.source = source;
        }
    }

    /// A buffer of exactly `max_bytes` for the next packet; `None` when this turn's slots are used
    /// up, and the rest must wait for the next turn. Asking again without a push gives the same
    /// place.
    ///
    /// Always ask for the full packet size: a protocol offered less splits its frames to fit.
    ///
    /// # Panics
    /// When `max_bytes` exceeds [`TRAIN_BYTES_MAX`].
    #[inline]
    pub fn packet(&mut self, max_bytes: usize) -> Option<&mut [u8]> {
        if !self.has_room(max_bytes) {
            self.next_slot(max_bytes)?;
        }
        self.offered_bytes = Some(max_bytes);
        self.memory.get_mut(..max_bytes)
    }

    /// Sends the first `len_bytes` of the buffer that [`Self::packet`] gave.
    ///
    /// # Panics
    /// When that buffer was shorter, or none was asked for.
    #[inline]
    pub fn push(&mut self, len_bytes: usize, to: SocketAddr) {
        if !self.extends(len_bytes, to) {
            self.finish();
            self.start(len_bytes, to);
        } else if self.extend(len_bytes) {
            self.finish();
        }
    }

    /// Ends the open train. Call it between connections that may share a peer's address: a train is
    /// steered as a whole, by its first packet's connection ID.
    #[inline]
    pub fn finish(&mut self) {
        let Some(open) = self.open.take() else { return };
        self.trains_left -= 1;
        self.finished.push(Train {
            socket: self.socket,
            to: open.to,
            source: self.source,
            slot: self.slot,
            segments: open.segments,
            start_bytes: open.start_bytes,
            len_bytes: self.used_bytes() - open.start_bytes,
            segment_bytes: open.segment_bytes,
        });
    }

    /// Whether the next packet fits the slot being filled and may start a train.
    #[inline]
    fn has_room(&self, max_bytes: usize) -> bool {
        // One for the open train, one for a train that this packet may start.
        max_bytes <= self.memory.len() && self.trains_left > usize::from(self.open.is_some())
    }

    #[cold]
    fn next_slot(&mut self, max_bytes: usize) -> Option<()> {
        assert!(
            max_bytes <= TRAIN_BYTES_MAX,
            "no datagram has {max_bytes} bytes"
        );
        self.finish();
        self.memory = &mut [];
        self.trains_left = 0;
        self.offered_bytes = None;
        let slot = self.buffer.next_slot(&mut self.finished)?;
        self.slot = slot.index;
        self.slot_bytes = slot.memory.len().min(TRAIN_BYTES_MAX);
        self.memory = &mut slot.memory[..self.slot_bytes];
        self.trains_left = slot.trains_max;
        self.unsegmented = slot.unsegmented;
        self.segments = !self.socket.is_in(slot.unsegmented);
        self.has_room(max_bytes).then_some(())
    }

    /// Whether a packet of `len_bytes` to `to` extends the open train.
    #[inline]
    fn extends(&self, len_bytes: usize, to: SocketAddr) -> bool {
        self.segments
            && self
                .open
                .is_some_and(|open| len_bytes <= open.segment_bytes && open.to == to)
    }

    /// Adds the offered packet to the open train; true when that ends it.
    #[inline]
    fn extend(&mut self, len_bytes: usize) -> bool {
        self.take_offered(len_bytes);
        let Some(open) = self.open.as_mut() else {
            return false;
        };
        open.segments += 1;
        len_bytes < open.segment_bytes || open.segments == SEGMENTS_MAX
    }

    /// Starts a train with the offered packet; the one before it is finished.
    #[inline]
    fn start(&mut self, len_bytes: usize, to: SocketAddr) {
        let start_bytes = self.used_bytes();
        self.take_offered(len_bytes);
        self.open = Some(Open {
            start_bytes,
            segment_bytes: len_bytes,
            segments: 1,
            to,
        });
    }

    #[inline]
    fn take_offered(&mut self, len_bytes: usize) {
        let offered_bytes = self.offered_bytes.take();
        assert!(
            offered_bytes.is_some_and(|offered| len_bytes <= offered),
            "pushed {len_bytes} bytes of {offered_bytes:?} offered"
        );
        let memory = std::mem::take(&mut self.memory);
        self.memory = memory.get_mut(len_bytes..).unwrap_or_default();
    }

    /// Bytes of the slot that packets lie in.
    #[inline]
    fn used_bytes(&self) -> usize {
        self.slot_bytes - self.memory.len()
    }
}

impl fmt::Debug for Trains<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trains")
            .field("finished", &self.finished.len())
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}
