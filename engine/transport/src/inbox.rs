//! What arrives on the streams of one connection: lanes cut into frames, messages gathered into
//! chunks.
//!
//! Called once per readable stream after each receive completion, while the bytes are in cache. A
//! body of a message stream over [`INLINE_BYTES_MAX`] goes from the path into its chunks and is
//! never copied again.
//!
//! Invariants
//! 1. Nothing is allocated for a body before its header was checked and the budget agreed; what
//!    comes on a refused stream is thrown away.
//! 2. The number of streams is bounded by the stream limit that the peer was given; each unfinished
//!    message must make progress or be cut.
//! 3. What a stream holds is its own: whatever ends the stream gives it back, by dropping it.

use millrace_protocol::frame::{
    Carriage, Class, FailureCode, FrameError, Header, Kind, LaneParser, Limits, StreamKind,
};
use millrace_protocol::id::NodeId;
use millrace_shards::chunk::{BodyMut, Charge};

use crate::allocator::{BodyAllocator, Refusal, Space};
use crate::path::{StreamError, StreamPath};
use crate::progress::{Finished, Turn, standing_still};
use crate::service::body::{INLINE_BYTES_MAX, OpenSink};
use crate::service::message::InboundBody;

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
    /// There is no space for the body now, or never will be; or the service refuses it.
    Refused(Refusal),
    /// Too little arrived in an interval.
    Stalled,
    /// The peer took the message back, by ending its stream.
    Reset,
    /// The peer took the request back, by a frame on a lane.
    Cancelled,
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
            Self::Refused(refusal) => refusal.reason,
            Self::Stalled => "peer_stalled",
            Self::Reset => "peer_reset",
            Self::Cancelled => "peer_cancelled",
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
            Self::Short
                | Self::Long
                | Self::Refused(_)
                | Self::Stalled
                | Self::Reset
                | Self::Cancelled
        )
    }
}

/// Takes what arrives on one connection.
pub(crate) trait Arrivals {
    /// A frame on a lane, or a small message with a stream of its own.
    fn on_frame(&mut self, header: Header, body: &[u8]);

    /// The header of a message with a stream of its own is there: whether the peer took it back
    /// before.
    fn is_cancelled(&mut self, header: &Header) -> bool;

    /// A message with a body over [`INLINE_BYTES_MAX`] is announced: where its chunks go, if not
    /// into one body; or that it is refused.
    fn on_head(&mut self, header: &Header) -> Result<Option<OpenSink>, Refusal>;

    /// There is no space for a message's body: the service that takes it lets go of `bytes` that it
    /// keeps of the peer. Whether it did.
    fn make_room(&mut self, header: &Header, bytes: u64) -> bool;

    /// That message is whole.
    fn on_message(&mut self, header: Header, body: InboundBody<'static>);
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
        /// Given back once the message was handed over.
        _charge: Charge,
    },
    Large {
        header: Header,
        body: BodyMut,
        /// Where its chunks go as they fill up; they stay in the body without it.
        sink: Option<OpenSink>,
    },
    /// Refused: what still comes is thrown away, until the peer ends or resets the stream. Not
    /// stopped (STOP_SENDING), because quiche never frees a stream that was, and the peer would
    /// lose one of its streams for good.
    Refused,
}

#[derive(Debug)]
struct Incoming {
    id: u64,
    state: State,
    /// Bytes since progress was last judged.
    progress_bytes: u64,
    /// Its first interval is not over: it is not judged yet.
    is_new: bool,
    /// Of its message, once the header is there.
    class: Option<Class>,
}

/// The incoming streams of one connection.
#[derive(Debug)]
pub(crate) struct Inbox {
    peer: NodeId,
    limits: Limits,
    /// Refused streams that the peer may leave open.
    abandoned_max: usize,
    streams: Vec<Incoming>,
    /// Position of the stream read last: bulk reads the same one again and again.
    last: usize,
    opened: u64,
    /// A body in chunks came forward, and is not whole, since the last look.
    in_body: bool,
    /// Bytes read on message streams.
    moved_bytes: u64,
    /// Messages that became whole since progress was last judged.
    finished: Finished,
}

impl Inbox {
    /// `streams_max`: how many streams the peer may open.
    pub(crate) fn new(peer: NodeId, limits: Limits, streams_max: u64) -> Self {
        Self {
            peer,
            limits,
            abandoned_max: streams_max as usize / 4 * 3,
            streams: Vec::new(),
            last: 0,
            opened: 0,
            in_body: false,
            moved_bytes: 0,
            finished: Finished::default(),
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

    /// Bytes that messages with streams of their own brought so far.
    pub(crate) fn moved_bytes(&self) -> u64 {
        self.moved_bytes
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
        bodies: &mut BodyAllocator,
        arrivals: &mut impl Arrivals,
    ) -> Result<(), (StreamFault, Option<Header>)> {
        if id & 0x2 == 0 {
            return Err((StreamFault::Bidirectional, None));
        }
        let at = self.position(id);
        let stream = &mut self.streams[at];
        let was_opening = matches!(stream.state, State::Opening);
        let before = stream.progress_bytes;
        let mut read = Read {
            peer: self.peer,
            limits: &self.limits,
            scratch,
            bodies,
            arrivals,
        };
        let result = read.stream(stream, path);
        self.in_body |= matches!(stream.state, State::Large { .. });
        if !matches!(stream.state, State::Lane(_) | State::Refused) {
            self.moved_bytes += stream.progress_bytes - before;
        }
        match result {
            Ok(false) if was_opening && self.lanes() > LANES_MAX => {
                Err((StreamFault::TooManyLanes, None))
            }
            Ok(false) => Ok(()),
            Ok(true) => {
                let stream = self.streams.swap_remove(at);
                let class = stream.class.unwrap_or(Class::Bulk);
                self.finished.add(class, stream.id, stream.progress_bytes);
                Ok(())
            }
            Err(fault) => {
                let header = self.streams[at].header();
                self.refuse(at, path, fault)
                    .map_err(|fault| (fault, None))?;
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
        fault: StreamFault,
    ) -> Result<(), StreamFault> {
        let stream = &mut self.streams[at];
        let state = std::mem::replace(&mut stream.state, State::Refused);
        if let State::Large {
            sink: Some(sink), ..
        } = state
        {
            sink.cut(fault.reason());
        }
        if stream.discard(path) {
            self.streams.swap_remove(at);
            return Ok(());
        }
        let is_refused = |stream: &&Incoming| matches!(stream.state, State::Refused);
        if self.streams.iter().filter(is_refused).count() > self.abandoned_max {
            return Err(StreamFault::TooManyAbandoned);
        }
        Ok(())
    }

    /// Whether the answer to our request `id` has begun to arrive, and is not whole.
    pub(crate) fn is_answering(&self, id: u32) -> bool {
        let is_answer = |header: &Header| header.kind == Kind::Response && header.id == id;
        let mut headers = self.streams.iter().filter_map(Incoming::header);
        headers.any(|header| is_answer(&header))
    }

    /// Cuts every unfinished message that brought less than `progress_bytes` since the last call,
    /// unless it waits behind others that came forward.
    pub(crate) fn cut_stalled<P: StreamPath>(
        &mut self,
        path: &mut P,
        progress_bytes: u64,
        cut: &mut impl FnMut(StreamFault, Option<Header>),
    ) {
        let mut turns: Vec<_> = self.streams.iter_mut().map(Incoming::take_turn).collect();
        turns.extend(self.finished.take_turns());
        for id in standing_still(turns, progress_bytes) {
            let Some(at) = self.streams.iter().position(|stream| stream.id == id) else {
                continue;
            };
            let header = self.streams[at].header();
            cut(StreamFault::Stalled, header);
            if let Err(fault) = self.refuse(at, path, StreamFault::Stalled) {
                cut(fault, None);
            }
        }
    }

    /// The peer took these requests back, whose ids are in ascending order: of each whose body is
    /// still arriving, what it holds is given back, and the rest is thrown away. It costs one look
    /// at each stream, however many ids there are.
    pub(crate) fn cancel<P: StreamPath>(
        &mut self,
        path: &mut P,
        ids: &[u32],
        cut: &mut impl FnMut(StreamFault, Option<Header>),
    ) {
        // From the back: refusing a stream may move the last one into its place.
        for at in (0..self.streams.len()).rev() {
            let header = self.streams[at]
                .header()
                .filter(|header| wants_answer(header) && ids.binary_search(&header.id).is_ok());
            if header.is_none() {
                continue;
            }
            cut(StreamFault::Cancelled, header);
            if let Err(fault) = self.refuse(at, path, StreamFault::Cancelled) {
                cut(fault, None);
            }
        }
    }

    /// Drops all that the streams hold, and cuts their sinks: the connection is gone.
    pub(crate) fn clear(&mut self) {
        self.streams.clear();
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
                self.streams.push(Incoming {
                    id,
                    state: State::Opening,
                    progress_bytes: 0,
                    is_new: true,
                    class: None,
                });
                self.streams.len() - 1
            }
        };
        self.last
    }
}

impl Incoming {
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

    /// Ends its interval. Counted from the interval's start, or the stream's: a stream is judged in
    /// its second interval at the latest.
    fn take_turn(&mut self) -> Turn {
        let is_new = std::mem::take(&mut self.is_new);
        let class = match &self.state {
            State::Lane(_) => 0,
            // One without a header has no bytes to speak of.
            _ => self.class.unwrap_or(Class::Bulk).index(),
        };
        Turn {
            place: (class, self.id),
            bytes: std::mem::take(&mut self.progress_bytes),
            is_judged: !is_new && !matches!(self.state, State::Lane(_) | State::Refused),
        }
    }

    fn header(&self) -> Option<Header> {
        match &self.state {
            State::Small { header, .. } | State::Large { header, .. } => Some(*header),
            State::Header { bytes, have } if *have == Header::BYTES => Header::decode(bytes).ok(),
            _ => None,
        }
    }
}

/// What reading a stream needs besides the stream.
struct Read<'a, A> {
    peer: NodeId,
    limits: &'a Limits,
    scratch: &'a mut [u8],
    bodies: &'a mut BodyAllocator,
    arrivals: &'a mut A,
}

impl<A: Arrivals> Read<'_, A> {
    /// True when the stream is done.
    fn stream<P: StreamPath>(
        &mut self,
        stream: &mut Incoming,
        path: &mut P,
    ) -> Result<bool, StreamFault> {
        loop {
            let target: &mut [u8] = match &mut stream.state {
                State::Refused => return Ok(stream.discard(path)),
                State::Opening => &mut self.scratch[..1],
                State::Lane(_) => &mut *self.scratch,
                State::Header { have, .. } => &mut self.scratch[..Header::BYTES - *have],
                State::Small { header, body, .. } => {
                    // One byte more than announced tells a longer body from a whole one.
                    let missing = header.body_bytes as usize - body.len();
                    &mut self.scratch[..missing.max(1)]
                }
                State::Large { body, .. } if body.is_full() => &mut self.scratch[..1],
                State::Large { body, .. } => body.spare(),
            };
            let (read, fin) = match path.stream_recv(stream.id, target) {
                Ok(read) => read,
                Err(StreamError::Blocked) => return Ok(false),
                Err(_) => return Err(StreamFault::Reset),
            };
            stream.progress_bytes += read as u64;
            let got = &self.scratch[..];
            match &mut stream.state {
                State::Refused => {}
                State::Opening => match got.first() {
                    Some(&byte) if read == 1 => {
                        let kind = StreamKind::decode(byte).map_err(StreamFault::Frame)?;
                        stream.state = match kind {
                            StreamKind::Lane => State::Lane(LaneParser::new(*self.limits)),
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
                        .push(&got[..read], &mut |header, body| {
                            self.arrivals.on_frame(header, body);
                        })
                        .map_err(StreamFault::Frame)?;
                    if fin {
                        return Err(StreamFault::LaneEnded);
                    }
                }
                State::Header { bytes, have } => {
                    bytes[*have..*have + read].copy_from_slice(&got[..read]);
                    *have += read;
                    if *have == Header::BYTES {
                        let header = Header::decode(bytes).map_err(StreamFault::Frame)?;
                        stream.class = Some(header.class);
                        self.check(&header)?;
                        if fin && header.body_bytes > 0 {
                            return Err(StreamFault::Short);
                        }
                        if header.body_bytes == 0 && fin {
                            self.arrivals.on_frame(header, &[]);
                            return Ok(true);
                        }
                        stream.state = self.open_body(header)?;
                        continue;
                    }
                }
                State::Small { header, body, .. } => {
                    let announced = header.body_bytes as usize;
                    if body.len() + read > announced {
                        return Err(StreamFault::Long);
                    }
                    body.extend_from_slice(&got[..read]);
                    if fin {
                        if body.len() < announced {
                            return Err(StreamFault::Short);
                        }
                        self.arrivals.on_frame(*header, body);
                        return Ok(true);
                    }
                }
                State::Large { body, sink, .. } => {
                    if body.is_full() && read > 0 {
                        return Err(StreamFault::Long);
                    }
                    body.advance(read);
                    if let Some(sink) = sink {
                        while let Some((offset, chunk)) = body.take_filled() {
                            sink.on_chunk(offset, chunk);
                        }
                    }
                    if fin {
                        return self.finish_large(stream).map(|()| true);
                    }
                }
            }
            if fin {
                return Err(StreamFault::Short);
            }
        }
    }

    /// Whether such a message may come on a stream of its own. One that is too long is refused like
    /// one for which there is no space: the peer may have other limits, and hears of ours.
    fn check(&self, header: &Header) -> Result<(), StreamFault> {
        header
            .check(Carriage::Stream, self.limits)
            .map_err(|error| match error {
                FrameError::PeerBodyTooLong { .. } => StreamFault::Refused(Refusal {
                    code: FailureCode::TooLarge,
                    reason: error.reason(),
                }),
                _ => StreamFault::Frame(error),
            })
    }

    fn open_body(&mut self, header: Header) -> Result<State, StreamFault> {
        if self.arrivals.is_cancelled(&header) {
            return Err(StreamFault::Cancelled);
        }
        let sink = if header.body_bytes as usize > INLINE_BYTES_MAX {
            let sink = self.arrivals.on_head(&header);
            sink.map_err(StreamFault::Refused)?
        } else {
            None
        };
        let mut space = self.bodies.allocate(self.peer, header.body_bytes);
        if space.is_err()
            && let Some(bytes) = self.bodies.shortfall_bytes(&self.peer, header.body_bytes)
            && self.arrivals.make_room(&header, bytes)
        {
            space = self.bodies.allocate(self.peer, header.body_bytes);
        }
        match space {
            Ok(Space::Inline(body, charge)) => Ok(State::Small {
                header,
                body,
                _charge: charge,
            }),
            Ok(Space::Chunks(body)) => Ok(State::Large { header, body, sink }),
            Err(refusal) => {
                if let Some(sink) = sink {
                    sink.cut(refusal.reason);
                }
                Err(StreamFault::Refused(refusal))
            }
        }
    }

    fn finish_large(&mut self, stream: &mut Incoming) -> Result<(), StreamFault> {
        match std::mem::replace(&mut stream.state, State::Opening) {
            // One of a length that is inline otherwise: services have it as they always do.
            State::Large { header, body, .. }
                if body.is_full() && header.body_bytes as usize <= INLINE_BYTES_MAX =>
            {
                let body = body.freeze();
                let bytes = body.chunks().first().map_or(&[][..], |chunk| chunk);
                self.arrivals.on_frame(header, bytes);
                Ok(())
            }
            State::Large { header, body, sink } if body.is_full() => {
                let body = match sink.map(|sink| sink.finish(body.len() as u64)) {
                    None => InboundBody::Chunks(body.freeze()),
                    Some(streamed) => InboundBody::Streamed(streamed),
                };
                self.arrivals.on_message(header, body);
                Ok(())
            }
            unfinished => {
                stream.state = unfinished;
                Err(StreamFault::Short)
            }
        }
    }
}

/// Whether a frame of this kind asks for an answer that a refusal must give.
pub(crate) fn wants_answer(header: &Header) -> bool {
    header.kind == Kind::Request
}
