//! Artifacts between nodes: who has one, and who only says that it does not come.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use futures_lite::future::block_on;
use millrace_node::reference::{FetchError, of_body};
use millrace_node::{ByteSize, Node, NodeParts, RpcError, keys};

/// Protects an operator: an artifact that a peer has, but does not come now, is not called absent.
#[test]
fn an_artifact_that_does_not_come_is_unavailable_and_not_absent() {
    const LENGTH: usize = 3 << 20;
    let registry = keys::generate().unwrap();
    let ([has, asks], _) = common::pair(&registry, |index| {
        let mut config = common::config();
        if index == 1 {
            config.transport.body_bytes_max = ByteSize::mib(1);
            config.transport.receive_budget_peer_bytes = ByteSize::mib(1);
        }
        let key = keys::generate().unwrap();
        let parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
        Node::start(&config, parts).unwrap()
    });
    let body = has.body(&vec![7; LENGTH]).unwrap();
    let id = of_body(&body);
    let fetch = || block_on(asks.artifacts().fetch(id));
    assert_eq!(fetch().unwrap_err(), FetchError::NotFound { asked: 1 });
    let deliveries = block_on(has.artifacts().publish(id, body)).unwrap();
    assert!(!deliveries[0].1.is_there(), "{deliveries:?}");
    let body_bytes = LENGTH as u64;
    let last = RpcError::LocalAnswerTooLarge { body_bytes };
    assert_eq!(fetch().unwrap_err(), FetchError::Unavailable { last });
}
