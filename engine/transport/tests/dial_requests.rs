//! Dial requests on real sockets: a listener whose address no registry has is found by them, and no
//! other host gains by them.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use common::*;
use millrace_protocol::dial_request::Sealed;
use millrace_protocol::frame::Class;
use millrace_protocol::identity::SigningKey;
use millrace_protocol::topology::Topology;
use millrace_transport::TransportConfig;
use millrace_transport::counters::Counter;

const POOL_BYTES: u64 = 8 << 20;
/// Longest datagram of a handshake.
const DATAGRAM_BYTES_MAX: usize = 2_000;

/// Two keys; the first is the dialler's.
fn keys() -> [SigningKey; 2] {
    let mut keys = [key(1), key(2)];
    keys.sort_by_key(SigningKey::node_id);
    keys
}

fn socket(at: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(at).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
    let (bytes, _) = socket.recv_from(&mut datagram).expect("a datagram");
    datagram.truncate(bytes);
    datagram
}

fn is_empty(socket: &UdpSocket) -> bool {
    socket.set_nonblocking(true).unwrap();
    let is_empty = socket.recv_from(&mut [0; DATAGRAM_BYTES_MAX]).is_err();
    socket.set_nonblocking(false).unwrap();
    is_empty
}

/// Whether a client begins a QUIC connection with this datagram.
fn is_initial(datagram: &[u8]) -> bool {
    datagram.len() >= 1_200 && datagram[0] & 0xf0 == 0xc0
}

fn start(key: &SigningKey, at: SocketAddr, topology: &Arc<Topology>, connect: Duration) -> Node {
    let config = TransportConfig {
        connect_timeout: connect,
        ..TransportConfig::default()
    };
    Node::start(key.clone(), at, topology, config, POOL_BYTES)
}

#[test]
fn a_listener_that_restarts_at_another_address_is_dialled_there() {
    let [a, b] = keys();
    let (at, listed) = (free_addr(), free_addr());
    let topology = topology([member(&a, at), member(&b, listed)], 1);
    let dialler = start(&a, at, &topology, PATIENCE);
    let listener = start(&b, listed, &topology, PATIENCE);
    dialler.wait_for_peers(&[listener.id()]);
    drop(listener);
    for moved in [free_addr(), free_addr()] {
        let listener = start(&b, moved, &topology, PATIENCE);
        dialler.wait_for_peers(&[listener.id()]);
        listener.wait_for_peers(&[dialler.id()]);
        let body = request(ECHO, Class::Normal, dialler.body(100));
        let answer = dialler.transport.request(listener.id(), body);
        assert_eq!(bytes_of(&answer.wait(PATIENCE).unwrap()).len(), 100);
        let peers = dialler.transport.status().peers();
        assert_eq!(peers[0].address, Some(moved));
    }
}

// Protects diallers and third hosts: a request that is repeated has its new source dialled once,
// where the pinned key keeps it out; a second repetition, and a forged request, cause no dial.
#[test]
fn a_repeated_request_is_dialled_once_and_a_forged_one_never() {
    const ATTEMPT: Duration = Duration::from_millis(300);
    let [a, b] = keys();
    let at = free_addr();
    let [listed, first, second] = [(); 3].map(|()| socket(free_addr()));
    let of_listener = member(&b, listed.local_addr().unwrap());
    let topology = topology([member(&a, at), of_listener], 1);
    let sealed = {
        let tap = socket(at);
        let _listener = start(&b, free_addr(), &topology, PATIENCE);
        let datagram = receive(&tap);
        Sealed::read(&datagram).expect("a listener sends nothing else first")
    };
    let dialler = start(&a, at, &topology, ATTEMPT);
    assert!(is_initial(&receive(&listed)));
    first.send_to(sealed.as_bytes(), at).unwrap();
    assert!(is_initial(&receive(&first)));
    let mut forged = *sealed.as_bytes();
    // Its time: a later one would be fresh.
    forged[66] ^= 1;
    second.send_to(sealed.as_bytes(), at).unwrap();
    second.send_to(&forged, at).unwrap();
    dialler.wait_for_count(Counter::DialRequestsRefused, 1);
    // The next dials are of the address in the registry: the other failed, and is forgotten.
    let dials = dialler.count(Counter::Dials);
    dialler.wait_for_count(Counter::Dials, dials + 3);
    assert!(is_empty(&second));
    while !is_empty(&first) {}
    while !is_empty(&listed) {}
    dialler.wait_for_count(Counter::Dials, dials + 4);
    assert!(is_initial(&receive(&listed)));
    assert!(is_empty(&first));
}
