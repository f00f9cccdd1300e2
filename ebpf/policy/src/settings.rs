//! The operator's settings of the edge: mode, services, limits, caps.
//!
//! 1. The caller runs [`Settings::validate`] before it compiles or publishes anything; the kernel
//!    can keep what passes.
//! 2. Each limit of a source stands for all its levels: see [`levels`].

use crate::limiter::{Limit, TOLERANCE_MAX_NS};
use crate::packet::Protocol;
use crate::source::LEVELS_MAX;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use thiserror::Error;

/// The most services of one node, without the host's own.
pub const SERVICES_MAX: usize = 16;
/// Number of global budgets: see [`Budget`].
pub const BUDGETS: usize = 5;

/// A budget that all sources share. The order is that of `enum edge_budget`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Budget {
    /// [`Limits::unvalidated`].
    Unvalidated = 0,
    /// [`Limits::syn`].
    Syn = 1,
    /// [`Limits::version`].
    Version = 2,
    /// [`Limits::dial_request`].
    DialRequest = 3,
    /// [`Limits::reject`].
    Reject = 4,
}

/// Whether the edge refuses, or only counts what it would refuse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum Mode {
    /// Passes everything.
    #[default]
    Count = 0,
    /// Refuses.
    Enforce = 1,
}

impl Mode {
    /// The word for it in reports.
    pub fn word(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Enforce => "enforce",
        }
    }
}

/// The traffic that the edge decides on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum Scope {
    /// Packets to the declared ports alone.
    #[default]
    Ports = 0,
    /// All traffic except answers to what the host sent.
    Host = 1,
}

/// The kind of a service; it decides which checks apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Kind {
    /// QUIC, the node's transport: firewall, IDs, tokens, rates, caps.
    Quic = 1,
    /// TCP: firewall, rates, caps.
    Tcp = 2,
    /// Other UDP: firewall alone.
    Udp = 3,
}

impl Kind {
    /// The transport protocol of such a service.
    pub fn protocol(self) -> Protocol {
        match self {
            Self::Quic | Self::Udp => Protocol::Udp,
            Self::Tcp => Protocol::Tcp,
        }
    }
}

/// What the edge does with a packet that no rule matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DefaultAction {
    /// Lets it in.
    Allow,
    /// Drops it.
    #[default]
    Deny,
}

/// A port that the node declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// The port that it listens on, not 0.
    pub port: u16,
    /// Its kind.
    pub kind: Kind,
    /// For packets that no rule matches.
    pub default_action: DefaultAction,
}

/// Rates and bursts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Handshakes of all sources without a validated address; beyond it they get a Retry.
    pub unvalidated: Limit,
    /// SYNs of all sources; beyond it they get a cookie.
    pub syn: Limit,
    /// Packets of QUIC versions that the node does not speak, of all sources.
    pub version: Limit,
    /// Dial requests, of all sources.
    pub dial_request: Limit,
    /// Answers to rejected packets, to all sources.
    pub reject: Limit,
    /// QUIC connections that one source opens.
    pub source_quic: Limit,
    /// TCP connections that one source opens.
    pub source_tcp: Limit,
    /// First packets of one proven peer.
    pub peer: Limit,
    /// Packets with the same proof.
    pub proof: Limit,
    /// Packets under one connection ID, while the level of stress is above normal.
    pub id: Limit,
}

/// Connections of one source at a time; 0: any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// QUIC connections, established.
    pub quic: u32,
    /// TCP connections, established, that the source opened.
    pub tcp: u32,
}

/// All settings of an operator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Enforce or count.
    pub mode: Mode,
    /// Declared ports or the whole host.
    pub scope: Scope,
    /// Declared ports; the index is the number of the service.
    pub services: Vec<Service>,
    /// With [`Scope::Host`]: for packets to undeclared ports that no rule matches.
    pub host_default: DefaultAction,
    /// Rates and bursts.
    pub limits: Limits,
    /// Connections of one source at a time.
    pub caps: Caps,
}

/// Why settings are refused. The operator can mend each of them.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SettingsError {
    /// More services than the kernel's table holds.
    #[error("{services} services are declared, the limit is {SERVICES_MAX}")]
    Services {
        /// Number of declared services.
        services: usize,
    },
    /// A service declares port 0, where none can listen.
    #[error("port 0 is declared; write the port that the service listens on")]
    PortZero,
    /// Two services declare the same port.
    #[error("{protocol} port {port} is declared twice; remove one of them")]
    PortTwice {
        /// The port.
        port: u16,
        /// Its protocol.
        protocol: Protocol,
    },
    /// A limit is longer than the sketch can keep: its times have 48 bits.
    #[error(
        "limit {limit} keeps {reach_ns} ns of a source's past, at most {TOLERANCE_MAX_NS} fit; raise its rate or lower its burst"
    )]
    Limit {
        /// Name of the limit.
        limit: &'static str,
        /// The longer of interval and tolerance, in nanoseconds.
        reach_ns: u64,
    },
}

impl SettingsError {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Services { .. } => "settings_services",
            Self::PortZero => "settings_port_zero",
            Self::PortTwice { .. } => "settings_port_twice",
            Self::Limit { .. } => "settings_limit",
        }
    }
}

impl Settings {
    /// Checks that the edge can put the settings in force.
    ///
    /// # Errors
    ///
    /// The first fault that it finds; see [`SettingsError`].
    pub fn validate(&self) -> Result<(), SettingsError> {
        let services = self.services.len();
        if services > SERVICES_MAX {
            return Err(SettingsError::Services { services });
        }
        for (index, service) in self.services.iter().enumerate() {
            let (port, protocol) = (service.port, service.kind.protocol());
            if port == 0 {
                return Err(SettingsError::PortZero);
            }
            if self.service(protocol, port) != Some(index) {
                return Err(SettingsError::PortTwice { port, protocol });
            }
        }
        self.limits.validate()
    }

    /// The number of the service behind a port; none: the port is not declared.
    pub fn service(&self, protocol: Protocol, port: u16) -> Option<usize> {
        self.services
            .iter()
            .position(|service| service.port == port && service.kind.protocol() == protocol)
    }
}

impl Limits {
    /// The global budgets; [`Budget`] is the index.
    pub fn budgets(&self) -> [Limit; BUDGETS] {
        [
            self.unvalidated,
            self.syn,
            self.version,
            self.dial_request,
            self.reject,
        ]
    }

    fn validate(&self) -> Result<(), SettingsError> {
        let of_sources = [
            ("source_quic", self.source_quic),
            ("source_tcp", self.source_tcp),
        ];
        let of_levels = of_sources
            .into_iter()
            .flat_map(|(name, limit)| levels(limit).map(|limit| (name, limit)));
        let others = [("peer", self.peer), ("proof", self.proof), ("id", self.id)];
        match of_levels
            .chain(others)
            .find(|(_, limit)| !limit.fits_sketch())
        {
            None => Ok(()),
            Some((name, limit)) => Err(SettingsError::Limit {
                limit: name,
                reach_ns: limit.interval_ns.max(limit.tolerance_ns),
            }),
        }
    }
}

/// The limit of a source at each of its levels: once for IPv4 /32 and IPv6 /64, four times for IPv4
/// /24 and IPv6 /56, sixteen times for IPv6 /48.
pub fn levels(limit: Limit) -> [Limit; LEVELS_MAX] {
    [limit, limit.scaled(4), limit.scaled(16)]
}

impl Default for Limits {
    fn default() -> Self {
        let second = |rate, burst| Limit::per(rate, Duration::from_secs(1), burst);
        // As much as the reference's rules grant a source.
        let source = Limit::per(1_000, Duration::from_secs(60), 500);
        Self {
            // About a third of the handshakes that one core completes.
            unvalidated: second(2_000, 2_000),
            syn: second(2_000, 2_000),
            version: second(100, 100),
            dial_request: second(1_000, 1_000),
            reject: second(100, 100),
            source_quic: source,
            source_tcp: source,
            peer: second(50, 100),
            // A first flight is a few datagrams, and a lossy path repeats it.
            proof: second(1, 16),
            // More than one connection brings over a link of 25 Gbit/s.
            id: second(2_000_000, 65_536),
        }
    }
}

impl Default for Caps {
    fn default() -> Self {
        // The reference's figures: 100 in its rules, 1,000 in its deployment for HTTP.
        Self {
            quic: 100,
            tcp: 1_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(port: u16, kind: Kind) -> Service {
        Service {
            port,
            kind,
            default_action: DefaultAction::Deny,
        }
    }

    fn with_services(services: Vec<Service>) -> Settings {
        Settings {
            services,
            ..Settings::default()
        }
    }

    // Protects the operator's first minute: without a setting, the edge refuses nothing.
    #[test]
    fn defaults_are_valid_and_refuse_nothing() {
        let settings = Settings::default();
        assert_eq!(settings.validate(), Ok(()));
        assert_eq!(settings.mode, Mode::Count);
        assert_eq!(settings.scope, Scope::Ports);
        assert_eq!(settings.host_default, DefaultAction::Deny);
        assert_eq!(settings.limits.source_quic.interval_ns, 60_000_000);
        assert_eq!(settings.limits.source_quic.burst(), 500);
        assert_eq!(settings.limits.id.interval_ns, 500);
    }

    #[test]
    fn levels_are_multiples() {
        let limit = Limit::per(1_000, Duration::from_secs(60), 500);
        let [address, wider, widest] = levels(limit);
        assert_eq!(address, limit);
        assert_eq!((wider.interval_ns, wider.burst()), (15_000_000, 2_000));
        assert_eq!((widest.interval_ns, widest.burst()), (3_750_000, 8_000));
        assert_eq!(levels(Limit::NONE), [Limit::NONE; 3]);
    }

    // Protects the port table: one service decides on a port.
    #[test]
    fn ports_are_unique_for_each_protocol() {
        let both = with_services(vec![service(4100, Kind::Quic), service(4100, Kind::Tcp)]);
        assert_eq!(both.validate(), Ok(()));
        assert_eq!(both.service(Protocol::Tcp, 4100), Some(1));
        assert_eq!(both.service(Protocol::Tcp, 4101), None);

        let twice = with_services(vec![service(4100, Kind::Quic), service(4100, Kind::Udp)]);
        assert_eq!(
            twice.validate(),
            Err(SettingsError::PortTwice {
                port: 4100,
                protocol: Protocol::Udp
            })
        );
        assert_eq!(
            with_services(vec![service(0, Kind::Tcp)]).validate(),
            Err(SettingsError::PortZero)
        );
        let many = (1..=17).map(|port| service(port, Kind::Tcp)).collect();
        assert_eq!(
            with_services(many).validate(),
            Err(SettingsError::Services { services: 17 })
        );
    }

    #[test]
    fn limits_that_the_sketch_cannot_keep_are_refused() {
        let slow = Limit::per(1, Duration::from_secs(3_600), 20);
        let with = |change: fn(&mut Limits, Limit)| {
            let mut limits = Limits::default();
            change(&mut limits, slow);
            limits.validate()
        };
        let cases = [
            (
                "source_quic",
                with(|limits, slow| limits.source_quic = slow),
            ),
            ("source_tcp", with(|limits, slow| limits.source_tcp = slow)),
            ("peer", with(|limits, slow| limits.peer = slow)),
            ("proof", with(|limits, slow| limits.proof = slow)),
            ("id", with(|limits, slow| limits.id = slow)),
        ];
        for (limit, result) in cases {
            let reach_ns = 19 * 3_600_000_000_000;
            assert_eq!(result, Err(SettingsError::Limit { limit, reach_ns }));
        }
        let global = Limits {
            unvalidated: slow,
            ..Limits::default()
        };
        assert_eq!(global.validate(), Ok(()));
    }
}
