//! The command line of `millrace xdp`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use ipnet::IpNet;
use millrace_tuning::Period;
use millrace_tuning::config::{Choice, EdgeMode};

/// `millrace xdp`
#[derive(Debug, Subcommand)]
pub(crate) enum XdpCommand {
    /// Load the program, attach it to the config's interfaces and pin it; it counts and refuses
    /// nothing yet. Where it is attached already, add the interfaces that it is not on, and replace
    /// programs of another version; what is in force stays.
    Attach(XdpAttachArgs),
    /// Put the config and the newest registry version in force.
    Apply(XdpApplyArgs),
    /// Keep what `apply --confirm` put in force.
    Confirm(XdpPinsArgs),
    /// Go back to what was in force before `apply --confirm`, now.
    Revert(XdpPinsArgs),
    /// Show interfaces, mode, stress, limits and every reason's count.
    Status(XdpPinsArgs),
    /// Show the rules in force, in their order, and how often each decided.
    Rules(XdpPinsArgs),
    /// Ask the program what it would do with a packet, and why; changes nothing.
    Trace(XdpTraceArgs),
    /// Allow a prefix for a while, before all rules.
    Allow(XdpTemporaryArgs),
    /// Deny a prefix for a while, before all rules.
    Deny(XdpTemporaryArgs),
    /// Follow sampled drops (see sample_every in `[edge]`).
    Events(XdpEventsArgs),
    /// Take the program, its pins and the table of nftables away. Needs no running node.
    Detach(XdpPinsArgs),
}

/// Takes the words of a choice of the config.
fn choice<C: Choice + Send + Sync>() -> impl TypedValueParser<Value = C> {
    PossibleValuesParser::new(C::WORDS.iter().copied())
        .try_map(|word| C::from_word(&word).ok_or("it is no choice of this key"))
}

/// Where the edge is pinned.
#[derive(Debug, Args)]
pub(crate) struct XdpPins {
    /// The node's config file, which names the folder of pins.
    #[arg(long, value_name = "FILE", conflicts_with = "pins")]
    pub(crate) config: Option<PathBuf>,
    /// The folder of pins.
    #[arg(long, value_name = "DIR", default_value = "/run/millrace/edge")]
    pub(crate) pins: PathBuf,
}

/// `millrace xdp status|rules|confirm|revert|detach`
#[derive(Debug, Args)]
pub(crate) struct XdpPinsArgs {
    #[command(flatten)]
    pub(crate) at: XdpPins,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace xdp attach`
#[derive(Debug, Args)]
pub(crate) struct XdpAttachArgs {
    /// The node's config file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Interfaces instead of the config's; may be given several times.
    #[arg(long, value_name = "NAME")]
    pub(crate) interface: Vec<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace xdp apply`
#[derive(Debug, Args)]
pub(crate) struct XdpApplyArgs {
    /// The node's config file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Count or enforce, instead of the config's mode.
    #[arg(long, value_name = "MODE", value_parser = choice::<EdgeMode>())]
    pub(crate) mode: Option<EdgeMode>,
    /// Go back to what was in force unless `millrace xdp confirm` comes within this time. The
    /// kernel keeps the time.
    #[arg(long, value_name = "DURATION")]
    pub(crate) confirm: Option<Period>,
    /// If the newest registry version's rules are refused, keep those in force, and change the
    /// rest: mode, limits, ports, members.
    #[arg(long)]
    pub(crate) last_good: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace xdp allow|deny`
#[derive(Debug, Args)]
pub(crate) struct XdpTemporaryArgs {
    /// The node's config file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// The sources, such as 192.0.2.0/24.
    #[arg(value_name = "PREFIX")]
    pub(crate) prefix: IpNet,
    /// How long.
    #[arg(long = "for", value_name = "DURATION", default_value = "1h")]
    pub(crate) period: Period,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace xdp trace`
#[derive(Debug, Args)]
pub(crate) struct XdpTraceArgs {
    #[command(flatten)]
    pub(crate) at: XdpPins,
    /// The whole frame in hexadecimal, from the Ethernet header on; instead of the options below.
    #[arg(long, value_name = "HEX", conflicts_with_all = ["from", "to_port", "kind"])]
    pub(crate) frame: Option<String>,
    /// Source address and port.
    #[arg(long, value_name = "IP:PORT", required_unless_present = "frame")]
    pub(crate) from: Option<SocketAddr>,
    /// Destination port.
    #[arg(long, value_name = "PORT", required_unless_present = "frame")]
    pub(crate) to_port: Option<u16>,
    /// What kind of packet.
    #[arg(long, value_name = "KIND", default_value = "quic-initial")]
    pub(crate) kind: TraceKind,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace xdp events`
#[derive(Debug, Args)]
pub(crate) struct XdpEventsArgs {
    #[command(flatten)]
    pub(crate) at: XdpPins,
    /// End after this many.
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
    /// End after this long.
    #[arg(long = "for", value_name = "DURATION", default_value = "1h")]
    pub(crate) period: Period,
    /// Print one JSON object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A kind of packet that can be traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TraceKind {
    QuicInitial,
    QuicShort,
    Udp,
    TcpSyn,
    TcpAck,
}
