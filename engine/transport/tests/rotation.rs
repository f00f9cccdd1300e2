//! A node's TLS key rotates on real sockets: both keys are accepted while the registry names both,
//! connections are replaced under load, and the retired key is refused.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::*;
use millrace_edge_policy::cid::initial_dcid;
use millrace_protocol::frame::Class;
use millrace_protocol::identity::SigningKey;
use millrace_protocol::tls_keys::{TlsKeys, Validity};
use millrace_protocol::topology::{Member, Topology};
use millrace_testkit::eventually;
use millrace_transport::counters::Family;
use millrace_transport::{CloseCode, Credentials, TransportConfig};
use raw::{Raw, RawOptions};

const LIMIT: Duration = Duration::from_secs(10);
const POOL_BYTES: u64 = 16 << 20;

/// A member with these TLS keys, the older one first.
fn rotated(member: Member, keys: &[&SigningKey]) -> Member {
    let keys: Vec<_> = keys.iter().map(|key| key.public_key()).collect();
    Member {
        tls_keys: TlsKeys::of(&keys).unwrap(),
        ..member
    }
}

fn credentials(key: &SigningKey) -> Credentials {
    Credentials::new(key, Validity::starting(0, Validity::LIFETIME_DEFAULT)).unwrap()
}

fn by_older_key(node: &Node) -> usize {
    let shards = node.transport.status().shards();
    shards.iter().map(|shard| shard.by_older_key).sum()
}

fn connection(node: &Node) -> u64 {
    node.transport.status().peers()[0].connection.0
}

/// Two connected nodes, the dialler first, and what versions of their topology are made from.
struct Two {
    nodes: [Node; 2],
    members: [Member; 2],
}

impl Two {
    fn start() -> Self {
        Self::naming(None)
    }

    /// The registry names this key of the listener beside its identity key, which it uses.
    fn naming(new_of_listener: Option<&SigningKey>) -> Self {
        let mut keys = [key(1), key(2)];
        keys.sort_by_key(SigningKey::node_id);
        let addresses = [free_addr(), free_addr()];
        let members = [0, 1].map(|n| member(&keys[n], addresses[n]));
        let mut named = members.clone();
        if let Some(new) = new_of_listener {
            named[1] = rotated(named[1].clone(), &[&keys[1], new]);
        }
        let first = topology(named, 1);
        let mut n = 0;
        let nodes = keys.map(|key| {
            n += 1;
            let config = TransportConfig::default();
            Node::start(key, addresses[n - 1], &first, config, POOL_BYTES)
        });
        nodes[0].wait_for_peers(&[nodes[1].id()]);
        nodes[1].wait_for_peers(&[nodes[0].id()]);
        Self { nodes, members }
    }

    /// A topology in which node `n` has these keys.
    fn name(&self, n: usize, keys: &[&SigningKey], version: u64) -> Arc<Topology> {
        let mut members = self.members.clone();
        members[n] = rotated(members[n].clone(), keys);
        topology(members, version)
    }
}

/// Rotates the key of node `n` while both nodes ask each other without a pause.
fn rotate_under_load(n: usize) {
    let two = Two::start();
    let [old, new] = [two.nodes[n].key.clone(), key(50)];
    let (is_over, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    // Also when an assertion below fails: the threads end with the scope.
    struct End<'f>(&'f AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let [a, b] = &two.nodes;
        let transports = [a, b].map(|node| &node.transport);
        for (asker, other) in [(a, b), (b, a)] {
            let (asker, peer) = (asker.transport.clone(), other.id());
            let (is_over, answered) = (&is_over, &answered);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let asked = request(ECHO, Class::Normal, vec![7; 100]);
                    let answer = asker.request(peer, asked).wait(PATIENCE);
                    assert!(answer.is_ok(), "{answer:?}");
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _end = End(&is_over);
        let both = two.name(n, &[&old, &new], 2);
        for transport in transports {
            assert!(transport.update_topology(&both));
        }
        let before = [connection(a), connection(b)];
        // Beside each other: a handshake by the old key may be under way.
        assert!(transports[n].set_credentials(&credentials(&new)).unwrap());
        eventually("replaced and drained", || {
            let is_new = connection(a) != before[0] && connection(b) != before[1];
            (is_new && by_older_key(&two.nodes[n]) == 0).then_some(())
        });

        let finished = two.name(n, &[&new], 3);
        let before = [connection(a), connection(b)];
        for transport in transports {
            assert!(transport.update_topology(&finished));
        }
        let so_far = answered.load(Ordering::Relaxed);
        eventually("answers go on", || {
            (answered.load(Ordering::Relaxed) > so_far + 100).then_some(())
        });
        assert_eq!([connection(a), connection(b)], before, "nothing was cut");
    });
    for node in &two.nodes {
        assert_eq!(node.reason(Family::Closed, "key_retired"), 0);
        assert_eq!(node.reason(Family::Closed, "peer_key_retired"), 0);
    }
}

// Protects requests: the node that dials gets a new key, and no request of either side fails.
#[test]
fn a_dialler_rotates_under_load() {
    rotate_under_load(0);
}

// Protects the same where the peer must dial again: it sees that the key of its connection is not
// the newest that the registry names.
#[test]
fn a_listener_rotates_under_load() {
    rotate_under_load(1);
}

// Protects the subnet from a key that was retired because it is in other hands: its connection is
// cut at the version that retires it, it is refused after, and the new one is the same node.
#[test]
fn a_retired_key_is_cut_and_refused() {
    let mut keys = [key(1), key(2)];
    keys.sort_by_key(SigningKey::node_id);
    let [dialler, listener] = keys;
    let new = key(50);
    let addr = free_addr();
    let members = [member(&dialler, free_addr()), member(&listener, addr)];
    let with = |keys: &[&SigningKey], version| {
        let [of_dialler, of_listener] = members.clone();
        topology([rotated(of_dialler, keys), of_listener], version)
    };
    let first = with(&[&dialler, &new], 1);
    let config = TransportConfig::default();
    let node = Node::start(listener, addr, &first, config, POOL_BYTES);
    // The first ID steers by the node's id, which the TLS key does not say.
    let id = initial_dcid(dialler.node_id().spread(), [9; 15]);
    let dial = |key: &SigningKey| Raw::dial_from("127.0.0.1:0", addr, &RawOptions::of(key), &id);
    // Connects as the member, whatever the key.
    let connect = |key: &SigningKey| {
        let mut raw = dial(key);
        raw.introduce();
        let is_up = |_: &mut _| node.transport.status().peer_ids() == [dialler.node_id()];
        assert!(raw.drive(LIMIT, is_up));
        raw
    };

    // Both are accepted while both are named.
    drop(connect(&new));
    let mut raw = connect(&dialler);
    assert!(node.transport.update_topology(&with(&[&new], 2)));
    assert!(raw.drive(LIMIT, |quic| quic.peer_error().is_some()));
    let heard = raw.quic.peer_error().unwrap();
    assert_eq!(
        (heard.is_app, heard.error_code),
        (true, CloseCode::KeyRetired as u64)
    );
    node.wait_for_peers(&[]);
    node.wait_for_reason(Family::Closed, "key_retired", 1);

    let mut retired = dial(&dialler);
    assert!(retired.drive(LIMIT, |quic| quic.peer_error().is_some()));
    // TLS alert `certificate_unknown`.
    assert_eq!(retired.quic.peer_error().unwrap().error_code, 0x100 + 46);
    node.wait_for_reason(Family::Refused, "not_in_registry", 1);

    connect(&new);
}

// Protects a dialler: it accepts either key while the registry names both, and a node that presents
// a retired one is refused, whatever its address is.
#[test]
fn a_listener_with_a_retired_key_is_refused() {
    let new = key(50);
    let two = Two::naming(Some(&new));
    let [dialler, listener] = &two.nodes;
    let finished = two.name(1, &[&new], 2);
    assert!(dialler.transport.update_topology(&finished));
    dialler.wait_for_reason(Family::Closed, "key_retired", 1);
    dialler.wait_for_reason(Family::Refused, "wrong_key", 1);
    listener.wait_for_peers(&[]);

    // It has the new one after all.
    assert!(
        listener
            .transport
            .set_credentials(&credentials(&new))
            .unwrap()
    );
    dialler.wait_for_peers(&[listener.id()]);
}
