//! Attaches an edge, or takes over the one that is pinned, before a node's first thread starts.
//!
//! 1. Everything that takes a capability happens here. The node gives its capabilities up
//!    afterwards, before any thread starts, because they belong to threads; a helper process keeps
//!    what later changes need.
//! 2. What the kernel or the host refuses is told, and the node runs: user space then holds the
//!    same caps and limits.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use libbpf_rs::MapHandle;
use millrace_edge::counts::Counts;
use millrace_edge::edge::{Edge, EdgeError, Renewed};
use millrace_edge::helper::{Helper, Setup};
use millrace_edge::nft::Nft;
use millrace_edge::offload::untagged_warning;
use millrace_edge::pins::{EdgeLock, Kind, NodeLock, PinError, Pins};
use millrace_edge::ruleset::Watch;
use millrace_edge::{lease, privileges};
use millrace_edge_policy::admission::Admission;
use millrace_edge_policy::settings::Limits;
use millrace_tuning::NodeConfig;

use crate::apply::{ApplyReport, ApplyRequest, LockedEdge, detach};
use crate::error::{ControlError, Fault};
use crate::nftables::Tables;
use crate::policy::NodePolicy;
use crate::probe::NodeProbe;
use crate::view::EdgeView;

/// Takes what an operator should read.
pub type Notify<'n> = &'n mut dyn FnMut(std::fmt::Arguments<'_>);

/// Attaches where no edge is, and puts a set in force.
///
/// # Errors
///
/// What the kernel, nftables or the rules refuse; nothing is attached then.
pub fn attach(
    pins: &Pins,
    lock: &EdgeLock,
    interfaces: &[String],
    request: &ApplyRequest,
) -> Result<(Edge, ApplyReport), ControlError> {
    let edge = Edge::attach_new(pins, &request.program.attach_options(interfaces), lock)?;
    match LockedEdge::new(&edge, lock, &Nft::of(pins)).apply(request) {
        Ok(report) => Ok((edge, report)),
        // Half an edge would be worse than none.
        Err(error) => Err(error.after(detach(pins, lock))),
    }
}

/// The edge in the kernel, as its node holds it.
#[derive(Debug)]
pub struct AttachedEdge {
    /// The edge.
    pub edge: Edge,
    /// Connections that it counts for each source.
    pub counts: Counts,
    pub(crate) helper: Option<Helper>,
    /// News of nftables; none if the kernel tells none.
    pub(crate) ruleset: Option<Watch>,
    /// As long as it is held, no other node takes this edge over.
    _node: NodeLock,
    /// Which edge this is: another may be attached at the same place later.
    identity: Option<(u64, u64)>,
}

impl AttachedEdge {
    /// Whether the edge is still the one that is pinned, and not detached.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.identity.is_some() && self.identity == self.edge.pins().identity()
    }

    /// Its helper changes nftables, if there is one.
    pub(crate) fn locked<'e>(&'e self, lock: &'e EdgeLock) -> LockedEdge<'e> {
        let tables = match &self.helper {
            Some(helper) => Tables::OfNode(helper),
            None => Tables::Unreachable,
        };
        let edge = &self.edge;
        LockedEdge { edge, lock, tables }
    }
}

/// What a node holds of its edge, in the kernel or not.
#[derive(Debug)]
pub struct EdgeHandles {
    /// The edge in the kernel.
    pub kernel: Option<Arc<AttachedEdge>>,
    /// Who may open connections; shared with the transport.
    pub admission: Arc<Admission>,
    /// The transport's port.
    pub port: u16,
    /// Of the set in force.
    pub limits: Limits,
}

/// What the threads of a node's edge share.
pub(crate) struct EdgeContext {
    pub(crate) node: Arc<dyn NodeProbe>,
    pub(crate) config: Arc<NodeConfig>,
    pub(crate) handles: EdgeHandles,
    pub(crate) view: Arc<EdgeView>,
}

/// Takes over what is pinned as the edge's node, or attaches if nothing is and this process may.
/// None if there is no edge for a reason that `notify` hears. `helper` is the command whose process
/// calls [`millrace_edge::helper::serve_stdin`].
///
/// # Errors
///
/// [`Fault::Held`] if the edge is another node's.
pub fn open(
    config: &NodeConfig,
    request: &ApplyRequest,
    helper: Option<Command>,
    notify: Notify<'_>,
) -> Result<Option<AttachedEdge>, ControlError> {
    let pins = Pins::at(&config.edge.pins);
    // The kernel ends a killed process some milliseconds after its successor can start.
    let found = match pins.lock_node(Duration::from_secs(3)) {
        // Behind a program that has another node's keys, none of its own connections would work.
        Ok(None) => {
            let root = pins.root().display();
            let text =
                format!("another node uses the edge at {root}; give each its own pins in [edge]");
            return Err(ControlError::new(Fault::Held, text));
        }
        Ok(Some(node)) => take_over(node, &pins, config, request, helper, notify),
        Err(error) => Err(error.into()),
    };
    let tell = |error: &ControlError| {
        notify(format_args!(
            "no edge in the kernel: {error}; user space holds caps and rates by itself, without the firewall"
        ));
    };
    Ok(found.inspect_err(tell).ok())
}

fn take_over(
    node: NodeLock,
    pins: &Pins,
    config: &NodeConfig,
    request: &ApplyRequest,
    helper: Option<Command>,
    notify: Notify<'_>,
) -> Result<AttachedEdge, ControlError> {
    // Until everything of it is open: what is attached here in the meantime would be another edge.
    let lock = pins.lock().or_else(|error| {
        if matches!(error, PinError::Busy { .. }) {
            let root = pins.root().display();
            notify(format_args!(
                "waiting for a command that changes the edge at {root}"
            ));
        }
        pins.lock_waiting()
    })?;
    let edge = adopt_or_attach(pins, &lock, &config.edge.interfaces, request, notify)?;
    // An operator may edit the config meanwhile. The node runs without it as well.
    let nft = Nft::of(pins);
    let locked = LockedEdge::new(&edge, &lock, &nft);
    let noted = locked
        .update(|record| record.node = Some(NodePolicy::of(&config.edge)))
        .and_then(|()| locked.note_rolled_back());
    if let Err(error) = noted {
        notify(format_args!("rules stay as they are: {error}"));
    }
    let interfaces = edge.interfaces().unwrap_or_default();
    for warning in interfaces.iter().filter_map(untagged_warning) {
        notify(format_args!("{warning}"));
    }
    let random = lease::random().map_err(|source| EdgeError::Random { source })?;
    let run = u32::from_le_bytes([random[0], random[1], random[2], random[3]]);
    let pinned = edge.pins().path(Kind::Map, "quic_sources");
    let counts = MapHandle::from_pinned_path(&pinned)
        .and_then(|map| Counts::new(map, run))
        .map_err(|error| ControlError::new(Fault::Kernel, format!("quic_sources: {error}")))?;
    // Without it, rules still change, nftables and programs do not.
    let start = |command| {
        let (pins, nft) = (pins.clone(), nft.clone());
        Helper::start(command, &Setup { pins, nft })
            .inspect_err(|error| tracing::warn!(%error, "no helper: nftables and programs stay"))
            .ok()
    };
    Ok(AttachedEdge {
        _node: node,
        helper: helper.and_then(start),
        counts,
        ruleset: Watch::open()
            .inspect_err(|error| tracing::info!(%error, "nftables does not tell what changes"))
            .ok(),
        identity: pins.identity(),
        edge,
    })
}

fn adopt_or_attach(
    pins: &Pins,
    lock: &EdgeLock,
    interfaces: &[String],
    request: &ApplyRequest,
    notify: Notify<'_>,
) -> Result<Edge, ControlError> {
    let missing = privileges::missing();
    match Edge::adopt(pins) {
        Ok(mut found) => {
            found.check_here()?;
            notify(format_args!("edge adopted from {}", pins.root().display()));
            // As far as this process may.
            let renewed = found.renew(interfaces, request.program.attach_mode(), lock);
            tell(renewed, notify);
            Ok(found)
        }
        // The remains of a process that died while attaching do no harm where this one may attach.
        Err(EdgeError::Absent { .. } | EdgeError::Incomplete { .. } | EdgeError::Maps(_))
            if missing.is_empty() =>
        {
            let (attached, report) = attach(pins, lock, interfaces, request)?;
            let (names, mode) = (interfaces.join(", "), report.mode);
            notify(format_args!("edge attached to {names}, mode {mode}"));
            Ok(attached)
        }
        Err(EdgeError::Absent { .. }) => {
            let names: Vec<_> = missing.iter().map(ToString::to_string).collect();
            let text = format!("attaching takes {}", names.join(", "));
            Err(ControlError::new(Fault::Permission, text))
        }
        Err(error) => Err(error.into()),
    }
}

fn tell(renewed: Renewed, notify: Notify<'_>) {
    for name in renewed.added {
        notify(format_args!("edge attached to {name} as well"));
    }
    for (name, error) in renewed.not_added {
        notify(format_args!(
            "the edge is not on {name}: {error}; `millrace xdp attach` puts it there"
        ));
    }
    match renewed.reloaded {
        None => {}
        Some(Ok(())) => notify(format_args!(
            "the edge's programs are replaced by those of this version"
        )),
        Some(Err(error)) => notify(format_args!(
            "the edge goes on with the programs of another version: {error}; `millrace xdp attach` replaces them"
        )),
    }
}
