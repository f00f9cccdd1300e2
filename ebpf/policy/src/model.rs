//! The whole program of the kernel, in plain Rust: from the same packets and the same state it
//! makes the same decisions.
//!
//! It is a specification that runs: a test sends each frame through the program too, and no
//! decision may differ. It is not made to be fast.
//!
//! 1. No frame makes it panic, and each raises exactly one counter by one.
//! 2. Time and the kernel's cookies are arguments; all other state is in the fields.
//! 3. A generation that was never published owns no port.

use crate::cid::Keys;
use crate::limiter::{Buckets, OwnedBuckets, Sketch, charge_word};
use crate::packet::{Packet, Protocol, Quic, Transport};
use crate::reason::Reason;
use crate::rules::{Compiled, Roots, RuleAction};
use crate::settings::{BUDGETS, Budget, Kind, Mode, Scope};
use crate::siphash::Key;
use crate::source::Source;
use crate::trie::{Leaf, RULE_DEFAULT};
use crate::verdict::{Action, Decision, Stamp};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};

mod admit;
#[cfg(test)]
mod tests;

/// Highest stress: only registry peers open connections (`EDGE_STRESS_PEERS`).
pub const STRESS_PEERS: u32 = 2;

/// How long UDP may answer what this host sent (`EDGE_REPLY_UDP_NS`), in nanoseconds.
pub const REPLY_UDP_NS: u64 = 180_000_000_000;
/// How long TCP may (`EDGE_REPLY_TCP_NS`), in nanoseconds.
pub const REPLY_TCP_NS: u64 = 7_440_000_000_000;

/// The inputs of a decision besides the packet and the model's own state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// CLOCK_MONOTONIC, in nanoseconds.
    pub now_ns: u64,
    /// The kernel's answer to a request for a SYN cookie.
    pub cookie: Cookie,
    /// No connection takes the segment, but a listener does: it can only end a handshake by a
    /// cookie.
    pub meets_listener: bool,
    /// The program looks at limits and does not charge them.
    pub read_only: bool,
}

/// The kernel's answer to a request for a SYN cookie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cookie {
    /// None: no socket listens, `net.ipv4.tcp_syncookies` is 0, or the accept queue is full.
    #[default]
    None,
    /// None yet: the listener's request queue has room for the SYN, and the kernel gives cookies
    /// once it is full (`tcp_syncookies` is 1).
    Room,
    /// A cookie: its sequence number, which is not 0.
    Given(u32),
}

/// A flow that this host sent, seen from the answer (`struct edge_flow`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// Sender of the answer.
    pub remote: Source,
    /// Port of the sender.
    pub remote_port: u16,
    /// Port of this host.
    pub port: u16,
    /// UDP or TCP.
    pub protocol: Protocol,
}

/// QUIC connections of a source, as one run of the node counted them (`struct edge_count`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// The run of the node.
    pub run: u32,
    /// Established connections.
    pub connections: u32,
}

/// The kernel's maps, and the program that uses them.
#[derive(Debug)]
pub struct Model {
    /// The compiled settings and rules of both generations.
    pub config: [Option<Compiled>; 2],
    /// Generation in force.
    pub active: usize,
    /// When the other generation comes into force again, in nanoseconds of CLOCK_MONOTONIC; 0:
    /// never.
    pub revert_at_ns: u64,
    /// Until when stress and QUIC counts are valid, in nanoseconds of CLOCK_MONOTONIC.
    pub lease_until_ns: u64,
    /// Level of stress: 0, 1 or 2.
    pub stress: u32,
    /// The run of the node whose counts are valid.
    pub run: u32,
    /// Nanoseconds that wall time is ahead of CLOCK_MONOTONIC; wraps.
    pub wall_offset_ns: u64,
    /// Keys of connection IDs and tokens.
    pub keys: Keys,
    /// Seeds of the sketch.
    pub seed: [Key; 2],
    /// Generation of the sketch that is charged.
    pub limiter_active: usize,
    /// Until when the other generation counts as well, in nanoseconds of CLOCK_MONOTONIC.
    pub limiter_old_until_ns: u64,
    /// Buckets of the sketch, both generations.
    pub buckets: OwnedBuckets,
    /// Global budgets, by [`Budget`].
    pub budgets: [AtomicU64; BUDGETS],
    /// Keys of registry peers, by node tag.
    pub peers: BTreeMap<u32, Key>,
    /// QUIC connections, by [`Source::cap_key`].
    pub quic_sources: BTreeMap<Source, Count>,
    /// TCP connections, by [`Source::cap_key`].
    pub tcp_sources: BTreeMap<Source, u64>,
    /// Until when the program checks segments that may end a handshake by a cookie: a source opened
    /// connections beyond its rate or cap.
    pub cookies_watched_until_ns: u64,
    /// With scope `host`: flows that this host sent, and the time of the last packet of each.
    pub replies: BTreeMap<Flow, u64>,
    /// Packets by reason: in the first column those acted upon, in the second those only counted.
    pub counters: [[u64; 2]; Reason::ALL.len()],
    /// Packets that a rule decided, by generation and rule number.
    pub hits: BTreeMap<(usize, u16), u64>,
}

/// A packet for a declared port, while it is decided.
struct Case<'m> {
    model: &'m Model,
    compiled: &'m Compiled,
    environment: Environment,
    rule: Option<u16>,
    answer: Option<Vec<u8>>,
}

/// The state of a packet when its reason is known.
struct Verdict {
    reason: Reason,
    ours: bool,
    service: Option<u8>,
    rule: Option<u16>,
    answer: Option<Vec<u8>>,
}

impl Model {
    /// A model in which nothing was published yet. `limiter_buckets` is the number of buckets in
    /// each generation of the sketch, rounded up to a power of two.
    pub fn new(limiter_buckets: usize) -> Self {
        Self {
            config: [None, None],
            active: 0,
            revert_at_ns: 0,
            lease_until_ns: 0,
            stress: 0,
            run: 0,
            wall_offset_ns: 0,
            keys: Keys {
                keys: [Key::default(); 4],
                active: 0,
            },
            seed: [Key::default(); 2],
            limiter_active: 0,
            limiter_old_until_ns: 0,
            buckets: OwnedBuckets::new(limiter_buckets),
            budgets: Default::default(),
            peers: BTreeMap::new(),
            quic_sources: BTreeMap::new(),
            tcp_sources: BTreeMap::new(),
            cookies_watched_until_ns: 0,
            replies: BTreeMap::new(),
            counters: [[0; 2]; Reason::ALL.len()],
            hits: BTreeMap::new(),
        }
    }

    /// Writes a set to the idle generation and puts it in force. Its rules have no hits yet.
    pub fn publish(&mut self, compiled: Compiled) {
        let idle = self.active ^ 1;
        self.config[idle] = Some(compiled);
        self.hits.retain(|(generation, _), _| *generation != idle);
        self.active = idle;
        self.revert_at_ns = 0;
    }

    /// Decides on a frame, charges its limits and counts it.
    pub fn decide(&mut self, frame: &[u8], environment: Environment) -> Decision {
        let generation = self.generation(environment.now_ns);
        let verdict = self.verdict(frame, generation, environment);
        let Verdict {
            reason,
            ours,
            service,
            rule,
            answer,
        } = verdict;
        let enforce = self.mode(generation) == Mode::Enforce;
        let passes = reason.action() == Action::Pass && reason != Reason::PassReject;
        let counted = !enforce && !passes;
        let action = if enforce {
            reason.action()
        } else {
            Action::Pass
        };
        let stamp = match reason {
            Reason::PassReject if enforce => Stamp::Reject,
            _ => Stamp::Pass,
        };
        self.counters[reason.index() as usize][usize::from(counted)] += 1;
        if let Some(rule) = rule {
            *self.hits.entry((generation, rule)).or_default() += 1;
        }
        Decision {
            reason,
            action,
            counted,
            rule,
            service,
            stamp: (ours && action == Action::Pass).then_some(stamp),
            frame: answer,
            stress: self.stress(environment.now_ns),
            generation,
        }
    }

    /// The level of stress in force: 0 once the lease has ended.
    pub fn stress(&self, now_ns: u64) -> u32 {
        if now_ns < self.lease_until_ns {
            self.stress
        } else {
            0
        }
    }

    fn generation(&self, now_ns: u64) -> usize {
        let reverted = self.revert_at_ns != 0 && now_ns >= self.revert_at_ns;
        self.active & 1 ^ usize::from(reverted)
    }

    fn mode(&self, generation: usize) -> Mode {
        let config = self.config[generation].as_ref();
        config.map_or(Mode::Count, |compiled| compiled.settings.mode)
    }

    /// Reads the frame up to its service, and decides if there is one.
    fn verdict(&self, frame: &[u8], generation: usize, environment: Environment) -> Verdict {
        let not_ours = |reason| Verdict {
            reason,
            ours: false,
            service: None,
            rule: None,
            answer: None,
        };
        let packet = match Packet::parse(frame) {
            Ok(packet) => packet,
            Err(reason) => return not_ours(reason),
        };
        let Some(compiled) = &self.config[generation] else {
            return not_ours(Reason::PassOther);
        };
        let settings = &compiled.settings;
        let service = settings.service(packet.protocol, packet.destination_port);
        if service.is_none() && settings.scope == Scope::Ports {
            return not_ours(Reason::PassOther);
        }
        let mut case = Case {
            model: self,
            compiled,
            environment,
            rule: None,
            answer: None,
        };
        // Both arms carry a reason: `?` ends at the first that decides.
        let (Ok(reason) | Err(reason)) = match service {
            Some(service) => case.of_service(&packet, service),
            None => case.of_host(&packet),
        };
        if reason == Reason::PassReply {
            return not_ours(reason);
        }
        Verdict {
            reason,
            ours: true,
            service: service.map(|index| index as u8),
            rule: case.rule,
            answer: case.answer,
        }
    }

    fn sketch(&self) -> Sketch<'_, impl Buckets + use<>> {
        Sketch {
            buckets: &self.buckets,
            seed: self.seed,
            active: self.limiter_active,
            old_until_ns: self.limiter_old_until_ns,
        }
    }
}

impl Flow {
    /// The flow that this packet answers, if there is one.
    pub fn answered_by(packet: &Packet<'_>) -> Self {
        Self {
            remote: Source::of(packet.source),
            remote_port: packet.source_port,
            port: packet.destination_port,
            protocol: packet.protocol,
        }
    }
}

impl Case<'_> {
    fn of_service(&mut self, packet: &Packet<'_>, service: usize) -> Result<Reason, Reason> {
        packet.refuse_fragments_and_options()?;
        let transport = packet.transport()?;
        let kind = self.compiled.settings.services[service].kind;
        let roots = self.compiled.services[service];
        match (kind, transport) {
            (Kind::Quic, Transport::Udp(payload)) => {
                let quic = Quic::parse(payload)?;
                self.firewall(packet.source, roots)?;
                self.admit_quic(packet, quic)
            }
            (Kind::Tcp, Transport::Tcp(flags)) => {
                self.firewall(packet.source, roots)?;
                self.admit_tcp(packet, flags)
            }
            (Kind::Udp, Transport::Udp(_)) => {
                self.firewall(packet.source, roots)?;
                Ok(Reason::PassUdp)
            }
            // A service is found by its protocol, so the packet cannot be for this one.
            _ => Err(Reason::Internal),
        }
    }

    fn of_host(&mut self, packet: &Packet<'_>) -> Result<Reason, Reason> {
        let answers = self.answers(packet);
        if !answers {
            packet.refuse_fragments_and_options()?;
        }
        match self.firewall(packet.source, self.compiled.host) {
            Err(Reason::FirewallDefault) if answers => Ok(Reason::PassReply),
            allowed => allowed.map(|()| Reason::PassHost),
        }
    }

    /// Whether this host sent a packet, recently enough, that this packet answers.
    fn answers(&self, packet: &Packet<'_>) -> bool {
        let lives_ns = match packet.protocol {
            Protocol::Udp => REPLY_UDP_NS,
            Protocol::Tcp => REPLY_TCP_NS,
        };
        let sent_ns = self.model.replies.get(&Flow::answered_by(packet));
        sent_ns.is_some_and(|sent_ns| {
            self.environment.now_ns.wrapping_sub(*sent_ns) as i64 <= lives_ns as i64
        })
    }

    /// Section 3 of the specification.
    fn firewall(&mut self, source: IpAddr, roots: Roots) -> Result<(), Reason> {
        let leaf = match source {
            IpAddr::V4(v4) => self.compiled.trie4.lookup(roots.root4, &v4.octets()),
            IpAddr::V6(v6) => self.compiled.trie6.lookup(roots.root6, &v6.octets()),
        };
        let Leaf { action, rule } = leaf.ok_or(Reason::Internal)?;
        self.rule = (rule != RULE_DEFAULT).then_some(rule);
        match action {
            RuleAction::Allow => Ok(()),
            RuleAction::Deny if self.rule.is_some() => Err(Reason::FirewallDeny),
            RuleAction::Deny => Err(Reason::FirewallDefault),
            RuleAction::Reject if self.charge_budget(Budget::Reject) => Err(Reason::PassReject),
            RuleAction::Reject => Err(Reason::FirewallRejectBudget),
        }
    }

    fn charge_budget(&self, budget: Budget) -> bool {
        let limit = self.compiled.settings.limits.budgets()[budget as usize];
        let word = &self.model.budgets[budget as usize];
        if self.environment.read_only {
            let copy = AtomicU64::new(word.load(Ordering::Relaxed));
            return charge_word(&copy, limit, self.environment.now_ns);
        }
        charge_word(word, limit, self.environment.now_ns)
    }

    fn stress(&self) -> u32 {
        self.model.stress(self.environment.now_ns)
    }
}
