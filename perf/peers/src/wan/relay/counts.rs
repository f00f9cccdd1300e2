//! What a relay says of its links and of itself.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use millrace_perf::relay::Counts;
use serde::Serialize;

use super::Lane;
use crate::Result;

/// A relay after it stopped.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct RelayReport {
    /// Whether its thread ran with real-time priority.
    pub(crate) is_realtime: bool,
    pub(crate) cores_used: f64,
    /// Time that the thread was ready and had no core.
    pub(crate) waited_for_core_s: f64,
    /// How late packets left.
    pub(crate) late_p50_us: u64,
    pub(crate) late_p99_us: u64,
    pub(crate) late_max_us: u64,
    /// Packets that the kernel dropped because the relay did not read them in time.
    pub(crate) relay_drops: u64,
    /// Packets that the kernel dropped at any socket of this host meanwhile, the relay's included.
    pub(crate) host_drops: u64,
    /// Packets for an end that was not known.
    pub(crate) without_end: u64,
    /// Packets that the kernel refused to send.
    pub(crate) send_failed: u64,
    pub(crate) links: Vec<LinkReport>,
}

/// One link of a relay.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct LinkReport {
    /// From the first end to the second, and back.
    pub(crate) directions: [DirectionReport; 2],
}

/// One direction of a link.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct DirectionReport {
    pub(crate) taken: u64,
    pub(crate) bytes: u64,
    pub(crate) queue_full: u64,
    pub(crate) lost: u64,
    /// Nanoseconds of the monotonic clock, and the UDP payload bytes that had left by then.
    #[serde(skip)]
    pub(crate) record: Vec<(u64, u64)>,
}

impl LinkReport {
    pub(super) fn of(lanes: &mut [Lane; 2]) -> Self {
        let directions = lanes.each_mut().map(|lane| {
            let Counts {
                taken,
                bytes,
                queue_full,
                lost,
            } = lane.direction.counts();
            DirectionReport {
                taken,
                bytes,
                queue_full,
                lost,
                record: std::mem::take(&mut lane.record),
            }
        });
        Self { directions }
    }
}

/// Time of a thread on a core, and ready without one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cpu {
    pub(super) ran: Duration,
    pub(super) waited: Duration,
}

pub(super) fn own_cpu() -> Result<Cpu> {
    let line = fs::read_to_string("/proc/thread-self/schedstat")?;
    let mut nanos = line.split_whitespace().map(str::parse);
    let mut next = || -> Result<Duration> {
        Ok(Duration::from_nanos(
            nanos.next().ok_or("short schedstat")??,
        ))
    };
    Ok(Cpu {
        ran: next()?,
        waited: next()?,
    })
}

/// Packets that found the receive buffer of any UDP socket of the host full.
pub(super) fn host_drops() -> Result<u64> {
    let table = fs::read_to_string("/proc/net/snmp")?;
    let mut lines = table.lines().filter(|line| line.starts_with("Udp:"));
    let (names, values) = (lines.next(), lines.next());
    let (names, values) = names.zip(values).ok_or("no UDP in /proc/net/snmp")?;
    let at = names
        .split_whitespace()
        .position(|name| name == "RcvbufErrors");
    let value = values.split_whitespace().nth(at.ok_or("no RcvbufErrors")?);
    Ok(value.ok_or("no RcvbufErrors")?.parse()?)
}

/// Packets that the kernel dropped at the sockets with these IPv4 addresses.
pub(super) fn drops_of(addresses: &[SocketAddr]) -> Result<u64> {
    let table = fs::read_to_string("/proc/net/udp")?;
    let mut drops = 0;
    for line in table.lines().skip(1) {
        let fields: Vec<_> = line.split_whitespace().collect();
        let port = fields.get(1).and_then(|local| local.split(':').nth(1));
        let port = u16::from_str_radix(port.ok_or("short /proc/net/udp")?, 16)?;
        if addresses.iter().any(|address| address.port() == port) {
            drops += fields.last().ok_or("short /proc/net/udp")?.parse::<u64>()?;
        }
    }
    Ok(drops)
}
