//! What the service interface promises, on simulated nodes: the scenarios that the transport runs
//! over sockets, on a good network and on a bad one.
#![allow(clippy::unwrap_used)]

// The same text for both, so that a promise cannot come to mean two things.
#[path = "../../transport/tests/scenarios/mod.rs"]
mod scenarios;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_protocol::id::NodeId;
use millrace_sim::memnet::LinkConfig;
use millrace_sim::{Sim, SimConfig, SimMessenger};
use millrace_transport::counters::Family;
use millrace_transport::{Messenger, TransportConfig};
use scenarios::Log;

const MS: Duration = Duration::from_millis(1);
/// Virtual: costs nothing.
const LIMIT: Duration = Duration::from_secs(600);

/// A LAN; and a path that delays, reorders, drops and repeats packets.
fn links() -> [LinkConfig; 2] {
    let bad = LinkConfig {
        latency: 20 * MS,
        jitter: 20 * MS,
        loss_ppm: 50_000,
        duplicate_ppm: 50_000,
        ..LinkConfig::default()
    };
    [LinkConfig::default(), bad]
}

/// A node and its peers, all connected, and what each saw.
struct Testbed {
    sim: Sim,
    logs: Rc<RefCell<BTreeMap<NodeId, Arc<Log>>>>,
}

impl Testbed {
    fn new(nodes: usize, transport: TransportConfig, link: LinkConfig) -> Self {
        let logs: Rc<RefCell<BTreeMap<NodeId, Arc<Log>>>> = Rc::default();
        let of_nodes = Rc::clone(&logs);
        let services = move |messenger: SimMessenger| {
            let id = messenger.node_id();
            let log = Arc::clone(of_nodes.borrow_mut().entry(id).or_default());
            scenarios::router(messenger, log).expect("one service overlaps none")
        };
        let config = SimConfig {
            nodes,
            transport,
            link,
            seed: 7,
            ..SimConfig::default()
        };
        let mut sim = Sim::new(config, Instant::now(), services).unwrap();
        let all: Vec<_> = (0..nodes).collect();
        assert!(sim.run_until(LIMIT, |sim| sim.all_connected(&all)));
        Self { sim, logs }
    }

    fn log(&self, node: usize) -> Arc<Log> {
        Arc::clone(&self.logs.borrow()[&self.sim.id(node)])
    }

    /// Runs a scenario on the first node.
    fn run<F: Future<Output = ()> + 'static>(
        &mut self,
        scenario: impl FnOnce(SimMessenger, NodeId) -> F,
    ) {
        let scenario = scenario(self.sim.messenger(0).clone(), self.sim.id(1));
        let ended = self.sim.run(LIMIT, scenario);
        ended.expect("the scenario ends");
    }
}

fn pair(transport: TransportConfig, link: LinkConfig) -> Testbed {
    Testbed::new(2, transport, link)
}

#[test]
fn two_hundred_thousand_messages_of_class_latency_keep_their_order() {
    for (link, count) in links().into_iter().zip([200_000, 20_000]) {
        let mut testbed = pair(TransportConfig::default(), link);
        let log = testbed.log(1);
        testbed.run(|a, b| scenarios::latency_keeps_its_order(a, b, log, count));
    }
}

#[test]
fn two_hundred_thousand_messages_of_class_normal_arrive_once() {
    for (link, count) in links().into_iter().zip([200_000, 20_000]) {
        let mut testbed = pair(TransportConfig::default(), link);
        let log = testbed.log(1);
        testbed.run(|a, b| scenarios::normal_arrives_once(a, b, log, count));
    }
}

#[test]
fn a_full_queue_says_when_it_has_room() {
    for link in links() {
        let mut testbed = pair(scenarios::short_queues(), link);
        testbed.run(scenarios::a_full_queue_says_when_it_has_room);
    }
}

#[test]
fn a_bound_of_requests_says_when_it_has_room() {
    for link in links() {
        let mut testbed = pair(scenarios::few_in_flight(), link);
        testbed.run(scenarios::a_bound_of_requests_says_when_it_has_room);
    }
}

#[test]
fn a_full_answer_queue_says_busy() {
    let [lan, _] = links();
    let mut testbed = pair(scenarios::short_queues(), lan);
    testbed.run(scenarios::a_full_answer_queue_says_busy);
}

#[test]
fn answers_that_wait_are_bounded_in_bytes() {
    for link in links() {
        let mut testbed = pair(scenarios::few_answer_bytes(), link);
        testbed.run(scenarios::answers_that_wait_are_bounded_in_bytes);
    }
}

#[test]
fn a_peer_that_fills_its_share_is_busy() {
    for link in links() {
        let mut testbed = pair(scenarios::small_budget(), link);
        let log = testbed.log(1);
        testbed.run(|a, b| scenarios::a_peer_that_fills_its_share_is_busy(a, b, log));
    }
}

#[test]
fn a_sink_gets_a_body_chunk_by_chunk() {
    for link in links() {
        let mut testbed = pair(TransportConfig::default(), link);
        let log = testbed.log(1);
        testbed.run(|a, b| scenarios::a_sink_gets_a_body_chunk_by_chunk(a, b, log));
    }
}

#[test]
fn a_dropped_answer_is_seen_by_the_peer() {
    for link in links() {
        let mut testbed = pair(TransportConfig::default(), link);
        let log = testbed.log(1);
        testbed.run(|a, b| scenarios::a_dropped_answer_is_seen_by_the_peer(a, b, log));
    }
}

#[test]
fn an_unknown_method_is_refused_and_counted() {
    for link in links() {
        let mut testbed = pair(TransportConfig::default(), link);
        testbed.run(scenarios::an_unknown_method_is_refused);
        // The message, which has no answer, may be a little later than the request.
        let b = testbed.sim.messenger(1).clone();
        let counted = |_: &Sim| b.counters().reason(Family::Rejected, "unknown_method") == 2;
        assert!(testbed.sim.run_until(LIMIT, counted));
    }
}

#[test]
fn one_message_reaches_all() {
    for link in links() {
        let mut testbed = Testbed::new(5, TransportConfig::default(), link);
        let logs = (1..5).map(|node| testbed.log(node)).collect();
        testbed.run(|a, _| scenarios::one_message_reaches_all(a, logs, |_| true));
    }
}

#[test]
fn a_messenger_knows_its_node() {
    for link in links() {
        let mut testbed = Testbed::new(5, TransportConfig::default(), link);
        let peers: Vec<_> = (1..5).map(|node| testbed.sim.id(node)).collect();
        let me = testbed.sim.id(0);
        testbed.run(|a, _| scenarios::a_messenger_knows_its_node(a, me, peers));
    }
}
