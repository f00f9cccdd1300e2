//! What a node does about its edge before its first thread starts, and what it tells the edge's
//! threads.
//!
//! 1. Everything that takes a capability happens here; then they are given up, before any thread
//!    starts, because they belong to threads.

mod report;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;

use caps::Capability;
use millrace_edge::edge::EdgeError;
use millrace_edge::publish::Publisher;
use millrace_edge::steer::Steering;
use millrace_edge::{lease, privileges};
use millrace_edge_control::policy::EdgePolicy;
use millrace_edge_control::{
    ApplyOptions, ApplyRequest, AttachedEdge, ControlError, EdgeAgent, EdgeHandles, EdgeView,
    Firewall, NodeProbe, open,
};
use millrace_edge_policy::admission::{Admission, AdmissionConfig};
use millrace_edge_policy::settings::{Mode, Settings};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::source::Source;
use millrace_node::edge::EdgeParts;
use millrace_node::{Node, mapping};
use millrace_shards::socket::{
    ShardSocket, UdpGroupConfig, attach_classic_steering, attach_steering, bind_unsteered,
};
use millrace_transport::{Clock, ConnectionCounts, EdgeStart};
use millrace_tuning::NodeConfig;
use millrace_tuning::config::EdgeMode;
use millrace_tuning::units::{to_u32, to_usize};

use report::Report;

use crate::exit::{Exit, Failure};
use crate::output;
use crate::versions;

/// Kept for the shards: memory that they register with their rings is locked.
const KEPT: [Capability; 1] = [Capability::CAP_IPC_LOCK];

/// The subcommand that is the helper.
const HELPER: &str = "edge-helper";

/// The edge of a node that is about to start.
pub(crate) struct Prepared {
    /// What the node takes.
    pub(crate) parts: EdgeParts,
    /// What runs beside it.
    pub(crate) loops: EdgeLoops,
}

/// The edge's threads, before they start.
pub(crate) struct EdgeLoops {
    handles: EdgeHandles,
    view: Arc<EdgeView>,
}

impl EdgeLoops {
    pub(crate) fn is_in_kernel(&self) -> bool {
        self.handles.kernel.is_some()
    }

    pub(crate) fn start(self, node: &Node, config: &NodeConfig) -> Result<EdgeAgent, Failure> {
        let handshakes_max = mapping::transport(config).handshakes_max;
        let node = node.clone();
        let probe = Arc::new(Probe {
            node,
            handshakes_max,
        });
        let config = Arc::new(config.clone());
        Ok(EdgeAgent::start(probe, config, self.handles, self.view)?)
    }
}

/// Tells the kernel of the transport's connections.
#[derive(Debug)]
struct KernelCounts(Arc<AttachedEdge>);

impl ConnectionCounts for KernelCounts {
    fn opened(&self, source: Source) {
        self.0.counts.opened(source.to_ip());
    }

    fn closed(&self, source: Source) {
        self.0.counts.closed(source.to_ip());
    }

    fn validated(&self, source: Source) {
        // The kernel saw no token of it.
        let maps = self.0.edge.maps();
        if let Some((limits, _)) = Publisher::new(maps).limits() {
            lease::charge_validated(maps, source, limits.source_quic);
        }
    }
}

/// Asks the node for its edge's threads.
struct Probe {
    node: Node,
    /// On each shard.
    handshakes_max: usize,
}

impl NodeProbe for Probe {
    fn half_open(&self) -> (usize, usize) {
        let shards = self.node.transport().status().shards();
        let half_open = shards.iter().map(|shard| shard.handshakes).sum();
        (half_open, shards.len() * self.handshakes_max)
    }

    fn peer_keys(&self) -> BTreeMap<u32, Key> {
        self.node.transport().peer_keys()
    }

    fn firewall(&self, roles: &[String]) -> Firewall {
        versions::firewall(self.node.versions(), roles)
    }
}

/// Binds and steers the sockets, adopts or attaches the program, starts the helper, gives
/// capabilities up.
pub(crate) fn prepare(
    config: &NodeConfig,
    udp: &UdpGroupConfig,
    firewall: Firewall,
) -> Result<Prepared, Failure> {
    let sockets = bind_unsteered(udp).map_err(|error| bind_failure(&error))?;
    let steering = steer(&sockets)?;
    let listens = sockets.first().map_or(udp.local, ShardSocket::local_addr);
    let port = listens.port();
    let kernel = if config.edge.interfaces.is_empty() {
        None
    } else {
        let options = ApplyOptions::committed(mode(config.edge.mode));
        let request = ApplyRequest::new(config, port, firewall, options);
        let mut tell = |line: std::fmt::Arguments<'_>| output::message(line);
        open::open(config, &request, helper(), &mut tell)?.map(Arc::new)
    };
    let mode = match &kernel {
        // That of the set in force: a restart changes nothing.
        Some(kernel) => Publisher::new(kernel.edge.maps()).mode(),
        None => mode(config.edge.mode),
    };
    let settings = EdgePolicy::of(&config.edge).settings(port, mode);
    settings
        .validate()
        .map_err(|error| Failure::new(Exit::BadConfig, format!("[edge]: {error}")))?;
    let admission = Arc::new(admission(config, &settings)?);
    admission.set_kernel_charges(kernel.is_some() && mode == Mode::Enforce);
    // With or without an edge: sockets are bound and have their buffers.
    privileges::drop_capabilities(&KEPT)
        .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    let counts = kernel.clone().map(KernelCounts);
    let view = Arc::new(EdgeView::new(kernel.is_some()));
    let parts = EdgeParts {
        start: EdgeStart {
            admission: Some(Arc::clone(&admission)),
            counts: counts.map(|counts| -> Arc<dyn ConnectionCounts> { Arc::new(counts) }),
            sockets: Some(sockets),
            clock: Clock::new(),
        },
        report: Some(Arc::new(Report {
            view: Arc::clone(&view),
            kernel: kernel.clone(),
            steering,
        })),
    };
    let handles = EdgeHandles {
        kernel,
        admission,
        port,
        limits: settings.limits,
    };
    Ok(Prepared {
        parts,
        loops: EdgeLoops { handles, view },
    })
}

/// The mode of a config or a command line.
pub(crate) fn mode(mode: EdgeMode) -> Mode {
    match mode {
        EdgeMode::Count => Mode::Count,
        EdgeMode::Enforce => Mode::Enforce,
    }
}

/// This binary as the helper.
fn helper() -> Option<Command> {
    let program = std::env::current_exe()
        .inspect_err(|error| {
            tracing::warn!(%error, "no helper: nftables and programs stay as they are");
        })
        .ok()?;
    let mut command = Command::new(program);
    command.arg(HELPER);
    Some(command)
}

fn admission(config: &NodeConfig, settings: &Settings) -> Result<Admission, Failure> {
    let edge = &config.edge;
    let admission = AdmissionConfig {
        limits: settings.limits,
        caps: settings.caps,
        sources_max: to_usize(edge.sources_max),
        half_open_source_max: to_u32(edge.quic_half_open_max),
        half_open_peer_max: to_u32(edge.peer_half_open_max),
        sketch_buckets: to_usize(edge.limiter_buckets),
        ..AdmissionConfig::default()
    }
    .with_handshakes(to_usize(config.transport.handshakes_max));
    // Asked once before, so that an error is told instead of weak keys taken.
    lease::random().map_err(|source| ControlError::from(EdgeError::Random { source }))?;
    Ok(Admission::new(
        admission,
        millrace_edge::clock::now_ns(),
        lease::unpredictable,
    ))
}

/// By a program of ours where it loads, else by the classic one: both send a connection ID to the
/// same shard.
fn steer(sockets: &[ShardSocket]) -> Result<&'static str, Failure> {
    if sockets.len() > 1 && privileges::missing().is_empty() {
        match steer_by_program(sockets) {
            Ok(()) => return Ok("ebpf"),
            Err(error) => tracing::info!(%error, "steering by classic BPF"),
        }
    }
    attach_classic_steering(sockets).map_err(|error| bind_failure(&error))?;
    Ok(if sockets.len() > 1 { "classic" } else { "none" })
}

fn steer_by_program(sockets: &[ShardSocket]) -> Result<(), String> {
    let shards = u32::try_from(sockets.len()).unwrap_or(u32::MAX);
    let steering = Steering::load(shards).map_err(|error| error.to_string())?;
    for (shard, socket) in (0..).zip(sockets) {
        steering
            .set_socket(shard, socket.as_fd())
            .map_err(|error| error.to_string())?;
    }
    let program = steering.program().map_err(|error| error.to_string())?;
    attach_steering(sockets, program.as_fd()).map_err(|error| error.to_string())
}

fn bind_failure(error: &millrace_shards::socket::SocketError) -> Failure {
    Failure::new(
        Exit::Failed,
        format!("the transport did not start: {error}"),
    )
}
