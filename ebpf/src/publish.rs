//! Puts sets in force: writes the idle generation, then makes the program change over by one store.
//!
//! The generation in force is `active`, or the other one once `revert_at_ns` has passed. So there
//! are three states:
//!
//! ```text
//! committed         revert_at_ns = 0              `active` is in force, for good
//! awaiting confirm  revert_at_ns in the future    `active` is in force; its clock takes it back
//! rolled back       revert_at_ns in the past      the other one is in force, for good
//! ```
//!
//! 1. The set in force is never written to, and changes by one store: of `active` or of
//!    `revert_at_ns`. A process that dies at any point leaves a published set in force: the old or
//!    the new one, never half of one.
//! 2. A generation is written no sooner than [`GRACE`] after it was last in force: all packets that
//!    began under it have ended.
//! 3. While a set awaits confirmation, no other is published.
//! 4. A process that publishes beside others holds the lock of the pins;
//!    [`crate::edge::Edge::publish`] does.

use std::mem::offset_of;
use std::time::Duration;

use libbpf_rs::{MapCore as _, MapFlags};
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::packet::Protocol;
use millrace_edge_policy::rules::{Compiled, Roots};
use millrace_edge_policy::settings::{Caps, Limits, Mode, Service, levels};
use millrace_edge_policy::trie::{Base, TrieSet};

use crate::abi::{
    EdgeConfig, EdgeControl, EdgeLimit, EdgeNode, EdgeService, EdgeSparse, GENERATIONS,
    MODE_ENFORCE,
};
use crate::clock::now_ns;
use crate::maps::{Maps, Plain, Table};

/// How long a generation that is no longer in force is left alone: the coarsest tick of the
/// program's clock, and as much again for packets that are inside the program.
pub const GRACE: Duration = Duration::from_millis(20);

/// Why a set was not published. The set in force stays.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// Another set awaits confirmation.
    #[error("set {set} awaits confirmation for {}.{:03} s; confirm or revert it first", .left.as_secs(), .left.subsec_millis())]
    AwaitingConfirm {
        /// Its number.
        set: u32,
        /// Time until it lapses.
        left: Duration,
    },
    /// No set awaits confirmation, or its time is over.
    #[error(
        "no set awaits confirmation; the one that was published with --confirm was rolled back, or was confirmed before"
    )]
    NotAwaitingConfirm,
    /// The set does not fit into the maps.
    #[error(
        "the set takes {needed} {what}, the maps hold {available}; detach, raise {key} and attach again"
    )]
    TooLarge {
        /// The part that is too large.
        what: &'static str,
        /// Entries that the set takes.
        needed: usize,
        /// Entries that the map has.
        available: usize,
        /// Key of the config that sets the size.
        key: &'static str,
    },
    /// Hits of the idle generation could not be set to zero.
    #[error(
        "cannot write the map hits: {0}; nothing has changed; detach (millrace xdp detach) and attach again"
    )]
    Hits(#[source] libbpf_rs::Error),
}

impl PublishError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::AwaitingConfirm { .. } => "publish_awaiting_confirm",
            Self::NotAwaitingConfirm => "publish_not_awaiting_confirm",
            Self::TooLarge { .. } => "publish_too_large",
            Self::Hits(_) => "publish_hits",
        }
    }
}

/// For how long the set in force stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitState {
    /// For good.
    Committed,
    /// Until it is confirmed, or until this time is over.
    AwaitingConfirm {
        /// Time that is left.
        left: Duration,
    },
    /// For good, since a set that awaited confirmation was rolled back.
    RolledBack,
}

/// Publishes sets.
#[derive(Debug, Clone, Copy)]
pub struct Publisher<'m> {
    maps: &'m Maps,
}

impl<'m> Publisher<'m> {
    /// A publisher to these maps.
    #[must_use]
    pub fn new(maps: &'m Maps) -> Self {
        Self { maps }
    }

    /// Puts a set in force. `number` is its number for operators. With `confirm_within` the set is
    /// in force only for that time, unless it is confirmed. Takes up to three times [`GRACE`].
    ///
    /// # Errors
    ///
    /// See [`PublishError`]. The set in force stays then.
    pub fn publish(
        &self,
        set: &Compiled,
        number: u32,
        confirm_within: Option<Duration>,
    ) -> Result<(), PublishError> {
        self.check_turn()?;
        self.check_room(set)?;
        self.leave_alias();
        std::thread::sleep(GRACE);
        if confirm_within.is_some() && self.commit_state() == CommitState::Committed {
            self.lapse_in_place();
            std::thread::sleep(GRACE);
        }
        let idle = self.in_force() ^ 1;
        self.write(idle, set, number)?;
        match (self.commit_state(), confirm_within) {
            (CommitState::Committed, _) => self.set_active(idle),
            (_, None) => self.set_revert_at(COMMITTED),
            (_, Some(period)) => self.set_revert_at(now_ns() + nanoseconds(period)),
        }
        Ok(())
    }

    /// Confirms: the set in force stays.
    ///
    /// # Errors
    ///
    /// [`PublishError::NotAwaitingConfirm`], also in the last moment of one: the program may have
    /// gone back already.
    pub fn confirm(&self) -> Result<(), PublishError> {
        match self.commit_state() {
            CommitState::AwaitingConfirm { left } if left > GRACE => {
                self.set_revert_at(COMMITTED);
                Ok(())
            }
            _ => Err(PublishError::NotAwaitingConfirm),
        }
    }

    /// Takes the set back: the one before comes into force again.
    ///
    /// # Errors
    ///
    /// [`PublishError::NotAwaitingConfirm`] if no set awaits confirmation.
    pub fn revert(&self) -> Result<(), PublishError> {
        match self.commit_state() {
            CommitState::AwaitingConfirm { .. } => {
                self.set_revert_at(LONG_AGO);
                Ok(())
            }
            _ => Err(PublishError::NotAwaitingConfirm),
        }
    }

    /// Whether the set in force gives way to the one before it unless it is confirmed.
    #[must_use]
    pub fn awaits_confirm(&self) -> bool {
        matches!(self.commit_state(), CommitState::AwaitingConfirm { .. })
    }

    /// For how long the set in force stays.
    #[must_use]
    pub fn commit_state(&self) -> CommitState {
        let revert_at_ns = self.revert_at();
        match revert_at_ns.checked_sub(now_ns()) {
            _ if revert_at_ns == COMMITTED => CommitState::Committed,
            None | Some(0) => CommitState::RolledBack,
            Some(left) => CommitState::AwaitingConfirm {
                left: Duration::from_nanos(left),
            },
        }
    }

    /// The generation in force.
    #[must_use]
    pub fn in_force(&self) -> usize {
        let active = (self.load::<u32>(offset_of!(EdgeControl, active)) & 1) as usize;
        active ^ usize::from(self.commit_state() == CommitState::RolledBack)
    }

    /// The settings of the generation in force.
    #[must_use]
    pub fn config(&self) -> EdgeConfig {
        self.maps.load_config(self.in_force())
    }

    /// Limits and caps of the set in force; none before the first set.
    #[must_use]
    pub fn limits(&self) -> Option<(Limits, Caps)> {
        let config = self.config();
        let [unvalidated, syn, version, dial_request, reject] = config.budget.map(Limit::from);
        let limits = Limits {
            unvalidated,
            syn,
            version,
            dial_request,
            reject,
            source_quic: config.source_quic[0].into(),
            source_tcp: config.source_tcp[0].into(),
            peer: config.peer.into(),
            proof: config.proof.into(),
            id: config.id.into(),
        };
        let caps = Caps {
            quic: config.quic_connections_max,
            tcp: config.tcp_connections_max,
        };
        (config.set != 0).then_some((limits, caps))
    }

    /// Whether the set in force enforces.
    #[must_use]
    pub fn mode(&self) -> Mode {
        if self.config().mode == MODE_ENFORCE {
            Mode::Enforce
        } else {
            Mode::Count
        }
    }

    /// Checks that no set awaits confirmation.
    ///
    /// # Errors
    ///
    /// [`PublishError::AwaitingConfirm`], as [`Self::publish`] would say.
    pub fn check_turn(&self) -> Result<(), PublishError> {
        match self.commit_state() {
            CommitState::AwaitingConfirm { left } => Err(PublishError::AwaitingConfirm {
                set: self.config().set,
                left,
            }),
            _ => Ok(()),
        }
    }

    /// Checks that the maps hold a set.
    ///
    /// # Errors
    ///
    /// [`PublishError::TooLarge`], as [`Self::publish`] would say.
    pub fn check_room(&self, set: &Compiled) -> Result<(), PublishError> {
        let maps = self.maps;
        let (trie4, trie6) = (&set.trie4, &set.trie6);
        let nodes = |what, needed, available| (what, needed, available, "trie_nodes_max");
        let room = [
            ("rules", set.rules.len(), maps.rules_max(), "rules_max"),
            nodes("IPv4 trie nodes", trie4.nodes().len(), half(&maps.trie4)),
            nodes("IPv6 trie nodes", trie6.nodes().len(), half(&maps.trie6)),
            nodes(
                "sparse IPv4 trie nodes",
                trie4.sparse().len(),
                half(&maps.sparse4),
            ),
            nodes(
                "sparse IPv6 trie nodes",
                trie6.sparse().len(),
                half(&maps.sparse6),
            ),
        ];
        match room
            .into_iter()
            .find(|(_, needed, available, _)| needed > available)
        {
            None => Ok(()),
            Some((what, needed, available, key)) => Err(PublishError::TooLarge {
                what,
                needed,
                available,
                key,
            }),
        }
    }

    /// Writes a generation that is not in force.
    fn write(&self, generation: usize, set: &Compiled, number: u32) -> Result<(), PublishError> {
        let maps = self.maps;
        self.clear_hits(generation).map_err(PublishError::Hits)?;
        let base4 = write_trie(&maps.trie4, &maps.sparse4, generation, &set.trie4);
        let base6 = write_trie(&maps.trie6, &maps.sparse6, generation, &set.trie6);
        self.write_ports(generation, |protocol, port| {
            set.settings
                .service(protocol, port)
                .and_then(|index| u8::try_from(index).ok())
        });
        maps.store_config(generation, &config(set, number, base4.nodes, base6.nodes));
        Ok(())
    }

    /// Writes only entries that differ: the table has 131,072.
    fn write_ports(&self, generation: usize, service: impl Fn(Protocol, u16) -> Option<u8>) {
        for (tcp, protocol) in [(false, Protocol::Udp), (true, Protocol::Tcp)] {
            for port in 0..=u16::MAX {
                let wanted = service(protocol, port);
                if self.maps.port(generation, tcp, port) != wanted {
                    self.maps.set_port(generation, tcp, port, wanted);
                }
            }
        }
    }

    fn clear_hits(&self, generation: usize) -> Result<(), libbpf_rs::Error> {
        let hits = self.maps.hits();
        let zeros = vec![vec![0; size_of::<u64>()]; libbpf_rs::num_possible_cpus()?];
        let rules = self.maps.rules_max();
        (generation * rules..(generation + 1) * rules).try_for_each(|index| {
            hits.update_percpu(&(index as u32).to_le_bytes(), &zeros, MapFlags::ANY)
        })
    }

    /// Goes from committed to rolled back with the same set in force, so that a time to confirm can
    /// begin and end by one store each.
    ///
    /// In between, both generations hold the same set, so that it does not matter which of the two
    /// words a packet reads first.
    fn lapse_in_place(&self) {
        let (in_force, idle) = (self.in_force(), self.in_force() ^ 1);
        self.write_ports(idle, |protocol, port| {
            self.maps.port(in_force, protocol == Protocol::Tcp, port)
        });
        self.maps
            .store_config(idle, &self.maps.load_config(in_force));
        self.set_revert_at(LONG_AGO);
        self.set_active(idle);
    }

    /// Puts the original in force if its copy is: a process died between the two stores of
    /// [`Self::lapse_in_place`].
    fn leave_alias(&self) {
        let in_force = self.in_force();
        let home = base(&self.maps.trie4, in_force);
        let there = home..home + half(&self.maps.trie4) as u32;
        let is_copy = !there.contains(&self.maps.load_config(in_force).host.root4);
        if is_copy && self.commit_state() == CommitState::RolledBack {
            self.set_revert_at(COMMITTED);
        }
    }

    fn revert_at(&self) -> u64 {
        self.load(offset_of!(EdgeControl, revert_at_ns))
    }

    fn set_revert_at(&self, at_ns: u64) {
        self.maps
            .control
            .store_part(0, offset_of!(EdgeControl, revert_at_ns), &at_ns);
    }

    fn set_active(&self, generation: usize) {
        let generation = generation as u32;
        self.maps
            .control
            .store_part(0, offset_of!(EdgeControl, active), &generation);
    }

    fn load<F: Plain>(&self, offset: usize) -> F {
        self.maps.control.load_part(0, offset)
    }
}

/// A `revert_at_ns` that never comes.
const COMMITTED: u64 = 0;
/// A `revert_at_ns` that is past at any time.
const LONG_AGO: u64 = 1;

fn nanoseconds(period: Duration) -> u64 {
    u64::try_from(period.as_nanos()).unwrap_or(u64::MAX / 2)
}

/// Writes a set of tries to its place in a generation; returns where that begins.
fn write_trie(
    nodes: &Table<EdgeNode>,
    sparse: &Table<EdgeSparse>,
    generation: usize,
    tries: &TrieSet,
) -> Base {
    let base = Base {
        nodes: base(nodes, generation),
        sparse: base(sparse, generation),
    };
    for (index, node) in (base.sparse as usize..).zip(tries.sparse_at(base)) {
        sparse.store(index, &node.into());
    }
    for (index, entry) in (base.nodes as usize..).zip(tries.nodes_at(base)) {
        nodes.store(index, &EdgeNode { entry });
    }
    base
}

/// Number of nodes of one generation.
fn half<T: Plain>(nodes: &Table<T>) -> usize {
    nodes.len() / GENERATIONS
}

/// Index of the first node of a generation.
fn base<T: Plain>(nodes: &Table<T>, generation: usize) -> u32 {
    (generation * half(nodes)) as u32
}

/// A set as the program reads it.
fn config(set: &Compiled, number: u32, base4: u32, base6: u32) -> EdgeConfig {
    let settings = &set.settings;
    let limits = &settings.limits;
    let relocated = |roots: &Roots| (roots.root4 + base4, roots.root6 + base6);
    let mut config = EdgeConfig {
        mode: settings.mode as u32,
        scope: settings.scope as u32,
        services: settings.services.len() as u32,
        set: number,
        budget: limits.budgets().map(EdgeLimit::from),
        source_quic: of_levels(limits.source_quic),
        source_tcp: of_levels(limits.source_tcp),
        peer: limits.peer.into(),
        proof: limits.proof.into(),
        id: limits.id.into(),
        quic_connections_max: settings.caps.quic,
        tcp_connections_max: settings.caps.tcp,
        ..EdgeConfig::default()
    };
    let services = settings.services.iter().zip(&set.services);
    for (place, (service, roots)) in config.service.iter_mut().zip(services) {
        *place = edge_service(service, relocated(roots));
    }
    let (root4, root6) = relocated(&set.host);
    config.host = EdgeService {
        kind: KIND_HOST,
        root4,
        root6,
        ..EdgeService::default()
    };
    config
}

fn edge_service(service: &Service, (root4, root6): (u32, u32)) -> EdgeService {
    EdgeService {
        port: service.port,
        protocol: service.kind.protocol() as u8,
        kind: service.kind as u8,
        root4,
        root6,
        pad: 0,
    }
}

fn of_levels(limit: Limit) -> [EdgeLimit; 3] {
    levels(limit).map(EdgeLimit::from)
}

/// `EDGE_KIND_HOST`.
const KIND_HOST: u8 = 4;
