//! Frames of the table, and a model with room for one of everything.

#![allow(clippy::unwrap_used, reason = "test code")]

use super::super::Model;
use crate::cid::{Keys, LocalCid, Place};
use crate::limiter::Limit;
use crate::proof;
use crate::rules::{Bounds, Compiled, Locality, RuleSet, compile, in_order};
use crate::settings::{Caps, DefaultAction, Kind, Limits, Mode, Scope, Service, Settings};
use crate::siphash::Key;
use etherparse::PacketBuilder;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

pub(super) const QUIC: u16 = 4_100;
pub(super) const TCP: u16 = 8_080;
pub(super) const UDP: u16 = 9_000;

/// Later than two epochs of roaming IDs, so that there are epochs to expire from.
pub(super) const NOW_NS: u64 = 3 << 42;
pub(super) const HANDSHAKE_EPOCH_NS: u64 = 1 << 34;
pub(super) const ROAMING_EPOCH_NS: u64 = 1 << 42;
pub(super) const WALL_OFFSET_NS: u64 = 1_700_000_000_000_000_000;
pub(super) const RUN: u32 = 7;
pub(super) const NODE: u32 = 0x0403_0201;

pub(super) const CLIENT: &str = "192.0.2.7:40000";
pub(super) const CLIENT6: &str = "[2001:db8::7]:40000";

pub(super) const SYN: u8 = 0x02;
pub(super) const ACK: u8 = 0x10;

pub(super) fn keys() -> Keys {
    Keys {
        keys: std::array::from_fn(|index| Key::from_bytes([index as u8 + 1; 16])),
        active: 1,
    }
}

pub(super) fn peer_key() -> Key {
    Key::from_bytes([0xaa; 16])
}

/// Burst 1 for everything global; a source may open two connections, a peer send two first packets.
pub(super) fn settings(mode: Mode, scope: Scope) -> Settings {
    let hourly = |burst| Limit::per(1, Duration::from_secs(3_600), burst);
    let service = |port, kind, default_action| Service {
        port,
        kind,
        default_action,
    };
    Settings {
        mode,
        scope,
        services: vec![
            service(QUIC, Kind::Quic, DefaultAction::Deny),
            service(TCP, Kind::Tcp, DefaultAction::Deny),
            service(UDP, Kind::Udp, DefaultAction::Allow),
        ],
        host_default: DefaultAction::Deny,
        limits: Limits {
            unvalidated: hourly(1),
            syn: hourly(1),
            version: hourly(1),
            dial_request: hourly(1),
            reject: hourly(1),
            source_quic: hourly(2),
            source_tcp: hourly(2),
            peer: hourly(2),
            proof: hourly(1),
            id: hourly(1),
        },
        caps: Caps { quic: 3, tcp: 3 },
    }
}

pub(super) fn compiled(mode: Mode, scope: Scope) -> Compiled {
    let document = r#"
        [[firewall]]
        scope = "global"
        prefixes = ["203.0.113.0/24"]
        action = "reject"
        [[firewall]]
        scope = "global"
        prefixes = ["198.18.0.0/15"]
        action = "deny"
        [[firewall]]
        scope = "global"
        prefixes = ["192.0.2.0/24", "2001:db8::/32"]
        action = "allow"
    "#;
    let document: toml::Table = document.parse().unwrap();
    let tables: Vec<toml::Table> = document["firewall"].clone().try_into().unwrap();
    let set = RuleSet::read(1, &tables).unwrap();
    let bounds = Bounds {
        rules_max: 16,
        nodes4_max: 64,
        nodes6_max: 64,
    };
    let rules = in_order(&[], [], &set, &Locality::default(), 0);
    compile(&settings(mode, scope), &rules, bounds).unwrap()
}

pub(super) fn model(mode: Mode, scope: Scope) -> Model {
    let mut model = Model::new(1_024);
    model.publish(compiled(mode, scope));
    model.keys = keys();
    model.seed = [Key::from_bytes([0x11; 16]), Key::from_bytes([0x22; 16])];
    model.lease_until_ns = u64::MAX;
    model.run = RUN;
    model.wall_offset_ns = WALL_OFFSET_NS;
    model.peers.insert(NODE, peer_key());
    model
}

pub(super) fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn server_like(client: IpAddr) -> IpAddr {
    match client {
        IpAddr::V4(_) => IpAddr::from([198, 51, 100, 1]),
        IpAddr::V6(_) => IpAddr::from([0xfd; 16]),
    }
}

pub(super) fn udp(from: &str, port: u16, payload: &[u8]) -> Vec<u8> {
    let from = address(from);
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let mut frame = Vec::new();
    match (from.ip(), server_like(from.ip())) {
        (IpAddr::V4(source), IpAddr::V4(target)) => ethernet
            .ipv4(source.octets(), target.octets(), 9)
            .udp(from.port(), port)
            .write(&mut frame, payload),
        (IpAddr::V6(source), IpAddr::V6(target)) => ethernet
            .ipv6(source.octets(), target.octets(), 9)
            .udp(from.port(), port)
            .write(&mut frame, payload),
        _ => unreachable!("both are of one family"),
    }
    .unwrap();
    frame
}

pub(super) fn tcp(from: &str, port: u16, flags: u8) -> Vec<u8> {
    let from = address(from);
    let IpAddr::V4(source) = from.ip() else {
        panic!("TCP is tested over IPv4");
    };
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4(source.octets(), [198, 51, 100, 1], 9)
        .tcp(from.port(), port, 1, 1_024)
        .write(&mut frame, &[])
        .unwrap();
    // Flags of TCP behind 14 and 20 bytes.
    frame[14 + 20 + 13] = flags;
    frame
}

pub(super) fn dial_request() -> Vec<u8> {
    let mut dial_request = vec![0x0d; 80];
    dial_request[2..6].copy_from_slice(b"dial");
    dial_request
}

/// A long header of 1,200 bytes or more, with a source ID of five bytes.
pub(super) fn long(first: u8, version: u32, destination_id: &[u8], token: &[u8]) -> Vec<u8> {
    let mut payload = vec![first];
    payload.extend(version.to_be_bytes());
    payload.push(destination_id.len() as u8);
    payload.extend(destination_id);
    payload.push(5);
    payload.extend([0x55; 5]);
    payload.push(token.len() as u8);
    payload.extend(token);
    payload.resize(1_200, 0);
    payload
}

pub(super) fn initial(destination_id: &[u8], token: &[u8]) -> Vec<u8> {
    long(0xc0, 1, destination_id, token)
}

pub(super) fn short(id: &[u8]) -> Vec<u8> {
    let mut payload = vec![0x40];
    payload.extend(id);
    payload.resize(40, 0);
    payload
}

pub(super) fn place() -> Place {
    Place {
        shard: 1,
        generation: 9,
        slot: 77,
    }
}

pub(super) fn handshake_id(peer: &str, issued_ns: u64) -> [u8; 16] {
    LocalCid::issue_handshake(place(), 3, address(peer), &keys(), issued_ns)
}

pub(super) fn roaming_id(issued_ns: u64) -> [u8; 16] {
    LocalCid::issue_roaming(place(), 3, &keys(), issued_ns)
}

pub(super) fn proof_of(nonce: u8, source: &str, now_ns: u64) -> [u8; 20] {
    let wall_ns = now_ns + WALL_OFFSET_NS;
    proof::make(
        5,
        NODE,
        [nonce; 6],
        address(source).ip(),
        wall_ns,
        peer_key(),
    )
}
