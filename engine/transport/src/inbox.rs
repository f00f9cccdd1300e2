//! What arrives on the streams of one connection: lanes cut into frames, messages gathered into chunks.
//!
//! Called once per readable stream after each receive completion, while the bytes are in cache. A body of a message stream over
//! [`INLINE_BYTES_MAX`] goes from quiche into its chunks and is never copied again.
//!
//! Invariants
//! 1. Nothing is reserved for a body before its header was checked and the budget agreed; what comes on a refused stream is thrown away.
//! 2. The number of streams is bounded by the stream limit that the peer was given; each unfinished message must make progress or be cut.
//! 3. Whatever ends a stream gives its reservation back.

use millrace_protocol::budget::Reservation;
use millrace_protocol::frame::{
    Carriage, FrameError, Header, Kind, LaneParser, Limits, StreamKind,
};
use millrace_shards::chunk::{Body, BodyMut, ChunkPool};

use crate::path::{StreamError, StreamPath};

/// Bodies up to this size are gathered in plain memory; a chunk of 1 MiB would be wasted on them.
pub(crate) const INLINE_BYTES_MAX: usize = 64 << 10;

/// Lanes that a peer may open; ours opens five.
const LANES_MAX: usize = 32;

/// Why a stream was cut; the connection lives on unless `is_fatal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamFault {
    /// The bytes are not frames.
    Frame(FrameError),
    /// The body is shorter than announced.
    Short,
    /// The body is longer than announced.
    Long,
    /// The budget for this peer, or the pool, is used up.
    NoRoom,
    /// Too little arrived in an interval.
    Stalled,
    /// The peer took the message back.
    Reset,
    /// The peer opened a bidirectional stream, of which the protocol has none.
    Bidirectional,
    /// The peer ended a lane.
    LaneEnded,
    /// The peer opened more lanes than any version of ours does.
    TooManyLanes,
    /// The peer leaves too many refused streams open.
    TooManyAbandoned,
}

impl StreamFault {
    /// Label on `/metrics`.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Frame(error) => error.reason(),
            Self::Short => "peer_body_shorter_than_announced",
            Self::Long => "peer_body_longer_than_announced",
            Self::NoRoom => "no_room",
            Self::Stalled => "peer_stalled",
            Self::Reset => "peer_reset",
            Self::Bidirectional => "peer_bidirectional_stream",
            Self::LaneEnded => "peer_lane_ended",
            Self::TooManyLanes => "peer_too_many_lanes",
            Self::TooManyAbandoned => "peer_abandoned_streams",
        }
    }

    /// After garbage on a stream there is nothing more to hope for from the peer's code.
    pub(crate) fn is_fatal(self) -> bool {
        !matches!(
            self,
            Self::Short | Self::Long | Self::NoRoom | Self::Stalled | Self::Reset
        )
    }
}

/// What arrived whole.
#[derive(Debug)]
pub(crate) enum Arrived<'a> {
    /// A frame on a lane, or a small message with a stream of its own.
    Frame(Header, &'a [u8]),
    /// A message in chunks, with what it holds of the peer's budget.
    Message(Header, Body, Reservation),
}

/// Gives out room for bodies.
pub trait Room {
    /// Reserves `bytes` of the peer's budget.
    fn reserve(&mut self, bytes: u64) -> Option<Reservation>;
    /// Gives a reservation back.
    fn release(&mut self, reservation: Reservation);
    /// Where chunks come from.
    fn pool(&self) -> &ChunkPool;
}

#[derive(Debug)]
enum State {
    /// The first byte is still to come.
    Opening,
    Lane(LaneParser),
    /// Bytes of the header so far.
    Header {
        bytes: [u8; Header::BYTES],
        have: usize,
    },
    Small {
        header: Header,
        body: Vec<u8>,
        reservation: Reservation,
    },
    Large {
        header: Header,
        body: BodyMut,
        reservation: Reservation,
    },
    /// Refused: what still comes is thrown away, until the peer ends or resets the stream. Not stopped (STOP_SENDING), because quiche
    /// never frees a stream that was, and the peer would lose one of its streams for good.
    Refused,
}

#[derive(Debug)]
struct Incoming {
    id: u64,
    state: State,
    /// Bytes since progress was last judged.
    progress_bytes: u64,
}

/// The incoming streams of one connection.
#[derive(Debug)]
pub(crate) struct Inbox {
    limits: Limits,
    /// Refused streams that the peer may leave open.
    abandoned_max: usize,
    streams: Vec<Incoming>,
    /// Position of the stream read last: bulk reads the same one again and again.
    last: usize,
    opened: u64,
    /// A body in chunks came forward, and is not whole, since the last look.
    in_body: bool,
}

impl Inbox {
    /// `streams_max`: how many streams the peer may open.
    pub(crate) fn new(limits: Limits, streams_max: u64) -> Self {
        Self {
            limits,
            abandoned_max: streams_max as usize / 4 * 3,
            streams: Vec::new(),
            last: 0,
            opened: 0,
            in_body: false,
        }
    }

    /// Streams opened by the peer since the last call.
    pub(crate) fn take_opened(&mut self) -> u64 {
        std::mem::take(&mut self.opened)
    }

    /// Whether a body in chunks came forward, and is not whole, since the last call.
    pub(crate) fn take_in_body(&mut self) -> bool {
        std::mem::take(&mut self.in_body)
    }

    /// Messages that have begun and not ended.
    pub(crate) fn unfinished(&self) -> usize {
        self.streams
            .iter()
            .filter(|s| !matches!(s.state, State::Lane(_) | State::Refused))
            .count()
    }

    /// The lane that began with the peer's hello goes on as a lane.
    pub(crate) fn open_lane(&mut self, id: u64) {
        let at = self.position(id);
        self.streams[at].state = State::Lane(LaneParser::new(self.limits));
    }

    /// Reads all that stream `id` has, and hands over what is whole. `scratch` is overwritten.
    pub(crate) fn read<P: StreamPath>(
        &mut self,
        path: &mut P,
        id: u64,
        scratch: &mut [u8],
        room: &mut impl Room,
        arrived: &mut impl FnMut(Arrived<'_>),
    ) -> Result<(), (StreamFault, Option<Header>)> {
        if id & 0x2 == 0 {
            return Err((StreamFault::Bidirectional, None));
        }
        let at = self.position(id);
        let was_opening = matches!(self.streams[at].state, State::Opening);
        let result = self.streams[at].read(path, &self.limits, scratch, room, arrived);
        self.in_body |= matches!(self.streams[at].state, State::Large { .. });
        match result {
            Ok(false) if was_opening && self.lanes() > LANES_MAX => {
                Err((StreamFault::TooManyLanes, None))
            }
            Ok(false) => Ok(()),
            Ok(true) => {
                self.remove(at, room);
                Ok(())
            }
            Err(fault) => {
                let header = self.streams[at].header();
                self.refuse(at, path, room).map_err(|fault| (fault, None))?;
                Err((fault, header))
            }
        }
    }

    fn lanes(&self) -> usize {
        let is_lane = |stream: &&Incoming| matches!(stream.state, State::Lane(_));
        self.streams.iter().filter(is_lane).count()
    }

    /// Gives back what a stream holds and throws away what comes on it from now on.
    fn refuse<P: StreamPath>(
        &mut self,
        at: usize,
        path: &mut P,
        room: &mut impl Room,
    ) -> Result<(), StreamFault> {
        self.streams[at].release(room);
        if self.streams[at].discard(path) {
            self.streams.swap_remove(at);
            return Ok(());
        }
        let is_refused = |stream: &&Incoming| matches!(stream.state, State::Refused);
        if self.streams.iter().filter(is_refused).count() > self.abandoned_max {
            return Err(StreamFault::TooManyAbandoned);
        }
        Ok(())
    }

    /// Cuts every unfinished message that brought less than `progress_bytes` since the last call.
    pub(crate) fn cut_stalled<P: StreamPath>(
        &mut self,
        path: &mut P,
        progress_bytes: u64,
        room: &mut impl Room,
        cut: &mut impl FnMut(StreamFault, Option<Header>),
    ) {
        // From the back: refusing a stream may move the last one into its place.
        for at in (0..self.streams.len()).rev() {
            let stream = &mut self.streams[at];
            // Counted from the interval's start, or the stream's: a stream is judged in its second interval at the latest.
            let new = std::mem::take(&mut stream.progress_bytes);
            if matches!(stream.state, State::Lane(_) | State::Refused) || new >= progress_bytes {
                continue;
            }
            let header = stream.header();
            cut(StreamFault::Stalled, header);
            if let Err(fault) = self.refuse(at, path, room) {
                cut(fault, None);
            }
        }
    }

    /// Gives back all that the streams hold: the connection is gone.
    pub(crate) fn clear(&mut self, room: &mut impl Room) {
        while !self.streams.is_empty() {
            self.remove(self.streams.len() - 1, room);
        }
    }

    fn position(&mut self, id: u64) -> usize {
        if self
            .streams
            .get(self.last)
            .is_some_and(|stream| stream.id == id)
        {
            return self.last;
        }
        self.last = match self.streams.iter().position(|stream| stream.id == id) {
            Some(at) => at,
            None => {
                self.opened += 1;
                // What a stream brings in its first interval counts as one unit of progress: it is judged from the next.
                self.streams.push(Incoming {
                    id,
                    state: State::Opening,
                    progress_bytes: u64::MAX / 2,
                });
                self.streams.len() - 1
            }
        };
        self.last
    }

    fn remove(&mut self, at: usize, room: &mut impl Room) {
        self.streams.swap_remove(at).release(room);
    }
}

impl Incoming {
    /// Gives back what the stream holds; it is refused from now on.
    fn release(&mut self, room: &mut impl Room) {
        match std::mem::replace(&mut self.state, State::Refused) {
            State::Small { reservation, .. } | State::Large { reservation, .. } => {
                room.release(reservation);
            }
            State::Opening | State::Lane(_) | State::Header { .. } | State::Refused => {}
        }
    }

    /// Throws away what is there. True when the stream has ended.
    fn discard<P: StreamPath>(&self, path: &mut P) -> bool {
        loop {
            match path.stream_discard(self.id, 1 << 30) {
                Ok((_, true)) => return true,
                Ok((0, false)) | Err(StreamError::Blocked) => return false,
                Ok(_) => {}
                // Reset, or gone already.
                Err(_) => return true,
            }
        }
    }

    fn header(&self) -> Option<Header> {
        match &self.state {
            State::Small { header, .. } | State::Large { header, .. } => Some(*header),
            State::Header { bytes, have } if *have == Header::BYTES => Header::decode(bytes).ok(),
            _ => None,
        }
    }

    /// True when the stream is done.
    fn read<P: StreamPath>(
        &mut self,
        path: &mut P,
        limits: &Limits,
        scratch: &mut [u8],
        room: &mut impl Room,
        arrived: &mut impl FnMut(Arrived<'_>),
    ) -> Result<bool, StreamFault> {
        loop {
            let target: &mut [u8] = match &mut self.state {
                State::Refused => return Ok(self.discard(path)),
                State::Opening => &mut scratch[..1],
                State::Lane(_) => scratch,
                State::Header { have, .. } => &mut scratch[..Header::BYTES - *have],
                State::Small { header, body, .. } => {
                    // One byte more than announced tells a longer body from a whole one.
                    let missing = header.body_bytes as usize - body.len();
                    &mut scratch[..missing.max(1)]
                }
                State::Large { body, .. } if body.is_full() => &mut scratch[..1],
                State::Large { body, .. } => body.spare(),
            };
            let (read, fin) = match path.stream_recv(self.id, target) {
                Ok(read) => read,
                Err(StreamError::Blocked) => return Ok(false),
                Err(_) => return Err(StreamFault::Reset),
            };
            self.progress_bytes = self.progress_bytes.saturating_add(read as u64);
            match &mut self.state {
                State::Refused => {}
                State::Opening => match scratch.first() {
                    Some(&byte) if read == 1 => {
                        self.state = match StreamKind::decode(byte).map_err(StreamFault::Frame)? {
                            StreamKind::Lane => State::Lane(LaneParser::new(*limits)),
                            StreamKind::Message => State::Header {
                                bytes: [0; Header::BYTES],
                                have: 0,
                            },
                        };
                    }
                    _ => {}
                },
                State::Lane(parser) => {
                    parser
                        .push(&scratch[..read], &mut |header, body| {
                            arrived(Arrived::Frame(header, body));
                        })
                        .map_err(StreamFault::Frame)?;
                    if fin {
                        return Err(StreamFault::LaneEnded);
                    }
                }
                State::Header { bytes, have } => {
                    bytes[*have..*have + read].copy_from_slice(&scratch[..read]);
                    *have += read;
                    if *have == Header::BYTES {
                        let header = Header::decode(bytes).map_err(StreamFault::Frame)?;
                        header
                            .check(Carriage::Stream, limits)
                            .map_err(StreamFault::Frame)?;
                        if fin && header.body_bytes > 0 {
                            return Err(StreamFault::Short);
                        }
                        if header.body_bytes == 0 && fin {
                            arrived(Arrived::Frame(header, &[]));
                            return Ok(true);
                        }
                        self.state = Self::open_body(header, room)?;
                        continue;
                    }
                }
                State::Small { header, body, .. } => {
                    let announced = header.body_bytes as usize;
                    if body.len() + read > announced {
                        return Err(StreamFault::Long);
                    }
                    body.extend_from_slice(&scratch[..read]);
                    if fin {
                        if body.len() < announced {
                            return Err(StreamFault::Short);
                        }
                        arrived(Arrived::Frame(*header, body));
                        return Ok(true);
                    }
                }
                State::Large { body, .. } => {
                    if body.is_full() && read > 0 {
                        return Err(StreamFault::Long);
                    }
                    body.advance(read);
                    if fin {
                        return self.finish_large(arrived).map(|()| true);
                    }
                }
            }
            if fin {
                return Err(StreamFault::Short);
            }
        }
    }

    fn open_body(header: Header, room: &mut impl Room) -> Result<State, StreamFault> {
        let len = header.body_bytes as usize;
        let reservation = room.reserve(len as u64).ok_or(StreamFault::NoRoom)?;
        if len <= INLINE_BYTES_MAX {
            return Ok(State::Small {
                header,
                body: Vec::with_capacity(len),
                reservation,
            });
        }
        match BodyMut::with_len(room.pool(), len) {
            Some(body) => Ok(State::Large {
                header,
                body,
                reservation,
            }),
            None => {
                room.release(reservation);
                Err(StreamFault::NoRoom)
            }
        }
    }

    fn finish_large(&mut self, arrived: &mut impl FnMut(Arrived<'_>)) -> Result<(), StreamFault> {
        match std::mem::replace(&mut self.state, State::Opening) {
            State::Large {
                header,
                body,
                reservation,
            } if body.is_full() => {
                arrived(Arrived::Message(header, body.freeze(), reservation));
                Ok(())
            }
            unfinished => {
                self.state = unfinished;
                Err(StreamFault::Short)
            }
        }
    }
}

/// Whether a frame of this kind asks for an answer that a refusal must give.
pub(crate) fn wants_answer(header: &Header) -> bool {
    header.kind == Kind::Request
}
