//! The streams that one side of a connection sends on.
//!
//! Invariants
//! 1. A stream's bytes are held as the buffers they came in until the peer acknowledged them, and
//!    leave in slices of them: nothing is copied.
//! 2. Bytes are offered to packets in order of urgency, then of stream id, as quiche does.
//! 3. The peer's limits hold: bytes of each stream, bytes of all, streams.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use millrace_transport::driver::{StreamBuffer, StreamError};

use super::packet::Frame;

/// What a stream frame adds to its bytes in a packet.
const STREAM_FRAME_BYTES: u64 = 12;

#[derive(Debug)]
struct Stream {
    urgency: u8,
    /// Bytes taken from the code above.
    taken: u64,
    /// Of them, bytes that were put into a packet.
    sent: u64,
    /// Those that were not.
    unsent: VecDeque<StreamBuffer>,
    has_fin: bool,
    is_fin_sent: bool,
    /// What the peer lets the stream bring.
    max: u64,
    /// Parts to be sent again, by offset.
    lost: BTreeMap<u64, (StreamBuffer, bool)>,
    /// Frames in flight.
    in_flight: u32,
    is_reset: bool,
}

impl Stream {
    fn wants_to_send(&self) -> bool {
        let has_bytes = !self.unsent.is_empty() || (self.has_fin && !self.is_fin_sent);
        !self.is_reset && (has_bytes || !self.lost.is_empty())
    }

    fn is_done(&self) -> bool {
        self.in_flight == 0 && (self.is_reset || (self.is_fin_sent && self.lost.is_empty()))
    }

    /// The next part, at most `room_bytes` of it.
    fn next_part(&mut self, room_bytes: usize) -> Option<(u64, StreamBuffer, bool)> {
        if let Some((offset, (mut bytes, fin))) = self.lost.pop_first() {
            let len = bytes.as_ref().len();
            if len > room_bytes {
                let rest = bytes.split_at(room_bytes);
                self.lost.insert(offset + room_bytes as u64, (rest, fin));
                return Some((offset, bytes, false));
            }
            return Some((offset, bytes, fin));
        }
        let offset = self.sent;
        let bytes = match self.unsent.pop_front() {
            Some(mut bytes) => {
                if bytes.as_ref().len() > room_bytes {
                    let rest = bytes.split_at(room_bytes);
                    self.unsent.push_front(rest);
                }
                bytes
            }
            None if self.has_fin && !self.is_fin_sent => StreamBuffer::default(),
            None => return None,
        };
        self.sent += bytes.as_ref().len() as u64;
        self.is_fin_sent = self.has_fin && self.unsent.is_empty();
        Some((offset, bytes, self.is_fin_sent))
    }
}

/// Limits that hold before the peer raises them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SendLimits {
    pub(crate) connection_bytes: u64,
    pub(crate) stream_bytes: u64,
    pub(crate) streams: u64,
}

/// All streams that one side sends on.
#[derive(Debug)]
pub(crate) struct SendStreams {
    /// The lowest bits of our stream ids (RFC 9000, 2.1).
    kind: u64,
    limits: SendLimits,
    streams: BTreeMap<u64, Stream>,
    /// Streams with something to send, by urgency, then id.
    ready: BTreeSet<(u8, u64)>,
    /// Streams opened, and streams below them that were left out: a lane is opened when it is used.
    opened: u64,
    left_out: BTreeSet<u64>,
    /// Bytes taken on all streams.
    taken: u64,
    /// Of them, bytes that no packet has carried yet.
    unsent: u64,
    resets: Vec<Frame>,
}

impl SendStreams {
    pub(crate) fn new(is_server: bool, limits: SendLimits) -> Self {
        Self {
            kind: if is_server { 3 } else { 2 },
            limits,
            streams: BTreeMap::new(),
            ready: BTreeSet::new(),
            opened: 0,
            left_out: BTreeSet::new(),
            taken: 0,
            unsent: 0,
            resets: Vec::new(),
        }
    }

    pub(crate) fn is_server(&self) -> bool {
        self.kind == 3
    }

    /// Streams that may be opened now.
    pub(crate) fn left(&self) -> u64 {
        self.limits.streams - self.opened
    }

    /// Bytes that wait for their first packet.
    pub(crate) fn unsent(&self) -> u64 {
        self.unsent
    }

    /// The peer lets all streams bring so many bytes.
    pub(crate) fn on_max_data(&mut self, max: u64) {
        self.limits.connection_bytes = self.limits.connection_bytes.max(max);
    }

    /// The peer lets one stream bring so many bytes.
    pub(crate) fn on_max_stream_data(&mut self, id: u64, max: u64) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.max = stream.max.max(max);
        }
    }

    /// The peer lets so many streams be opened.
    pub(crate) fn on_max_streams(&mut self, max: u64) {
        self.limits.streams = self.limits.streams.max(max);
    }

    /// Opens the stream if it is to be; an error for one beyond the limit, or of the peer's.
    fn open(&mut self, id: u64) -> Result<Option<&mut Stream>, StreamError> {
        let number = id / 4 + 1;
        if id % 4 != self.kind || number > self.limits.streams {
            return Err(StreamError::Ended);
        }
        let is_new = number > self.opened;
        if is_new {
            self.left_out.extend(self.opened + 1..number);
            self.opened = number;
        }
        if is_new || self.left_out.remove(&number) {
            let stream = Stream {
                // As quiche's default.
                urgency: 127,
                taken: 0,
                sent: 0,
                unsent: VecDeque::new(),
                has_fin: false,
                is_fin_sent: false,
                max: self.limits.stream_bytes,
                lost: BTreeMap::new(),
                in_flight: 0,
                is_reset: false,
            };
            self.streams.insert(id, stream);
        }
        Ok(self.streams.get_mut(&id))
    }

    pub(crate) fn set_urgency(&mut self, id: u64, urgency: u8) -> Result<(), StreamError> {
        let Some(stream) = self.open(id)? else {
            return Ok(());
        };
        let before = std::mem::replace(&mut stream.urgency, urgency);
        if self.ready.remove(&(before, id)) {
            self.ready.insert((urgency, id));
        }
        Ok(())
    }

    /// Bytes that a stream takes now, when the connection takes `room_bytes`.
    pub(crate) fn capacity(&self, id: u64, room_bytes: u64) -> Result<usize, StreamError> {
        let stream = self.streams.get(&id).ok_or(StreamError::Ended)?;
        if stream.is_reset {
            return Err(StreamError::Ended);
        }
        let of_peer = self.limits.connection_bytes - self.taken;
        let of_stream = stream.max - stream.taken;
        Ok(of_peer.min(of_stream).min(room_bytes) as usize)
    }

    /// Takes what fits of a buffer.
    pub(crate) fn push(
        &mut self,
        id: u64,
        mut buffer: StreamBuffer,
        fin: bool,
        room_bytes: u64,
    ) -> Result<usize, StreamError> {
        self.open(id)?;
        let capacity = self.capacity(id, room_bytes)?;
        let stream = self.streams.get_mut(&id).ok_or(StreamError::Ended)?;
        if stream.has_fin {
            return Err(StreamError::Ended);
        }
        let len = buffer.as_ref().len();
        if capacity == 0 && len > 0 {
            return Err(StreamError::Blocked);
        }
        let taken = len.min(capacity);
        if taken < len {
            // The caller keeps a reference to what does not fit.
            drop(buffer.split_at(taken));
        }
        stream.has_fin = fin && taken == len;
        stream.taken += taken as u64;
        if taken > 0 {
            stream.unsent.push_back(buffer);
        }
        self.taken += taken as u64;
        self.unsent += taken as u64;
        if stream.wants_to_send() {
            self.ready.insert((stream.urgency, id));
        }
        Ok(taken)
    }

    /// Ends a stream without its rest.
    pub(crate) fn reset(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if stream.is_reset || stream.is_done() {
            return;
        }
        stream.is_reset = true;
        // The bytes that no packet carried are given back to the limits.
        let unsent = stream.taken - stream.sent;
        self.unsent -= unsent;
        self.taken -= unsent;
        stream.unsent.clear();
        stream.lost.clear();
        self.ready.remove(&(stream.urgency, id));
        let final_bytes = stream.sent;
        self.resets.push(Frame::ResetStream { id, final_bytes });
    }

    /// Whether a packet would have something to carry.
    pub(crate) fn wants_to_send(&self) -> bool {
        !self.ready.is_empty() || !self.resets.is_empty()
    }

    /// The next frame, of at most `room_bytes` in a packet.
    pub(crate) fn next_frame(&mut self, room_bytes: u64) -> Option<Frame> {
        if let Some(reset) = self.resets.pop() {
            if let Frame::ResetStream { id, .. } = &reset
                && let Some(stream) = self.streams.get_mut(id)
            {
                stream.in_flight += 1;
            }
            return Some(reset);
        }
        let room_bytes = room_bytes
            .checked_sub(STREAM_FRAME_BYTES)
            .filter(|room| *room > 0)?;
        let (urgency, id) = self.ready.first().copied()?;
        let stream = self.streams.get_mut(&id)?;
        let sent = stream.sent;
        let part = stream.next_part(room_bytes as usize);
        self.unsent -= stream.sent - sent;
        if !stream.wants_to_send() {
            self.ready.remove(&(urgency, id));
        }
        let (offset, bytes, fin) = part?;
        stream.in_flight += 1;
        Some(Frame::Stream {
            id,
            offset,
            bytes,
            fin,
        })
    }

    /// A frame of a stream arrived.
    pub(crate) fn on_acked(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        stream.in_flight -= 1;
        if stream.is_done() {
            self.streams.remove(&id);
        }
    }

    /// A frame of a stream was lost: it is sent again, unless the stream was reset since.
    pub(crate) fn on_lost(&mut self, frame: Frame) {
        match frame {
            Frame::Stream {
                id,
                offset,
                bytes,
                fin,
            } => {
                let Some(stream) = self.streams.get_mut(&id) else {
                    return;
                };
                stream.in_flight -= 1;
                if !stream.is_reset {
                    stream.lost.insert(offset, (bytes, fin));
                    self.ready.insert((stream.urgency, id));
                }
            }
            reset @ Frame::ResetStream { id, .. } => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.in_flight -= 1;
                    self.resets.push(reset);
                }
            }
            _ => {}
        }
    }
}
