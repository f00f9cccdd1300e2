//! The streams that one side of a connection receives on.
//!
//! Invariants
//! 1. A byte is handed over once and in order, whatever arrives twice or early.
//! 2. What is held is bounded by the windows that the peer was given: bytes of a stream, bytes of
//!    all, streams. A peer beyond them is cut off.

use std::collections::{BTreeMap, BTreeSet};

use millrace_transport::driver::{StreamBuffer, StreamError};

use super::packet::Frame;

#[derive(Debug, Default)]
struct Stream {
    /// Bytes read by the code above.
    read: u64,
    /// Parts that arrived and were not read, by offset; they may overlap.
    parts: BTreeMap<u64, StreamBuffer>,
    /// The highest offset that arrived.
    end: u64,
    /// How long the stream is, once that is known.
    final_bytes: Option<u64>,
    is_reset: bool,
    /// What the peer may send.
    max: u64,
}

impl Stream {
    fn is_readable(&self) -> bool {
        let has_bytes = || {
            let first = self.parts.first_key_value();
            first.is_some_and(|(offset, _)| *offset <= self.read)
        };
        self.is_reset || self.final_bytes == Some(self.read) || has_bytes()
    }

    /// Keeps a part, or what is there already from this offset if that is longer.
    fn hold(&mut self, offset: u64, part: StreamBuffer) {
        let held = self.parts.get(&offset).map(|held| held.as_ref().len());
        if held.is_none_or(|held| held < part.as_ref().len()) {
            self.parts.insert(offset, part);
        }
    }

    /// Hands the next bytes to `take`, at most `len`; how many there were.
    fn read(&mut self, len: usize, mut take: impl FnMut(&[u8])) -> usize {
        let mut total = 0;
        while total < len
            && let Some(entry) = self.parts.first_entry()
            && *entry.key() <= self.read
        {
            let (offset, mut part) = entry.remove_entry();
            let skipped = (self.read - offset) as usize;
            if skipped >= part.as_ref().len() {
                continue;
            }
            let fresh = &part.as_ref()[skipped..];
            let now = fresh.len().min(len - total);
            take(&fresh[..now]);
            total += now;
            self.read += now as u64;
            if skipped + now < part.as_ref().len() {
                let rest = part.split_at(skipped + now);
                self.hold(self.read, rest);
            }
        }
        total
    }
}

/// Windows that a peer is given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Windows {
    pub(crate) connection_bytes: u64,
    pub(crate) stream_bytes: u64,
    pub(crate) streams: u64,
}

/// The peer sent more than it may (RFC 9000, 11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Violation;

/// All streams that one side receives on.
#[derive(Debug)]
pub(crate) struct ReceiveStreams {
    /// The lowest bits of the peer's stream ids.
    kind: u64,
    windows: Windows,
    streams: BTreeMap<u64, Stream>,
    readable: BTreeSet<u64>,
    /// Streams that the peer opened, and of them those that are over.
    opened: u64,
    ended: u64,
    /// Streams that the peer may open.
    streams_max: u64,
    /// Bytes that arrived first, at their highest offsets, and bytes that were read or thrown away.
    received: u64,
    consumed: u64,
    /// Bytes that the peer may send in all.
    max: u64,
    /// Limits to be told.
    updates: Vec<Frame>,
}

impl ReceiveStreams {
    pub(crate) fn new(is_server: bool, windows: Windows) -> Self {
        Self {
            kind: if is_server { 2 } else { 3 },
            windows,
            streams: BTreeMap::new(),
            readable: BTreeSet::new(),
            opened: 0,
            ended: 0,
            streams_max: windows.streams,
            received: 0,
            consumed: 0,
            max: windows.connection_bytes,
            updates: Vec::new(),
        }
    }

    /// The stream of a frame; none when it is over.
    fn stream(&mut self, id: u64) -> Result<Option<&mut Stream>, Violation> {
        let number = id / 4 + 1;
        if id % 4 != self.kind || number > self.streams_max {
            return Err(Violation);
        }
        // A frame opens all streams of its kind below it too (RFC 9000, 3.2).
        while self.opened < number {
            let stream = Stream {
                max: self.windows.stream_bytes,
                ..Stream::default()
            };
            self.streams.insert(self.opened * 4 + self.kind, stream);
            self.opened += 1;
        }
        Ok(self.streams.get_mut(&id))
    }

    /// Takes a STREAM frame in.
    pub(crate) fn on_stream(
        &mut self,
        id: u64,
        offset: u64,
        bytes: StreamBuffer,
        fin: bool,
    ) -> Result<(), Violation> {
        let end = offset + bytes.as_ref().len() as u64;
        let Some(stream) = self.stream(id)? else {
            return Ok(());
        };
        if end > stream.max || stream.final_bytes.is_some_and(|last| end > last) {
            return Err(Violation);
        }
        if stream.is_reset {
            return Ok(());
        }
        let new = end.saturating_sub(stream.end);
        stream.end = stream.end.max(end);
        if fin {
            stream.final_bytes = Some(end);
        }
        if end > stream.read && offset < end {
            stream.hold(offset, bytes);
        }
        if stream.is_readable() {
            self.readable.insert(id);
        }
        self.received += new;
        if self.received > self.max {
            return Err(Violation);
        }
        Ok(())
    }

    /// Takes a RESET_STREAM frame in: what has not been read of the stream is gone.
    pub(crate) fn on_reset(&mut self, id: u64, final_bytes: u64) -> Result<(), Violation> {
        let Some(stream) = self.stream(id)? else {
            return Ok(());
        };
        if stream.is_reset || final_bytes < stream.end {
            return Ok(());
        }
        stream.is_reset = true;
        stream.parts.clear();
        let (unreceived, unread) = (final_bytes - stream.end, final_bytes - stream.read);
        stream.end = final_bytes;
        self.received += unreceived;
        self.consumed += unread;
        self.readable.insert(id);
        self.raise_limits();
        Ok(())
    }

    pub(crate) fn next_readable(&mut self) -> Option<u64> {
        self.readable.pop_first()
    }

    /// Hands the next bytes of a stream to `take`; how many, and whether the stream is over.
    pub(crate) fn read(
        &mut self,
        id: u64,
        len: usize,
        take: impl FnMut(&[u8]),
    ) -> Result<(usize, bool), StreamError> {
        let stream = self.streams.get_mut(&id).ok_or(StreamError::Ended)?;
        if stream.is_reset {
            self.end(id);
            self.raise_limits();
            return Err(StreamError::Ended);
        }
        if !stream.is_readable() {
            self.readable.remove(&id);
            return Err(StreamError::Blocked);
        }
        let read = stream.read(len, take);
        let is_over = stream.final_bytes == Some(stream.read);
        self.consumed += read as u64;
        if is_over {
            self.end(id);
        } else if stream.final_bytes.is_none()
            && stream.max - stream.read < self.windows.stream_bytes / 2
        {
            stream.max = stream.read + self.windows.stream_bytes;
            let max = stream.max;
            self.updates.push(Frame::MaxStreamData { id, max });
        }
        self.raise_limits();
        Ok((read, is_over))
    }

    fn end(&mut self, id: u64) {
        self.streams.remove(&id);
        self.readable.remove(&id);
        self.ended += 1;
    }

    fn raise_limits(&mut self) {
        if self.max - self.consumed < self.windows.connection_bytes / 2 {
            self.max = self.consumed + self.windows.connection_bytes;
            self.updates.push(Frame::MaxData(self.max));
        }
        if self.streams_max - self.ended < self.windows.streams.div_ceil(2) {
            self.streams_max = self.ended + self.windows.streams;
            self.updates.push(Frame::MaxStreams(self.streams_max));
        }
    }

    /// The next new limit.
    pub(crate) fn next_frame(&mut self) -> Option<Frame> {
        self.updates.pop()
    }

    /// A limit was lost: the newest takes its place.
    pub(crate) fn on_lost(&mut self, frame: &Frame) {
        match frame {
            Frame::MaxData(_) => self.updates.push(Frame::MaxData(self.max)),
            Frame::MaxStreams(_) => self.updates.push(Frame::MaxStreams(self.streams_max)),
            Frame::MaxStreamData { id, .. } => {
                if let Some(stream) = self.streams.get(id) {
                    let (id, max) = (*id, stream.max);
                    self.updates.push(Frame::MaxStreamData { id, max });
                }
            }
            _ => {}
        }
    }
}
