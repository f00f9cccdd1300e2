//! A service that panics takes its shard down. The rest of the process learns of it.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::path::Path;

use millrace_node::admin::client::get_text;
use millrace_node::{
    Answer, Class, Defer, FIRST_FREE_METHOD, Inbound, Node, NodeParts, NotReady, Payload, Service,
    SigningKey, keys,
};
use millrace_testkit::{PATIENCE, until};

struct Panicking;

impl Service for Panicking {
    fn on_request(&mut self, _request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        panic!("this service panics, as its test wants it");
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}
}

fn start(registry: &SigningKey, admin_socket: &Path) -> Node {
    let config = common::config();
    let key = keys::generate().unwrap();
    let mut parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
    parts.admin_socket = Some(admin_socket.to_owned());
    let methods = FIRST_FREE_METHOD..=FIRST_FREE_METHOD;
    Node::start(&config, parts.serve(methods, |_| Panicking)).unwrap()
}

/// Protects operators and embedders: a node whose shard is gone does not say that it is well.
#[test]
fn a_node_whose_shard_panicked_is_not_ready_and_has_no_peers() {
    let registry = keys::generate().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let sockets = ["asker", "broken"].map(|name| folder.path().join(name));
    let ([asker, broken], _) = common::pair(&registry, |index| start(&registry, &sockets[index]));
    assert_eq!(broken.readiness(), Ok(()));
    assert_eq!(get_text(&sockets[1], "/healthz").unwrap(), "ok\n");

    let method = FIRST_FREE_METHOD;
    let answer = asker.ask(broken.id(), Class::Normal, method, Payload::Empty, PATIENCE);
    assert!(answer.is_err());
    until("the broken node says so", || broken.readiness().is_err());
    assert_eq!(broken.readiness(), Err(NotReady::ShardEnded { shard: 0 }));
    assert_eq!(broken.health(), Err(NotReady::ShardEnded { shard: 0 }));
    let refused = get_text(&sockets[1], "/healthz").unwrap_err().to_string();
    assert!(refused.contains("shard 0 has ended"), "{refused}");
    assert!(broken.peers().is_empty());
    assert_eq!(
        broken
            .status()
            .not_ready_because
            .map(|why| why.contains("shard 0")),
        Some(true)
    );
    // The other node is well: it only lost its peer.
    until("the peer is gone", || asker.peers().is_empty());
    assert_eq!(asker.readiness(), Err(NotReady::NoPeer));
    assert_eq!(asker.health(), Ok(()));
    // What is left of the broken one ends all the same.
    broken.shutdown();
}
