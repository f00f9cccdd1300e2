//! Times mailboxes, and trains on a running shard, which need threads and the kernel.

use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use millrace_shards::{
    Datagrams, Datapath, HugePages, MailReceiver, MailSender, ShardConfig, ShardHandle, Trains,
    Transmit, UdpGroupConfig, bind_group, mailbox, spawn,
};

/// Packets that a turn may fill by default: 16 slots, each one train of 45 packets.
const TURN_PACKETS: u64 = 16 * 45;
const PACKET_BYTES: usize = 1452;
const MAILBOX_CAPACITY: usize = 4096;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .sample_size(30)
        .configure_from_args();
    mailboxes(&mut criterion);
    trains(&mut criterion);
    criterion.final_summary();
}

fn mailboxes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mailbox");
    group.throughput(Throughput::Elements(1));
    group.bench_function("send_receive", |bencher| {
        let (sender, mut receiver) = mailbox(MAILBOX_CAPACITY).expect("a pipe for the mailbox");
        bencher.iter(|| {
            sender.try_send(7u64).expect("there is room");
            receiver.try_recv()
        });
    });
    group.bench_function("between_threads", |bencher| {
        bencher.iter_custom(between_threads);
    });
    group.bench_function("round_trip", |bencher| {
        bencher.iter_custom(round_trips);
    });
    group.finish();
}

/// Time until a second thread has all of `messages`, which this one sends as fast as it can.
fn between_threads(messages: u64) -> Duration {
    let (sender, mut receiver) = mailbox(MAILBOX_CAPACITY).expect("a pipe for the mailbox");
    thread::scope(|scope| {
        let reader = scope.spawn(move || {
            for _ in 0..messages {
                receive(&mut receiver);
            }
            Instant::now()
        });
        let start = Instant::now();
        for message in 0..messages {
            send(&sender, message);
        }
        reader.join().expect("the reader ends") - start
    })
}

/// Time of `count` messages to a second thread and back, one at a time.
fn round_trips(count: u64) -> Duration {
    let (to_echo, mut at_echo) = mailbox(MAILBOX_CAPACITY).expect("a pipe for the mailbox");
    let (to_asker, mut at_asker) = mailbox(MAILBOX_CAPACITY).expect("a pipe for the mailbox");
    thread::scope(|scope| {
        scope.spawn(move || {
            for _ in 0..count {
                send(&to_asker, receive(&mut at_echo));
            }
        });
        let start = Instant::now();
        for message in 0..count {
            send(&to_echo, message);
            receive(&mut at_asker);
        }
        start.elapsed()
    })
}

fn send(sender: &MailSender<u64>, message: u64) {
    while sender.try_send(message).is_err() {
        thread::yield_now();
    }
}

/// Polls as a shard does, and gives way now and then: the machine may have one free core.
fn receive(receiver: &mut MailReceiver<u64>) -> u64 {
    loop {
        for _ in 0..1000 {
            if let Some(message) = receiver.try_recv() {
                return message;
            }
            std::hint::spin_loop();
        }
        thread::yield_now();
    }
}

fn trains(criterion: &mut Criterion) {
    // No thread reads it: once it is full the kernel drops, after the same work for the sender.
    let sink = UdpSocket::bind("127.0.0.1:0").expect("a socket on loopback");
    let shard = Shard::start(sink.local_addr().expect("a bound socket"));
    let mut group = criterion.benchmark_group("trains");
    group.throughput(Throughput::Elements(TURN_PACKETS));
    group.bench_function("build", |bencher| {
        bencher.iter_custom(|turns| shard.send(turns * TURN_PACKETS).building);
    });
    group.bench_function("build_and_send", |bencher| {
        bencher.iter_custom(|turns| shard.send(turns * TURN_PACKETS).elapsed);
    });
    group.finish();
    shard.handle.stop();
    shard.handle.join().expect("the shard ends");
}

/// A shard whose datapath builds trains when told to.
struct Shard {
    handle: ShardHandle<u64>,
    sent: mpsc::Receiver<Sent>,
}

/// Times of one order.
struct Sent {
    /// In `transmit`: trains filled and queued for submission.
    building: Duration,
    /// From the order to the last train: all of the shard's loop, and the kernel's sends.
    elapsed: Duration,
}

impl Shard {
    fn start(to: SocketAddr) -> Self {
        let group = UdpGroupConfig {
            local: "127.0.0.1:0".parse().expect("an address"),
            ..UdpGroupConfig::default()
        };
        let socket = bind_group(&group).expect("a socket on loopback").remove(0);
        let config = ShardConfig {
            chunk_pool_bytes: 0,
            huge_pages: HugePages::Never,
            ..ShardConfig::default()
        };
        let (done, sent) = mpsc::channel();
        let handle = spawn(config, 0, 1, Some(socket), move |_| Builder {
            to,
            left: 0,
            building: Duration::ZERO,
            start: Instant::now(),
            done,
        })
        .expect("a shard starts on this machine");
        Self { handle, sent }
    }

    fn send(&self, packets: u64) -> Sent {
        self.handle
            .sender()
            .try_send(packets)
            .expect("the mailbox is empty");
        self.sent.recv().expect("the shard runs")
    }
}

struct Builder {
    to: SocketAddr,
    left: u64,
    building: Duration,
    start: Instant,
    done: mpsc::Sender<Sent>,
}

impl Datapath for Builder {
    type Message = u64;

    fn on_message(&mut self, packets: u64, now: Instant) {
        self.left = packets;
        self.building = Duration::ZERO;
        self.start = now;
    }

    fn transmit(&mut self, trains: &mut Trains<'_>, _: Instant) -> Transmit {
        if self.left == 0 {
            return Transmit::Done;
        }
        let start = Instant::now();
        while self.left > 0 {
            let Some(buffer) = trains.packet(PACKET_BYTES) else {
                self.building += start.elapsed();
                return Transmit::More;
            };
            buffer[0] = 0x40;
            trains.push(PACKET_BYTES, self.to);
            self.left -= 1;
        }
        self.building += start.elapsed();
        let sent = Sent {
            building: self.building,
            elapsed: self.start.elapsed(),
        };
        // The send fails when the bench was broken off and its receiver is gone.
        let _ = self.done.send(sent);
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        self.left > 0
    }

    fn on_datagrams(&mut self, _: Datagrams<'_>, _: Instant) {}
}
