//! The kernel's program and its model in lockstep: one state, one packet at a time, no difference.
#![allow(dead_code, unreachable_pub, reason = "each test takes what it needs")]

use etherparse::{NetSlice, SlicedPacket, TcpOptionElement, TransportSlice};
use libbpf_rs::{MapCore as _, MapFlags};
use millrace_edge::abi::{self, EdgeBucket, EdgeControl, EdgeDecision, EdgeFlow, EdgeMock};
use millrace_edge::load::{LoadOptions, Loaded, Program, Run};
use millrace_edge::metrics::{self, Counters};
use millrace_edge::publish::Publisher;
use millrace_edge_policy::limiter::{Buckets, Purpose, Sketch};
use millrace_edge_policy::model::{Cookie, Count, Environment, Flow, Model};
use millrace_edge_policy::packet::Packet;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{Bounds, Compiled};
use millrace_edge_policy::settings::levels;
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::source::Source;
use millrace_edge_policy::verdict::{Action, Decision};
use std::sync::atomic::Ordering;

use super::frames::{SEQUENCE, hex};
use millrace_testkit::skip;

/// Buckets of one generation of the sketch: few, so that they fill up.
const BUCKETS: usize = 64;
const NODES: u32 = 512;
const RULES: u32 = 64;

/// What a set of rules may take here.
pub const BOUNDS: Bounds = Bounds {
    rules_max: RULES as usize,
    nodes4_max: NODES as usize,
    nodes6_max: NODES as usize,
};

pub struct Lockstep {
    loaded: Loaded,
    /// The state. Written by [`Lockstep::change`] and its like alone.
    pub model: Model,
    /// Packets so far.
    pub packets: u64,
    splits: bool,
}

impl Lockstep {
    /// None where programs cannot be loaded; it says why.
    pub fn load(test: &str) -> Option<Self> {
        if !skip::has_all(test, &millrace_edge::privileges::missing()) {
            return None;
        }
        let options = LoadOptions {
            trie_nodes4: NODES,
            trie_nodes6: NODES,
            limiter_buckets: BUCKETS as u32,
            rules_max: RULES,
            ..LoadOptions::default()
        };
        let loaded = Loaded::load(&options).unwrap_or_else(|error| panic!("{error}"));
        // A test run that changes nothing which is compared.
        let splits = loaded.run_split(Program::EdgeTrace, &[0; 64], 32).is_ok();
        if !splits {
            skip::skip(test, "Linux 6.18 to split frames, and leaves them whole");
        }
        Some(Self {
            loaded,
            model: Model::new(BUCKETS),
            packets: 0,
            splits,
        })
    }

    /// Changes the state of both.
    pub fn change<T>(&mut self, change: impl FnOnce(&mut Model) -> T) -> T {
        let changed = change(&mut self.model);
        self.write_control();
        changed
    }

    /// Puts a set in force for both. One that awaits confirmation is confirmed before.
    pub fn publish(&mut self, set: Compiled) {
        self.change(|model| model.revert_at_ns = 0);
        self.audit_hits();
        Publisher::new(self.loaded.maps())
            .publish(&set, 1, None)
            .unwrap();
        self.change(|model| model.publish(set));
    }

    pub fn peer(&mut self, node: u32, key: Key) {
        let bytes = [key.k0.to_le_bytes(), key.k1.to_le_bytes()].concat();
        let peers = self.loaded.maps().peers();
        peers
            .update(&node.to_le_bytes(), &bytes, MapFlags::ANY)
            .unwrap();
        self.model.peers.insert(node, key);
    }

    pub fn forget_peer(&mut self, node: u32) {
        if self.model.peers.remove(&node).is_some() {
            let peers = self.loaded.maps().peers();
            peers.delete(&node.to_le_bytes()).unwrap();
        }
    }

    pub fn quic_connections(&mut self, source: Source, count: Count) {
        let (key, bytes) = (
            source.cap_key(),
            [count.run.to_le_bytes(), count.connections.to_le_bytes()].concat(),
        );
        let sources = self.loaded.maps().quic_sources();
        sources.update(key.bytes(), &bytes, MapFlags::ANY).unwrap();
        self.model.quic_sources.insert(key, count);
    }

    /// `mark` is the mark of the source that the counting program keeps beside the count.
    pub fn tcp_connections(&mut self, source: Source, connections: u32, mark: u32) {
        let key = source.cap_key();
        let word = u64::from(mark) << 32 | u64::from(connections);
        let sources = self.loaded.maps().tcp_sources();
        sources
            .update(key.bytes(), &word.to_le_bytes(), MapFlags::ANY)
            .unwrap();
        if word & abi::TCP_DEAD == 0 {
            self.model.tcp_sources.insert(key, u64::from(connections));
        } else {
            self.model.tcp_sources.remove(&key);
        }
    }

    /// Charges a source for a TCP connection, as the program does that sees it established.
    pub fn established(&mut self, source: Source, now_ns: u64) {
        let model = &self.model;
        let Some(set) = &model.config[model.active & 1] else {
            return;
        };
        let limits = levels(set.settings.limits.source_tcp);
        let charge = |buckets: &dyn Buckets| {
            let sketch = Sketch {
                buckets,
                seed: model.seed,
                active: model.limiter_active,
                old_until_ns: model.limiter_old_until_ns,
            };
            sketch.charge_source(source, Purpose::Tcp, &limits, now_ns)
        };
        let charged = charge(&self.loaded.maps().limiter);
        assert_eq!(charged, charge(&model.buckets), "a connection of {source}");
    }

    /// This host has sent, and may be answered.
    pub fn reply(&mut self, flow: Flow, sent_ns: u64) {
        let replies = self.loaded.maps().handle("replies");
        replies
            .update(&flow_bytes(&flow), &sent_ns.to_le_bytes(), MapFlags::ANY)
            .unwrap();
        self.model.replies.insert(flow, sent_ns);
    }

    pub fn forget_replies(&mut self) {
        let replies = self.loaded.maps().handle("replies");
        for flow in std::mem::take(&mut self.model.replies).into_keys() {
            replies.delete(&flow_bytes(&flow)).unwrap();
        }
    }

    /// Decides on a frame both ways, and returns how the decisions differ.
    pub fn decide(&mut self, frame: &[u8], environment: Environment) -> Result<Decision, String> {
        self.decide_by(frame, environment, |loaded| {
            loaded.run(Program::EdgeTest, frame, 1)
        })
    }

    /// The same, with at most `linear` bytes of the frame contiguous, if the kernel supports that.
    pub fn decide_split(
        &mut self,
        frame: &[u8],
        linear: usize,
        environment: Environment,
    ) -> Result<Decision, String> {
        if !self.splits {
            return self.decide(frame, environment);
        }
        self.decide_by(frame, environment, |loaded| {
            loaded.run_split(Program::EdgeTest, frame, linear)
        })
    }

    fn decide_by(
        &mut self,
        frame: &[u8],
        environment: Environment,
        run: impl FnOnce(&Loaded) -> Result<Run, libbpf_rs::Error>,
    ) -> Result<Decision, String> {
        let maps = self.loaded.maps();
        let nothing = EdgeDecision {
            reason: u32::MAX,
            ..EdgeDecision::default()
        };
        maps.decision.store(0, &nothing);
        let mock = EdgeMock {
            now_ns: environment.now_ns,
            cookie: sequence_of_cookie(environment.cookie),
            read_only: u32::from(environment.read_only),
            listener_room: u32::from(environment.cookie == Cookie::Room),
            meets_listener: u32::from(environment.meets_listener),
        };
        maps.mock.store(0, &mock);
        let run = run(&self.loaded).map_err(|error| format!("{error} for {}", hex(frame)))?;
        let left = maps.decision.load(0);
        let decision = self.model.decide(frame, environment);
        self.packets += 1;
        let difference = compare(frame, environment, &run, &left, &decision).err();
        match difference {
            None => Ok(decision),
            Some(what) => Err(format!(
                "{what} differs\nkernel: {left:?}, reason {:?}, action {}, stamp {:?}\n  frame {}\nmodel: {decision:?}\nenvironment: {environment:?}\nframe: {}",
                Reason::from_index(left.reason),
                run.action,
                run.stamp,
                hex(&run.frame),
                hex(frame),
            )),
        }
    }

    /// Compares the counters. Each packet added one to one of the model's counters, so it must have
    /// to one of the kernel's.
    pub fn audit_counters(&self) {
        let counters = Counters::read(self.loaded.maps().counters()).unwrap();
        assert_eq!(counters.packets(), self.packets, "a packet is one count");
        for reason in Reason::ALL {
            let found = (counters.acted_on(*reason), counters.counted_as(*reason));
            let [acted, counted] = self.model.counters[reason.index() as usize];
            assert_eq!(
                found,
                (acted, counted),
                "{reason:?}, acted on and only counted"
            );
        }
    }

    /// Compares all that has added up.
    ///
    /// # Panics
    /// When they differ.
    pub fn audit(&self) {
        self.audit_counters();
        self.audit_hits();
        let maps = self.loaded.maps();
        for index in 0..self.model.buckets.count() {
            let words = |bucket: &[std::sync::atomic::AtomicU64; 8]| {
                bucket.each_ref().map(|word| word.load(Ordering::Relaxed))
            };
            assert_eq!(
                words(maps.limiter.bucket(index)),
                words(self.model.buckets.bucket(index)),
                "bucket {index} of the sketch"
            );
        }
        for (index, word) in self.model.budgets.iter().enumerate() {
            let spent = maps.budgets.load(index).word;
            assert_eq!(
                spent,
                [word.load(Ordering::Relaxed), 0, 0, 0, 0, 0, 0, 0],
                "budget {index}"
            );
        }
    }

    fn audit_hits(&self) {
        for generation in 0..abi::GENERATIONS {
            let hits = metrics::hits(self.loaded.maps().hits(), generation as u32, RULES).unwrap();
            for (rule, hits) in (0..).zip(hits) {
                let expected = self.model.hits.get(&(generation, rule)).copied();
                assert_eq!(
                    hits,
                    expected.unwrap_or(0),
                    "hits of rule {rule}, generation {generation}"
                );
            }
        }
    }

    /// Removes every trace of earlier packets, except counters and hits.
    pub fn renew(&mut self) {
        let maps = self.loaded.maps();
        for index in 0..self.model.buckets.count() {
            let buckets = [maps.limiter.bucket(index), self.model.buckets.bucket(index)];
            for word in buckets.into_iter().flatten() {
                word.store(0, Ordering::Relaxed);
            }
        }
        for (index, word) in self.model.budgets.iter().enumerate() {
            word.store(0, Ordering::Relaxed);
            maps.budgets.store(index, &EdgeBucket::default());
        }
        for source in std::mem::take(&mut self.model.quic_sources).into_keys() {
            maps.quic_sources().delete(source.bytes()).unwrap();
        }
        let counted: Vec<Vec<u8>> = maps.tcp_sources().keys().collect();
        for source in counted {
            maps.tcp_sources().delete(&source).unwrap();
        }
        self.model.tcp_sources.clear();
        self.forget_replies();
    }

    /// Clears the idle generation of the sketch, and makes it active with a new seed.
    pub fn turn_sketch(&mut self, seed: Key, old_until_ns: u64) {
        let idle = self.model.limiter_active ^ 1;
        let half = self.model.buckets.count() / 2;
        for index in idle * half..(idle + 1) * half {
            let buckets = [
                self.loaded.maps().limiter.bucket(index),
                self.model.buckets.bucket(index),
            ];
            for word in buckets.into_iter().flatten() {
                word.store(0, Ordering::Relaxed);
            }
        }
        self.change(|model| {
            model.seed[idle] = seed;
            model.limiter_active = idle;
            model.limiter_old_until_ns = old_until_ns;
        });
    }

    fn write_control(&self) {
        let control = &self.loaded.maps().control;
        let model = &self.model;
        let value = EdgeControl {
            layout: abi::LAYOUT,
            active: model.active as u32,
            revert_at_ns: model.revert_at_ns,
            lease_until_ns: model.lease_until_ns,
            stress: model.stress,
            run: model.run,
            wall_offset_ns: model.wall_offset_ns,
            seed: model.seed.map(Into::into),
            limiter_active: model.limiter_active as u32,
            key_active: u32::from(model.keys.active),
            limiter_old_until_ns: model.limiter_old_until_ns,
            cookies_watched_until_ns: model.cookies_watched_until_ns,
            keys: model.keys.keys.map(Into::into),
            ..control.load(0)
        };
        control.store(0, &value);
    }
}

fn flow_bytes(flow: &Flow) -> Vec<u8> {
    let flow = EdgeFlow {
        remote: *flow.remote.bytes(),
        remote_port: flow.remote_port,
        port: flow.port,
        protocol: flow.protocol as u8,
        pad: [0; 3],
    };
    let mut bytes = flow.remote.to_vec();
    bytes.extend(flow.remote_port.to_le_bytes());
    bytes.extend(flow.port.to_le_bytes());
    bytes.push(flow.protocol);
    bytes.extend(flow.pad);
    bytes
}

/// `enum xdp_action`.
fn xdp_action(action: Action) -> u32 {
    match action {
        Action::Drop => 1,
        Action::Pass => 2,
        Action::Transmit => 3,
    }
}

/// Says what differs.
fn compare(
    frame: &[u8],
    environment: Environment,
    run: &Run,
    left: &EdgeDecision,
    decision: &Decision,
) -> Result<(), &'static str> {
    let same = |equal: bool, what| if equal { Ok(()) } else { Err(what) };
    let reason = decision.reason;
    same(left.reason == reason.index(), "reason")?;
    same(
        left.action == xdp_action(reason.action()),
        "action of the reason",
    )?;
    same(run.action == xdp_action(decision.action), "action")?;
    let rule = decision.rule.map_or(abi::RULE_DEFAULT, u32::from);
    same(left.rule == rule, "rule")?;
    let service = decision.service.map_or(abi::SERVICE_NONE, u32::from);
    same(left.service == service, "service")?;
    same(left.stress == decision.stress, "stress")?;
    same(
        left.generation as usize == decision.generation,
        "generation",
    )?;
    same(left.now_ns == environment.now_ns, "clock")?;
    same(
        run.stamp == decision.stamp.map(|stamp| stamp as u32),
        "stamp",
    )?;
    match (decision.action, &decision.frame) {
        (Action::Transmit, Some(answer)) => same(run.frame == *answer, "Retry"),
        (Action::Transmit, None) => {
            syn_ack(frame, &run.frame, sequence_of_cookie(environment.cookie))
        }
        _ => same(run.frame == frame, "frame"),
    }
}

/// 0: there is none.
fn sequence_of_cookie(cookie: Cookie) -> u32 {
    match cookie {
        Cookie::Given(sequence) => sequence,
        Cookie::None | Cookie::Room => 0,
    }
}

/// The model does not build frames of cookies: another library reads the kernel's.
fn syn_ack(frame: &[u8], answer: &[u8], cookie: u32) -> Result<(), &'static str> {
    let same = |equal: bool, what| if equal { Ok(()) } else { Err(what) };
    let asked = Packet::parse(frame).map_err(|_| "SYN")?;
    let given = Packet::parse(answer).map_err(|_| "SYN-ACK")?;
    same(given.source == asked.destination, "source of the SYN-ACK")?;
    same(
        given.destination == asked.source,
        "destination of the SYN-ACK",
    )?;
    same(given.link[..6] == asked.link[6..12], "link of the SYN-ACK")?;
    same(given.link[6..12] == asked.link[..6], "link of the SYN-ACK")?;
    same(given.link[12..] == asked.link[12..], "tags of the SYN-ACK")?;
    let sliced = SlicedPacket::from_ethernet(answer).map_err(|_| "SYN-ACK")?;
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else {
        return Err("SYN-ACK without TCP");
    };
    let ports = (tcp.source_port(), tcp.destination_port());
    same(
        ports == (asked.destination_port, asked.source_port),
        "ports of the SYN-ACK",
    )?;
    same(tcp.sequence_number() == cookie, "cookie")?;
    let acknowledged = sequence_of(&asked).wrapping_add(1);
    same(
        tcp.acknowledgment_number() == acknowledged,
        "acknowledgment",
    )?;
    let flags = tcp.syn() && tcp.ack() && !tcp.rst() && !tcp.fin();
    same(flags, "flags of the SYN-ACK")?;
    let mut options = tcp.options_iterator();
    let mss = TcpOptionElement::MaximumSegmentSize(abi::MOCK_MSS);
    same(options.next() == Some(Ok(mss)), "largest segment")?;
    let header = tcp.to_header();
    let checksum = match sliced.net {
        Some(NetSlice::Ipv4(ip)) => {
            let ip = ip.header().to_header();
            same(
                ip.header_checksum == ip.calc_header_checksum(),
                "checksum of IPv4",
            )?;
            header.calc_checksum_ipv4(&ip, tcp.payload())
        }
        Some(NetSlice::Ipv6(ip)) => {
            header.calc_checksum_ipv6(&ip.header().to_header(), tcp.payload())
        }
        _ => return Err("SYN-ACK without IP"),
    };
    same(checksum == Ok(header.checksum), "checksum of TCP")
}

fn sequence_of(packet: &Packet<'_>) -> u32 {
    let bytes = packet.segment[4..8].try_into();
    bytes.map_or(SEQUENCE, u32::from_be_bytes)
}
