//! What the edge is compared with: rules of nftables, and xdp-filter.
//!
//! The reference's rules are those that its orchestrator writes for an assigned replica (`INPUT` of
//! `nftables_assigned_replica.conf.golden` in dfinity/ic), IPv4 part, with this rig's addresses: a source's new connections
//! are limited by a dynamic set, then counted by conntrack, then looked up in the lists. Left out in its favour: the final
//! `log` of every packet that no rule took. Added: counters, so that every packet is accounted for.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::Result;
use crate::frames::{OPEN_PORT, TCP_PORT};
use crate::namespace::run;

const TABLE: &str = "bench";

/// Addresses of other nodes in the automatic whitelist.
const NODES: u32 = 500;

/// Drops in the device's ingress hook, before IP: the least that nftables can do.
pub(crate) fn ingress(device: &str) -> String {
    format!(
        "table netdev {TABLE} {{
  counter dropped {{ }}
  chain ingress {{
    type filter hook ingress device \"{device}\" priority 0; policy accept;
    udp dport {OPEN_PORT} counter name dropped drop
  }}
}}
"
    )
}

/// The reference's rules. `open`: the attacker's addresses are on the whitelist, as a hacked node's would be.
pub(crate) fn replica(open: bool) -> String {
    let mut nodes = String::new();
    for node in 0..NODES {
        // Spread over many networks, as nodes are.
        let address = std::net::Ipv4Addr::from(0xc000_0000 + node * 65_537);
        let _infallible = write!(nodes, "{}{address}", if node == 0 { "" } else { "," });
    }
    if open {
        nodes.push_str(",16.0.0.0/8");
    }
    format!(
        "table ip {TABLE} {{
  set rate_limit {{ type ipv4_addr; size 65535; flags dynamic; }}
  set connection_limit {{ type ipv4_addr; size 65535; flags dynamic; }}
  counter rate {{ }}
  counter connections {{ }}
  counter invalid {{ }}
  counter accepted {{ }}
  counter refused {{ }}
  chain input {{
    type filter hook input priority 0; policy drop;
    iif lo accept
    ct state new add @rate_limit {{ ip saddr limit rate over 1000/minute burst 500 packets }} \\
      counter name rate drop
    ct state new add @connection_limit {{ ip saddr ct count over 1000 }} \\
      counter name connections drop
    icmp type {{ destination-unreachable, time-exceeded, echo-request, echo-reply }} accept
    ip saddr {{ {nodes} }} ct state {{ new }} tcp dport {{ 22, 2497, {OPEN_PORT}, {TCP_PORT} }} \\
      counter name accepted accept
    ip saddr {{ 198.18.0.0/24 }} ct state {{ new }} tcp dport {{ {TCP_PORT} }} accept
    ip saddr {{ 203.0.113.4 }} ct state {{ new }} tcp dport {{ 1004 }} accept
    ip saddr {{ 203.0.113.6 }} ct state {{ new }} tcp dport {{ 1006 }} accept
    ip saddr {{ {nodes}, 198.18.0.1 }} udp dport {{ {OPEN_PORT} }} counter name accepted accept
    ct state {{ invalid }} counter name invalid drop
    ct state {{ established, related }} accept
    counter name refused
  }}
}}
"
    )
    .replace("\\\n", "")
}

/// Loads rules into the namespace of the calling thread.
///
/// # Errors
/// With nft's message.
pub(crate) fn load(rules: &str) -> Result<()> {
    let mut nft =
        Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    nft.stdin.take().ok_or("nft has no input")?.write_all(rules.as_bytes())?;
    let output = nft.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("nft: {}", String::from_utf8_lossy(&output.stderr).trim()).into())
}

/// Removes every rule in the namespace of the calling thread.
pub(crate) fn flush() -> Result<()> {
    run("nft", &["flush", "ruleset"]).map(drop)
}

/// Packets that a named counter of the rules has seen.
#[derive(Debug, Deserialize)]
pub(crate) struct Counter {
    pub(crate) name: String,
    pub(crate) packets: u64,
}

/// All named counters, in the namespace of the calling thread.
pub(crate) fn counters() -> Result<Vec<Counter>> {
    #[derive(Deserialize)]
    struct Listing {
        nftables: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        counter: Option<Counter>,
    }
    let listing: Listing = serde_json::from_str(&run("nft", &["-j", "list", "counters"])?)?;
    Ok(listing.nftables.into_iter().filter_map(|entry| entry.counter).collect())
}

/// Packets that every counter together has seen.
pub(crate) fn counted() -> Result<u64> {
    Ok(counters()?.iter().map(|counter| counter.packets).sum())
}

/// Whether Debian's `xdp-tools` are there.
pub(crate) fn has_xdp_filter() -> bool {
    run("xdp-filter", &["--version"]).is_ok()
}

/// Loads xdp-filter onto the device and lets it drop the open port.
pub(crate) fn load_xdp_filter(device: &str) -> Result<()> {
    run("xdp-filter", &["load", device, "--mode", "native", "--features", "udp,ipv4"])?;
    let port = OPEN_PORT.to_string();
    run("xdp-filter", &["port", &port, "--mode", "dst", "--proto", "udp"]).map(drop)
}

/// Takes it off.
pub(crate) fn unload_xdp_filter(device: &str) -> Result<()> {
    run("xdp-filter", &["unload", device]).map(drop)
}
