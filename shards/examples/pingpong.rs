//! UDP echo between two shards: how long a packet takes from one loop to the other and back.
//!
//! `cargo run --release -p millrace-shards --example pingpong [seconds]` prints p50 and p99 of the
//! round trip for the profiles spin, 20 us then park, and park, with one and with 64 packets in
//! flight, and what each round trip cost in turns, system calls and CPU.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use millrace_shards::{
    Datagrams, Datapath, HugePages, ShardConfig, ShardStatsSnapshot, Trains, Transmit,
    UdpGroupConfig, bind_group, spawn,
};

const BYTES: usize = 64;

/// Sends what comes in back to where it came from; the first packets are its own.
struct Echo {
    queue: Vec<(SocketAddr, [u8; BYTES])>,
    /// Where the round trips are timed: at the side that began.
    times: Option<mpsc::Sender<Vec<u32>>>,
    samples: Vec<u32>,
    origin: Instant,
    stop: Arc<AtomicBool>,
}

impl Echo {
    fn stamp(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..8].copy_from_slice(&(self.origin.elapsed().as_nanos() as u64).to_ne_bytes());
        bytes
    }
}

impl Datapath for Echo {
    type Message = (SocketAddr, usize);

    fn on_message(&mut self, (to, count): (SocketAddr, usize), _: Instant) {
        for _ in 0..count {
            self.queue.push((to, self.stamp()));
        }
    }

    fn on_datagrams(&mut self, mut datagrams: Datagrams<'_>, _: Instant) {
        let from = datagrams.from();
        for segment in datagrams.segments() {
            let Ok(mut bytes) = <[u8; BYTES]>::try_from(&*segment) else {
                continue;
            };
            if self.times.is_some() {
                let sent = u64::from_ne_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|at| bytes[at]));
                let now = self.origin.elapsed().as_nanos() as u64;
                if self.samples.len() < self.samples.capacity() {
                    self.samples.push((now - sent) as u32);
                }
                if self.stop.load(Ordering::Relaxed) {
                    continue;
                }
                bytes = self.stamp();
            }
            self.queue.push((from, bytes));
        }
    }

    fn transmit(&mut self, trains: &mut Trains<'_>, _: Instant) -> Transmit {
        for (to, bytes) in self.queue.drain(..) {
            let Some(buffer) = trains.packet(BYTES) else {
                break;
            };
            buffer.copy_from_slice(&bytes);
            trains.push(BYTES, to);
        }
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        false
    }

    fn on_stop(&mut self, _: Instant) {
        if let Some(times) = self.times.take() {
            // The receiver waits for it.
            let _ = times.send(std::mem::take(&mut self.samples));
        }
    }
}

fn main() {
    let seconds = std::env::args()
        .nth(1)
        .and_then(|arg| arg.parse().ok())
        .unwrap_or(2.0);
    println!(
        "profile     in flight   p50 us   p99 us   trips/s  enters/trip  parks/trip  cpu us/trip"
    );
    for (name, spin) in [
        ("spin", Duration::from_secs(3600)),
        ("20 us", Duration::from_micros(20)),
        ("park", Duration::ZERO),
    ] {
        for in_flight in [1, 64] {
            run(name, spin, in_flight, Duration::from_secs_f64(seconds));
        }
    }
}

fn run(name: &str, spin: Duration, in_flight: usize, time: Duration) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let stop = Arc::new(AtomicBool::new(false));
    let (times, samples) = mpsc::channel();
    let start = |index: usize, times: Option<mpsc::Sender<Vec<u32>>>| {
        let config = ShardConfig {
            cpu: Some(index % cores),
            spin,
            chunk_pool_bytes: 0,
            huge_pages: HugePages::Never,
            ..ShardConfig::default()
        };
        let local = "127.0.0.1:0".parse().expect("an address");
        let group = UdpGroupConfig {
            local,
            ..UdpGroupConfig::default()
        };
        let socket = bind_group(&group).expect("a socket").remove(0);
        let stop = Arc::clone(&stop);
        let addr = socket.local_addr();
        let handle = spawn(config, index, 2, Some(socket), move |_| Echo {
            queue: Vec::with_capacity(1024),
            samples: Vec::with_capacity(if times.is_some() { 8 << 20 } else { 0 }),
            times,
            origin: Instant::now(),
            stop,
        });
        (addr, handle.expect("a shard"))
    };
    let (_, ping) = start(0, Some(times));
    let (pong_addr, pong) = start(1, None);
    let cpu = cpu_seconds();
    let began = Instant::now();
    ping.sender()
        .try_send((pong_addr, in_flight))
        .expect("an empty mailbox");
    std::thread::sleep(time);
    let elapsed = began.elapsed();
    stop.store(true, Ordering::Relaxed);
    let cpu = cpu_seconds() - cpu;
    let stats = [ping.stats().snapshot(), pong.stats().snapshot()];
    ping.stop();
    pong.stop();
    let mut samples: Vec<u32> = samples.recv().expect("the samples");
    ping.join().expect("a clean end");
    pong.join().expect("a clean end");
    samples.sort_unstable();
    let trips = samples.len().max(1);
    let at = |share: f64| {
        samples
            .get((trips as f64 * share) as usize)
            .map_or(f64::NAN, |&ns| f64::from(ns) / 1e3)
    };
    let per_trip = |count: fn(&ShardStatsSnapshot) -> u64| {
        stats.iter().map(count).sum::<u64>() as f64 / trips as f64
    };
    println!(
        "{name:<10} {in_flight:>10} {:>8.1} {:>8.1} {:>9.0} {:>12.2} {:>11.2} {:>12.2}",
        at(0.5),
        at(0.99),
        trips as f64 / elapsed.as_secs_f64(),
        per_trip(|stats| stats.enters),
        per_trip(|stats| stats.direct_parks + stats.eventfd_parks),
        cpu * 1e6 / trips as f64,
    );
}

/// CPU time of this process.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks = stat.rsplit(") ").next().map_or(0, |rest| {
        rest.split(' ')
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum()
    });
    ticks as f64 / 100.0
}
