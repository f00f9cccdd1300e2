//! A node that has no edge: it keeps no privilege either.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::process::{assert_harmless, children};
use common::{TestNode, TestRegistry};

// Protects the host: whoever breaks into a node finds nothing that it did not need, though root started it.
#[test]
fn a_node_without_an_edge_keeps_no_privilege() {
    let folder = tempfile::tempdir().unwrap();
    let registry = TestRegistry::init(folder.path());
    let state = folder.path().join("node");
    let dir = format!("dir = {:?}\n", registry.dir);
    let mut node = TestNode::new(&state, &registry, "127.77.0.9", &dir);
    registry.add(&node, "127.77.0.9:4100");
    node.start();
    assert_harmless(node.pid());
    assert!(children(node.pid()).is_empty(), "no helper");
    assert_eq!(node.get("/healthz").0, 200);
    assert_eq!(node.stop(), Some(0));
}
