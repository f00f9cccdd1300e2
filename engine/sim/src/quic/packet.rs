//! What crosses the network between two simulated nodes.

use millrace_protocol::dial_request::Sealed;
use millrace_protocol::peers::ConnKey;
use millrace_transport::driver::StreamBuffer;

use super::digest::Digest;

/// Bytes of a packet besides its frames: IPv6, UDP, a short header with its tag.
const OVERHEAD_BYTES: u64 = 48 + 40;
/// A client's first datagram, and the flight that answers it, have at least this size (RFC 9000,
/// 14.1).
const HANDSHAKE_BYTES: u64 = 1_200;

/// A datagram. The network tells the receiver who sent it, which stands for what a certificate
/// proves: nothing is trusted of it before the handshake is done.
#[derive(Clone, Debug)]
pub(crate) enum Packet {
    /// The client's first flight, and how often it was sent before.
    Initial { client: ConnKey, repeat: usize },
    /// The server's answer to it, with its certificate.
    Accept {
        client: ConnKey,
        server: ConnKey,
        repeat: usize,
    },
    /// A packet of an open connection.
    Protected {
        to: ConnKey,
        number: u64,
        /// Ranges of numbers that arrived: first, and after the last. Empty for none.
        acked: Vec<(u64, u64)>,
        frames: Vec<Frame>,
    },
    /// CONNECTION_CLOSE with an application code (RFC 9000, 19.19).
    Close { to: ConnKey, code: u64 },
    /// Asks a dialler to dial: a datagram outside of any connection.
    DialRequest { datagram: Sealed },
}

/// A frame (RFC 9000, 19) of an open connection. Each is acknowledged with its packet.
#[derive(Clone, Debug)]
pub(crate) enum Frame {
    /// The client's last flight of the handshake, with its certificate.
    Finish,
    /// Asks for an acknowledgement.
    Ping,
    /// Bytes of a stream: a slice of the sender's chunk, not a copy.
    Stream {
        id: u64,
        offset: u64,
        bytes: StreamBuffer,
        fin: bool,
    },
    /// The sender ends a stream at `final_bytes` without its rest.
    ResetStream { id: u64, final_bytes: u64 },
    /// The receiver lets the connection bring so many bytes in all.
    MaxData(u64),
    /// The receiver lets a stream bring so many bytes in all.
    MaxStreamData { id: u64, max: u64 },
    /// The receiver lets so many streams be opened in all.
    MaxStreams(u64),
    /// A datagram (RFC 9221): not sent again when it is lost.
    Datagram(Vec<u8>),
}

impl Frame {
    /// What it counts for in a packet.
    pub(crate) fn wire_bytes(&self) -> u64 {
        match self {
            Self::Finish => 1_000,
            Self::Ping => 1,
            Self::Stream { bytes, .. } => 12 + bytes.as_ref().len() as u64,
            Self::Datagram(datagram) => 3 + datagram.len() as u64,
            Self::ResetStream { .. } | Self::MaxStreamData { .. } => 16,
            Self::MaxData(_) | Self::MaxStreams(_) => 9,
        }
    }

    fn note(&self, digest: &mut Digest) {
        let (kind, a, b) = match self {
            Self::Finish => (0, 0, 0),
            Self::Ping => (1, 0, 0),
            Self::Stream {
                id,
                offset,
                bytes,
                fin,
            } => {
                digest.add(bytes.as_ref().len() as u64 * 2 + u64::from(*fin));
                (2, *id, *offset)
            }
            Self::ResetStream { id, final_bytes } => (3, *id, *final_bytes),
            Self::MaxData(max) => (4, *max, 0),
            Self::MaxStreamData { id, max } => (5, *id, *max),
            Self::MaxStreams(max) => (6, *max, 0),
            Self::Datagram(datagram) => (7, datagram.len() as u64, 0),
        };
        for value in [kind, a, b] {
            digest.add(value);
        }
    }
}

impl Packet {
    /// What it counts for on a link.
    pub(crate) fn wire_bytes(&self) -> u64 {
        match self {
            Self::Initial { .. } | Self::Accept { .. } => HANDSHAKE_BYTES + OVERHEAD_BYTES,
            Self::Protected { acked, frames, .. } => {
                let acked = 4 * acked.len() as u64;
                let frames = frames.iter().map(Frame::wire_bytes).sum::<u64>();
                OVERHEAD_BYTES + acked + frames
            }
            Self::Close { .. } => OVERHEAD_BYTES + 16,
            Self::DialRequest { datagram } => 48 + datagram.as_bytes().len() as u64,
        }
    }

    /// Adds the packet to the digest of a run: all of it but the bytes of bodies.
    pub(crate) fn note(&self, digest: &mut Digest) {
        match self {
            Self::Initial { client, repeat } => digest.add_all([0, client.0, *repeat as u64]),
            Self::Accept {
                client,
                server,
                repeat,
            } => digest.add_all([1, client.0, server.0, *repeat as u64]),
            Self::Protected {
                to,
                number,
                acked,
                frames,
            } => {
                digest.add_all([2, to.0, *number]);
                for (start, end) in acked {
                    digest.add_all([*start, *end]);
                }
                for frame in frames {
                    frame.note(digest);
                }
            }
            Self::Close { to, code } => digest.add_all([3, to.0, *code]),
            Self::DialRequest { .. } => digest.add(4),
        }
    }
}
