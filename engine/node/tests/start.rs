//! Nodes that cannot start say whose fault it is, and leave what others have alone.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::ops::RangeInclusive;
use std::path::Path;

use millrace_node::admin::client;
use millrace_node::{
    Answer, Defer, FIRST_FREE_METHOD, FailureCode, Inbound, Method, Node, NodeConfig, NodeParts,
    Service, StartError, keys,
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
