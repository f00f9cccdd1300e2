//! Nodes in a simulation with a service that answers and writes down what it hears.
#![allow(dead_code, reason = "each test program uses its part")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, FailureCode, Method, Negotiated};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_shards::Queue;
use millrace_shards::chunk::{Body, ChunkPool};
use millrace_shards::config::HugePages;
use millrace_sim::memnet::LinkConfig;
use millrace_sim::{Sim, SimConfig, SimMessenger};
use millrace_transport::{
    Answer, Defer, Inbound, InboundBody, Messenger, Payload, Request, Responder, Router, RpcError,
    Service,
};

/// Answers with the request's body.
pub(crate) const ECHO: Method = Method(1);
/// Is never answered.
pub(crate) const HANG: Method = Method(2);
/// Is answered after a second.
pub(crate) const LATER: Method = Method(3);
/// The last method of the test's service.
const LAST: Method = Method(9);

pub(crate) const MS: Duration = Duration::from_millis(1);
/// Virtual: costs nothing.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What the services of one node heard, over its restarts.
#[derive(Default)]
pub(crate) struct Heard {
    /// Requests that are not answered.
    pub(crate) parked: Vec<Responder>,
    /// How often each request or message arrived, by the number in its first bytes.
    pub(crate) times: BTreeMap<u32, u32>,
    /// The numbers of one-way messages, in order of arrival.
    pub(crate) sends: Vec<u32>,
    /// What became of its connections: the peer, and whether it came up.
    pub(crate) links: Vec<(NodeId, bool)>,
}

/// What all nodes heard, in order.
type Trace = Rc<RefCell<Vec<String>>>;

struct TestService {
    messenger: SimMessenger,
    origin: Instant,
    heard: Rc<RefCell<Heard>>,
    trace: Trace,
}

impl TestService {
    fn note(&self, what: &str, peer: NodeId, detail: u64) {
        let at = (self.messenger.now() - self.origin).as_nanos();
        let me = self.messenger.node_id();
        let line = format!("{at} {me} {what} {peer} {detail}");
        self.trace.borrow_mut().push(line);
    }

    fn count(&self, body: &InboundBody<'_>) -> Option<u32> {
        let number = match body {
            InboundBody::Slice(slice) => slice.first_chunk().copied(),
            InboundBody::Chunks(body) => body.chunks()[0].first_chunk().copied(),
            InboundBody::Streamed(_) => None,
        };
        let number = u32::from_le_bytes(number?);
        *self.heard.borrow_mut().times.entry(number).or_default() += 1;
        Some(number)
    }
}

impl Service for TestService {
    fn on_request(&mut self, request: Inbound<'_>, defer: Defer<'_>) -> Answer {
        self.note("request", request.peer, request.body.len());
        self.count(&request.body);
        if request.method == ECHO {
            return Answer::Reply(match request.body {
                InboundBody::Slice(slice) => slice.to_vec().into(),
                InboundBody::Chunks(body) => body.into(),
                InboundBody::Streamed(body) => panic!("{body:?} was to be taken whole"),
            });
        }
        let Some(responder) = defer.responder() else {
            return Answer::Failure(FailureCode::Busy);
        };
        if request.method == LATER {
            let sleep = self.messenger.sleep(1000 * MS);
            self.messenger.spawn(Queue::Latency, async move {
                sleep.await;
                responder.reply(b"later".to_vec().into());
            });
        } else {
            self.heard.borrow_mut().parked.push(responder);
        }
        Answer::Deferred
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        self.note("send", message.peer, message.body.len());
        let number = self.count(&message.body);
        self.heard.borrow_mut().sends.extend(number);
    }

    fn on_up(&mut self, peer: NodeId, connection: ConnectionNumber, _hello: &Negotiated) {
        self.note("up", peer, connection.0);
        self.heard.borrow_mut().links.push((peer, true));
    }

    fn on_down(&mut self, peer: NodeId, connection: ConnectionNumber) {
        self.note("down", peer, connection.0);
        self.heard.borrow_mut().links.push((peer, false));
    }
}

/// A simulation whose nodes have the test's service.
pub(crate) struct Testbed {
    pub(crate) sim: Sim,
    heard: Rc<RefCell<BTreeMap<NodeId, Rc<RefCell<Heard>>>>>,
    pub(crate) trace: Trace,
}

impl Testbed {
    /// Nodes that begin to connect.
    pub(crate) fn start(config: SimConfig) -> Self {
        let trace = Trace::default();
        let heard: Rc<RefCell<BTreeMap<NodeId, Rc<RefCell<Heard>>>>> = Rc::default();
        let origin = Instant::now();
        let (of_all, all) = (Rc::clone(&heard), Rc::clone(&trace));
        let make = move |messenger: SimMessenger| {
            let mut of_all = of_all.borrow_mut();
            let heard = of_all.entry(messenger.node_id()).or_default();
            let service = TestService {
                origin,
                heard: Rc::clone(heard),
                trace: Rc::clone(&all),
                messenger,
            };
            let router = Router::new().serve(ECHO..=LAST, service);
            router.expect("one service overlaps none")
        };
        let sim = Sim::new(config, origin, make).expect("memory for the pools");
        Self { sim, heard, trace }
    }

    /// Nodes that are connected.
    pub(crate) fn connected(config: SimConfig) -> Self {
        let mut testbed = Self::start(config);
        let all: Vec<usize> = (0..testbed.sim.len()).collect();
        let connected = testbed
            .sim
            .run_until(PATIENCE, |sim| sim.all_connected(&all));
        assert!(connected, "the nodes connect");
        testbed
    }

    pub(crate) fn id(&self, node: usize) -> NodeId {
        self.sim.id(node)
    }

    /// The handle of a node, of its last start.
    pub(crate) fn node(&self, node: usize) -> SimMessenger {
        self.sim.messenger(node).clone()
    }

    /// Looks at what a node heard.
    pub(crate) fn with<T>(&self, node: usize, look: impl FnOnce(&mut Heard) -> T) -> T {
        let of_all = self.heard.borrow();
        look(&mut of_all[&self.sim.id(node)].borrow_mut())
    }

    /// Sends a request and runs until it has ended.
    pub(crate) fn ask(
        &mut self,
        from: usize,
        to: usize,
        request: Request,
    ) -> Result<Payload, RpcError> {
        let answer = self.node(from).request(self.id(to), request);
        self.sim
            .run(PATIENCE, answer)
            .expect("a deadline ends every request")
    }

    /// What `node` heard of its connections with `peer`: up, or down.
    pub(crate) fn links(&self, node: usize, peer: NodeId) -> Vec<bool> {
        let of_peer = |(other, up): &(NodeId, bool)| (*other == peer).then_some(*up);
        self.with(node, |heard| {
            heard.links.iter().filter_map(of_peer).collect()
        })
    }
}

pub(crate) fn request(method: Method, class: Class, body: impl Into<Payload>) -> Request {
    Request {
        class,
        method,
        body: body.into(),
        deadline: (PATIENCE / 2).into(),
    }
}

/// Bytes that name a request or message.
pub(crate) fn bytes(number: u32, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| ((i * 31) >> 5) as u8).collect();
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes
}

pub(crate) fn body(messenger: &SimMessenger, number: u32, len: usize) -> Body {
    Body::copy_from_slice(messenger.pool(), &bytes(number, len)).expect("the pool has room")
}

/// As code above would send it: bytes where they are few, chunks otherwise.
pub(crate) fn payload(messenger: &SimMessenger, number: u32, len: usize) -> Payload {
    if len > 64 << 10 {
        body(messenger, number, len).into()
    } else {
        bytes(number, len).into()
    }
}

pub(crate) fn content(payload: &Payload) -> Vec<u8> {
    match payload {
        Payload::Empty => Vec::new(),
        Payload::Bytes(bytes) => bytes.to_vec(),
        Payload::Chunks(body) => body
            .slices(1 << 20)
            .flat_map(|slice| slice.as_ref().to_vec())
            .collect(),
    }
}

/// A pool that is full again when nothing is held.
pub(crate) fn assert_nothing_held(messenger: &SimMessenger, what: &str) {
    let pool = messenger.pool();
    assert_eq!(pool.free_chunks(), pool.total_chunks(), "{what}");
}

pub(crate) fn pool(bytes: u64) -> ChunkPool {
    ChunkPool::new(bytes, HugePages::Never).expect("memory for a pool")
}

pub(crate) fn capacity(bytes_per_second: u64) -> LinkConfig {
    LinkConfig {
        bytes_per_second: Some(bytes_per_second),
        ..LinkConfig::default()
    }
}
