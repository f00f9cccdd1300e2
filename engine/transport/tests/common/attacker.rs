//! What floods are made of: frames, streams and IDs that a bare client sends again and again.
#![allow(dead_code, reason = "each test crate uses a part of it")]

use millrace_protocol::frame::{Class, Header, Kind, Method};

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
