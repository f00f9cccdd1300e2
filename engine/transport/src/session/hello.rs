//! The peer's hello: the first frame of its first lane, read before anything else of the peer.
//!
//! Packets may overtake each other, so other streams may be readable first. They wait, within their
//! flow control, until the hello says which version they speak.
//!
//! Invariants
//! 1. Not a byte behind the hello is read here: the lane goes on where the hello ends.
//! 2. At most [`Hello::BYTES_MAX`] bytes and two headers are kept, and only until the hello is
//!    whole.

use millrace_protocol::frame::{Header, Hello, HelloError, Kind, StreamKind};

use crate::path::StreamPath;

/// Bytes before the hello's body: the kind of the stream, and the frame's header.
const OPENING_BYTES: usize = 1 + Header::BYTES;

/// Reads the hello of one connection.
#[derive(Debug)]
pub(super) struct HelloReader {
    lane: u64,
    bytes: Vec<u8>,
    is_done: bool,
}

impl HelloReader {
    /// `is_server`: which side of the connection we are; it decides the ids of the peer's streams
    /// (RFC 9000, 2.1).
    pub(super) fn new(is_server: bool) -> Self {
        Self {
            lane: if is_server { 2 } else { 3 },
            bytes: Vec::new(),
            is_done: false,
        }
    }

    /// The stream that the hello comes on.
    pub(super) fn lane(&self) -> u64 {
        self.lane
    }

    /// Reads what is there. The hello, once, when it is whole.
    pub(super) fn read<P: StreamPath>(
        &mut self,
        path: &mut P,
    ) -> Option<Result<Hello, HelloError>> {
        while !self.is_done {
            let have = self.bytes.len();
            let whole = match self.whole_bytes() {
                Ok(whole) => whole,
                Err(error) => return self.finish(Err(error)),
            };
            if have == whole {
                let hello = Hello::decode(&self.bytes[OPENING_BYTES..]);
                return self.finish(hello);
            }
            self.bytes.resize(whole, 0);
            // An error says that nothing has come yet; a peer that ends its lane never says hello,
            // and the wait for that is bounded.
            let (read, fin) = path
                .stream_recv(self.lane, &mut self.bytes[have..])
                .unwrap_or((0, false));
            self.bytes.truncate(have + read);
            if fin {
                return self.finish(Err(HelloError::PeerMissing));
            }
            if read == 0 {
                break;
            }
        }
        None
    }

    /// How many bytes there must be: those of the opening, then those that it announces.
    fn whole_bytes(&self) -> Result<usize, HelloError> {
        if let Some(kind) = self.bytes.first()
            && StreamKind::decode(*kind) != Ok(StreamKind::Lane)
        {
            return Err(HelloError::PeerMissing);
        }
        let Some(header) = self.bytes.get(1..).and_then(<[u8]>::first_chunk) else {
            return Ok(OPENING_BYTES);
        };
        match Header::decode(header) {
            Ok(header) if header.kind == Kind::Hello && header.body_bytes <= Hello::BYTES_MAX => {
                Ok(OPENING_BYTES + header.body_bytes as usize)
            }
            _ => Err(HelloError::PeerMissing),
        }
    }

    fn finish(&mut self, hello: Result<Hello, HelloError>) -> Option<Result<Hello, HelloError>> {
        self.is_done = true;
        self.bytes = Vec::new();
        Some(hello)
    }
}
