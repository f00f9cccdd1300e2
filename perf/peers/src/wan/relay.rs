//! The relay: one thread that moves packets between pairs of sockets as [`millrace_perf::relay`]
//! says.
//!
//! 1. A path is two sockets. What arrives at one leaves by the other, to the end that the other
//!    faces; the end of a side is who spoke there last, so a process may restart.
//! 2. Paths may share a link. The relay's own faults are not the link's: late packets, packets that
//!    the kernel dropped before the relay read them, packets without an end are counted apart.
//! 3. A packet leaves within [`TOLERANCE`] of its time when the relay gets a core in time. It asks
//!    for real-time priority, because it shares two cores with both ends.

mod counts;
mod paths;

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::process::{Command as Program, Stdio};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use millrace_perf::relay::{Direction, Fate, Lateness, LinkConfig};
use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit};
use rustix::event::{Timespec, epoll};

pub(super) use counts::{LinkReport, RelayReport};
pub(super) use paths::Path;
use paths::PathState;

use super::clock;
use crate::Result;

/// Packets leave up to this early and, but for the scheduler, this late: one wake-up for all that
/// are due within twice of it, instead of one for each.
const TOLERANCE: Duration = Duration::from_micros(100);
/// The longest that a command waits.
const COMMANDS_EVERY: Duration = Duration::from_millis(5);
/// What one GSO train may hold.
const TRAIN_BYTES_MAX: usize = 65_507;
/// Space of one received GRO train.
const GRO_BYTES: usize = 65_536;
/// Batches read from one socket before the others get their turn.
const READS_MAX: usize = 4;
/// How often the record has an entry while packets flow.
const RECORD_EVERY: Duration = Duration::from_millis(5);
/// Buffers of packets that are kept for the next ones.
const SPARE_MAX: usize = 32 << 10;

#[derive(Debug)]
enum Command {
    SetEnd {
        path: usize,
        side: usize,
        end: SocketAddr,
    },
    Stop,
}

/// A running relay. It stops when this is dropped.
#[derive(Debug)]
pub(super) struct Relay {
    /// Of each path, the socket that faces each end.
    pub(super) addresses: Vec<[SocketAddr; 2]>,
    commands: Sender<Command>,
    thread: Option<JoinHandle<Result<RelayReport>>>,
}

impl Relay {
    pub(super) fn start(links: &[LinkConfig], paths: &[Path]) -> Result<Self> {
        let (commands, inbox) = channel();
        let mut engine = Engine::new(links, paths, inbox)?;
        let addresses = engine.paths.iter().map(PathState::addresses);
        let addresses = addresses.collect::<io::Result<_>>()?;
        let thread = std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || engine.run())?;
        Ok(Self {
            addresses,
            commands,
            thread: Some(thread),
        })
    }

    /// Tells the relay whom a side of a path faces.
    pub(super) fn set_end(&self, path: usize, side: usize, end: SocketAddr) {
        // Fails when the thread has ended; `stop` says why.
        self.commands.send(Command::SetEnd { path, side, end }).ok();
    }

    pub(super) fn stop(mut self) -> Result<RelayReport> {
        self.commands.send(Command::Stop).ok();
        let thread = self.thread.take().ok_or("the relay was stopped before")?;
        thread.join().map_err(|_| "the relay panicked")?
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.commands.send(Command::Stop).ok();
    }
}

struct Packet {
    due: Duration,
    path: usize,
    bytes: Vec<u8>,
}

/// One direction of a link, with the packets on it.
struct Lane {
    direction: Direction,
    packets: VecDeque<Packet>,
    /// When how many bytes had left.
    record: Vec<(u64, u64)>,
    bytes_left: u64,
}

struct Engine {
    /// Both directions of each link.
    lanes: Vec<[Lane; 2]>,
    paths: Vec<PathState>,
    epoll: std::os::fd::OwnedFd,
    inbox: Receiver<Command>,
    buffers: Vec<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    train: Vec<u8>,
    lateness: Lateness,
    without_end: u64,
    send_failed: u64,
}

impl Engine {
    fn new(links: &[LinkConfig], paths: &[Path], inbox: Receiver<Command>) -> Result<Self> {
        let lane = |direction| Lane {
            direction,
            packets: VecDeque::new(),
            record: Vec::new(),
            bytes_left: 0,
        };
        let paths: Vec<_> = paths.iter().map(PathState::new).collect::<Result<_>>()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (index, path) in paths.iter().enumerate() {
            for (side, place) in path.sides.iter().enumerate() {
                let data = epoll::EventData::new_u64((index * 2 + side) as u64);
                epoll::add(&epoll, &place.socket, data, epoll::EventFlags::IN)?;
            }
        }
        Ok(Self {
            lanes: links
                .iter()
                .map(|link| link.directions().map(lane))
                .collect(),
            paths,
            epoll,
            inbox,
            buffers: vec![vec![0; GRO_BYTES]; BATCH_SIZE],
            spare: Vec::new(),
            train: Vec::with_capacity(TRAIN_BYTES_MAX),
            lateness: Lateness::default(),
            without_end: 0,
            send_failed: 0,
        })
    }

    fn run(&mut self) -> Result<RelayReport> {
        let is_realtime = ask_for_realtime();
        let started = (clock::now(), counts::own_cpu()?);
        let host_drops = counts::host_drops()?;
        let mut events = Vec::with_capacity(64);
        while self.obey() {
            events.clear();
            let timeout = self.sleep();
            let space = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, space, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                let place = event.data.u64() as usize;
                self.receive(place / 2, place % 2)?;
            }
            for link in 0..self.lanes.len() {
                self.send_due(link, 0);
                self.send_due(link, 1);
            }
        }
        let wall = clock::now() - started.0;
        let cpu = counts::own_cpu()?;
        let ports = self.paths.iter().flat_map(|path| &path.sides);
        let ports = ports.map(|side| side.socket.local_addr());
        let ports = ports.collect::<io::Result<Vec<_>>>()?;
        Ok(RelayReport {
            is_realtime,
            cores_used: (cpu.ran - started.1.ran).as_secs_f64() / wall.as_secs_f64(),
            waited_for_core_s: (cpu.waited - started.1.waited).as_secs_f64(),
            late_p50_us: self.lateness.quantile(0.5).as_micros() as u64,
            late_p99_us: self.lateness.quantile(0.99).as_micros() as u64,
            late_max_us: self.lateness.max().as_micros() as u64,
            relay_drops: counts::drops_of(&ports)?,
            host_drops: counts::host_drops()? - host_drops,
            without_end: self.without_end,
            send_failed: self.send_failed,
            links: self.lanes.iter_mut().map(LinkReport::of).collect(),
        })
    }

    /// Carries out commands; false when the relay is to stop.
    fn obey(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(Command::SetEnd { path, side, end }) => {
                    self.paths[path].sides[side].end = Some(end);
                }
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    /// How long nothing is due.
    fn sleep(&self) -> Timespec {
        let lanes = self.lanes.iter().flatten();
        let due = lanes.filter_map(|lane| lane.packets.front().map(|packet| packet.due));
        let next = due.min().map_or(COMMANDS_EVERY, |due| {
            (due + TOLERANCE).saturating_sub(clock::now())
        });
        let next = next.min(COMMANDS_EVERY);
        Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(next.subsec_nanos()),
        }
    }

    fn receive(&mut self, path: usize, side: usize) -> Result<()> {
        let link = self.paths[path].link;
        for _ in 0..READS_MAX {
            let mut metas = [RecvMeta::default(); BATCH_SIZE];
            let mut slices: Vec<_> = self
                .buffers
                .iter_mut()
                .map(|buffer| IoSliceMut::new(buffer))
                .collect();
            let place = &mut self.paths[path].sides[side];
            let count = match place
                .state
                .recv((&place.socket).into(), &mut slices, &mut metas)
            {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let now = clock::now();
            let lane = &mut self.lanes[link][side];
            for (meta, buffer) in metas.iter().zip(&self.buffers).take(count) {
                place.end = Some(meta.addr);
                for bytes in buffer[..meta.len].chunks(meta.stride.max(1)) {
                    if let Fate::Arrives(due) = lane.direction.take(bytes.len(), now) {
                        let mut copy = self.spare.pop().unwrap_or_default();
                        copy.clear();
                        copy.extend_from_slice(bytes);
                        let bytes = copy;
                        lane.packets.push_back(Packet { due, path, bytes });
                    }
                }
            }
            if count < BATCH_SIZE {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sends what is due on one direction of a link, in trains of packets of one size.
    fn send_due(&mut self, link: usize, from: usize) {
        let now = clock::now();
        loop {
            let lane = &mut self.lanes[link][from];
            let is_due = |packet: &Packet| packet.due <= now + TOLERANCE;
            let Some(first) = lane.packets.front().filter(|packet| is_due(packet)) else {
                break;
            };
            let (path, size) = (first.path, first.bytes.len());
            let side = &self.paths[path].sides[1 - from];
            let count_max = side.state.max_gso_segments();
            self.train.clear();
            let mut count = 0;
            while let Some(next) = lane.packets.front()
                && is_due(next)
                && next.path == path
                && next.bytes.len() <= size
                && count < count_max
                && self.train.len() + next.bytes.len() <= TRAIN_BYTES_MAX
            {
                // A shorter packet ends its train.
                let is_last = next.bytes.len() < size;
                self.train.extend_from_slice(&next.bytes);
                self.lateness.record(now.saturating_sub(next.due), 1);
                count += 1;
                if let Some(packet) = lane.packets.pop_front()
                    && self.spare.len() < SPARE_MAX
                {
                    self.spare.push(packet.bytes);
                }
                if is_last {
                    break;
                }
            }
            lane.bytes_left += self.train.len() as u64;
            let Some(destination) = side.end else {
                self.without_end += count as u64;
                continue;
            };
            let transmit = Transmit {
                destination,
                ecn: None,
                contents: &self.train,
                segment_size: (count > 1).then_some(size),
                src_ip: None,
            };
            let sent = side.state.try_send((&side.socket).into(), &transmit);
            if sent.is_err() {
                self.send_failed += count as u64;
            }
        }
        let lane = &mut self.lanes[link][from];
        let last = lane.record.last().copied().unwrap_or_default();
        let nanos = now.as_nanos() as u64;
        if lane.bytes_left > last.1 && nanos - last.0 >= RECORD_EVERY.as_nanos() as u64 {
            lane.record.push((nanos, lane.bytes_left));
        }
    }
}

/// Real-time priority for the calling thread, by the program for it; false when it was refused.
fn ask_for_realtime() -> bool {
    let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
    let asked = Program::new("chrt")
        .args(["--fifo", "--pid", "10", &thread])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    asked.is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};

    use super::*;

    fn link(rtt_ms: u64, loss_ppm: u32) -> LinkConfig {
        LinkConfig {
            rtt: Duration::from_millis(rtt_ms),
            bits_per_second: 300_000_000,
            queue: Duration::from_millis(50),
            loss_ppm,
            seed: 1,
        }
    }

    /// Protects what every figure of the bench stands on: packets come over in order, from either
    /// end, not before their time, and the losses of the link are counted as such.
    #[test]
    fn packets_cross_in_order_after_half_of_the_round_trip() {
        let ends: Vec<_> = (0..2)
            .map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
            .collect();
        let path = Path {
            link: 0,
            ends: [None, Some(ends[1].local_addr().unwrap())],
        };
        let relay = Relay::start(&[link(40, 0)], &[path]).unwrap();
        let facing = relay.addresses[0];
        let mut buffer = [0; 64];
        for (from, to) in [(0, 1), (1, 0)] {
            let sent = clock::now();
            for number in 0..100_u8 {
                ends[from].send_to(&[number], facing[from]).unwrap();
            }
            for number in 0..100_u8 {
                let (length, source) = ends[to].recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], source), (&[number][..], facing[to]));
            }
            assert!(clock::now() - sent >= Duration::from_millis(20) - TOLERANCE);
        }
        let report = relay.stop().unwrap();
        assert_eq!((report.without_end, report.send_failed), (0, 0));
        assert_eq!(report.links[0].directions[0].taken, 100);
    }
}
