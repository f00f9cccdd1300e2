//! Registry versions go from node to node.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use millrace_node::{Draft, Node, NodeParts, Period, SigningKey, keys};
use millrace_testkit::{PATIENCE, until};

use common::{config, pair, record};

/// No poll comes in a test of this length.
const NEVER: Period = Period::secs(3_600);

fn start(registry: &SigningKey, poll_interval: Period) -> Node {
    let mut config = config();
    config.shards.defaults.spin = Period::secs(0);
    config.registry.poll_interval = poll_interval;
    let key = keys::generate().unwrap();
    let parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
    Node::start(&config, parts).unwrap()
}

fn next(draft: &Draft) -> Draft {
    Draft::after(draft.version().clone())
}

#[test]
fn a_connected_peer_is_asked_every_interval() {
    let registry = keys::generate().unwrap();
    let (nodes, first) = pair(&registry, |_| start(&registry, Period::millis(20)));
    let second = next(&first).sign(&registry).unwrap();
    nodes[0].offer_version(second).unwrap();
    until("the peer has version 2", || {
        nodes[1].versions().newest() == 2
    });
}

/// A peer's hello says which version it holds: a node that is behind asks at once.
#[test]
fn a_node_that_is_behind_asks_when_it_connects() {
    let registry = keys::generate().unwrap();
    let (nodes, first) = pair(&registry, |_| start(&registry, NEVER));
    let [ahead, behind] = &nodes;
    // Version 2 lacks the node that is behind: it is cut, and does not hear why.
    let mut second = next(&first);
    second.remove_node(behind.id()).unwrap();
    ahead
        .offer_version(second.sign(&registry).unwrap())
        .unwrap();
    let is_cut = |node: &Node| node.transport().status().wait(PATIENCE, <[_]>::is_empty);
    assert!(is_cut(ahead) && is_cut(behind));
    assert_eq!(behind.versions().newest(), 1);
    // Version 3 has both again.
    let mut third = next(&second);
    let (key, address) = record(behind);
    third.set_node(key, third.only_subnet().unwrap(), [address]);
    ahead.offer_version(third.sign(&registry).unwrap()).unwrap();
    ahead.wait_for_peers(1, PATIENCE).unwrap();
    until("the node has version 3", || behind.versions().newest() == 3);
    assert_eq!(behind.versions().summary().refused, []);
}
