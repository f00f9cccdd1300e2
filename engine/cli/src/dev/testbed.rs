//! `millrace dev --edge`: two network namespaces and a cable, the first node behind the edge on one
//! end, all other hosts on the other.
//!
//! 1. Nothing of the host changes: all interfaces, programs and rules are in namespaces that end
//!    with this process, and pins in a folder that is removed.
//! 2. Capabilities are given up by the threads of the node behind the edge, not by the thread that
//!    cleans up.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use millrace_edge::edge::{AttachOptions, Edge};
use millrace_edge::frame::{Description, Shape};
use millrace_edge::interface::AttachMode;
use millrace_edge::load::LoadOptions;
use millrace_edge::metrics::Counters;
use millrace_edge::pins::Pins;
use millrace_edge::privileges;
use millrace_edge_policy::reason::Reason;
use millrace_tuning::NodeConfig;
use millrace_tuning::config::EdgeMode;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::exit::{Exit, Failure};
use crate::output;

/// The node behind the edge.
const INSIDE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The other nodes.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// A host that the registry does not name.
const NON_MEMBER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 66);
/// Port of the first node; the others follow.
const PORT: u16 = 4100;
/// From 63 nodes with 8 connections each, and again while they redial.
const CONNECTIONS_MAX: u64 = 1_024;
/// Ethernet, IPv4 and UDP: what the kernel puts in front of a datagram by itself.
const HEADERS: usize = 14 + 20 + 8;
/// Datagrams of a flood between two looks at whether it should end.
const BURST: usize = 64;

/// An end of the cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Inside,
    Outside,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Inside => "in",
            Self::Outside => "out",
        }
    }

    /// Where the node with this index is: the first one is behind the edge.
    pub(super) fn of(index: u16) -> Self {
        match index {
            0 => Self::Inside,
            _ => Self::Outside,
        }
    }
}

/// The namespaces and the cable; dropped, they are gone.
#[derive(Debug)]
pub(super) struct Testbed {
    prefix: String,
    pins: PathBuf,
}

impl Testbed {
    /// Makes them. Takes root, and iproute2.
    pub(super) fn make() -> Result<Self, Failure> {
        let missing = privileges::missing();
        if !missing.is_empty() {
            let message = "dev --edge makes network namespaces and loads programs: run it as root";
            return Err(Failure::new(Exit::NotPermitted, message));
        }
        let id = std::process::id();
        let testbed = Self {
            prefix: format!("millrace-dev-{id}"),
            pins: PathBuf::from(format!("/run/millrace/dev-{id}")),
        };
        let (inside, outside) = (testbed.space(Side::Inside), testbed.space(Side::Outside));
        ip(&["netns", "add", &inside])?;
        ip(&["netns", "add", &outside])?;
        ip(&[
            "link", "add", "out", "netns", &outside, "type", "veth", "peer", "name", "in", "netns",
            &inside,
        ])?;
        for (side, addresses) in [
            (Side::Inside, vec![INSIDE]),
            (Side::Outside, vec![OUTSIDE, NON_MEMBER]),
        ] {
            let space = testbed.space(side);
            for address in addresses {
                let address = format!("{address}/24");
                ip(&["-n", &space, "addr", "add", &address, "dev", side.name()])?;
            }
            ip(&["-n", &space, "link", "set", side.name(), "up"])?;
            ip(&["-n", &space, "link", "set", "lo", "up"])?;
        }
        Ok(testbed)
    }

    fn space(&self, side: Side) -> String {
        format!("{}-{}", self.prefix, side.name())
    }

    /// Does something in a thread of that side; threads that it starts stay there.
    pub(super) fn on<T: Send>(
        &self,
        side: Side,
        act: impl FnOnce() -> Result<T, Failure> + Send,
    ) -> Result<T, Failure> {
        let path = format!("/run/netns/{}", self.space(side));
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let space = File::open(&path).map_err(|error| Failure::io(&path, &error))?;
                move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))
                    .map_err(|error| Failure::io(&path, &error.into()))?;
                act()
            });
            thread.join().map_err(|_| {
                Failure::new(Exit::Failed, "a thread of the testbed ended with a panic")
            })?
        })
    }

    /// Where the node with this index listens.
    pub(super) fn address(index: u16) -> SocketAddr {
        let ip = match Side::of(index) {
            Side::Inside => INSIDE,
            Side::Outside => OUTSIDE,
        };
        SocketAddr::new(IpAddr::V4(ip), PORT + index)
    }

    /// The config of the node behind the edge.
    pub(super) fn config(&self, config: &NodeConfig) -> NodeConfig {
        let mut config = config.clone();
        config.listen.address = Self::address(0);
        config.edge.interfaces = vec![Side::Inside.name().into()];
        config.edge.pins = self.pins.display().to_string();
        config.edge.mode = EdgeMode::Enforce;
        // All other nodes have one address here.
        config.edge.quic_connections_max = CONNECTIONS_MAX;
        config.edge.quic_burst = CONNECTIONS_MAX;
        config
    }

    /// The pins of the edge.
    pub(super) fn pins(&self) -> Pins {
        Pins::at(&self.pins)
    }

    fn far_pins(&self) -> Pins {
        Pins::at(self.pins.with_extension("far"))
    }

    /// Puts a program on the other end as well: a veth transmits what a program sends only to an
    /// end that has one. It is an edge of its own, with nothing in force: it passes everything, and
    /// counts for itself.
    pub(super) fn join_far_end(&self) -> Result<(), Failure> {
        let options = AttachOptions {
            interfaces: vec![Side::Outside.name().into()],
            mode: AttachMode::Native,
            sizes: LoadOptions {
                trie_nodes4: 64,
                trie_nodes6: 64,
                limiter_buckets: 64,
                rules_max: 1,
                peers_max: 1,
                sources_max: 1,
                replies_max: 1,
                ..LoadOptions::default()
            },
        };
        self.on(Side::Outside, || {
            Edge::attach(&self.far_pins(), &options)
                .map(drop)
                .map_err(super::edge_failure)
        })
    }

    /// Sends hostile packets to the first node until `stop`: first packets of a non-member, and
    /// forged packets from the address of the members. Counts what it sent.
    pub(super) fn flood(&self, stop: &AtomicBool, sent: &AtomicU64) -> Result<(), Failure> {
        self.on(Side::Outside, || {
            let socket = |ip: Ipv4Addr| {
                let socket = UdpSocket::bind((ip, 0))?;
                socket.connect(Self::address(0))?;
                Ok(socket)
            };
            let failed = |error: std::io::Error| Failure::io("the flood's socket", &error);
            let non_member = socket(NON_MEMBER).map_err(failed)?;
            let forger = socket(OUTSIDE).map_err(failed)?;
            let initial = datagram(Shape::QuicInitial);
            let mut forged = datagram(Shape::QuicShort);
            while !stop.load(Ordering::Relaxed) {
                for turn in 0..BURST {
                    let number = sent.fetch_add(2, Ordering::Relaxed);
                    // Another connection ID each time, so that no table could help.
                    let varied = number.to_le_bytes();
                    forged[1..9].copy_from_slice(&varied);
                    // A full queue is what a flood looks like from its sender.
                    let _ = non_member.send(&initial);
                    let _ = forger.send(&forged);
                    if turn == BURST / 2 {
                        std::thread::yield_now();
                    }
                }
            }
            Ok(())
        })
    }

    /// The counters, as a table, with what a flood has sent so far.
    pub(super) fn print(&self, sent: &AtomicU64) -> Result<(), Failure> {
        let edge = Edge::adopt(&self.pins()).map_err(super::edge_failure)?;
        let counters = Counters::read(edge.maps().counters())
            .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
        // After the counters: what they count was sent before.
        let sent = sent.load(Ordering::Relaxed);
        output::data(format_args!(
            "\nthe edge in front of node 0, {sent} hostile packets\n{:<22} {:<8} {:>12}  what",
            "reason", "action", "packets"
        ))?;
        for reason in Reason::ALL {
            let packets = counters.acted_on(*reason);
            if packets > 0 {
                output::data(format_args!(
                    "{:<22} {:<8} {packets:>12}  {}",
                    reason.label(),
                    reason.action().as_str(),
                    reason.describe()
                ))?;
            }
        }
        Ok(())
    }
}

/// What stands behind the UDP header of such a packet.
fn datagram(shape: Shape) -> Vec<u8> {
    let description = Description {
        from: SocketAddr::new(IpAddr::V4(NON_MEMBER), PORT),
        to_port: PORT,
        shape,
        payload_bytes: None,
    };
    description.frame().split_off(HEADERS)
}

impl Drop for Testbed {
    fn drop(&mut self) {
        for pins in [self.far_pins(), self.pins()] {
            if let Err(error) = Edge::detach(&pins) {
                tracing::warn!(%error, "the pins of the testbed stay");
            }
            // The folder that they were mounted on, and their locks: left there, they do no harm.
            let _ = fs::remove_dir(pins.root());
            for lock in ["lock", "node"] {
                let _ = fs::remove_file(pins.journal_path().with_extension(lock));
            }
        }
        for side in [Side::Inside, Side::Outside] {
            if let Err(failure) = ip(&["netns", "del", &self.space(side)]) {
                tracing::warn!(%failure, "a namespace of the testbed stays");
            }
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), Failure> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .map_err(|error| Failure::io("ip (package iproute2)", &error))?;
    if output.status.success() {
        return Ok(());
    }
    let message = format!(
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Err(Failure::new(Exit::Failed, message))
}
