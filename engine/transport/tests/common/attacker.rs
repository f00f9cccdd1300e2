//! What floods are made of: frames, streams and IDs that a bare client sends again and again.
#![allow(dead_code, reason = "each test crate uses a part of it")]

use millrace_protocol::frame::{Class, Header, Kind, Method, StreamKind};

use super::raw::Raw;

pub(crate) fn header(kind: Kind, method: Method, id: u32, body_bytes: u32) -> Header {
    Header {
        kind,
        class: Class::Normal,
        method,
        id,
        body_bytes,
        arg: 60_000,
    }
}

/// The same frame again and again on a lane, as fast as it goes.
pub(crate) struct Lane {
    pub(crate) stream: u64,
    bytes: Vec<u8>,
    /// What is sent first.
    at: usize,
}

impl Lane {
    /// Frames that one write brings at most.
    const FRAMES: usize = 4_096;

    pub(crate) fn of(frame: Header) -> Self {
        let mut bytes = vec![1];
        bytes.extend(frame.encode().repeat(Self::FRAMES));
        Self {
            stream: Raw::stream(0),
            bytes,
            at: 0,
        }
    }

    pub(crate) fn send(&mut self, raw: &mut Raw) {
        if let Ok(sent) = raw
            .quic
            .stream_send(self.stream, &self.bytes[self.at..], false)
        {
            self.at += sent;
        }
        if self.at == self.bytes.len() {
            // Behind the byte that says what the stream is.
            self.at = 1;
        }
    }
}

/// Gives up the oldest connection ID, if the victim has given another one.
pub(crate) fn retire_one(raw: &mut Raw, oldest: &mut u64) {
    if raw.quic.available_dcids() == 0 {
        return;
    }
    let retired = (*oldest..*oldest + 4).find(|seq| raw.quic.retire_dcid(*seq).is_ok());
    if let Some(seq) = retired {
        *oldest = seq + 1;
    }
}

/// Opens all streams that the victim allows, from number `next` on, and resets them: half of them
/// in the middle of a message, the others before their first byte.
pub(crate) fn open_and_reset(raw: &mut Raw, method: Method, next: &mut u64) {
    let mut open = Vec::new();
    while raw.quic.peer_streams_left_uni() > 0 {
        let stream = Raw::stream(*next);
        *next += 1;
        let header = header(Kind::Request, method, *next as u32, 20_000);
        let begin = [&[StreamKind::Message.encode()][..], &header.encode()].concat();
        let taken = if next.is_multiple_of(2) {
            begin.len()
        } else {
            0
        };
        raw.quic.stream_send(stream, &begin[..taken], false).ok();
        open.push(stream);
    }
    for (packet, to) in raw.outgoing() {
        raw.send_datagram(&packet, to);
    }
    for stream in open {
        let write = quiche::Shutdown::Write;
        raw.quic.stream_shutdown(stream, write, 0).ok();
    }
}
