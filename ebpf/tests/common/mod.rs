//! Network namespaces that tests make and remove.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "each test takes what it needs"
)]

pub mod cpu;
pub mod edge;
pub mod flood;
pub mod mocked;
pub mod node;
pub mod process;
pub mod sets;

pub use millrace_testkit::netns::output as ok;
pub use millrace_testkit::{Namespace, PATIENCE, skip, until};

/// Whether the test can run here; otherwise it reports what is missing.
pub fn privileged(test: &str) -> bool {
    skip::has_all(test, &millrace_edge::privileges::missing())
}

/// Two namespaces, joined by a veth pair.
#[derive(Debug)]
pub struct Pair {
    /// The node: interface `mr0`, 10.77.0.1 and fd77::1.
    pub node: Namespace,
    /// The remote host: interface `mr1`, 10.77.0.2 and fd77::2.
    pub remote: Namespace,
}

pub const NODE: &str = "10.77.0.1";
pub const REMOTE: &str = "10.77.0.2";

impl Pair {
    pub fn new(label: &str) -> Self {
        let pair = Self {
            node: Namespace::new(label),
            remote: Namespace::new(label),
        };
        let remote = &pair.remote.name;
        pair.node.ip(&format!(
            "link add mr0 type veth peer name mr1 netns {remote}"
        ));
        for (namespace, interface, host) in [(&pair.node, "mr0", 1), (&pair.remote, "mr1", 2)] {
            namespace.ip(&format!("addr add 10.77.0.{host}/24 dev {interface}"));
            namespace.ip(&format!("addr add fd77::{host}/64 dev {interface} nodad"));
            namespace.ip(&format!("link set {interface} up"));
        }
        // The kernel sends packets only some time after that: it would lose an earlier one, which
        // is repeated after a second.
        for (namespace, interface) in [(&pair.node, "mr0"), (&pair.remote, "mr1")] {
            until("the cable carries packets", || {
                let shown = namespace.ip(&format!("link show dev {interface}"));
                shown.contains("state UP")
            });
        }
        pair
    }
}
