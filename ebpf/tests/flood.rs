//! A flood from made-up sources all over IPv4, over a wire into the attached program: nothing
//! grows, every packet is accounted for, and clients that keep to half their limits are served.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::VecDeque;
use std::fs;
use std::io::Read as _;
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::edge::counters;
use common::flood::FarEnd;
use common::mocked::long_header;
use common::node::{Echo, NODE4, Node, QUIC_PORT, REMOTE4, TCP_PORT, connect, echoes};
use common::{PATIENCE, cpu, ok, privileged, until};
use libbpf_rs::MapCore as _;
use millrace_edge::counts::{Counts, TcpCap};
use millrace_edge::interface::AttachMode;
use millrace_edge::maps::Maps;
use millrace_edge::metrics::Counters;
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::settings::{Caps, Limits};
use millrace_testkit::eventually;

const SECOND: Duration = Duration::from_secs(1);
/// Connections of each protocol that a source may open, and hold.
const RATE: u32 = 1_000;
const CAP: u32 = 20;
/// Handshakes that each client tries: if none of so many is lost, the loss is below one in 1,000
/// (with 95 % confidence).
const ATTEMPTS: u32 = 3_000;
/// The least number of hostile packets beside each handshake. A generator that nothing slows down
/// sends ten times as many.
const HOSTILE_EACH: u64 = 100;
/// Packets of the part of the flood that runs alone.
const ALONE: u32 = 1 << 21;
/// Packets that are generated between two looks at the time.
const CHUNK: u32 = 1 << 15;

#[test]
fn a_flood_costs_no_memory_and_no_handshake() {
    let test = "a_flood_costs_no_memory_and_no_handshake";
    if !privileged(test) || !cpu::are_two(test) {
        return;
    }
    let caps = Caps {
        quic: CAP,
        tcp: CAP,
    };
    let node = Node::new("flood", AttachMode::Native, limits(), caps);
    node.set_syncookies(2);
    let lease = node.lease();
    let counts = half_of_the_quic_cap(&node);
    let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let echo = Echo::serve(node.listen(any, TCP_PORT), TcpCap::new(CAP));
    serve_quic(&node);
    assert!(echoes(&node.connect(NODE4, TCP_PORT).unwrap()));
    until("the first client has left", || node.kernel_sources() == 0);

    let maps = node.edge.maps();
    let (memory, wire, counted) = (map_memory(maps), Wire::of(&node), counters(&node.edge));
    thread::scope(|scope| {
        scope.spawn(|| flood_alone(&node));
    });
    let before = far(&node).sent();
    let served = clients_during_flood(&node);
    let beside = far(&node).sent() - before;
    assert!(beside >= HOSTILE_EACH * u64::from(ATTEMPTS), "{beside}");
    clients_leave(&node, &echo);
    let sent = far(&node).sent();
    eprintln!("{sent} hostile packets; {ATTEMPTS} attempts each: {served:?}");

    assert_eq!(map_memory(maps), memory, "memory and entries");
    assert!(echo.peak() <= CAP as usize);
    let ends = counters(&node.edge);
    for refusal in [
        Reason::TcpSourceCap,
        Reason::TcpSourceRate,
        Reason::QuicSourceCap,
        Reason::QuicSourceRate,
        Reason::QuicBadToken,
    ] {
        assert_eq!(
            ends.acted_on(refusal),
            0,
            "{refusal:?}: only clients could be refused so"
        );
    }
    // Every packet that came over the wire is in one counter.
    let arrived = |wire: &Wire| Wire::of(&node).packets - wire.packets;
    let in_counters = || counters(&node.edge).packets() - counted.packets();
    until("every packet is in one counter", || {
        arrived(&wire) == in_counters()
    });
    lease.end();
    drop(counts);
}

/// Waits until the kernel counts no connection. If that fails: with connections left they linger,
/// without them the kernel has miscounted.
fn clients_leave(node: &Node, echo: &Echo) {
    let begun = Instant::now();
    while node.kernel_sources() > 0 {
        assert!(
            begun.elapsed() < PATIENCE,
            "{} of {REMOTE4} are counted and {} served of {} sources; the node has\n{}",
            node.kernel_count(REMOTE4),
            echo.held(),
            node.kernel_sources(),
            node.pair
                .node
                .enter(|| ok(Command::new("ss").args(["-tano"])))
        );
        thread::sleep(Duration::from_millis(5));
    }
}

fn limits() -> Limits {
    let of_source = Limit::per(RATE.into(), SECOND, u64::from(RATE / 2));
    // Spent within a millisecond of the flood.
    let of_all = Limit::per(100, SECOND, 100);
    Limits {
        unvalidated: of_all,
        syn: of_all,
        source_quic: of_source,
        source_tcp: of_source,
        ..Limits::default()
    }
}

fn far(node: &Node) -> &FarEnd {
    node.far.as_ref().unwrap()
}

/// The client keeps to half of the connections that it may have.
fn half_of_the_quic_cap(node: &Node) -> Counts {
    let map = node.edge.maps().quic_sources();
    let handle = libbpf_rs::MapHandle::try_from(map).unwrap();
    let counts = Counts::new(handle, 1).unwrap();
    for _ in 0..CAP / 2 {
        counts.opened(REMOTE4);
    }
    counts
}

/// Bytes that the kernel uses for each map, and the entries of those that grow.
fn map_memory(maps: &Maps) -> Vec<(&'static str, u64, usize)> {
    let memory = |name| {
        let map = maps.handle(name);
        let info = format!("/proc/thread-self/fdinfo/{}", map.as_fd().as_raw_fd());
        let info = fs::read_to_string(info).unwrap();
        let line = info.lines().find_map(|line| line.strip_prefix("memlock:"));
        let hash = matches!(name, "quic_sources" | "tcp_sources" | "replies" | "peers");
        let entries = if hash { map.keys().count() } else { 0 };
        (name, line.unwrap().trim().parse().unwrap(), entries)
    };
    Maps::NAMES.map(memory).to_vec()
}

/// Memory of this process, in bytes.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.unwrap().trim().trim_end_matches(" kB");
    kibibytes.parse::<u64>().unwrap() * 1_024
}

/// What the node's interface has seen.
struct Wire {
    /// Packets that the program was shown.
    packets: u64,
    /// Packets for which its ring had no room.
    dropped: u64,
}

impl Wire {
    fn of(node: &Node) -> Self {
        let shown = node.pair.node.ip("-s -j link show dev mr0");
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        let received = &shown[0]["stats64"]["rx"];
        Self {
            packets: received["packets"].as_u64().unwrap(),
            dropped: received["dropped"].as_u64().unwrap(),
        }
    }
}

/// The flood by itself: its bursts are spent, each of its packets is in one counter, and none takes
/// a byte of memory.
fn flood_alone(node: &Node) {
    let generate = |packets| {
        node.pair.remote.enter(|| {
            cpu::pin(1);
            far(node).send(packets);
        });
    };
    let look = || {
        (
            far(node).sent(),
            Wire::of(node).dropped,
            counters(&node.edge),
        )
    };
    // The stacks at both ends send packets of their own now and then.
    let of_flood = |counters: &Counters| counters.packets() - counters.acted_on(Reason::PassOther);
    // The generator hands packets over; the kernel takes them in when it gets to it.
    let taken_in = |since: &(u64, u64, Counters)| {
        eventually("all that was sent is counted, or did not fit", || {
            let now = look();
            let counted = of_flood(&now.2) - of_flood(&since.2);
            (now.0 - since.0 == counted + (now.1 - since.1)).then_some(now)
        })
    };
    let quiet = look();
    generate(CHUNK);
    let spent = taken_in(&quiet);
    let answered = |counters: &Counters| {
        let of = |reason| counters.acted_on(reason);
        [of(Reason::TxRetry), of(Reason::TxSynCookie)]
    };
    assert!(answered(&spent.2).into_iter().all(|answers| answers > 0));
    let before = resident();
    generate(ALONE);
    let grown = resident().saturating_sub(before);

    let now = taken_in(&spent);
    let sent = now.0 - spent.0;
    assert_eq!(sent, u64::from(ALONE));
    let counted = of_flood(&now.2) - of_flood(&spent.2);
    let answers: u64 =
        answered(&now.2).iter().sum::<u64>() - answered(&spent.2).iter().sum::<u64>();
    assert!(
        answers * 100 > counted * 99,
        "{answers} answers to {counted}: {:?}",
        reasons(&spent.2, &now.2)
    );
    until("answers arrive at the other end", || {
        far(node).answers() > 0
    });
    assert!(grown < sent, "{grown} bytes for {sent} packets");
    let lost = now.1 - spent.1;
    eprintln!("alone {sent}: {counted} counted, {answers} answered, {lost} did not fit, {grown} B");
}

/// Packets of each reason between two readings.
fn reasons(before: &Counters, after: &Counters) -> Vec<(Reason, u64)> {
    let counted = Reason::ALL.iter().map(|reason| {
        let count = after.acted_on(*reason) - before.acted_on(*reason);
        (*reason, count)
    });
    counted.filter(|(_, count)| *count > 0).collect()
}

/// What a client got.
#[derive(Debug, Default)]
struct Served {
    completed: u32,
    /// Number of these whose packets had to be sent again: the ring was full, or the host busy.
    /// They are late, and not lost.
    repeated: u32,
}

/// Ends the flood also when a client panics.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Both clients at half their limits; all of their handshakes complete. TCP, then QUIC.
fn clients_during_flood(node: &Node) -> [Served; 2] {
    let over = AtomicBool::new(false);
    let flood = || {
        cpu::pin(1);
        while !over.load(Ordering::Relaxed) {
            far(node).send(CHUNK);
        }
    };
    let before = far(node).sent();
    // However busy the host is, each attempt has its hostile packets beside it.
    let amid_flood = |number: u32| {
        let wanted = before + HOSTILE_EACH * u64::from(number + 1);
        until("the flood goes on", || far(node).sent() >= wanted);
    };
    let client = |client: fn(&dyn Fn(u32)) -> Served| {
        node.pair.remote.enter(|| {
            cpu::pin(0);
            client(&amid_flood)
        })
    };
    thread::scope(|scope| {
        let _ends = Ends(&over);
        scope.spawn(|| node.pair.remote.enter(flood));
        let clients = [tcp_client, quic_client].map(|act| scope.spawn(move || client(act)));
        let served = clients.map(|client| client.join().unwrap());
        for served in &served {
            // Below 0.1 % of these is none.
            assert_eq!(served.completed, ATTEMPTS, "{served:?}");
        }
        served
    })
}

/// Calls at half the rate that a source may have, and no faster after a pause; each time when it is
/// `ready`.
fn at_half_the_rate(ready: &dyn Fn(u32), mut attempt: impl FnMut(u32)) {
    for number in 0..ATTEMPTS {
        ready(number);
        let begun = Instant::now();
        attempt(number);
        thread::sleep((SECOND * 2 / RATE).saturating_sub(begun.elapsed()));
    }
}

/// Holds half of the connections that it may.
fn tcp_client(ready: &dyn Fn(u32)) -> Served {
    let mut held = VecDeque::new();
    let mut served = Served::default();
    at_half_the_rate(ready, |_| {
        let begun = Instant::now();
        let stream = connect((NODE4, TCP_PORT).into()).unwrap();
        assert!(echoes(&stream));
        served.completed += 1;
        // Linux waits a second before it repeats a SYN.
        served.repeated += u32::from(begun.elapsed() >= SECOND);
        held.push_back(stream);
        if held.len() >= CAP as usize / 2 {
            hang_up(held.pop_front().unwrap());
        }
    });
    served
}

/// Closes a connection, and waits for the other end, so that the counts of both ends agree however
/// late its thread runs.
fn hang_up(mut stream: TcpStream) {
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

/// The answer of the stand-in for a QUIC server to every packet that reaches it.
const SERVED: &[u8] = b"served";

/// Serves until the process ends.
fn serve_quic(node: &Node) {
    let open = || UdpSocket::bind((NODE4, QUIC_PORT)).unwrap();
    let socket = node.pair.node.enter(open);
    thread::spawn(move || {
        let mut buffer = [0; 2_048];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            if peer.ip() == REMOTE4 {
                socket.send_to(SERVED, peer).unwrap();
            }
        }
    });
}

/// A client that is in no registry: it answers a Retry, with a new port for each attempt.
fn quic_client(ready: &dyn Fn(u32)) -> Served {
    let mut served = Served::default();
    at_half_the_rate(ready, |number| {
        let socket = UdpSocket::bind((REMOTE4, 0)).unwrap();
        socket.connect((NODE4, QUIC_PORT)).unwrap();
        let mut id = [7; 8];
        id[4..].copy_from_slice(&number.to_le_bytes());
        let (answer, tries) = exchange(&socket, &long_header(1, &id, &[]));
        let (answer, more) = match retry(&answer) {
            Some((id, token)) => exchange(&socket, &long_header(1, id, token)),
            None => (answer, 1),
        };
        assert_eq!(answer, SERVED);
        served.completed += 1;
        served.repeated += u32::from(tries + more > 2);
    });
    served
}

/// Sends until there is an answer; returns the answer and the number of attempts.
fn exchange(socket: &UdpSocket, payload: &[u8]) -> (Vec<u8>, u32) {
    let begun = Instant::now();
    let mut answer = vec![0; 2_048];
    socket.set_read_timeout(Some(SECOND / 4)).unwrap();
    let mut tries = 0;
    while begun.elapsed() < PATIENCE {
        socket.send(payload).unwrap();
        tries += 1;
        if let Ok(length) = socket.recv(&mut answer) {
            answer.truncate(length);
            return (answer, tries);
        }
    }
    panic!("no answer to {tries} packets");
}

/// Connection ID and token of a Retry to a client whose own ID is empty.
fn retry(answer: &[u8]) -> Option<(&[u8], &[u8])> {
    const TAG: usize = 16;
    let rest = answer.strip_prefix(&[0xf0, 0, 0, 0, 1, 0, 16])?;
    let (id, rest) = rest.split_at(16);
    Some((id, &rest[..rest.len() - TAG]))
}
