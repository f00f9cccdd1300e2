//! Cuts a lane's bytes into frames.
//!
//! Called for every readable slice of a lane. Cost per frame: one header decode; a body is copied
//! only when it is spread over two slices.
//!
//! 1. What it keeps is one header and less than one body: at most
//!    `Header::BYTES + lane_body_bytes_max`.
//! 2. After an error it gives no more frames: where the next would start is unknown.

use super::{Carriage, FrameError, Header, Limits};

/// Incremental parser of one lane.
#[derive(Debug)]
pub struct LaneParser {
    limits: Limits,
    /// An unfinished header, or the unfinished body of `header`.
    tail: Vec<u8>,
    header: Option<Header>,
    failed: Option<FrameError>,
}

impl LaneParser {
    /// A parser at the start of a frame.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            tail: Vec::new(),
            header: None,
            failed: None,
        }
    }

    /// Bytes kept for the unfinished frame.
    pub fn kept_bytes(&self) -> usize {
        self.tail.len()
    }

    /// Takes the next bytes of the lane and hands over every frame that they complete.
    ///
    /// # Errors
    /// The first fault of the peer, in this call and in every later one: the connection must be
    /// closed. Frames before the fault have been handed over.
    pub fn push(
        &mut self,
        mut input: &[u8],
        on_frame: &mut impl FnMut(Header, &[u8]),
    ) -> Result<(), FrameError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        loop {
            let header = match self.header {
                Some(header) => header,
                None => {
                    let Some(bytes) = take_header(&mut self.tail, &mut input) else {
                        return Ok(());
                    };
                    match self.read_header(&bytes) {
                        Ok(header) => header,
                        Err(error) => {
                            self.failed = Some(error);
                            return Err(error);
                        }
                    }
                }
            };
            let body_bytes = header.body_bytes as usize;
            let missing = body_bytes - self.tail.len();
            let Some((body, rest)) = input.split_at_checked(missing) else {
                self.header = Some(header);
                self.tail.reserve_exact(body_bytes - self.tail.len());
                self.tail.extend_from_slice(input);
                return Ok(());
            };
            input = rest;
            self.header = None;
            if self.tail.is_empty() {
                on_frame(header, body);
            } else {
                self.tail.extend_from_slice(body);
                on_frame(header, &self.tail);
                self.tail.clear();
            }
        }
    }

    fn read_header(&self, bytes: &[u8; Header::BYTES]) -> Result<Header, FrameError> {
        let header = Header::decode(bytes)?;
        header.check(Carriage::Lane, &self.limits)?;
        Ok(header)
    }
}

/// A whole header from the tail and the input, or none and the input kept in the tail.
fn take_header(tail: &mut Vec<u8>, input: &mut &[u8]) -> Option<[u8; Header::BYTES]> {
    if tail.is_empty() {
        if let Some((bytes, rest)) = input.split_first_chunk() {
            *input = rest;
            return Some(*bytes);
        }
        tail.extend_from_slice(input);
        return None;
    }
    let missing = Header::BYTES - tail.len();
    let (head, rest) = input.split_at(missing.min(input.len()));
    tail.extend_from_slice(head);
    *input = rest;
    let bytes = tail.as_slice().try_into().ok()?;
    tail.clear();
    Some(bytes)
}
