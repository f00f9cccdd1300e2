//! A node without key files rotates its TLS key, and a node that joins later knows it by its seed.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::net::SocketAddr;

use common::{config, pair};
use millrace_node::config::Seed;
use millrace_node::{Draft, Node, NodeParts, Period, keys};
use millrace_testkit::{PATIENCE, eventually};

// Protects embedders, and nodes that join a subnet whose nodes have rotated: a seed's TLS key is
// pinned like one of the registry.
#[test]
fn an_embedded_node_rotates_and_is_a_seed_afterwards() {
    let registry = keys::generate().unwrap();
    let mut config = config();
    config.registry.poll_interval = Period::millis(50);
    let start = |_| {
        let key = keys::generate().unwrap();
        let parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
        Node::start(&config, parts).unwrap()
    };
    let (nodes, first) = pair(&registry, start);
    let [rotated, other] = &nodes;
    let joins = keys::generate().unwrap();
    let new = keys::generate().unwrap();
    let public = new.public_key();
    let tls = || rotated.status().tls;
    assert_eq!(tls().key, rotated.public_key().to_string());

    let mut both = Draft::after(first.version().clone());
    both.rotate(rotated.id(), |keys| keys.begin(public))
        .unwrap();
    let subnet = both.only_subnet().unwrap();
    // Nothing listens there: its dial requests say where it is, if it is to be dialled.
    let elsewhere = SocketAddr::from(([127, 0, 0, 1], 9));
    both.set_node(joins.public_key(), subnet, [elsewhere]);
    rotated
        .offer_version(both.sign(&registry).unwrap())
        .unwrap();
    eventually("the node says what it lacks", || {
        let tls = tls();
        let is_told = tls.standing == "newest_missing" && tls.missing == Some(public.to_string());
        is_told.then_some(())
    });
    rotated.hold_tls_key(new);
    eventually("the new key is in use", || {
        let tls = tls();
        let is_new = tls.key == public.to_string() && tls.standing == "newest";
        (is_new && tls.connections_by_older_key == 0).then_some(())
    });
    let mut finished = Draft::after(both.version().clone());
    finished.rotate(rotated.id(), |keys| keys.finish()).unwrap();
    other
        .offer_version(finished.sign(&registry).unwrap())
        .unwrap();
    eventually("both know that it is the only one", || {
        let newest = finished.version().number;
        let known = nodes.iter().all(|node| node.versions().newest() == newest);
        known.then_some(())
    });
    rotated.wait_for_peer(other.id(), PATIENCE).unwrap();

    let mut config = config.clone();
    config.registry.seeds = vec![Seed {
        public_key: rotated.public_key().to_string(),
        tls_key: Some(public.to_string()),
        address: rotated.address().into(),
    }];
    let parts = NodeParts::in_memory(&config, joins, registry.public_key()).unwrap();
    let joined = Node::start(&config, parts).unwrap();
    joined.wait_for_peers(2, PATIENCE).unwrap();
    assert_eq!(joined.versions().newest(), finished.version().number);
}
