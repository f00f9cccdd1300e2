//! The edge of a node: what is done about it before the first thread starts, and what its threads
//! are told.
//!
//! 1. Everything that takes a capability happens here; then they are given up, before any thread
//!    starts, because they belong to threads.

mod report;

use std::collections::BTreeMap;
use std::fmt;
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
    Fault, Firewall, NodeProbe, open,
};
use millrace_edge_policy::admission::{Admission, AdmissionConfig};
use millrace_edge_policy::rules::Locality;
use millrace_edge_policy::settings::{Mode, Settings};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::source::Source;
use millrace_registry::Versions;
use millrace_shards::socket::{
    ShardSocket, attach_classic_steering, attach_steering, bind_unsteered,
};
use millrace_transport::{Clock, ConnectionCounts, EdgeStart};
use millrace_tuning::NodeConfig;
use millrace_tuning::config::EdgeMode;
use millrace_tuning::units::{to_u32, to_usize};

pub(crate) use report::{EdgeSample, Report};

pub use report::EdgeStatus;

use crate::core::Core;
use crate::error::{StartError, socket_failed};
use crate::mapping;

/// Retained for the shards: memory that they register with their rings is locked.
const RETAINED: [Capability; 1] = [Capability::CAP_IPC_LOCK];

/// What the edge of a node asks of the program that it runs in.
pub struct EdgeHost<'h> {
    /// A command whose process calls [`millrace_edge::helper::serve_stdin`]: it keeps the
    /// capabilities that later changes take. None: rules still change, nftables and programs do
    /// not.
    pub helper: Option<Command>,
    /// Hears what the operator should know: what was attached, and what could not be.
    pub notify: &'h mut dyn FnMut(fmt::Arguments<'_>),
}

impl fmt::Debug for EdgeHost<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EdgeHost").finish_non_exhaustive()
    }
}

/// The edge of a node that is about to start.
#[derive(Debug)]
pub struct PreparedEdge {
    pub(crate) start: EdgeStart,
    pub(crate) report: Report,
    pub(crate) loops: EdgeLoops,
}

impl PreparedEdge {
    /// Whether the program in the kernel refuses for this node; otherwise user space alone does.
    pub fn is_in_kernel(&self) -> bool {
        self.loops.handles.kernel.is_some()
    }
}

/// The edge's threads, before they start.
#[derive(Debug)]
pub(crate) struct EdgeLoops {
    handles: EdgeHandles,
    view: Arc<EdgeView>,
}

impl EdgeLoops {
    pub(crate) fn start(
        self,
        core: Arc<Core>,
        config: &NodeConfig,
    ) -> Result<EdgeAgent, ControlError> {
        let handshakes_max = mapping::transport(config).handshakes_max;
        let probe = Arc::new(Probe {
            core,
            handshakes_max,
        });
        let config = Arc::new(config.clone());
        EdgeAgent::start(probe, config, self.handles, self.view)
    }
}

/// What the registry says to the edge of a node that has these roles.
pub fn firewall(versions: &Versions, roles: &[String]) -> Firewall {
    let records = versions.firewall();
    Firewall {
        version: records.version,
        tables: records.tables,
        members: records.members,
        locality: Locality {
            node: versions.node_id().to_string(),
            subnet: records.subnet.map(|subnet| subnet.to_string()),
            roles: roles.to_vec(),
        },
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
    core: Arc<Core>,
    /// On each shard.
    handshakes_max: usize,
}

impl NodeProbe for Probe {
    fn half_open(&self) -> (usize, usize) {
        let shards = self.core.transport.status().shards();
        let half_open = shards.iter().map(|shard| shard.handshakes).sum();
        (half_open, shards.len() * self.handshakes_max)
    }

    fn peer_keys(&self) -> BTreeMap<u32, Key> {
        self.core.transport.peer_keys()
    }

    fn firewall(&self, roles: &[String]) -> Firewall {
        firewall(&self.core.versions, roles)
    }
}

/// Binds and steers the sockets, one for each shard, adopts or attaches the program that the config
/// asks for, and starts the helper. Then the calling thread gives its capabilities up, but the one
/// to lock memory: threads that it starts later have none either.
///
/// # Errors
/// [`StartError`], by whose fault it is. That there is no edge in the kernel is none: the host's
/// `notify` hears of it, and user space holds caps and rates.
pub fn prepare(
    config: &NodeConfig,
    shards: usize,
    versions: &Versions,
    host: EdgeHost<'_>,
) -> Result<PreparedEdge, StartError> {
    let udp = &mapping::udp(config, shards);
    let sockets = bind_unsteered(udp).map_err(socket_failed)?;
    let steering = steer(&sockets)?;
    let listens = sockets.first().map_or(udp.local, ShardSocket::local_addr);
    let port = listens.port();
    let kernel = if config.edge.interfaces.is_empty() {
        None
    } else {
        let options = ApplyOptions::committed(mode(config.edge.mode));
        let firewall = firewall(versions, &config.edge.roles);
        let request = ApplyRequest::new(config, port, firewall, options);
        open::open(config, &request, host.helper, host.notify)?.map(Arc::new)
    };
    let mode = match &kernel {
        // That of the set in force: a restart changes nothing.
        Some(kernel) => Publisher::new(kernel.edge.maps()).mode(),
        None => mode(config.edge.mode),
    };
    let settings = EdgePolicy::of(&config.edge).settings(port, mode);
    settings
        .validate()
        .map_err(|error| ControlError::new(Fault::Config, format!("[edge]: {error}")))?;
    let admission = Arc::new(admission(config, &settings)?);
    admission.set_kernel_charges(kernel.is_some() && mode == Mode::Enforce);
    // With or without an edge: sockets are bound and have their buffers.
    privileges::drop_capabilities(&RETAINED)
        .map_err(|error| StartError::host("capabilities cannot be given up", error))?;
    let counts = kernel.clone().map(KernelCounts);
    let view = Arc::new(EdgeView::new(kernel.is_some()));
    let start = EdgeStart {
        admission: Some(Arc::clone(&admission)),
        counts: counts.map(|counts| -> Arc<dyn ConnectionCounts> { Arc::new(counts) }),
        sockets: Some(sockets),
        clock: Clock::new(),
    };
    let report = Report {
        view: Arc::clone(&view),
        kernel: kernel.clone(),
        steering,
    };
    let handles = EdgeHandles {
        kernel,
        admission,
        port,
        limits: settings.limits,
    };
    Ok(PreparedEdge {
        start,
        report,
        loops: EdgeLoops { handles, view },
    })
}

/// The mode of a config or a command line.
pub fn mode(mode: EdgeMode) -> Mode {
    match mode {
        EdgeMode::Count => Mode::Count,
        EdgeMode::Enforce => Mode::Enforce,
    }
}

fn admission(config: &NodeConfig, settings: &Settings) -> Result<Admission, StartError> {
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
fn steer(sockets: &[ShardSocket]) -> Result<&'static str, StartError> {
    if sockets.len() > 1 && privileges::missing().is_empty() {
        match steer_by_program(sockets) {
            Ok(()) => return Ok("ebpf"),
            Err(error) => tracing::info!(%error, "steering by classic BPF"),
        }
    }
    attach_classic_steering(sockets).map_err(socket_failed)?;
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
