//! The edge, set up so that all packets of a row get one verdict.
//!
//! Each edge is loaded and published separately, by the code that a node uses: with rules like
//! those that the reference gets, with limits that decide the row, and with the state that a long
//! attack would leave: spent bursts, spent budgets, counted connections.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use libbpf_rs::{MapHandle, ProgramHandle, Xdp, XdpFlags};
use millrace_edge::clock::now_ns;
use millrace_edge::counts::Counts;
use millrace_edge::lease::{NodeLease, charge_validated, make_secrets};
use millrace_edge::load::{LoadOptions, Loaded, Program};
use millrace_edge::metrics::Counters;
use millrace_edge::publish::Publisher;
use millrace_edge_policy::cid::KeySchedule;
use millrace_edge_policy::limiter::{Limit, TOLERANCE_MAX_NS};
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{
    Bounds, Direction, Provenance, Rule, RuleAction, Sources as RuleSources, compile,
};
use millrace_edge_policy::settings::{Caps, DefaultAction, Kind, Limits, Mode, Service, Settings};
use millrace_edge_policy::source::Source;
use millrace_edge_policy::stress::Level;
use serde::Serialize;

use crate::frames::{OPEN_PORT, Shape, TCP_PORT, in_ipv6};
use crate::generator::Sources;
use crate::reference::node_addresses;
use crate::tally::Tally;
use crate::{Result, testbed};

/// Prefixes of [`Case::Prefixes`].
const PREFIXES: u32 = 100_000;

/// The verdict of the edge that a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Case {
    /// No rule allows the source.
    Deny,
    /// Firewall and all levels of a source that has spent its burst. The reference's rules end
    /// there as well.
    Rate,
    /// The same over IPv6.
    Rate6,
    /// Firewall, all levels of a source that keeps to its rate, and its count of connections, which
    /// is at the cap.
    Cap,
    /// Firewall, all levels of a fresh source, its count, the global budget: admitted.
    Admitted,
    /// The same over IPv6.
    Admitted6,
    /// As [`Case::Admitted`] behind a firewall of 100,000 prefixes.
    Prefixes,
    /// Firewall, levels, count, and a global budget that is spent: answered in place.
    Retry,
    /// A connection ID that no node issued.
    Garbage,
    /// A SYN beyond the budget, to a port where no socket listens.
    Syn,
    /// A node under attack that allows every source, but none without a validated address: for
    /// goodput.
    #[cfg(feature = "goodput")]
    Open,
}

impl Case {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Rate => "full path: refused by its source's rate",
            Self::Rate6 => "full path: refused by its source's rate, IPv6",
            Self::Cap => "full path: refused by its source's cap",
            Self::Admitted => "full path: admitted",
            Self::Admitted6 => "full path: admitted, IPv6",
            Self::Prefixes => "full path: admitted, 100,000 prefixes",
            Self::Retry => "Retry",
            Self::Garbage => "garbage",
            Self::Syn => "SYN",
            #[cfg(feature = "goodput")]
            Self::Open => "open to all",
        }
    }

    /// The reason under which every packet of the row is counted.
    fn reason(self) -> Reason {
        match self {
            Self::Deny => Reason::FirewallDefault,
            Self::Rate | Self::Rate6 => Reason::QuicSourceRate,
            Self::Cap => Reason::QuicSourceCap,
            Self::Admitted | Self::Admitted6 | Self::Prefixes => Reason::PassQuicInitial,
            Self::Retry => Reason::TxRetry,
            Self::Garbage => Reason::QuicUnknownId,
            Self::Syn => Reason::TcpSynBudget,
            #[cfg(feature = "goodput")]
            Self::Open => Reason::TxRetry,
        }
    }

    /// Whether the level of stress is that of a node under attack. A node raises it within a fifth
    /// of its lease.
    fn is_under_stress(self) -> bool {
        match self {
            #[cfg(feature = "goodput")]
            Self::Open => true,
            _ => false,
        }
    }

    /// The packets of the row.
    pub(crate) fn shape(self) -> Shape {
        match self {
            Self::Garbage => Shape::ShortHeader,
            Self::Syn => Shape::Syn,
            Self::Rate6 | Self::Admitted6 => Shape::Initial6,
            _ => Shape::Initial,
        }
    }

    /// Whether the edge depends on the number of sources: each of them is charged or counted
    /// before.
    fn knows_sources(self) -> bool {
        matches!(self, Self::Rate | Self::Rate6 | Self::Cap)
    }

    fn settings(self) -> Settings {
        let never = Limit {
            interval_ns: TOLERANCE_MAX_NS,
            tolerance_ns: 0,
        };
        let always = Limit::per(1_000_000_000, Duration::from_secs(1), 1_000_000_000);
        let defaults = Limits::default();
        let limits = match self {
            // One packet of a source in nine hours: a charge before the row stays spent through it.
            Self::Rate | Self::Rate6 => Limits {
                source_quic: never,
                ..defaults
            },
            // Beyond the global budget a source without a token gets a Retry; its cap is not looked
            // at.
            Self::Cap | Self::Admitted | Self::Admitted6 | Self::Prefixes => Limits {
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
            _ => defaults,
        };
        let caps = match self {
            // One system call for each connection: with the default a million sources would take
            // minutes.
            Self::Cap => Caps {
                quic: 1,
                ..Caps::default()
            },
            _ => Caps::default(),
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
            caps,
            ..Settings::default()
        }
    }

    /// A rule for the nodes and honest clients that the reference's rules list as well; or for many
    /// prefixes.
    fn rule(self) -> Rule {
        let of = |address, bits| Ipv4Net::new(address, bits).map(IpNet::from);
        let honest = [Ok(IpNet::from(testbed::HONEST))];
        let prefixes: std::result::Result<Vec<_>, _> = match self {
            // One in 168 networks of 256 addresses, all over the address space.
            Self::Prefixes => (0..PREFIXES)
                .map(|number| of(Ipv4Addr::from(scattered(number) & !0xff), 24))
                .chain(honest)
                .collect(),
            Self::Rate6 | Self::Admitted6 => node_addresses()
                .map(|address| Ipv6Net::new(in_ipv6(address.to_bits()), 128).map(IpNet::from))
                .collect(),
            _ => node_addresses()
                .map(|address| of(address, 32))
                .chain(honest)
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

/// The edge, attached to a device until this is dropped.
#[derive(Debug)]
pub(crate) struct Attached<'e> {
    edge: &'e Edge,
    device: i32,
}

impl Edge {
    /// Loads an edge, publishes its set as a live node does, and brings it into the state that a
    /// long attack from `sources` would leave.
    pub(crate) fn load(case: Case, sources: Sources) -> Result<Self> {
        let mut options = LoadOptions::default();
        match case {
            // The default size of a node's config.
            Case::Prefixes => options.trie_nodes4 = 1 << 14,
            Case::Cap => options.sources_max = options.sources_max.max(sources.count()?),
            _ => {}
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
        let maps = edge.loaded.maps();
        make_secrets(maps)?;
        Publisher::new(maps).publish(&compiled, 1, None)?;
        let limits = &compiled.settings.limits;
        let keys = KeySchedule::new(now_ns(), known_bytes()).keys();
        // A run takes longer than a node's lease, and no node renews it.
        let lease = NodeLease::begin(maps, RUN, Duration::MAX, limits, &keys);
        if case.is_under_stress() {
            lease.set_stress(Level::Retry);
        }
        match case {
            Case::Rate | Case::Rate6 => edge.spend(limits, sources),
            Case::Cap => {
                edge.spend(limits, sources);
                edge.connect(sources)?;
            }
            _ => {}
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

    /// Its counters.
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

    /// Charges every source once, as a connection that it opens does.
    fn spend(&self, limits: &Limits, sources: Sources) {
        for address in sources.addresses() {
            let source = Source::of(self.address(address));
            // A charge that a wider level refuses leaves the source as spent as it can be.
            charge_validated(self.loaded.maps(), source, limits.source_quic);
        }
    }

    /// Counts one connection of every source.
    fn connect(&self, sources: Sources) -> Result<()> {
        let map = MapHandle::try_from(self.loaded.maps().quic_sources())?;
        let counts = Counts::new(map, RUN)?;
        for address in sources.addresses() {
            counts.opened(self.address(address));
        }
        match counts.missed() {
            0 => Ok(()),
            missed => Err(format!("{missed} sources have no count").into()),
        }
    }

    /// The address of a number, as the generator writes it.
    fn address(&self, address: u32) -> IpAddr {
        match self.case.shape() {
            Shape::Initial6 => in_ipv6(address).into(),
            _ => Ipv4Addr::from_bits(address).into(),
        }
    }
}

/// A permutation without a pattern (the last steps of MurmurHash3): neighbouring networks hold
/// different numbers of its values.
fn scattered(number: u32) -> u32 {
    let number = (number ^ number >> 16).wrapping_mul(0x85eb_ca6b);
    let number = (number ^ number >> 13).wrapping_mul(0xc2b2_ae35);
    number ^ number >> 16
}

/// Known keys in place of random bytes: the edge and the attacked node, which is another process,
/// must share them.
pub(crate) fn known_bytes() -> impl FnMut() -> [u8; 16] {
    let mut next = 0;
    move || {
        next += 1;
        [next; 16]
    }
}

/// The run under which counts are written.
const RUN: u32 = 1;

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
    /// Loads one, unless it is loaded already.
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

fn key_of(case: Case, sources: Sources) -> (Case, Option<Sources>) {
    (case, case.knows_sources().then_some(sources))
}
