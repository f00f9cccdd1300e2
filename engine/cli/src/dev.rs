//! `millrace dev`: a whole subnet in this process, with fresh keys and a signed registry, on
//! loopback.
//!
//! Shards may share cores here, which a real node never allows; they park instead of spinning then.
//! With `--edge`, the first node stands behind the edge, in network namespaces of its own.

mod testbed;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use millrace_edge_control::ControlError;
use millrace_node::edge::{self, EdgeHost};
use millrace_node::reference::{Delivery, of_body};
use millrace_node::{
    ArtifactId, Body, ByteSize, Draft, Kept, Node, NodeConfig, NodeId, NodeParts, PeerStatus,
    RegistrySource, Services, ShardConfig, SigningKey, folder, host, keys, mapping, registry,
};
use millrace_protocol::rng::Rng;
use millrace_registry::HostResolver;
use millrace_shards::chunk::CHUNK_BYTES;
use millrace_shards::socket::UdpGroupConfig;
use millrace_tuning::config::PathChoice;
use serde::Serialize;
use signal_hook::consts::TERM_SIGNALS;
use signal_hook::iterator::Signals;

use crate::cli::DevArgs;
use crate::exit::{Exit, Failure};
use crate::node::helper;
use crate::{log, output, progress};
use testbed::{Side, Testbed};

/// Chunks beside the payload's: small artifacts that a user puts, answers of the registry.
const SPARE_CHUNKS: u64 = 8;

/// What `--once --json` prints.
#[derive(Debug, Serialize)]
struct Outcome {
    nodes: u16,
    payload_bytes: u64,
    delivered: usize,
    hash_ok: bool,
    seconds_to_all: f64,
    gbit_per_s: f64,
    rss_bytes_max: u64,
}

pub(crate) fn run(args: &DevArgs) -> Result<Exit, Failure> {
    let payload = args.payload.bytes();
    let config = NodeConfig::default();
    if payload > config.transport.body_bytes_max.bytes() {
        let message = format!(
            "--payload {} is more than a body may be ({})",
            args.payload, config.transport.body_bytes_max
        );
        return Err(Failure::new(Exit::Usage, message));
    }
    let signals =
        Signals::new(TERM_SIGNALS).map_err(|error| Failure::io("signal handlers", &error))?;
    let folder = tempfile::Builder::new()
        .prefix("millrace-dev-")
        .tempdir()
        .map_err(|error| Failure::io("a temporary folder", &error))?;
    let subnet = Subnet::start(args, &config, folder.path())?;
    subnet.connect(args.timeout.get())?;
    let exit = if args.once {
        subnet.once(args)?
    } else {
        subnet.stay(signals)?
    };
    subnet.stop();
    Ok(exit)
}

/// What `dev` makes of an error of the edge.
fn edge_failure(error: millrace_edge::edge::EdgeError) -> Failure {
    ControlError::from(error).into()
}

/// The nodes, in the order of their making.
struct Subnet {
    nodes: Vec<Node>,
    /// Their admin sockets; none with `--once`.
    sockets: Vec<PathBuf>,
    /// After the nodes: it takes the edge away.
    testbed: Option<Testbed>,
    connections_per_peer: usize,
    started: Instant,
}

impl Subnet {
    /// Starts nodes that know no peer, then signs a registry of their addresses and gives it to
    /// all: no port is guessed.
    fn start(args: &DevArgs, config: &NodeConfig, folder: &Path) -> Result<Self, Failure> {
        let started = Instant::now();
        let testbed = args.edge.then(Testbed::make).transpose()?;
        log::start_writer().map_err(|error| Failure::io("the thread of the log", &error))?;
        let registry_key = keys::create(&folder.join("registry.key"))?;
        let registry_dir = folder.join("registry");
        std::fs::create_dir(&registry_dir).map_err(|e| Failure::io(registry_dir.display(), &e))?;
        let (mut nodes, mut sockets) = (Vec::new(), Vec::new());
        let mut draft = Draft::first("dev")?;
        let subnet = draft.only_subnet()?;
        for index in 0..args.nodes {
            let state_dir = folder.join(format!("node-{index}"));
            std::fs::create_dir(&state_dir).map_err(|e| Failure::io(state_dir.display(), &e))?;
            let identity = keys::create(&state_dir.join("node.key"))?;
            let public_key = identity.public_key();
            let site = NodeSite {
                args,
                config,
                index,
                testbed: testbed.as_ref(),
                // A client needs it while the subnet stays.
                admin_socket: (!args.once).then(|| state_dir.join(&config.admin.socket)),
                registry: RegistrySource {
                    public_key: registry_key.public_key(),
                    folder: Some(registry_dir.clone()),
                    // A subnet of a day: all its nodes end together.
                    kept: Kept::Nowhere,
                },
            };
            sockets.extend(site.admin_socket.clone());
            let node = site.start(identity)?;
            draft.set_node(public_key, subnet, [node.address()]);
            nodes.push(node);
        }
        folder::write(
            &registry_dir,
            draft.version().number,
            &draft.sign(&registry_key)?,
        )
        .map_err(|error| Failure::io(registry_dir.display(), &error))?;
        for node in &nodes {
            node.poll_registry();
            if node.versions().newest() != draft.version().number {
                return Err(Failure::new(
                    Exit::Failed,
                    "a node did not take the registry",
                ));
            }
        }
        Ok(Self {
            nodes,
            sockets,
            testbed,
            connections_per_peer: usize::from(args.shards),
            started,
        })
    }

    /// Waits until every node has all its connections to every other.
    fn connect(&self, timeout: Duration) -> Result<(), Failure> {
        let others = self.nodes.len() - 1;
        let until = Instant::now() + timeout;
        for node in &self.nodes {
            let left = until.saturating_duration_since(Instant::now());
            let all = |peers: &[PeerStatus]| {
                let ids: BTreeSet<NodeId> = peers.iter().map(|peer| peer.node_id).collect();
                ids.len() == others && peers.len() >= others * self.connections_per_peer
            };
            if !node.transport().status().wait(left, all) {
                let up = node.transport().status().peers().len();
                let message = format!(
                    "node {} has {up} of {} connections to {others} peers after {timeout:?}",
                    node.id(),
                    others * self.connections_per_peer
                );
                return Err(Failure::new(Exit::Failed, message));
            }
        }
        Ok(())
    }

    /// Publishes one artifact on the first node and reports.
    fn once(&self, args: &DevArgs) -> Result<Exit, Failure> {
        let connected = self.started.elapsed();
        let (id, body) = self.payload(args.payload.bytes())?;
        let total = args.payload.bytes() * (self.nodes.len() as u64 - 1);
        let bar = progress::bytes("delivering", total, args.json);
        let (stop, hostile) = (AtomicBool::new(false), AtomicU64::new(0));
        let started = Instant::now();
        let deliveries = std::thread::scope(|scope| {
            let flood = self
                .testbed
                .as_ref()
                .map(|testbed| scope.spawn(|| testbed.flood(&stop, &hostile)));
            let publishing = scope.spawn(|| {
                futures_lite::future::block_on(self.nodes[0].artifacts().publish(id, body))
            });
            self.show_progress(&bar, total, || publishing.is_finished());
            let published = publishing.join();
            stop.store(true, Ordering::Relaxed);
            if let Some(Ok(Err(failure))) = flood.map(std::thread::ScopedJoinHandle::join) {
                output::message(format_args!("the flood ended early: {failure}"));
            }
            published
        });
        let seconds = started.elapsed().as_secs_f64();
        bar.finish_and_clear();
        let deliveries = deliveries
            .map_err(|_| Failure::new(Exit::Failed, "publishing ended with a panic"))?
            .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
        let delivered = deliveries
            .iter()
            .filter(|(_, delivery)| *delivery == Delivery::Delivered)
            .count();
        let hash_ok = self.nodes[1..].iter().all(|node| {
            node.artifacts()
                .held(&id)
                .is_some_and(|body| of_body(&body) == id)
        });
        let outcome = Outcome {
            nodes: args.nodes,
            payload_bytes: args.payload.bytes(),
            delivered,
            hash_ok,
            seconds_to_all: seconds,
            gbit_per_s: (args.payload.bytes() * delivered as u64 * 8) as f64 / seconds / 1e9,
            rss_bytes_max: host::peak_rss().map_or(0, |size| size.0),
        };
        if args.json {
            output::json(&outcome)?;
        } else {
            self.wait_for_counts(args.payload.bytes());
            self.print(id, &deliveries, &outcome, connected)?;
            if let Some(testbed) = &self.testbed {
                testbed.print(&hostile)?;
            }
        }
        let all = delivered == self.nodes.len() - 1 && hash_ok;
        Ok(if all { Exit::Ok } else { Exit::Failed })
    }

    /// Counts what the receivers' connections took in, as their shards publish it.
    fn show_progress(&self, bar: &indicatif::ProgressBar, total: u64, done: impl Fn() -> bool) {
        if bar.is_hidden() {
            return;
        }
        while !done() {
            let publisher = self.nodes[0].id();
            let received: u64 = self.nodes[1..]
                .iter()
                .flat_map(|node| node.transport().status().peers())
                .filter(|peer| peer.node_id == publisher)
                .map(|peer| peer.bytes_received)
                .sum();
            bar.set_position(received.min(total));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Shards publish their counts ten times a second: the table should not show the ones before
    /// the end.
    fn wait_for_counts(&self, payload: u64) {
        let publisher = self.nodes[0].id();
        for node in &self.nodes[1..] {
            node.transport()
                .status()
                .wait(Duration::from_millis(500), |peers| {
                    let from_publisher = peers.iter().filter(|peer| peer.node_id == publisher);
                    from_publisher.map(|peer| peer.bytes_received).sum::<u64>() >= payload
                });
        }
    }

    /// Bytes that do not compress and are not the same from node to node or run to run.
    fn payload(&self, length: u64) -> Result<(ArtifactId, Body), Failure> {
        let full = || Failure::new(Exit::Failed, "the chunk pool is smaller than the payload");
        let length = usize::try_from(length).map_err(|_| full())?;
        let mut body = self.nodes[0].artifacts().reserve(length).ok_or_else(full)?;
        let seed = keys::random()?;
        let mut rng = Rng::new(u64::from_le_bytes([
            seed[0], seed[1], seed[2], seed[3], seed[4], seed[5], seed[6], seed[7],
        ]));
        while !body.is_full() {
            let spare = body.spare();
            let filled = spare.len();
            for word in spare.chunks_mut(8) {
                word.copy_from_slice(&rng.next_u64().to_le_bytes()[..word.len()]);
            }
            body.advance(filled);
        }
        let body = body.freeze();
        Ok((of_body(&body), body))
    }

    fn print(
        &self,
        id: ArtifactId,
        deliveries: &[(NodeId, Delivery)],
        outcome: &Outcome,
        connected: Duration,
    ) -> Result<(), Failure> {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        output::data(format_args!(
            "artifact  {id}  {}",
            ByteSize(outcome.payload_bytes)
        ))?;
        output::data(format_args!(
            "{:<5} {:<21} {:>6} {:>9} {:>12} {:>12}  {}",
            "node", "address", "peers", "rtt us", "sent MiB", "received MiB", "artifact"
        ))?;
        for (index, node) in self.nodes.iter().enumerate() {
            let peers = node.transport().status().peers();
            let rtt = peers.iter().filter_map(|peer| peer.rtt).min();
            let sent: u64 = peers.iter().map(|peer| peer.bytes_sent).sum();
            let received: u64 = peers.iter().map(|peer| peer.bytes_received).sum();
            let what = match deliveries.iter().find(|(peer, _)| *peer == node.id()) {
                Some((_, delivery)) => delivery.reason(),
                None if index == 0 => "published",
                None => "not asked",
            };
            output::data(format_args!(
                "{:<5} {:<21} {:>6} {:>9} {:>12.1} {:>12.1}  {what}",
                index,
                node.address(),
                node.peers().len(),
                rtt.map_or_else(|| "-".to_owned(), |rtt| rtt.as_micros().to_string()),
                mib(sent),
                mib(received),
            ))?;
        }
        output::data(format_args!(
            "{} of {} nodes hold it, hash {}; connected in {:.2} s, delivered to all in {:.2} s, {:.2} Gbit/s, peak memory {:.0} MiB",
            outcome.delivered + 1,
            outcome.nodes,
            if outcome.hash_ok { "checked" } else { "WRONG" },
            connected.as_secs_f64(),
            outcome.seconds_to_all,
            outcome.gbit_per_s,
            mib(outcome.rss_bytes_max),
        ))
    }

    /// Says how to look at the nodes, and waits for a signal.
    fn stay(&self, mut signals: Signals) -> Result<Exit, Failure> {
        let sockets = &self.sockets;
        for (index, (node, socket)) in self.nodes.iter().zip(sockets).enumerate() {
            output::data(format_args!(
                "node {index}  {}  {}",
                node.address(),
                socket.display()
            ))?;
        }
        if let Some(testbed) = &self.testbed {
            output::message(format_args!(
                "edge in front of node 0: millrace xdp status --pins {0}\n                         millrace xdp trace --pins {0} --from 10.77.0.66:40000 --to-port 4100",
                testbed.pins().root().display()
            ));
        }
        output::message(format_args!(
            "try:  millrace put FILE --socket {first}\n      millrace get ID -o FILE --socket {last}\n      \
             millrace status --socket {first}\nctrl-c ends it",
            first = sockets[0].display(),
            last = sockets[sockets.len() - 1].display(),
        ));
        signals.forever().next();
        Ok(Exit::Ok)
    }

    /// All at once: each waits for its connections to drain.
    fn stop(mut self) {
        std::thread::scope(|scope| {
            for node in self.nodes.drain(..) {
                scope.spawn(move || node.shutdown());
            }
        });
    }
}

/// Where and how one node runs.
struct NodeSite<'s> {
    args: &'s DevArgs,
    config: &'s NodeConfig,
    index: u16,
    testbed: Option<&'s Testbed>,
    admin_socket: Option<PathBuf>,
    registry: RegistrySource,
}

impl NodeSite<'_> {
    fn start(&self, identity: SigningKey) -> Result<Node, Failure> {
        let config = self.node_config();
        let parts = self.parts(identity, &config)?;
        let Some(testbed) = self.testbed else {
            return Ok(Node::start(&config, parts)?);
        };
        let side = Side::of(self.index);
        if side == Side::Outside {
            return testbed.on(side, || Ok(Node::start(&config, parts)?));
        }
        let started = testbed.on(side, || start_behind_edge(&config, parts))?;
        testbed.join_far_end()?;
        Ok(started)
    }

    /// Room for the payload, and something beside it.
    fn pool_bytes(&self) -> u64 {
        let payload_chunks = self.args.payload.bytes().div_ceil(CHUNK_BYTES as u64);
        (payload_chunks + SPARE_CHUNKS) * CHUNK_BYTES as u64
    }

    fn node_config(&self) -> NodeConfig {
        let mut config = self.config.clone();
        config.listen.address = std::net::SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, 0));
        if let Some(testbed) = self.testbed {
            if Side::of(self.index) == Side::Inside {
                config = testbed.config(&config);
            }
            config.listen.address = Testbed::address(self.index);
        }
        let buffers = UdpGroupConfig::default();
        config.listen.receive_buffer_bytes = ByteSize(buffers.recv_buffer_bytes as u64);
        config.listen.send_buffer_bytes = ByteSize(buffers.send_buffer_bytes as u64);
        let pool_bytes = ByteSize(self.pool_bytes());
        // All nodes share this host: its load must not make the path look like a long one.
        config.transport.path = PathChoice::Lan;
        config.transport.connections_per_peer = self.args.shards.into();
        config.transport.receive_budget_peer_bytes = pool_bytes;
        // A peer alone reaches half of it, and is to fill the store.
        config.transport.receive_budget_bytes = ByteSize(2 * pool_bytes.0);
        config.artifacts.store_bytes = pool_bytes;
        config
    }

    fn parts(&self, identity: SigningKey, config: &NodeConfig) -> Result<NodeParts, Failure> {
        let source = self.registry.clone();
        Ok(NodeParts {
            versions: registry::versions(&identity.public_key(), config, source)?,
            identity,
            key_file: None,
            admin_socket: self.admin_socket.clone(),
            state_lock: None,
            paths_file: None,
            shards: Some(self.shards(&config.shards.defaults)),
            edge: None,
            resolver: Arc::new(HostResolver),
            services: Services::default(),
        })
    }

    fn shards(&self, profile: &millrace_tuning::config::ShardProfile) -> Vec<ShardConfig> {
        let cpus = host::usable_cpus();
        let shards = usize::from(self.args.shards);
        let oversubscribed = usize::from(self.args.nodes) * shards > cpus.len();
        let shard = |number: usize| {
            let cpu = usize::from(self.index) * shards + number;
            let cpu = (!oversubscribed).then(|| cpus[cpu % cpus.len()]);
            let mut shard = mapping::shard(profile, cpu);
            shard.chunk_pool_bytes = self.pool_bytes();
            if oversubscribed {
                // A shard that spins on a shared core takes the time of the one it waits for.
                shard.spin = Duration::ZERO;
            }
            shard
        };
        (0..shards).map(shard).collect()
    }
}

/// As `millrace node` does it.
fn start_behind_edge(config: &NodeConfig, mut parts: NodeParts) -> Result<Node, Failure> {
    let shards = parts.shards.as_ref().map_or(1, Vec::len);
    let host = EdgeHost {
        helper: helper(),
        notify: &mut |line| output::message(line),
    };
    let edge = edge::prepare(config, shards, &parts.versions, host)?;
    if !edge.is_in_kernel() {
        let message = "the edge could not be attached; see above";
        return Err(Failure::new(Exit::Failed, message));
    }
    parts.edge = Some(edge);
    Ok(Node::start(config, parts)?)
}
