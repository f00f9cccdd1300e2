//! A victim with the default config, in a group of the memory that `check` prints; an honest peer
//! that works all the while; and members without a node.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_lite::future::block_on;
use millrace_node::reference::{Delivery, of_body, wire};
use millrace_node::{Class, Node, NodeId, Payload, Request, SigningKey};
use millrace_testkit::Cgroup;
use millrace_transport::Deadline;
use millrace_transport::counters::Family;
use tempfile::TempDir;

use crate::common::load::{self, Load, Outcome};
use crate::common::{PATIENCE, TestNode, TestRegistry, eventually, own_addresses};

/// What the victim may have beyond what `check` prints.
const MEMORY_ROOM_BYTES: u64 = 32 << 20;
/// Of a core, for all attackers together; the tests give the victim as much.
pub const CPU_PERCENT: u32 = 50;
/// Body of the artifacts that the honest peer puts and gets: in chunks.
const ARTIFACT_BYTES: usize = 100_000;
/// From a round of the honest peer to its next: what it has put stays far below its share.
const PAUSE: Duration = Duration::from_millis(100);

/// A sample of a page of metrics, by its name and labels; 0 where there is none.
pub fn sample(page: &str, name: &str) -> u64 {
    let mut lines = page.lines();
    let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.map_or(0, |value| value.parse::<f64>().unwrap() as u64)
}

/// The sample of a reason.
pub fn reason_sample(family: Family, reason: &str) -> String {
    format!("{}_total{{reason=\"{reason}\"}}", family.name())
}

/// The node that is attacked.
pub struct Victim {
    pub node: TestNode,
    pub address: SocketAddr,
    pub group: Cgroup,
    pub memory_max_bytes: u64,
}

impl Victim {
    fn start(mut node: TestNode, address: &str, cpu_percent: u32) -> Self {
        let printed = node.check_json()["memory_budget_bytes"].as_u64().unwrap();
        let memory_max_bytes = printed + MEMORY_ROOM_BYTES;
        let group = Cgroup::new(memory_max_bytes, cpu_percent);
        let mut shell = Command::new("sh");
        shell
            .args([
                "-c",
                "echo $$ >\"$0\" && echo $$ >\"$1\" && shift && exec \"$@\"",
            ])
            .args(group.procs())
            .arg(env!("CARGO_BIN_EXE_millrace"));
        node.start_by(shell);
        Self {
            node,
            address: address.parse().unwrap(),
            group,
            memory_max_bytes,
        }
    }

    pub fn id(&self) -> NodeId {
        id_of(&self.node)
    }

    /// A sample of `/metrics`.
    pub fn metric(&self, name: &str) -> u64 {
        sample(&self.node.get("/metrics").1, name)
    }

    /// How often this reason was counted.
    pub fn reason(&self, family: Family, reason: &str) -> u64 {
        self.metric(&reason_sample(family, reason))
    }

    /// What it refused, lost and dropped: lines of `/metrics`.
    pub fn reasons(&self) -> String {
        let (_, metrics) = self.node.get("/metrics");
        let is_reason = |line: &&str| {
            let labels = ["_total{reason=", "_total{publisher="];
            labels.iter().any(|label| line.contains(label))
        };
        let lines: Vec<_> = metrics.lines().filter(is_reason).collect();
        lines.join("\n")
    }

    /// It is the process that was started, and has not met its bound.
    pub fn assert_lives(&self) {
        let (killed, failures) = (self.group.killed(), self.group.failures());
        assert_eq!(killed, 0, "the kernel killed it");
        assert_eq!(failures, 0, "it met its bound");
        assert_eq!(self.node.get("/healthz").0, 200);
    }
}

/// What the honest peer's counters say of refusals and losses.
type Reasons = Vec<(Family, &'static str, u64)>;

/// A node in the test's process.
pub struct Honest {
    pub node: Node,
    pub victim: NodeId,
}

impl Honest {
    pub fn reasons(&self) -> Reasons {
        let shards = self.node.transport().counters();
        shards.iter().flat_map(|shard| shard.reasons()).collect()
    }

    /// Puts an artifact; its id.
    pub fn put(&self, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let body = self.node.body(bytes).ok_or("no room at the honest peer")?;
        let id = of_body(&body);
        let put = block_on(self.node.artifacts().publish(id, body));
        let put = put.map_err(|error| error.to_string())?;
        let outcome = put.iter().find(|(peer, _)| *peer == self.victim);
        match outcome {
            Some((_, Delivery::Delivered)) => Ok(id.as_bytes().to_vec()),
            other => Err(format!("a put: {other:?}")),
        }
    }

    /// Gets it from the victim, and from nowhere else.
    pub fn get(&self, id: &[u8]) -> Result<Vec<u8>, String> {
        let request = Request {
            class: Class::Bulk,
            method: wire::GET,
            body: id.to_vec().into(),
            deadline: Deadline::Progress {
                answer_bytes_max: ARTIFACT_BYTES as u64,
                patience: None,
            },
        };
        let answer = self.node.request(self.victim, request).wait(PATIENCE);
        let answer = answer.map_err(|error| format!("a get: {error}"))?;
        Ok(match &answer {
            Payload::Chunks(body) => {
                let slices = body.slices(ARTIFACT_BYTES);
                slices.flat_map(|slice| slice.as_ref().to_vec()).collect()
            }
            other => other.as_slice().unwrap_or_default().to_vec(),
        })
    }
}

/// An artifact for each number.
pub fn artifact(number: u64) -> Vec<u8> {
    let words = (0..ARTIFACT_BYTES as u64 / 8).map(|at| (number << 32) + at);
    words.flat_map(u64::to_le_bytes).collect()
}

/// Puts and gets, the first artifact again in each round, and RPCs without a pause beside them.
pub struct Work {
    /// Dropped at the end.
    goes_on: Sender<()>,
    rounds: Arc<AtomicU64>,
    slowest_ms: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), String>>,
    load: Load,
}

impl Work {
    pub fn start(honest: &Arc<Honest>) -> Self {
        let (goes_on, is_over) = channel();
        let rounds = Arc::<AtomicU64>::default();
        let slowest = Arc::<AtomicU64>::default();
        let (counts, slowest_ms) = (Arc::clone(&rounds), Arc::clone(&slowest));
        let of = Arc::clone(honest);
        let work = move || {
            let first = artifact(0);
            let first_id = of.put(&first)?;
            for number in 1.. {
                let began = Instant::now();
                let artifact = artifact(number);
                let id = of.put(&artifact)?;
                for (id, bytes) in [(&id, &artifact), (&first_id, &first)] {
                    if of.get(id)? != *bytes {
                        return Err(format!("round {number}: other bytes"));
                    }
                }
                counts.fetch_add(1, Ordering::Relaxed);
                let took_ms = began.elapsed().as_millis() as u64;
                slowest_ms.fetch_max(took_ms, Ordering::Relaxed);
                if is_over.recv_timeout(PAUSE) == Err(RecvTimeoutError::Disconnected) {
                    break;
                }
            }
            Ok(())
        };
        Self {
            goes_on,
            rounds,
            slowest_ms: slowest,
            thread: std::thread::spawn(work),
            load: Load::start(&honest.node, &[honest.victim]),
        }
    }

    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Of a put and two gets, so far.
    pub fn slowest_ms(&self) -> u64 {
        self.slowest_ms.load(Ordering::Relaxed)
    }

    /// Waits for this many further rounds and answers.
    pub fn go_on_for(&self, count: u64) {
        let before = self.rounds();
        eventually("puts and gets go on", || {
            let has_ended = self.thread.is_finished();
            (has_ended || self.rounds() >= before + count).then_some(())
        });
        self.load.go_on_for(count);
    }

    /// Ends it: the rounds, or why one failed; and what became of the RPCs.
    pub fn end(self) -> (Result<u64, String>, Outcome) {
        drop(self.goes_on);
        let worked = self.thread.join().unwrap();
        let rounds = self.rounds.load(Ordering::Relaxed);
        (worked.map(|()| rounds), self.load.end())
    }
}

/// Nodes end before their groups and folders go.
pub struct Testbed {
    pub honest: Arc<Honest>,
    pub victim: Victim,
    /// They have no node. They may dial both others: their ids are lower.
    pub hostile: Vec<SigningKey>,
    _folder: TempDir,
}

impl Testbed {
    /// The victim has so many hundredths of a core.
    pub fn start(hostile: usize, victim_cpu_percent: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (registry, ip) = (TestRegistry::init(folder.path()), own_addresses());
        let address = |n: usize| format!("{ip}{n}:4100");
        let victim_folder = folder.path().join("victim");
        let mut victim = TestNode::with_sections(&victim_folder, &registry, &address(1), "");
        let honest_folder = folder.path().join("honest");
        let mut honest = TestNode::new(&honest_folder, &registry, &format!("{ip}2"), "");
        order(&mut honest, &mut victim);
        let dir = format!("[registry]\ndir = {:?}\n", registry.dir);
        honest.edit("[registry]\n", &dir);
        // Its work is what the test makes it do: it has no questions of its own meanwhile.
        honest.edit("poll_interval = \"50ms\"", "poll_interval = \"1h\"");
        let hostile = keys_below(id_of(&honest), hostile);
        let mut members = vec![
            (
                victim.node_id.clone(),
                victim.public_key.clone(),
                address(1),
            ),
            (
                honest.node_id.clone(),
                honest.public_key.clone(),
                address(2),
            ),
        ];
        members.extend(hostile.iter().enumerate().map(|(n, key)| {
            let (id, public_key) = (key.node_id(), key.public_key());
            (id.to_string(), public_key.to_string(), address(3 + n))
        }));
        registry.add_members(members);
        let victim = Victim::start(victim, &address(1), victim_cpu_percent);
        let node = load::start_here(&honest);
        node.wait_for_peer(victim.id(), PATIENCE).unwrap();
        Self {
            honest: Arc::new(Honest {
                node,
                victim: victim.id(),
            }),
            victim,
            hostile,
            _folder: folder,
        }
    }
}

fn id_of(node: &TestNode) -> NodeId {
    node.node_id.parse().unwrap()
}

/// Exchanges the keys, unless the first node dials the second: its id is lower. It knows that the
/// path is short; a dialler that does not would dial again.
fn order(first: &mut TestNode, second: &mut TestNode) {
    if id_of(first) < id_of(second) {
        return;
    }
    let [of_first, of_second] =
        [&first.config, &second.config].map(|c| c.with_file_name("node.key"));
    let kept = of_first.with_extension("kept");
    for (from, to) in [
        (&of_first, &kept),
        (&of_second, &of_first),
        (&kept, &of_second),
    ] {
        std::fs::rename(from, to).unwrap();
    }
    std::mem::swap(&mut first.node_id, &mut second.node_id);
    std::mem::swap(&mut first.public_key, &mut second.public_key);
}

/// Keys whose node ids are lower than `id`.
fn keys_below(id: NodeId, count: usize) -> Vec<SigningKey> {
    let keys = (1_u64..).map(|number| {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&number.to_le_bytes());
        SigningKey::from_seed(seed)
    });
    keys.filter(|key| key.node_id() < id).take(count).collect()
}
