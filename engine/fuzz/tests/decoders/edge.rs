//! Frames as the edge reads them, and what it decides on them.

use std::net::IpAddr;
use std::sync::LazyLock;
use std::time::Duration;

use etherparse::PacketBuilder;
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::model::{Cookie, Environment, Model};
use millrace_edge_policy::packet::{Packet, Quic, Transport};
use millrace_edge_policy::rules::{Bounds, Compiled, Locality, RuleSet, compile, in_order};
use millrace_edge_policy::settings::{
    Caps, DefaultAction, Kind, Limits, Mode, Scope, Service, Settings,
};
use millrace_edge_policy::verdict::Action;
use millrace_fuzz::{Seed, target};

use crate::first_packet::{NOW_NS, PEER, WALL_NS, client, keys, payloads};
use crate::{assert_label, key, refused};

const QUIC: u16 = 4_100;
const TCP: u16 = 8_080;

const HOST6: [u8; 16] = [0xfd; 16];
const CLIENT6: [u8; 16] = [0x20; 16];

fn ethernet() -> etherparse::PacketBuilderStep<etherparse::Ethernet2Header> {
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
}

fn ipv4() -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    let IpAddr::V4(from) = client().ip() else {
        unreachable!("the client of the seeds has IPv4");
    };
    ethernet().ipv4(from.octets(), [198, 51, 100, 1], 64)
}

fn udp(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = ipv4().udp(client().port(), QUIC);
    builder.write(&mut frame, payload).unwrap();
    frame
}

fn seeds() -> Vec<Seed> {
    let mut seeds: Vec<Seed> = payloads()
        .into_iter()
        .map(|seed| Seed::new(seed.name, udp(&seed.bytes)))
        .collect();
    let initial = &payloads()[0].bytes;
    let mut add = |name, write: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = Vec::new();
        write(&mut frame);
        seeds.push(Seed::new(name, frame));
    };
    add("tcp-syn", &|frame| {
        let builder = ipv4().tcp(40_000, TCP, 1, 64_000).syn();
        builder.write(frame, &[]).unwrap();
    });
    add("tcp-ack", &|frame| {
        let builder = ipv4().tcp(40_000, TCP, 1, 64_000).ack(1);
        builder.write(frame, b"data").unwrap();
    });
    add("ipv6", &|frame| {
        let builder = ethernet().ipv6(CLIENT6, HOST6, 64).udp(40_000, QUIC);
        builder.write(frame, initial).unwrap();
    });
    add("two-tags", &|frame| {
        let builder = ethernet()
            .double_vlan(1.try_into().unwrap(), 2.try_into().unwrap())
            .ipv6(CLIENT6, HOST6, 64);
        builder.udp(40_000, QUIC).write(frame, initial).unwrap();
    });
    add("extensions", &|frame| {
        let builder = ethernet().ipv6(CLIENT6, HOST6, 64).udp(40_000, QUIC);
        builder.write(frame, initial).unwrap();
        // Hop-by-hop, destination and fragment headers of eight bytes between IP and UDP.
        let chain = [
            [60, 0, 1, 4, 0, 0, 0, 0],
            [44, 0, 1, 4, 0, 0, 0, 0],
            [17, 0, 0, 0, 0, 0, 0, 7],
        ];
        frame[14 + 6] = 0;
        frame[14 + 5] += chain.as_flattened().len() as u8;
        frame.splice(14 + 40..14 + 40, chain.as_flattened().iter().copied());
    });
    seeds
}

target!(
    /// Protects the edge's view: what it reads of a frame lies in the frame, and nothing behind the
    /// IP packet counts.
    packet, seeds, |bytes| {
        let packet = match Packet::parse(bytes) {
            Ok(packet) => packet,
            Err(reason) => return refused(reason.label()),
        };
        assert!(bytes.starts_with(packet.link));
        assert!(packet.link.len() + packet.segment.len() < bytes.len());
        let ports = [packet.source_port, packet.destination_port].map(u16::to_be_bytes);
        assert!(packet.segment.starts_with(ports.as_flattened()));
        let padded = [bytes, &[0xff; 9]].concat();
        assert_eq!(Packet::parse(&padded), Ok(packet));
        let refusals = [
            packet.refuse_martians(),
            packet.refuse_fragments_and_options(),
        ];
        for reason in refusals.into_iter().filter_map(Result::err) {
            assert_label(reason.label());
        }
        match packet.transport() {
            Ok(Transport::Udp(payload)) => {
                assert!(payload.len() + 8 <= packet.segment.len());
                if let Err(reason) = Quic::parse(payload) {
                    assert_label(reason.label());
                }
            }
            Ok(Transport::Tcp(flags)) => assert!(!(flags.opens() && flags.goes_on())),
            Err(reason) => return refused(reason.label()),
        }
        true
    }
);

/// One service of each kind of packet; the client of the seeds is allowed.
fn compiled(scope: Scope) -> Compiled {
    let once = Limit::per(1, Duration::from_secs(3_600), 1);
    let service = |port, kind| Service {
        port,
        kind,
        default_action: DefaultAction::Deny,
    };
    let settings = Settings {
        mode: Mode::Enforce,
        scope,
        services: vec![service(QUIC, Kind::Quic), service(TCP, Kind::Tcp)],
        host_default: DefaultAction::Deny,
        limits: Limits {
            unvalidated: once,
            syn: once,
            ..Limits::default()
        },
        caps: Caps::default(),
    };
    let rule = r#"
        scope = "global"
        prefixes = ["192.0.2.0/24", "2000::/3"]
        action = "allow"
    "#;
    let set = RuleSet::read(1, &[rule.parse().unwrap()]).unwrap();
    let bounds = Bounds {
        rules_max: 16,
        nodes4_max: 64,
        nodes6_max: 64,
    };
    let rules = in_order(&[], [], &set, &Locality::default(), 0);
    compile(&settings, &rules, bounds).unwrap()
}

static COMPILED: LazyLock<[Compiled; 2]> =
    LazyLock::new(|| [Scope::Ports, Scope::Host].map(compiled));

fn model(compiled: &Compiled, stress: u32) -> Model {
    let mut model = Model::new(4);
    model.publish(compiled.clone());
    model.keys = keys();
    model.lease_until_ns = u64::MAX;
    model.wall_offset_ns = WALL_NS - NOW_NS;
    model.peers.insert(PEER, key(9));
    model.stress = stress;
    model
}

/// Frames that the edge drops: those whose payload is no packet of ours, and one of a connection
/// that is not there.
const DROPPED: [&str; 3] = ["zero-rtt", "long-id", "version-negotiation"];

fn decided() -> Vec<Seed> {
    let mut seeds = seeds();
    for seed in &mut seeds {
        seed.is_accepted = !DROPPED.contains(&seed.name);
    }
    seeds
}

target!(
    /// Protects the node and others from its edge: each frame has one reason, a trace says the
    /// same as the packet meets, and no answer is longer than what it answers.
    edge_decision, decided, |bytes| {
        let environment = Environment {
            now_ns: NOW_NS,
            cookie: Cookie::Given(7),
            ..Environment::default()
        };
        let traced = Environment {
            read_only: true,
            ..environment
        };
        let mut passes = false;
        for compiled in &*COMPILED {
            for stress in [0, 1, 2] {
                let mut model = model(compiled, stress);
                // The second time some budget is spent.
                for times in 1..=2 {
                    let foreseen = model.decide(bytes, traced).reason;
                    let decision = model.decide(bytes, environment);
                    assert_eq!(decision.reason, foreseen);
                    let counted: u64 = model.counters.as_flattened().iter().sum();
                    assert_eq!(counted, 2 * times);
                    passes |= decision.action != Action::Drop;
                    if let Some(answer) = &decision.frame {
                        assert_eq!(decision.action, Action::Transmit);
                        assert!(answer.len() < bytes.len(), "an answer amplifies");
                        let answer = Packet::parse(answer).unwrap();
                        let asked = Packet::parse(bytes).unwrap();
                        assert_eq!(answer.destination, asked.source);
                        assert_eq!(answer.destination_port, asked.source_port);
                    }
                }
            }
        }
        passes
    }
);
