//! A program that loses a wake-up if one can be lost: then it stands still, and says so.
//!
//! Two shards on two cores play cycles. In each, the first wakes the second in a random set of ways
//! at once (a packet, a message by MSG_RING, a message through the pipe, a local task's waker from
//! a foreign thread) after a random gap of at most 10 us, and goes on when all were answered by
//! messages. Every fiftieth cycle starts local tasks on the second that use glommio's timers, files
//! and blocking threads and end soon, so that its parks change between its own ring and glommio.
//! Burners keep both cores busy. The fallbacks (longest park, housekeeping) are out of reach:
//! nothing but the wake-ups themselves, and the watchdog where one is asked for, moves the program.

use std::cell::Cell;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use millrace_shards::{
    Datagrams, Datapath, HugePages, MailSender, Queue, ShardConfig, ShardStatsSnapshot, Spawner,
    Trains, Transmit, UdpGroupConfig, bind_group, in_executor, mailbox, sleep, spawn_with_mailbox,
};

/// How to run the program.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) time: Duration,
    pub(crate) spin: Duration,
    pub(crate) preempt_timer: Duration,
    /// Zero leaves the watchdog out.
    pub(crate) watchdog: Duration,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) cycles: u64,
    pub(crate) hung: bool,
    pub(crate) woken: ShardStatsSnapshot,
}

/// No cycle takes this long unless its wake-up was lost.
const STANDSTILL: Duration = Duration::from_secs(10);

pub(crate) fn run(options: Options) -> Outcome {
    let over = Arc::new(AtomicBool::new(false));
    let burners: Vec<_> = (0..2).map(|cpu| burn(cpu, Arc::clone(&over))).collect();
    let cycles = Arc::new(AtomicU64::new(0));
    let gate = Arc::new(Gate::default());

    let config = |cpu: usize| ShardConfig {
        cpu: Some(cpu % cores()),
        spin: options.spin,
        preempt_timer: options.preempt_timer,
        direct_park_max: Duration::from_secs(3600),
        housekeeping: Duration::from_secs(3600),
        watchdog: options.watchdog,
        chunk_pool_bytes: 0,
        huge_pages: HugePages::Never,
        ..ShardConfig::default()
    };
    let socket = || {
        let local = "127.0.0.1:0".parse().unwrap();
        bind_group(&UdpGroupConfig {
            local,
            ..UdpGroupConfig::default()
        })
        .unwrap()
        .remove(0)
    };
    let (waker_sender, waker_mail) = mailbox(1024).unwrap();
    let (woken_sender, woken_mail) = mailbox(1024).unwrap();
    let (waker_socket, woken_socket) = (socket(), socket());
    let woken_addr = woken_socket.local_addr();

    let answer = waker_sender.clone();
    let gate_there = Arc::clone(&gate);
    let woken = spawn_with_mailbox(
        config(0),
        0,
        2,
        Some(woken_socket),
        woken_mail,
        move |shard| {
            shard.spawn_local(Queue::Latency, answer_gate(gate_there, answer.clone()));
            Woken {
                spawner: shard.spawner.clone(),
                answer,
            }
        },
    )
    .unwrap();

    let (outsider, outside_work) = mpsc::channel();
    let pipe_sender = woken_sender.clone();
    let outsider_thread =
        std::thread::spawn(move || wake_from_outside(&outside_work, &pipe_sender, &gate));
    let counted = Arc::clone(&cycles);
    let waking = spawn_with_mailbox(config(1), 1, 2, Some(waker_socket), waker_mail, move |_| {
        Waking {
            woken: woken_sender,
            woken_addr,
            outsider: Some(outsider),
            random: Random(0x9e37_79b9_7f4a_7c15),
            cycles: counted,
            open: 0,
            packet_due: false,
            next_at: Some(Instant::now()),
        }
    })
    .unwrap();

    let hung = watch(&cycles, options.time);
    let stats = woken.stats().snapshot();
    over.store(true, Ordering::Relaxed);
    if !hung {
        waking.stop();
        waking.join().unwrap();
        woken.stop();
        woken.join().unwrap();
        outsider_thread.join().unwrap();
    }
    for burner in burners {
        burner.join().unwrap();
    }
    Outcome {
        cycles: cycles.load(Ordering::Relaxed),
        hung,
        woken: stats,
    }
}

/// Waits for the time to be over, or for the cycles to stand still.
fn watch(cycles: &AtomicU64, time: Duration) -> bool {
    let began = Instant::now();
    let mut last = (0, Instant::now());
    while began.elapsed() < time {
        std::thread::sleep(Duration::from_millis(50));
        let now = cycles.load(Ordering::Relaxed);
        if now != last.0 {
            last = (now, Instant::now());
        } else if last.1.elapsed() > STANDSTILL {
            return true;
        }
    }
    false
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Keeps a core busy: the shards are descheduled at any place.
fn burn(index: usize, over: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    std::thread::Builder::new()
        .name(format!("burner-{index}"))
        .spawn(move || {
            let mut random = Random(index as u64 + 1);
            while !over.load(Ordering::Relaxed) {
                for _ in 0..10_000 {
                    std::hint::black_box(random.next());
                }
            }
        })
        .unwrap()
}

/// What to do from a thread that owns no ring.
enum OutsideWork {
    Message,
    Wake,
}

fn wake_from_outside(
    work: &mpsc::Receiver<OutsideWork>,
    sender: &MailSender<Command>,
    gate: &Gate,
) {
    while let Ok(work) = work.recv() {
        match work {
            OutsideWork::Message => sender.try_send(Command::Answer).unwrap(),
            OutsideWork::Wake => gate.open(),
        }
    }
}

/// A foreign thread's way to wake a local task.
#[derive(Default)]
struct Gate {
    opened: AtomicU64,
    waker: Mutex<Option<Waker>>,
}

impl Gate {
    fn open(&self) {
        self.opened.fetch_add(1, Ordering::SeqCst);
        let waker = self.waker.lock().unwrap().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

async fn answer_gate(gate: Arc<Gate>, answer: MailSender<Answer>) {
    let answered = Cell::new(0);
    loop {
        poll_fn(|cx| {
            *gate.waker.lock().unwrap() = Some(cx.waker().clone());
            if gate.opened.load(Ordering::SeqCst) > answered.get() {
                return Poll::Ready(());
            }
            Poll::Pending
        })
        .await;
        answered.set(answered.get() + 1);
        // The waking shard may have stopped.
        let _ = answer.try_send(Answer);
    }
}

enum Command {
    Answer,
    StartTasks(u64),
}

struct Answer;

/// The shard that is woken.
struct Woken {
    spawner: Spawner,
    answer: MailSender<Answer>,
}

impl Woken {
    fn answer(&self) {
        // The waking shard may have stopped.
        let _ = self.answer.try_send(Answer);
    }
}

impl Datapath for Woken {
    type Message = Command;

    fn on_message(&mut self, message: Command, _: Instant) {
        match message {
            Command::Answer => self.answer(),
            Command::StartTasks(seed) => {
                let answer = self.answer.clone();
                self.spawner
                    .spawn_local(Queue::Bulk, use_glommio(seed, answer));
            }
        }
    }

    fn on_datagrams(&mut self, mut datagrams: Datagrams<'_>, _: Instant) {
        for _ in datagrams.segments() {
            self.answer();
        }
    }

    fn transmit(&mut self, _: &mut Trains<'_>, _: Instant) -> Transmit {
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        false
    }
}

/// Something that glommio finishes, then an answer.
async fn use_glommio(seed: u64, answer: MailSender<Answer>) {
    let mut random = Random(seed | 1);
    let some_time = |random: &mut Random| Duration::from_nanos(random.next() % 500_000);
    match random.next() % 4 {
        0 => {
            in_executor(glommio::timer::sleep(some_time(&mut random))).await;
        }
        1 => {
            in_executor(async {
                let file = glommio::io::BufferedFile::open("/proc/self/exe")
                    .await
                    .unwrap();
                assert_eq!(file.read_at(0, 64).await.unwrap().len(), 64);
                file.close().await.unwrap();
            })
            .await;
        }
        2 => {
            let pause = some_time(&mut random);
            let blocking = move || std::thread::sleep(pause);
            in_executor(glommio::executor().spawn_blocking(blocking)).await;
        }
        _ => sleep(some_time(&mut random)).await,
    }
    // The waking shard may have stopped.
    let _ = answer.try_send(Answer);
}

/// The shard that wakes.
struct Waking {
    woken: MailSender<Command>,
    woken_addr: SocketAddr,
    outsider: Option<mpsc::Sender<OutsideWork>>,
    random: Random,
    cycles: Arc<AtomicU64>,
    /// Answers this cycle still waits for.
    open: u64,
    packet_due: bool,
    /// When the next cycle begins, once all answers are here.
    next_at: Option<Instant>,
}

impl Waking {
    fn begin_cycle(&mut self) {
        let cycle = self.cycles.load(Ordering::Relaxed);
        let ways = self.random.next() % 15 + 1;
        self.open = u64::from(ways.count_ones());
        if ways & 1 != 0 {
            self.packet_due = true;
        }
        if ways & 2 != 0 {
            self.woken.try_send(Command::Answer).unwrap();
        }
        let outsider = self.outsider.as_ref().unwrap();
        if ways & 4 != 0 {
            outsider.send(OutsideWork::Message).unwrap();
        }
        if ways & 8 != 0 {
            outsider.send(OutsideWork::Wake).unwrap();
        }
        if cycle.is_multiple_of(50) {
            self.open += 1;
            self.woken
                .try_send(Command::StartTasks(self.random.next()))
                .unwrap();
        }
    }
}

impl Datapath for Waking {
    type Message = Answer;

    fn on_message(&mut self, _: Answer, now: Instant) {
        self.open -= 1;
        if self.open == 0 {
            self.cycles.fetch_add(1, Ordering::Relaxed);
            self.next_at = Some(now + Duration::from_nanos(self.random.next() % 10_000));
        }
    }

    fn on_datagrams(&mut self, _: Datagrams<'_>, _: Instant) {}

    fn on_timeout(&mut self, _: Instant) {
        if self.next_at.take().is_some() {
            self.begin_cycle();
        }
    }

    fn next_timeout(&mut self) -> Option<Instant> {
        self.next_at
    }

    fn transmit(&mut self, trains: &mut Trains<'_>, _: Instant) -> Transmit {
        if self.packet_due {
            let Some(buffer) = trains.packet(64) else {
                return Transmit::More;
            };
            buffer.fill(0);
            trains.push(64, self.woken_addr);
            self.packet_due = false;
        }
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        false
    }

    fn on_stop(&mut self, _: Instant) {
        self.outsider = None;
        self.next_at = None;
    }
}

/// xorshift: enough to vary the cycles, the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
