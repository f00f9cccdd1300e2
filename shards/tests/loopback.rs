//! Real sockets over loopback: what is pushed into trains arrives exactly as pushed.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{config, socket};
use millrace_shards::{
    Datagrams, Datapath, ShardConfig, ShardHandle, ShardSocket, SocketId, Trains, Transmit, spawn,
};
use millrace_testkit::skip;
use proptest::prelude::{ProptestConfig, Strategy, any, prop, prop_assert_eq, proptest};

/// A datapath that sends packets it is told to and reports what arrives.
struct Relay {
    queue: std::collections::VecDeque<Packet>,
    seen: mpsc::Sender<(SocketAddr, Vec<u8>)>,
    hold: Duration,
    offer: usize,
}

#[derive(Debug, Clone)]
struct Packet {
    bytes: usize,
    tag: u32,
    to: SocketAddr,
    finish: bool,
}

impl Packet {
    fn contents(&self) -> Vec<u8> {
        let mut contents = self.tag.to_ne_bytes().to_vec();
        contents.resize(self.bytes, self.tag as u8);
        contents
    }
}

impl Datapath for Relay {
    type Message = Vec<Packet>;

    fn on_message(&mut self, message: Vec<Packet>, _: Instant) {
        self.queue.extend(message);
    }

    fn on_datagrams(&mut self, mut datagrams: Datagrams<'_>, _: Instant) {
        let from = datagrams.from();
        // A slow receiver: the kernel runs out of slots meanwhile.
        std::thread::sleep(self.hold);
        for segment in datagrams.segments() {
            self.seen.send((from, segment.to_vec())).unwrap();
        }
    }

    fn transmit(&mut self, trains: &mut Trains<'_>, _: Instant) -> Transmit {
        while let Some(packet) = self.queue.front() {
            let Some(buffer) = trains.packet(self.offer) else {
                return Transmit::More;
            };
            let contents = packet.contents();
            buffer[..contents.len()].copy_from_slice(&contents);
            trains.push(contents.len(), packet.to);
            if packet.finish {
                trains.finish();
            }
            self.queue.pop_front();
        }
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        !self.queue.is_empty()
    }
}

struct Peer {
    addr: SocketAddr,
    handle: ShardHandle<Vec<Packet>>,
    seen: mpsc::Receiver<(SocketAddr, Vec<u8>)>,
}

impl Peer {
    fn start(config: ShardConfig, local: &str, hold: Duration, offer: usize) -> Self {
        let socket = socket(local);
        let addr = socket.local_addr();
        let (sender, seen) = mpsc::channel();
        let handle = spawn(config, 0, 1, Some(socket), move |_| Relay {
            queue: std::collections::VecDeque::new(),
            seen: sender,
            hold,
            offer,
        })
        .unwrap();
        Self { addr, handle, seen }
    }

    fn send(&self, packets: Vec<Packet>) {
        self.handle.sender().try_send(packets).unwrap();
    }

    fn expect(&self, count: usize) -> Vec<(SocketAddr, Vec<u8>)> {
        let wait = Duration::from_secs(20);
        (0..count)
            .map(|_| self.seen.recv_timeout(wait).unwrap())
            .collect()
    }

    fn stop(self) {
        self.handle.stop();
        self.handle.join().unwrap();
    }
}

fn round_trip(local: &str, sizes: &[(usize, bool, bool)]) {
    let sender = Peer::start(config(), local, Duration::ZERO, 1452);
    let peers = [0; 2].map(|_| Peer::start(config(), local, Duration::ZERO, 1452));
    let packets: Vec<Packet> = sizes
        .iter()
        .enumerate()
        .map(|(tag, &(bytes, second, finish))| Packet {
            bytes,
            tag: tag as u32,
            to: peers[usize::from(second)].addr,
            finish,
        })
        .collect();
    sender.send(packets.clone());
    for peer in &peers {
        let sent: Vec<_> = packets
            .iter()
            .filter(|packet| packet.to == peer.addr)
            .map(|packet| (sender.addr, packet.contents()))
            .collect();
        assert_eq!(peer.expect(sent.len()), sent);
    }
    let stats = sender.handle.stats().snapshot();
    assert_eq!(stats.packets_sent, sizes.len() as u64);
    assert_eq!(stats.send_errors, 0);
    sender.stop();
    peers.into_iter().for_each(Peer::stop);
}

fn sizes() -> impl Strategy<Value = Vec<(usize, bool, bool)>> {
    // Runs of equal sizes, as bulk makes them, between packets of any size.
    let size = proptest::prop_oneof![4usize..1453, proptest::strategy::Just(1452)];
    let run = (size, 1usize..60, any::<bool>(), any::<bool>());
    prop::collection::vec(run, 1..8).prop_map(|runs| {
        let expand = |(bytes, count, second, finish)| vec![(bytes, second, finish); count];
        runs.into_iter().flat_map(expand).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any sequence of sizes and destinations arrives as pushed, over IPv4.
    #[test]
    fn trains_arrive_as_pushed_v4(sizes in sizes()) {
        round_trip("127.0.0.1:0", &sizes);
        prop_assert_eq!(sizes.is_empty(), false);
    }

    /// Any sequence of sizes and destinations arrives as pushed, over IPv6.
    #[test]
    fn trains_arrive_as_pushed_v6(sizes in sizes()) {
        if UdpSocket::bind("[::1]:0").is_err() {
            skip::skip("trains_arrive_as_pushed_v6", "IPv6");
            return Ok(());
        }
        round_trip("[::1]:0", &sizes);
        prop_assert_eq!(sizes.is_empty(), false);
    }
}

/// Equal packets leave as few trains, and a larger packet starts the next one without a new slot.
#[test]
fn equal_packets_share_a_train() {
    let sender = Peer::start(config(), "127.0.0.1:0", Duration::ZERO, 1452);
    let peer = Peer::start(config(), "127.0.0.1:0", Duration::ZERO, 1452);
    let packet = |tag, bytes| Packet {
        bytes,
        tag,
        to: peer.addr,
        finish: false,
    };
    // 45 of 1452 fill a slot; then 10 of 100, then one of 200 and a shorter one that closes it.
    let mut packets: Vec<_> = (0..45).map(|tag| packet(tag, 1452)).collect();
    packets.extend((45..55).map(|tag| packet(tag, 100)));
    packets.extend([packet(55, 200), packet(56, 150), packet(57, 150)]);
    sender.send(packets);
    assert_eq!(peer.expect(58).len(), 58);
    let stats = sender.handle.stats().snapshot();
    assert_eq!((stats.packets_sent, stats.trains_sent), (58, 4));
    let received = peer.handle.stats().snapshot();
    assert_eq!((received.datagrams_received, received.receives), (58, 4));
    sender.stop();
    peer.stop();
}

/// A receiver slower than its sender runs out of slots, is armed again, grows for small messages,
/// and neither loses nor reorders what the socket's buffer held.
#[test]
fn starvation_loses_nothing() {
    let slow = ShardConfig {
        rx_slots: 2,
        rx_slots_max: 64,
        ..config()
    };
    let sender = Peer::start(config(), "127.0.0.1:0", Duration::ZERO, 1452);
    let peer = Peer::start(slow, "127.0.0.1:0", Duration::from_micros(200), 1452);
    // Each a train of its own, so that each takes a slot.
    let packets: Vec<_> = (0..400)
        .map(|tag| Packet {
            bytes: 60,
            tag,
            to: peer.addr,
            finish: true,
        })
        .collect();
    sender.send(packets.clone());
    let seen = peer.expect(packets.len());
    let tags: Vec<u32> = seen
        .iter()
        .map(|(_, bytes)| u32::from_ne_bytes(bytes[..4].try_into().unwrap()))
        .collect();
    assert_eq!(tags, (0..400).collect::<Vec<_>>());
    let stats = peer.handle.stats().snapshot();
    assert!(stats.enobufs_rearms > 0, "{stats:?}");
    assert!(stats.rx_slots_grown > 0, "{stats:?}");
    sender.stop();
    peer.stop();
}

/// More than one turn's budget goes out over several turns, in order.
#[test]
fn transmit_goes_on_after_its_budget() {
    let small = ShardConfig {
        tx_slots: 1,
        tx_slots_max: 2,
        tx_slots_per_turn: 2,
        ..config()
    };
    let sender = Peer::start(small, "127.0.0.1:0", Duration::ZERO, 1452);
    let peer = Peer::start(config(), "127.0.0.1:0", Duration::ZERO, 1452);
    let packets: Vec<_> = (0..45 * 20)
        .map(|tag| Packet {
            bytes: 1452,
            tag,
            to: peer.addr,
            finish: false,
        })
        .collect();
    sender.send(packets.clone());
    let seen = peer.expect(packets.len());
    assert!(
        seen.iter()
            .zip(&packets)
            .all(|(seen, sent)| seen.1 == sent.contents())
    );
    sender.stop();
    peer.stop();
}

/// Over loopback the kernel copies in spite of the flag: one large train shows it, and none is
/// lost.
#[test]
fn zero_copy_probe_on_loopback() {
    let sender = Peer::start(config(), "127.0.0.1:0", Duration::ZERO, 1452);
    let peer = Peer::start(config(), "127.0.0.1:0", Duration::ZERO, 1452);
    for round in 0..3 {
        let packets: Vec<_> = (0..45 * 3)
            .map(|tag| Packet {
                bytes: 1452,
                tag: tag + round,
                to: peer.addr,
                finish: false,
            })
            .collect();
        sender.send(packets.clone());
        let seen = peer.expect(packets.len());
        assert!(
            seen.iter()
                .zip(&packets)
                .all(|(seen, sent)| seen.1 == sent.contents())
        );
    }
    assert_eq!(sender.handle.stats().snapshot().trains_sent_zc, 1);
    sender.stop();
    peer.stop();
}

/// Sends every datagram back, from the socket that it came to.
struct Mirror {
    answers: Vec<(SocketId, SocketAddr, Vec<u8>)>,
    hold: Duration,
}

impl Datapath for Mirror {
    type Message = ();

    fn on_message(&mut self, (): (), _: Instant) {}

    fn on_datagrams(&mut self, mut datagrams: Datagrams<'_>, _: Instant) {
        std::thread::sleep(self.hold);
        let (socket, from) = (datagrams.socket(), datagrams.from());
        let answer = |segment: &mut [u8]| (socket, from, segment.to_vec());
        self.answers.extend(datagrams.segments().map(answer));
    }

    fn transmit(&mut self, trains: &mut Trains<'_>, _: Instant) -> Transmit {
        while let Some((socket, to, bytes)) = self.answers.first() {
            trains.select(*socket);
            let Some(buffer) = trains.packet(1452) else {
                return Transmit::More;
            };
            buffer[..bytes.len()].copy_from_slice(bytes);
            trains.push(bytes.len(), *to);
            self.answers.remove(0);
        }
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        !self.answers.is_empty()
    }
}

/// A shard with several UDP sockets receives on all and answers from the one that was asked, also
/// when all of them have to share fewer slots than there are datagrams.
#[test]
fn several_sockets_of_one_shard() {
    let mut locals = vec!["127.0.0.1:0", "127.0.0.1:0"];
    if UdpSocket::bind("[::1]:0").is_ok() {
        locals.push("[::1]:0");
    } else {
        skip::skip("several_sockets_of_one_shard, its third socket", "IPv6");
    }
    let sockets: Vec<_> = locals.iter().map(|local| socket(local)).collect();
    let addrs: Vec<_> = sockets.iter().map(ShardSocket::local_addr).collect();
    let bound = addrs.clone();
    let starved = ShardConfig {
        rx_slots: 2,
        rx_slots_max: 2,
        ..config()
    };
    let handle = spawn(starved, 0, 1, sockets, move |shard| {
        let told: Vec<_> = shard
            .sockets
            .iter()
            .map(|socket| socket.local_addr)
            .collect();
        assert_eq!(told, bound);
        assert_eq!(shard.local_addr, bound[0]);
        Mirror {
            answers: Vec::new(),
            hold: Duration::from_micros(100),
        }
    })
    .unwrap();
    // A connected socket takes nothing but what comes from the address that it asked.
    let clients: Vec<_> = locals
        .iter()
        .zip(&addrs)
        .map(|(local, addr)| {
            let client = UdpSocket::bind(local).unwrap();
            client.connect(addr).unwrap();
            client
                .set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            client
        })
        .collect();
    const ROUNDS: u8 = 100;
    for round in 0..ROUNDS {
        for (index, client) in clients.iter().enumerate() {
            client.send(&[index as u8, round]).unwrap();
        }
    }
    for (index, client) in clients.iter().enumerate() {
        for round in 0..ROUNDS {
            let mut answer = [0; 16];
            let len = client.recv(&mut answer).unwrap();
            assert_eq!(answer[..len], [index as u8, round]);
        }
    }
    let stats = handle.stats().snapshot();
    assert!(stats.enobufs_rearms > 0, "{stats:?}");
    assert_eq!(stats.send_errors, 0);
    handle.stop();
    handle.join().unwrap();
    // Every socket was closed with its shard.
    for addr in addrs {
        UdpSocket::bind(addr).unwrap();
    }
}

/// A packet for a socket that the shard does not own is dropped and counted; those around it leave.
#[test]
fn a_socket_of_no_shard_is_an_error_of_sending() {
    let peer = Peer::start(config(), "127.0.0.1:0", Duration::ZERO, 1452);
    let to = peer.addr;
    let handle = spawn(config(), 0, 1, Some(socket("127.0.0.1:0")), move |_| {
        Mirror {
            answers: [0, 1, 255, 0]
                .into_iter()
                .map(|index| (SocketId::new(index), to, vec![index]))
                .collect(),
            hold: Duration::ZERO,
        }
    })
    .unwrap();
    let seen: Vec<_> = peer.expect(2).into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(seen, [[0], [0]]);
    assert_eq!(handle.stats().snapshot().send_errors, 2);
    handle.stop();
    handle.join().unwrap();
    peer.stop();
}

/// A stopped shard gives its port back and refuses messages.
#[test]
fn stop_frees_the_socket() {
    let peer = Peer::start(config(), "127.0.0.1:0", Duration::ZERO, 1452);
    let (addr, sender) = (peer.addr, peer.handle.sender());
    let pool = peer.handle.pool();
    peer.stop();
    assert_eq!(sender.try_send(Vec::new()).unwrap_err().reason(), "closed");
    assert_eq!(pool.total_chunks(), 0);
    // Fails while the ring's registered file still holds the port.
    UdpSocket::bind(addr).unwrap();
}
