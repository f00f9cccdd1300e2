//! A node behind its edge, as an operator has it: namespaces, a config, a registry, a server of
//! TCP, and people who talk to it.
#![allow(unreachable_pub, reason = "shared by test crates")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use millrace_edge::nft::Nft;
use serde_json::Value;

use crate::common::namespace::{NODE, NON_MEMBER, Pair, Pinned};
use crate::common::{TestNode, TestRegistry, eventually, millrace, stderr, stdout, text};

/// A port that the edge owns.
pub const PORT: u16 = 8080;
/// A port that is none of its business.
pub const ELSEWHERE: u16 = 2222;
/// How long a client waits for an answer that must come: a bound, not a measure.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a client waits for an answer that must not come.
pub const MOMENT: Duration = Duration::from_millis(500);

/// A node that is not started, in its namespace, and its registry. Dropped in this order.
pub struct Testbed {
    pub node: TestNode,
    pub pinned: Pinned,
    pub pair: Pair,
    pub registry: TestRegistry,
    pub folder: tempfile::TempDir,
}

impl Testbed {
    /// `edge` follows what every test says in `[edge]`.
    pub fn new(label: &str, edge: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pair = Pair::new(label);
        let registry = TestRegistry::init(folder.path());
        let pinned = Pinned(folder.path().join("edge"));
        let extra = config(&registry, &pinned) + edge;
        let state = folder.path().join("node");
        let node = TestNode::new(&state, &registry, &NODE.to_string(), &extra);
        registry.add(&node, &format!("{NODE}:4100"));
        Self {
            node,
            pinned,
            pair,
            registry,
            folder,
        }
    }

    /// Another node at another address, with the same pins.
    pub fn another_node(&self, address: &str) -> TestNode {
        self.pair.node.ip(&format!("addr add {address}/24 dev mr0"));
        let extra = config(&self.registry, &self.pinned);
        let state = self.folder.path().join("another");
        TestNode::new(&state, &self.registry, address, &extra)
    }

    /// `millrace xdp` with this node's config.
    pub fn xdp(&self, command: &str, arguments: &[&str]) -> Output {
        let config = ["xdp", command, "--config", text(&self.node.config)];
        let words = [&config, arguments].concat();
        self.pair.node.enter(|| millrace(&words))
    }

    /// What a command that must succeed says.
    pub fn json(&self, command: &str, arguments: &[&str]) -> Value {
        let output = self.xdp(command, &[arguments, &["--json"]].concat());
        assert!(
            output.status.success(),
            "{command} {arguments:?}: {}",
            stderr(&output)
        );
        serde_json::from_str(&stdout(&output)).unwrap()
    }

    /// The edge's own table of nftables, as `nft` names it.
    pub fn table(&self) -> String {
        format!("inet {}", Nft::of(&self.pinned.pins()).table)
    }

    pub fn status(&self) -> Value {
        self.json("status", &[])
    }

    /// Waits until the node has this version of the registry.
    pub fn knows(&self, version: u64) {
        eventually("the node has the version", || {
            (self.node.status()["registry"]["newest_version"] == version).then_some(())
        });
    }

    /// Waits until the node has put this version of the registry in force.
    pub fn follows(&self, version: u64) {
        eventually("the node puts the version in force", || {
            (self.node.status()["edge"]["registry_version"] == version).then_some(())
        });
    }

    /// A metric of the node, by its name and labels as `/metrics` writes them.
    pub fn counter(&self, name: &str) -> u64 {
        let metrics = self.node.get("/metrics").1;
        let mut lines = metrics.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse::<f64>().unwrap() as u64)
    }

    /// How often the edge did not follow, for this reason.
    pub fn refusals(&self, reason: &str) -> u64 {
        self.counter(&format!(
            "millrace_edge_rules_refused_total{{reason=\"{reason}\"}}"
        ))
    }

    /// Packets that this reason decided about, and those that it would have.
    pub fn packets(&self, reason: &str) -> (u64, u64) {
        let status = self.status();
        let mut rows = status["packets"].as_array().unwrap().iter();
        let row = rows.find(|row| row["reason"] == reason);
        let count = |column: &str| row.map_or(0, |row| row[column].as_u64().unwrap());
        (count("acted"), count("would"))
    }

    pub fn trace(&self, from: Ipv4Addr, port: u16, kind: &str) -> Value {
        let (from, port) = (format!("{from}:40000"), port.to_string());
        let arguments = ["--from", &from, "--to-port", &port, "--kind", kind];
        self.json("trace", &arguments)
    }

    pub fn start_node(&mut self) {
        let Self { node, pair, .. } = self;
        pair.node.enter(|| node.start());
    }

    pub fn serve(&self, port: u16) -> Server {
        self.pair.node.enter(|| Server::start(port))
    }

    pub fn talk(&self, from: Ipv4Addr, port: u16) -> std::io::Result<Session> {
        let mut session = Session::new(self.pair.connect(from, port, PATIENCE)?);
        session.types();
        session.hears_all();
        Ok(session)
    }

    /// No answer comes, and the edge counts that it refused the packet.
    pub fn assert_denied(&self, from: Ipv4Addr) {
        let (before, _) = self.packets("firewall_deny");
        assert!(self.pair.connect(from, PORT, MOMENT).is_err());
        eventually("the edge counts it", || {
            (self.packets("firewall_deny").0 > before).then_some(())
        });
    }
}

/// What follows `[registry]` in a config.
fn config(registry: &TestRegistry, pinned: &Pinned) -> String {
    format!(
        "dir = {:?}\n[edge]\ninterfaces = [\"mr0\"]\ntcp_ports = [{PORT}]\npins = {:?}\nlease = \"500ms\"\n\
         rules_max = 64\ntrie_nodes_max = 256\nlimiter_buckets = 1024\nsources_max = 1024\npeers_max = 16\n",
        registry.dir, pinned.0
    )
}

/// Echoes what comes to a port of the node. Ends when dropped.
pub struct Server {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(port: u16) -> Self {
        let listener = TcpListener::bind((NODE, port)).unwrap();
        let accepting = listener.try_clone().unwrap();
        let serve = move || {
            for stream in accepting.incoming().map_while(Result::ok) {
                std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
            }
        };
        Self {
            listener,
            thread: Some(std::thread::spawn(serve)),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the thread that waits in `accept`.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A client that sends lines and receives them back.
pub struct Session {
    stream: TcpStream,
    typed: usize,
    heard: usize,
}

impl Session {
    pub fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream,
            typed: 0,
            heard: 0,
        }
    }

    pub fn types(&mut self) {
        self.stream.write_all(b"x").unwrap();
        self.typed += 1;
    }

    /// Every byte comes back, some of them later than others.
    pub fn hears_all(&mut self) {
        let mut bytes = [0; 64];
        while self.heard < self.typed {
            let heard = self.stream.read(&mut bytes).unwrap();
            assert_ne!(heard, 0, "the connection is over");
            self.heard += heard;
        }
    }

    /// Types while something else goes on.
    pub fn types_during<T>(&mut self, act: impl FnOnce() -> T) -> T {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let typing = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    self.types();
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
            over.store(true, Ordering::Relaxed);
            typing.join().unwrap();
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

pub fn rule(action: &str, prefix: &str) -> String {
    format!("[[firewall]]\nscope = \"global\"\nprefixes = [\"{prefix}\"]\naction = \"{action}\"\n")
}

pub fn allow_all_but_the_non_member() -> String {
    rule("deny", &format!("{NON_MEMBER}/32")) + &rule("allow", "10.77.0.0/24")
}
