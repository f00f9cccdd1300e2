//! Waking a shard that sleeps, at no cost while it does not.
//!
//! A waker makes its work visible, then calls [`Parker::wake`]; the shard announces its park, then
//! looks for work once more. Both sides have a full fence between their write and their read, so
//! that one of them sees the other. The test `loom` tries all orders of it.
//!
//! Invariants:
//!
//! 1. `parked` is 1 only between the shard's announcement and its next turn.
//! 2. The thread that swaps `parked` from 1 to 0 delivers exactly one wake-up. No other thread
//!    makes a system call.
//! 3. A thread that drives a ring delivers by MSG_RING with its next submit, any other thread by
//!    the pipe. No eventfd is ever polled in a ring: chained eventfds lose their second wake-up.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Waker;

use crossbeam::utils::CachePadded;

use crate::sync::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering, fence, thread_local};
use crate::sys::{self, Pipe};

/// What other threads need to know of a shard to wake it.
#[derive(Debug)]
pub(crate) struct Parker {
    parked: CachePadded<AtomicI32>,
    /// Advanced every turn; one that stands still marks a stall or a sleep.
    heartbeat: CachePadded<AtomicU64>,
    /// Local tasks that were woken and have not run yet, by class.
    runnable: CachePadded<[AtomicUsize; 2]>,
    /// A local task was woken by another thread: glommio must look at its own notifier.
    foreign: AtomicBool,
    stop: AtomicBool,
    pipe: Pipe,
    /// A descriptor of the shard's ring of our own: it stays a ring for as long as senders live.
    ring: OnceLock<OwnedFd>,
    thread: AtomicI32,
    /// Wakes the executor itself, for the watchdog.
    executor: Mutex<Option<Waker>>,
}

impl Parker {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            parked: CachePadded::new(AtomicI32::new(0)),
            heartbeat: CachePadded::new(AtomicU64::new(0)),
            runnable: CachePadded::default(),
            foreign: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            pipe: Pipe::new()?,
            ring: OnceLock::new(),
            thread: AtomicI32::new(0),
            executor: Mutex::new(None),
        })
    }

    /// Wakes the shard if it sleeps. Called after the work was made visible.
    pub(crate) fn wake(self: &Arc<Self>) {
        fence(Ordering::SeqCst);
        if self.parked.load(Ordering::Relaxed) == 1 && self.parked.swap(0, Ordering::SeqCst) == 1 {
            self.deliver();
        }
    }

    #[cold]
    fn deliver(self: &Arc<Self>) {
        let queued = self.ring.get().is_some()
            && DRIVES_A_RING.try_with(Cell::get).unwrap_or(false)
            && PENDING
                .try_with(|pending| pending.borrow_mut().push(Arc::clone(self)))
                .is_ok();
        if !queued {
            self.pipe.signal();
        }
    }

    /// Announces a park, then looks for work once more: returns whether the shard may sleep.
    /// `has_work` looks at all that other threads or the kernel may have filled before they could
    /// see the announcement. Ends with [`Self::end_park`], also without a sleep.
    ///
    /// `stopping` says that the shard knows of a stop already.
    pub(crate) fn begin_park(&self, stopping: bool, has_work: impl FnOnce() -> bool) -> bool {
        // A swap, here and in `end_park`, reads what a waker's swap wrote last and so comes after
        // it; on x86 it is the instruction that the store would be.
        self.parked.swap(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let is_called = self.has_foreign() || (self.stop_requested() && !stopping);
        !is_called && !has_work()
    }

    /// Takes the announcement back.
    pub(crate) fn end_park(&self) {
        self.parked.swap(0, Ordering::SeqCst);
    }

    pub(crate) fn is_parked(&self) -> bool {
        self.parked.load(Ordering::Relaxed) == 1
    }

    pub(crate) fn beat(&self) {
        let beat = self.heartbeat.load(Ordering::Relaxed);
        self.heartbeat
            .store(beat.wrapping_add(1), Ordering::Relaxed);
    }

    pub(crate) fn heartbeat(&self) -> u64 {
        self.heartbeat.load(Ordering::Relaxed)
    }

    pub(crate) fn request_stop(self: &Arc<Self>) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(crate) fn task_woken(&self, class: Class) {
        self.runnable[class as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn task_ran(&self, class: Class) {
        self.runnable[class as usize].fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn runnable(&self, class: Class) -> bool {
        self.runnable[class as usize].load(Ordering::Relaxed) != 0
    }

    pub(crate) fn any_runnable(&self) -> bool {
        self.runnable(Class::Latency) || self.runnable(Class::Other)
    }

    pub(crate) fn mark_foreign(&self) {
        self.foreign.store(true, Ordering::SeqCst);
    }

    pub(crate) fn has_foreign(&self) -> bool {
        self.foreign.load(Ordering::Relaxed)
    }

    pub(crate) fn take_foreign(&self) -> bool {
        self.has_foreign() && self.foreign.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn pipe(&self) -> &Pipe {
        &self.pipe
    }

    /// Binds the shard's ring; from here on threads with a ring wake it by MSG_RING.
    pub(crate) fn bind_ring(&self, ring: OwnedFd) {
        // Set once: a parker belongs to one shard.
        let _ = self.ring.set(ring);
    }

    pub(crate) fn ring_fd(&self) -> Option<RawFd> {
        self.ring.get().map(AsRawFd::as_raw_fd)
    }

    pub(crate) fn set_thread(&self) {
        self.thread.store(sys::thread_id(), Ordering::Relaxed);
    }

    pub(crate) fn thread(&self) -> i32 {
        self.thread.load(Ordering::Relaxed)
    }

    pub(crate) fn set_executor(&self, waker: Option<Waker>) {
        *self.executor.lock().unwrap_or_else(PoisonError::into_inner) = waker;
    }

    pub(crate) fn wake_executor(&self) {
        let waker = self.executor.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waker) = waker.as_ref() {
            waker.wake_by_ref();
        }
    }
}

/// Local tasks by the loop's step that runs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// In the loop's own task queue: a yield runs them.
    Latency,
    /// In another task queue: the loop's queue must yield as a whole.
    Other,
}

thread_local! {
    /// Whether this thread is a shard's and its loop will submit soon.
    static DRIVES_A_RING: Cell<bool> = const { Cell::new(false) };
    /// Wake-ups to send with the next submit; as long as there are other shards at most.
    static PENDING: RefCell<Vec<Arc<Parker>>> = const { RefCell::new(Vec::new()) };
}

/// Says whether this thread's loop runs, so that wake-ups can wait for its next submit.
pub(crate) fn set_drives_a_ring(drives: bool) {
    DRIVES_A_RING.with(|cell| cell.set(drives));
}

/// Shards a thread may wake in one turn before its list grows.
pub(crate) const WAKES: usize = 64;

/// Makes room for the wake-ups of a turn, so that none allocates later.
pub(crate) fn reserve_wakes() {
    PENDING.with(|pending| pending.borrow_mut().reserve(WAKES));
}

/// Whether wake-ups wait for this thread's submit.
pub(crate) fn has_pending_wakes() -> bool {
    PENDING.with(|pending| !pending.borrow().is_empty())
}

/// Takes the wake-ups that wait. The parker must be kept until its MSG_RING was submitted.
pub(crate) fn take_pending_wake() -> Option<Arc<Parker>> {
    PENDING.with(|pending| pending.borrow_mut().pop())
}
