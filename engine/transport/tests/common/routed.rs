//! Two hosts with a router between them, in network namespaces. Its link to the far host is the
//! narrow one: of a limited rate, and of an MTU that changes.

use std::net::IpAddr;
use std::process::Command;

use millrace_testkit::netns::{Namespace, output};

/// The end of a link at a host.
const DEVICE: &str = "veth0";
/// The router's end of the narrow link.
const NARROW: &str = "veth1";

/// Two hosts and a router.
pub(crate) struct Routed {
    pub(crate) near: Namespace,
    pub(crate) router: Namespace,
    pub(crate) far: Namespace,
}

impl Routed {
    /// A link of 40 Mbit/s: slow enough for any host that runs the test, so that rates compare.
    pub(crate) fn new() -> Self {
        let routed = Self {
            near: Namespace::new("near"),
            router: Namespace::new("router"),
            far: Namespace::new("far"),
        };
        let router = &routed.router;
        for (host, network, device) in [(&routed.near, 1, DEVICE), (&routed.far, 2, NARROW)] {
            let end = format!("peer name {DEVICE} netns {}", host.name);
            router.ip(&format!("link add {device} type veth {end}"));
            for (namespace, device, last) in [(router, device, 254), (host, DEVICE, 1)] {
                let v4 = format!("10.8.{network}.{last}/24");
                let v6 = format!("fd08:{network}::{last}/64");
                namespace.ip(&format!("addr add {v4} dev {device}"));
                namespace.ip(&format!("addr add {v6} dev {device} nodad"));
                namespace.ip(&format!("link set {device} up"));
            }
            host.ip(&format!("route add default via 10.8.{network}.254"));
            host.ip(&format!("-6 route add default via fd08:{network}::254"));
        }
        router.enter(|| {
            for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{file}"), "1").unwrap();
            }
            let limit = "rate 40mbit burst 64kb latency 50ms";
            let arguments = format!("qdisc add dev {NARROW} root tbf {limit}");
            output(Command::new("tc").args(arguments.split_whitespace()));
        });
        routed
    }

    /// The address of a host, by the version of IP.
    pub(crate) fn addresses(&self, is_ipv6: bool) -> [IpAddr; 2] {
        [1, 2].map(|network| {
            if is_ipv6 {
                format!("fd08:{network}::1").parse().unwrap()
            } else {
                IpAddr::from([10, 8, network, 1])
            }
        })
    }

    /// The router counts the ICMP messages by which it says that a packet is too large, and drops
    /// them if it `is_silent`.
    pub(crate) fn watch_icmp(&self, is_silent: bool) {
        let verdict = if is_silent { "drop" } else { "accept" };
        let router = &self.router;
        router.nft("add table inet watch");
        router.nft("add chain inet watch out { type filter hook output priority 0 ; }");
        for kind in [
            "icmp type destination-unreachable",
            "icmpv6 type packet-too-big",
        ] {
            router.nft(&format!("add rule inet watch out {kind} counter {verdict}"));
        }
    }

    /// How many packets were too large for the router, as far as it says so.
    pub(crate) fn too_large(&self) -> u64 {
        let listed = self.router.nft("list chain inet watch out");
        let words: Vec<_> = listed.split_whitespace().collect();
        let counts = words.windows(2).filter(|pair| pair[0] == "packets");
        counts.map(|pair| pair[1].parse::<u64>().unwrap()).sum()
    }

    /// Sets the MTU of the narrow link.
    pub(crate) fn set_mtu(&self, mtu: u32) {
        self.router.ip(&format!("link set {NARROW} mtu {mtu}"));
    }
}
