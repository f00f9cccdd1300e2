//! The filters that the edge is compared with: rules of nftables, and xdp-filter.
//!
//! The reference's rules are those that its orchestrator writes for an assigned replica (`INPUT` of
//! `nftables_assigned_replica.conf.golden` in dfinity/ic), IPv4 part, with this testbed's
//! addresses: a dynamic set limits a source's new connections, then conntrack counts them, then the
//! lists decide. Left out in its favour: the final `log` of every packet without a match. Added:
//! counters, so that every packet is accounted for.

use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};
use serde::Deserialize;

use crate::Result;
use crate::frames::{OPEN_PORT, TCP_PORT};
use crate::namespace::run;
use crate::testbed::HONEST;

const TABLE: &str = "bench";
/// Counter of packets that the rules let through.
const ACCEPTED: &str = "accepted";

/// Addresses of other nodes in the automatic whitelist.
const NODES: u32 = 500;

/// Other nodes, which every filter lets in: spread over many networks, as nodes are.
pub(crate) fn node_addresses() -> impl Iterator<Item = Ipv4Addr> {
    (0..NODES).map(|node| Ipv4Addr::from(0xc000_0000 + node * 65_537))
}

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

/// Entries that the reference's sets have room for.
pub(crate) const SET_SIZE: usize = 65_535;

/// What the reference's rules know of the attacker's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attacker {
    /// On no list.
    Unknown,
    /// On the whitelist: the attacker is a hacked node, or forges the addresses of nodes.
    Listed,
}

/// All unicast addresses except those around the nodes', 2 in 256: networks of one list must not
/// overlap.
const NEARLY_ALL: [&str; 6] = [
    "0.0.0.0/1",
    "128.0.0.0/2",
    "194.0.0.0/7",
    "196.0.0.0/6",
    "200.0.0.0/5",
    "208.0.0.0/4",
];

/// The reference's rules.
pub(crate) fn replica(attacker: Attacker) -> String {
    let nodes: Vec<_> = node_addresses()
        .map(|address| address.to_string())
        .collect();
    let nodes = nodes.join(",");
    let others = match attacker {
        Attacker::Unknown => HONEST.to_string(),
        Attacker::Listed => NEARLY_ALL.join(","),
    };
    format!(
        "table ip {TABLE} {{
  set rate_limit {{ type ipv4_addr; size {SET_SIZE}; flags dynamic; }}
  set connection_limit {{ type ipv4_addr; size {SET_SIZE}; flags dynamic; }}
  counter rate {{ }}
  counter connections {{ }}
  counter invalid {{ }}
  counter {ACCEPTED} {{ }}
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
      counter name {ACCEPTED} accept
    ip saddr {{ {HONEST} }} ct state {{ new }} tcp dport {{ {TCP_PORT} }} \\
      counter name {ACCEPTED} accept
    ip saddr {{ 203.0.113.4 }} ct state {{ new }} tcp dport {{ 1004 }} accept
    ip saddr {{ 203.0.113.6 }} ct state {{ new }} tcp dport {{ 1006 }} accept
    ip saddr {{ {nodes}, {others} }} udp dport {{ {OPEN_PORT} }} counter name {ACCEPTED} accept
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
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    nft.stdin
        .take()
        .ok_or("nft has no input")?
        .write_all(rules.as_bytes())?;
    let output = nft.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("nft: {}", String::from_utf8_lossy(&output.stderr).trim()).into())
}

/// Empties the table of conntrack, in the namespace of the calling thread, so that a row finds no
/// flows of the one before.
///
/// # Errors
///
/// The kernel's error.
pub(crate) fn forget_flows() -> Result<()> {
    /// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE`; without a flow it deletes all.
    const DELETE: u16 = 1 << 8 | 2;
    /// `NLM_F_REQUEST | NLM_F_ACK`.
    const FLAGS: u16 = 1 | 4;
    /// `struct nlmsghdr` and `struct nfgenmsg`.
    const BYTES: u32 = 16 + 4;
    let mut request = BYTES.to_ne_bytes().to_vec();
    request.extend([DELETE, FLAGS].map(u16::to_ne_bytes).concat());
    request.resize(BYTES as usize, 0);
    let netfilter = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::NETFILTER),
    )?;
    send(&netfilter, &request, SendFlags::empty())?;
    let mut answer = [0; 64];
    recv(&netfilter, &mut answer, RecvFlags::empty())?;
    // `error` of `struct nlmsgerr`, behind the header.
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Ok(()),
        error => Err(std::io::Error::from_raw_os_error(-error).into()),
    }
}

/// Removes every rule in the namespace of the calling thread.
pub(crate) fn flush() -> Result<()> {
    run("nft", &["flush", "ruleset"]).map(drop)
}

/// The named counters of the rules.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RuleCounts {
    pub(crate) packets: u64,
    /// Those that the rules let through.
    pub(crate) accepted: u64,
}

/// Reads all named counters, in the namespace of the calling thread.
pub(crate) fn counted() -> Result<RuleCounts> {
    #[derive(Deserialize)]
    struct Listing {
        nftables: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        counter: Option<Counter>,
    }
    #[derive(Deserialize)]
    struct Counter {
        name: String,
        packets: u64,
    }
    let listing: Listing = serde_json::from_str(&run("nft", &["-j", "list", "counters"])?)?;
    let mut counted = RuleCounts::default();
    for counter in listing
        .nftables
        .into_iter()
        .filter_map(|entry| entry.counter)
    {
        counted.packets += counter.packets;
        if counter.name == ACCEPTED {
            counted.accepted += counter.packets;
        }
    }
    Ok(counted)
}

/// Sources in the set of rates, in the namespace of the calling thread.
pub(crate) fn limited_sources() -> Result<usize> {
    #[derive(Deserialize)]
    struct Listing {
        nftables: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        set: Option<Set>,
    }
    #[derive(Deserialize)]
    struct Set {
        #[serde(default)]
        elem: Vec<serde::de::IgnoredAny>,
    }
    let text = run("nft", &["-j", "list", "set", "ip", TABLE, "rate_limit"])?;
    let listing: Listing = serde_json::from_str(&text)?;
    let mut sets = listing.nftables.into_iter().filter_map(|entry| entry.set);
    Ok(sets.next().ok_or("there is no set of rates")?.elem.len())
}

/// Packets that conntrack had no room for, in the namespace of the calling thread.
pub(crate) fn refused_by_conntrack() -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/stat/nf_conntrack")?;
    let mut lines = text.lines().map(str::split_whitespace);
    let mut names = lines.next().ok_or("no statistics of conntrack")?;
    let column = names
        .position(|name| name == "drop")
        .ok_or("conntrack counts no drops")?;
    let mut refused = 0;
    // One line for each CPU, in hexadecimal.
    for mut line in lines {
        let word = line
            .nth(column)
            .ok_or("statistics of conntrack are short")?;
        refused += u64::from_str_radix(word, 16)?;
    }
    Ok(refused)
}

/// Whether Debian's `xdp-tools` are there.
pub(crate) fn has_xdp_filter() -> bool {
    // It has no option that succeeds without an effect; the test is whether the program is found.
    Command::new("xdp-filter").arg("help").output().is_ok()
}

/// Loads xdp-filter onto the device, in the namespace of the calling thread, and lets it drop the
/// open port.
pub(crate) fn load_xdp_filter(device: &str) -> Result<()> {
    // It pins its maps below /sys/fs/bpf. A mount of the shell's own, which ends with it, leaves
    // nothing behind; the program keeps the maps.
    let script = format!(
        "mount -t bpf bpf /sys/fs/bpf && \
         xdp-filter load {device} --mode native --features udp,ipv4 && \
         xdp-filter port {OPEN_PORT} --mode dst --proto udp"
    );
    run("unshare", &["--mount", "sh", "-c", &script]).map(drop)
}

/// Removes xdp-filter from the device.
pub(crate) fn unload_xdp_filter(device: &str) -> Result<()> {
    run("ip", &["link", "set", "dev", device, "xdp", "off"]).map(drop)
}
