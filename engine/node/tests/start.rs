//! Nodes that cannot start say whose fault it is, and leave what others have alone.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::Path;

use millrace_node::admin::client;
use millrace_node::{
    Answer, Defer, Draft, FIRST_FREE_METHOD, FailureCode, Inbound, Method, Node, NodeConfig,
    NodeParts, Service, SigningKey, StartError, keys,
};

use common::config;

struct Deaf;

impl Service for Deaf {
    fn on_request(&mut self, _request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        Answer::Failure(FailureCode::UnknownMethod)
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}
}

fn parts(config: &NodeConfig) -> NodeParts {
    let [key, registry] = [0, 1].map(|_| keys::generate().unwrap());
    NodeParts::in_memory(config, key, registry.public_key()).unwrap()
}

fn start_with_socket(socket: &Path) -> Result<Node, StartError> {
    let config = config();
    let parts = NodeParts {
        admin_socket: Some(socket.to_owned()),
        ..parts(&config)
    };
    Node::start(&config, parts)
}

/// Protects the node's own services: the registry's exchange, artifacts, and those to come.
#[test]
fn a_service_gets_no_method_below_the_first_free_one() {
    let start = |methods: RangeInclusive<u16>| {
        let methods = Method(*methods.start())..=Method(*methods.end());
        let config = config();
        Node::start(&config, parts(&config).serve(methods, |_| Deaf)).map(drop)
    };
    let free = FIRST_FREE_METHOD.0;
    for methods in [0x0800..=0x0800, 0..=u16::MAX, free - 1..=free] {
        let error = start(methods.clone()).unwrap_err();
        let is_reserved = matches!(error, StartError::ReservedMethods { .. });
        assert!(is_reserved, "{methods:?}: {error:?}");
        assert!(error.to_string().contains("from 4096 on"), "{error}");
    }
    start(free..=u16::MAX).unwrap();
}

/// Protects the first node: the second one's failure must not cut its operator off.
#[test]
fn a_second_node_does_not_get_the_admin_socket_of_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("admin.sock");
    let first = start_with_socket(&socket).unwrap();
    let error = start_with_socket(&socket).unwrap_err();
    assert!(matches!(error, StartError::Taken { .. }), "{error:?}");
    let status = client::get_text(&socket, "/status").unwrap();
    assert!(status.contains(&first.id().to_string()), "{status}");
}

/// Protects a node that took over a path, from the end of the one that had it before.
#[test]
fn the_end_of_a_node_leaves_the_socket_that_another_node_made() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("admin.sock");
    let first = start_with_socket(&socket).unwrap();
    std::fs::remove_file(&socket).unwrap();
    let second = start_with_socket(&socket).unwrap();
    drop(first);
    let status = client::get_text(&socket, "/status").unwrap();
    assert!(status.contains(&second.id().to_string()), "{status}");
    drop(second);
    assert!(!socket.exists());
}

/// Protects a subnet from falling apart without a word: nodes that lack room would all leave out
/// the same members. One that starts says so; one that runs stays, and shows it.
#[test]
fn a_node_without_room_for_all_members_does_not_start() {
    // Three connections for each of three peers, and 16 for clients without a proof.
    const NEEDED: u64 = 3 * 3 + 16;
    let [me, registry] = [0, 1].map(|_| keys::generate().unwrap());
    let others: Vec<_> = (0..4).map(|_| keys::generate().unwrap()).collect();
    let address: SocketAddr = ([127, 0, 0, 1], 9).into();
    let record = |key: &SigningKey| (key.public_key(), address);
    let members = [&me, &others[0], &others[1], &others[2]].map(record);
    let first = Draft::with_nodes("test", &members).unwrap();
    let start = |connections_max| {
        let mut config = config();
        config.transport.connections_max = connections_max;
        config.transport.handshakes_max = 8;
        let parts = NodeParts::in_memory(&config, me.clone(), registry.public_key()).unwrap();
        let version = first.sign(&registry).unwrap();
        assert!(parts.versions.offer(version).unwrap());
        Node::start(&config, parts)
    };
    let error = start(NEEDED - 1).unwrap_err();
    assert!(matches!(error, StartError::Config { .. }), "{error:?}");
    let shown = error.to_string();
    let fix = format!("write connections_max = {NEEDED}");
    assert!(
        shown.starts_with("transport.connections_max: ") && shown.contains(&fix),
        "{shown}"
    );

    let node = start(NEEDED).unwrap();
    let left_out = || {
        let line = "millrace_topology_members_left_out ";
        let metrics = node.metrics().unwrap();
        let shown = metrics.lines().find_map(|shown| shown.strip_prefix(line));
        (
            node.status().registry.members_left_out,
            shown.map(str::to_owned),
        )
    };
    assert_eq!(left_out(), (0, Some("0.0".to_owned())));
    let mut second = Draft::after(first.version().clone());
    let subnet = second.only_subnet().unwrap();
    second.set_node(others[3].public_key(), subnet, [address]);
    assert!(node.offer_version(second.sign(&registry).unwrap()).unwrap());
    assert_eq!(left_out(), (1, Some("1.0".to_owned())));
}
