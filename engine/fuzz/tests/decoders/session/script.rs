//! A script: the actions of a member on its connection, and the path on which they arrive.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use millrace_transport::driver::{PathStats, StreamBuffer, StreamError, StreamPath};

/// A record that does not belong to a stream is a datagram.
pub(super) const DATAGRAM: u8 = 0xff;

/// What a record does besides bringing its bytes: the lower bits of its action.
pub(super) const FIN: u8 = 1;
pub(super) const RESET: u8 = 2;
/// The peer stops reading what we send (STOP_SENDING), and its connection rests for a while.
pub(super) const STOP: u8 = 4;
pub(super) const WAIT: u8 = 8;
/// The bytes arrive 32 times over, so that a short input has a large body.
pub(super) const REPEAT: u8 = 16;
pub(super) const REPEATS: usize = 32;

/// One record.
pub(super) struct Record<'i> {
    pub(super) stream: u8,
    pub(super) action: u8,
    pub(super) bytes: &'i [u8],
}

impl Record<'_> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let length = (self.bytes.len() as u16).to_le_bytes();
        [&[self.stream, self.action], &length[..], self.bytes].concat()
    }
}

/// The records of an input; the last one may be short.
pub(super) fn records(mut input: &[u8]) -> impl Iterator<Item = Record<'_>> {
    std::iter::from_fn(move || {
        let ([stream, action, l0, l1], rest) = input.split_first_chunk()?;
        let length = usize::from(u16::from_le_bytes([*l0, *l1])).min(rest.len());
        let (bytes, rest) = rest.split_at(length);
        input = rest;
        Some(Record {
            stream: *stream,
            action: *action,
            bytes,
        })
    })
}

/// The id of a stream that the peer, a client, opens: unidirectional, but for one (RFC 9000, 2.1).
fn stream_id(number: u8) -> u64 {
    match number {
        0xfe => 0,
        number => 2 + 4 * u64::from(number),
    }
}

/// What has arrived of a stream and was not read.
#[derive(Default)]
struct Arrived {
    bytes: VecDeque<u8>,
    fin: bool,
    is_reset: bool,
}

/// A path on which a script arrives, and which takes all that is sent.
#[derive(Default)]
pub(super) struct Scripted {
    arrived: BTreeMap<u64, Arrived>,
    readable: VecDeque<u64>,
    datagrams: VecDeque<Vec<u8>>,
    /// Streams of ours that the peer stopped.
    stopped: Vec<u64>,
    opened: Vec<u64>,
    is_stopping: bool,
    received: usize,
    sent: usize,
}

impl Scripted {
    pub(super) fn arrive(&mut self, record: &Record<'_>) {
        self.received += 1;
        self.is_stopping = record.action & STOP != 0;
        if self.is_stopping {
            self.stopped.append(&mut self.opened);
        }
        if record.stream == DATAGRAM {
            return self.datagrams.push_back(record.bytes.to_vec());
        }
        let id = stream_id(record.stream);
        let stream = self.arrived.entry(id).or_default();
        // A stream that has ended brings nothing more.
        if stream.fin || stream.is_reset {
            return;
        }
        let times = match record.action & REPEAT {
            0 => 1,
            _ => REPEATS,
        };
        for _ in 0..times {
            stream.bytes.extend(record.bytes);
        }
        stream.fin = record.action & FIN != 0;
        stream.is_reset = record.action & RESET != 0;
        self.readable.push_back(id);
    }

    fn take(&mut self, stream: u64, out: &mut [u8]) -> Result<(usize, bool), StreamError> {
        let arrived = self.arrived.get_mut(&stream).ok_or(StreamError::Blocked)?;
        if arrived.is_reset {
            return Err(StreamError::Ended);
        }
        let taken = out.len().min(arrived.bytes.len());
        for (to, from) in out.iter_mut().zip(arrived.bytes.drain(..taken)) {
            *to = from;
        }
        let fin = arrived.fin && arrived.bytes.is_empty();
        if taken == 0 && !fin {
            return Err(StreamError::Blocked);
        }
        if fin {
            // A reader behind the end hears that the stream is gone.
            arrived.is_reset = true;
        }
        Ok((taken, fin))
    }
}

impl StreamPath for Scripted {
    fn stream_priority(&mut self, stream: u64, _urgency: u8) -> Result<(), StreamError> {
        self.opened.push(stream);
        Ok(())
    }

    fn stream_send(&mut self, stream: u64, bytes: &[u8], _fin: bool) -> Result<usize, StreamError> {
        if self.stopped.contains(&stream) {
            return Err(StreamError::Stopped);
        }
        self.sent += 1;
        Ok(bytes.len())
    }

    fn stream_send_buffer(
        &mut self,
        stream: u64,
        buffer: StreamBuffer,
        fin: bool,
    ) -> Result<usize, StreamError> {
        self.stream_send(stream, buffer.as_ref(), fin)
    }

    fn stream_capacity(&mut self, stream: u64) -> Result<usize, StreamError> {
        match self.stopped.contains(&stream) {
            true => Err(StreamError::Stopped),
            false => Ok(1 << 20),
        }
    }

    fn stream_reset(&mut self, _stream: u64, _code: u64) {}

    fn stream_recv(&mut self, stream: u64, out: &mut [u8]) -> Result<(usize, bool), StreamError> {
        self.take(stream, out)
    }

    fn stream_discard(&mut self, stream: u64, len: usize) -> Result<(usize, bool), StreamError> {
        let arrived = self.arrived.get(&stream).map_or(0, |a| a.bytes.len());
        self.take(stream, &mut vec![0; len.min(arrived)])
    }

    fn stream_readable_next(&mut self) -> Option<u64> {
        self.readable.pop_front()
    }

    fn stream_writable_next(&mut self) -> Option<u64> {
        None
    }

    fn streams_left(&self) -> u64 {
        100
    }

    fn datagram_send(&mut self, _datagram: Vec<u8>) {}

    fn datagram_recv(&mut self) -> Option<Vec<u8>> {
        self.datagrams.pop_front()
    }

    fn send_ping(&mut self) -> bool {
        true
    }

    fn stats(&self) -> PathStats {
        PathStats {
            sent: self.sent,
            received: self.received,
            lost: 0,
            rtt: Some(Duration::from_millis(1)),
        }
    }
}
