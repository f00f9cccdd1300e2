//! The edge, set up so that all packets of a row meet one verdict.
//!
//! Each is loaded and configured of its own: rules like those that the reference is given, limits that decide the row, and
//! state that a long attack would have left: bursts spent, budgets spent.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use libbpf_rs::{ProgramHandle, Xdp, XdpFlags};
use millrace_edge::abi::{EdgeConfig, EdgeKey, EdgeNode, EdgeService, MODE_ENFORCE};
use millrace_edge::load::{LoadOptions, Loaded, Program};
use millrace_edge::metrics::Counters;
use millrace_edge_policy::cid::KeySchedule;
use millrace_edge_policy::limiter::{Limit, Purpose, Sketch, TOLERANCE_MAX_NS};
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{
    Bounds, Compiled, Direction, Provenance, Rule, RuleAction, Sources as RuleSources, compile,
};
use millrace_edge_policy::settings::{
    Caps, DefaultAction, Kind, Limits, Mode, Service, Settings, levels,
};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::source::Source;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::filters::Tally;
use crate::frames::{OPEN_PORT, Shape, TCP_PORT};
use crate::generator::Sources;
use crate::reference::node_addresses;
use crate::{Result, rig};

/// Prefixes of [`Case::Prefixes`].
const PREFIXES: u32 = 100_000;

/// Which verdict of the edge a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Case {
    /// No rule allows the source.
    Deny,
    /// Firewall, caps and all levels of a source that has spent its burst.
    Full,
    /// Firewall, caps, all levels of a fresh source, the global budget: passed.
    Admitted,
    /// The same behind a firewall of 100,000 prefixes.
    Prefixes,
    /// Firewall, caps, levels, and a global budget that is spent: answered in place.
    Retry,
    /// A connection ID that nobody gave out.
    Garbage,
    /// A SYN beyond the budget, with nobody listening.
    Syn,
}

impl Case {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Full => "full path",
            Self::Admitted => "full path, admitted",
            Self::Prefixes => "full path, admitted, 100,000 prefixes",
            Self::Retry => "Retry",
            Self::Garbage => "garbage",
            Self::Syn => "SYN",
        }
    }

    /// What every packet of the row is counted as.
    fn reason(self) -> Reason {
        match self {
            Self::Deny => Reason::FirewallDefault,
            Self::Full => Reason::QuicSourceRate,
            Self::Admitted | Self::Prefixes => Reason::PassQuicInitial,
            Self::Retry => Reason::TxRetry,
            Self::Garbage => Reason::QuicUnknownId,
            Self::Syn => Reason::TcpSynBudget,
        }
    }

    /// The packets that it is about.
    pub(crate) fn shape(self) -> Shape {
        match self {
            Self::Garbage => Shape::ShortHeader,
            Self::Syn => Shape::Syn,
            _ => Shape::Initial,
        }
    }

    fn settings(self) -> Settings {
        let never = Limit {
            interval_ns: TOLERANCE_MAX_NS,
            tolerance_ns: 0,
        };
        let always = Limit::per(1_000_000_000, Duration::from_secs(1), 1_000_000_000);
        let defaults = Limits::default();
        let limits = match self {
            // One packet of a source in nine hours: what was charged before the row stays spent through it.
            Self::Full => Limits {
                source_quic: never,
                ..defaults
            },
            Self::Admitted | Self::Prefixes => Limits {
                unvalidated: always,
                ..defaults
            },
            Self::Retry => Limits {
                unvalidated: never,
                ..defaults
            },
            Self::Syn => Limits {
                syn: never,
                ..defaults
            },
            Self::Deny | Self::Garbage => defaults,
        };
        let default_action = if self == Self::Deny {
            DefaultAction::Deny
        } else {
            DefaultAction::Allow
        };
        let service = |port, kind| Service {
            port,
            kind,
            default_action,
        };
        Settings {
            mode: Mode::Enforce,
            services: vec![service(OPEN_PORT, Kind::Quic), service(TCP_PORT, Kind::Tcp)],
            limits,
            caps: Caps::default(),
            ..Settings::default()
        }
    }

    /// The nodes and the client that the reference's rules list as well; or many prefixes.
    fn rule(self) -> Rule {
        let of = |address, bits| Ipv4Net::new(address, bits).map(IpNet::from);
        let client = of(rig::CLIENT, 32);
        let prefixes: std::result::Result<Vec<_>, _> = match self {
            // One in 168 networks of 256 addresses, all over the address space.
            Self::Prefixes => (0..PREFIXES)
                .map(|number| of(Ipv4Addr::from(scattered(number) & !0xff), 24))
                .chain([client])
                .collect(),
            _ => node_addresses()
                .map(|address| of(address, 32))
                .chain([client])
                .collect(),
        };
        Rule {
            sources: RuleSources::Prefixes(prefixes.unwrap_or_default()),
            ports: None,
            protocol: None,
            action: RuleAction::Allow,
            direction: Direction::Inbound,
            user: None,
            comment: None,
            provenance: Provenance::Members,
        }
    }
}

/// One edge in the kernel.
#[derive(Debug)]
pub(crate) struct Edge {
    case: Case,
    loaded: Loaded,
    program: ProgramHandle,
}

/// The edge is attached to a device until this is dropped.
#[derive(Debug)]
pub(crate) struct Attached<'e> {
    edge: &'e Edge,
    device: i32,
}

impl Edge {
    /// Loads it and brings it into the state that a long attack from `sources` would have left.
    pub(crate) fn load(case: Case, sources: Sources) -> Result<Self> {
        let mut options = LoadOptions::default();
        if case == Case::Prefixes {
            // What a node keeps unless it is told otherwise.
            options.trie_nodes4 = 1 << 14;
        }
        let bounds = Bounds {
            rules_max: options.rules_max as usize,
            nodes4_max: options.trie_nodes4 as usize,
            nodes6_max: options.trie_nodes6 as usize,
        };
        let compiled = compile(&case.settings(), &[case.rule()], bounds)?;
        let loaded = Loaded::load(&options)?;
        let program = loaded.program(Program::Edge)?;
        let edge = Self {
            case,
            loaded,
            program,
        };
        edge.publish(&compiled);
        if case == Case::Full {
            edge.spend(&compiled.settings, sources);
        }
        Ok(edge)
    }

    /// The program, for test runs.
    pub(crate) fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// Attaches to a device of the calling thread's namespace.
    pub(crate) fn attach(&self, device: i32) -> Result<Attached<'_>> {
        Xdp::new(self.program()).attach(device, XdpFlags::DRV_MODE)?;
        Ok(Attached { edge: self, device })
    }

    /// What it has counted.
    pub(crate) fn tally(&self) -> Result<Tally> {
        let counters = Counters::read(self.loaded.maps().counters())?;
        let answered = [Reason::TxRetry, Reason::TxSynCookie];
        let passed = Reason::ALL
            .iter()
            .filter(|&&reason| reason < Reason::TxRetry);
        Ok(Tally {
            seen: counters.packets(),
            passed: passed.map(|&reason| counters.acted_on(reason)).sum(),
            answered: answered
                .map(|reason| counters.acted_on(reason))
                .iter()
                .sum(),
            expected: counters.acted_on(self.case.reason()),
        })
    }

    fn publish(&self, compiled: &Compiled) {
        let maps = self.loaded.maps();
        let forests = [
            (&compiled.trie4, &maps.trie4, &maps.sparse4),
            (&compiled.trie6, &maps.trie6, &maps.sparse6),
        ];
        for (forest, nodes, sparse) in forests {
            for (index, &entry) in forest.nodes().iter().enumerate() {
                nodes.store(index, &EdgeNode { entry });
            }
            for (index, &node) in forest.sparse().iter().enumerate() {
                sparse.store(index, &node.into());
            }
        }
        let Settings {
            services,
            limits,
            caps,
            ..
        } = &compiled.settings;
        let mut config = EdgeConfig {
            mode: MODE_ENFORCE,
            services: services.len() as u32,
            budget: limits.budgets().map(Into::into),
            source_quic: levels(limits.source_quic).map(Into::into),
            source_tcp: levels(limits.source_tcp).map(Into::into),
            peer: limits.peer.into(),
            proof: limits.proof.into(),
            id: limits.id.into(),
            quic_connections_max: caps.quic,
            tcp_connections_max: caps.tcp,
            ..EdgeConfig::default()
        };
        for (index, (service, roots)) in services.iter().zip(&compiled.services).enumerate() {
            let is_tcp = service.kind == Kind::Tcp;
            config.service[index] = EdgeService {
                port: service.port,
                protocol: if is_tcp { 6 } else { 17 },
                kind: service.kind as u8,
                root4: roots.root4,
                root6: roots.root6,
                pad: 0,
            };
            maps.set_port(0, is_tcp, service.port, Some(index as u8));
        }
        maps.store_config(0, &config);
        let mut control = maps.control.load(0);
        control.seed = SEEDS.map(EdgeKey::from);
        let keys = KeySchedule::new(now_ns(), known_bytes()).keys();
        control.keys = keys.keys.map(EdgeKey::from);
        control.key_active = keys.active.into();
        control.active = 0;
        maps.control.store(0, &control);
    }

    /// Charges every source once.
    fn spend(&self, settings: &Settings, sources: Sources) {
        let lines = &self.loaded.maps().limiter;
        let sketch = Sketch {
            lines,
            seed: SEEDS,
            active: 0,
            old_until_ns: 0,
        };
        let limits = levels(settings.limits.source_quic);
        let now_ns = now_ns();
        for address in sources.addresses() {
            let source = Source::of(IpAddr::V4(Ipv4Addr::from(address)));
            // Refused at a wider level: as spent as it gets.
            sketch.charge_source(source, Purpose::Quic, &limits, now_ns);
        }
    }
}

/// A permutation without a pattern (the last steps of MurmurHash3): neighbours differ in how many of them a node holds.
fn scattered(number: u32) -> u32 {
    let number = (number ^ number >> 16).wrapping_mul(0x85eb_ca6b);
    let number = (number ^ number >> 13).wrapping_mul(0xc2b2_ae35);
    number ^ number >> 16
}

/// In place of random bytes: keys that the edge and the attacked node, another process, both know.
pub(crate) fn known_bytes() -> impl FnMut() -> [u8; 16] {
    let mut next = 0;
    move || {
        next += 1;
        [next; 16]
    }
}

/// CLOCK_MONOTONIC.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32).as_nanos() as u64
}

const SEEDS: [Key; 2] = [Key { k0: 1, k1: 2 }, Key { k0: 3, k1: 4 }];

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        if let Err(error) = Xdp::new(self.edge.program()).detach(self.device, XdpFlags::DRV_MODE) {
            eprintln!("bench-edge: the edge stays attached: {error}");
        }
    }
}

/// One edge for each kind of row.
#[derive(Debug, Default)]
pub(crate) struct Edges(BTreeMap<(Case, Option<Sources>), Edge>);

impl Edges {
    /// Loads one, unless it is there.
    pub(crate) fn prepare(&mut self, case: Case, sources: Sources) -> Result<()> {
        if let Entry::Vacant(place) = self.0.entry(key_of(case, sources)) {
            place.insert(Edge::load(case, sources)?);
        }
        Ok(())
    }

    pub(crate) fn of(&self, case: Case, sources: Sources) -> Result<&Edge> {
        self.0
            .get(&key_of(case, sources))
            .ok_or_else(|| "this edge was not loaded".into())
    }
}

/// Only where sources have been charged before is it another edge for other sources.
fn key_of(case: Case, sources: Sources) -> (Case, Option<Sources>) {
    (case, (case == Case::Full).then_some(sources))
}
