//! Two network namespaces and a cable: a node on one end, everybody else on the other.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use millrace_edge::edge::Edge;
use millrace_edge::pins::Pins;
pub use millrace_testkit::Namespace;
use millrace_testkit::sockets::connect_from;

use super::{eventually, skip};

/// The node, on interface `mr0`.
pub const NODE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The remote host, on interface `mr1`: an operator, whom most tests allow by a rule.
pub const OPERATOR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The remote host again: an address that no rule names.
pub const NON_MEMBER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 66);

/// Whether the test can run here; says what it lacks otherwise.
pub fn privileged(test: &str) -> bool {
    skip::has_all(test, &millrace_edge::privileges::missing())
}

/// The two of them.
#[derive(Debug)]
pub struct Pair {
    pub node: Namespace,
    pub remote: Namespace,
}

impl Pair {
    pub fn new(label: &str) -> Self {
        let pair = Self {
            node: Namespace::new(label),
            remote: Namespace::new(label),
        };
        pair.plug();
        pair
    }

    /// Makes the cable, again if it was removed: its ends are new interfaces then.
    pub fn plug(&self) {
        let remote = &self.remote.name;
        self.node.ip(&format!(
            "link add mr0 type veth peer name mr1 netns {remote}"
        ));
        self.node.ip(&format!("addr add {NODE}/24 dev mr0"));
        for address in [OPERATOR, NON_MEMBER] {
            self.remote.ip(&format!("addr add {address}/24 dev mr1"));
        }
        self.node.ip("link set mr0 up");
        self.remote.ip("link set mr1 up");
        // The kernel lets packets out some time after that: what is sent before is lost, and said
        // again after a second.
        for (namespace, interface) in [(&self.node, "mr0"), (&self.remote, "mr1")] {
            eventually("the cable carries packets", || {
                let shown = namespace.ip(&format!("link show dev {interface}"));
                shown.contains("state UP").then_some(())
            });
        }
    }

    /// Removes the cable with both its ends.
    pub fn unplug(&self) {
        self.node.ip("link del mr0");
    }

    /// A TCP connection to the node from an address of the remote host, or why there is none after
    /// so long.
    pub fn connect(
        &self,
        from: Ipv4Addr,
        port: u16,
        patience: Duration,
    ) -> std::io::Result<TcpStream> {
        let from = SocketAddr::new(from.into(), 0);
        let to = SocketAddr::new(NODE.into(), port);
        self.remote.enter(|| connect_from(from, to, patience))
    }
}

/// A folder of pins; what is pinned there is detached when this is dropped.
#[derive(Debug)]
pub struct Pinned(pub PathBuf);

impl Pinned {
    pub fn pins(&self) -> Pins {
        Pins::at(&self.0)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = Edge::detach(&self.pins());
    }
}

/// The output of a program that must succeed.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    millrace_testkit::netns::output(Command::new(program).args(arguments))
}
