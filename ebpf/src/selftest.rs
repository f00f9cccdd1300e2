//! The self-test of a new program before it goes live: a handful of packets, on maps of its own, at
//! a made-up time.
//!
//! It does not touch the maps in force. A unit test compares the expected reasons with the model's.

use std::mem::offset_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{
    self, Bounds, Compiled, Direction, Provenance, Rule, RuleAction, RulesError, Sources,
};
use millrace_edge_policy::settings::{DefaultAction, Kind, Mode, Service, Settings};
use millrace_edge_policy::stress::Level;
use millrace_edge_policy::verdict::Action;

use crate::abi::{EdgeControl, EdgeMock};
use crate::frame::{Description, Shape};
use crate::load::{LoadError, LoadOptions, Loaded, Program};
use crate::publish::{PublishError, Publisher};

/// Why a new program is not put in force.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelfTestError {
    /// The program could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The rules of the test could not be compiled: a defect.
    #[error("self-test: {0}")]
    Rules(#[from] RulesError),
    /// The rules of the test could not be published: a defect.
    #[error("self-test: {0}")]
    Publish(#[from] PublishError),
    /// The program could not be run.
    #[error("self-test: {fixture} cannot be run: {source}")]
    Run {
        /// The packet.
        fixture: &'static str,
        /// The kernel's error.
        source: libbpf_rs::Error,
    },
    /// The program made another decision than the specification.
    #[error(
        "self-test: {fixture}: {found} instead of {expected}; the program before stays in force"
    )]
    Differs {
        /// The packet.
        fixture: &'static str,
        /// The specified decision.
        expected: String,
        /// The program's decision.
        found: String,
    },
}

/// Loads the programs of this binary on maps of their own, and checks their decisions.
///
/// # Errors
///
/// See [`SelfTestError`].
pub fn run() -> Result<(), SelfTestError> {
    check_all(&Loaded::load(&sizes())?, &set()?)
}

fn sizes() -> LoadOptions {
    LoadOptions {
        trie_nodes4: NODES,
        trie_nodes6: NODES,
        limiter_buckets: 64,
        rules_max: RULES,
        peers_max: 1,
        sources_max: 1,
        replies_max: 1,
        ..LoadOptions::default()
    }
}

fn check_all(loaded: &Loaded, set: &Compiled) -> Result<(), SelfTestError> {
    let maps = loaded.maps();
    Publisher::new(maps).publish(set, 1, None)?;
    maps.mock.store(0, &MOCK);
    FIXTURES
        .iter()
        .try_for_each(|fixture| fixture.check(loaded))?;
    let control = &maps.control;
    control.store_part(0, offset_of!(EdgeControl, stress), &STRESS);
    control.store_part(0, offset_of!(EdgeControl, lease_until_ns), &u64::MAX);
    UNDER_STRESS
        .iter()
        .try_for_each(|fixture| fixture.check(loaded))
}

/// A packet and the specified decision on it.
struct Fixture {
    name: &'static str,
    from: IpAddr,
    to_port: u16,
    shape: Shape,
    expected: Reason,
}

impl Fixture {
    fn frame(&self) -> Vec<u8> {
        let (from, to_port, shape) = ((self.from, 40_000).into(), self.to_port, self.shape);
        Description {
            from,
            to_port,
            shape,
            payload_bytes: None,
        }
        .frame()
    }

    fn check(&self, loaded: &Loaded) -> Result<(), SelfTestError> {
        let run = loaded
            .run(Program::EdgeTest, &self.frame(), 1)
            .map_err(|source| SelfTestError::Run {
                fixture: self.name,
                source,
            })?;
        let left = loaded.maps().decision.load(0);
        let reason = Reason::from_index(left.reason);
        if reason == Some(self.expected) && run.action == xdp_action(self.expected.action()) {
            return Ok(());
        }
        let expected = format!(
            "{} (action {})",
            self.expected.label(),
            xdp_action(self.expected.action())
        );
        let found = format!(
            "{} (action {})",
            reason.map_or("no reason", Reason::label),
            run.action
        );
        Err(SelfTestError::Differs {
            fixture: self.name,
            expected,
            found,
        })
    }
}

/// `enum xdp_action`.
fn xdp_action(action: Action) -> u32 {
    match action {
        Action::Drop => 1,
        Action::Pass => 2,
        Action::Transmit => 3,
    }
}

/// Services of each kind; one prefix denied, one allowed, the rest by the service's default.
fn set() -> Result<Compiled, RulesError> {
    let service = |port, kind, default_action| Service {
        port,
        kind,
        default_action,
    };
    let settings = Settings {
        mode: Mode::Enforce,
        services: vec![
            service(QUIC, Kind::Quic, DefaultAction::Deny),
            service(TCP, Kind::Tcp, DefaultAction::Allow),
            service(UDP, Kind::Udp, DefaultAction::Deny),
        ],
        ..Settings::default()
    };
    let rule = |number, prefixes: [IpNet; 2], action| Rule {
        sources: Sources::Prefixes(prefixes.into()),
        ports: None,
        protocol: None,
        action,
        direction: Direction::Inbound,
        user: None,
        comment: None,
        provenance: Provenance::Registry { version: 0, number },
    };
    // The narrow prefixes come first: the first rule that matches decides.
    let denied = [
        IpNet::V4(Ipv4Net::new_assert(DENIED4, 32)),
        IpNet::V6(Ipv6Net::new_assert(DENIED6, 128)),
    ];
    let allowed = [
        IpNet::V4(Ipv4Net::new_assert(NET4, 24)),
        IpNet::V6(Ipv6Net::new_assert(NET6, 64)),
    ];
    let rules = [
        rule(1, denied, RuleAction::Deny),
        rule(2, allowed, RuleAction::Allow),
    ];
    let nodes_max = NODES as usize;
    let bounds = Bounds {
        rules_max: RULES as usize,
        nodes4_max: nodes_max,
        nodes6_max: nodes_max,
    };
    rules::compile(&settings, &rules, bounds)
}

const fn fixture(
    name: &'static str,
    from: IpAddr,
    to_port: u16,
    shape: Shape,
    expected: Reason,
) -> Fixture {
    Fixture {
        name,
        from,
        to_port,
        shape,
        expected,
    }
}

const FIXTURES: [Fixture; 14] = [
    fixture(
        "to another port",
        ALLOWED,
        OTHER,
        Shape::Udp,
        Reason::PassOther,
    ),
    fixture(
        "SYN to another port",
        NON_MEMBER,
        OTHER,
        Shape::TcpSyn,
        Reason::PassOther,
    ),
    fixture(
        "first packet",
        ALLOWED,
        QUIC,
        Shape::QuicInitial,
        Reason::PassQuicInitial,
    ),
    fixture(
        "first packet, IPv6",
        ALLOWED_V6,
        QUIC,
        Shape::QuicInitial,
        Reason::PassQuicInitial,
    ),
    fixture(
        "from a denied host",
        DENIED,
        QUIC,
        Shape::QuicInitial,
        Reason::FirewallDeny,
    ),
    fixture(
        "from a denied host, IPv6",
        DENIED_V6,
        UDP,
        Shape::Udp,
        Reason::FirewallDeny,
    ),
    fixture(
        "from a non-member",
        NON_MEMBER,
        QUIC,
        Shape::QuicInitial,
        Reason::FirewallDefault,
    ),
    fixture(
        "from a non-member, IPv6",
        NON_MEMBER_V6,
        UDP,
        Shape::Udp,
        Reason::FirewallDefault,
    ),
    fixture(
        "a foreign ID",
        ALLOWED,
        QUIC,
        Shape::QuicShort,
        Reason::QuicUnknownId,
    ),
    fixture("not QUIC", ALLOWED, QUIC, Shape::Udp, Reason::QuicMalformed),
    fixture("plain UDP", ALLOWED_V6, UDP, Shape::Udp, Reason::PassUdp),
    fixture(
        "SYN from a non-member",
        NON_MEMBER,
        TCP,
        Shape::TcpSyn,
        Reason::PassTcpSyn,
    ),
    fixture(
        "TCP from a non-member, IPv6",
        NON_MEMBER_V6,
        TCP,
        Shape::TcpAck,
        Reason::PassTcp,
    ),
    fixture(
        "SYN from a denied host",
        DENIED,
        TCP,
        Shape::TcpSyn,
        Reason::FirewallDeny,
    ),
];

/// Packets that get a Retry: the longest path through the program.
const UNDER_STRESS: [Fixture; 3] = [
    fixture("Retry", ALLOWED, QUIC, Shape::QuicInitial, Reason::TxRetry),
    fixture(
        "Retry, IPv6",
        ALLOWED_V6,
        QUIC,
        Shape::QuicInitial,
        Reason::TxRetry,
    ),
    fixture(
        "not QUIC, under stress",
        ALLOWED,
        QUIC,
        Shape::Udp,
        Reason::QuicMalformed,
    ),
];
const STRESS: u32 = Level::Retry as u32;

/// Read-only: nothing is charged, so the order of the fixtures does not matter.
const MOCK: EdgeMock = EdgeMock {
    now_ns: 1_000_000_000_000,
    cookie: 0,
    read_only: 1,
    listener_room: 0,
    meets_listener: 0,
};

const NODES: u32 = 128;
const RULES: u32 = 16;
const QUIC: u16 = 4_100;
const TCP: u16 = 8_080;
const UDP: u16 = 4_200;
const OTHER: u16 = 53;

const NET4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 0);
const NET6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 0);
const DENIED4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 66);
const DENIED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 66);
const ALLOWED: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));
const ALLOWED_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 7));
const DENIED: IpAddr = IpAddr::V4(DENIED4);
const DENIED_V6: IpAddr = IpAddr::V6(DENIED6);
const NON_MEMBER: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9));
const NON_MEMBER_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 2, 0, 0, 0, 9));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::{AttachOptions, Edge, EdgeError};
    use crate::load::EDGE_HERE;
    use crate::pins::{Kind as Pinned, Pins};
    use libbpf_rs::ProgramHandle;
    use millrace_edge_policy::model::{Cookie, Environment, Model};
    use millrace_testkit::skip;

    // Protects the fixtures: they expect what the specification says.
    #[test]
    fn the_model_decides_the_same() {
        let mut model = Model::new(64);
        model.publish(set().unwrap());
        let environment = Environment {
            now_ns: MOCK.now_ns,
            cookie: Cookie::None,
            meets_listener: false,
            read_only: true,
        };
        for (stress, fixtures) in [(0, FIXTURES.as_slice()), (STRESS, &UNDER_STRESS)] {
            (model.stress, model.lease_until_ns) = (stress, u64::MAX);
            for fixture in fixtures {
                let decision = model.decide(&fixture.frame(), environment);
                assert_eq!(decision.reason, fixture.expected, "{}", fixture.name);
                assert_eq!(
                    decision.action,
                    fixture.expected.action(),
                    "{}",
                    fixture.name
                );
            }
        }
    }

    // Protects the running program: the self-test finds and names one that decides otherwise.
    #[test]
    fn another_decision_is_found() {
        if !skip::has_all("another_decision_is_found", &crate::privileges::missing()) {
            return;
        }
        run().unwrap();
        let mut other = set().unwrap();
        other.settings.mode = Mode::Count;
        let error = check_all(&Loaded::load(&sizes()).unwrap(), &other).unwrap_err();
        let SelfTestError::Differs { fixture, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(*fixture, "from a denied host", "{error}");
    }

    // Protects the running program: one with a defect does not replace it, nor is it attached to a
    // host that has none.
    #[test]
    fn a_program_that_fails_is_not_put_in_force() {
        const WRONG: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/wrong.bpf.o"));
        let test = "a_program_that_fails_is_not_put_in_force";
        if !skip::has_all(test, &crate::privileges::missing()) {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let pins = Pins::at(folder.path().join("edge"));
        let options = AttachOptions {
            sizes: sizes(),
            ..AttachOptions::default()
        };
        let good = EDGE_HERE.replace(WRONG);
        let differs = |error: EdgeError| {
            let found = matches!(error, EdgeError::SelfTest(SelfTestError::Differs { .. }));
            assert!(found, "{error}");
        };
        differs(Edge::attach(&pins, &options).unwrap_err());
        assert!(!pins.is_present());

        EDGE_HERE.set(good);
        let mut edge = Edge::attach(&pins, &options).unwrap();
        let pinned = || {
            let path = pins.path(Pinned::Program, Program::Edge.name());
            ProgramHandle::from_pinned_path(path).unwrap().id()
        };
        let before = pinned();
        EDGE_HERE.set(WRONG);
        differs(edge.load_beside().unwrap_err());
        differs(edge.reload().unwrap_err());
        assert_eq!(pinned(), before);
        EDGE_HERE.set(good);
        edge.reload().unwrap();
        assert_ne!(pinned(), before);
        Edge::detach(&pins).unwrap();
    }
}
