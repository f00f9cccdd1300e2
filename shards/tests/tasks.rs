//! Local tasks beside the loop: same-turn answers, timers, fairness, foreign wakes.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::net::{SocketAddr, UdpSocket};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use millrace_shards::{
    Datagrams, Datapath, Queue, ShardConfig, ShardContext, ShardHandle, ShardStats, Trains,
    Transmit, in_executor, sleep, spawn, yield_now,
};

const WAIT: Duration = Duration::from_secs(20);

/// A datapath that does nothing but what its hooks say.
#[derive(Default)]
struct Idle {
    /// Called in each turn that transmits.
    busy: bool,
}

impl Datapath for Idle {
    type Message = Block;

    fn on_message(&mut self, block: Block, _: Instant) {
        while block.stats.snapshot().watchdog_wakes == 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
        block.seen.send(()).unwrap();
    }

    fn on_datagrams(&mut self, _: Datagrams<'_>, _: Instant) {}

    fn transmit(&mut self, _: &mut Trains<'_>, _: Instant) -> Transmit {
        if self.busy {
            Transmit::More
        } else {
            Transmit::Done
        }
    }

    fn has_pending(&self) -> bool {
        self.busy
    }
}

fn config() -> ShardConfig {
    // The fallbacks are out of reach: only real wake-ups move a shard.
    ShardConfig {
        direct_park_max: Duration::from_secs(3600),
        housekeeping: Duration::from_secs(3600),
        watchdog: Duration::ZERO,
        ..common::config()
    }
}

fn start(busy: bool, init: impl FnOnce(&ShardContext) + Send + 'static) -> ShardHandle<Block> {
    spawn(config(), 0, 1, None, move |context| {
        init(context);
        Idle { busy }
    })
    .unwrap()
}

fn stop(handle: ShardHandle<Block>) {
    handle.stop();
    handle.join().unwrap();
}

/// Timers fire in the order of their deadlines, not in the order in which they were set, on a shard
/// that otherwise sleeps.
#[test]
fn timers_fire_in_order() {
    let (sender, fired) = mpsc::channel();
    let handle = start(false, move |shard| {
        for millis in [30u64, 10, 20, 0] {
            let sender = sender.clone();
            shard.spawn_local(Queue::Latency, async move {
                sleep(Duration::from_millis(millis)).await;
                sender.send(millis).unwrap();
            });
        }
    });
    let order: Vec<_> = (0..4).map(|_| fired.recv_timeout(WAIT).unwrap()).collect();
    assert_eq!(order, [0, 10, 20, 30]);
    stop(handle);
}

/// A timer that is dropped does not fire, and its shard goes on.
#[test]
fn dropped_timer() {
    let (sender, fired) = mpsc::channel();
    let handle = start(false, move |shard| {
        shard.spawn_local(Queue::Latency, async move {
            let mut long = Box::pin(sleep(Duration::from_secs(3600)));
            let first = poll_fn(|cx| Poll::Ready(long.as_mut().poll(cx).is_pending())).await;
            drop(long);
            sleep(Duration::from_millis(1)).await;
            sender.send(first).unwrap();
        });
    });
    assert!(fired.recv_timeout(WAIT).unwrap());
    stop(handle);
}

/// A shard that never idles still runs every queue, glommio's own timers and blocking threads.
#[test]
fn a_busy_loop_starves_no_queue() {
    let (sender, done) = mpsc::channel();
    let handle = start(true, move |shard| {
        for queue in [Queue::Latency, Queue::Bulk, Queue::Background] {
            let sender = sender.clone();
            shard.spawn_local(queue, async move {
                for _ in 0..100 {
                    yield_now().await;
                }
                in_executor(glommio::timer::sleep(Duration::from_millis(1))).await;
                let seven = in_executor(glommio::executor().spawn_blocking(|| 7)).await;
                sleep(Duration::from_millis(1)).await;
                sender.send((queue, seven)).unwrap();
            });
        }
    });
    let mut done: Vec<_> = (0..3).map(|_| done.recv_timeout(WAIT).unwrap()).collect();
    done.sort_by_key(|(queue, _)| *queue as u8);
    assert_eq!(
        done,
        [
            (Queue::Latency, 7),
            (Queue::Bulk, 7),
            (Queue::Background, 7)
        ]
    );
    stop(handle);
}

/// A waker that another thread uses ends a park, although glommio's notifier cannot end it.
#[test]
fn foreign_wake_ends_a_park() {
    let (wakers, taken) = mpsc::channel::<Waker>();
    let (sender, done) = mpsc::channel();
    let handle = start(false, move |shard| {
        for queue in [Queue::Latency, Queue::Bulk] {
            let (wakers, sender) = (wakers.clone(), sender.clone());
            shard.spawn_local(queue, async move {
                let mut first = true;
                poll_fn(|cx| {
                    if std::mem::take(&mut first) {
                        wakers.send(cx.waker().clone()).unwrap();
                        return Poll::Pending;
                    }
                    Poll::Ready(())
                })
                .await;
                sender.send(()).unwrap();
            });
        }
    });
    let stats = handle.stats();
    for _ in 0..2 {
        let waker = taken.recv_timeout(WAIT).unwrap();
        // Nothing but the waker can end this park.
        while stats.snapshot().direct_parks == 0 {
            std::thread::yield_now();
        }
        waker.wake();
        done.recv_timeout(WAIT).unwrap();
    }
    stop(handle);
}

/// A stop drops every task and what it holds: one that waits for a timer, for glommio, or for ever.
#[test]
fn stop_drops_all_tasks() {
    let witness = Arc::new(());
    let (sender, running) = mpsc::channel();
    let held = Arc::clone(&witness);
    let handle = start(false, move |shard| {
        for kind in 0..4 {
            let (held, sender) = (Arc::clone(&held), sender.clone());
            shard.spawn_local(Queue::Bulk, async move {
                sender.send(()).unwrap();
                match kind {
                    0 => std::future::pending().await,
                    1 => sleep(Duration::from_secs(3600)).await,
                    2 => {
                        in_executor(glommio::timer::sleep(Duration::from_secs(3600))).await;
                    }
                    _ => loop {
                        yield_now().await;
                    },
                }
                drop(held);
            });
        }
    });
    for _ in 0..4 {
        running.recv_timeout(WAIT).unwrap();
    }
    stop(handle);
    assert_eq!(Arc::strong_count(&witness), 1);
}

/// The watchdog sees a shard that sleeps without having parked, and leaves one alone that parked.
///
/// That its wake-up ends glommio's wrong sleep is shown by the example `wakeups_control`.
#[test]
fn watchdog_counts_a_sleep_that_is_no_park() {
    let config = ShardConfig {
        watchdog: Duration::from_millis(2),
        ..config()
    };
    let shard = |config| spawn(config, 0, 1, None, |_| Idle { busy: false }).unwrap();
    let (asleep, parked) = (shard(config.clone()), shard(config));
    let stats = asleep.stats();
    let (sender, seen) = mpsc::channel();
    // The message is handled by blocking until the watchdog has looked.
    asleep
        .sender()
        .try_send(Block {
            stats: Arc::clone(&stats),
            seen: sender,
        })
        .unwrap();
    seen.recv_timeout(WAIT).unwrap();
    assert!(stats.snapshot().watchdog_wakes > 0);
    assert_eq!(parked.stats().snapshot().watchdog_wakes, 0);
    for handle in [asleep, parked] {
        handle.stop();
        handle.join().unwrap();
    }
}

/// Makes a shard sleep in the middle of a turn.
struct Block {
    stats: Arc<ShardStats>,
    seen: mpsc::Sender<()>,
}

/// A task woken by a datagram answers in the same turn, so that the answer leaves with its submit.
#[test]
fn answer_in_the_same_turn() {
    let socket = common::socket("127.0.0.1:0");
    let to = socket.local_addr();
    let handle = spawn(config(), 0, 1, Some(socket), |context| {
        let desk = Rc::new(Desk::default());
        let there = Rc::clone(&desk);
        context.spawn_local(Queue::Latency, async move { there.work().await });
        Office {
            desk,
            turn: 0,
            stats: Arc::clone(&context.stats),
        }
    })
    .unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(WAIT)).unwrap();
    for _ in 0..50 {
        client.send_to(b"question", to).unwrap();
        let mut answer = [0; 64];
        let len = client.recv(&mut answer).unwrap();
        assert_eq!(&answer[..len], b"same turn");
    }
    handle.stop();
    handle.join().unwrap();
}

/// Where the datapath leaves questions and a task leaves answers.
#[derive(Default)]
struct Desk {
    question: Cell<Option<SocketAddr>>,
    answers: RefCell<Vec<SocketAddr>>,
    waker: RefCell<Option<Waker>>,
}

impl Desk {
    async fn work(&self) {
        loop {
            let from = poll_fn(|cx| match self.question.take() {
                Some(from) => Poll::Ready(from),
                None => {
                    *self.waker.borrow_mut() = Some(cx.waker().clone());
                    Poll::Pending
                }
            })
            .await;
            self.answers.borrow_mut().push(from);
        }
    }
}

struct Office {
    desk: Rc<Desk>,
    turn: u64,
    stats: Arc<ShardStats>,
}

impl Datapath for Office {
    type Message = ();

    fn on_message(&mut self, (): (), _: Instant) {}

    fn on_datagrams(&mut self, datagrams: Datagrams<'_>, _: Instant) {
        self.turn = self.stats.snapshot().turns;
        self.desk.question.set(Some(datagrams.from()));
        if let Some(waker) = self.desk.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    fn transmit(&mut self, trains: &mut Trains<'_>, _: Instant) -> Transmit {
        let same = self.stats.snapshot().turns == self.turn;
        let text: &[u8] = if same { b"same turn" } else { b"late" };
        for to in self.desk.answers.borrow_mut().drain(..) {
            let buffer = trains.packet(64).unwrap();
            buffer[..text.len()].copy_from_slice(text);
            trains.push(text.len(), to);
        }
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        !self.desk.answers.borrow().is_empty()
    }
}
