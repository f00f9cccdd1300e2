//! Asks the program for its decision on a frame, and the reason; changes nothing.
//!
//! 1. The program that runs is the attached one, compiled into an entry point that neither charges
//!    nor counts, on the maps in force.
//! 2. The frame is not sent anywhere.
//! 3. It reads what is in force, whatever a command changes meanwhile: no command waits for a
//!    trace, and no trace for a command.

use std::io;
use std::net::IpAddr;

use libbpf_rs::{MapCore as _, MapFlags};
use millrace_edge_policy::packet::Packet;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::Compiled;
use millrace_edge_policy::source::Source;
use millrace_edge_policy::verdict::Action;

use crate::abi::{
    EdgeConfig, EdgeDecision, EdgeService, MODE_ENFORCE, RULE_DEFAULT, SERVICE_NONE,
    TCP_CONNECTIONS, TCP_DEAD,
};
use crate::edge::{Edge, EdgeError};
use crate::load::Program;
use crate::maps::Maps;
use crate::sys;

/// The decision of the program on a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Why.
    pub reason: Reason,
    /// What the program does with it in mode `enforce`.
    pub action: Action,
    /// Whether the mode is `enforce`. In mode `count` the frame passes.
    pub enforced: bool,
    /// The rule that decided.
    pub rule: Decider,
    /// The service that the frame is for.
    pub service: Option<EdgeService>,
    /// Level of stress: 0, 1 or 2.
    pub stress: u32,
    /// Number of the set in force.
    pub set: u32,
    /// The sender, if it could be read.
    pub source: Option<IpAddr>,
    /// Connections that the sender has.
    pub connections: Connections,
}

/// The rule that decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decider {
    /// The default: no rule matched, or the frame did not get to the rules.
    Default,
    /// The rule with this index.
    Rule(u16),
}

impl Decider {
    /// The rule in words; none if no rule decided, or if `set` is not the set in force.
    #[must_use]
    pub fn text(self, set: &Compiled) -> Option<String> {
        match self {
            Self::Default => None,
            Self::Rule(index) => {
                let decided = set.rules.get(usize::from(index))?;
                Some(format!("{} ({})", decided.rule, decided.rule.provenance))
            }
        }
    }
}

/// Connections of a source, and its caps; a cap of 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Connections {
    /// QUIC connections, as the last run of the node wrote them.
    pub quic: u32,
    /// Cap of QUIC.
    pub quic_max: u32,
    /// TCP connections, as the kernel counts them.
    pub tcp: u32,
    /// Cap of TCP.
    pub tcp_max: u32,
}

/// Why a frame could not be traced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The program could not be run.
    #[error("cannot run the program: {0}; a frame has at least 14 bytes")]
    Run(#[source] io::Error),
    /// The program left a reason that this binary does not know.
    #[error("the program left reason {reason}, which this version does not know")]
    Reason {
        /// Its number.
        reason: u32,
    },
    /// The pins could not be locked.
    #[error(transparent)]
    Edge(#[from] EdgeError),
}

impl TraceError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Run(_) => "trace_run",
            Self::Reason { .. } => "trace_reason",
            Self::Edge(error) => error.reason(),
        }
    }
}

impl Edge {
    /// Returns the decision of the program on a frame, from its Ethernet header on.
    ///
    /// # Errors
    ///
    /// See [`TraceError`].
    pub fn trace(&self, frame: &[u8]) -> Result<Trace, TraceError> {
        let decision = {
            let _turn = self.pins().lock_trace().map_err(EdgeError::from)?;
            sys::test_run(self.program(Program::EdgeTrace), frame).map_err(TraceError::Run)?;
            self.maps().decision.load(0)
        };
        let unknown = TraceError::Reason {
            reason: decision.reason,
        };
        let reason = Reason::from_index(decision.reason).ok_or(unknown)?;
        let config = self.maps().load_config(decision.generation as usize & 1);
        let source = Packet::parse(frame).ok().map(|packet| packet.source);
        Ok(Trace {
            reason,
            action: reason.action(),
            enforced: config.mode == MODE_ENFORCE,
            rule: decider(&decision),
            service: service(&config, decision.service),
            stress: decision.stress,
            set: config.set,
            source,
            connections: connections(self.maps(), &config, source),
        })
    }
}

fn decider(decision: &EdgeDecision) -> Decider {
    match u16::try_from(decision.rule) {
        Ok(rule) if decision.rule != RULE_DEFAULT => Decider::Rule(rule),
        _ => Decider::Default,
    }
}

fn service(config: &EdgeConfig, index: u32) -> Option<EdgeService> {
    match index {
        SERVICE_NONE => None,
        index => config.service.get(index as usize).copied(),
    }
}

fn connections(maps: &Maps, config: &EdgeConfig, source: Option<IpAddr>) -> Connections {
    let caps = Connections {
        quic_max: config.quic_connections_max,
        tcp_max: config.tcp_connections_max,
        ..Connections::default()
    };
    let Some(source) = source else { return caps };
    let key = *Source::of(source).cap_key().bytes();
    let value = |map: &libbpf_rs::MapHandle| {
        let value = map.lookup(&key, MapFlags::ANY).ok().flatten()?;
        Some(u64::from_le_bytes(value.try_into().ok()?))
    };
    let tcp = value(maps.tcp_sources()).filter(|word| word & TCP_DEAD == 0);
    Connections {
        // `struct edge_count`: the run, then the connections.
        quic: value(maps.quic_sources()).map_or(0, |count| (count >> 32) as u32),
        tcp: tcp.map_or(0, |word| (word & TCP_CONNECTIONS) as u32),
        ..caps
    }
}
