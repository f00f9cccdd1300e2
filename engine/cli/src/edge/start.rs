//! What a node does about its edge before its first thread starts.
//!
//! 1. Everything that takes a capability happens here; then they are given up, before any thread starts, because they belong to threads. A
//!    helper process keeps what later changes need.
//! 2. What the kernel or the host refuses is said and counted, and the node runs: user space then holds the same caps and limits.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use caps::Capability;
use libbpf_rs::MapHandle;
use millrace_edge::counts::Counts;
use millrace_edge::edge::{Edge, EdgeError};
use millrace_edge::helper::{Helper, Setup};
use millrace_edge::nft::Nft;
use millrace_edge::pins::{Kind, Pins};
use millrace_edge::publish::Publisher;
use millrace_edge::ruleset::Watch;
use millrace_edge::steer::Steering;
use millrace_edge::{presence, privileges};
use millrace_edge_policy::admission::{Admission, AdmissionConfig};
use millrace_edge_policy::settings::{Mode, Settings};
use millrace_edge_policy::source::Source;
use millrace_shards::socket::{
    ShardSocket, UdpGroupConfig, attach_classic_steering, attach_steering, bind_unsteered,
};
use millrace_transport::{Clock, ConnectionCounts, EdgeStart};
use millrace_tuning::NodeConfig;

use super::applied;
use super::commands::attach_options;
use super::force::{self, Claim, Order, Turn};
use super::plan::{self, Firewall};
use crate::exit::{Exit, Failure};
use crate::output;

/// Kept for the shards: memory that they register with their rings is locked.
const KEPT: [Capability; 1] = [Capability::CAP_IPC_LOCK];

/// The subcommand that is the helper.
const HELPER: &str = "edge-helper";

/// The program in the kernel, as a running node holds it.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) edge: Edge,
    pub(crate) helper: Option<Helper>,
    pub(crate) counts: Counts,
    /// News of nftables; none if the kernel tells none.
    pub(crate) ruleset: Option<Watch>,
    /// As long as it is held, no other node takes this edge over.
    _claim: Claim,
    /// Which edge this is: another may be attached at the same place later.
    identity: Option<(u64, u64)>,
}

impl Kernel {
    /// Whether the edge is still the one that is pinned, and not detached.
    pub(crate) fn is_attached(&self) -> bool {
        self.identity.is_some() && self.identity == identity(self.edge.pins())
    }
}

/// Device and inode of a pin.
fn identity(pins: &Pins) -> Option<(u64, u64)> {
    let pin = std::fs::metadata(pins.path(Kind::Map, "control")).ok()?;
    Some((pin.dev(), pin.ino()))
}

impl ConnectionCounts for Kernel {
    fn opened(&self, source: Source) {
        self.counts.opened(source.to_ip());
    }

    fn closed(&self, source: Source) {
        self.counts.closed(source.to_ip());
    }

    fn validated(&self, source: Source) {
        let maps = self.edge.maps();
        if let Some((limits, _)) = Publisher::new(maps).limits() {
            presence::charge_validated(maps, source, limits.source_quic);
        }
    }
}

/// The edge of a node that is about to start.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) kernel: Option<Arc<Kernel>>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) settings: Settings,
    pub(crate) steering: &'static str,
    sockets: Vec<ShardSocket>,
}

impl Prepared {
    /// What the transport takes, and what the keeper takes later.
    pub(crate) fn split(self) -> (EdgeStart, Kept) {
        let counts = self
            .kernel
            .clone()
            .map(|kernel| -> Arc<dyn ConnectionCounts> { kernel });
        let start = EdgeStart {
            admission: Some(Arc::clone(&self.admission)),
            counts,
            sockets: Some(self.sockets),
            clock: Clock::new(),
        };
        let kept = Kept {
            kernel: self.kernel,
            admission: self.admission,
            settings: self.settings,
            steering: self.steering,
        };
        (start, kept)
    }
}

/// What is left for the keeper.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) kernel: Option<Arc<Kernel>>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) settings: Settings,
    pub(crate) steering: &'static str,
}

/// Binds and steers the sockets, adopts or attaches the program, starts the helper, gives capabilities up.
pub(crate) fn prepare(
    config: &NodeConfig,
    udp: &UdpGroupConfig,
    firewall: &Firewall,
) -> Result<Prepared, Failure> {
    let sockets = bind_unsteered(udp).map_err(|error| bind_failure(&error))?;
    let steering = steer(&sockets)?;
    let listens = sockets.first().map_or(udp.local, ShardSocket::local_addr);
    let kernel = if config.edge.interfaces.is_empty() {
        None
    } else {
        kernel(config, listens, firewall)?
    };
    let mode = match &kernel {
        // That of the set in force: a restart changes nothing.
        Some(kernel) => Publisher::new(kernel.edge.maps()).mode(),
        None => plan::mode(config.edge.mode),
    };
    let settings = plan::settings(config, listens.port(), mode);
    settings
        .validate()
        .map_err(|error| Failure::new(Exit::BadConfig, format!("[edge]: {error}")))?;
    let admission = admission(config, &settings)?;
    admission.set_kernel_charges(kernel.is_some() && mode == Mode::Enforce);
    // With or without an edge: sockets are bound and have their buffers.
    privileges::drop_capabilities(&KEPT)
        .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    Ok(Prepared {
        kernel: kernel.map(Arc::new),
        admission: Arc::new(admission),
        settings,
        steering,
        sockets,
    })
}

fn admission(config: &NodeConfig, settings: &Settings) -> Result<Admission, Failure> {
    let of_admission = AdmissionConfig {
        limits: settings.limits,
        caps: settings.caps,
        sources_max: plan::to_usize(config.edge.sources_max),
        half_open_source_max: plan::to_u32(config.edge.quic_half_open_max),
        half_open_peer_max: plan::to_u32(config.edge.peer_half_open_max),
        sketch_buckets: plan::to_usize(config.edge.limiter_buckets),
        ..AdmissionConfig::default()
    }
    .with_handshakes(plan::to_usize(config.transport.handshakes_max));
    // Asked once before, so that an error is told instead of weak keys taken.
    random()?;
    Ok(Admission::new(
        of_admission,
        millrace_edge::clock::now_ns(),
        unpredictable,
    ))
}

fn random() -> Result<[u8; 16], Failure> {
    presence::random().map_err(|error| Failure::io("random bytes", &error))
}

/// Random bytes where no error can be told; the kernel's generator does not fail once it gave any.
pub(crate) fn unpredictable() -> [u8; 16] {
    presence::random().unwrap_or_else(|error| {
        tracing::error!(%error, "the kernel gives no random bytes");
        std::process::abort()
    })
}

/// By a program of ours where it loads, else by the classic one: both send a connection ID to the same shard.
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

/// The program in the kernel: what is pinned, or a new one if this process may. A failure only if it is another node's.
fn kernel(
    config: &NodeConfig,
    listens: SocketAddr,
    firewall: &Firewall,
) -> Result<Option<Kernel>, Failure> {
    let pins = Pins::at(&config.edge.pins);
    let found = match Claim::take(&pins) {
        // Behind a program that has another node's keys, none of its own connections would work.
        Ok(None) => {
            let message = format!(
                "another node uses the edge at {}; give each its own pins in [edge]",
                pins.root().display()
            );
            return Err(Failure::new(Exit::Failed, message));
        }
        Ok(Some(claim)) => claimed(claim, &pins, config, listens, firewall),
        Err(failure) => Err(failure),
    };
    Ok(found
        .inspect_err(|failure| {
            output::message(format_args!(
                "no edge in the kernel: {failure}; user space holds caps and rates by itself, without the firewall"
            ));
        })
        .ok())
}

fn claimed(
    claim: Claim,
    pins: &Pins,
    config: &NodeConfig,
    listens: SocketAddr,
    firewall: &Firewall,
) -> Result<Kernel, Failure> {
    // Until everything of it is open: what is attached here in the meantime would be another edge.
    let turn = match Turn::now(pins)? {
        Some(turn) => turn,
        None => {
            output::message(format_args!(
                "waiting for a command that changes the edge at {}",
                pins.root().display()
            ));
            Turn::wait(pins)?
        }
    };
    let edge = adopt_or_attach(pins, &turn, config, listens, firewall)?;
    note_start(&edge, &turn, config);
    super::show::warn_of_offloads(&edge);
    let run = u32::from_le_bytes(random()?[..4].try_into().unwrap_or([1; 4]));
    let pinned = edge.pins().path(Kind::Map, "quic_sources");
    let counts = MapHandle::from_pinned_path(&pinned)
        .and_then(|map| Counts::new(map, run))
        .map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", pinned.display())))?;
    Ok(Kernel {
        _claim: claim,
        helper: helper(pins),
        counts,
        ruleset: Watch::open()
            .inspect_err(|error| tracing::info!(%error, "nftables does not tell what changes"))
            .ok(),
        identity: identity(pins),
        edge,
    })
}

/// Writes down what this node was started with, for whoever edits the config meanwhile. It runs without as well.
fn note_start(edge: &Edge, turn: &Turn, config: &NodeConfig) {
    let noted = force::read_state(edge.pins()).and_then(|mut state| {
        state.node = applied::of_nodes(config);
        force::write_state(edge.pins(), &state)
    });
    let noted = noted.and_then(|()| force::note_lapsed(edge, turn));
    if let Err(failure) = noted {
        output::message(format_args!("rules stay as they are: {failure}"));
    }
}

fn adopt_or_attach(
    pins: &Pins,
    turn: &Turn,
    config: &NodeConfig,
    listens: SocketAddr,
    firewall: &Firewall,
) -> Result<Edge, Failure> {
    let error = match Edge::adopt(pins) {
        Ok(mut edge) => {
            edge.check_here()
                .map_err(|error| super::commands::of_edge(&error))?;
            output::message(format_args!("edge adopted from {}", pins.root().display()));
            renew(config, &mut edge);
            return Ok(edge);
        }
        Err(EdgeError::Absent { .. }) => return attach(config, listens, firewall, pins, turn),
        Err(error) => error,
    };
    // What somebody who died while attaching has left is in nobody's way, if this process may attach.
    let is_cut_short = matches!(error, EdgeError::Incomplete { .. } | EdgeError::Maps(_));
    if is_cut_short && privileges::missing().is_empty() {
        attach(config, listens, firewall, pins, turn)
    } else {
        Err(super::commands::of_edge(&error))
    }
}

/// Gives an edge that was adopted what the config asks for and this binary brings, as far as this process may. What fails is said, and what
/// is in force stays. An interface that is gone is attached again when it is back.
fn renew(config: &NodeConfig, edge: &mut Edge) {
    let attached = edge.interfaces().unwrap_or_default();
    let is_known = |name: &String| attached.iter().any(|known| known.name == *name);
    let may = privileges::missing().is_empty();
    let options = attach_options(config);
    for name in options.interfaces.iter().filter(|name| !is_known(name)) {
        if !may {
            output::message(format_args!(
                "the edge is not on {name}: `millrace xdp attach` puts it there"
            ));
            continue;
        }
        match edge.attach_interface(name, options.mode) {
            Ok(()) => output::message(format_args!("edge attached to {name} as well")),
            Err(error) => output::message(format_args!("the edge is not on {name}: {error}")),
        }
    }
    if edge.is_current() {
        return;
    }
    if !may {
        output::message(format_args!(
            "the edge runs the programs of another version: `millrace xdp attach` replaces them"
        ));
        return;
    }
    match edge.reload() {
        Ok(()) => output::message(format_args!(
            "the edge's programs are replaced by those of this version"
        )),
        Err(error) => output::message(format_args!(
            "the edge goes on with the programs of another version: {error}"
        )),
    }
}

fn attach(
    config: &NodeConfig,
    listens: SocketAddr,
    firewall: &Firewall,
    pins: &Pins,
    turn: &Turn,
) -> Result<Edge, Failure> {
    let missing = privileges::missing();
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter().map(ToString::to_string).collect();
        let message = format!("attaching takes {}", names.join(", "));
        return Err(Failure::new(Exit::NotPermitted, message));
    }
    let edge = Edge::attach(pins, &attach_options(config))
        .map_err(|error| super::commands::of_edge(&error))?;
    let order = Order {
        config,
        port: listens.port(),
        firewall,
        mode: plan::mode(config.edge.mode),
        probation: None::<Duration>,
        or_last_good: false,
        anew: true,
    };
    let nft = Nft::of(pins);
    let done = force::plan(&edge, turn, &order, &nft)
        .and_then(|planned| force::put(&edge, turn, &order, planned, &nft));
    match done {
        Ok(done) => {
            output::message(format_args!(
                "edge attached to {}, mode {}",
                done.interfaces.join(", "),
                done.mode
            ));
            Ok(edge)
        }
        Err(failure) => {
            // Half an edge would be worse than none. The first error is the one to tell.
            let _ = force::take_away(pins, turn);
            Err(failure)
        }
    }
}

/// The process that keeps what later changes need; without it, rules still change, nftables and programs do not.
fn helper(pins: &Pins) -> Option<Helper> {
    let setup = Setup {
        pins: pins.clone(),
        nft: Nft::of(pins),
    };
    let started = std::env::current_exe()
        .map_err(|error| error.to_string())
        .and_then(|program| {
            let mut command = Command::new(program);
            command.arg(HELPER);
            Helper::start(command, &setup).map_err(|error| error.to_string())
        });
    started
        .inspect_err(|error| {
            tracing::warn!(error, "no helper: nftables and programs stay as they are");
        })
        .ok()
}

fn bind_failure(error: &millrace_shards::socket::SocketError) -> Failure {
    Failure::new(
        Exit::Failed,
        format!("the transport did not start: {error}"),
    )
}
