//! The commands of `millrace xdp` that only look.

use std::time::{Duration, Instant, SystemTime};

use millrace_edge::edge::Edge;
use millrace_edge::frame::{Description, Shape};
use millrace_edge::metrics::{self, Counters};
use millrace_edge::offload::{untagged_answers, untagged_warning};
use millrace_edge::publish::{CommitState, Publisher};
use millrace_edge::trace::{Decider, Trace};
use millrace_edge_control::ControlError;
use millrace_edge_control::journal::{Record, Refused};
use millrace_edge_policy::reason::Reason;
use serde::Serialize;

use super::args::{TraceKind, XdpEventsArgs, XdpPinsArgs, XdpTraceArgs};
use super::look;
use crate::exit::{Exit, Failure};
use crate::output;

/// Where the kernel keeps whether it answers SYNs by cookies.
const SYN_COOKIES: &str = "/proc/sys/net/ipv4/tcp_syncookies";

/// What `status` says of a table that could not be put in force.
const TABLE_MISSING: &str = "missing";

#[derive(Debug, Serialize)]
struct Status {
    interfaces: Vec<InterfaceStatus>,
    mode: &'static str,
    scope: &'static str,
    set: u32,
    registry_version: Option<u64>,
    /// A newer version of the registry, whose rules are refused.
    refused: Option<Refused>,
    /// The last set that was to be confirmed and was not.
    rolled_back: Option<RolledBackStatus>,
    /// `in_force`, or `missing`: nftables or the helper refused, and the table is another than that
    /// of the set.
    table: &'static str,
    confirm_seconds_left: Option<f64>,
    stress: u32,
    lease_seconds_left: Option<f64>,
    ports: Vec<Port>,
    temporary_rules: usize,
    tcp_syncookies: Option<String>,
    tcp_sources: u64,
    quic_sources: u64,
    packets: Vec<Count>,
}

#[derive(Debug, Serialize)]
struct RolledBackStatus {
    set: u32,
    registry_version: u64,
}

#[derive(Debug, Serialize)]
struct InterfaceStatus {
    name: String,
    xdp: &'static str,
    /// It was removed since, and the programs with it, even if there is one of this name again; or
    /// an operator detached one of them.
    gone: bool,
    /// VLAN devices on it whose tags the card hides from the program: its answers there leave
    /// without one.
    untagged_answers: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Port {
    port: u16,
    kind: &'static str,
}

#[derive(Debug, Serialize)]
struct Count {
    reason: &'static str,
    action: &'static str,
    acted: u64,
    would: u64,
    what: &'static str,
}

impl Status {
    /// Whether TCP ports are declared and the kernel never gives a cookie.
    fn cookies_are_off(&self) -> bool {
        self.ports.iter().any(|port| port.kind == "tcp")
            && self
                .tcp_syncookies
                .as_deref()
                .is_some_and(|value| value == "0")
    }
}

pub(super) fn status(args: &XdpPinsArgs) -> Result<Exit, Failure> {
    let edge = look(&args.at)?;
    let status = status_of(&edge)?;
    if args.json {
        output::json(&status)?;
        return Ok(Exit::Ok);
    }
    let interfaces: Vec<_> = status
        .interfaces
        .iter()
        .map(|interface| {
            let gone = if interface.gone {
                ", gone, or a program of it detached: a running node attaches again"
            } else {
                ""
            };
            format!("{} ({}{gone})", interface.name, interface.xdp)
        })
        .collect();
    let ports: Vec<_> = status
        .ports
        .iter()
        .map(|port| format!("{} {}", port.kind, port.port))
        .collect();
    let version = status
        .registry_version
        .map_or_else(|| "none".to_owned(), |version| version.to_string());
    output::data(format_args!("interfaces  {}", interfaces.join(", ")))?;
    output::data(format_args!("ports       {}", ports.join(", ")))?;
    output::data(format_args!(
        "mode        {}, scope {}, set {}, registry version {version}, {} temporary rules",
        status.mode, status.scope, status.set, status.temporary_rules
    ))?;
    if status.mode == "count" {
        output::data(
            "            the program refuses nothing; a running node holds caps and rates by itself",
        )?;
    }
    if let Some(refused) = &status.refused {
        output::data(format_args!(
            "refused     registry version {}: {}",
            refused.registry_version, refused.message
        ))?;
    }
    if let Some(rolled_back) = &status.rolled_back {
        output::data(format_args!(
            "rolled back set {} (registry version {}), unconfirmed: it stays out until `millrace xdp apply` or a newer version",
            rolled_back.set, rolled_back.registry_version
        ))?;
    }
    if status.table == TABLE_MISSING {
        output::data(
            "nftables    the table is not that of this set: a running node tries again, else `millrace xdp apply`",
        )?;
    }
    if let Some(left) = status.confirm_seconds_left {
        output::data(format_args!(
            "to confirm  {left:.0} s left; then the set before it is in force again"
        ))?;
    }
    match status.lease_seconds_left {
        Some(left) => output::data(format_args!(
            "node        alive (lease {left:.1} s), stress {}",
            status.stress
        ))?,
        None => output::data(
            "node        not running: firewall and rates hold, counts and stress have lapsed",
        )?,
    }
    output::data(format_args!(
        "sources     {} with QUIC connections, {} with TCP connections; tcp_syncookies {}",
        status.quic_sources,
        status.tcp_sources,
        status.tcp_syncookies.as_deref().unwrap_or("unknown")
    ))?;
    for interface in edge.interfaces().map_err(ControlError::from)? {
        if let Some(warning) = untagged_warning(&interface) {
            output::message(warning);
        }
    }
    if status.cookies_are_off() {
        output::message(format_args!(
            "warning: net.ipv4.tcp_syncookies is 0: SYNs beyond syn_per_second are dropped, entitled clients' too; set it to 1 or 2"
        ));
    }
    output::data(format_args!(
        "\n{:<26} {:<8} {:>14} {:>14}  what",
        "reason", "action", "acted", "would"
    ))?;
    for count in &status.packets {
        output::data(format_args!(
            "{:<26} {:<8} {:>14} {:>14}  {}",
            count.reason, count.action, count.acted, count.would, count.what
        ))?;
    }
    Ok(Exit::Ok)
}

fn status_of(edge: &Edge) -> Result<Status, Failure> {
    let record = Record::read(edge.pins())?;
    let publisher = Publisher::new(edge.maps());
    let config = publisher.config();
    let control = edge.maps().control.load(0);
    let now_ns = millrace_edge::clock::now_ns();
    let lease = control.lease_until_ns.checked_sub(now_ns);
    Ok(Status {
        interfaces: edge
            .interfaces()
            .map_err(ControlError::from)?
            .iter()
            .map(|interface| InterfaceStatus {
                name: interface.name.clone(),
                xdp: interface.mode.as_str(),
                gone: !edge.is_live(interface),
                // What cannot be asked, as from another namespace, is not warned of.
                untagged_answers: untagged_answers(interface).unwrap_or_default(),
            })
            .collect(),
        mode: publisher.mode().word(),
        scope: if config.scope == 0 { "ports" } else { "host" },
        set: config.set,
        registry_version: record
            .inputs(record.set)
            .map(|inputs| inputs.firewall.version),
        refused: record.refused.clone(),
        rolled_back: record.rolled_back.as_ref().map(|set| RolledBackStatus {
            set: set.set,
            registry_version: set.inputs.firewall.version,
        }),
        table: if record.set != 0 && record.fingerprint.is_none() {
            TABLE_MISSING
        } else {
            "in_force"
        },
        confirm_seconds_left: match publisher.commit_state() {
            CommitState::AwaitingConfirm { left } => Some(left.as_secs_f64()),
            _ => None,
        },
        stress: lease.map_or(0, |_| control.stress),
        lease_seconds_left: lease.map(|left| Duration::from_nanos(left).as_secs_f64()),
        ports: config
            .service
            .iter()
            .take(config.services as usize)
            .map(|service| Port {
                port: service.port,
                kind: kind_word(service.kind),
            })
            .collect(),
        temporary_rules: record.live_temporary(SystemTime::now()).len(),
        tcp_syncookies: std::fs::read_to_string(SYN_COOKIES)
            .ok()
            .map(|text| text.trim().to_owned()),
        tcp_sources: metrics::occupancy(edge.maps().tcp_sources()).entries,
        quic_sources: metrics::occupancy(edge.maps().quic_sources()).entries,
        packets: counts(&counters(edge)?),
    })
}

fn counters(edge: &Edge) -> Result<Counters, Failure> {
    Counters::read(edge.maps().counters())
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot read the counters: {error}")))
}

fn counts(counters: &Counters) -> Vec<Count> {
    let seen = Reason::ALL.iter().map(|reason| Count {
        reason: reason.label(),
        action: reason.action().as_str(),
        acted: counters.acted_on(*reason),
        would: counters.counted_as(*reason),
        what: reason.describe(),
    });
    seen.filter(|count| count.acted + count.would > 0).collect()
}

fn kind_word(kind: u8) -> &'static str {
    match kind {
        1 => "quic",
        2 => "tcp",
        3 => "udp",
        _ => "host",
    }
}

#[derive(Debug, Serialize)]
struct RuleRow {
    number: usize,
    hits: u64,
    rule: String,
    origin: String,
}

pub(super) fn rules(args: &XdpPinsArgs) -> Result<Exit, Failure> {
    let edge = look(&args.at)?;
    let (set, rows) = rows(&edge)?;
    if args.json {
        output::json(&rows)?;
        return Ok(Exit::Ok);
    }
    output::data(format_args!("set {set}; the first rule that fits decides"))?;
    for row in &rows {
        output::data(format_args!(
            "{:>5} {:>12} hits  {}  ({})",
            row.number, row.hits, row.rule, row.origin
        ))?;
    }
    Ok(Exit::Ok)
}

/// The set in force and its rules; another that takes its place meanwhile is read in its stead.
fn rows(edge: &Edge) -> Result<(u32, Vec<RuleRow>), Failure> {
    let publisher = Publisher::new(edge.maps());
    loop {
        let (set, generation) = (publisher.config().set, publisher.in_force());
        let rows = rows_of(edge, set, generation);
        if publisher.config().set == set {
            return rows.map(|rows| (set, rows));
        }
    }
}

fn rows_of(edge: &Edge, set: u32, generation: usize) -> Result<Vec<RuleRow>, Failure> {
    let record = Record::read(edge.pins())?;
    let written = record.sets.into_iter().find(|known| known.number == set);
    let written = written.ok_or_else(|| {
        let message =
            format!("the journal has no rules of set {set}; `millrace xdp apply` writes them");
        Failure::new(Exit::Failed, message)
    })?;
    let texts = written.rules;
    let hits = metrics::hits(edge.maps().hits(), generation as u32, texts.len() as u32)
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot read the hits: {error}")))?;
    let rows = texts.into_iter().zip(hits).enumerate();
    let rows = rows.map(|(number, (text, hits))| RuleRow {
        number,
        hits,
        rule: text.rule,
        origin: text.origin,
    });
    Ok(rows.collect())
}

#[derive(Debug, Serialize)]
struct TraceReport {
    reason: &'static str,
    what: &'static str,
    action: &'static str,
    enforced: bool,
    rule: Option<String>,
    port: Option<u16>,
    source: Option<std::net::IpAddr>,
    stress: u32,
    set: u32,
    quic_connections: u32,
    quic_connections_max: u32,
    tcp_connections: u32,
    tcp_connections_max: u32,
}

pub(super) fn trace(args: &XdpTraceArgs) -> Result<Exit, Failure> {
    let edge = look(&args.at)?;
    let frame = frame(args)?;
    let trace = edge
        .trace(&frame)
        .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    let report = report(&edge, &trace);
    if args.json {
        output::json(&report)?;
        return Ok(Exit::Ok);
    }
    let mode = if report.enforced {
        ""
    } else {
        " (mode count: it passes)"
    };
    output::data(format_args!(
        "{}: {}{mode}\n  {}",
        report.action, report.reason, report.what
    ))?;
    if let Some(rule) = &report.rule {
        output::data(format_args!("  rule: {rule}"))?;
    }
    output::data(format_args!(
        "  set {}, stress {}, connections of the source: QUIC {} of {}, TCP {} of {}",
        report.set,
        report.stress,
        report.quic_connections,
        report.quic_connections_max,
        report.tcp_connections,
        report.tcp_connections_max
    ))?;
    Ok(Exit::Ok)
}

fn report(edge: &Edge, trace: &Trace) -> TraceReport {
    let rule = match trace.rule {
        Decider::Default => None,
        Decider::Rule(index) => {
            let record = Record::read(edge.pins()).unwrap_or_default();
            let written = record.set(trace.set);
            let text = written.and_then(|set| set.rules.get(usize::from(index)));
            Some(text.map_or_else(
                || format!("{index}"),
                |text| format!("{index}: {} ({})", text.rule, text.origin),
            ))
        }
    };
    TraceReport {
        reason: trace.reason.label(),
        what: trace.reason.describe(),
        action: trace.action.as_str(),
        enforced: trace.enforced,
        rule,
        port: trace.service.as_ref().map(|service| service.port),
        source: trace.source,
        stress: trace.stress,
        set: trace.set,
        quic_connections: trace.connections.quic,
        quic_connections_max: trace.connections.quic_max,
        tcp_connections: trace.connections.tcp,
        tcp_connections_max: trace.connections.tcp_max,
    }
}

fn frame(args: &XdpTraceArgs) -> Result<Vec<u8>, Failure> {
    if let Some(text) = &args.frame {
        let digits: String = text.split_whitespace().collect();
        return data_encoding::HEXLOWER_PERMISSIVE
            .decode(digits.as_bytes())
            .map_err(|error| Failure::new(Exit::Usage, format!("--frame: {error}")));
    }
    let (Some(from), Some(to_port)) = (args.from, args.to_port) else {
        return Err(Failure::new(
            Exit::Usage,
            "--from and --to-port, or --frame",
        ));
    };
    let shape = match args.kind {
        TraceKind::QuicInitial => Shape::QuicInitial,
        TraceKind::QuicShort => Shape::QuicShort,
        TraceKind::Udp => Shape::Udp,
        TraceKind::TcpSyn => Shape::TcpSyn,
        TraceKind::TcpAck => Shape::TcpAck,
    };
    let description = Description {
        from,
        to_port,
        shape,
        payload_bytes: None,
    };
    Ok(description.frame())
}

#[derive(Debug, Serialize)]
struct EventLine {
    reason: &'static str,
    source: std::net::SocketAddr,
    port: u16,
    protocol: u8,
    rule: Option<u32>,
    interface_index: u32,
    length_bytes: u32,
}

pub(super) fn events(args: &XdpEventsArgs) -> Result<Exit, Failure> {
    let edge = look(&args.at)?;
    if edge.maps().sampling.load(0).every == 0 {
        output::message("no drop is sampled: set sample_every in [edge] and apply");
    }
    let until = Instant::now() + args.period.get();
    let wanted = args.count.unwrap_or(u64::MAX);
    let mut seen = 0;
    let events = millrace_edge::events::Events::open(edge.maps())
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot read events: {error}")))?;
    while seen < wanted {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let batch = events
            .wait(left.min(Duration::from_millis(500)))
            .map_err(|error| Failure::new(Exit::Failed, format!("cannot read events: {error}")))?;
        for event in batch {
            if seen == wanted {
                break;
            }
            seen += 1;
            let line = EventLine {
                reason: event.reason.label(),
                source: event.source,
                port: event.port,
                protocol: event.protocol,
                rule: event.rule,
                interface_index: event.interface_index,
                length_bytes: event.length_bytes,
            };
            if args.json {
                output::json(&line)?;
            } else {
                output::data(format_args!(
                    "{:<24} {} -> port {} (protocol {}, {} bytes)",
                    line.reason, line.source, line.port, line.protocol, line.length_bytes
                ))?;
            }
        }
    }
    Ok(Exit::Ok)
}
