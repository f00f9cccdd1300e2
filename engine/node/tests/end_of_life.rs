//! A node that is dropped leaves nothing behind. One test: it counts the threads of its process.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use millrace_node::config::{Cores, HugePages};
use millrace_node::{ByteSize, Draft, Method, Node, NodeConfig, NodeParts, RpcError, keys};
use millrace_node::{Class, Payload, SigningKey};
use millrace_testkit::wait::within;

const PATIENCE: Duration = Duration::from_secs(30);
/// A second is promised; ten times of it is allowed.
const FREED: Duration = Duration::from_secs(10);

/// Without the one that watches the shards of all nodes of the process; it ends with the process.
fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| {
        // A thread may end meanwhile.
        std::fs::read_to_string(task.unwrap().path().join("comm")).ok()
    });
    let names = names.map(|name| name.trim().to_owned());
    names.filter(|name| name != "millrace-watch").collect()
}

fn start(folder: &Path, registry: &SigningKey) -> Node {
    let mut config = NodeConfig::default();
    config.listen.address = "127.0.0.1:0".parse().unwrap();
    config.shards.cores = Cores::List(vec![0]);
    config.shards.defaults.chunk_pool_bytes = ByteSize::mib(8);
    config.shards.defaults.huge_pages = HugePages::Never;
    let key = keys::generate().unwrap();
    let socket = folder.join(format!("{}.sock", key.node_id()));
    let mut parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
    parts.admin_socket = Some(socket);
    Node::start(&config, parts).unwrap()
}

#[test]
fn the_last_handle_takes_threads_address_and_socket_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let registry = keys::generate().unwrap();
    let before = threads().len();
    let (one, two) = (
        start(folder.path(), &registry),
        start(folder.path(), &registry),
    );
    let nodes = [&one, &two].map(|node| (node.public_key(), node.address()));
    let draft = Draft::with_nodes("test", &nodes).unwrap();
    let version = draft.sign(&registry).unwrap();
    for node in [&one, &two] {
        assert!(node.offer_version(version.clone()).unwrap());
    }
    one.wait_for_peers(1, PATIENCE).unwrap();
    let names = threads();
    for name in ["millrace-admin", "millrace-regis"] {
        let of_name = names.iter().filter(|thread| thread.starts_with(name));
        assert!(of_name.count() >= 2, "{names:?}");
    }

    let (address, peer) = (one.address(), two.id());
    let transport = one.transport().clone();
    let again = one.clone();
    drop(one);
    again.wait_for_peer(peer, PATIENCE).unwrap();
    drop(again);
    let left = two
        .transport()
        .status()
        .wait(PATIENCE, |peers| peers.is_empty());
    assert!(left, "the peer was not told");
    drop(two);

    let names = within(FREED, || (threads().len() == before).then_some(()));
    assert_eq!(names, Some(()), "{:?}", threads());
    let bound = within(FREED, || UdpSocket::bind(address).ok());
    assert!(bound.is_some(), "{address} is still taken");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    // A handle of the transport that is left over does no harm.
    let ask = millrace_node::Request {
        class: Class::Normal,
        method: Method(0x1000),
        body: Payload::Empty,
        deadline: PATIENCE,
    };
    let answer = transport.request(peer, ask).wait(PATIENCE);
    assert_eq!(answer.unwrap_err(), RpcError::LocalShuttingDown);
}
