//! A hostile member: its bytes cost it its message or its connection, and cost no other peer
//! anything.
//!
//! One test, so that the memory of the process can be judged: RSS stays within what `ShardConfig`
//! and `TransportConfig` announce, plus 32 MiB.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::*;
use millrace_protocol::frame::{Class, Header, Kind};
use millrace_protocol::identity::SigningKey;
use millrace_protocol::rng::Rng;
use millrace_shards::config::ShardConfig;
use millrace_transport::counters::{Counter, Family};
use millrace_transport::{PerClass, TransportConfig};
use raw::{Raw, RawOptions};

const MIB: u64 = 1 << 20;
const POOL_BYTES: u64 = 64 * MIB;
/// How often the victim judges the progress of a message.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// Headers of the header bomb.
const BOMB: u32 = 60_000;

/// Streams that stop in their header: fewer than may be left open after they were cut.
const STOPPED: usize = 300;

fn rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}

fn header(kind: Kind, body_bytes: u32) -> Header {
    Header {
        kind,
        class: Class::Bulk,
        method: LENGTH,
        id: 1,
        body_bytes,
        arg: 60_000,
    }
}

fn message(header: Header, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2];
    bytes.extend(header.encode());
    bytes.extend(body);
    bytes
}

/// The victim, an honest peer of it, and the key and the address of the hostile member, which has
/// the lowest id and so may dial both.
fn testbed() -> (Node, Node, (SigningKey, SocketAddr), TransportConfig) {
    let mut keys = [key(1), key(2), key(3)];
    keys.sort_by_key(SigningKey::node_id);
    let [hostile, honest, victim] = keys;
    let addrs = [free_addr(), free_addr(), free_addr()];
    let topology = topology(
        [
            member(&hostile, addrs[0]),
            member(&honest, addrs[1]),
            member(&victim, addrs[2]),
        ],
        1,
    );
    let config = TransportConfig {
        receive_budget_bytes: POOL_BYTES,
        receive_budget_peer_bytes: POOL_BYTES / 2,
        stream_progress_interval: PROGRESS_INTERVAL,
        requests_in_max: PerClass {
            latency: 64,
            normal: 64,
            bulk: 64,
        },
        idle_timeout: Duration::from_secs(10),
        ..Default::default()
    };
    let honest = Node::start(honest, addrs[1], &topology, config.clone(), POOL_BYTES);
    let victim = Node::start(victim, addrs[2], &topology, config.clone(), POOL_BYTES);
    honest.wait_for_peers(&[victim.id()]);
    (victim, honest, (hostile, addrs[0]), config)
}

struct Attack<'a> {
    victim: &'a Node,
    honest: &'a Node,
    hostile: &'a SigningKey,
    /// Where all of its connections come from: from several, it would be two nodes with one key.
    from: SocketAddr,
    rss_max: u64,
}

impl Attack<'_> {
    fn connect(&self) -> Raw {
        let key = SigningKey::from_seed(*self.hostile.seed());
        let mut raw = Raw::dial_at(
            &self.from.to_string(),
            self.victim.transport.local_addr(),
            &RawOptions {
                key: Some(key),
                ..RawOptions::default()
            },
        );
        raw.introduce();
        raw
    }

    /// The honest peer is served, and memory is within its bound.
    fn check(&self, what: &str) {
        let request = request(ECHO, Class::Normal, vec![5; 1_024]);
        let answer = self
            .honest
            .transport
            .request(self.victim.id(), request)
            .wait(PATIENCE);
        assert_eq!(
            bytes_of(&answer.unwrap()),
            vec![5; 1_024],
            "{what}: the honest peer is served"
        );
        let rss = rss_bytes();
        println!("{what}: {} MiB of {} MiB", rss / MIB, self.rss_max / MIB);
        assert!(
            rss <= self.rss_max,
            "{what}: {} MiB resident, bound is {} MiB",
            rss / MIB,
            self.rss_max / MIB
        );
    }

    fn rejected(&self, reason: &str, n: u64) {
        self.victim.wait_for_reason(Family::Rejected, reason, n);
    }
}

#[test]
fn a_hostile_member_costs_nobody_anything() {
    let (victim, honest, (hostile, from), config) = testbed();
    // Two nodes and the attacker live in this process; what they and the test program take before
    // the attack is the base. On top may come the part of the victim's pool that is not resident
    // yet, and what the configuration says a connection may hold.
    let absent_bytes = POOL_BYTES - ShardConfig::default().chunk_pool_ahead_bytes;
    let rss_max = rss_bytes() + absent_bytes + 3 * config.connection_budget_bytes() + 32 * MIB;
    let attack = Attack {
        victim: &victim,
        honest: &honest,
        hostile: &hostile,
        from,
        rss_max,
    };

    // 1,000 streams announce 128 MiB each and never finish: the budget has room for none; each is
    // refused.
    let mut raw = attack.connect();
    for stream in 0..1_000 {
        raw.send(
            Raw::stream(stream),
            &message(header(Kind::Request, 128 << 20), &[0; 100]),
            false,
        );
    }
    // Refused streams that are left open cost the connection in the end.
    raw.drive(PATIENCE, |quic| quic.peer_error().is_some());
    attack.rejected("budget_peer_too_large", 700);
    attack.rejected("peer_abandoned_streams", 1);
    attack.check("announced and not sent");
    drop(raw);

    // As many that fit the budget are taken until it is used up, and cut when nothing follows.
    let mut raw = attack.connect();
    for stream in 0..40 {
        raw.send(
            Raw::stream(stream),
            &message(header(Kind::Request, 4 << 20), &[0; 100]),
            false,
        );
    }
    raw.drive(PATIENCE, |_| {
        victim.reason(Family::Rejected, "peer_stalled") >= 8
    });
    attack.rejected("peer_stalled", 8);
    attack.check("stalled bodies");
    drop(raw);

    // Streams that stop within their header: after their first byte, in the middle, before the last
    // one. No body is held for them, but each takes one of the connection's streams.
    let stalled = || victim.reason(Family::Rejected, "peer_stalled");
    let before = stalled();
    let head = message(header(Kind::Request, 20_000), &[]);
    let mut raw = attack.connect();
    for (stream, len) in (0..).zip((1..head.len()).cycle().take(STOPPED)) {
        raw.send(Raw::stream(stream), &head[..len], false);
    }
    let all = before + STOPPED as u64;
    assert!(
        raw.drive(PATIENCE, |_| stalled() >= all),
        "{} of {STOPPED} streams were cut",
        stalled() - before
    );
    attack.check("headers that stop");
    drop(raw);

    // 1,000 streams drip a byte at a time.
    let before = stalled();
    let mut raw = attack.connect();
    for stream in 0..1_000 {
        raw.send(
            Raw::stream(stream),
            &message(header(Kind::Request, 20_000), &[]),
            false,
        );
    }
    let until = Instant::now() + PATIENCE;
    let is_cut = |_: &mut quiche::Connection| stalled() >= before + 500;
    while !raw.drive(PROGRESS_INTERVAL / 4, is_cut) {
        assert!(
            Instant::now() < until,
            "{} streams were cut",
            stalled() - before
        );
        for stream in 0..1_000 {
            raw.quic.stream_send(Raw::stream(stream), &[1], false).ok();
        }
    }
    attack.check("dripping bodies");
    drop(raw);

    // A header bomb: a lane full of headers of requests without bodies. They are answered or
    // refused; nothing is kept.
    let mut raw = attack.connect();
    let mut lane = vec![1];
    let received = || victim.count(Counter::ReceivedNormal);
    let all = received() + u64::from(BOMB);
    for id in 0..BOMB {
        lane.extend(
            Header {
                id,
                class: Class::Normal,
                method: HANG,
                ..header(Kind::Request, 0)
            }
            .encode(),
        );
    }
    raw.send(Raw::stream(0), &lane, false);
    assert!(raw.drive(PATIENCE, |_| received() >= all));
    attack.check("header bomb");
    drop(raw);

    // A body longer and one shorter than announced.
    let mut raw = attack.connect();
    raw.send(
        Raw::stream(0),
        &message(header(Kind::Request, 1_000), &[0; 1_001]),
        true,
    );
    raw.send(
        Raw::stream(1),
        &message(header(Kind::Request, 1_000), &[0; 999]),
        true,
    );
    raw.send(
        Raw::stream(2),
        &message(header(Kind::Request, 100_000), &vec![0; 100_001]),
        true,
    );
    raw.send(
        Raw::stream(3),
        &message(header(Kind::Request, 100_000), &vec![0; 99_999]),
        true,
    );
    raw.send(
        Raw::stream(4),
        &message(header(Kind::Request, 10), &[])[..9],
        true,
    );
    raw.drive(PATIENCE, |_| {
        let rejected = |reason| victim.reason(Family::Rejected, reason);
        rejected("peer_body_longer_than_announced") >= 2
            && rejected("peer_body_shorter_than_announced") >= 3
    });
    attack.rejected("peer_body_longer_than_announced", 2);
    attack.rejected("peer_body_shorter_than_announced", 3);
    attack.check("wrong lengths");
    assert!(
        raw.quic.peer_error().is_none(),
        "a wrong length costs the message, not the connection"
    );
    drop(raw);

    // Frames that do not exist, in every place.
    let garbage: [(&str, Vec<u8>); 4] = [
        ("peer_unknown_stream_kind", vec![9; 64]),
        ("peer_unknown_kind", [&[2], &[99; 16][..]].concat()),
        (
            "peer_body_too_long",
            [&[1], &header(Kind::Request, 1 << 20).encode()[..]].concat(),
        ),
        (
            "peer_misplaced_frame",
            message(header(Kind::Hello, 20), &[0; 20]),
        ),
    ];
    for (what, bytes) in garbage {
        let mut raw = attack.connect();
        raw.send(Raw::stream(0), &bytes, false);
        assert!(
            raw.drive(PATIENCE, |quic| quic.peer_error().is_some()),
            "{what} ends the connection"
        );
        attack.check(what);
    }
    attack.rejected("peer_unknown_stream_kind", 1);
    attack.rejected("peer_body_too_long", 1);

    // Random bytes for every frame: on lanes, on message streams, in datagrams.
    let mut rng = Rng::new(7);
    for round in 0..40 {
        let mut raw = attack.connect();
        for stream in 0..4 {
            let mut bytes = vec![0; 1 + rng.below(600) as usize];
            rng.fill(&mut bytes);
            bytes[0] = 1 + (stream % 2) as u8;
            raw.send(Raw::stream(stream), &bytes, rng.chance(500_000));
            let mut datagram = vec![0; rng.below(60) as usize];
            rng.fill(&mut datagram);
            raw.quic.dgram_send(&datagram).ok();
        }
        raw.drive(Duration::from_millis(20), |quic| {
            quic.peer_error().is_some()
        });
        attack.check(&format!("random bytes, round {round}"));
    }

    // Datagrams that are not QUIC.
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..2_000 {
        let mut bytes = vec![0; rng.below(1_400) as usize];
        rng.fill(&mut bytes);
        socket.send_to(&bytes, victim.transport.local_addr()).ok();
    }
    attack.check("random datagrams");
    assert!(
        victim.transport.counters()[0]
            .reasons()
            .iter()
            .all(|(_, reason, _)| !reason.is_empty())
    );
}
