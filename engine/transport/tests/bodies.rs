//! Bodies and the space that they take: who is charged for it, how long, what a peer hears that
//! gets none, and services that take a body chunk by chunk.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::*;
use millrace_protocol::frame::{Class, FailureCode, Header, Kind, Limits, Method};
use millrace_shards::chunk::{Body, CHUNK_BYTES, Chunk};
use millrace_testkit::within;
use millrace_transport::counters::{Counter, Family};
use millrace_transport::{
    Answer, BodyHead, BodyMode, BodySink, CloseCode, Defer, EdgeStart, Inbound, InboundBody,
    Payload, PerClass, Router, RpcError, Service, TransportConfig,
};
use raw::{Raw, RawOptions};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(10);

/// Keeps the body.
const KEEP: Method = Method(20);
/// Takes the body by a sink, and answers with what the sink got.
const STREAM: Method = Method(21);
/// Refuses the body before it comes.
const REFUSE: Method = Method(22);
/// Answers with as many bytes as the request's first four say.
const GIVE: Method = Method(23);

/// The store's first stream after its lanes; the next ones follow by fours.
const STREAM_OF_MESSAGE: u64 = 23;

/// What services did with bodies, for the test to see.
#[derive(Clone, Default)]
struct Seen {
    kept: Arc<Mutex<Vec<Body>>>,
    /// Lengths of the bodies that were to go to a sink.
    begun: Arc<Mutex<Vec<u64>>>,
    /// Announced length, and how it ended.
    ends: Arc<Mutex<Vec<(u64, &'static str)>>>,
}

impl Seen {
    fn ends(&self) -> Vec<(u64, &'static str)> {
        self.ends.lock().unwrap().clone()
    }
}

struct BodyStore {
    seen: Seen,
    pool: millrace_shards::chunk::ChunkPool,
}

struct Sink {
    announced: u64,
    chunks: Vec<Chunk>,
    seen: Seen,
}

impl BodySink for Sink {
    fn on_chunk(&mut self, offset: u64, chunk: Chunk) {
        let so_far: usize = self.chunks.iter().map(|chunk| chunk.len()).sum();
        assert_eq!(offset, so_far as u64, "chunks come in order");
        self.chunks.push(chunk);
    }

    fn on_cut(&mut self, reason: &'static str) {
        self.seen
            .ends
            .lock()
            .unwrap()
            .push((self.announced, reason));
    }
}

impl Service for BodyStore {
    fn on_request(&mut self, request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        match (request.method, request.body) {
            (KEEP, InboundBody::Chunks(body)) => {
                self.seen.kept.lock().unwrap().push(body);
                Answer::Reply(Payload::Empty)
            }
            (STREAM, InboundBody::Streamed(body)) => {
                let len = body.len();
                let sink = body
                    .into_sink::<Sink>()
                    .expect("the sink that on_body gave");
                self.seen
                    .ends
                    .lock()
                    .unwrap()
                    .push((sink.announced, "whole"));
                let body = Body::from_chunks(sink.chunks).expect("only the last is short");
                assert_eq!(body.len() as u64, len);
                Answer::Reply(body.into())
            }
            (GIVE, InboundBody::Slice(bytes)) => {
                let bytes = u32::from_le_bytes(bytes.try_into().unwrap());
                let bytes = vec![3; bytes as usize];
                if bytes.len() <= millrace_transport::INLINE_BYTES_MAX {
                    return Answer::Reply(bytes.into());
                }
                Answer::Reply(Body::copy_from_slice(&self.pool, &bytes).unwrap().into())
            }
            (method, body) => panic!("method {} with {body:?}", method.0),
        }
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        assert!(matches!(message.body, InboundBody::Streamed(_)));
        self.seen
            .ends
            .lock()
            .unwrap()
            .push((message.body.len(), "sent"));
    }

    fn on_body(&mut self, head: &BodyHead) -> BodyMode {
        assert_eq!(head.deadline.is_some(), head.class != Class::Normal);
        match head.method {
            STREAM => {
                self.seen.begun.lock().unwrap().push(head.body_bytes);
                BodyMode::Stream(Box::new(Sink {
                    announced: head.body_bytes,
                    chunks: Vec::new(),
                    seen: self.seen.clone(),
                }))
            }
            REFUSE => BodyMode::Refuse(FailureCode::NotFound),
            _ => BodyMode::Whole,
        }
    }
}

/// A node that dials, and one that keeps bodies.
struct Testbed {
    asker: Node,
    store: Node,
    seen: Seen,
}

impl Testbed {
    /// The asker has the defaults, and pools of 32 MiB.
    fn new(store_config: TransportConfig) -> Self {
        Self::with(TransportConfig::default(), store_config)
    }

    fn with(asker_config: TransportConfig, store_config: TransportConfig) -> Self {
        let (mut a, mut b) = (key(1), key(2));
        if b.node_id() < a.node_id() {
            std::mem::swap(&mut a, &mut b);
        }
        let (at, bt) = (free_addr(), free_addr());
        let topology = topology([member(&a, at), member(&b, bt)], 1);
        let seen = Seen::default();
        let for_services = seen.clone();
        let services = move |messenger: millrace_transport::ShardMessenger| {
            use millrace_transport::Messenger;
            let store = BodyStore {
                seen: for_services.clone(),
                pool: messenger.pool().clone(),
            };
            Router::new().serve(KEEP..=GIVE, store)
        };
        let shards = || vec![shard_config(32 * MIB)];
        let edge = EdgeStart::default();
        let store = Node::start_serving(b, bt, &topology, store_config, shards(), edge, services);
        let asker = Node::start_shards(a, at, &topology, asker_config, shards());
        asker.wait_for_peers(&[store.id()]);
        store.wait_for_peers(&[asker.id()]);
        Self { asker, store, seen }
    }

    fn ask(&self, method: Method, body: impl Into<Payload>) -> Result<Payload, RpcError> {
        let request = request(method, Class::Bulk, body);
        let answer = self.asker.transport.request(self.store.id(), request);
        answer.wait(PATIENCE)
    }

    fn keep(&self, bytes: u64) -> Result<(), RpcError> {
        self.ask(KEEP, self.asker.body(bytes as usize)).map(drop)
    }

    /// What of the store's pool is taken, once nothing is on its way.
    fn taken_bytes(&self) -> u64 {
        let pool = self.store.transport.pool(0).unwrap();
        pool.total_bytes() - pool.free_bytes()
    }

    /// The connection of before is still the one.
    fn assert_not_replaced(&self) {
        assert!(
            self.asker
                .events
                .try_iter()
                .all(|event| matches!(event, Event::Up(..)))
        );
    }
}

fn budget(total_bytes: u64, peer_bytes_max: u64) -> TransportConfig {
    TransportConfig {
        receive_budget_bytes: total_bytes,
        receive_budget_peer_bytes: peer_bytes_max,
        ..Default::default()
    }
}

const BUSY: RpcError = RpcError::Peer(FailureCode::Busy);
const TOO_LARGE: RpcError = RpcError::Peer(FailureCode::TooLarge);

// Protects other peers from one whose bodies are kept: the handler that returned has not given the
// space back, the store's thread that drops the body has.
#[test]
fn a_peer_that_fills_its_share_is_busy_until_a_store_drops_a_body() {
    let bed = Testbed::new(budget(16 * MIB, 8 * MIB));
    bed.keep(3 * MIB).unwrap();
    bed.keep(4 * MIB).unwrap();
    for _ in 0..3 {
        assert_eq!(bed.keep(2 * MIB), Err(BUSY));
    }
    let rejected = |reason| bed.store.reason(Family::Rejected, reason);
    assert_eq!(rejected("budget_peer_share"), 3);
    // One chunk of the second body stays with a clone: its space does too, and no more than that.
    let (first, second) = {
        let mut kept = bed.seen.kept.lock().unwrap();
        (kept.remove(0), kept.remove(0))
    };
    let chunk = second.chunks()[1].clone();
    drop(second);
    assert_eq!(bed.taken_bytes(), 4 * MIB);
    bed.keep(4 * MIB).unwrap();
    assert_eq!(bed.keep(MIB), Err(BUSY));
    drop((first, chunk));
    bed.keep(4 * MIB).unwrap();
    bed.assert_not_replaced();
    // All is given back when the shard is gone, too: what is kept stays readable.
    bed.store.transport.shutdown();
    let kept = std::mem::take(&mut *bed.seen.kept.lock().unwrap());
    let wanted = bytes_of(&bed.asker.body(4 << 20).into());
    for body in kept {
        assert!(bytes_of(&body.into()) == wanted);
    }
    assert_eq!(bed.taken_bytes(), 0);
}

// Protects small bodies from the size of a chunk: 24 of 256 KiB fit where 6 of 1 MiB would.
#[test]
fn a_body_takes_its_length_in_units_of_the_budget_and_the_pool() {
    let bed = Testbed::new(budget(12 * MIB, 6 * MIB));
    for _ in 0..24 {
        bed.keep(256 << 10).unwrap();
    }
    assert_eq!(bed.taken_bytes(), 6 * MIB);
    assert_eq!(bed.keep((64 << 10) + 1), Err(BUSY));
    bed.seen.kept.lock().unwrap().clear();
    bed.keep((64 << 10) + 1).unwrap();
    assert_eq!(bed.taken_bytes(), 128 << 10);
}

// Protects an asker's choice between trying again and giving up.
#[test]
fn busy_and_too_large_are_told_apart() {
    let limits = Limits {
        body_bytes_max: 12 << 20,
        ..Limits::default()
    };
    let config = TransportConfig {
        limits,
        ..budget(64 * MIB, 10 * MIB)
    };
    let bed = Testbed::new(config);
    let cases = [
        (11 * MIB, TOO_LARGE, "budget_peer_too_large"),
        (13 * MIB, TOO_LARGE, "peer_body_too_long"),
        (10 * MIB, BUSY, "budget_peer_share"),
    ];
    bed.keep(100_000).unwrap();
    for (bytes, error, reason) in cases {
        assert_eq!(bed.keep(bytes), Err(error), "{bytes}");
        assert_eq!(bed.store.reason(Family::Rejected, reason), 1, "{reason}");
    }
    // The pool is fuller than the budget says: the test holds its chunks.
    bed.seen.kept.lock().unwrap().clear();
    let pool = bed.store.transport.pool(0).unwrap();
    let held: Vec<_> = (0..30).map(|_| pool.take().unwrap()).collect();
    assert_eq!(bed.keep(5 * MIB), Err(BUSY));
    assert_eq!(bed.store.reason(Family::Rejected, "pool_exhausted"), 1);
    drop(held);
    bed.keep(10 * MIB).unwrap();
    let refused = bed.ask(REFUSE, bed.asker.body(100_000)).map(drop);
    assert_eq!(refused, Err(RpcError::Peer(FailureCode::NotFound)));
    bed.assert_not_replaced();
}

// Protects an asker from an answer that it has no space for: it hears so at once, and whether to
// ask again; the connection stays.
#[test]
fn an_answer_without_space_is_an_error_of_the_asker() {
    let bed = Testbed::with(budget(32 * MIB, 4 * MIB), TransportConfig::default());
    let give = |bytes: u64| bed.ask(GIVE, (bytes as u32).to_le_bytes().to_vec());
    let held = give(3 * MIB).unwrap();
    assert_eq!(held.len(), 3 * MIB);
    let rest = give(MIB).unwrap();
    assert_eq!(give(40 << 10).unwrap().len(), 40 << 10, "a small one has");
    drop(rest);
    let error = |bytes| give(bytes).map(drop).unwrap_err();
    assert_eq!(error(2 * MIB), RpcError::LocalNoBudget);
    let never = RpcError::LocalAnswerTooLarge {
        body_bytes: 5 * MIB,
    };
    assert_eq!(error(5 * MIB), never);
    drop(held);
    assert_eq!(give(2 * MIB).unwrap().len(), 2 * MIB);
    bed.assert_not_replaced();
}

fn header(kind: Kind, method: Method, id: u32, body_bytes: u64) -> Header {
    Header {
        kind,
        class: if kind == Kind::Send {
            Class::Normal
        } else {
            Class::Bulk
        },
        method,
        id,
        body_bytes: body_bytes as u32,
        arg: 60_000,
    }
}

/// The store, and a client without manners in the asker's place.
fn store_and_raw(config: TransportConfig) -> (Testbed, Raw) {
    let bed = Testbed::new(config);
    bed.asker.transport.shutdown();
    bed.store.wait_for_peers(&[]);
    let to = bed.store.transport.local_addr();
    let mut raw = Raw::dial(to, &RawOptions::of(&bed.asker.key));
    raw.introduce();
    (bed, raw)
}

// Protects an asker's uplink: a refusal comes before the body was sent, whatever the reason.
#[test]
fn a_refused_request_is_answered_while_its_body_is_still_to_come() {
    let (bed, mut raw) = store_and_raw(budget(16 * MIB, 8 * MIB));
    bed.seen.kept.lock().unwrap().clear();
    let cases = [
        (KEEP, 9 * MIB, FailureCode::TooLarge),
        (KEEP, 200 * MIB, FailureCode::TooLarge),
        (REFUSE, MIB, FailureCode::NotFound),
        (Method(99), MIB, FailureCode::UnknownMethod),
    ];
    for ((n, (method, bytes, code)), id) in (0..).zip(cases).zip(7..) {
        let opening = [
            &[2],
            &header(Kind::Request, method, id, bytes).encode()[..],
            &[0; 100],
        ];
        assert!(raw.send(Raw::stream(n), &opening.concat(), false));
        assert_eq!(raw.failure(LIMIT), Some((id, code)));
    }
    // Two that fit, and are not finished; the third has to wait.
    for (n, id) in (4..).zip(11..14) {
        let opening = [&[2], &header(Kind::Request, KEEP, id, 3 * MIB).encode()[..]].concat();
        assert!(raw.send(Raw::stream(n), &opening, false));
    }
    assert_eq!(raw.failure(LIMIT), Some((13, FailureCode::Busy)));
}

#[test]
fn a_sink_gets_a_body_chunk_by_chunk_and_goes_to_the_handler() {
    let bed = Testbed::new(TransportConfig::default());
    let lens = [
        (64 << 10) + 1,
        CHUNK_BYTES,
        CHUNK_BYTES + 1,
        3 * CHUNK_BYTES - 1,
    ];
    // Several at a time: each has its own sink.
    let answers: Vec<_> = lens
        .into_iter()
        .map(|len| {
            let request = request(STREAM, Class::Bulk, bed.asker.body(len));
            (len, bed.asker.transport.request(bed.store.id(), request))
        })
        .collect();
    for (len, answer) in answers {
        let wanted = bytes_of(&bed.asker.body(len).into());
        assert!(bytes_of(&answer.wait(PATIENCE).unwrap()) == wanted, "{len}");
    }
    let mut ends = bed.seen.ends();
    ends.sort_unstable();
    assert_eq!(ends, lens.map(|len| (len as u64, "whole")));
    // A one-way message too.
    let body = bed.asker.body(100_000).into();
    let sent = bed
        .asker
        .transport
        .send(bed.store.id(), Class::Normal, STREAM, body);
    sent.unwrap();
    let is_sent = || bed.seen.ends().last() == Some(&(100_000, "sent"));
    assert!(bed.store.transport.status().wait(PATIENCE, |_| is_sent()));
}

// Protects the space of other bodies from one whose asker is gone: it does not wait for the end of
// the body, which comes when it comes.
#[test]
fn a_request_that_is_cancelled_while_its_body_arrives_gives_its_space_back() {
    let (bed, mut raw) = store_and_raw(budget(16 * MIB, 8 * MIB));
    let cancelled = || bed.store.count(Counter::RequestsCancelled);
    let opening = |method, id| {
        let head = header(Kind::Request, method, id, 2 * MIB).encode();
        [&[2], &head[..], &[0; 70_000]].concat()
    };
    let cancel = |id| header(Kind::Cancel, Method(0), id, 0);
    let cancel = |id| {
        Header {
            arg: 0,
            ..cancel(id)
        }
        .encode()
    };
    for (n, method) in (0..).zip([STREAM, KEEP]) {
        let (stream, id) = (Raw::stream(n), n as u32);
        assert!(raw.send(stream, &opening(method, id), false));
        assert!(raw.drive(LIMIT, |_| bed.taken_bytes() > 0));
        assert!(raw.send(Raw::LANE, &cancel(id), false));
        assert!(raw.drive(LIMIT, |_| cancelled() == n + 1));
        assert_eq!(bed.taken_bytes(), 0);
        // The rest comes nevertheless, whole, and does no harm.
        assert!(raw.send(stream, &vec![0; 2 << 20][70_000..], true));
    }
    assert_eq!(bed.seen.ends(), [(2 * MIB, "peer_cancelled")]);
    // Before the first byte of the request: no service hears of it.
    assert!(raw.send(Raw::LANE, &cancel(2), false));
    // In its order on the lane, an answer says that the cancellation is there.
    let unknown = header(Kind::Request, Method(99), 3, 0).encode();
    assert!(raw.send(Raw::LANE, &unknown, false));
    assert_eq!(raw.failure(LIMIT), Some((3, FailureCode::UnknownMethod)));
    assert!(raw.send(Raw::stream(2), &opening(STREAM, 2), false));
    assert!(raw.drive(LIMIT, |_| cancelled() == 3));
    assert_eq!(bed.taken_bytes(), 0);
    assert_eq!(bed.seen.begun.lock().unwrap().len(), 1);
    // Another request of the connection is served.
    let head = header(Kind::Request, STREAM, 4, 2 * MIB).encode();
    let whole = [&[2], &head[..], &vec![0; 2 << 20]].concat();
    assert!(raw.send(Raw::stream(3), &whole, true));
    let ends = [(2 * MIB, "peer_cancelled"), (2 * MIB, "whole")];
    assert!(raw.drive(LIMIT, |_| bed.seen.ends() == ends));
    assert!(bed.seen.kept.lock().unwrap().is_empty());
    assert_eq!(bed.store.reason(Family::Rejected, "peer_cancelled"), 3);
}

// Protects a node's processor and memory: of a flood of cancellations a few are taken up at a time,
// the others are dropped, and neither the connection nor what comes after suffers.
#[test]
fn a_flood_of_cancellations_is_dropped_above_its_bound() {
    const FLOOD: u32 = 2_000;
    let mut config = budget(16 * MIB, 8 * MIB);
    config.requests_in_max = PerClass {
        latency: 8,
        normal: 8,
        bulk: 8,
    };
    let (bed, mut raw) = store_and_raw(config);
    let head = header(Kind::Request, STREAM, 1, 2 * MIB).encode();
    let opening = [&[2], &head[..], &[0; 70_000]].concat();
    assert!(raw.send(Raw::stream(0), &opening, false));
    assert!(raw.drive(LIMIT, |_| bed.taken_bytes() > 0));
    let cancel = |id| {
        let head = header(Kind::Cancel, Method(0), id, 0);
        Header { arg: 0, ..head }.encode()
    };
    let unknown = header(Kind::Request, Method(99), 2, 0).encode();
    let flood: Vec<u8> = (100..100 + FLOOD).flat_map(cancel).collect();
    assert!(raw.send(Raw::LANE, &[&flood, &unknown[..]].concat(), false));
    // In its order on the lane, the refusal says that the flood is over.
    let rejected = |reason| bed.store.reason(Family::Rejected, reason);
    assert!(raw.drive(LIMIT, |_| rejected("unknown_method") == 1));
    let dropped = rejected("peer_too_many_cancellations");
    assert!((1..u64::from(FLOOD)).contains(&dropped), "{dropped}");
    assert!(bed.taken_bytes() > 0);
    assert!(raw.send(Raw::LANE, &cancel(1), false));
    assert!(raw.drive(LIMIT, |_| bed.taken_bytes() == 0));
    assert_eq!(bed.store.count(Counter::RequestsCancelled), 1);
    assert!(raw.quic.peer_error().is_none());
}

// Protects an asker from waiting for its deadline, and the space of a body that is not sent: a peer
// that stops a stream (STOP_SENDING) ends that message, and all others go on.
#[test]
fn a_peer_that_stops_a_body_ends_that_message_alone() {
    let (bed, mut raw) = store_and_raw(budget(16 * MIB, 8 * MIB));
    let is_up = || bed.store.transport.status().peers().len() == 1;
    assert!(raw.drive(LIMIT, |_| is_up()));
    let (transport, peer) = (&bed.store.transport, bed.asker.id());
    let stopped = || bed.store.reason(Family::Failed, "peer_stopped");
    let begins = |raw: &mut Raw, stream| {
        assert!(raw.drive(LIMIT, |quic| quic.stream_readable(stream)));
    };
    let stop = |raw: &mut Raw, stream| {
        begins(raw, stream);
        let stop = raw.quic.stream_shutdown(stream, quiche::Shutdown::Read, 7);
        stop.unwrap();
    };
    // More than the window of a stream: the rest waits at the store.
    let body = bed.store.body(6 << 20);
    let answer = transport.request(peer, request(KEEP, Class::Bulk, body));
    // The other one begins later, whatever the order of classes.
    begins(&mut raw, STREAM_OF_MESSAGE);
    let other = transport.send(peer, Class::Normal, KEEP, bed.store.body(100_000).into());
    assert_eq!(other, Ok(()));
    stop(&mut raw, STREAM_OF_MESSAGE);
    assert!(raw.drive(LIMIT, |_| stopped() == 1));
    assert_eq!(answer.wait(LIMIT).unwrap_err(), RpcError::PeerProtocol);
    // The other message comes whole, and what both took is free then.
    let (mut bytes, mut buffer, mut is_whole) = (0, [0; 4_096], false);
    let whole = raw.drive(LIMIT, |quic| {
        while let Ok((read, fin)) = quic.stream_recv(STREAM_OF_MESSAGE + 4, &mut buffer) {
            bytes += read;
            is_whole |= fin;
        }
        is_whole
    });
    assert!(whole && bytes == 1 + Header::BYTES + 100_000, "{bytes}");
    assert!(raw.drive(LIMIT, |_| bed.taken_bytes() == 0));
    // Answers too: two at a time would be more than may wait.
    for n in 0..3 {
        let give = header(Kind::Request, GIVE, n as u32, 4).encode();
        let give = [&give[..], &(6_u32 << 20).to_le_bytes()].concat();
        assert!(raw.send(Raw::LANE, &give, false));
        stop(&mut raw, STREAM_OF_MESSAGE + 8 + 4 * n);
        assert!(raw.drive(LIMIT, |_| stopped() == 2 + n));
    }
    assert!(raw.drive(LIMIT, |_| bed.taken_bytes() == 0));
    assert!(is_up());
}

// Protects the peer's space and the path: what is left of a request whose asker is gone is not
// sent, and the peer hears so (RESET_STREAM) instead of waiting for it.
#[test]
fn a_request_that_is_dropped_half_way_resets_its_stream() {
    /// The reference's code: the message is not wanted any more.
    const CANCELLED: u64 = 0x8000_0006;
    let (bed, mut raw) = store_and_raw(budget(16 * MIB, 8 * MIB));
    let is_up = || bed.store.transport.status().peers().len() == 1;
    assert!(raw.drive(LIMIT, |_| is_up()));
    // More than the window of a stream, and the client reads too little to open it.
    let body = bed.store.body(6 << 20);
    let question = request(KEEP, Class::Bulk, body);
    let answer = bed.store.transport.request(bed.asker.id(), question);
    assert!(raw.drive(LIMIT, |quic| quic.stream_readable(STREAM_OF_MESSAGE)));
    drop(answer);
    let reset = Err(quiche::Error::StreamReset(CANCELLED));
    assert!(
        raw.drive(LIMIT, |quic| {
            quic.stream_recv(STREAM_OF_MESSAGE, &mut [0]) == reset
        }),
        "the stream goes on"
    );
    assert!(raw.drive(LIMIT, |_| bed.taken_bytes() == 0));
    assert!(is_up());
}

// Protects an asker from waiting for its deadline: a peer that takes its answer back, in the middle
// of it, ends the request.
#[test]
fn an_answer_that_is_reset_in_its_middle_ends_the_request() {
    let (bed, mut raw) = store_and_raw(budget(16 * MIB, 8 * MIB));
    let is_up = || bed.store.transport.status().peers().len() == 1;
    assert!(raw.drive(LIMIT, |_| is_up()));
    let question = request(GIVE, Class::Bulk, Payload::Empty);
    let answer = bed.store.transport.request(bed.asker.id(), question);
    let (id, _) = raw.request(LIMIT).expect("the question comes");
    let head = Header {
        arg: 0,
        ..header(Kind::Response, Method(0), id, 2 * MIB)
    };
    let part = [&[2], &head.encode()[..], &[0; 70_000]].concat();
    assert!(raw.send(Raw::stream(0), &part, false));
    assert!(raw.drive(LIMIT, |_| bed.taken_bytes() > 0));
    let reset = raw
        .quic
        .stream_shutdown(Raw::stream(0), quiche::Shutdown::Write, 1);
    reset.unwrap();
    let resets = || bed.store.reason(Family::Rejected, "peer_reset");
    assert!(raw.drive(LIMIT, |_| resets() == 1));
    assert_eq!(answer.wait(LIMIT).unwrap_err(), RpcError::PeerProtocol);
    assert_eq!(bed.taken_bytes(), 0);
    assert!(is_up());
}

// Protects a node from a peer that takes none of its lanes, and says so while nothing is sent on
// them: housekeeping is the first to hear of it, whether or not it has found the lane writable.
#[test]
fn a_lane_that_is_stopped_while_it_is_idle_ends_the_connection() {
    /// The store's lane of class latency, which begins with its hello.
    const LANE: u64 = 3;
    for housekeepings in [0, 3] {
        let (bed, mut raw) = store_and_raw(budget(16 * MIB, 8 * MIB));
        let status = bed.store.transport.status();
        assert!(raw.drive(LIMIT, |quic| {
            quic.stream_readable(LANE) && status.peers().len() == 1
        }));
        // Each publishes the status, and nothing else does meanwhile.
        let mut seen = 0;
        assert!(status.wait(PATIENCE, |_| {
            seen += 1;
            seen > housekeepings
        }));
        let stop = raw.quic.stream_shutdown(LANE, quiche::Shutdown::Read, 7);
        stop.unwrap();
        assert!(
            raw.drive(LIMIT, |quic| quic.peer_error().is_some()),
            "the connection stays after {housekeepings} turns of housekeeping"
        );
        let error = raw.quic.peer_error().unwrap();
        let violation = CloseCode::Violation as u64;
        assert_eq!((error.is_app, error.error_code), (true, violation));
    }
}

// Protects a service's bookkeeping: a sink whose body does not become whole hears why, once.
#[test]
fn a_sink_of_a_body_that_ends_early_is_cut_once() {
    let config = TransportConfig {
        stream_progress_interval: Duration::from_millis(300),
        ..budget(32 * MIB, 8 * MIB)
    };
    let (bed, mut raw) = store_and_raw(config);
    let part = vec![0; 70_000];
    let mut begin = |n: u64, kind: Kind, bytes: u64, end: &dyn Fn(&mut Raw, u64)| {
        let head = header(kind, STREAM, n as u32, bytes).encode();
        let opening = [&[2], &head[..], &part].concat();
        assert!(raw.send(Raw::stream(n), &opening, false));
        let seen = bed.seen.clone();
        let count = n as usize + 1;
        let begun = || seen.begun.lock().unwrap().len() == count;
        assert!(raw.drive(LIMIT, |_| begun()), "{n} begins");
        end(&mut raw, Raw::stream(n));
        assert!(raw.drive(LIMIT, |_| seen.ends().len() == count), "{n} ends");
    };
    let reset = |raw: &mut Raw, stream| {
        raw.quic
            .stream_shutdown(stream, quiche::Shutdown::Write, 1)
            .unwrap();
    };
    // A one-way message is no request, and is not counted as one.
    for ((n, kind), requests) in (0..).zip([Kind::Send, Kind::Request]).zip(0..) {
        begin(n, kind, 2 * MIB, &reset);
        assert_eq!(bed.store.count(Counter::RequestsCancelled), requests);
    }
    begin(2, Kind::Request, 80_000, &|raw, stream| {
        raw.send(stream, &[0; 10_001], false);
    });
    begin(3, Kind::Request, 80_000, &|raw, stream| {
        raw.send(stream, &[0; 9_999], true);
    });
    begin(4, Kind::Request, 9 * MIB, &|_, _| {});
    begin(5, Kind::Request, 3 * MIB, &|_, _| {});
    begin(6, Kind::Request, 3 * MIB, &|raw, _| {
        raw.quic.close(true, 0, b"").unwrap();
    });
    let wanted = [
        (2 * MIB, "peer_reset"),
        (2 * MIB, "peer_reset"),
        (80_000, "peer_body_longer_than_announced"),
        (80_000, "peer_body_shorter_than_announced"),
        (9 * MIB, "budget_peer_too_large"),
        (3 * MIB, "peer_stalled"),
        (3 * MIB, "connection_lost"),
    ];
    bed.store.wait_for_peers(&[]);
    assert_eq!(bed.seen.ends(), wanted);
    assert_eq!(bed.taken_bytes(), 0, "what a cut body took is free");
}

// Protects the pool from a sender that is killed: no packet says that it is gone, and what its
// bodies reserved is free after the idle timeout all the same.
#[test]
fn what_a_killed_sender_reserved_is_free_after_the_idle_timeout() {
    const IDLE: Duration = Duration::from_secs(1);
    // Nothing else ends them first.
    let never = Duration::from_secs(3_600);
    let config = TransportConfig {
        idle_timeout: IDLE,
        stream_progress_interval: never,
        probe_interval: never,
        ..budget(32 * MIB, 16 * MIB)
    };
    let (bed, mut raw) = store_and_raw(config);
    for (n, method) in [KEEP, STREAM].into_iter().enumerate() {
        let head = header(Kind::Request, method, n as u32, 3 * MIB).encode();
        let opening = [&[2], &head[..], &[0; 70_000]].concat();
        assert!(raw.send(Raw::stream(n as u64), &opening, false));
    }
    let is_reserved = |raw: &mut Raw| raw.drive(LIMIT, |_| bed.taken_bytes() == 6 * MIB);
    assert!(is_reserved(&mut raw), "{} bytes", bed.taken_bytes());
    drop(raw);
    let free = within(IDLE + PATIENCE, || (bed.taken_bytes() == 0).then_some(()));
    assert!(free.is_some(), "{} bytes are held", bed.taken_bytes());
    assert_eq!(bed.store.reason(Family::Closed, "timed_out"), 1);
    assert_eq!(bed.seen.ends(), [(3 * MIB, "connection_lost")]);
    // And no peer is charged for it.
    let to = bed.store.transport.local_addr();
    let mut raw = Raw::dial(to, &RawOptions::of(&bed.asker.key));
    raw.introduce();
    let head = header(Kind::Request, KEEP, 1, 16 * MIB).encode();
    let opening = [&[2], &head[..], &[0; 70_000]].concat();
    assert!(raw.send(Raw::stream(0), &opening, false));
    assert!(raw.drive(LIMIT, |_| bed.taken_bytes() == 16 * MIB));
}
