//! The unit of the wire on lanes and message streams: a 16-byte header, then the body.
//!
//! Read and written once per message, so by hand: fixed offsets, little endian, no allocation.
//!
//! ```text
//! 0       1       2         4          8            12
//! | kind  | class | method  | id       | body_bytes | arg        | body ...
//! ```
//!
//! 1. A header of unknown kind or class, or with a size above the limit of its lane or stream, is
//!    an error before one byte of its body is kept.
//! 2. [`LaneParser`] keeps at most one unfinished frame, and hands over without a copy every body
//!    that lies whole in the slice it was given.

mod hello;
mod lane;

pub use hello::{Hello, HelloError, Negotiated, VersionRange};
pub use lane::LaneParser;

use thiserror::Error;

/// What a peer's bytes have wrong. Always the peer's fault: the connection is closed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameError {
    /// A kind that this version does not have.
    #[error("unknown frame kind {0}")]
    PeerUnknownKind(u8),
    /// A class that this version does not have.
    #[error("unknown traffic class {0}")]
    PeerUnknownClass(u8),
    /// A stream that opens with an unknown byte.
    #[error("unknown stream kind {0}")]
    PeerUnknownStreamKind(u8),
    /// A body above the limit of its carriage.
    #[error("body of {body_bytes} bytes, at most {max_bytes} are allowed here")]
    PeerBodyTooLong {
        /// Announced.
        body_bytes: u32,
        /// Allowed.
        max_bytes: u32,
    },
    /// A frame of a kind that does not travel on this carriage.
    #[error("a {0:?} frame does not belong here")]
    PeerMisplaced(Kind),
}

impl FrameError {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::PeerUnknownKind(_) => "peer_unknown_kind",
            Self::PeerUnknownClass(_) => "peer_unknown_class",
            Self::PeerUnknownStreamKind(_) => "peer_unknown_stream_kind",
            Self::PeerBodyTooLong { .. } => "peer_body_too_long",
            Self::PeerMisplaced(_) => "peer_misplaced_frame",
        }
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// First frame of each side; body is a [`Hello`].
    Hello = 1,
    /// Asks for a response; `arg` is the deadline in milliseconds.
    Request = 2,
    /// Answers the request with the same id.
    Response = 3,
    /// Answers the request with the same id; `arg` is a [`FailureCode`].
    Failure = 4,
    /// The asker no longer wants the response to the request with this id.
    Cancel = 5,
    /// A message without an answer.
    Send = 6,
    /// Asks for a [`Kind::ProbeReply`] with the same `arg`, the sequence number. In a datagram its
    /// body is padding.
    Probe = 7,
    /// Answers a probe.
    ProbeReply = 8,
}

impl Kind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Hello,
        Self::Request,
        Self::Response,
        Self::Failure,
        Self::Cancel,
        Self::Send,
        Self::Probe,
        Self::ProbeReply,
    ];

    fn from_byte(byte: u8) -> Result<Self, FrameError> {
        let index = usize::from(byte).wrapping_sub(1);
        Self::ALL
            .get(index)
            .copied()
            .ok_or(FrameError::PeerUnknownKind(byte))
    }
}

/// Order of importance of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Someone waits: goes first.
    Latency = 0,
    /// The rest.
    Normal = 1,
    /// Bodies: never delays latency by more than one train.
    Bulk = 2,
}

impl Class {
    /// All classes, most urgent first.
    pub const ALL: [Self; 3] = [Self::Latency, Self::Normal, Self::Bulk];

    /// Position in tables with one entry per class.
    pub fn index(self) -> usize {
        self as usize
    }

    /// Metric label.
    pub fn label(self) -> &'static str {
        ["latency", "normal", "bulk"][self.index()]
    }

    fn from_byte(byte: u8) -> Result<Self, FrameError> {
        Self::ALL
            .get(usize::from(byte))
            .copied()
            .ok_or(FrameError::PeerUnknownClass(byte))
    }
}

/// What a request or a message is about; numbers are given out by the layers above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Method(pub u16);

/// Why a request failed, as its server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FailureCode {
    /// Not now: the peer has too many requests in flight, fills its share of the server's memory,
    /// or the server has no memory or no place in a queue. Ask again later or elsewhere.
    Busy,
    /// No handler for the method.
    UnknownMethod,
    /// The handler does not have what was asked for.
    NotFound,
    /// The handler could not read the request.
    Malformed,
    /// Never: the body is larger than the server takes from one peer.
    TooLarge,
    /// The deadline passed before the handler was done, or the request's body stood still.
    DeadlineExceeded,
    /// The server goes away.
    ShuttingDown,
    /// The handler failed for reasons of its own.
    Internal,
    /// A code of a later version.
    Other(u32),
}

impl FailureCode {
    const KNOWN: [Self; 8] = [
        Self::Busy,
        Self::UnknownMethod,
        Self::NotFound,
        Self::Malformed,
        Self::TooLarge,
        Self::DeadlineExceeded,
        Self::ShuttingDown,
        Self::Internal,
    ];

    /// The code that `arg` of a failure frame carries.
    pub fn from_arg(arg: u32) -> Self {
        let index = (arg as usize).wrapping_sub(1);
        Self::KNOWN.get(index).copied().unwrap_or(Self::Other(arg))
    }

    /// The `arg` of a failure frame.
    pub fn to_arg(self) -> u32 {
        match self {
            Self::Other(arg) => arg,
            known => Self::KNOWN
                .iter()
                .position(|k| *k == known)
                .map_or(0, |i| i as u32 + 1),
        }
    }

    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Busy => "peer_busy",
            Self::UnknownMethod => "peer_unknown_method",
            Self::NotFound => "peer_not_found",
            Self::Malformed => "peer_says_malformed",
            Self::TooLarge => "peer_says_too_large",
            Self::DeadlineExceeded => "peer_deadline_exceeded",
            Self::ShuttingDown => "peer_shutting_down",
            Self::Internal => "peer_internal",
            Self::Other(_) => "peer_other",
        }
    }
}

/// What brings a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carriage {
    /// A long-lived stream of many small frames.
    Lane,
    /// A stream of its own, for one message.
    Stream,
    /// A datagram (RFC 9221) of its own.
    Datagram,
}

/// The byte that opens every unidirectional stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StreamKind {
    /// Frames follow until the connection ends.
    Lane = 1,
    /// One header and its body follow, then the end.
    Message = 2,
}

impl StreamKind {
    /// Reads the first byte of a stream.
    ///
    /// # Errors
    /// When the byte names no kind of stream.
    pub fn decode(byte: u8) -> Result<Self, FrameError> {
        match byte {
            1 => Ok(Self::Lane),
            2 => Ok(Self::Message),
            _ => Err(FrameError::PeerUnknownStreamKind(byte)),
        }
    }

    /// The first byte of a stream.
    pub fn encode(self) -> u8 {
        self as u8
    }
}

/// Largest bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// On a lane: a larger body would delay those behind it.
    pub lane_body_bytes_max: u32,
    /// Anywhere.
    pub body_bytes_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            lane_body_bytes_max: 16 << 10,
            body_bytes_max: 128 << 20,
        }
    }
}

/// A frame without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// How urgent it is.
    pub class: Class,
    /// What it is about; 0 where the kind says all.
    pub method: Method,
    /// The asker's name for a request; 0 where nothing is answered.
    pub id: u32,
    /// Bytes of body that follow.
    pub body_bytes: u32,
    /// Meaning depends on the kind.
    pub arg: u32,
}

impl Header {
    /// Bytes of an encoded header.
    pub const BYTES: usize = 16;

    /// The longest body of a probe, in a datagram: it pads one packet, of at most 16,383 bytes.
    pub const PROBE_BODY_BYTES_MAX: u32 = (16 << 10) - 1;

    /// The header as it stands on the wire.
    #[inline]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self.kind as u8;
        bytes[1] = self.class as u8;
        bytes[2..4].copy_from_slice(&self.method.0.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes[12..].copy_from_slice(&self.arg.to_le_bytes());
        bytes
    }

    /// Reads a header; the caller checks its size with [`Self::check`].
    ///
    /// # Errors
    /// When the kind or the class is unknown.
    #[inline]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, FrameError> {
        let [
            kind,
            class,
            m0,
            m1,
            i0,
            i1,
            i2,
            i3,
            b0,
            b1,
            b2,
            b3,
            a0,
            a1,
            a2,
            a3,
        ] = *bytes;
        Ok(Self {
            kind: Kind::from_byte(kind)?,
            class: Class::from_byte(class)?,
            method: Method(u16::from_le_bytes([m0, m1])),
            id: u32::from_le_bytes([i0, i1, i2, i3]),
            body_bytes: u32::from_le_bytes([b0, b1, b2, b3]),
            arg: u32::from_le_bytes([a0, a1, a2, a3]),
        })
    }

    /// Checks that a frame of this kind and size may travel on `carriage`.
    ///
    /// # Errors
    /// When the kind does not travel there, or the body is above the limit.
    #[inline]
    pub fn check(&self, carriage: Carriage, limits: &Limits) -> Result<(), FrameError> {
        let carried = match carriage {
            Carriage::Lane | Carriage::Datagram => {
                limits.lane_body_bytes_max.min(limits.body_bytes_max)
            }
            Carriage::Stream => limits.body_bytes_max,
        };
        let max_bytes = match self.kind {
            Kind::Request | Kind::Response | Kind::Send | Kind::Failure => carried,
            _ if carriage == Carriage::Stream => return Err(FrameError::PeerMisplaced(self.kind)),
            Kind::Hello => Hello::BYTES_MAX.min(carried),
            // Padding: the probe asks whether a packet of this size arrives.
            Kind::Probe if carriage == Carriage::Datagram => Self::PROBE_BODY_BYTES_MAX,
            Kind::Cancel | Kind::Probe | Kind::ProbeReply => 0,
        };
        if self.body_bytes > max_bytes {
            return Err(FrameError::PeerBodyTooLong {
                body_bytes: self.body_bytes,
                max_bytes,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
