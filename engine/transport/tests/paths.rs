//! Paths through network namespaces: hosts of several addresses, both IP versions, an MTU that is
//! smaller than the nodes' packets. They take root, iproute2 and nftables.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use common::*;
use millrace_protocol::frame::Class;
use millrace_protocol::identity::SigningKey;
use millrace_testkit::netns::Namespace;
use millrace_testkit::skip::skip;
use millrace_transport::TransportConfig;

const POOL_BYTES: u64 = 64 << 20;
const BODY_BYTES: usize = 4 << 20;
/// Each end of the link, in its namespace.
const DEVICE: &str = "veth0";

/// A host on one link, with two addresses of each IP version. The kernel sends from the first,
/// unless it is told otherwise.
struct Host {
    namespace: Namespace,
    second4: IpAddr,
    second6: IpAddr,
}

impl Host {
    fn new(label: &str, number: u8) -> Self {
        Self {
            namespace: Namespace::new(label),
            second4: IpAddr::from([10, 9, 0, 100 + number]),
            second6: format!("fd09::1:{number}").parse().unwrap(),
        }
    }

    fn open(&self, number: u8, mtu: u32) {
        for address in [
            format!("10.9.0.{number}/24"),
            format!("{}/24", self.second4),
        ] {
            self.namespace
                .ip(&format!("addr add {address} dev {DEVICE}"));
        }
        for address in [format!("fd09::{number}/64"), format!("{}/64", self.second6)] {
            self.namespace
                .ip(&format!("addr add {address} dev {DEVICE} nodad"));
        }
        self.namespace
            .ip(&format!("link set {DEVICE} mtu {mtu} up"));
        // Before the kernel puts fragments together.
        self.namespace.nft("add table ip watch");
        self.namespace
            .nft("add chain ip watch in { type filter hook prerouting priority -450 ; }");
        self.namespace
            .nft("add rule ip watch in ip frag-off & 0x3fff != 0 counter");
    }

    fn fragments(&self) -> u64 {
        let listed = self.namespace.nft("list chain ip watch in");
        let mut words = listed.split_whitespace();
        words.find(|word| *word == "packets").unwrap();
        words.next().unwrap().parse().unwrap()
    }

    fn start(&self, key: &SigningKey, local: &str, members: &[(SigningKey, SocketAddr)]) -> Node {
        let local = local.parse().unwrap();
        let members = members.iter().map(|(key, address)| member(key, *address));
        let topology = topology(members, 1);
        let key = key.clone();
        self.namespace.enter(|| {
            let config = TransportConfig::default();
            Node::start(key, local, &topology, config, POOL_BYTES)
        })
    }
}

/// Two hosts joined by a link of this MTU; `None` and a skip without the rights for it.
fn hosts(test: &str, mtu: u32) -> Option<[Host; 2]> {
    if !is_root() {
        skip(test, "root");
        return None;
    }
    let [near, far] = [Host::new("near", 1), Host::new("far", 2)];
    let far_end = format!("peer name {DEVICE} netns {}", far.namespace.name);
    near.namespace
        .ip(&format!("link add {DEVICE} type veth {far_end}"));
    near.open(1, mtu);
    far.open(2, mtu);
    Some([near, far])
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Keys of which the first has the lower id and so dials.
fn ordered_keys() -> [SigningKey; 2] {
    let mut keys = [key(1), key(2)];
    keys.sort_by_key(SigningKey::node_id);
    keys
}

/// Starts a node on each host and sends a body each way. The first node dials; both are members by
/// the address that `address` chooses.
fn exchange(hosts: [&Host; 2], listen: [&str; 2], address: impl Fn(&Host) -> IpAddr) {
    // A port is free again only some time after its node has ended.
    static PORTS: AtomicU16 = AtomicU16::new(4_100);
    let port = PORTS.fetch_add(1, Ordering::Relaxed);
    let keys = ordered_keys();
    let addresses = hosts.map(|host| SocketAddr::new(address(host), port));
    let locals = listen.map(|address| format!("{address}:{port}"));
    let members = [
        (keys[0].clone(), addresses[0]),
        (keys[1].clone(), addresses[1]),
    ];
    let dialler = hosts[0].start(&keys[0], &locals[0], &members);
    let listener = hosts[1].start(&keys[1], &locals[1], &members);
    dialler.wait_for_peers(&[listener.id()]);
    listener.wait_for_peers(&[dialler.id()]);
    for [from, to] in [[&dialler, &listener], [&listener, &dialler]] {
        let body = request(ECHO, Class::Bulk, from.body(BODY_BYTES));
        let answer = from.transport.request(to.id(), body).wait(PATIENCE);
        assert_eq!(bytes_of(&answer.unwrap()).len(), BODY_BYTES);
    }
}

/// Protects hosts of several addresses: a node answers from the one that its peer asked.
#[test]
fn nodes_at_open_addresses_are_reached_at_any_address_of_their_hosts() {
    let Some([near, far]) = hosts("open addresses", 1_500) else {
        return;
    };
    for [dialler, listener] in [[&near, &far], [&far, &near]] {
        for listen in [
            ["0.0.0.0", "0.0.0.0"],
            ["0.0.0.0", "[::]"],
            ["[::]", "0.0.0.0"],
            ["[::]", "[::]"],
        ] {
            exchange([dialler, listener], listen, |host| host.second4);
        }
        exchange([dialler, listener], ["[::]", "[::]"], |host| host.second6);
    }
    assert_eq!([near.fragments(), far.fragments()], [0, 0]);
}

/// Protects RFC 9000, 14: no datagram is fragmented, also not IPv4 by an IPv6 socket. 1,280 is the
/// least MTU of IPv6.
#[test]
fn bodies_pass_a_link_with_a_small_mtu_without_fragments() {
    for mtu in [1_400, 1_280] {
        let Some([near, far]) = hosts("a small MTU", mtu) else {
            return;
        };
        for listen in ["0.0.0.0", "[::]"] {
            exchange([&near, &far], [listen, listen], |host| host.second4);
            assert_eq!([near.fragments(), far.fragments()], [0, 0], "{listen}");
        }
        exchange([&near, &far], ["[::]", "[::]"], |host| host.second6);
    }
}
