//! Requests without a pause, from a node in the test's process to nodes that are processes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use millrace_node::{
    Class, Method, Node, NodeId, NodeParts, Paths, Payload, Request, RpcError, Transport,
};
use millrace_registry::wire::NEWER_THAN;
use millrace_testkit::PATIENCE;

use super::TestNode;

/// Requests under way to each peer.
const IN_FLIGHT: usize = 8;
/// No version has this number: the answer is empty.
const NEWEST: u64 = u64::MAX;
const QUESTION: Method = NEWER_THAN;

/// Starts a test's node in this process.
pub fn start_here(node: &TestNode) -> Node {
    // This process counts no heap bytes.
    node.edit("[transport]\n", "[transport]\nheap_count = \"optional\"\n");
    let parsed = millrace_node::parse(&std::fs::read_to_string(&node.config).unwrap());
    assert!(parsed.is_usable(), "{:?}", parsed.problems);
    let paths = Paths::of(&parsed.config, node.config.parent().unwrap());
    let parts = NodeParts::of_files(&parsed.config, &paths).unwrap();
    Node::start(&parsed.config, parts).unwrap()
}

/// Requests that go on until the end.
#[derive(Debug)]
pub struct Load {
    is_over: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    started: Instant,
    threads: Vec<JoinHandle<Result<(), RpcError>>>,
}

/// What became of the requests.
#[derive(Debug)]
pub struct Outcome {
    pub answered: u64,
    pub time: Duration,
    /// The first failure of each peer's.
    pub failures: Vec<RpcError>,
}

impl Load {
    pub fn start(from: &Node, peers: &[NodeId]) -> Self {
        let (is_over, answered) = (Arc::default(), Arc::default());
        let ask = |peer: &NodeId| {
            let (transport, peer) = (from.transport().clone(), *peer);
            let (is_over, answered) = (Arc::clone(&is_over), Arc::clone(&answered));
            std::thread::spawn(move || ask_on(&transport, peer, &is_over, &answered))
        };
        let threads = peers.iter().map(ask).collect();
        Self {
            is_over,
            answered,
            started: Instant::now(),
            threads,
        }
    }

    /// Waits for this many further answers.
    pub fn go_on_for(&self, answers: u64) {
        let before = self.answered.load(Ordering::Relaxed);
        super::eventually("answers go on", || {
            (self.answered.load(Ordering::Relaxed) >= before + answers).then_some(())
        });
    }

    pub fn end(self) -> Outcome {
        self.is_over.store(true, Ordering::Relaxed);
        let ends = self
            .threads
            .into_iter()
            .map(|thread| thread.join().unwrap());
        let failures = ends.filter_map(Result::err).collect();
        Outcome {
            answered: self.answered.load(Ordering::Relaxed),
            time: self.started.elapsed(),
            failures,
        }
    }
}

fn question() -> Request {
    Request {
        class: Class::Normal,
        method: QUESTION,
        body: Payload::from(NEWEST.to_le_bytes().to_vec()),
        deadline: PATIENCE.into(),
    }
}

/// One request, and its answer.
pub fn ask(transport: &Transport, peer: NodeId) -> Result<(), RpcError> {
    transport
        .request(peer, question())
        .wait(PATIENCE)
        .map(|_| ())
}

fn ask_on(
    transport: &Transport,
    peer: NodeId,
    is_over: &AtomicBool,
    answered: &AtomicU64,
) -> Result<(), RpcError> {
    while !is_over.load(Ordering::Relaxed) {
        let asked = [(); IN_FLIGHT].map(|()| transport.request(peer, question()));
        for answer in asked {
            answer.wait(PATIENCE)?;
            answered.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}
