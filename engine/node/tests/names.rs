//! Nodes that the registry has by their hosts' names.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use millrace_node::{Draft, Node, NodeParts, SigningKey, keys};
use millrace_protocol::address::{HostName, NodeAddress};
use millrace_protocol::names::Found;
use millrace_registry::Resolver;
use millrace_testkit::{PATIENCE, free_addr, until};

use common::config;

/// Two keys; the first is the dialler's.
fn two_keys() -> [SigningKey; 2] {
    let mut keys = [0, 1].map(|_| keys::generate().unwrap());
    keys.sort_by_key(SigningKey::node_id);
    keys
}

/// Names that stand for what the test says.
#[derive(Debug, Default, Clone)]
struct Table(Arc<Mutex<BTreeMap<String, IpAddr>>>);

impl Table {
    fn set(&self, host: &str, address: Option<IpAddr>) {
        let mut table = self.0.lock().unwrap();
        match address {
            Some(address) => table.insert(host.into(), address),
            None => table.remove(host),
        };
    }
}

impl Resolver for Table {
    fn lookup(&self, host: &HostName) -> Result<Found, String> {
        let table = self.0.lock().unwrap();
        let address = table.get(host.as_str()).ok_or("no such name")?;
        Ok(Found {
            addresses: vec![*address],
            ttl: None,
        })
    }
}

fn start(
    key: &SigningKey,
    registry: &SigningKey,
    address: std::net::SocketAddr,
    resolver: Option<&Table>,
) -> Node {
    let mut config = config();
    config.listen.address = address;
    let key = SigningKey::from_seed(*key.seed());
    let mut parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
    if let Some(table) = resolver {
        parts.resolver = Arc::new(table.clone());
    }
    Node::start(&config, parts).unwrap()
}

/// Offers both nodes a version that has them at these addresses.
fn offer(registry: &SigningKey, keys: &[SigningKey; 2], listed: [String; 2], nodes: &[&Node]) {
    let mut draft = Draft::first("test").unwrap();
    let subnet = draft.only_subnet().unwrap();
    for (key, text) in keys.iter().zip(listed) {
        let address: NodeAddress = text.parse().unwrap();
        draft.set_node(key.public_key(), subnet, [address]);
    }
    let signed = draft.sign(registry).unwrap();
    for node in nodes {
        node.offer_version(signed.clone()).unwrap();
    }
}

// Protects the way through the host's own resolver: its hosts file says what `localhost` is.
#[test]
fn nodes_find_each_other_by_a_name_of_the_hosts_file() {
    let (registry, keys) = (keys::generate().unwrap(), two_keys());
    let any = "127.0.0.1:0".parse().unwrap();
    let nodes = keys.each_ref().map(|key| start(key, &registry, any, None));
    let listed = nodes
        .each_ref()
        .map(|node| format!("localhost:{}", node.address().port()));
    offer(&registry, &keys, listed, &nodes.each_ref());
    for node in &nodes {
        node.wait_for_peers(1, PATIENCE).unwrap();
        let registry = node.status().registry;
        assert_eq!((registry.names, registry.failing_names.len()), (1, 0));
    }
}

// Protects a subnet of names: a name that fails is shown and keeps its address, and one that stands
// for another address is dialled there, without a new version.
#[test]
fn a_name_is_followed_and_a_failing_one_keeps_its_address() {
    let (registry, keys) = (keys::generate().unwrap(), two_keys());
    let (at, first, second) = (free_addr(), free_addr(), free_addr());
    let second = std::net::SocketAddr::new(second.ip(), first.port());
    let (names, none) = (Table::default(), Table::default());
    names.set("listener.test", Some(first.ip()));
    let dialler = start(&keys[0], &registry, at, Some(&names));
    // The listener knows no address to request a dial at: only the dialler's names can bring them
    // together.
    let listed = [
        format!("dialler.test:{}", at.port()),
        format!("listener.test:{}", first.port()),
    ];
    let offer = |nodes: &[&Node]| offer(&registry, &keys, listed.clone(), nodes);
    let listener = start(&keys[1], &registry, first, Some(&none));
    offer(&[&dialler, &listener]);
    dialler.wait_for_peers(1, PATIENCE).unwrap();
    let failing = |node: &Node| node.status().registry.failing_names;
    until("both names fail at the listener", || {
        failing(&listener).len() == 2
    });
    assert!(failing(&listener)[0].addresses.is_empty());
    let at_peer = || {
        dialler
            .status()
            .peers
            .first()
            .and_then(|peer| peer.address.clone())
    };
    assert_eq!(at_peer(), Some(first.to_string()));

    names.set("listener.test", None);
    drop(listener);
    until("the name fails", || {
        let failing = failing(&dialler);
        failing
            .iter()
            .any(|name| name.host == "listener.test" && name.addresses == [first.ip()])
    });
    let listener = start(&keys[1], &registry, second, Some(&none));
    offer(&[&listener]);
    names.set("listener.test", Some(second.ip()));
    dialler.wait_for_peers(1, PATIENCE).unwrap();
    assert_eq!(at_peer(), Some(second.to_string()));
}
