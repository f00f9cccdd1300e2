//! The QUIC stream carrier: each message on a unidirectional stream of its own, so that none blocks
//! another.
//!
//! A stream is: one byte [`StreamKind::Message`], the 16-byte header, the body, FIN. The carrier
//! runs once for each turn and connection with something to send. It costs O(active streams), and
//! no allocation per packet: bodies go as slices of their chunks.
//!
//! Invariants
//! 1. At most `active_max` streams of a class are fed at a time, oldest first; the rest waits in
//!    order.
//! 2. Where nothing is paced, a body of class bulk never takes all of the connection's send
//!    capacity: half of the rest, up to [`RESERVE_BYTES`], is kept for lanes. Bodies of the other
//!    classes may take all of it. A paced connection keeps nothing: BBR takes capacity that is left
//!    unused for a want of data, and the next acknowledgement makes room for lanes, which are fed
//!    first.
//! 3. Waiting plus active messages of a class never exceed its bound.
//! 4. Bytes of answers, which a peer may ask for and not read, have bounds of their own
//!    ([`Answers`]), and an answer that is not read is cut.

mod cutting;

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;
use millrace_protocol::body_deadline::{Sighting, Stage};
use millrace_protocol::frame::{Class, Header, Kind, StreamKind};
use millrace_shards::chunk::ChunkSlice;

use crate::answers::{Answers, Look};
use crate::buffers::StreamBuffer;
use crate::carrier::{Carrier, Outgoing, Progress, QueueFull};
use crate::config::PerClass;
use crate::path::{StreamError, StreamPath};
use crate::progress::Turn;
use crate::service::message::Payload;
use crate::unread::UnreadSlice;

pub(crate) use cutting::Terms;

/// RESET_STREAM code: the message is not wanted any more (the reference's value).
pub(crate) const CODE_CANCELLED: u64 = 0x8000_0006;

/// Send capacity left to lanes while bodies flow: 11 packets of 1,452 bytes.
const RESERVE_BYTES: usize = 16 << 10;
/// Bytes handed to quiche at a time: it frees a slice only when all of it is acknowledged.
const SLICE_BYTES: usize = 256 << 10;
/// Header plus the byte that names the stream's kind.
const OPENING_BYTES: usize = 1 + Header::BYTES;

/// Urgency of a class's streams (RFC 9218 has 8 levels; quiche 256): lanes take 0 and 64.
fn urgency(class: Class) -> u8 {
    match class {
        Class::Latency => 32,
        Class::Normal => 96,
        Class::Bulk => 192,
    }
}

#[derive(Debug)]
struct Active {
    message: Outgoing,
    stream: u64,
    /// Bytes of opening and body that the path has taken.
    taken: u64,
    /// Bytes that it took meanwhile of the messages that are fed before this one.
    before_bytes: u64,
    look: Look,
}

impl Active {
    fn total(&self) -> u64 {
        OPENING_BYTES as u64 + u64::from(self.message.header.body_bytes)
    }

    fn is_answer(&self) -> bool {
        self.message.header.kind == Kind::Response
    }

    /// What came of it in the last interval: bytes that the path has taken, and those of an answer
    /// that the peer acknowledged.
    fn take_turn(&mut self) -> Turn {
        let of_body = self.taken.saturating_sub(OPENING_BYTES as u64);
        let unread = self.message.unread.as_ref();
        let acknowledged = unread.map_or(0, |answer| answer.acknowledged_bytes(of_body));
        let place = (self.message.header.class.index(), self.stream);
        let turn = self.look.take_turn(place, self.taken + acknowledged);
        Turn {
            is_judged: turn.is_judged && self.is_answer(),
            ..turn
        }
    }

    /// The next bytes, at most `max`, and whether they are the last.
    fn next(&self, max: usize) -> (StreamBuffer, bool) {
        if self.taken < OPENING_BYTES as u64 {
            let mut opening = [0; OPENING_BYTES];
            opening[0] = StreamKind::Message.encode();
            opening[1..].copy_from_slice(&self.message.header.encode());
            let rest = Bytes::copy_from_slice(&opening[self.taken as usize..]);
            return (StreamBuffer::small(rest), self.message.body.is_empty());
        }
        let offset = self.taken - OPENING_BYTES as u64;
        match &self.message.body {
            Payload::Empty => (StreamBuffer::small(Bytes::new()), true),
            Payload::Bytes(bytes) => (StreamBuffer::small(bytes.slice(offset as usize..)), true),
            Payload::Chunks(body) => {
                let Some(slice) = body.slice_at(offset as usize, max.min(SLICE_BYTES)) else {
                    return (StreamBuffer::small(Bytes::new()), true);
                };
                let last = offset as usize + slice.len() == body.len();
                let buffer = match &self.message.unread {
                    Some(answer) => {
                        let unread = UnreadSlice::new(answer, slice.len());
                        StreamBuffer::unread(slice, unread)
                    }
                    None => StreamBuffer::chunk(slice),
                };
                (buffer, last)
            }
        }
    }
}

/// Prefetches the body bytes that quiche will put into the next packets: presumably those that it
/// was given first.
///
/// A body comes from memory, not from a cache, and copying it into packets is a quarter of a
/// sender's time. Asking for the bytes a few packets early hides most of the wait. A wrong guess
/// (repeats, other frames in between) costs a few useless hints.
#[derive(Debug, Default)]
struct Prefetcher {
    slices: VecDeque<ChunkSlice>,
    /// Bytes of the first slice that have been sent.
    sent: usize,
}

impl Prefetcher {
    /// How far ahead, besides two packets.
    const DISTANCE_BYTES: usize = 4 << 10;
    /// More are not remembered; a window holds fewer.
    const SLICES_MAX: usize = 64;

    fn push(&mut self, slice: ChunkSlice) {
        if self.slices.len() == Self::SLICES_MAX {
            self.clear();
        }
        self.slices.push_back(slice);
    }

    fn clear(&mut self) {
        self.slices.clear();
        self.sent = 0;
    }

    #[inline]
    fn advance(&mut self, bytes: usize) {
        let Some(first) = self.slices.front() else {
            return;
        };
        first.prefetch(self.sent + Self::DISTANCE_BYTES + 2 * bytes, bytes);
        self.sent += bytes;
        if self.sent >= first.len() {
            self.sent -= first.len();
            self.slices.pop_front();
        }
    }
}

/// Outgoing message streams of one connection.
#[derive(Debug)]
pub(crate) struct StreamCarrier {
    waiting: [VecDeque<Outgoing>; 3],
    active: Vec<Active>,
    active_in: [usize; 3],
    queue_max: PerClass<usize>,
    answers: Answers,
    /// When unread answers last came forward, or began to be judged.
    moved_at: Option<Instant>,
    active_max: usize,
    /// Send capacity that bodies of class bulk leave to lanes, bytes.
    reserve_bytes: usize,
    next_stream: u64,
    opened: u64,
    /// Bytes that the path has taken.
    moved_bytes: u64,
    /// Messages whose streams the peer stopped, since the last look.
    stopped: Vec<Header>,
    prefetcher: Prefetcher,
}

/// Whether this is the message that `header` names.
fn is_same(message: &Outgoing, header: &Header) -> bool {
    message.header.id == header.id && message.header.kind == header.kind
}

/// What became of a stream that was fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fed {
    /// The path takes no more now.
    Blocked,
    /// The path has taken all, or the connection is closing.
    Done,
    /// The peer wants no more of it (STOP_SENDING).
    Stopped,
}

impl StreamCarrier {
    /// `first_stream`: the first unidirectional stream id after the lanes (RFC 9000, 2.1).
    pub(crate) fn new(
        first_stream: u64,
        queue_max: PerClass<usize>,
        answers: Answers,
        active_max: usize,
    ) -> Self {
        Self {
            waiting: Default::default(),
            active: Vec::with_capacity(3 * active_max),
            active_in: [0; 3],
            queue_max,
            answers,
            moved_at: None,
            active_max,
            reserve_bytes: RESERVE_BYTES,
            next_stream: first_stream,
            opened: 0,
            moved_bytes: 0,
            stopped: Vec::new(),
            prefetcher: Prefetcher::default(),
        }
    }

    /// The connection is paced: bodies leave no send capacity unused.
    pub(crate) fn set_paced(&mut self) {
        self.reserve_bytes = 0;
    }

    /// Asks the processor for the body bytes of packets to come. `packet_bytes` have just been
    /// sent.
    #[inline]
    pub(crate) fn prefetch(&mut self, packet_bytes: usize) {
        self.prefetcher.advance(packet_bytes);
    }

    /// Bytes of messages that the path has taken so far.
    pub(crate) fn moved_bytes(&self) -> u64 {
        self.moved_bytes
    }

    /// How far a message has come, and the bytes of messages that it waits for. One that is not
    /// held counts as sent.
    pub(crate) fn sighting(&self, header: &Header) -> Sighting {
        let mut waiting = self.waiting[header.class.index()].iter();
        let mut active = self.active.iter();
        let (stage, moved_bytes) =
            if let Some(active) = active.find(|active| is_same(&active.message, header)) {
                (Stage::Sending, active.before_bytes + active.taken)
            } else if waiting.any(|message| is_same(message, header)) {
                (Stage::Queued, self.moved_bytes)
            } else {
                (Stage::Sent, 0)
            };
        Sighting { stage, moved_bytes }
    }

    /// Streams opened since the last call.
    pub(crate) fn take_opened(&mut self) -> u64 {
        std::mem::take(&mut self.opened)
    }

    /// The messages whose streams the peer stopped, since the last call.
    pub(crate) fn take_stopped(&mut self) -> Vec<Header> {
        std::mem::take(&mut self.stopped)
    }

    /// Takes back the answers to these requests, whose ids are in ascending order. It costs one
    /// look at each message, however many ids there are.
    pub(crate) fn cancel_answers<P: StreamPath>(&mut self, path: &mut P, ids: &[u32]) {
        let is_unwanted = |message: &Outgoing| {
            let header = &message.header;
            header.kind == Kind::Response && ids.binary_search(&header.id).is_ok()
        };
        for queue in &mut self.waiting {
            queue.retain(|message| {
                let is_kept = !is_unwanted(message);
                if !is_kept {
                    self.answers.remove(message);
                }
                is_kept
            });
        }
        for at in (0..self.active.len()).rev() {
            if is_unwanted(&self.active[at].message) {
                self.reset_active(path, at);
            }
        }
    }

    fn reset_active<P: StreamPath>(&mut self, path: &mut P, at: usize) {
        self.prefetcher.clear();
        let stream = self.remove_active(at);
        path.stream_reset(stream, CODE_CANCELLED);
    }

    /// The peer stopped this stream of ours. Whether a message was under way on it.
    pub(crate) fn on_stopped(&mut self, stream: u64) -> bool {
        let at = self
            .active
            .iter()
            .position(|active| active.stream == stream);
        if let Some(at) = at {
            self.stop_active(at);
        }
        at.is_some()
    }

    fn stop_active(&mut self, at: usize) {
        self.prefetcher.clear();
        self.stopped.push(self.active[at].message.header);
        self.remove_active(at);
    }

    /// Body bytes of `class` that quiche has not taken. Adds up over the queue: not for every
    /// packet.
    pub(crate) fn queued_bytes(&self, class: Class) -> u64 {
        let waiting = self.waiting[class.index()].iter();
        let waiting = waiting.map(|message| u64::from(message.header.body_bytes));
        let is_of_class = |active: &&Active| active.message.header.class == class;
        let active = self.active.iter().filter(is_of_class);
        let active = active.map(|active| active.total() - active.taken);
        waiting.chain(active).sum()
    }

    /// Bytes of answers in memory of their own that wait or flow.
    #[cfg(test)]
    pub(crate) fn plain_answer_bytes(&self) -> u64 {
        self.answers.plain_bytes()
    }

    /// Whether nothing waits or flows.
    pub(crate) fn is_idle(&self) -> bool {
        self.active.is_empty() && self.waiting.iter().all(VecDeque::is_empty)
    }

    /// Drops all that waits or flows: the connection is gone.
    pub(crate) fn clear(&mut self) {
        self.waiting.iter_mut().for_each(VecDeque::clear);
        self.active.clear();
        self.active_in = [0; 3];
        self.answers.clear();
        self.prefetcher.clear();
    }

    /// Drops an active message, and says which stream it had.
    fn remove_active(&mut self, at: usize) -> u64 {
        let active = self.active.remove(at);
        self.active_in[active.message.header.class as usize] -= 1;
        self.answers.remove(&active.message);
        active.stream
    }

    /// The path has taken all of an active message, or takes no more of it.
    fn finish_active(&mut self, at: usize) {
        let active = &self.active[at];
        if active.taken == active.total() {
            let (total, look) = (active.total(), active.look);
            self.answers
                .on_sent(&active.message, active.stream, total, look);
        }
        self.remove_active(at);
    }

    /// Opens streams for waiting messages while their class and the peer's stream limit allow.
    fn activate<P: StreamPath>(&mut self, path: &mut P) {
        for class in [Class::Latency, Class::Normal, Class::Bulk] {
            while self.active_in[class as usize] < self.active_max {
                if self.waiting[class as usize].is_empty() || path.streams_left() == 0 {
                    break;
                }
                let stream = self.next_stream;
                if path.stream_priority(stream, urgency(class)).is_err() {
                    break;
                }
                let Some(message) = self.waiting[class as usize].pop_front() else {
                    break;
                };
                self.next_stream += 4;
                self.opened += 1;
                self.active_in[class as usize] += 1;
                let active = Active {
                    message,
                    stream,
                    taken: 0,
                    before_bytes: 0,
                    look: Look::default(),
                };
                // Kept in order of class, then age: `poll_transmit` feeds from the front.
                let at = self
                    .active
                    .partition_point(|a| a.message.header.class as u8 <= class as u8);
                self.active.insert(at, active);
            }
        }
    }

    /// Feeds one stream.
    fn feed<P: StreamPath>(
        active: &mut Active,
        path: &mut P,
        prefetcher: &mut Prefetcher,
        reserve_bytes: usize,
    ) -> Fed {
        loop {
            let capacity = match path.stream_capacity(active.stream) {
                Ok(capacity) => capacity,
                Err(StreamError::Stopped) => return Fed::Stopped,
                Err(_) => return Fed::Done,
            };
            let reserve = if active.message.header.class == Class::Bulk {
                reserve_bytes.min(capacity / 2)
            } else {
                0
            };
            let room = capacity - reserve;
            if room == 0 {
                return Fed::Blocked;
            }
            let (buffer, last) = active.next(room);
            let offered = buffer.as_ref().len();
            let piece = buffer.as_chunk().cloned();
            match path.stream_send_buffer(active.stream, buffer, last) {
                Ok(taken) => {
                    active.taken += taken as u64;
                    if let Some(piece) = piece {
                        prefetcher.push(piece.slice(0..taken));
                    }
                    if active.taken == active.total() {
                        return Fed::Done;
                    }
                    if taken < offered {
                        return Fed::Blocked;
                    }
                }
                Err(StreamError::Blocked) => return Fed::Blocked,
                Err(StreamError::Stopped) => return Fed::Stopped,
                Err(StreamError::Ended) => return Fed::Done,
            }
        }
    }
}

impl Carrier for StreamCarrier {
    fn enqueue(&mut self, mut message: Outgoing) -> Result<(), QueueFull> {
        let class = message.header.class;
        if self.queued(class) >= self.queue_max.of(class) {
            return Err(QueueFull::Queue);
        }
        self.answers.add(&mut message)?;
        self.waiting[class as usize].push_back(message);
        Ok(())
    }

    fn poll_transmit<P: StreamPath>(&mut self, path: &mut P) -> Progress {
        if self.is_idle() {
            self.prefetcher.clear();
            return Progress::Blocked;
        }
        self.activate(path);
        let mut at = 0;
        let mut finished = false;
        let mut moved_bytes = 0;
        while at < self.active.len() {
            let reserve_bytes = self.reserve_bytes;
            let active = &mut self.active[at];
            active.before_bytes += moved_bytes;
            let before = active.taken;
            let fed = Self::feed(active, path, &mut self.prefetcher, reserve_bytes);
            moved_bytes += active.taken - before;
            if fed == Fed::Blocked {
                at += 1;
                continue;
            }
            if fed == Fed::Stopped {
                self.stop_active(at);
            } else {
                self.finish_active(at);
            }
            finished = true;
        }
        self.moved_bytes += moved_bytes;
        if finished && self.waiting.iter().any(|queue| !queue.is_empty()) {
            Progress::More
        } else {
            Progress::Blocked
        }
    }

    fn cancel<P: StreamPath>(&mut self, path: &mut P, header: &Header) -> bool {
        let same = |message: &Outgoing| is_same(message, header);
        let queue = &mut self.waiting[header.class as usize];
        if let Some(at) = queue.iter().position(same) {
            if let Some(message) = queue.remove(at) {
                self.answers.remove(&message);
            }
            return true;
        }
        if let Some(at) = self.active.iter().position(|active| same(&active.message)) {
            self.reset_active(path, at);
            return true;
        }
        false
    }

    fn queued(&self, class: Class) -> usize {
        self.waiting[class as usize].len() + self.active_in[class as usize]
    }
}

#[cfg(test)]
mod tests;
