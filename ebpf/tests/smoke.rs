//! Every program loads, and decides on a few packets of each kind as specified. The exhaustive test
//! is `model.rs`.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::mem::offset_of;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::PacketBuilder;
use libbpf_rs::{MapCore as _, MapFlags};
use millrace_edge::abi::{
    self, EdgeConfig, EdgeControl, EdgeCounters, EdgeDecision, EdgeKey, EdgeLimit, EdgeMock,
    EdgeNode, EdgeSampling, EdgeService,
};
use millrace_edge::load::{LoadOptions, Loaded, Program, Run};
use millrace_edge::privileges::missing;
use millrace_edge::steer::Steering;
use millrace_edge_policy::cid::{Keys, LocalCid, Place};
use millrace_edge_policy::limiter::{Limit, Purpose, Sketch};
use millrace_edge_policy::packet::Packet;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::source::Source;
use millrace_edge_policy::{proof, retry, token};
use millrace_testkit::skip;

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;

const QUIC_PORT: u16 = 4100;
const TCP_PORT: u16 = 8080;
const UDP_PORT: u16 = 5300;
/// Far from zero, in the middle of an epoch of each kind.
const NOW_NS: u64 = (5 << 42) + (7 << 34) + (1 << 33);
const COOKIE: u32 = 0x1234_5678;
/// By the first byte of the source: rule 0 allows 10, rule 1 denies 11, rule 2 rejects 12; rule 0
/// also allows IPv6 2000::/8.
const ALLOWED: &str = "10.1.2.3";
const ALLOWED6: &str = "2001:db8:1:2::7";
const LOCAL: &str = "192.0.2.1";
const LOCAL6: &str = "2001:db8:ffff::1";
const BUCKETS: u32 = 1 << 10;

const KIND_QUIC: u8 = 1;
const KIND_TCP: u8 = 2;
const KIND_UDP: u8 = 3;
const UNLIMITED: EdgeLimit = EdgeLimit {
    interval_ns: 0,
    tolerance_ns: 0,
};
/// One each hour, and one at once.
const ONE: EdgeLimit = EdgeLimit {
    interval_ns: 3_600_000_000_000,
    tolerance_ns: 0,
};

fn keys() -> Keys {
    let key = |n: u64| Key {
        k0: 0x0101 * n,
        k1: !n,
    };
    Keys {
        keys: [key(1), key(2), key(3), key(4)],
        active: 2,
    }
}

fn config() -> EdgeConfig {
    let service = |port, protocol, kind| EdgeService {
        port,
        protocol,
        kind,
        ..Default::default()
    };
    let mut config = EdgeConfig {
        mode: abi::MODE_ENFORCE,
        services: 3,
        ..Default::default()
    };
    config.service[0] = service(QUIC_PORT, 17, KIND_QUIC);
    config.service[1] = service(TCP_PORT, 6, KIND_TCP);
    config.service[2] = service(UDP_PORT, 17, KIND_UDP);
    config
}

fn leaf(action: u32, rule: u32) -> u32 {
    abi::LEAF | action << 16 | rule
}

/// The programs, with the rules above. None without the privileges or the kernel for it.
struct Edge {
    loaded: Loaded,
}

impl Edge {
    fn load() -> Option<Self> {
        if !skip::has_all("smoke", &missing()) {
            return None;
        }
        let options = LoadOptions {
            limiter_buckets: BUCKETS,
            ..LoadOptions::default()
        };
        let loaded = match Loaded::load(&options) {
            Ok(loaded) => loaded,
            Err(error) => panic!("{error}"),
        };
        let edge = Self { loaded };
        edge.publish(&config());
        Some(edge)
    }

    fn publish(&self, config: &EdgeConfig) {
        let maps = self.loaded.maps();
        let key = |key: Key| EdgeKey::from(key);
        let mut control = EdgeControl {
            layout: abi::LAYOUT,
            run: 1,
            ..Default::default()
        };
        control.keys = keys().keys.map(key);
        control.key_active = u32::from(keys().active);
        control.seed = [EdgeKey { k0: 1, k1: 2 }, EdgeKey { k0: 3, k1: 4 }];
        control.lease_until_ns = NOW_NS * 2;
        control.config = [*config; 2];
        maps.control.store(0, &control);
        maps.set_port(0, false, QUIC_PORT, Some(0));
        maps.set_port(0, true, TCP_PORT, Some(1));
        maps.set_port(0, false, UDP_PORT, Some(2));
        let mut node = EdgeNode {
            entry: [leaf(1, abi::RULE_DEFAULT); 256],
        };
        node.entry[0x0a] = leaf(0, 0);
        node.entry[0x0b] = leaf(1, 1);
        node.entry[0x0c] = leaf(2, 2);
        node.entry[0x20] = leaf(0, 0);
        maps.trie4.store(0, &node);
        maps.trie6.store(0, &node);
    }

    fn stress(&self, stress: u32) {
        let control = &self.loaded.maps().control;
        control.store_part(0, offset_of!(EdgeControl, stress), &stress);
    }

    fn run(&self, program: Program, frame: &[u8]) -> (Reason, EdgeDecision, Run) {
        let maps = self.loaded.maps();
        maps.mock.store(
            0,
            &EdgeMock {
                now_ns: NOW_NS,
                cookie: COOKIE,
                ..EdgeMock::default()
            },
        );
        let run = self.loaded.run(program, frame, 1).unwrap();
        let decision = maps.decision.load(0);
        (Reason::from_index(decision.reason).unwrap(), decision, run)
    }

    fn reason(&self, frame: &[u8]) -> Reason {
        self.run(Program::EdgeTest, frame).0
    }

    fn counters(&self) -> EdgeCounters {
        let mut sum = EdgeCounters {
            acted: [0; abi::REASONS],
            counted: [0; abi::REASONS],
            sampled: 0,
        };
        let counters = self.loaded.maps().counters();
        let values = counters
            .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)
            .unwrap()
            .unwrap();
        for value in values {
            let words = value
                .chunks_exact(8)
                .map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
            for (to, from) in sum.acted.iter_mut().chain(&mut sum.counted).zip(words) {
                *to += from;
            }
        }
        sum
    }
}

fn udp_from(source: &str, port: u16, payload: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let builder = match (
        source.parse().unwrap(),
        LOCAL.parse().unwrap(),
        LOCAL6.parse().unwrap(),
    ) {
        (IpAddr::V4(from), IpAddr::V4(to), _) => ethernet.ipv4(from.octets(), to.octets(), 9),
        (IpAddr::V6(from), _, IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 9),
        _ => unreachable!(),
    };
    let builder = builder.udp(40_000, port);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).unwrap();
    frame
}

fn quic(payload: &[u8]) -> Vec<u8> {
    udp_from(ALLOWED, QUIC_PORT, payload)
}

fn syn_from(source: &str) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let builder = match (
        source.parse().unwrap(),
        LOCAL.parse().unwrap(),
        LOCAL6.parse().unwrap(),
    ) {
        (IpAddr::V4(from), IpAddr::V4(to), _) => ethernet.ipv4(from.octets(), to.octets(), 9),
        (IpAddr::V6(from), _, IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 9),
        _ => unreachable!(),
    };
    let builder = builder.tcp(40_000, TCP_PORT, 77, 64_000).syn();
    let mut frame = Vec::with_capacity(builder.size(0));
    builder.write(&mut frame, &[]).unwrap();
    frame
}

/// An Initial of 1,200 bytes.
fn initial(id: &[u8], source_id: &[u8], token: &[u8]) -> Vec<u8> {
    let mut payload = vec![0xc0, 0, 0, 0, 1, id.len() as u8];
    payload.extend(id);
    payload.push(source_id.len() as u8);
    payload.extend(source_id);
    payload.push(token.len() as u8);
    payload.extend(token);
    payload.resize(1_200, 0xaa);
    payload
}

fn client(source: &str) -> SocketAddr {
    SocketAddr::new(source.parse().unwrap(), 40_000)
}

#[test]
fn every_program_loads() {
    if Edge::load().is_none() {
        return;
    }
    if let Err(error) = Steering::load(4) {
        panic!("{error}");
    }
}

#[test]
fn what_needs_no_table_is_decided_without() {
    let Some(edge) = Edge::load() else { return };
    let mut options = udp_from(ALLOWED, UDP_PORT, b"x");
    options[14] = 0x46;
    options[17] += 4;
    options.splice(34..34, [1; 4]);
    let mut short = udp_from(ALLOWED, UDP_PORT, b"x");
    short.truncate(40);
    let table: [(&str, Vec<u8>, Reason, u32); 12] = [
        ("ARP", vec![0xff; 60], Reason::PassOther, XDP_PASS),
        (
            "another port",
            udp_from(ALLOWED, 53, b"x"),
            Reason::PassOther,
            XDP_PASS,
        ),
        ("past the frame", short, Reason::MalformedIp, XDP_DROP),
        ("options", options, Reason::Options, XDP_DROP),
        ("no payload", quic(&[]), Reason::QuicMalformed, XDP_DROP),
        (
            "fixed bit",
            quic(&[0x3f; 30]),
            Reason::QuicFixedBit,
            XDP_DROP,
        ),
        (
            "ID too long",
            quic(&[0xc0, 0, 0, 0, 1, 21, 0]),
            Reason::QuicIdLength,
            XDP_DROP,
        ),
        (
            "0-RTT",
            quic(&[0xd0, 0, 0, 0, 1, 0, 0]),
            Reason::QuicZeroRtt,
            XDP_DROP,
        ),
        (
            "foreign ID",
            quic(&[0x40; 30]),
            Reason::QuicUnknownId,
            XDP_DROP,
        ),
        (
            "short",
            quic(&initial(&[1; 8], &[], &[])[..1_199]),
            Reason::QuicShortInitial,
            XDP_DROP,
        ),
        (
            "UDP",
            udp_from(ALLOWED, UDP_PORT, b"x"),
            Reason::PassUdp,
            XDP_PASS,
        ),
        (
            "UDP over IPv6",
            udp_from(ALLOWED6, UDP_PORT, b"x"),
            Reason::PassUdp,
            XDP_PASS,
        ),
    ];
    for (name, frame, reason, action) in table {
        let before = edge.counters();
        let (found, decision, run) = edge.run(Program::EdgeTest, &frame);
        assert_eq!(
            (found, run.action),
            (reason, action),
            "{name}: {decision:?}"
        );
        let ours = decision.service != abi::SERVICE_NONE;
        let stamped = action == XDP_PASS && ours;
        assert_eq!(run.stamp, stamped.then_some(abi::STAMP_PASS), "{name}");
        assert_eq!(run.frame, frame, "{name}");
        let (before, after) = (before.acted, edge.counters().acted);
        let grown: Vec<_> = (0..abi::REASONS)
            .filter(|at| after[*at] != before[*at])
            .collect();
        assert_eq!(grown, [found.index() as usize], "{name}");
    }
}

#[test]
fn the_firewall_decides_by_source_and_counts_hits() {
    let Some(edge) = Edge::load() else { return };
    let from = |source| udp_from(source, UDP_PORT, b"x");
    assert_eq!(edge.reason(&from("10.9.9.9")), Reason::PassUdp);
    assert_eq!(edge.reason(&from("11.9.9.9")), Reason::FirewallDeny);
    assert_eq!(edge.reason(&from("13.9.9.9")), Reason::FirewallDefault);
    assert_eq!(edge.reason(&from("fd00::1")), Reason::FirewallDefault);
    let (reason, decision, run) = edge.run(Program::EdgeTest, &from("12.9.9.9"));
    assert_eq!((reason, decision.rule), (Reason::PassReject, 2));
    assert_eq!(run.stamp, Some(abi::STAMP_REJECT));
    let maps = edge.loaded.maps();
    let hits = |rule: u32| -> u64 {
        let values = maps
            .hits()
            .lookup_percpu(&rule.to_ne_bytes(), MapFlags::ANY)
            .unwrap()
            .unwrap();
        values
            .iter()
            .map(|value| u64::from_ne_bytes(value[..].try_into().unwrap()))
            .sum()
    };
    assert_eq!([hits(0), hits(1), hits(2), hits(3)], [1, 1, 1, 0]);
}

#[test]
fn connection_ids_tokens_and_proofs_open_the_way() {
    let Some(edge) = Edge::load() else { return };
    let place = Place {
        shard: 1,
        generation: 2,
        slot: 3,
    };
    let id = LocalCid::issue_handshake(place, 9, client(ALLOWED), &keys(), NOW_NS);
    let mut short = vec![0x40];
    short.extend(id);
    short.extend([0; 20]);
    assert_eq!(edge.reason(&quic(&short)), Reason::PassQuic);
    assert_eq!(
        edge.reason(&quic(&initial(&id, &[], &[]))),
        Reason::PassQuic
    );
    let elsewhere = udp_from("10.1.2.4", QUIC_PORT, &short);
    assert_eq!(edge.reason(&elsewhere), Reason::QuicUnknownId);
    let late = LocalCid::issue_roaming(place, 9, &keys(), NOW_NS - (2 << 42));
    short[1..17].copy_from_slice(&late);
    assert_eq!(edge.reason(&quic(&short)), Reason::QuicExpiredId);

    let minted = token::mint(&[7; 11], client(ALLOWED6), &keys(), NOW_NS).unwrap();
    let second = initial(&minted.retry_id, &[5; 8], &minted.token);
    assert_eq!(
        edge.reason(&udp_from(ALLOWED6, QUIC_PORT, &second)),
        Reason::PassQuicToken
    );
    assert_eq!(edge.reason(&quic(&second)), Reason::QuicBadToken);

    let key = Key { k0: 5, k1: 6 };
    let bytes: Vec<u8> = [5u64, 6]
        .iter()
        .flat_map(|half| half.to_ne_bytes())
        .collect();
    let peers = edge.loaded.maps().peers();
    peers
        .update(&0xabcd_u32.to_ne_bytes(), &bytes, MapFlags::ANY)
        .unwrap();
    let proof = proof::make(1, 0xabcd, [3; 6], ALLOWED.parse().unwrap(), NOW_NS, key);
    edge.stress(2);
    assert_eq!(
        edge.reason(&quic(&initial(&proof, &[], &[]))),
        Reason::PassQuicPeer
    );
    assert_eq!(
        edge.reason(&quic(&initial(&[1; 20], &[], &[]))),
        Reason::QuicPeersOnly
    );
}

#[test]
fn a_retry_is_the_models_byte_for_byte() {
    let Some(edge) = Edge::load() else { return };
    edge.stress(1);
    for source in [ALLOWED, ALLOWED6] {
        for (id_bytes, source_id_bytes) in [(8, 0), (15, 8), (16, 16), (17, 1), (20, 20), (8, 20)] {
            let id: Vec<u8> = (1..=id_bytes).collect();
            let source_id: Vec<u8> = (101..101 + source_id_bytes).collect();
            let frame = udp_from(source, QUIC_PORT, &initial(&id, &source_id, &[]));
            let (reason, _, run) = edge.run(Program::EdgeTest, &frame);
            assert_eq!((reason, run.action), (Reason::TxRetry, XDP_TX));
            let minted = token::mint(&id, client(source), &keys(), NOW_NS).unwrap();
            let answer = retry::packet(&source_id, &id, &minted);
            let expected = retry::frame(&Packet::parse(&frame).unwrap(), &answer);
            assert_eq!(run.frame, expected, "{source} {id_bytes} {source_id_bytes}");
        }
    }
}

#[test]
fn limits_refuse_and_reading_takes_nothing() {
    let Some(edge) = Edge::load() else { return };
    let mut limited = config();
    limited.budget[0] = ONE;
    limited.source_quic = [ONE; 3];
    limited.peer = UNLIMITED;
    edge.publish(&limited);
    let plain = quic(&initial(&[1; 8], &[], &[]));
    let read = |frame: &[u8]| edge.run(Program::EdgeTrace, frame);
    for _ in 0..3 {
        let (reason, _, run) = read(&plain);
        assert_eq!(reason, Reason::PassQuicInitial);
        assert_eq!(run.stamp, None);
    }
    assert_eq!(edge.reason(&plain), Reason::PassQuicInitial);
    assert_eq!(edge.reason(&plain), Reason::TxRetry, "the budget is spent");
    assert_eq!(
        edge.counters().acted.iter().sum::<u64>(),
        2,
        "reading is not counted"
    );

    let minted = token::mint(&[7; 8], client(ALLOWED), &keys(), NOW_NS).unwrap();
    let second = quic(&initial(&minted.retry_id, &[], &minted.token));
    assert_eq!(edge.reason(&second), Reason::PassQuicToken);
    assert_eq!(edge.reason(&second), Reason::QuicSourceRate);
    let neighbour = udp_from("10.1.2.99", QUIC_PORT, &initial(&[1; 8], &[], &[]));
    assert_eq!(
        edge.reason(&neighbour),
        Reason::QuicSourceRate,
        "the same /24"
    );
    let other = udp_from("10.1.3.3", QUIC_PORT, &initial(&[1; 8], &[], &[]));
    assert_eq!(edge.reason(&other), Reason::TxRetry);
}

// Protects the last packet of a burst: it is charged by the exact clock, and looked at by one that
// is up to a tick behind.
#[test]
fn a_source_has_its_burst_within_a_tick() {
    const SOURCES: u8 = 100;
    let Some(edge) = Edge::load() else { return };
    let hourly = Limit::per(1, Duration::from_secs(3_600), 2);
    let mut limited = config();
    limited.source_quic = [hourly.into(); 3];
    limited.source_tcp = [hourly.into(); 3];
    edge.publish(&limited);
    let sketch = Sketch {
        buckets: &edge.loaded.maps().limiter,
        seed: [Key { k0: 1, k1: 2 }, Key { k0: 3, k1: 4 }],
        active: 0,
        old_until_ns: 0,
    };
    let opened = |address: &str, purpose| {
        let source = Source::of(address.parse().unwrap());
        let now_ns = millrace_edge::clock::now_ns();
        sketch.charge_source(source, purpose, &[hourly; 3], now_ns);
    };
    // In the real clock.
    let seen = |frame: &[u8]| edge.run(Program::EdgeTrace, frame).0;
    for number in 0..SOURCES {
        let address = format!("10.3.{number}.1");
        let first = udp_from(&address, QUIC_PORT, &initial(&[1; 8], &[], &[]));
        opened(&address, Purpose::Quic);
        assert_eq!(seen(&first), Reason::PassQuicInitial, "{address}");
        opened(&address, Purpose::Quic);
        assert_eq!(seen(&first), Reason::QuicSourceRate, "{address}");
        let syn = syn_from(&address);
        opened(&address, Purpose::Tcp);
        assert_eq!(seen(&syn), Reason::PassTcpSyn, "{address}");
        opened(&address, Purpose::Tcp);
        assert_eq!(seen(&syn), Reason::TcpSourceRate, "{address}");
    }
}

#[test]
fn syns_are_answered_by_cookies_beyond_the_budget() {
    let Some(edge) = Edge::load() else { return };
    let mut limited = config();
    limited.budget[1] = ONE;
    edge.publish(&limited);
    assert_eq!(edge.reason(&syn_from(ALLOWED)), Reason::PassTcpSyn);
    for source in [ALLOWED, ALLOWED6] {
        let syn = syn_from(source);
        let (reason, _, run) = edge.run(Program::EdgeTest, &syn);
        assert_eq!((reason, run.action), (Reason::TxSynCookie, XDP_TX));
        let answer = etherparse::PacketHeaders::from_ethernet_slice(&run.frame).unwrap();
        let asked = etherparse::PacketHeaders::from_ethernet_slice(&syn).unwrap();
        let (net, tcp) = (
            answer.net.unwrap(),
            answer.transport.unwrap().tcp().unwrap(),
        );
        assert_eq!(
            (tcp.syn, tcp.ack, tcp.rst, tcp.fin),
            (true, true, false, false)
        );
        assert_eq!((tcp.source_port, tcp.destination_port), (TCP_PORT, 40_000));
        assert_eq!(
            (tcp.sequence_number, tcp.acknowledgment_number),
            (COOKIE, 78)
        );
        let mss = etherparse::TcpOptionElement::MaximumSegmentSize(abi::MOCK_MSS);
        assert_eq!(
            tcp.options_iterator().collect::<Result<Vec<_>, _>>(),
            Ok(vec![mss])
        );
        let (checksum, source, destination) = match (&net, asked.net.as_ref().unwrap()) {
            (etherparse::NetHeaders::Ipv4(ip, _), etherparse::NetHeaders::Ipv4(asked, _)) => {
                assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                assert_eq!(
                    (ip.source, ip.destination),
                    (asked.destination, asked.source)
                );
                (
                    tcp.calc_checksum_ipv4(ip, &[]).unwrap(),
                    ip.time_to_live,
                    64,
                )
            }
            (etherparse::NetHeaders::Ipv6(ip, _), etherparse::NetHeaders::Ipv6(asked, _)) => {
                assert_eq!(
                    (ip.source, ip.destination),
                    (asked.destination, asked.source)
                );
                (tcp.calc_checksum_ipv6(ip, &[]).unwrap(), ip.hop_limit, 64)
            }
            other => panic!("{other:?}"),
        };
        assert_eq!((tcp.checksum, source), (checksum, destination));
    }
}

#[test]
fn mode_count_passes_everything_and_counts_apart() {
    let Some(edge) = Edge::load() else { return };
    edge.publish(&EdgeConfig {
        mode: abi::MODE_COUNT,
        ..config()
    });
    edge.stress(1);
    let frames = [
        (udp_from("11.9.9.9", UDP_PORT, b"x"), Reason::FirewallDeny),
        (udp_from("12.9.9.9", UDP_PORT, b"x"), Reason::PassReject),
        (quic(&initial(&[1; 8], &[], &[])), Reason::TxRetry),
    ];
    for (frame, reason) in frames {
        let (found, _, run) = edge.run(Program::EdgeTest, &frame);
        assert_eq!((found, run.action), (reason, XDP_PASS));
        assert_eq!((run.stamp, run.frame), (Some(abi::STAMP_PASS), frame));
        let counters = edge.counters();
        let at = reason.index() as usize;
        assert_eq!(
            (counters.acted[at], counters.counted[at]),
            (0, 1),
            "{reason:?}"
        );
    }
}

#[test]
fn every_nth_drop_is_an_event() {
    let Some(edge) = Edge::load() else { return };
    let maps = edge.loaded.maps();
    maps.sampling.store(0, &EdgeSampling { every: 2, pad: 0 });
    let mut events = Vec::new();
    {
        let mut builder = libbpf_rs::RingBufferBuilder::new();
        builder
            .add(maps.events(), |bytes| {
                events.push(bytes.to_vec());
                0
            })
            .unwrap();
        let ring = builder.build().unwrap();
        // Drops are counted for each CPU, and the scheduler may move a test: of 100 on any two
        // CPUs, 49 or 50 are events.
        for _ in 0..100 {
            edge.reason(&udp_from("11.9.9.9", UDP_PORT, b"x"));
        }
        ring.consume().unwrap();
    }
    assert!((40..=50).contains(&events.len()), "{}", events.len());
    assert!(
        events
            .iter()
            .all(|event| event.len() == size_of::<abi::EdgeEvent>())
    );
    let reason = offset_of!(abi::EdgeEvent, reason);
    let expected = Reason::FirewallDeny.index().to_ne_bytes();
    assert!(
        events
            .iter()
            .all(|event| event[reason..reason + 4] == expected)
    );
}
