//! What waits to be sent on one connection: frames on lanes, messages with streams of their own,
//! datagrams.
//!
//! A lane is a long-lived unidirectional stream on which frames follow each other, so that many
//! small messages share a packet. Messages of one turn go to one lane, the next turn's to the next:
//! packets are full, and a lost packet holds up one lane out of `lanes` only. While the path loses
//! packets, normal messages take streams of their own instead ([`Outbox::set_lossy`]).
//!
//! Invariants
//! 1. `queued[class]` is the number of bytes in `pending` and `blocked` of that class's lanes, and
//!    never exceeds its bound plus one frame, or plus the headroom for refusals and cancellations.
//!    The shard's account has as many bytes of this connection, until the outbox is dropped.
//! 2. A frame is never torn: a lane's bytes are offered to the path in order until all are taken.

use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use millrace_protocol::body_deadline::Sighting;
use millrace_protocol::frame::{Class, Header, Kind, StreamKind};

use crate::answers::Answers;
use crate::buffers::StreamBuffer;
use crate::carrier::{Carrier, Outgoing, Progress, QueueFull};
use crate::config::{PerClass, TransportConfig};
use crate::path::{StreamError, StreamPath};
use crate::queue_account::QueueAccount;
use crate::service::message::Payload;
use crate::streams::{StreamCarrier, Terms};

const LATENCY_URGENCY: u8 = 0;
const NORMAL_URGENCY: u8 = 64;

#[derive(Debug)]
struct Lane {
    stream: u64,
    urgency: u8,
    class: Class,
    opened: bool,
    /// Frames not yet offered to the path.
    pending: Vec<u8>,
    /// Bytes that the path had no capacity for.
    blocked: Option<Bytes>,
    /// The peer stopped the lane: nothing can be sent on it any more.
    is_stopped: bool,
}

impl Lane {
    fn new(stream: u64, class: Class) -> Self {
        let urgency = if class == Class::Latency {
            LATENCY_URGENCY
        } else {
            NORMAL_URGENCY
        };
        Self {
            stream,
            urgency,
            class,
            opened: false,
            pending: Vec::new(),
            blocked: None,
            is_stopped: false,
        }
    }

    /// Offers what waits; returns the bytes taken.
    fn flush<P: StreamPath>(&mut self, path: &mut P) -> usize {
        if self.blocked.is_none() && self.pending.is_empty() {
            return 0;
        }
        if !self.opened {
            if path.stream_priority(self.stream, self.urgency).is_err() {
                return 0;
            }
            if path.stream_send(self.stream, &[StreamKind::Lane.encode()], false) != Ok(1) {
                return 0;
            }
            self.opened = true;
        }
        let mut flushed = 0;
        loop {
            let buffer = match self.blocked.take() {
                Some(blocked) => blocked,
                None if self.pending.is_empty() => return flushed,
                None => {
                    let capacity = self.pending.capacity().min(16 << 10);
                    Bytes::from(std::mem::replace(
                        &mut self.pending,
                        Vec::with_capacity(capacity),
                    ))
                }
            };
            // The path drops the buffer with an error: keep a reference.
            match path.stream_send_buffer(self.stream, StreamBuffer::small(buffer.clone()), false) {
                Ok(taken) => {
                    flushed += taken;
                    if taken < buffer.len() {
                        self.blocked = Some(buffer.slice(taken..));
                        return flushed;
                    }
                }
                Err(error) => {
                    self.is_stopped |= error == StreamError::Stopped;
                    self.blocked = Some(buffer);
                    return flushed;
                }
            }
        }
    }
}

/// The class of the lanes that carry small frames of `class`.
fn lane_class(class: Class) -> Class {
    match class {
        Class::Latency => Class::Latency,
        Class::Normal | Class::Bulk => Class::Normal,
    }
}

/// A message to be taken back.
#[derive(Clone, Copy, Debug)]
struct Cancellation {
    header: Header,
    tell: bool,
}

/// The outgoing side of a connection.
#[derive(Debug)]
pub(crate) struct Outbox {
    lanes: Vec<Lane>,
    /// The normal lane of this turn, an index from 1.
    turn_lane: usize,
    queued: [usize; 2],
    queue_max: PerClass<usize>,
    /// What all connections of the shard hold queued.
    account: Rc<QueueAccount>,
    /// Room beyond the bound for refusals and cancellations, for each class of lanes.
    headroom: [usize; 2],
    streams_max: PerClass<usize>,
    /// What refused a message, and was not found writable since: lanes and streams of each class.
    lanes_refused: [bool; 2],
    streams_refused: [bool; 3],
    lane_body_max: usize,
    lossy: bool,
    streams: StreamCarrier,
    /// Bytes of lanes that the path has taken.
    lanes_bytes: u64,
    /// Of them, those until unread answers were last judged.
    lanes_judged_bytes: u64,
    /// Requests or answers were put on lanes since the last feed.
    exchanges: bool,
    datagrams: Vec<Vec<u8>>,
    /// Each was a request of ours, in flight or queued since the last feed: as few as those are.
    cancellations: Vec<Cancellation>,
    /// Ids of the peer's requests whose answers it wants no more; at most `unwanted_max`.
    unwanted: Vec<u32>,
    unwanted_max: usize,
}

impl Outbox {
    /// `is_server`: which side of the connection we are; it decides our stream ids (RFC 9000, 2.1).
    pub(crate) fn new(
        config: &TransportConfig,
        account: &Rc<QueueAccount>,
        answers: Answers,
        is_server: bool,
    ) -> Self {
        let first = if is_server { 3 } else { 2 };
        let mut lanes = vec![Lane::new(first, Class::Latency)];
        lanes.extend(
            (1..=u64::from(config.lanes.max(1))).map(|i| Lane::new(first + 4 * i, Class::Normal)),
        );
        let first_message = first + 4 * lanes.len() as u64;
        let streams = StreamCarrier::new(
            first_message,
            config.stream_queue_messages,
            answers,
            config.streams_active_max,
        );
        Self {
            lanes,
            turn_lane: 1,
            queued: [0; 2],
            queue_max: config.lane_queue_bytes,
            account: Rc::clone(account),
            headroom: config.lane_headroom_bytes(),
            streams_max: config.stream_queue_messages,
            lanes_refused: [false; 2],
            streams_refused: [false; 3],
            lane_body_max: config.limits.lane_body_bytes_max as usize,
            lossy: false,
            streams,
            lanes_bytes: 0,
            lanes_judged_bytes: 0,
            exchanges: false,
            datagrams: Vec::new(),
            cancellations: Vec::new(),
            unwanted: Vec::new(),
            unwanted_max: config.cancellations_max(),
        }
    }

    /// The connection is paced: see [`StreamCarrier::set_paced`].
    pub(crate) fn set_paced(&mut self) {
        self.streams.set_paced();
    }

    /// Whether the path lost packets lately.
    pub(crate) fn set_lossy(&mut self, lossy: bool) {
        self.lossy = lossy;
    }

    /// Queues a message on a lane, or on a stream of its own when its body is large.
    pub(crate) fn push(&mut self, header: Header, body: Payload) -> Result<(), QueueFull> {
        let alone = self.lossy
            && header.class == Class::Normal
            && matches!(header.kind, Kind::Request | Kind::Response);
        if body.len() > self.lane_body_max as u64 || alone {
            let enqueued = self.streams.enqueue(Outgoing::new(header, body));
            self.streams_refused[header.class.index()] |= enqueued.is_err();
            return enqueued;
        }
        match &body {
            Payload::Empty => self.push_frame(header, &[]),
            Payload::Bytes(bytes) => self.push_frame(header, bytes),
            Payload::Chunks(chunks) => {
                let slice_bytes = self.lane_body_max.max(1);
                let pending = self.begin_frame(header, chunks.len())?;
                for slice in chunks.slices(slice_bytes) {
                    pending.extend_from_slice(slice.as_ref());
                }
                Ok(())
            }
        }
    }

    /// Queues a frame on a lane.
    pub(crate) fn push_frame(&mut self, header: Header, body: &[u8]) -> Result<(), QueueFull> {
        self.begin_frame(header, body.len())?
            .extend_from_slice(body);
        Ok(())
    }

    /// Begins a frame on a lane; the caller appends exactly `body_bytes` to what this returns.
    fn begin_frame(
        &mut self,
        header: Header,
        body_bytes: usize,
    ) -> Result<&mut Vec<u8>, QueueFull> {
        // Small frames of the bulk class share the normal lanes, and their bound.
        let lane = match lane_class(header.class) {
            Class::Latency => 0,
            Class::Normal | Class::Bulk => self.turn_lane,
        };
        let lane = &mut self.lanes[lane];
        let class = lane.class.index();
        // A refusal takes less than the answer that the peer waits for.
        let is_last_word = matches!(header.kind, Kind::Failure | Kind::Cancel) && body_bytes == 0;
        let headroom = if is_last_word {
            self.headroom[class]
        } else {
            0
        };
        let frame_bytes = Header::BYTES + body_bytes;
        let has_room = self.queued[class] < self.queue_max.of(lane.class) + headroom;
        let (held_bytes, bytes) = (self.queued[class] as u64, frame_bytes as u64);
        if has_room && is_last_word {
            self.account.add(bytes);
        } else if !has_room || self.account.try_add(held_bytes, bytes).is_err() {
            self.lanes_refused[class] = true;
            return Err(QueueFull::Queue);
        }
        self.queued[class] += frame_bytes;
        self.exchanges |= matches!(header.kind, Kind::Request | Kind::Response);
        lane.pending.extend_from_slice(&header.encode());
        Ok(&mut lane.pending)
    }

    /// Whether every queue of `class` that refused a message has fallen under half of its bound.
    pub(crate) fn is_writable(&mut self, class: Class) -> bool {
        let is_high = |queued: usize, max: usize| 2 * queued >= max.max(1);
        let lane = lane_class(class);
        let (at, max) = (lane.index(), self.queue_max.of(lane));
        // What others hold may have refused it.
        let max = max.min(self.account.free_bytes() as usize);
        self.lanes_refused[at] &= is_high(self.queued[at], max);
        let (queued, max) = (self.streams.queued(class), self.streams_max.of(class));
        self.streams_refused[class.index()] &= is_high(queued, max);
        !self.lanes_refused[at] && !self.streams_refused[class.index()]
    }

    /// Bytes that wait to be sent, for each class; small frames of class bulk count as normal.
    pub(crate) fn queued_bytes(&self) -> PerClass<u64> {
        let [latency, normal] = self.queued.map(|bytes| bytes as u64);
        PerClass {
            latency: latency + self.streams.queued_bytes(Class::Latency),
            normal: normal + self.streams.queued_bytes(Class::Normal),
            bulk: self.streams.queued_bytes(Class::Bulk),
        }
    }

    /// Queues a QUIC datagram (RFC 9221); the newest win when too many wait.
    pub(crate) fn push_datagram(&mut self, header: Header, body: &[u8]) {
        const WAITING_MAX: usize = 256;
        if self.datagrams.len() == WAITING_MAX {
            self.datagrams.remove(0);
        }
        let mut datagram = Vec::with_capacity(Header::BYTES + body.len());
        datagram.extend_from_slice(&header.encode());
        datagram.extend_from_slice(body);
        self.datagrams.push(datagram);
    }

    /// Takes a message back at the next feed if it has not left whole. If it has, and `tell`, the
    /// peer hears a cancellation.
    pub(crate) fn cancel(&mut self, header: Header, tell: bool) {
        self.cancellations.push(Cancellation { header, tell });
    }

    /// The peer wants no answer to its request `id` any more: it is taken back at the next feed if
    /// it has not left whole.
    ///
    /// # Errors
    /// When the peer said so of too many since the last feed: this one is sent.
    pub(crate) fn withdraw_answer(&mut self, id: u32) -> Result<(), QueueFull> {
        // What is on a lane is not taken back.
        if self.streams.is_idle() {
            return Ok(());
        }
        if self.unwanted.len() >= self.unwanted_max {
            return Err(QueueFull::Queue);
        }
        self.unwanted.push(id);
        Ok(())
    }

    /// Drops all that waits: the connection is gone.
    pub(crate) fn clear(&mut self) {
        for lane in &mut self.lanes {
            (lane.pending, lane.blocked) = (Vec::new(), None);
        }
        let queued = std::mem::take(&mut self.queued);
        self.account.remove(queued.iter().sum::<usize>() as u64);
        self.streams.clear();
        self.datagrams.clear();
        self.cancellations.clear();
        self.unwanted.clear();
    }

    /// Moves what waits into the path.
    pub(crate) fn poll_transmit<P: StreamPath>(&mut self, path: &mut P) -> Progress {
        self.cancel_all(path);
        for datagram in self.datagrams.drain(..) {
            // Its sender repeats it until acknowledged.
            path.datagram_send(datagram);
        }
        for lane in &mut self.lanes {
            let taken = lane.flush(path);
            let queued = &mut self.queued[lane.class as usize];
            *queued = queued.saturating_sub(taken);
            self.account.remove(taken as u64);
            self.lanes_bytes += taken as u64;
        }
        self.turn_lane = self.turn_lane % (self.lanes.len() - 1) + 1;
        self.streams.poll_transmit(path)
    }

    /// What this connection holds of the shard's account.
    #[cfg(test)]
    fn held_bytes(&self) -> u64 {
        self.queued.iter().sum::<usize>() as u64 + self.streams.plain_answer_bytes()
    }

    fn cancel_all<P: StreamPath>(&mut self, path: &mut P) {
        if !self.unwanted.is_empty() {
            let mut ids = std::mem::take(&mut self.unwanted);
            ids.sort_unstable();
            self.streams.cancel_answers(path, &ids);
        }
        for Cancellation { header, tell } in std::mem::take(&mut self.cancellations) {
            if !self.streams.cancel(path, &header) && tell {
                let frame = Header {
                    kind: Kind::Cancel,
                    body_bytes: 0,
                    arg: 0,
                    ..header
                };
                // There is headroom for it: no more requests are in flight than it holds.
                self.push_frame(frame, &[]).ok();
            }
        }
    }

    /// A packet of `bytes` was sent: the next ones' bytes will be wanted soon.
    #[inline]
    pub(crate) fn on_packet_sent(&mut self, bytes: usize) {
        self.streams.prefetch(bytes);
    }

    /// Whether requests or answers went onto lanes since the last call, and no body is under way.
    pub(crate) fn take_exchanges(&mut self) -> bool {
        std::mem::take(&mut self.exchanges) && self.streams.is_idle()
    }

    /// The peer stopped this stream of ours. Whether a message was under way on it.
    pub(crate) fn on_stopped(&mut self, stream: u64) -> bool {
        self.streams.on_stopped(stream)
    }

    /// Asks the path which lanes the peer stopped; whether there is one. Nothing else tells of a
    /// lane that is idle. The path names it as writable once, and not again when it is stopped; it
    /// frees it when the peer has acknowledged its end. No lane ends in another way.
    pub(crate) fn ask_for_stopped_lanes<P: StreamPath>(&mut self, path: &mut P) -> bool {
        for lane in self.lanes.iter_mut().filter(|lane| lane.opened) {
            lane.is_stopped |= path.stream_capacity(lane.stream).is_err();
        }
        self.is_stopped()
    }

    /// Whether the peer stopped a lane.
    pub(crate) fn is_stopped(&self) -> bool {
        self.lanes.iter().any(|lane| lane.is_stopped)
    }

    /// The messages whose streams the peer stopped, since the last call.
    pub(crate) fn take_stopped(&mut self) -> Vec<Header> {
        self.streams.take_stopped()
    }

    /// Bytes of messages with streams of their own that the path has taken so far.
    pub(crate) fn moved_bytes(&self) -> u64 {
        self.streams.moved_bytes()
    }

    /// How far a message has come on its way to the path, and the bytes that it waits for: lanes
    /// are fed before all messages. One on a lane counts as sent.
    pub(crate) fn sighting(&self, header: &Header) -> Sighting {
        let mut seen = self.streams.sighting(header);
        seen.moved_bytes += self.lanes_bytes;
        seen
    }

    /// Whether there may be an answer that the peer has not read.
    #[inline]
    pub(crate) fn may_have_answers(&self) -> bool {
        self.streams.may_have_answers()
    }

    /// Cuts the answers that the peer does not read: see [`StreamCarrier::cut_unread`].
    pub(crate) fn cut_unread<P: StreamPath>(
        &mut self,
        path: &mut P,
        terms: &Terms,
        now: Instant,
    ) -> Option<Vec<Header>> {
        let lanes_bytes = self.lanes_bytes - self.lanes_judged_bytes;
        self.lanes_judged_bytes = self.lanes_bytes;
        self.streams.cut_unread(path, lanes_bytes, terms, now)
    }

    /// Whether a message with a stream of its own waits or is under way.
    pub(crate) fn has_streams(&self) -> bool {
        !self.streams.is_idle()
    }

    pub(crate) fn take_streams_opened(&mut self) -> u64 {
        self.streams.take_opened()
    }

    /// Whether everything was handed to the path.
    pub(crate) fn is_idle(&self) -> bool {
        self.streams.is_idle()
            && self.cancellations.is_empty()
            && self.unwanted.is_empty()
            && self
                .lanes
                .iter()
                .all(|lane| lane.pending.is_empty() && lane.blocked.is_none())
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use millrace_protocol::frame::{Limits, Method};
    use millrace_protocol::id::NodeId;
    use millrace_protocol::unread::UnreadAnswers;
    use proptest::prelude::*;

    use super::*;
    use crate::room::Room;

    const BODY_BYTES: usize = 50;

    fn account() -> Rc<QueueAccount> {
        Rc::new(QueueAccount::new(
            TransportConfig::default().queue_bytes_max,
        ))
    }

    fn outbox(config: &TransportConfig, account: &Rc<QueueAccount>, is_server: bool) -> Outbox {
        let unread = Rc::new(RefCell::new(UnreadAnswers::new(1 << 20)));
        let peer = NodeId::from_bytes([1; 29]);
        let answers = Answers::new(peer, config.answer_queue_bytes, account, &unread);
        Outbox::new(config, account, answers, is_server)
    }

    fn header(kind: Kind) -> Header {
        Header {
            kind,
            class: Class::Normal,
            method: Method(0),
            id: 0,
            body_bytes: 0,
            arg: 0,
        }
    }

    /// How often a frame is taken, until it is refused.
    fn taken(out: &mut Outbox, kind: Kind, body: &[u8]) -> usize {
        let push = |_: &usize| out.push_frame(header(kind), body).is_ok();
        (0..1_000).take_while(push).count()
    }

    // Protects the peer that waits for an answer, and the memory of the node: a full lane takes a
    // refusal for each request that may be in flight, and not many more.
    #[test]
    fn a_full_lane_takes_refusals_and_cancellations_within_a_bound() {
        fn each<T: Copy>(n: T) -> PerClass<T> {
            PerClass {
                latency: n,
                normal: n,
                bulk: n,
            }
        }
        let config = TransportConfig {
            lane_queue_bytes: each(100),
            requests_out_max: each(1),
            requests_in_max: each(2),
            limits: Limits {
                lane_body_bytes_max: BODY_BYTES as u32,
                ..Limits::default()
            },
            ..TransportConfig::default()
        };
        // Classes normal and bulk share the lanes.
        let (cancellations, refusals) = (2, 4);
        let mut out = outbox(&config, &account(), true);
        assert_eq!(taken(&mut out, Kind::Send, &[0; BODY_BYTES]), 2);
        assert!(!out.is_writable(Class::Normal) && out.is_writable(Class::Latency));
        for _ in 0..cancellations {
            assert_eq!(out.push_frame(header(Kind::Cancel), &[]), Ok(()));
        }
        let taken = taken(&mut out, Kind::Failure, &[]);
        let frame = Header::BYTES + BODY_BYTES;
        let most = refusals + frame.div_ceil(Header::BYTES);
        assert!((refusals..=most).contains(&taken), "{taken}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push(Kind, usize),
        Transmit(usize),
        Withdraw(u32),
        Cancel(u32),
        Clear,
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let kind = prop_oneof![
            Just(Kind::Request),
            Just(Kind::Response),
            Just(Kind::Send),
            Just(Kind::Failure)
        ];
        prop_oneof![
            8 => (kind, 0usize..60_000).prop_map(|(kind, bytes)| Step::Push(kind, bytes)),
            4 => (0usize..80_000).prop_map(Step::Transmit),
            1 => (0u32..40).prop_map(Step::Withdraw),
            1 => (0u32..40).prop_map(Step::Cancel),
            1 => Just(Step::Clear),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// The shard's account has what its connections hold queued, whatever becomes of it, and
        /// nothing once they are gone. Only refusals take it over its bound.
        #[test]
        fn the_account_is_what_the_outboxes_hold(
            steps in proptest::collection::vec((any_step(), 0usize..2), 1..60),
        ) {
            const MAX: u64 = 150_000;
            let account = Rc::new(QueueAccount::new(MAX));
            let config = TransportConfig::default();
            let mut outs = [true, false].map(|side| outbox(&config, &account, side));
            let mut refusals = 0;
            for (id, (step, which)) in (0..).zip(steps) {
                let out = &mut outs[which];
                match step {
                    Step::Push(kind, bytes) => {
                        let bytes = if kind == Kind::Failure { 0 } else { bytes };
                        refusals += u64::from(kind == Kind::Failure);
                        let body_bytes = bytes as u32;
                        let header = Header { id, body_bytes, ..header(kind) };
                        let _ = out.push(header, Payload::from(vec![0; bytes]));
                    }
                    Step::Transmit(bytes) => {
                        out.poll_transmit(&mut Room::of(bytes));
                    }
                    Step::Withdraw(id) => out.withdraw_answer(id).unwrap(),
                    Step::Cancel(id) => {
                        out.cancel(Header { id, ..header(Kind::Request) }, true);
                        refusals += 1;
                    }
                    Step::Clear => out.clear(),
                }
                let held: u64 = outs.iter().map(Outbox::held_bytes).sum();
                prop_assert_eq!(account.used_bytes(), held);
                prop_assert!(held <= MAX + refusals * Header::BYTES as u64, "{}", held);
            }
            drop(outs);
            prop_assert_eq!(account.used_bytes(), 0);
        }
    }

    // Protects the node from a peer that takes back what it never asked for: nothing is noted while
    // no answer is under way, and a bounded number otherwise.
    #[test]
    fn answers_that_the_peer_wants_no_more_are_noted_within_a_bound() {
        let config = TransportConfig::default();
        let bound = config.cancellations_max();
        let mut out = outbox(&config, &account(), true);
        let noted = |out: &mut Outbox| {
            let withdraw = |id: &u32| out.withdraw_answer(*id).is_ok();
            let taken = (0..2 * bound as u32).take_while(withdraw).count();
            (taken, out.unwanted.len())
        };
        assert_eq!(noted(&mut out), (2 * bound, 0));
        let body = Payload::from(vec![0; config.limits.lane_body_bytes_max as usize + 1]);
        out.push(header(Kind::Response), body).unwrap();
        assert_eq!(noted(&mut out), (bound, bound));
        out.clear();
        assert!(out.is_idle());
    }
}
