//! The profile of a connection on real sockets: who chooses it, when a connection is dialled again,
//! and what a remembered path is worth. Loopback is a short path.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::time::Duration;

use common::*;
use millrace_protocol::frame::Class;
use millrace_protocol::identity::SigningKey;
use millrace_transport::counters::Counter;
use millrace_transport::{PathProfile, RememberedPath, TransportConfig};

const POOL_BYTES: u64 = 16 << 20;
const BODY_BYTES: usize = 4 << 20;
/// Far above any RTT of loopback, on a busy host too.
const LONG: Duration = Duration::from_millis(150);
/// 300 Mbit/s.
const BANDWIDTH_BYTES_PER_S: u64 = 37_500_000;

/// A dialler that knows this of its path, and its listener, which knows nothing.
fn start(config: &TransportConfig, known: Option<RememberedPath>) -> [Node; 2] {
    let mut keys = [key(1), key(2)];
    keys.sort_by_key(SigningKey::node_id);
    let [dialler, listener] = keys;
    let addresses = [free_addr(), free_addr()];
    let members = [
        member(&dialler, addresses[0]),
        member(&listener, addresses[1]),
    ];
    let topology = topology(members, 1);
    let paths = known.map(|path| (listener.node_id(), path));
    let dialler = Node::start_knowing(
        dialler,
        addresses[0],
        &topology,
        config.clone(),
        POOL_BYTES,
        paths.into_iter().collect(),
    );
    let listener = Node::start_knowing(
        listener,
        addresses[1],
        &topology,
        config.clone(),
        POOL_BYTES,
        Vec::new(),
    );
    dialler.wait_for_peers(&[listener.id()]);
    listener.wait_for_peers(&[dialler.id()]);
    [dialler, listener]
}

/// Waits until both ends have one connection, of this profile.
fn wait_for_profile(nodes: &[Node; 2], profile: PathProfile) {
    for node in nodes {
        let status = node.transport.status();
        let held = status.wait(PATIENCE, |up| up.len() == 1 && up[0].profile == profile);
        assert!(held, "{profile:?} is not in {:?}", status.peers());
    }
}

fn exchange(nodes: &[Node; 2]) {
    let body = request(LENGTH, Class::Bulk, nodes[0].body(BODY_BYTES));
    let answer = nodes[0].transport.request(nodes[1].id(), body);
    let length = bytes_of(&answer.wait(PATIENCE).unwrap());
    assert_eq!(length, BODY_BYTES.to_le_bytes());
}

fn fixed(profile: PathProfile) -> TransportConfig {
    let mut config = TransportConfig::default();
    config.paths.profile = Some(profile);
    config
}

// Protects a LAN's rate: nodes that meet for the first time end up with its profile, and at once
// the next time. The listener takes the profile that the dialler chose.
#[test]
fn nodes_that_are_near_get_the_profile_of_a_lan() {
    let nodes = start(&TransportConfig::default(), None);
    wait_for_profile(&nodes, PathProfile::Lan);
    exchange(&nodes);
    assert_eq!(nodes[0].count(Counter::PathsReplaced), 1);
    assert_eq!(nodes[1].count(Counter::PathsReplaced), 0);
    let known = nodes[0].transport.status().peers()[0].remembered;
    assert!(known.is_some());

    drop(nodes);
    let again = start(&TransportConfig::default(), known);
    wait_for_profile(&again, PathProfile::Lan);
    assert_eq!(again[0].count(Counter::PathsReplaced), 0);
}

// Protects a node whose peer has moved nearer: the connection that it has is replaced while it is
// in use, and no message is lost by it.
#[test]
fn a_connection_with_a_wrong_profile_is_replaced_in_use() {
    let known = RememberedPath {
        rtt: LONG,
        bandwidth_bytes_per_s: None,
    };
    let nodes = start(&TransportConfig::default(), Some(known));
    let first = nodes[0].transport.status().peers()[0].connection;
    exchange(&nodes);
    wait_for_profile(&nodes, PathProfile::Lan);
    exchange(&nodes);
    assert!(nodes[0].transport.status().peers()[0].connection > first);
    assert_eq!(nodes[0].count(Counter::PathsReplaced), 1);
}

// Protects the operator's word: a profile that the config names stays, whatever is measured.
#[test]
fn a_profile_that_the_config_names_stays() {
    for profile in PathProfile::ALL {
        let nodes = start(&fixed(profile), None);
        exchange(&nodes);
        wait_for_profile(&nodes, profile);
        for node in &nodes {
            assert_eq!(node.count(Counter::PathsReplaced), 0);
        }
    }
}

// Protects the first body after a restart: the dialler begins with half of the bandwidth that the
// path had, times its RTT, and an unknown path with the window of the config.
#[test]
fn a_remembered_path_begins_with_half_of_its_bandwidth() {
    let config = fixed(PathProfile::Wan);
    let known = RememberedPath {
        rtt: LONG,
        bandwidth_bytes_per_s: Some(BANDWIDTH_BYTES_PER_S),
    };
    let packet_bytes = config.udp_payload_bytes_max as u64;
    let unknown_bytes = config.wan.initial_window_packets as u64 * packet_bytes;
    let half_bytes = BANDWIDTH_BYTES_PER_S * LONG.as_millis() as u64 / 2_000;
    // The handshake is acknowledged, which may add a little; MTUs count as 1,200 at the start.
    for (known, least, most) in [
        (
            None,
            unknown_bytes * 1_200 / packet_bytes,
            2 * unknown_bytes,
        ),
        (Some(known), half_bytes * 99 / 100, 2 * half_bytes),
    ] {
        let nodes = start(&config, known);
        let window = nodes[0].transport.status().peers()[0].congestion_window_bytes;
        assert!(
            (least..=most).contains(&window),
            "{window} is not in {least}..={most}"
        );
    }
}
