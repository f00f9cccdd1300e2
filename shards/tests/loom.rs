//! No wake-up is lost and no message is left behind: loom tries every order of the accesses.
//!
//! `make verify` runs this with `--cfg loom`. The files of the mailbox and of parking are compiled
//! into this test as they are. Put in their place are:
//!
//! - `sync`: loom's atomics, fences and thread-locals. crossbeam's queue cannot run under loom, so
//!   a bounded queue of the same kind (a stamp in each slot) stands for it, with orderings that are
//!   no stronger than crossbeam's; the queue itself is thus not what is tested.
//! - `sys`: a bell in place of the pipe, and of a completion in the ring. A shard that sleeps waits
//!   for its bell, and loom fails the test when no thread can ring it any more.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(
    dead_code,
    unreachable_pub,
    reason = "the files have more than this test takes, and are modules here"
)]

#[path = "../src/mailbox.rs"]
mod mailbox;
#[path = "../src/park.rs"]
mod park;

use std::sync::Arc;

use loom::model::Builder;
use loom::thread;
use mailbox::{MailReceiver, MailSender, mailbox};
use park::Parker;

/// What `mailbox.rs` and `park.rs` synchronise with.
mod sync {
    pub(crate) use loom::sync::atomic::{
        AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering, fence,
    };

    use loom::sync::Mutex;

    /// loom's `thread_local`, which does not know `const` initialisers.
    macro_rules! local {
        ($($(#[$attr:meta])* static $name:ident: $type:ty = const $init:block;)*) => {
            loom::thread_local! { $($(#[$attr])* static $name: $type = $init;)* }
        };
    }
    pub(crate) use local as thread_local;

    /// A bounded queue with a stamp in each slot: at position `p`, `2 p` is free and `2 p + 1`
    /// full.
    pub(crate) struct ArrayQueue<T> {
        head: AtomicUsize,
        tail: AtomicUsize,
        slots: Vec<Slot<T>>,
    }

    struct Slot<T> {
        stamp: AtomicUsize,
        /// Locked only by the thread that the stamp and its position gave the slot to.
        value: Mutex<Option<T>>,
    }

    impl<T> ArrayQueue<T> {
        pub(crate) fn new(capacity: usize) -> Self {
            let slot = |at| Slot {
                stamp: AtomicUsize::new(2 * at),
                value: Mutex::new(None),
            };
            Self {
                head: AtomicUsize::new(0),
                tail: AtomicUsize::new(0),
                slots: (0..capacity).map(slot).collect(),
            }
        }

        pub(crate) fn push(&self, value: T) -> Result<(), T> {
            let capacity = self.slots.len();
            loop {
                let tail = self.tail.load(Ordering::Relaxed);
                let slot = &self.slots[tail % capacity];
                let stamp = slot.stamp.load(Ordering::Acquire);
                if stamp == 2 * tail {
                    let order = (Ordering::SeqCst, Ordering::Relaxed);
                    let taken = self.tail.compare_exchange(tail, tail + 1, order.0, order.1);
                    if taken.is_ok() {
                        *slot.value.lock().unwrap() = Some(value);
                        slot.stamp.store(2 * tail + 1, Ordering::Release);
                        return Ok(());
                    }
                } else if stamp < 2 * tail {
                    fence(Ordering::SeqCst);
                    if self.head.load(Ordering::Relaxed) + capacity == tail {
                        return Err(value);
                    }
                }
                loom::thread::yield_now();
            }
        }

        pub(crate) fn pop(&self) -> Option<T> {
            let capacity = self.slots.len();
            loop {
                let head = self.head.load(Ordering::Relaxed);
                let slot = &self.slots[head % capacity];
                let stamp = slot.stamp.load(Ordering::Acquire);
                if stamp == 2 * head + 1 {
                    let order = (Ordering::SeqCst, Ordering::Relaxed);
                    let taken = self.head.compare_exchange(head, head + 1, order.0, order.1);
                    if taken.is_ok() {
                        let value = slot.value.lock().unwrap().take();
                        slot.stamp.store(2 * (head + capacity), Ordering::Release);
                        return value;
                    }
                } else if stamp == 2 * head {
                    fence(Ordering::SeqCst);
                    if self.tail.load(Ordering::Relaxed) == head {
                        return None;
                    }
                }
                loom::thread::yield_now();
            }
        }

        pub(crate) fn len(&self) -> usize {
            let tail = self.tail.load(Ordering::SeqCst);
            tail - self.head.load(Ordering::SeqCst)
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.head.load(Ordering::SeqCst) == self.tail.load(Ordering::SeqCst)
        }
    }
}

/// What wakes a sleeping shard.
mod sys {
    use loom::sync::{Condvar, Mutex};

    /// Rung by a wake-up, silenced by the shard that it woke.
    #[derive(Debug)]
    pub(crate) struct Pipe {
        rung: Mutex<bool>,
        changed: Condvar,
    }

    impl Pipe {
        pub(crate) fn new() -> std::io::Result<Self> {
            Ok(Self {
                rung: Mutex::new(false),
                changed: Condvar::new(),
            })
        }

        pub(crate) fn signal(&self) {
            *self.rung.lock().unwrap() = true;
            self.changed.notify_one();
        }

        /// Sleeps until it rings.
        pub(crate) fn wait(&self) {
            let mut rung = self.rung.lock().unwrap();
            while !*rung {
                rung = self.changed.wait(rung).unwrap();
            }
            *rung = false;
        }
    }

    pub(crate) fn thread_id() -> i32 {
        0
    }
}

/// Runs a program in all orders of its threads' accesses, with at most three preemptions: more of
/// them find no other fault in protocols of this size, and take hours.
fn check(program: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(program);
}

/// One turn's end on a shard that has nothing to do: it sleeps if it may.
fn park(parker: &Parker, has_work: impl FnOnce() -> bool) {
    if parker.begin_park(false, has_work) {
        parker.pipe().wait();
    }
    parker.end_park();
}

/// The loop of a shard that ends when it has so many messages.
fn receive(mut receiver: MailReceiver<u32>, count: usize) -> Vec<u32> {
    let parker = receiver.parker();
    let mut messages = Vec::new();
    loop {
        while let Some(message) = receiver.try_recv() {
            messages.push(message);
        }
        if messages.len() == count {
            return messages;
        }
        park(&parker, || !receiver.is_empty());
    }
}

/// A message that is sent while the shard decides to sleep wakes it, once per sleep.
#[test]
fn a_message_wakes_a_shard_that_parks() {
    check(|| {
        let (sender, receiver) = mailbox(2).unwrap();
        let shard = thread::spawn(move || receive(receiver, 2));
        sender.try_send(1).unwrap();
        sender.try_send(2).unwrap();
        assert_eq!(shard.join().unwrap(), [1, 2]);
    });
}

/// Messages of two threads at once are both received: a wake-up for one may not swallow the
/// other's.
#[test]
fn two_threads_wake_a_shard_that_parks() {
    check(|| {
        let (sender, receiver) = mailbox(2).unwrap();
        let other = sender.clone();
        let shard = thread::spawn(move || receive(receiver, 2));
        let second = thread::spawn(move || other.try_send(2).unwrap());
        sender.try_send(1).unwrap();
        second.join().unwrap();
        let mut messages = shard.join().unwrap();
        messages.sort_unstable();
        assert_eq!(messages, [1, 2]);
    });
}

/// A shard that exchanges messages with another: its wake-ups wait for its next submit.
struct Peer {
    receiver: MailReceiver<u32>,
    other: MailSender<u32>,
}

impl Peer {
    /// Answers each message by the next number, up to the last.
    fn run(mut self, last: u32) {
        park::set_drives_a_ring(true);
        let parker = self.receiver.parker();
        loop {
            let mut ended = false;
            while let Some(message) = self.receiver.try_recv() {
                if message < last {
                    self.other.try_send(message + 1).unwrap();
                }
                // The other has the last one, or this shard just got it.
                ended |= message + 1 >= last;
            }
            if ended {
                break;
            }
            park(&parker, || {
                !self.receiver.is_empty() || park::has_pending_wakes()
            });
            submit();
        }
        submit();
        park::set_drives_a_ring(false);
    }
}

/// Delivers what waits for the next submit, as MSG_RING does: a completion in the other's ring.
fn submit() {
    while let Some(parker) = park::take_pending_wake() {
        parker.pipe().signal();
    }
}

/// Two shards that play ball never both sleep: no shard sleeps on wake-ups that it has not sent.
#[test]
fn shards_wake_each_other_with_their_submits() {
    check(|| {
        let (to_first, first) = mailbox(1).unwrap();
        let (to_second, second) = mailbox(1).unwrap();
        for receiver in [&first, &second] {
            // As a shard does before its first turn; the descriptor is not used here.
            let ring = std::fs::File::open("/dev/null").unwrap();
            receiver.parker().bind_ring(ring.into());
        }
        let first = Peer {
            receiver: first,
            other: to_second,
        };
        let second = Peer {
            receiver: second,
            other: to_first.clone(),
        };
        let threads = [
            thread::spawn(move || first.run(3)),
            thread::spawn(move || second.run(3)),
        ];
        to_first.try_send(0).unwrap();
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// A stop, and a local task's waker used by another thread, end a park as a message does.
#[test]
fn a_stop_or_a_foreign_waker_ends_a_park() {
    let calls: [fn(&Arc<Parker>); 2] = [
        |parker| parker.request_stop(),
        |parker| {
            parker.mark_foreign();
            parker.wake();
        },
    ];
    for call in calls {
        check(move || {
            let parker = Arc::new(Parker::new().unwrap());
            let there = Arc::clone(&parker);
            let shard = thread::spawn(move || {
                while !there.stop_requested() && !there.take_foreign() {
                    park(&there, || false);
                }
            });
            call(&parker);
            shard.join().unwrap();
        });
    }
}

/// A mailbox takes no more than its bound; what it refuses it gives back, what it took arrives.
#[test]
fn the_bound_holds() {
    check(|| {
        let (sender, mut receiver) = mailbox(1).unwrap();
        let other = sender.clone();
        let second = thread::spawn(move || other.try_send(2).map_err(|error| error.reason()));
        let first = sender.try_send(1).map_err(|error| error.reason());
        let outcomes = [first, second.join().unwrap()];
        let refused = outcomes.iter().filter(|sent| **sent == Err("full")).count();
        let taken = outcomes.iter().filter(|sent| sent.is_ok()).count();
        assert_eq!((taken, refused), (1, 1), "{outcomes:?}");
        let expected = if outcomes[0].is_ok() { 1 } else { 2 };
        assert_eq!(receiver.try_recv(), Some(expected));
        assert_eq!(receiver.try_recv(), None);
    });
}

/// A message that is sent while the shard ends is refused or dropped: none stays in the queue.
#[test]
fn a_closed_mailbox_holds_nothing() {
    check(|| {
        let (sender, receiver) = mailbox(2).unwrap();
        let witness = Arc::new(());
        let message = Arc::clone(&witness);
        let shard = thread::spawn(move || drop(receiver));
        let sent = sender.try_send(message);
        shard.join().unwrap();
        let refused = match sent {
            Ok(()) => None,
            Err(error) => {
                assert_eq!(error.reason(), "closed");
                Some(error.into_message())
            }
        };
        // The sender lives on, and with it the queue.
        let held = 1 + usize::from(refused.is_some());
        assert_eq!(Arc::strong_count(&witness), held);
        assert!(sender.is_closed());
    });
}
