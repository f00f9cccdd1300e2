//! The filters at the node's end: each is put in force for a row, read, and removed again.

use libbpf_rs::Link;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::edge::{Attached, Case, Edges};
use crate::generator::Sources;
use crate::namespace::run;
use crate::receiver::Receiver;
use crate::reference::{self, Attacker};
use crate::tally::Tally;
use crate::testbed::Testbed;

/// One way to refuse hostile packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Filter {
    /// An XDP program that drops all: the cost of generator and veth, which is part of every row.
    Floor,
    /// The edge, with one verdict.
    Edge(Case),
    /// xdp-filter of xdp-tools, one port.
    XdpTools,
    /// nftables, the device's ingress hook.
    NftIngress,
    /// nftables with the reference's rules; the attacker is on no list.
    Reference,
    /// The same, with the attacker's addresses on the whitelist: more than [`reference::SET_SIZE`]
    /// of them pass, whatever their rate.
    ReferenceListed,
    /// No filter: an XDP program that passes all, and a closed port.
    Pass,
}

/// The parts that filters are made of.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) testbed: &'a Testbed,
    pub(crate) receiver: &'a Receiver<'a>,
    pub(crate) edges: &'a Edges,
}

/// A filter that is in force until this is dropped.
#[derive(Debug)]
pub(crate) struct Installed<'a> {
    parts: &'a Parts<'a>,
    filter: Filter,
    sources: Sources,
    held: Option<Held<'a>>,
}

/// A program that leaves the device when this is dropped.
#[derive(Debug)]
enum Held<'a> {
    Link { _link: Link },
    Edge { _attached: Attached<'a> },
}

impl Filter {
    pub(crate) fn label(self) -> String {
        match self {
            Self::Floor => "XDP, drop all".into(),
            Self::Edge(case) => format!("edge, {}", case.label()),
            Self::XdpTools => "xdp-filter".into(),
            Self::NftIngress => "nft ingress".into(),
            Self::Reference => "reference's rules".into(),
            Self::ReferenceListed => "reference's rules, listed".into(),
            Self::Pass => "XDP, pass all".into(),
        }
    }

    /// Why the filter cannot be measured on this host.
    pub(crate) fn missing(self) -> Option<&'static str> {
        (self == Self::XdpTools && !reference::has_xdp_filter())
            .then_some("xdp-filter is not installed (Debian: xdp-tools)")
    }

    /// Puts it in force at the node's end, against packets of `sources`.
    pub(crate) fn install<'a>(
        self,
        parts: &'a Parts<'a>,
        sources: Sources,
    ) -> Result<Installed<'a>> {
        let _node = parts.testbed.enter_node()?;
        let device = parts.testbed.node_device();
        let index = i32::try_from(parts.testbed.node_index())?;
        let held = match self {
            Self::Floor => Some(Held::Link {
                _link: parts.receiver.drop_all().attach_xdp(index)?,
            }),
            Self::Pass => Some(Held::Link {
                _link: parts.receiver.pass_all().attach_xdp(index)?,
            }),
            Self::Edge(case) => Some(Held::Edge {
                _attached: parts.edges.of(case, sources)?.attach(index)?,
            }),
            Self::XdpTools => reference::load_xdp_filter(device).map(|()| None)?,
            Self::NftIngress => reference::load(&reference::ingress(device)).map(|()| None)?,
            Self::Reference => load_reference(Attacker::Unknown).map(|()| None)?,
            Self::ReferenceListed => load_reference(Attacker::Listed).map(|()| None)?,
        };
        Ok(Installed {
            parts,
            filter: self,
            sources,
            held,
        })
    }
}

impl Installed<'_> {
    /// Checks the state of the filter once the attack has gone on for a while.
    ///
    /// # Errors
    ///
    /// If the reference's set of rates is not in the state that the row is about.
    pub(crate) fn check(&self) -> Result<()> {
        if self.filter != Filter::ReferenceListed {
            return Ok(());
        }
        let _node = self.parts.testbed.enter_node()?;
        let limited = reference::limited_sources()?;
        if (limited == reference::SET_SIZE) == self.sources.fill_reference() {
            return Ok(());
        }
        Err(format!(
            "{limited} sources are in the set, of {}",
            reference::SET_SIZE
        )
        .into())
    }

    /// Its counters since the testbed was built, or since it was put in force.
    pub(crate) fn tally(&self) -> Result<Tally> {
        let _node = self.parts.testbed.enter_node()?;
        match self.filter {
            Filter::Floor => {
                let seen = self.parts.receiver.counts()?.dropped;
                Ok(Tally {
                    seen,
                    expected: seen,
                    ..Tally::default()
                })
            }
            Filter::Pass => {
                let passed = self.parts.receiver.counts()?.passed;
                let expected = stack()?.closed_ports;
                Ok(Tally {
                    seen: passed,
                    passed,
                    expected,
                    answered: 0,
                })
            }
            Filter::Edge(case) => self.parts.edges.of(case, self.sources)?.tally(),
            Filter::XdpTools => {
                let seen = self.parts.testbed.received()?.packets;
                let passed = stack()?.received;
                Ok(Tally {
                    seen,
                    passed,
                    expected: seen.saturating_sub(passed),
                    answered: 0,
                })
            }
            Filter::NftIngress | Filter::Reference => {
                let counted = reference::counted()?;
                let expected = counted.packets - counted.accepted;
                Ok(Tally {
                    seen: counted.packets,
                    passed: counted.accepted,
                    expected,
                    answered: 0,
                })
            }
            Filter::ReferenceListed => {
                let counted = reference::counted()?;
                // Flows that were let through fill the table of conntrack, which then refuses
                // packets before any rule sees them.
                let seen = counted.packets + reference::refused_by_conntrack()?;
                let passed = counted.accepted;
                let expected = if self.sources.fill_reference() {
                    passed
                } else {
                    counted.packets - passed
                };
                Ok(Tally {
                    seen,
                    passed,
                    expected,
                    answered: 0,
                })
            }
        }
    }
}

impl Drop for Installed<'_> {
    fn drop(&mut self) {
        let gone = self.parts.testbed.enter_node().and_then(|_node| {
            // This happens while the thread is in the namespace in which the device's number is
            // valid.
            self.held = None;
            match self.filter {
                Filter::XdpTools => reference::unload_xdp_filter(self.parts.testbed.node_device()),
                Filter::NftIngress | Filter::Reference | Filter::ReferenceListed => {
                    reference::flush()
                }
                Filter::Floor | Filter::Pass | Filter::Edge(_) => Ok(()),
            }
        });
        if let Err(error) = gone {
            eprintln!(
                "bench-edge: {} stays in force: {error}",
                self.filter.label()
            );
        }
    }
}

/// Each row begins with an empty table of conntrack, and with empty sets.
fn load_reference(attacker: Attacker) -> Result<()> {
    reference::forget_flows()?;
    reference::load(&reference::replica(attacker))
}

/// Packets that reached the stack of the calling thread's namespace.
#[derive(Debug)]
struct Stack {
    received: u64,
    closed_ports: u64,
}

fn stack() -> Result<Stack> {
    #[derive(Deserialize)]
    struct Output {
        kernel: Kernel,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Kernel {
        ip_in_receives: u64,
        udp_no_ports: u64,
    }
    let text = run("nstat", &["--json", "--zeros", "--ignore", "--noupdate"])?;
    let Output { kernel } = serde_json::from_str(&text)?;
    Ok(Stack {
        received: kernel.ip_in_receives,
        closed_ports: kernel.udp_no_ports,
    })
}
