//! Goodput under attack: the service that honest clients of the node still get while hostile
//! packets arrive at a fixed rate.
//!
//! The attacker has one core. The other one is the host's: a thread that receives for the node's
//! device and filters, the node (QUIC RPC, TCP echo) and its clients. The clients offer a fixed
//! load, far below what the core could do, so that the missing load was lost to the attack. In one
//! series they are connected before the attack begins, and the edge denies its packets (the
//! cheapest for the edge). In the others rules allow every source, and the clients open new
//! connections during the attack (the dearest): see [`Series`].

mod client;
mod connect_probe;
mod load;
mod node;
mod plot;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::mem::MaybeUninit;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use millrace_edge::clock::now_ns;
use millrace_perf::report::write_json;
use serde::{Serialize, Serializer};

pub(crate) use client::drive;
pub(crate) use load::Load;
pub(crate) use node::serve;

use crate::edge::{Case, Edges};
use crate::filters::{Filter, Parts};
use crate::frames::Shape;
use crate::generator::{Generator, Sources, Traffic};
use crate::host::Host;
use crate::receiver::Receiver;
use crate::testbed::{self, Testbed};
use crate::{Result, cpu, namespace};

/// The default rates.
const RATES: [u32; 4] = [0, 500_000, 1_000_000, 2_000_000];
/// Time for which the attack runs before and after the measurement.
const LEAD: Duration = Duration::from_millis(200);

/// Share of the requested rate that the generator must achieve. A twentieth may go to other threads
/// on the attacker's core (see [`cpu::go_first`]).
const KEPT_UP: f64 = 0.9;

/// Share of the packets that the edge must answer by itself while it is open to all: otherwise the
/// attack did not spend the budgets.
const ANSWERED: f64 = 0.9;

/// The attack and the clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Series {
    /// Initials from a million sources that the firewall denies, beside clients that were connected
    /// before.
    Connected,
    /// Initials from a million sources that rules allow, under stress: both sides get a Retry.
    /// Clients connect anew.
    NewByQuic,
    /// The same with SYNs, and SYN cookies.
    NewByTcp,
}

impl Series {
    const ALL: [Self; 3] = [Self::Connected, Self::NewByQuic, Self::NewByTcp];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Connected => "requests, connected before, under Initials",
            Self::NewByQuic => "new connections, under Initials",
            Self::NewByTcp => "new connections, under SYNs",
        }
    }

    /// The filters that are compared.
    fn filters(self) -> [Filter; 3] {
        let case = match self {
            Self::Connected => Case::Deny,
            Self::NewByQuic | Self::NewByTcp => Case::Open,
        };
        [Filter::Edge(case), Filter::Pass, Filter::Reference]
    }

    fn shape(self) -> Shape {
        match self {
            Self::Connected | Self::NewByQuic => Shape::Initial,
            Self::NewByTcp => Shape::Syn,
        }
    }
}

/// The points of a run, and the machine that measured them.
#[derive(Debug, Serialize)]
struct Report<'a> {
    host: Host,
    rounds: usize,
    seconds: f64,
    points: &'a [Point],
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Point {
    pub(crate) series: Series,
    #[serde(serialize_with = "label")]
    pub(crate) filter: Filter,
    /// Hostile packets per second.
    pub(crate) rate: u32,
    /// Share of all incoming packets that found the node's ring full.
    pub(crate) ring_full: f64,
    /// Share of the packets seen by the filter that it answered by itself.
    pub(crate) answered: f64,
    pub(crate) quic: Load,
    pub(crate) tcp: Load,
}

fn label<S: Serializer>(filter: &Filter, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(&filter.label())
}

/// Options of a run.
#[derive(Debug, clap::Args)]
pub(crate) struct Run {
    /// Interleaved rounds; the median of each point counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds for each measurement.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Hostile packets per second.
    #[arg(long, value_delimiter = ',', default_values_t = RATES)]
    rates: Vec<u32>,
    /// Only points whose name, `SERIES: FILTER`, contains one of these.
    #[arg(long, value_delimiter = ';')]
    only: Vec<String>,
    /// Core of the attacker.
    #[arg(long, default_value_t = 1)]
    attacker_cpu: usize,
    /// Core of the node, its receiving thread and its clients.
    #[arg(long, default_value_t = 0)]
    host_cpu: usize,
    /// Folder for the plots, and for the figures that they show.
    #[arg(long, default_value = "docs/operating")]
    plots: PathBuf,
}

/// Options of a child process.
#[derive(Debug, clap::Args)]
pub(crate) struct RoleArgs {
    #[arg(long)]
    cpu: usize,
    #[arg(long)]
    seconds: f64,
    /// The edge in front of the node charges sources, so the node does not.
    #[arg(long)]
    kernel_charges: bool,
    /// Clients open new connections, instead of sending requests over open ones.
    #[arg(long)]
    probes: bool,
}

/// Measures every series, filter and rate; prints and plots the results.
pub(crate) fn run(run: &Run) -> Result<()> {
    namespace::guard()?;
    let host = Host::read()?;
    cpu::pin_to(run.attacker_cpu)?;
    cpu::go_first(None)?;
    let lasts = Duration::from_secs_f64(run.seconds);
    let mut object = MaybeUninit::uninit();
    let receiver = Receiver::load(&mut object, testbed::HONEST)?;
    let testbed = Testbed::build(&receiver)?;
    testbed.settle(node::probe_addresses())?;
    testbed.receive_on(run.host_cpu)?;
    let mut compared: Vec<_> = Series::ALL
        .into_iter()
        .flat_map(|series| series.filters().map(|filter| (series, filter)))
        .collect();
    compared.retain(|(series, filter)| {
        let name = format!("{}: {}", series.label(), filter.label());
        run.only.is_empty() || run.only.iter().any(|part| name.contains(part.as_str()))
    });
    let mut edges = Edges::default();
    for (_, filter) in &compared {
        if let Filter::Edge(case) = *filter {
            edges.prepare(case, Sources::MILLION)?;
        }
    }
    let parts = Parts {
        testbed: &testbed,
        receiver: &receiver,
        edges: &edges,
    };
    let mut points: BTreeMap<(Series, Filter, u32), Vec<Point>> = BTreeMap::new();
    for round in 0..run.rounds.max(1) {
        for &rate in &run.rates {
            for &(series, filter) in &compared {
                let name = format!("{}: {}", series.label(), filter.label());
                eprint!(
                    "\rround {}/{}: {name}, {rate}{:<20}",
                    round + 1,
                    run.rounds,
                    ""
                );
                let point = measure(&parts, (series, filter), rate, run.host_cpu, lasts)
                    .map_err(|error| format!("{name} at {rate}: {error}"))?;
                let place = points.entry((series, filter, rate)).or_default();
                place.push(point);
            }
        }
    }
    eprintln!();
    let points: Vec<_> = points.into_values().filter_map(middle).collect();
    print(&points);
    plot::write(&run.plots, &points)?;
    let report = Report {
        host,
        rounds: run.rounds.max(1),
        seconds: run.seconds,
        points: &points,
    };
    Ok(write_json(&run.plots.join("goodput.json"), &report)?)
}

/// The point whose completed requests are the median.
fn middle(mut points: Vec<Point>) -> Option<Point> {
    let completed =
        |point: &Point| point.quic.completed_per_second + point.tcp.completed_per_second;
    points.sort_by(|a, b| completed(a).total_cmp(&completed(b)));
    let middle = points.len() / 2;
    points.into_iter().nth(middle)
}

fn print(points: &[Point]) {
    println!(
        "{:<41} {:<18} {:>9} {:>9} {:>9} {:>8} {:>11} {:>8} {:>11}",
        "series",
        "filter",
        "hostile/s",
        "ring full",
        "answered",
        "QUIC/s",
        "p99 us",
        "TCP/s",
        "p99 us"
    );
    for point in points {
        println!(
            "{:<41} {:<18} {:>9} {:>7.1} % {:>7.1} % {:>8.0} {:>11.0} {:>8.0} {:>11.0}",
            point.series.label(),
            point.filter.label(),
            point.rate,
            point.ring_full * 100.0,
            point.answered * 100.0,
            point.quic.completed_per_second,
            point.quic.p99_us,
            point.tcp.completed_per_second,
            point.tcp.p99_us,
        );
    }
}

/// Measures one filter at one rate for `lasts`. The host's core is `cpu`; the calling thread is the
/// attacker.
pub(crate) fn measure(
    parts: &Parts<'_>,
    (series, filter): (Series, Filter),
    rate: u32,
    cpu: usize,
    lasts: Duration,
) -> Result<Point> {
    let installed = filter.install(parts, Sources::MILLION)?;
    let _node = {
        let _inside = parts.testbed.enter_node()?;
        let charges = matches!(filter, Filter::Edge(_)).then_some("--kernel-charges");
        Role::start("serve", cpu, lasts, charges)?
    };
    let mut client = {
        let _inside = parts.testbed.enter_client()?;
        let probes = (series != Series::Connected).then_some("--probes");
        Role::start("drive", cpu, lasts, probes)?
    };
    let (before, seen_before) = (parts.testbed.received()?, installed.tally()?);
    let from_ns = now_ns() + LEAD.as_nanos() as u64;
    client.go(from_ns, from_ns + lasts.as_nanos() as u64)?;
    if let Some(rate) = NonZeroU32::new(rate) {
        let attack = (lasts + 2 * LEAD).as_secs_f64() * f64::from(rate.get());
        let mut object = MaybeUninit::uninit();
        let traffic = Traffic {
            shape: series.shape(),
            sources: Sources::MILLION,
            interface: parts.testbed.client_index(),
            packets_per_second: Some(rate),
            is_answered: filter == Filter::Edge(Case::Open),
        };
        let generator = Generator::load(&mut object, traffic)?;
        let _inside = parts.testbed.enter_client()?;
        generator.send(attack as u32)?;
        let kept_up = generator.rate()?;
        if kept_up < f64::from(rate.get()) * KEPT_UP {
            return Err(
                format!("the attacker kept up {kept_up:.0} packets per second only").into(),
            );
        }
    }
    let [quic, tcp] = serde_json::from_str(&client.line()?)?;
    let after = parts.testbed.received()?;
    let full = (after.dropped - before.dropped) as f64;
    let ring_full = full / (full + (after.packets - before.packets) as f64);
    let tally = installed.tally()?;
    let seen = (tally.seen - seen_before.seen).max(1);
    let answered = (tally.answered - seen_before.answered) as f64 / seen as f64;
    if filter == Filter::Edge(Case::Open) && rate > 0 && answered < ANSWERED {
        return Err(format!("of {seen} packets only {answered:.2} were answered").into());
    }
    Ok(Point {
        series,
        filter,
        rate,
        ring_full,
        answered,
        quic,
        tcp,
    })
}

/// A copy of this process in a namespace: the node or its clients. Ends when this is dropped.
struct Role {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Role {
    /// Starts it in the namespace of the calling thread, and waits until it is ready.
    fn start(name: &str, cpu: usize, lasts: Duration, flag: Option<&str>) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([
                name,
                "--cpu",
                &cpu.to_string(),
                "--seconds",
                &lasts.as_secs_f64().to_string(),
            ])
            .args(flag)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().ok_or("no output of a child")?);
        let mut role = Self {
            child,
            stdin,
            stdout,
        };
        role.line().map_err(|error| format!("{name}: {error}"))?;
        Ok(role)
    }

    /// Tells the child when to measure, in nanoseconds of CLOCK_MONOTONIC. The child may get no
    /// time to read its clock meanwhile: a window that it chose itself would begin after the
    /// attack.
    fn go(&mut self, from_ns: u64, until_ns: u64) -> Result<()> {
        let stdin = self.stdin.as_mut().ok_or("no input of a child")?;
        writeln!(stdin, "[{from_ns},{until_ns}]")?;
        Ok(stdin.flush()?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stdout.read_line(&mut line)? == 0 {
            return Err("ended without an answer".into());
        }
        Ok(line)
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // The child ends when its input does, and its output with it; a child that hangs is killed.
        drop(self.stdin.take());
        if self.stdout.read_to_end(&mut Vec::new()).is_err() {
            let _gone = self.child.kill();
        }
        let _reaped = self.child.wait();
    }
}

impl fmt::Debug for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Role({})", self.child.id())
    }
}
