//! Artifacts between nodes: who has one, and who only says that it does not come.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;

use futures_lite::future::block_on;
use millrace_node::reference::{Delivery, FetchError, of_body};
use millrace_node::{
    ArtifactId, ByteSize, Draft, Method, Node, NodeConfig, NodeParts, RpcError, ShardConfig,
    SigningKey, keys,
};
use millrace_protocol::topology::{Member, Topology};
use millrace_shards::socket::UdpGroupConfig;
use millrace_testkit::{PATIENCE, free_addr};
use millrace_transport::{
    Answer, Defer, EdgeStart, Inbound, Responder, Router, Service, Transport, TransportConfig,
    TransportStart,
};

/// Two nodes that are connected; `change`: the config of the second one.
fn pair(change: fn(&mut NodeConfig)) -> [Node; 2] {
    let registry = keys::generate().unwrap();
    let start = |index| {
        let mut config = common::config();
        if index == 1 {
            change(&mut config);
        }
        let key = keys::generate().unwrap();
        let parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
        Node::start(&config, parts).unwrap()
    };
    common::pair(&registry, start).0
}

/// Protects an operator: an artifact that a peer has, but does not come now, is not called absent.
#[test]
fn an_artifact_that_does_not_come_is_unavailable_and_not_absent() {
    const LENGTH: usize = 3 << 20;
    let [has, asks] = pair(|config| {
        config.transport.body_bytes_max = ByteSize::mib(1);
        config.transport.receive_budget_peer_bytes = ByteSize::mib(1);
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

// Protects the artifacts of all from a member that puts without end: it drops its own, and status
// and metrics say whose were dropped.
#[test]
fn a_member_that_puts_without_end_drops_its_own_artifacts() {
    let [floods, holds] = pair(|config| config.artifacts.store_bytes = ByteSize::mib(1));
    let put = |node: &Node, n: u8| {
        let body = node.body(&[n; 10]).unwrap();
        let id = of_body(&body);
        let deliveries = block_on(node.artifacts().publish(id, body)).unwrap();
        assert!(deliveries[0].1.is_there(), "{deliveries:?}");
        id
    };
    let own = put(&holds, 0);
    // Each takes 64 KiB.
    let put: Vec<_> = (1..=20).map(|n| put(&floods, n)).collect();
    let held = |id| holds.artifacts().held(id).is_some();
    assert!(held(&own) && !held(&put[4]) && held(&put[5]));
    let publisher = floods.id().to_string();
    let usage = holds.status().artifacts;
    assert_eq!(usage.dropped_of, [(publisher.clone(), 5)].into());
    let line = format!("millrace_artifacts_dropped_total{{publisher=\"{publisher}\"}} 5");
    let metrics = holds.metrics().unwrap();
    assert!(metrics.lines().any(|one| one == line), "{line}");
}

/// A member that connects, and answers nothing but the transport's own questions.
fn silent_member(key: SigningKey, address: SocketAddr, topology: Topology) -> Transport {
    struct Silent(Vec<Responder>);
    impl Service for Silent {
        fn on_request(&mut self, _: Inbound<'_>, defer: Defer<'_>) -> Answer {
            self.0.extend(defer.responder());
            Answer::Deferred
        }

        fn on_send(&mut self, _: Inbound<'_>) {}
    }
    let start = TransportStart {
        identity: key,
        tls: None,
        config: TransportConfig::default(),
        shards: vec![ShardConfig::default()],
        udp: UdpGroupConfig {
            local: address,
            ..UdpGroupConfig::default()
        },
        topology: Arc::new(topology),
        paths: Vec::new(),
        edge: EdgeStart::default(),
    };
    let methods = Method(1)..=Method(0xff);
    let services = move |_| Router::new().serve(methods.clone(), Silent(Vec::new()));
    Transport::start(start, services).unwrap()
}

// Protects nodes that publish and fetch from a member that answers nothing: it costs the time of a
// small question, and then it is asked last; status and metrics say so. What another peer holds
// comes.
#[test]
fn a_member_that_answers_nothing_is_asked_last() {
    let registry = keys::generate().unwrap();
    let identities = [0, 1, 2].map(|_| keys::generate().unwrap());
    let addresses = [0, 1, 2].map(|_| free_addr());
    let known: Vec<_> = identities
        .iter()
        .map(SigningKey::public_key)
        .zip(addresses)
        .collect();
    let draft = Draft::with_nodes("test", &known).unwrap();
    let version = draft.sign(&registry).unwrap();
    let start = |index: usize| {
        let mut config = common::config();
        config.listen.address = addresses[index];
        let key = SigningKey::from_seed(*identities[index].seed());
        let parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
        let node = Node::start(&config, parts).unwrap();
        assert!(node.offer_version(version.clone()).unwrap());
        node
    };
    let members = known
        .iter()
        .map(|(public_key, address)| Member::new(*public_key, vec![*address]));
    let [.., key] = &identities;
    let silent = key.node_id();
    let key = SigningKey::from_seed(*key.seed());
    let _silent = silent_member(key, addresses[2], Topology::from_members(members, 1));

    let has = start(0);
    has.wait_for_peer(silent, PATIENCE).unwrap();
    let body = has.body(&vec![7; 1 << 20]).unwrap();
    let id = of_body(&body);
    let deliveries = block_on(has.artifacts().publish(id, body)).unwrap();
    assert_eq!(deliveries, [(silent, Delivery::Failed("timeout"))]);

    let asks = start(1);
    asks.wait_for_peers(2, PATIENCE).unwrap();
    let fetch = |id| block_on(asks.artifacts().fetch(id));
    let absent = ArtifactId::from_bytes([9; 32]);
    let last = RpcError::Timeout;
    assert_eq!(fetch(absent).unwrap_err(), FetchError::Unavailable { last });
    assert_eq!(fetch(id).unwrap().len(), 1 << 20);
    for peer in asks.status().peers {
        let is_silent = peer.node_id == silent.to_string();
        assert_eq!(peer.is_asked_last, is_silent, "{}", peer.node_id);
        assert_eq!(peer.score < 0.0, is_silent, "{}", peer.score);
        assert!(!peer.is_banned);
    }
    let metrics = asks.metrics().unwrap();
    let expected = [
        "millrace_peers_asked_last 1",
        "millrace_peers_banned 0",
        "millrace_artifacts_asked_total{outcome=\"stalled\"} 1",
        "millrace_artifacts_asked_total{outcome=\"served\"} 1",
        "millrace_artifacts_asked_total{outcome=\"invalid\"} 0",
    ];
    for line in expected {
        assert!(metrics.lines().any(|one| one.starts_with(line)), "{line}");
    }
}
