//! Nodes with real sockets on loopback, for the transport's tests.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use millrace_protocol::frame::{Class, FailureCode, Method, Negotiated};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::identity::SigningKey;
use millrace_protocol::topology::{Member, Topology};
use millrace_shards::chunk::Body;
use millrace_shards::config::ShardConfig;
use millrace_shards::socket::UdpGroupConfig;
pub(crate) use millrace_testkit::ids::key;
pub(crate) use millrace_testkit::{PATIENCE, free_addr};
use millrace_transport::counters::{Counter, Family};
use millrace_transport::{
    Answer, Defer, EdgeStart, Inbound, InboundBody, PathProfile, Payload, RememberedPath, Request,
    Responder, Router, RouterError, Service, ShardMessenger, Transport, TransportConfig,
    TransportStart,
};

/// Answers with the request's body.
pub(crate) const ECHO: Method = Method(1);
/// Answers with the body's length.
pub(crate) const LENGTH: Method = Method(2);
/// Never answers; tells the test when the request is there and when it was taken back.
pub(crate) const HANG: Method = Method(3);

/// A one-way message; tells the test its length.
pub(crate) const TELL: Method = Method(7);
/// What the test's service owns.
const METHODS: RangeInclusive<Method> = ECHO..=TELL;

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Up(NodeId, ConnectionNumber),
    Down(NodeId, ConnectionNumber),
    Hanging,
    Message(NodeId, usize),
}

/// What the peers that are or were up said in their last hello.
pub(crate) type Hellos = Arc<Mutex<BTreeMap<NodeId, Negotiated>>>;

pub(crate) struct TestService {
    events: Sender<Event>,
    hellos: Hellos,
}

impl Service for TestService {
    fn on_request(&mut self, request: Inbound<'_>, defer: Defer<'_>) -> Answer {
        match request.method {
            ECHO => Answer::Reply(match request.body {
                InboundBody::Slice(slice) => slice.to_vec().into(),
                InboundBody::Chunks(body) => body.into(),
                InboundBody::Streamed(body) => panic!("{body:?} was to be taken whole"),
            }),
            LENGTH => Answer::Reply((request.body.len()).to_le_bytes().to_vec().into()),
            HANG => match defer.responder() {
                Some(responder) => {
                    KEPT.with_borrow_mut(|kept| kept.push(responder));
                    self.events.send(Event::Hanging).ok();
                    Answer::Deferred
                }
                None => Answer::Failure(FailureCode::Busy),
            },
            _ => Answer::Failure(FailureCode::Malformed),
        }
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        self.events
            .send(Event::Message(message.peer, message.body.len() as usize))
            .ok();
    }

    fn on_up(&mut self, peer: NodeId, connection: ConnectionNumber, hello: &Negotiated) {
        self.hellos.lock().unwrap().insert(peer, *hello);
        self.events.send(Event::Up(peer, connection)).ok();
    }

    fn on_down(&mut self, peer: NodeId, connection: ConnectionNumber) {
        self.events.send(Event::Down(peer, connection)).ok();
    }
}

thread_local! {
    static KEPT: std::cell::RefCell<Vec<Responder>> = const { std::cell::RefCell::new(Vec::new()) };
}

pub(crate) struct Node {
    pub(crate) transport: Transport,
    pub(crate) key: SigningKey,
    pub(crate) events: Receiver<Event>,
    pub(crate) hellos: Hellos,
}

/// Two keys, the lower id first: it dials.
pub(crate) fn two_keys() -> [SigningKey; 2] {
    let mut keys = [key(1), key(2)];
    keys.sort_by_key(SigningKey::node_id);
    keys
}

pub(crate) fn member(key: &SigningKey, addr: SocketAddr) -> Member {
    Member::new(key.public_key(), vec![addr])
}

pub(crate) fn topology(members: impl IntoIterator<Item = Member>, version: u64) -> Arc<Topology> {
    Arc::new(Topology::from_members(members, version))
}

pub(crate) fn shard_config(pool_bytes: u64) -> ShardConfig {
    ShardConfig {
        cpu: None,
        spin: Duration::ZERO,
        chunk_pool_bytes: pool_bytes,
        ..Default::default()
    }
}

/// Loopback is a short path, and a busy host must not make it look like a long one: no connection
/// is dialled again for its profile.
fn near(mut config: TransportConfig) -> TransportConfig {
    config.paths.profile.get_or_insert(PathProfile::Lan);
    config
}

impl Node {
    pub(crate) fn start(
        key: SigningKey,
        addr: SocketAddr,
        topology: &Arc<Topology>,
        config: TransportConfig,
        pool_bytes: u64,
    ) -> Self {
        Self::start_shards(key, addr, topology, config, vec![shard_config(pool_bytes)])
    }

    pub(crate) fn start_shards(
        key: SigningKey,
        addr: SocketAddr,
        topology: &Arc<Topology>,
        config: TransportConfig,
        shards: Vec<ShardConfig>,
    ) -> Self {
        Self::start_behind(key, addr, topology, config, shards, EdgeStart::default())
    }

    /// A node behind an edge of the test's making.
    pub(crate) fn start_behind(
        key: SigningKey,
        addr: SocketAddr,
        topology: &Arc<Topology>,
        config: TransportConfig,
        shards: Vec<ShardConfig>,
        edge: EdgeStart,
    ) -> Self {
        let config = near(config);
        Self::start_test(Self::parts(key, addr, topology, config, shards, edge))
    }

    /// A node that knows this of the paths to its peers, and chooses profiles as its config says.
    pub(crate) fn start_knowing(
        key: SigningKey,
        addr: SocketAddr,
        topology: &Arc<Topology>,
        config: TransportConfig,
        pool_bytes: u64,
        paths: Vec<(NodeId, RememberedPath)>,
    ) -> Self {
        let shards = vec![shard_config(pool_bytes)];
        let parts = Self::parts(key, addr, topology, config, shards, EdgeStart::default());
        Self::start_test(TransportStart { paths, ..parts })
    }

    /// A node with the test's service.
    fn start_test(start: TransportStart) -> Self {
        let (sender, events) = channel();
        let hellos = Hellos::default();
        let heard = Arc::clone(&hellos);
        let services = move |_messenger: ShardMessenger| {
            let service = TestService {
                events: sender.clone(),
                hellos: Arc::clone(&heard),
            };
            Router::new().serve(METHODS, service)
        };
        Self {
            events,
            hellos,
            ..Self::start_with(start, services)
        }
    }

    /// A node with services of the test's making.
    pub(crate) fn start_serving(
        key: SigningKey,
        addr: SocketAddr,
        topology: &Arc<Topology>,
        config: TransportConfig,
        shards: Vec<ShardConfig>,
        edge: EdgeStart,
        services: impl Fn(ShardMessenger) -> Result<Router, RouterError> + Clone + Send + 'static,
    ) -> Self {
        let parts = Self::parts(key, addr, topology, near(config), shards, edge);
        Self::start_with(parts, services)
    }

    fn parts(
        key: SigningKey,
        addr: SocketAddr,
        topology: &Arc<Topology>,
        config: TransportConfig,
        shards: Vec<ShardConfig>,
        edge: EdgeStart,
    ) -> TransportStart {
        TransportStart {
            identity: key,
            tls: None,
            config,
            shards,
            udp: UdpGroupConfig {
                local: addr,
                ..Default::default()
            },
            topology: Arc::clone(topology),
            paths: Vec::new(),
            edge,
        }
    }

    fn start_with(
        start: TransportStart,
        services: impl Fn(ShardMessenger) -> Result<Router, RouterError> + Clone + Send + 'static,
    ) -> Self {
        let key = SigningKey::from_seed(*start.identity.seed());
        Self {
            transport: Transport::start(start, services).unwrap(),
            key,
            events: channel().1,
            hellos: Hellos::default(),
        }
    }

    pub(crate) fn id(&self) -> NodeId {
        self.key.node_id()
    }

    /// Waits until exactly `peers` are up.
    pub(crate) fn wait_for_peers(&self, peers: &[NodeId]) {
        let held = self.transport.status().wait(PATIENCE, |up| {
            up.len() == peers.len()
                && peers
                    .iter()
                    .all(|peer| up.iter().any(|p| p.node_id == *peer))
        });
        assert!(
            held,
            "peers are {:?}, wanted {peers:?}",
            self.transport.status().peers()
        );
    }

    pub(crate) fn wait_for(&self, wanted: impl Fn(&Event) -> bool) -> Event {
        loop {
            let event = self
                .events
                .recv_timeout(PATIENCE)
                .expect("the event came in time");
            if wanted(&event) {
                return event;
            }
        }
    }

    /// Waits until the sum over shards of a reason is at least `n`.
    pub(crate) fn wait_for_reason(&self, family: Family, reason: &str, n: u64) {
        let held = self
            .transport
            .status()
            .wait(PATIENCE, |_| self.reason(family, reason) >= n);
        let all: Vec<_> = self
            .transport
            .counters()
            .iter()
            .flat_map(|c| c.reasons())
            .collect();
        assert!(
            held,
            "{reason} was counted {} times, wanted {n}; all: {all:?}",
            self.reason(family, reason)
        );
    }

    /// Waits until the sum over shards of a counter is at least `n`.
    pub(crate) fn wait_for_count(&self, counter: Counter, n: u64) {
        let held = self
            .transport
            .status()
            .wait(PATIENCE, |_| self.count(counter) >= n);
        assert!(held, "{counter:?} is {}, wanted {n}", self.count(counter));
    }

    pub(crate) fn count(&self, counter: Counter) -> u64 {
        self.transport
            .counters()
            .iter()
            .map(|counters| counters.get(counter))
            .sum()
    }

    pub(crate) fn reason(&self, family: Family, reason: &str) -> u64 {
        self.transport
            .counters()
            .iter()
            .map(|c| c.reason(family, reason))
            .sum()
    }

    pub(crate) fn body(&self, len: usize) -> Body {
        let bytes: Vec<u8> = (0..len).map(|i| ((i * 31) >> 5) as u8).collect();
        Body::copy_from_slice(self.transport.pool(0).unwrap(), &bytes).expect("the pool has room")
    }
}

pub(crate) fn request(method: Method, class: Class, body: impl Into<Payload>) -> Request {
    Request {
        class,
        method,
        body: body.into(),
        deadline: PATIENCE.into(),
    }
}

pub(crate) fn bytes_of(payload: &Payload) -> Vec<u8> {
    match payload {
        Payload::Empty => Vec::new(),
        Payload::Bytes(bytes) => bytes.to_vec(),
        Payload::Chunks(body) => body
            .slices(1 << 20)
            .flat_map(|slice| slice.as_ref().to_vec())
            .collect(),
    }
}

/// Two connected nodes; the first has the lower id and so is the dialler.
pub(crate) fn pair(config: &TransportConfig, pool_bytes: u64) -> (Node, Node) {
    let (mut a, mut b) = (key(1), key(2));
    if b.node_id() < a.node_id() {
        std::mem::swap(&mut a, &mut b);
    }
    let (at, bt) = (free_addr(), free_addr());
    let topology = topology([member(&a, at), member(&b, bt)], 1);
    let a = Node::start(a, at, &topology, config.clone(), pool_bytes);
    let b = Node::start(b, bt, &topology, config.clone(), pool_bytes);
    a.wait_for_peers(&[b.id()]);
    b.wait_for_peers(&[a.id()]);
    (a, b)
}
