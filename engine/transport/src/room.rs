//! A path for tests: it takes so many bytes of messages, and holds them until the test says that
//! the peer acknowledged them.

use std::collections::{BTreeMap, VecDeque};

use crate::buffers::StreamBuffer;
use crate::path::{PathStats, StreamError, StreamPath};

/// The path.
#[derive(Debug)]
pub(crate) struct Room {
    /// Bytes that it takes, and streams that it opens.
    pub(crate) bytes: usize,
    pub(crate) streams: u64,
    /// What it took and holds, by stream.
    held: BTreeMap<u64, VecDeque<StreamBuffer>>,
    /// Streams that were reset.
    pub(crate) resets: Vec<u64>,
}

impl Room {
    pub(crate) fn of(bytes: usize) -> Self {
        Self {
            bytes,
            streams: 8,
            held: BTreeMap::new(),
            resets: Vec::new(),
        }
    }

    /// The streams of which something is held.
    pub(crate) fn holding(&self) -> Vec<u64> {
        let is_held = |(_, held): &(&u64, &VecDeque<StreamBuffer>)| !held.is_empty();
        self.held
            .iter()
            .filter(is_held)
            .map(|(id, _)| *id)
            .collect()
    }

    /// The peer acknowledges the first buffer that is held of a stream.
    pub(crate) fn acknowledge(&mut self, stream: u64) {
        let held = self.held.get_mut(&stream).and_then(VecDeque::pop_front);
        assert!(held.is_some(), "nothing is held of stream {stream}");
    }
}

impl StreamPath for Room {
    fn stream_priority(&mut self, _: u64, _: u8) -> Result<(), StreamError> {
        Ok(())
    }

    fn stream_send(&mut self, _: u64, bytes: &[u8], _: bool) -> Result<usize, StreamError> {
        Ok(bytes.len())
    }

    fn stream_send_buffer(
        &mut self,
        stream: u64,
        mut buffer: StreamBuffer,
        _: bool,
    ) -> Result<usize, StreamError> {
        let taken = self.bytes.min(buffer.as_ref().len());
        self.bytes -= taken;
        if taken == 0 {
            return Err(StreamError::Blocked);
        }
        drop(buffer.split_at(taken));
        self.held.entry(stream).or_default().push_back(buffer);
        Ok(taken)
    }

    fn stream_capacity(&mut self, _: u64) -> Result<usize, StreamError> {
        Ok(self.bytes)
    }

    fn stream_reset(&mut self, stream: u64, _: u64) {
        self.held.remove(&stream);
        self.resets.push(stream);
    }

    fn stream_recv(&mut self, _: u64, _: &mut [u8]) -> Result<(usize, bool), StreamError> {
        Err(StreamError::Blocked)
    }

    fn stream_discard(&mut self, _: u64, _: usize) -> Result<(usize, bool), StreamError> {
        Err(StreamError::Blocked)
    }

    fn stream_readable_next(&mut self) -> Option<u64> {
        None
    }

    fn stream_writable_next(&mut self) -> Option<u64> {
        None
    }

    fn streams_left(&self) -> u64 {
        self.streams
    }

    fn datagram_send(&mut self, _: Vec<u8>) {}

    fn datagram_recv(&mut self) -> Option<Vec<u8>> {
        None
    }

    fn send_ping(&mut self) -> bool {
        false
    }

    fn stats(&self) -> PathStats {
        unreachable!("what is sent asks for none")
    }
}
