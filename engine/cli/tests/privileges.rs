//! A node that has no edge: it keeps no privilege either.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use common::process::{assert_harmless, children};
use common::{TestNode, TestRegistry, own_addresses};

// Protects the host: an attacker who breaks into a node finds only what the node needed, though
// root started it.
#[test]
fn a_node_without_an_edge_keeps_no_privilege() {
    let folder = tempfile::tempdir().unwrap();
    let registry = TestRegistry::init(folder.path());
    let state = folder.path().join("node");
    let dir = format!("dir = {:?}\n", registry.dir);
    let ip = own_addresses() + "1";
    let mut node = TestNode::new(&state, &registry, &ip, &dir);
    registry.add(&node, &format!("{ip}:4100"));
    node.start();
    assert_harmless(node.pid());
    assert!(children(node.pid()).is_empty(), "no helper");
    assert_eq!(node.get("/healthz").0, 200);
    assert_eq!(node.stop(), Some(0));
}
