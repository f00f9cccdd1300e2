//! Local tasks: futures on a shard's thread, beside its loop.
//!
//! Tasks are for what has many steps (an RPC handler, a file, an HTTP connection), not for packets.
//! Each is wrapped, so that the loop knows at no cost whether one is runnable: it gives tasks a
//! turn only then, and parks in glommio only when something there can wake one. For that all tasks
//! must come from a [`Spawner`]: the loop does not see a task that was given to glommio directly.
//!
//! Invariants:
//!
//! 1. `Parker::runnable` counts exactly the wrapped tasks that were woken and not polled since.
//! 2. A task polled while the loop sleeps in glommio ends that sleep: it may have queued commands.
//! 3. A task woken by another thread ends a direct park, of which glommio's notifier knows nothing.
//! 4. Timers are the loop's own, ordered by deadline; none is scanned.
//! 5. When the loop ends every task is dropped: a task and its waker hold each other, so one that
//!    waits would otherwise live on with all it holds.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use glommio::TaskQueueHandle;

use crate::park::{Class, Parker};
use crate::stats::ShardStats;
use crate::sys;

/// Where a local task runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// With the loop: woken tasks run in the same turn, before `transmit`.
    Latency,
    /// Beside the loop, with a tenth of its share.
    Bulk,
    /// Beside the loop, with a hundredth of its share.
    Background,
}

/// Starts local tasks on its shard; clone it into tasks that start others.
#[derive(Debug, Clone)]
pub struct Spawner {
    local: Rc<Local>,
}

impl Spawner {
    pub(crate) fn new(local: Rc<Local>) -> Self {
        Self { local }
    }

    /// Starts a task. It runs no earlier than the caller's next return to the loop.
    ///
    /// Costs two allocations and a lock of glommio's: not for every packet.
    ///
    /// # Panics
    /// When called after the shard's loop has ended.
    pub fn spawn_local(&self, queue: Queue, future: impl Future<Output = ()> + 'static) {
        let (handle, class) = match queue {
            Queue::Latency => (self.local.queues.latency, Class::Latency),
            Queue::Bulk => (self.local.queues.bulk, Class::Other),
            Queue::Background => (self.local.queues.background, Class::Other),
        };
        let task = LocalTask::new(Rc::clone(&self.local), class, Box::pin(future));
        self.local.stats.tasks_spawned.add(1);
        match glommio::spawn_local_into(task, handle) {
            Ok(task) => drop(task.detach()),
            Err(error) => panic!("the shard's task queues live as long as its loop: {error}"),
        }
    }
}

/// Awaits something that glommio must finish: a timer or socket or file of its own, or
/// `spawn_blocking`. While any such wait is open the shard parks in glommio, not in its own ring.
pub async fn in_executor<F: Future>(future: F) -> F::Output {
    let _wait = ExecutorWait::new();
    future.await
}

/// Waits for a time on the loop's own timers.
///
/// # Panics
/// When polled outside a shard.
pub async fn sleep(duration: Duration) {
    let mut timer = Timer {
        deadline: Instant::now() + duration,
        key: None,
    };
    poll_fn(|cx| timer.poll(cx)).await;
}

/// Lets the loop and other task queues run. Long tasks of [`Queue::Bulk`] and
/// [`Queue::Background`] call it every few hundred microseconds.
pub async fn yield_now() {
    glommio::executor().yield_task_queue_now().await;
}

/// What a shard's loop and its tasks share.
#[derive(Debug)]
pub(crate) struct Local {
    parker: Arc<Parker>,
    stats: Arc<ShardStats>,
    queues: Queues,
    executor_waits: Cell<usize>,
    live: RefCell<Live>,
    /// The loop has ended: tasks drop what they run.
    ending: Cell<bool>,
    /// The loop sleeps in glommio until the eventfd is signalled.
    asleep: Cell<bool>,
    eventfd: OwnedFd,
    timers: RefCell<Timers>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Queues {
    pub(crate) latency: TaskQueueHandle,
    pub(crate) bulk: TaskQueueHandle,
    pub(crate) background: TaskQueueHandle,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
    /// The address of this thread's parker, to tell own wakes from foreign ones.
    static PARKER: Cell<usize> = const { Cell::new(0) };
}

fn current() -> Rc<Local> {
    let local = CURRENT.with_borrow(Clone::clone);
    local.unwrap_or_else(|| panic!("only a shard's thread has local tasks and timers"))
}

impl Local {
    pub(crate) fn new(
        parker: Arc<Parker>,
        stats: Arc<ShardStats>,
        queues: Queues,
        eventfd: OwnedFd,
    ) -> Rc<Self> {
        Rc::new(Self {
            parker,
            stats,
            queues,
            executor_waits: Cell::new(0),
            live: RefCell::default(),
            ending: Cell::new(false),
            asleep: Cell::new(false),
            eventfd,
            timers: RefCell::default(),
        })
    }

    /// Makes this the thread's shard.
    pub(crate) fn enter(self: &Rc<Self>) {
        PARKER.set(Arc::as_ptr(&self.parker) as usize);
        CURRENT.set(Some(Rc::clone(self)));
    }

    /// Undoes [`Self::enter`].
    pub(crate) fn leave() {
        PARKER.set(0);
        CURRENT.set(None);
    }

    /// Makes every task drop its future at its next poll, and wakes them all for it.
    pub(crate) fn end_tasks(&self) {
        self.ending.set(true);
        let tasks: Vec<_> = self
            .live
            .borrow()
            .tasks
            .iter()
            .flatten()
            .map(Arc::clone)
            .collect();
        for task in tasks {
            task.wake_by_ref();
        }
    }

    /// Whether glommio has something to finish.
    pub(crate) fn waits_in_executor(&self) -> bool {
        self.executor_waits.get() > 0
    }

    pub(crate) fn signal(&self) {
        sys::signal_eventfd(self.eventfd.as_fd());
    }

    pub(crate) fn set_asleep(&self, asleep: bool) {
        self.asleep.set(asleep);
    }

    /// The next timer's deadline.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.timers
            .borrow()
            .by_deadline
            .keys()
            .next()
            .map(|key| key.0)
    }

    /// Wakes the tasks whose timers are due. Returns whether there was one.
    pub(crate) fn fire_timers(&self, now: Instant) -> bool {
        let mut any = false;
        loop {
            // Not borrowed while it wakes: a task that ends drops its timers.
            let due = self.timers.borrow_mut().pop_due(now);
            let Some(waker) = due else { return any };
            any = true;
            waker.wake();
        }
    }
}

/// The tasks polled at least once and not dropped.
#[derive(Debug, Default)]
struct Live {
    tasks: Vec<Option<Arc<TaskWaker>>>,
    free: Vec<usize>,
}

impl Live {
    fn insert(&mut self, task: Arc<TaskWaker>) -> usize {
        if let Some(at) = self.free.pop() {
            self.tasks[at] = Some(task);
            return at;
        }
        self.tasks.push(Some(task));
        self.tasks.len() - 1
    }

    fn remove(&mut self, at: usize) {
        self.tasks[at] = None;
        self.free.push(at);
    }
}

#[derive(Debug, Default)]
struct Timers {
    by_deadline: BTreeMap<(Instant, u64), Waker>,
    sequence: u64,
}

impl Timers {
    fn pop_due(&mut self, now: Instant) -> Option<Waker> {
        let first = self.by_deadline.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }
}

struct Timer {
    deadline: Instant,
    key: Option<(Instant, u64)>,
}

impl Timer {
    fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            return Poll::Ready(());
        }
        let local = current();
        let mut timers = local.timers.borrow_mut();
        let key = match self.key {
            Some(key) => key,
            None => {
                timers.sequence += 1;
                *self.key.insert((self.deadline, timers.sequence))
            }
        };
        timers.by_deadline.insert(key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let local = CURRENT.try_with(|current| current.borrow().clone());
        if let Ok(Some(local)) = local {
            local.timers.borrow_mut().by_deadline.remove(&key);
        }
    }
}

struct ExecutorWait {
    local: Rc<Local>,
}

impl ExecutorWait {
    fn new() -> Self {
        let local = current();
        local.executor_waits.set(local.executor_waits.get() + 1);
        Self { local }
    }
}

impl Drop for ExecutorWait {
    fn drop(&mut self) {
        self.local
            .executor_waits
            .set(self.local.executor_waits.get() - 1);
    }
}

const IDLE: u8 = 0;
const SCHEDULED: u8 = 1;
const DONE: u8 = 2;

/// A task's waker: glommio's own, with the count of runnable tasks around it.
#[derive(Debug)]
struct TaskWaker {
    state: AtomicU8,
    class: Class,
    parker: Arc<Parker>,
    inner: Waker,
}

impl TaskWaker {
    /// Leaves `SCHEDULED` for `to`, with the count.
    fn settle(&self, to: u8) {
        if self.state.swap(to, Ordering::AcqRel) == SCHEDULED {
            self.parker.task_ran(self.class);
        }
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let change =
            self.state
                .compare_exchange(IDLE, SCHEDULED, Ordering::AcqRel, Ordering::Acquire);
        if change.is_err() {
            return;
        }
        self.parker.task_woken(self.class);
        self.inner.wake_by_ref();
        let own = PARKER.try_with(Cell::get).unwrap_or(0) == Arc::as_ptr(&self.parker) as usize;
        if !own {
            self.parker.mark_foreign();
            self.parker.wake();
        }
    }
}

struct LocalTask<F> {
    local: Rc<Local>,
    class: Class,
    /// `None` when it ended.
    future: Option<Pin<Box<F>>>,
    waker: Option<Registered>,
}

struct Registered {
    state: Arc<TaskWaker>,
    waker: Waker,
    index: usize,
}

impl<F> LocalTask<F> {
    fn new(local: Rc<Local>, class: Class, future: Pin<Box<F>>) -> Self {
        // Runnable from the start; the first poll takes the count back.
        local.parker.task_woken(class);
        Self {
            local,
            class,
            future: Some(future),
            waker: None,
        }
    }

    /// The task's waker, made at its first poll; takes the count of its wake back.
    fn settle(&mut self, cx: &Context<'_>) -> Waker {
        if let Some(registered) = &self.waker {
            registered.state.settle(IDLE);
            return registered.waker.clone();
        }
        self.local.parker.task_ran(self.class);
        let state = Arc::new(TaskWaker {
            state: AtomicU8::new(IDLE),
            class: self.class,
            parker: Arc::clone(&self.local.parker),
            inner: cx.waker().clone(),
        });
        let index = self.local.live.borrow_mut().insert(Arc::clone(&state));
        let waker = Waker::from(Arc::clone(&state));
        self.waker = Some(Registered {
            state,
            waker: waker.clone(),
            index,
        });
        waker
    }
}

impl<F: Future<Output = ()>> Future for LocalTask<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let waker = self.settle(cx);
        if self.local.ending.get() {
            self.future = None;
        }
        let result = match &mut self.future {
            Some(future) => future.as_mut().poll(&mut Context::from_waker(&waker)),
            None => Poll::Ready(()),
        };
        if result.is_ready() {
            self.future = None;
        }
        if self.local.asleep.replace(false) {
            self.local.signal();
        }
        result
    }
}

impl<F> Drop for LocalTask<F> {
    fn drop(&mut self) {
        match &self.waker {
            Some(registered) => {
                registered.state.settle(DONE);
                self.local.live.borrow_mut().remove(registered.index);
            }
            None => self.local.parker.task_ran(self.class),
        }
    }
}
