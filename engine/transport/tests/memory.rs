//! The memory transport: the same calls, handlers and failures as on sockets, over virtual time.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use millrace_protocol::frame::{Class, FailureCode, Method, Negotiated};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::rng::Rng;
use millrace_shards::Queue;
use millrace_shards::chunk::{Body, ChunkPool};
use millrace_shards::config::HugePages;
use millrace_transport::counters::{Counter, Family};
use millrace_transport::memory::{LinkConfig, MemoryConfig, MemoryLocal, MemoryNetwork};
use millrace_transport::{
    Answer, Defer, Inbound, InboundBody, Messenger, Payload, Request, Responder, RpcError, Service,
};

/// Answers with the request's body.
const ECHO: Method = Method(1);
/// Is never answered.
const HANG: Method = Method(2);
/// Is answered after a second.
const LATER: Method = Method(3);

const MS: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(60);

type Trace = Rc<RefCell<Vec<String>>>;

/// Answers, and writes down what it hears.
struct Node {
    local: MemoryLocal,
    origin: std::time::Instant,
    trace: Trace,
    parked: Vec<Responder>,
    /// How often each request or message arrived, by the number in its first bytes.
    seen: BTreeMap<u32, u32>,
}

impl Node {
    fn note(&mut self, what: &str, peer: NodeId, detail: u64) {
        let at = (self.local.now() - self.origin).as_nanos();
        let me = self.local.node_id();
        self.trace
            .borrow_mut()
            .push(format!("{at} {me} {what} {peer} {detail}"));
    }

    fn count(&mut self, body: &InboundBody<'_>) {
        let number = match body {
            InboundBody::Slice(slice) => slice.first_chunk().copied(),
            InboundBody::Chunks(body) => body.chunks()[0].first_chunk().copied(),
            InboundBody::Streamed(_) => None,
        };
        if let Some(number) = number {
            *self.seen.entry(u32::from_le_bytes(number)).or_default() += 1;
        }
    }
}

impl Service for Node {
    fn on_request(&mut self, request: Inbound<'_>, defer: Defer<'_>) -> Answer {
        self.note("request", request.peer, request.body.len());
        self.count(&request.body);
        match request.method {
            ECHO => Answer::Reply(match request.body {
                InboundBody::Slice(slice) => slice.to_vec().into(),
                InboundBody::Chunks(body) => body.into(),
                InboundBody::Streamed(body) => panic!("{body:?} was to be taken whole"),
            }),
            HANG | LATER => match defer.responder() {
                Some(responder) if request.method == HANG => {
                    self.parked.push(responder);
                    Answer::Deferred
                }
                Some(responder) => {
                    let sleep = self.local.sleep(1000 * MS);
                    self.local.spawn(Queue::Latency, async move {
                        sleep.await;
                        responder.reply(b"later".to_vec().into());
                    });
                    Answer::Deferred
                }
                None => Answer::Failure(FailureCode::Busy),
            },
            _ => Answer::Failure(FailureCode::UnknownMethod),
        }
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        self.note("send", message.peer, message.body.len());
        self.count(&message.body);
    }

    fn on_up(&mut self, peer: NodeId, connection: ConnectionNumber, _hello: &Negotiated) {
        self.note("up", peer, connection.0);
    }

    fn on_down(&mut self, peer: NodeId, connection: ConnectionNumber) {
        self.note("down", peer, connection.0);
    }
}

struct Net {
    net: MemoryNetwork<Node>,
    nodes: Vec<MemoryLocal>,
    trace: Trace,
}

impl Net {
    /// Connected nodes.
    fn new(nodes: u8, config: MemoryConfig) -> Self {
        let mut net = Self {
            net: MemoryNetwork::new(config),
            nodes: Vec::new(),
            trace: Trace::default(),
        };
        for n in 1..=nodes {
            let local = net.add(id(n));
            net.nodes.push(local);
        }
        let all = usize::from(nodes) - 1;
        let locals = net.nodes.clone();
        let up = |_: &mut _| locals.iter().all(|local| local.peers().len() == all);
        assert!(net.net.run_until(PATIENCE, up), "the nodes connect");
        net
    }

    fn add(&mut self, id: NodeId) -> MemoryLocal {
        let trace = Rc::clone(&self.trace);
        let origin = self.net.now() - self.net.elapsed();
        let make = |local| Node {
            local,
            origin,
            trace,
            parked: Vec::new(),
            seen: BTreeMap::new(),
        };
        self.net.add_node(id, make).expect("memory for a pool")
    }

    fn ask(&mut self, from: usize, to: usize, request: Request) -> Result<Payload, RpcError> {
        let answer = self.nodes[from].request(self.nodes[to].node_id(), request);
        self.net
            .run(PATIENCE, answer)
            .expect("a deadline ends every request")
    }

    fn handler(&mut self, node: usize) -> &mut Node {
        self.net
            .handler(&self.nodes[node].node_id())
            .expect("the node runs")
    }
}

fn id(n: u8) -> NodeId {
    NodeId::from_bytes([n; 29])
}

fn request(method: Method, class: Class, body: impl Into<Payload>) -> Request {
    Request {
        class,
        method,
        body: body.into(),
        deadline: PATIENCE / 2,
    }
}

fn bytes(number: u32, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| ((i * 31) >> 5) as u8).collect();
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn body(local: &MemoryLocal, number: u32, len: usize) -> Body {
    Body::copy_from_slice(local.pool(), &bytes(number, len)).expect("the pool has room")
}

/// As code above would send it: bytes where they are few, chunks otherwise.
fn payload(local: &MemoryLocal, number: u32, len: usize) -> Payload {
    if len > 64 << 10 {
        body(local, number, len).into()
    } else {
        bytes(number, len).into()
    }
}

fn content(payload: &Payload) -> Vec<u8> {
    match payload {
        Payload::Empty => Vec::new(),
        Payload::Bytes(bytes) => bytes.to_vec(),
        Payload::Chunks(body) => body
            .slices(1 << 20)
            .flat_map(|s| s.as_ref().to_vec())
            .collect(),
    }
}

fn capacity(bytes_per_second: u64) -> LinkConfig {
    LinkConfig {
        bytes_per_second: Some(bytes_per_second),
        ..LinkConfig::default()
    }
}

#[test]
fn every_class_and_size_is_answered_and_gives_its_memory_back() {
    let mut net = Net::new(2, MemoryConfig::default());
    let chunks = net.nodes[1].pool().total_chunks();
    for class in Class::ALL {
        for len in [
            4,
            100,
            16 << 10,
            (16 << 10) + 1,
            64 << 10,
            (64 << 10) + 1,
            1 << 20,
            3 << 20,
        ] {
            let question = payload(&net.nodes[0], 7, len);
            let answer = net.ask(0, 1, request(ECHO, class, question)).unwrap();
            assert!(
                content(&answer) == bytes(7, len),
                "{class:?} of {len} bytes"
            );
        }
        let answer = net.ask(1, 0, request(ECHO, class, Payload::Empty)).unwrap();
        assert!(answer.is_empty());
    }
    net.net.run_for(1000 * MS);
    for local in &net.nodes {
        assert_eq!(local.pool().free_chunks(), chunks, "no chunk is held");
    }
}

#[test]
fn answers_may_come_later_and_requests_may_be_refused() {
    let mut net = Net::new(2, MemoryConfig::default());
    let answer = net
        .ask(0, 1, request(LATER, Class::Normal, vec![0; 4]))
        .unwrap();
    assert_eq!(content(&answer), b"later");
    let unknown = net.ask(0, 1, request(Method(99), Class::Normal, vec![0; 4]));
    assert_eq!(
        unknown.unwrap_err(),
        RpcError::Peer(FailureCode::UnknownMethod)
    );
    let nobody = net.nodes[0].request(id(9), request(ECHO, Class::Normal, Payload::Empty));
    assert_eq!(
        net.net.run(PATIENCE, nobody).unwrap().unwrap_err(),
        RpcError::NotConnected
    );
    // A body above the receiver's budget for one peer is refused without its bytes.
    let mut config = MemoryConfig::default();
    config.transport.receive_budget_peer_bytes = 1 << 20;
    let mut net = Net::new(2, config);
    let large = payload(&net.nodes[0], 1, 2 << 20);
    let refused = net
        .ask(0, 1, request(ECHO, Class::Bulk, large))
        .unwrap_err();
    assert_eq!(refused, RpcError::Peer(FailureCode::TooLarge));
    assert_eq!(
        net.nodes[1]
            .counters()
            .reason(Family::Rejected, "budget_peer_too_large"),
        1
    );
}

// Protects the promise of the classes: bulk delays latency by a train, not by itself.
#[test]
fn latency_passes_bulk() {
    let link = capacity(10_000_000);
    let mut net = Net::new(
        2,
        MemoryConfig {
            link,
            ..MemoryConfig::default()
        },
    );
    let (a, b) = (net.nodes[0].clone(), net.nodes[1].node_id());
    let bulk: Vec<_> = (0..3)
        .map(|n| a.request(b, request(ECHO, Class::Bulk, body(&a, n, 3 << 20))))
        .collect();
    net.net.run_for(100 * MS);
    let from = net.net.elapsed();
    for len in [64, 32 << 10] {
        net.ask(0, 1, request(ECHO, Class::Latency, bytes(9, len)))
            .unwrap();
    }
    // Each waits for at most a train of 64 KiB and a piece there, 8 ms: the way back is free.
    let took = net.net.elapsed() - from;
    assert!(took <= 32 * MS, "{took:?}");
    let from = net.net.elapsed();
    for answer in bulk {
        net.net.run(PATIENCE, answer).unwrap().unwrap();
    }
    let took = net.net.elapsed() - from;
    assert!(took > 500 * MS, "9 MiB at 10 MB/s: {took:?}");
}

#[test]
fn a_cut_ends_the_connection_and_a_heal_brings_it_back() {
    let mut net = Net::new(3, MemoryConfig::default());
    let (a, b, c) = (
        net.nodes[0].clone(),
        net.nodes[1].node_id(),
        net.nodes[2].node_id(),
    );
    let waiting = a.request(b, request(HANG, Class::Normal, vec![0; 4]));
    let large = a.request(b, request(ECHO, Class::Bulk, body(&a, 1, 3 << 20)));
    net.net.run_for(MS / 2);
    net.net.cut(&a.node_id(), &b);
    for answer in [waiting, large] {
        let lost = net.net.run(PATIENCE, answer).unwrap();
        assert_eq!(lost.unwrap_err(), RpcError::ConnectionLost);
    }
    assert_eq!(a.peers(), [c]);
    let refused = net.ask(0, 1, request(ECHO, Class::Normal, Payload::Empty));
    assert_eq!(refused.unwrap_err(), RpcError::NotConnected);
    let none = a.send(b, Class::Normal, ECHO, Payload::Empty);
    assert_eq!(none.unwrap_err(), RpcError::NotConnected);
    net.ask(0, 2, request(ECHO, Class::Normal, Payload::Empty))
        .unwrap();
    net.net.heal(&a.node_id(), &b);
    assert!(net.net.run_until(PATIENCE, |_| a.peers().len() == 2));
    net.ask(0, 1, request(ECHO, Class::Normal, vec![1; 4]))
        .unwrap();
    let me = a.node_id();
    let of_b: Vec<_> = net
        .trace
        .borrow()
        .iter()
        .filter_map(|line| {
            let words: Vec<_> = line.split(' ').collect();
            let of_b = words[1] == me.to_string() && words[3] == b.to_string();
            of_b.then(|| words[2].to_owned())
        })
        .collect();
    assert_eq!(of_b, ["up", "down", "up"]);
    assert_eq!(a.pool().free_chunks(), a.pool().total_chunks());
}

#[test]
fn a_crash_is_noticed_and_a_restart_joins() {
    let mut net = Net::new(2, MemoryConfig::default());
    let (a, b) = (net.nodes[0].clone(), net.nodes[1].node_id());
    let waiting = a.request(b, request(LATER, Class::Normal, vec![0; 4]));
    net.net.run_for(10 * MS);
    net.net.crash(&b);
    let lost = net.net.run(PATIENCE, waiting).unwrap();
    assert_eq!(lost.unwrap_err(), RpcError::ConnectionLost);
    assert!(a.peers().is_empty() && net.nodes[1].peers().is_empty());
    net.nodes[1] = net.add(b);
    assert!(net.net.run_until(PATIENCE, |_| a.peers() == [b]));
    net.ask(1, 0, request(ECHO, Class::Normal, vec![0; 4]))
        .unwrap();
    // At once: the peer has not noticed that the one it talks to is gone.
    net.net.crash(&b);
    net.nodes[1] = net.add(b);
    let again = net.nodes[1].clone();
    let trace = Rc::clone(&net.trace);
    let ups = || ups_of(&trace, &a.node_id());
    assert_eq!((ups(), a.peers()), (2, vec![b]));
    assert!(net.net.run_until(PATIENCE, |_| ups() == 3));
    assert_eq!(again.peers(), [a.node_id()]);
    net.ask(0, 1, request(ECHO, Class::Normal, vec![0; 4]))
        .unwrap();
}

/// How often a node heard that a connection is up.
fn ups_of(trace: &Trace, node: &NodeId) -> usize {
    let node = node.to_string();
    let words = |line: &String| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let lines = trace.borrow();
    lines
        .iter()
        .map(words)
        .filter(|words| words[1] == node && words[2] == "up")
        .count()
}

#[test]
fn a_deadline_ends_the_wait_at_its_time() {
    let mut net = Net::new(2, MemoryConfig::default());
    let mut hang = request(HANG, Class::Latency, vec![0; 4]);
    hang.deadline = 250 * MS;
    let from = net.net.elapsed();
    assert_eq!(net.ask(0, 1, hang).unwrap_err(), RpcError::Timeout);
    let took = net.net.elapsed() - from;
    assert!((250 * MS..252 * MS).contains(&took), "{took:?}");
    assert_eq!(net.nodes[0].counters().reason(Family::Failed, "timeout"), 1);
}

#[test]
fn the_server_sees_what_is_taken_back() {
    let link = capacity(10_000_000);
    let mut net = Net::new(
        2,
        MemoryConfig {
            link,
            ..MemoryConfig::default()
        },
    );
    let (a, b) = (net.nodes[0].clone(), net.nodes[1].node_id());
    let dropped = a.request(b, request(HANG, Class::Normal, vec![0; 4]));
    let kept = a.request(b, request(HANG, Class::Normal, vec![0; 4]));
    net.net.run_for(10 * MS);
    drop(dropped);
    net.net.run_for(10 * MS);
    let cancelled: Vec<_> = net
        .handler(1)
        .parked
        .iter()
        .map(Responder::is_cancelled)
        .collect();
    assert_eq!(cancelled, [true, false]);
    // Half of a body is there: its chunks go back, and no handler hears of it.
    let large = a.request(b, request(ECHO, Class::Bulk, body(&a, 77, 3 << 20)));
    net.net.run_for(100 * MS);
    let free = net.nodes[1].pool().free_chunks();
    assert_eq!(free + 3, net.nodes[1].pool().total_chunks());
    drop(large);
    net.net.run_for(100 * MS);
    assert_eq!(net.nodes[1].pool().free_chunks(), free + 3);
    assert_eq!(a.pool().free_chunks(), free + 3);
    assert_eq!(net.handler(1).seen.get(&77), None);
    assert_eq!(net.nodes[1].counters().get(Counter::RequestsCancelled), 2);
    drop(kept);
}

/// Requests and messages of all sizes over a bad network; returns the trace and how many failed.
fn storm(seed: u64, pool: &ChunkPool) -> (Vec<String>, usize) {
    let mut rng = Rng::new(seed);
    let link = LinkConfig {
        latency: rng.duration(MS / 10, 30 * MS),
        jitter: rng.duration(Duration::ZERO, 20 * MS),
        loss_ppm: rng.below(300_000) as u32,
        duplicate_ppm: rng.below(200_000) as u32,
        bytes_per_second: (rng.below(2) == 0).then(|| 5_000_000 + rng.below(100_000_000)),
        ordered: rng.below(2) == 0,
        ..LinkConfig::default()
    };
    let mut net = Net::new(
        3,
        MemoryConfig {
            link,
            seed,
            shared_pool: Some(pool.clone()),
            ..MemoryConfig::default()
        },
    );
    let mut asked = Vec::new();
    for number in 0..12 {
        let (from, to) = (
            (number % 3) as usize,
            ((number / 3 + number + 1) % 3) as usize,
        );
        let to = if from == to { (to + 1) % 3 } else { to };
        let len = [20, 5_000, 40_000, 100_000, 700_000][rng.below(5) as usize];
        let class = Class::ALL[rng.below(3) as usize];
        let (local, peer) = (net.nodes[from].clone(), net.nodes[to].node_id());
        let sent = payload(&local, number, len);
        let mut echo = request(ECHO, class, sent);
        echo.deadline = Duration::from_secs(20);
        asked.push((number, len, to, local.request(peer, echo)));
        local
            .send(
                peer,
                class,
                ECHO,
                payload(&local, 1000 + number, 4 + len / 10),
            )
            .ok();
        net.net.run_for(rng.duration(Duration::ZERO, 5 * MS));
    }
    let mut failed = 0;
    for (number, len, to, answer) in asked {
        let answer = net
            .net
            .run(PATIENCE, answer)
            .expect("a deadline ends every request");
        let seen = net.handler(to).seen.get(&number).copied().unwrap_or(0);
        match answer {
            Ok(answer) => {
                assert!(
                    content(&answer) == bytes(number, len),
                    "seed {seed}, request {number}"
                );
                assert_eq!(seen, 1, "seed {seed}, request {number}");
            }
            Err(error) => {
                failed += 1;
                assert!(seen <= 1, "seed {seed}, request {number}");
                // No room: chunks that all requests want at a time are not there.
                let expected = [
                    RpcError::Timeout,
                    RpcError::ConnectionLost,
                    RpcError::NotConnected,
                    RpcError::LocalNoBudget,
                    RpcError::Peer(FailureCode::TooLarge),
                ];
                assert!(expected.contains(&error), "seed {seed}: {error}");
            }
        }
    }
    for node in 0..3 {
        let more = net
            .handler(node)
            .seen
            .iter()
            .find(|(_, times)| **times > 1)
            .map(|(n, _)| *n);
        assert_eq!(more, None, "seed {seed}");
    }
    net.net.run_for(5000 * MS);
    for local in &net.nodes {
        assert_eq!(
            local.pool().free_chunks(),
            local.pool().total_chunks(),
            "seed {seed}"
        );
    }
    let trace = net.trace.take();
    (trace, failed)
}

fn pool() -> ChunkPool {
    ChunkPool::new(24 << 20, HugePages::Never).expect("memory for a pool")
}

#[test]
fn loss_delivers_once_or_says_so() {
    let pool = pool();
    // Small messages that the network drops are lost; large ones are repeated.
    let failed: usize = (0..200).map(|seed| storm(seed, &pool).1).sum();
    assert!(
        (1..600).contains(&failed),
        "{failed} of 2,400 requests failed"
    );
}

#[test]
fn the_same_seed_is_the_same_run() {
    let pool = pool();
    for seed in [3, 4, 5, 6] {
        let (first, second) = (storm(seed, &pool), storm(seed, &pool));
        assert!(first.0.len() > 20);
        assert_eq!(first, second);
    }
    assert_ne!(storm(3, &pool), storm(4, &pool));
}
