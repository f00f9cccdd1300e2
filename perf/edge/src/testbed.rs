//! Two namespaces joined by a veth pair: the attacker's, which the honest client shares, and the
//! node's.
//!
//! The attacker's end always carries a native XDP program: without one, the node's XDP_TX would be
//! counted as sent and never arrive. The node's end carries the filter; when that is no XDP
//! program, GRO is on instead, because only then does the veth take redirected frames.

use std::net::Ipv4Addr;
use std::os::fd::AsFd;

use ipnet::Ipv4Net;
use libbpf_rs::{Xdp, XdpFlags};
use millrace_edge::interface::index_of;
use serde::Deserialize;

use crate::Result;
#[cfg(feature = "goodput")]
use crate::cpu;
use crate::namespace::{Inside, Namespace, run};
use crate::receiver::Receiver;

/// Addresses of the range for benchmarks (RFC 2544).
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
pub(crate) const CLIENT_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
pub(crate) const NODE_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 2];
/// Honest clients: [`CLIENT`], and those that connect during the attack. Every filter lists them.
pub(crate) const HONEST: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 15);
const CLIENT_DEVICE: &str = "attacker";
const NODE_DEVICE: &str = "node";
/// The largest that a veth takes with XDP and without fragments.
const MTU: &str = "1500";

/// Both ends, and the programs at the attacker's.
#[derive(Debug)]
pub(crate) struct Testbed {
    client: Namespace,
    node: Namespace,
    client_index: u32,
    node_index: u32,
}

/// Packets that a device has received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) packets: u64,
    /// Ring full: the generator outran the receiver.
    pub(crate) dropped: u64,
}

impl Testbed {
    /// Makes namespaces, devices, addresses and neighbours.
    pub(crate) fn build(receiver: &Receiver<'_>) -> Result<Self> {
        let client = Namespace::make("client")?;
        let node = Namespace::make("node")?;
        let peer = ["netns", node.name()];
        let mut add = vec!["link", "add", CLIENT_DEVICE, "netns", client.name()];
        add.extend([
            "mtu",
            MTU,
            "type",
            "veth",
            "peer",
            "name",
            NODE_DEVICE,
            "mtu",
            MTU,
        ]);
        add.extend(peer);
        run("ip", &add)?;
        let client_index = set_up(&client, CLIENT_DEVICE, CLIENT_MAC, CLIENT, (NODE, NODE_MAC))?;
        let node_index = set_up(&node, NODE_DEVICE, NODE_MAC, NODE, (CLIENT, CLIENT_MAC))?;
        let testbed = Self {
            client,
            node,
            client_index,
            node_index,
        };
        {
            let _client = testbed.client.enter()?;
            Xdp::new(receiver.attacker().as_fd())
                .attach(i32::try_from(client_index)?, XdpFlags::DRV_MODE)?;
            // A native program at the node's end turns these off. With these on and without such a
            // program, the client's packets would bypass the ring that the attack fills.
            for offload in ["tso", "tx-udp-segmentation"] {
                run("ethtool", &["-K", CLIENT_DEVICE, offload, "off"])?;
            }
        }
        {
            let _node = testbed.node.enter()?;
            // Answers to made-up sources leave by the attacker's end, and no source is refused for
            // its route.
            run(
                "ip",
                &["route", "add", "default", "via", &CLIENT.to_string()],
            )?;
            for scope in ["all", NODE_DEVICE] {
                run(
                    "sysctl",
                    &["-qw", &format!("net.ipv4.conf.{scope}.rp_filter=0")],
                )?;
            }
            run("ethtool", &["-K", NODE_DEVICE, "gro", "on"])?;
        }
        Ok(testbed)
    }

    pub(crate) fn enter_client(&self) -> Result<Inside> {
        self.client.enter()
    }

    pub(crate) fn enter_node(&self) -> Result<Inside> {
        self.node.enter()
    }

    /// Index of the attacker's end in its namespace.
    pub(crate) fn client_index(&self) -> u32 {
        self.client_index
    }

    /// Index of the node's end in its namespace.
    pub(crate) fn node_index(&self) -> u32 {
        self.node_index
    }

    /// Adds addresses of honest clients to the attacker's end.
    #[cfg(feature = "goodput")]
    pub(crate) fn settle(&self, clients: impl Iterator<Item = Ipv4Addr>) -> Result<()> {
        let _client = self.client.enter()?;
        for client in clients {
            let address = format!("{client}/32");
            run("ip", &["address", "add", &address, "dev", CLIENT_DEVICE])?;
        }
        Ok(())
    }

    /// Makes a thread of its own receive for the node, on `cpu`, as far from the attacker's core as
    /// a network card is.
    #[cfg(feature = "goodput")]
    pub(crate) fn receive_on(&self, cpu: usize) -> Result<()> {
        // sysfs shows the devices of the namespace that mounted it.
        let script =
            format!("mount -t sysfs none /sys && echo 1 > /sys/class/net/{NODE_DEVICE}/threaded");
        {
            let _node = self.node.enter()?;
            run("unshare", &["--mount", "sh", "-c", &script])?;
        }
        let threads = cpu::threads_named(&format!("napi/{NODE_DEVICE}-"))?;
        if threads.is_empty() {
            return Err("the kernel started no thread for the node's device".into());
        }
        for thread in threads {
            cpu::pin(Some(thread), cpu)?;
            cpu::go_first(Some(thread))?;
        }
        Ok(())
    }

    pub(crate) fn node_device(&self) -> &'static str {
        NODE_DEVICE
    }

    /// Packets that the node's end has received.
    pub(crate) fn received(&self) -> Result<Received> {
        #[derive(Deserialize)]
        struct Link {
            stats64: Stats,
        }
        #[derive(Deserialize)]
        struct Stats {
            rx: Rx,
        }
        #[derive(Deserialize)]
        struct Rx {
            packets: u64,
            dropped: u64,
        }
        let _node = self.node.enter()?;
        let text = run(
            "ip",
            &["-json", "-statistics", "link", "show", "dev", NODE_DEVICE],
        )?;
        let [link]: [Link; 1] = serde_json::from_str(&text)?;
        let Rx { packets, dropped } = link.stats64.rx;
        Ok(Received { packets, dropped })
    }
}

/// Brings one end up and gives it the MAC of the other, so that the testbed never waits for ARP.
/// Returns the device's index.
fn set_up(
    namespace: &Namespace,
    device: &str,
    mac: [u8; 6],
    address: Ipv4Addr,
    (other, other_mac): (Ipv4Addr, [u8; 6]),
) -> Result<u32> {
    let _inside = namespace.enter()?;
    // Otherwise router solicitations and duplicate address detection would be counted among the
    // packets.
    run("sysctl", &["-qw", "net.ipv6.conf.all.disable_ipv6=1"])?;
    run("ip", &["link", "set", "lo", "up"])?;
    run("ip", &["link", "set", device, "address", &text_of(mac)])?;
    run(
        "ip",
        &["address", "add", &format!("{address}/24"), "dev", device],
    )?;
    run("ip", &["link", "set", device, "up"])?;
    let other_mac = text_of(other_mac);
    let (other, permanent) = (other.to_string(), "permanent");
    run(
        "ip",
        &[
            "neighbour",
            "add",
            &other,
            "lladdr",
            &other_mac,
            "dev",
            device,
            "nud",
            permanent,
        ],
    )?;
    Ok(index_of(device)?)
}

fn text_of(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
