//! Bodies between simulated nodes: who is charged for the space that they take and how long, what a
//! peer hears that gets none, services that take a body chunk by chunk; and what two releases agree
//! on before the first of them.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, FailureCode, Hello, Method, Negotiated, VersionRange};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_shards::chunk::{Body, Chunk};
use millrace_sim::memnet::LinkConfig;
use millrace_sim::{Sim, SimConfig, SimMessenger};
use millrace_transport::counters::Family;
use millrace_transport::{
    Answer, BodyHead, BodyMode, BodySink, Defer, Inbound, InboundBody, Messenger, Payload, Request,
    Router, RpcError, Service, TransportConfig,
};

/// Keeps the body.
const KEEP: Method = Method(20);
/// Takes the body by a sink, and answers with what the sink got.
const STREAM: Method = Method(21);
/// Keeps the body until its peer needs the space.
const SHELVE: Method = Method(22);

const MIB: usize = 1 << 20;
const MS: Duration = Duration::from_millis(1);
/// Virtual: costs nothing.
const LIMIT: Duration = Duration::from_secs(60);

const BUSY: RpcError = RpcError::Peer(FailureCode::Busy);
const TOO_LARGE: RpcError = RpcError::Peer(FailureCode::TooLarge);

/// What the services of all nodes saw.
#[derive(Default)]
struct Seen {
    kept: Vec<Body>,
    shelved: Vec<(NodeId, Body)>,
    /// Announced length of a body for a sink, and how it ended.
    ends: Vec<(u64, &'static str)>,
    /// A node, a peer that it is connected with, and what the two agreed on.
    hellos: Vec<(NodeId, NodeId, Negotiated)>,
}

struct BodyStore {
    messenger: SimMessenger,
    seen: Rc<RefCell<Seen>>,
}

struct Sink {
    announced: u64,
    chunks: Vec<Chunk>,
    seen: Rc<RefCell<Seen>>,
}

impl BodySink for Sink {
    fn on_chunk(&mut self, offset: u64, chunk: Chunk) {
        let so_far: usize = self.chunks.iter().map(|chunk| chunk.len()).sum();
        assert_eq!(offset, so_far as u64, "chunks come in order");
        self.chunks.push(chunk);
    }

    fn on_cut(&mut self, reason: &'static str) {
        self.seen.borrow_mut().ends.push((self.announced, reason));
    }
}

impl Service for BodyStore {
    fn on_request(&mut self, request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        match (request.method, request.body) {
            (KEEP, InboundBody::Chunks(body)) => {
                self.seen.borrow_mut().kept.push(body);
                Answer::Reply(Payload::Empty)
            }
            (SHELVE, InboundBody::Slice(bytes)) => Answer::Reply(bytes.to_vec().into()),
            (SHELVE, InboundBody::Chunks(body)) => {
                self.seen.borrow_mut().shelved.push((request.peer, body));
                Answer::Reply(Payload::Empty)
            }
            (STREAM, InboundBody::Streamed(body)) => {
                let sink = body.into_sink::<Sink>().expect("what on_body gave");
                let end = (sink.announced, "whole");
                self.seen.borrow_mut().ends.push(end);
                let body = Body::from_chunks(sink.chunks).expect("only the last is short");
                Answer::Reply(body.into())
            }
            (method, body) => panic!("method {} with {body:?}", method.0),
        }
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        panic!("{message:?}");
    }

    fn make_room(&mut self, peer: NodeId, bytes: u64) -> bool {
        let mut seen = self.seen.borrow_mut();
        let mut dropped = 0;
        while dropped < bytes
            && let Some(at) = seen.shelved.iter().position(|(of, _)| *of == peer)
        {
            dropped += seen.shelved.remove(at).1.len() as u64;
        }
        dropped >= bytes
    }

    fn on_body(&mut self, head: &BodyHead) -> BodyMode {
        if head.method != STREAM {
            return BodyMode::Whole;
        }
        BodyMode::Stream(Box::new(Sink {
            announced: head.body_bytes,
            chunks: Vec::new(),
            seen: Rc::clone(&self.seen),
        }))
    }

    fn on_up(&mut self, peer: NodeId, _: ConnectionNumber, hello: &Negotiated) {
        let heard = (self.messenger.node_id(), peer, *hello);
        self.seen.borrow_mut().hellos.push(heard);
    }
}

/// Nodes that keep bodies. Node 1 is the store that the tests look at.
struct Testbed {
    sim: Sim,
    seen: Rc<RefCell<Seen>>,
}

impl Testbed {
    fn start(config: SimConfig) -> Self {
        let seen: Rc<RefCell<Seen>> = Rc::default();
        let of_nodes = Rc::clone(&seen);
        let services = move |messenger: SimMessenger| {
            let seen = Rc::clone(&of_nodes);
            let router = Router::new().serve(KEEP..=SHELVE, BodyStore { messenger, seen });
            router.expect("one service overlaps none")
        };
        let config = SimConfig {
            pool_bytes: 32 << 20,
            ..config
        };
        let sim = Sim::new(config, Instant::now(), services).unwrap();
        Self { sim, seen }
    }

    /// Two nodes; see [`Self::of`].
    fn new(total_bytes: usize, peer_bytes_max: usize) -> Self {
        Self::of(2, total_bytes, peer_bytes_max)
    }

    /// Connected, with these budgets and paths that lose packets.
    fn of(nodes: usize, total_bytes: usize, peer_bytes_max: usize) -> Self {
        let mut testbed = Self::start(SimConfig {
            nodes,
            transport: TransportConfig {
                receive_budget_bytes: total_bytes as u64,
                receive_budget_peer_bytes: peer_bytes_max as u64,
                ..TransportConfig::default()
            },
            link: LinkConfig {
                loss_ppm: 10_000,
                ..LinkConfig::default()
            },
            seed: 3,
            ..SimConfig::default()
        });
        let all: Vec<usize> = (0..nodes).collect();
        assert!(testbed.sim.run_until(LIMIT, |sim| sim.all_connected(&all)));
        testbed
    }

    fn body(&self, bytes: usize) -> Body {
        self.body_of(0, bytes)
    }

    fn body_of(&self, node: usize, bytes: usize) -> Body {
        let content: Vec<u8> = (0..bytes).map(|i| ((i * 31) >> 5) as u8).collect();
        let pool = self.sim.messenger(node).pool();
        Body::copy_from_slice(pool, &content).expect("the pool has room")
    }

    fn ask(&mut self, method: Method, body: Body) -> Result<Payload, RpcError> {
        self.ask_by(0, method, body)
    }

    /// What the store answers to `node`.
    fn ask_by(&mut self, node: usize, method: Method, body: Body) -> Result<Payload, RpcError> {
        let request = Request {
            class: Class::Bulk,
            method,
            body: body.into(),
            deadline: (LIMIT / 2).into(),
        };
        let answer = self.sim.messenger(node).request(self.sim.id(1), request);
        let answer = self.sim.run(LIMIT, answer);
        answer.expect("a deadline ends every request")
    }

    fn keep(&mut self, bytes: usize) -> Result<(), RpcError> {
        self.keep_of(0, bytes)
    }

    /// The store keeps a body of `node`'s.
    fn keep_of(&mut self, node: usize, bytes: usize) -> Result<(), RpcError> {
        let body = self.body_of(node, bytes);
        self.ask_by(node, KEEP, body).map(drop)
    }

    fn rejected(&self, reason: &str) -> u64 {
        let counters = self.sim.messenger(1).counters();
        counters.reason(Family::Rejected, reason)
    }

    /// What of the store's pool is taken.
    fn taken_bytes(&self) -> usize {
        let pool = self.sim.messenger(1).pool();
        (pool.total_bytes() - pool.free_bytes()) as usize
    }
}

#[test]
fn a_body_is_charged_until_its_last_chunk_is_dropped() {
    let mut testbed = Testbed::new(16 * MIB, 8 * MIB);
    testbed.keep(3 * MIB).unwrap();
    testbed.keep(4 * MIB).unwrap();
    // Long after the service has answered.
    testbed.sim.run_for(LIMIT);
    assert_eq!(testbed.keep(2 * MIB), Err(BUSY));
    assert_eq!(testbed.rejected("budget_peer_share"), 1);
    let (first, second) = {
        let mut seen = testbed.seen.borrow_mut();
        (seen.kept.remove(0), seen.kept.remove(0))
    };
    let chunk = second.chunks()[1].clone();
    drop(second);
    assert_eq!(testbed.taken_bytes(), 4 * MIB);
    testbed.keep(4 * MIB).unwrap();
    assert_eq!(testbed.keep(MIB), Err(BUSY));
    drop((first, chunk));
    testbed.keep(4 * MIB).unwrap();
    testbed.seen.borrow_mut().kept.clear();
    assert_eq!(testbed.taken_bytes(), 0);
}

// Protects a peer from another one that fills its share: a body is charged to the peer that sent
// it, and to no other.
#[test]
fn each_peer_has_a_share_of_its_own() {
    let mut testbed = Testbed::of(3, 16 * MIB, 8 * MIB);
    testbed.keep_of(0, 8 * MIB).unwrap();
    assert_eq!(testbed.keep_of(0, MIB), Err(BUSY));
    assert_eq!(testbed.rejected("budget_peer_share"), 1);
    testbed.keep_of(2, 4 * MIB).unwrap();
    // What one peer gets back is not the other's.
    testbed.seen.borrow_mut().kept.remove(1);
    assert_eq!(testbed.keep_of(0, MIB), Err(BUSY));
    testbed.keep_of(2, 4 * MIB).unwrap();
    testbed.seen.borrow_mut().kept.remove(0);
    testbed.keep_of(0, 4 * MIB).unwrap();
    testbed.seen.borrow_mut().kept.clear();
    assert_eq!(testbed.taken_bytes(), 0);
}

#[test]
fn a_body_takes_its_length_in_units() {
    let mut testbed = Testbed::new(12 * MIB, 6 * MIB);
    for _ in 0..24 {
        testbed.keep(256 << 10).unwrap();
    }
    assert_eq!(testbed.taken_bytes(), 6 * MIB);
    assert_eq!(testbed.keep((64 << 10) + 1), Err(BUSY));
    testbed.seen.borrow_mut().kept.clear();
    testbed.keep((64 << 10) + 1).unwrap();
    assert_eq!(testbed.taken_bytes(), 128 << 10);
}

#[test]
fn busy_and_too_large_are_told_apart() {
    let mut testbed = Testbed::new(16 * MIB, 8 * MIB);
    testbed.keep(5 * MIB).unwrap();
    let cases = [
        (9 * MIB, TOO_LARGE, "budget_peer_too_large"),
        (4 * MIB, BUSY, "budget_peer_share"),
    ];
    for (bytes, error, reason) in cases {
        assert_eq!(testbed.keep(bytes), Err(error), "{bytes}");
        assert_eq!(testbed.rejected(reason), 1, "{reason}");
    }
    testbed.seen.borrow_mut().kept.clear();
    testbed.keep(4 * MIB).unwrap();
}

#[test]
fn a_sink_gets_a_body_chunk_by_chunk_or_hears_that_it_is_cut() {
    let mut testbed = Testbed::new(16 * MIB, 8 * MIB);
    let (len, odd) = (3 * MIB + 7, 100_000);
    for bytes in [len, odd] {
        let sent = testbed.body(bytes);
        let answer = testbed.ask(STREAM, sent.clone()).unwrap();
        let Payload::Chunks(answer) = answer else {
            panic!("{answer:?}");
        };
        let same = |(a, b): (&Chunk, &Chunk)| a[..] == b[..];
        assert!(answer.chunks().iter().zip(sent.chunks()).all(same));
        assert_eq!(answer.len(), bytes);
    }
    // Taken back half way: over a link that takes 300 ms for it.
    let slow = LinkConfig {
        bytes_per_second: Some(10_000_000),
        ..LinkConfig::default()
    };
    testbed.sim.set_link(0, 1, slow);
    let body = testbed.body(len);
    let request = Request {
        class: Class::Bulk,
        method: STREAM,
        body: body.into(),
        deadline: (LIMIT / 2).into(),
    };
    let answer = testbed.sim.messenger(0).request(testbed.sim.id(1), request);
    testbed.sim.run_for(150 * MS);
    assert!(testbed.taken_bytes() > 0);
    drop(answer);
    testbed.sim.run_for(150 * MS);
    let ends = testbed.seen.borrow().ends.clone();
    let wanted = [(len, "whole"), (odd, "whole"), (len, "peer_reset")];
    assert_eq!(ends, wanted.map(|(bytes, end)| (bytes as u64, end)));
    assert_eq!(testbed.taken_bytes(), 0);
}

// Protects the space of other bodies: on a slow path the rest of a cancelled one comes seconds
// after the cancellation.
#[test]
fn a_body_that_is_cancelled_on_a_slow_path_gives_its_space_back_at_once() {
    let mut testbed = Testbed::new(16 * MIB, 8 * MIB);
    let slow = LinkConfig {
        bytes_per_second: Some(20_000),
        // What waits does so at the sender, where a small frame passes a body.
        queue_bytes_max: 8 << 10,
        ..LinkConfig::default()
    };
    testbed.sim.set_link(0, 1, slow);
    // The path takes it whole at once, and so cannot take it back; it needs seven seconds for it.
    let bytes = 140_000;
    let request = Request {
        class: Class::Bulk,
        method: STREAM,
        body: testbed.body(bytes).into(),
        deadline: (LIMIT / 2).into(),
    };
    let answer = testbed.sim.messenger(0).request(testbed.sim.id(1), request);
    testbed.sim.run_for(1_000 * MS);
    assert!(testbed.taken_bytes() > 0);
    drop(answer);
    testbed.sim.run_for(1_000 * MS);
    assert_eq!(testbed.taken_bytes(), 0);
    testbed.sim.run_for(LIMIT);
    let ends = testbed.seen.borrow().ends.clone();
    assert_eq!(ends, [(bytes as u64, "peer_cancelled")]);
    testbed.sim.set_link(0, 1, LinkConfig::default());
    testbed.keep(MIB).unwrap();
}

#[test]
fn two_neighbouring_releases_talk_and_others_do_not() {
    let mut testbed = Testbed::start(SimConfig {
        nodes: 3,
        ..SimConfig::default()
    });
    let ours = Hello::VERSIONS;
    let releases = [
        VersionRange {
            min: ours.min,
            max: ours.max + 1,
        },
        VersionRange {
            min: ours.max + 1,
            max: ours.max + 2,
        },
    ];
    // One that still speaks our version, and one that does not.
    for (node, versions) in [(1, releases[0]), (2, releases[1])] {
        testbed.sim.crash(node);
        testbed.sim.set_versions(node, versions);
        testbed.sim.restart(node);
    }
    let talk = |sim: &Sim| sim.connected(0, 1) && sim.connected(1, 2);
    assert!(testbed.sim.run_until(LIMIT, talk));
    testbed.sim.run_for(LIMIT);
    assert!(talk(&testbed.sim) && !testbed.sim.half_connected(0, 2));
    let [zero, one, two] = [0, 1, 2].map(|node| testbed.sim.id(node));
    for (node, peer, version) in [
        (zero, one, ours.max),
        (one, zero, ours.max),
        (one, two, ours.max + 1),
        (two, one, ours.max + 1),
    ] {
        let seen = testbed.seen.borrow();
        let heard = seen
            .hellos
            .iter()
            .filter(|(at, of, _)| (*at, *of) == (node, peer));
        let heard: Vec<_> = heard
            .map(|(_, _, hello)| (hello.version, hello.registry_version))
            .collect();
        assert!(
            !heard.is_empty() && heard.iter().all(|hello| *hello == (version, 1)),
            "{heard:?}"
        );
    }
}

// Protects a peer whose kept bodies fill its share, which is the smaller the more others have under
// way: the service lets go of as many of its bodies as the next one needs, of no others, and of
// none for one that is too long in any case.
#[test]
fn a_service_lets_go_of_what_a_peer_needs_the_space_of() {
    let mut testbed = Testbed::of(3, 8 * MIB, 8 * MIB);
    let others = testbed.body_of(2, 2 * MIB);
    assert!(testbed.ask_by(2, SHELVE, others).is_ok());
    let (own, other) = (testbed.sim.id(0), testbed.sim.id(2));
    let shelved = |testbed: &Testbed| -> Vec<(NodeId, usize)> {
        let seen = testbed.seen.borrow();
        let shelved = seen.shelved.iter().map(|(of, body)| (*of, body.len()));
        shelved.collect()
    };
    // With 3 MiB, as many stay free.
    for bytes in [MIB, 2 * MIB] {
        let body = testbed.body(bytes);
        assert!(testbed.ask(SHELVE, body).is_ok());
    }
    let before = shelved(&testbed);
    assert_eq!(before, [(other, 2 * MIB), (own, MIB), (own, 2 * MIB)]);

    let body = testbed.body(7 * MIB);
    assert_eq!(testbed.ask(SHELVE, body).unwrap_err(), BUSY);
    assert_eq!(shelved(&testbed), before);

    let body = testbed.body(MIB);
    assert!(testbed.ask(SHELVE, body).is_ok());
    let after = [(other, 2 * MIB), (own, 2 * MIB), (own, MIB)];
    assert_eq!(shelved(&testbed), after);
}

// Protects small messages of all peers: where their memory outside the pool is full, they come
// through the pool, and a service has them as it always does.
#[test]
fn small_bodies_are_slices_wherever_they_lie() {
    let mut testbed = Testbed::start(SimConfig {
        transport: TransportConfig {
            inline_bytes_max: 0,
            ..TransportConfig::default()
        },
        ..SimConfig::default()
    });
    let is_up = testbed.sim.run_until(LIMIT, |sim| sim.connected(0, 1));
    assert!(is_up);
    for bytes in [1, 20_000, 64 << 10] {
        let body = testbed.body(bytes);
        let answer = testbed.ask(SHELVE, body.clone()).unwrap();
        let Payload::Bytes(answer) = answer else {
            panic!("{answer:?}");
        };
        let sent: Vec<u8> = body.slices(bytes).flat_map(|part| part.to_vec()).collect();
        assert_eq!(answer.to_vec(), sent);
    }
    assert_eq!(testbed.rejected("budget_exhausted"), 0);
}
