//! A node that is dropped leaves nothing behind. One test: it counts the threads of its process.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use millrace_node::{
    Answer, Class, Defer, FIRST_FREE_METHOD, Inbound, Method, Node, NodeParts, Payload, Period,
    Request, Responder, RpcError, Service, SigningKey, keys,
};
use millrace_testkit::wait::within;
use millrace_testkit::{PATIENCE, threads};

use common::config;

/// A second is promised; ten times of it is allowed.
const FREED: Duration = Duration::from_secs(10);
/// Far beyond what is promised: a drop that waits for what is under way would be seen.
const DRAIN_TIMEOUT: Period = Period::secs(60);

/// Is never answered.
const HANG: Method = FIRST_FREE_METHOD;

/// Keeps its requests.
struct Hanging {
    heard: Sender<()>,
    requests: Vec<Responder>,
}

impl Service for Hanging {
    fn on_request(&mut self, _request: Inbound<'_>, defer: Defer<'_>) -> Answer {
        self.requests.extend(defer.responder());
        self.heard.send(()).unwrap();
        Answer::Deferred
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}
}

fn hang() -> Request {
    Request {
        class: Class::Normal,
        method: HANG,
        body: Payload::Empty,
        deadline: DRAIN_TIMEOUT.get().into(),
    }
}

/// A node, and what it says of each request that hangs there.
fn start(folder: &Path, registry: &SigningKey) -> (Node, Receiver<()>) {
    let mut config = config();
    config.transport.drain_timeout = DRAIN_TIMEOUT;
    let key = keys::generate().unwrap();
    let socket = folder.join(format!("{}.sock", key.node_id()));
    let mut parts = NodeParts::in_memory(&config, key, registry.public_key()).unwrap();
    parts.admin_socket = Some(socket);
    let (sender, heard) = channel();
    let parts = parts.serve(HANG..=HANG, move |_| Hanging {
        heard: sender.clone(),
        requests: Vec::new(),
    });
    (Node::start(&config, parts).unwrap(), heard)
}

#[test]
fn the_last_handle_takes_threads_address_and_socket_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let registry = keys::generate().unwrap();
    let before = threads().len();
    let mut heard = Vec::new();
    let ([one, two], _) = common::pair(&registry, |_| {
        let (node, hears) = start(folder.path(), &registry);
        heard.push(hears);
        node
    });
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
    // What hangs is not waited for: in a peer's service, in a service here, an admin client.
    let asks = again.request(peer, hang());
    heard[1].recv_timeout(PATIENCE).unwrap();
    let asked = two.request(again.id(), hang());
    heard[0].recv_timeout(PATIENCE).unwrap();
    let socket = folder.path().join(format!("{}.sock", again.id()));
    let _silent = UnixStream::connect(socket).unwrap();
    let dropped_at = Instant::now();
    drop(again);
    assert!(dropped_at.elapsed() < FREED, "the drop waited");
    let bound = within(FREED, || UdpSocket::bind(address).ok());
    assert!(bound.is_some(), "{address} is still taken");
    for answer in [asks, asked] {
        let lost = answer.wait(PATIENCE).unwrap_err();
        let ends = [RpcError::ConnectionLost, RpcError::LocalShuttingDown];
        assert!(ends.contains(&lost), "{lost}");
    }
    let left = two
        .transport()
        .status()
        .wait(PATIENCE, |peers| peers.is_empty());
    assert!(left, "the peer was not told");
    drop(two);

    let names = within(FREED, || (threads().len() == before).then_some(()));
    assert_eq!(names, Some(()), "{:?}", threads());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    // A handle of the transport that is left over does no harm.
    let answer = transport.request(peer, hang()).wait(PATIENCE);
    assert_eq!(answer.unwrap_err(), RpcError::LocalShuttingDown);
}
