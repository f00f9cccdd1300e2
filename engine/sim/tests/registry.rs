//! The exchange of registry versions on simulated nodes: the service of the product, as it is.
#![allow(clippy::unwrap_used)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, FailureCode, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::identity::SigningKey;
use millrace_protocol::registry::{RegistryConfig, SignedVersion};
use millrace_registry::{Draft, Events, Exchange, Sources, Versions, VersionsConfig, keys, wire};
use millrace_shards::chunk::{Body, taken_bytes};
use millrace_sim::memnet::LinkConfig;
use millrace_sim::{Sim, SimConfig, SimMessenger};
use millrace_transport::{
    Answer, Defer, Inbound, InboundBody, Messenger, Request, Responder, Router, Service,
    TransportConfig,
};

const MS: Duration = Duration::from_millis(1);
/// Virtual: costs nothing.
const LIMIT: Duration = Duration::from_secs(60);

/// What bodies of one peer may take.
const PEER_BYTES_MAX: usize = 4 << 20;

/// Keeps the body.
const KEEP: Method = Method(0x1000);

/// A path that delays, reorders, drops and repeats packets.
fn lossy() -> LinkConfig {
    LinkConfig {
        latency: 20 * MS,
        jitter: 20 * MS,
        loss_ppm: 100_000,
        duplicate_ppm: 50_000,
        ..LinkConfig::default()
    }
}

/// What a node holds, and what its peers sent it.
struct Held {
    versions: Arc<Versions>,
    events: Events,
}

impl Held {
    fn new(registry: &SigningKey) -> Self {
        let sources = Sources::new(registry.public_key(), RegistryConfig::default());
        let me = keys::generate().unwrap().public_key();
        Self {
            versions: Arc::new(Versions::new(&me, VersionsConfig::default(), sources)),
            events: Events::default(),
        }
    }

    /// Does the work of the registry's thread.
    fn take_answers(&self) {
        while let Some(offer) = self.events.next_offer() {
            self.versions.take(&offer);
        }
    }
}

type AllHeld = Rc<RefCell<BTreeMap<NodeId, Rc<Held>>>>;

fn router(service: impl Service) -> Router {
    let router = Router::new().serve(wire::FIRST_METHOD..=wire::LAST_METHOD, service);
    router.expect("one service overlaps none")
}

/// Two nodes on a lossy path.
fn sim(services: impl Fn(SimMessenger) -> Router + 'static) -> Sim {
    let config = SimConfig {
        nodes: 2,
        link: lossy(),
        transport: TransportConfig {
            receive_budget_peer_bytes: PEER_BYTES_MAX as u64,
            ..TransportConfig::default()
        },
        seed: 7,
        ..SimConfig::default()
    };
    Sim::new(config, Instant::now(), services).unwrap()
}

/// Two nodes with the exchange, of which the first holds `versions`; not connected yet.
fn pair(
    registry: SigningKey,
    versions: Vec<SignedVersion>,
    ask_interval: Option<Duration>,
) -> (Sim, [Rc<Held>; 2]) {
    pair_with(registry, versions, ask_interval, |router| router)
}

/// As [`pair`], with more services.
fn pair_with(
    registry: SigningKey,
    versions: Vec<SignedVersion>,
    ask_interval: Option<Duration>,
    more: impl Fn(Router) -> Router + 'static,
) -> (Sim, [Rc<Held>; 2]) {
    let all = AllHeld::default();
    let of_nodes = Rc::clone(&all);
    let services = move |messenger: SimMessenger| {
        let mut of_nodes = of_nodes.borrow_mut();
        let held = of_nodes.entry(messenger.node_id());
        let held = held.or_insert_with(|| Rc::new(Held::new(&registry)));
        let versions = Arc::clone(&held.versions);
        let exchange = Exchange::new(messenger, versions, held.events.sender());
        if let Some(interval) = ask_interval {
            exchange.ask_every(interval);
        }
        more(router(exchange))
    };
    let sim = sim(services);
    let held = [0, 1].map(|node| Rc::clone(&all.borrow()[&sim.id(node)]));
    for version in versions {
        held[0].versions.offer(version).unwrap();
    }
    (sim, held)
}

/// Version 1 and so on, whose documents are at least so long.
fn series(registry: &SigningKey, count: u64, document_bytes: usize) -> Vec<SignedVersion> {
    let mut draft = Draft::first("test").unwrap();
    let signed = |draft: &Draft| {
        let signed = draft.sign(registry).unwrap();
        let document = format!("{}#{}\n", signed.document, "x".repeat(document_bytes));
        SignedVersion::sign(document, registry)
    };
    let mut versions = vec![signed(&draft)];
    for _ in 1..count {
        draft = Draft::after(draft.version().clone());
        versions.push(signed(&draft));
    }
    versions
}

/// Protects a node that comes back: it does not wait for an interval. Small versions, and such as
/// travel in chunks.
#[test]
fn the_node_that_is_behind_asks_at_once_and_catches_up() {
    for document_bytes in [10, 50_000] {
        let registry = keys::generate().unwrap();
        let versions = series(&registry, 3, document_bytes);
        let (mut sim, held) = pair(registry, versions, None);
        // Its hello says what it holds.
        let ahead = Arc::new(sim.topology(&[0, 1], 3));
        sim.set_topology(0, ahead);
        let is_caught_up = sim.run_until(LIMIT, |_| {
            held[1].take_answers();
            held[1].versions.newest() == 3
        });
        assert!(is_caught_up, "{document_bytes}");
        let summary = held[1].versions.summary();
        assert_eq!(summary.refused, []);
        assert_eq!(held[0].versions.newest(), 3);
        let newer = held[1].versions.newer_than(0);
        assert_eq!(newer, held[0].versions.newer_than(0), "all of them came");
    }
}

/// Protects the pool of a node that many peers ask at once, when a large version comes.
#[test]
fn a_long_answer_takes_its_chunks_once_and_gives_them_back() {
    let registry = keys::generate().unwrap();
    let versions = series(&registry, 2, 300_000);
    let (mut sim, held) = pair(registry, versions, None);
    assert!(sim.run_until(LIMIT, |sim| sim.connected(0, 1)));
    let asked = sim.id(0);
    let taken = |sim: &Sim| {
        let pool = sim.messenger(0).pool();
        pool.total_bytes() - pool.free_bytes()
    };
    let long = held[0].versions.newer_than(0);
    let ask = |sim: &Sim, number: u64| {
        let request = Request {
            class: Class::Normal,
            method: wire::NEWER_THAN,
            body: number.to_le_bytes().to_vec().into(),
            deadline: LIMIT.into(),
        };
        sim.messenger(1).request(asked, request)
    };
    let answers = [0, 0].map(|number| ask(&sim, number));
    for answer in answers {
        let answer = sim.run(LIMIT, answer).unwrap().unwrap();
        assert_eq!(answer.len(), long.len() as u64);
        assert_eq!(taken(&sim), taken_bytes(long.len() as u64));
    }
    // A peer that holds more gets less.
    let answer = ask(&sim, 1);
    let answer = sim.run(LIMIT, answer).unwrap().unwrap();
    assert!(answer.len() < long.len() as u64);
    sim.run_for(LIMIT);
    assert_eq!(taken(&sim), 0);
}

/// Protects a node whose peer fills its share with bodies: long versions have no room then. The
/// node says so by a count, and has them once there is room.
#[test]
fn a_peer_whose_share_is_full_is_asked_again() {
    let registry = keys::generate().unwrap();
    let [version] = series(&registry, 1, 300_000).try_into().unwrap();
    let kept = Rc::new(RefCell::new(Vec::new()));
    let of_behind = Rc::clone(&kept);
    let (mut sim, held) = pair_with(registry, Vec::new(), Some(1000 * MS), move |router| {
        let store = BodyStore(Rc::clone(&of_behind));
        router.serve(KEEP..=KEEP, store).unwrap()
    });
    assert!(sim.run_until(LIMIT, |sim| sim.connected(0, 1)));
    let ahead = sim.messenger(0).clone();
    let body = Body::copy_from_slice(ahead.pool(), &[7; PEER_BYTES_MAX]).unwrap();
    ahead
        .send(sim.id(1), Class::Normal, KEEP, body.into())
        .unwrap();
    let is_kept = |_: &Sim| !kept.borrow().is_empty();
    assert!(sim.run_until(LIMIT, is_kept));
    held[0].versions.offer(version).unwrap();
    let failures = |held: &Held| held.versions.summary().questions_failed;
    let is_asked = sim.run_until(LIMIT, |_| failures(&held[1]) == [("local_no_budget", 3)]);
    assert!(is_asked, "{:?}", failures(&held[1]));
    kept.borrow_mut().clear();
    let is_caught_up = sim.run_until(LIMIT, |_| {
        held[1].take_answers();
        held[1].versions.newest() == 1
    });
    assert!(is_caught_up, "{:?}", failures(&held[1]));
}

/// Protects a node whose peer learns of a version while they are connected.
#[test]
fn a_connected_peer_is_asked_every_interval() {
    let registry = keys::generate().unwrap();
    let [first, second] = series(&registry, 2, 10).try_into().unwrap();
    let (mut sim, held) = pair(registry, vec![first], Some(1000 * MS));
    let mut runs_until = |newest| {
        sim.run_until(LIMIT, |_| {
            held[1].take_answers();
            held[1].versions.newest() == newest
        })
    };
    assert!(runs_until(1));
    held[0].versions.offer(second).unwrap();
    assert!(runs_until(2));
}

/// Keeps bodies, which stay charged to their peer.
struct BodyStore(Rc<RefCell<Vec<Body>>>);

impl Service for BodyStore {
    fn on_request(&mut self, _request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        Answer::Failure(FailureCode::UnknownMethod)
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        if let InboundBody::Chunks(body) = message.body {
            self.0.borrow_mut().push(body);
        }
    }
}

/// Counts questions, and answers none.
#[derive(Default)]
struct Silent {
    count: Rc<Cell<usize>>,
    kept: Vec<Responder>,
}

impl Service for Silent {
    fn on_request(&mut self, _request: Inbound<'_>, defer: Defer<'_>) -> Answer {
        self.kept.extend(defer.responder());
        self.count.set(self.count.get() + 1);
        Answer::Deferred
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}
}

/// Protects the queue of answers: a peer has one place in it, whatever makes the node ask.
#[test]
fn a_peer_is_asked_one_question_at_a_time() {
    let count = Rc::new(Cell::new(0));
    let (asked, is_first) = (Rc::clone(&count), Cell::new(true));
    let versions = Held::new(&keys::generate().unwrap());
    let (held, sender) = (Arc::clone(&versions.versions), versions.events.sender());
    let mut sim = sim(move |messenger| {
        if is_first.replace(false) {
            let count = Rc::clone(&asked);
            let silent = Silent {
                count,
                ..Silent::default()
            };
            return router(silent);
        }
        let exchange = Exchange::new(messenger, Arc::clone(&held), sender.clone());
        // One asks because of the peer's hello, these by the clock.
        exchange.ask_every(100 * MS);
        exchange.ask_every(100 * MS);
        router(exchange)
    });
    let ahead = Arc::new(sim.topology(&[0, 1], 3));
    sim.set_topology(0, ahead);
    assert!(sim.run_until(LIMIT, |_| count.get() == 1));
    sim.run_for(4000 * MS);
    assert_eq!(count.get(), 1);
    // The deadline ends the question; the next one follows.
    assert!(sim.run_until(LIMIT, |_| count.get() == 2));
    let failed = versions.versions.summary().questions_failed;
    assert_eq!(failed, [("timeout", 1)]);
}
