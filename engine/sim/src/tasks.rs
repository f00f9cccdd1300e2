//! Tasks and timers of a simulation: one thread, virtual time, in the order of their waking.
//!
//! Invariants
//! 1. Nothing is borrowed while a task runs: it may start others.
//! 2. A task's slot is reused with another generation; a late waker wakes no task.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

type Boxed = Pin<Box<dyn Future<Output = ()>>>;

/// Woken tasks, by slot and generation; wakers must be `Send`, hence the lock, which no other
/// thread takes.
type Woken = Arc<Mutex<VecDeque<(usize, u64)>>>;

struct Slot {
    generation: u64,
    /// The node that the task ends with.
    node: Option<usize>,
    /// None while it runs, and when it is done.
    future: Option<Boxed>,
    waker: Waker,
}

/// Starts tasks and wakes them.
#[derive(Clone)]
pub(crate) struct Tasks {
    now: Rc<Cell<Instant>>,
    slots: Rc<RefCell<Vec<Option<Slot>>>>,
    woken: Woken,
    timers: Rc<RefCell<BTreeMap<(Instant, u64), Waker>>>,
    started: Rc<Cell<u64>>,
}

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tasks")
            .field("slots", &self.slots.borrow().len())
            .finish_non_exhaustive()
    }
}

struct Waking {
    slot: usize,
    generation: u64,
    woken: Woken,
}

impl Wake for Waking {
    fn wake(self: Arc<Self>) {
        lock(&self.woken).push_back((self.slot, self.generation));
    }
}

impl Tasks {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            now: Rc::new(Cell::new(now)),
            slots: Rc::default(),
            woken: Woken::default(),
            timers: Rc::default(),
            started: Rc::default(),
        }
    }

    pub(crate) fn now(&self) -> Instant {
        self.now.get()
    }

    pub(crate) fn spawn(&self, node: Option<usize>, task: impl Future<Output = ()> + 'static) {
        let generation = self.next_number();
        let mut slots = self.slots.borrow_mut();
        let slot = slots.iter().position(Option::is_none).unwrap_or_else(|| {
            slots.push(None);
            slots.len() - 1
        });
        let woken = Arc::clone(&self.woken);
        let waker = Waker::from(Arc::new(Waking {
            slot,
            generation,
            woken,
        }));
        waker.wake_by_ref();
        slots[slot] = Some(Slot {
            generation,
            node,
            future: Some(Box::pin(task)),
            waker,
        });
    }

    pub(crate) fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        let key = (self.now.get() + duration, self.next_number());
        Sleep {
            tasks: self.clone(),
            key,
        }
    }

    /// Runs every task that was woken. False when none was.
    pub(crate) fn run(&self) -> bool {
        let woken = std::mem::take(&mut *lock(&self.woken));
        for &(slot, generation) in &woken {
            self.run_one(slot, generation);
        }
        !woken.is_empty()
    }

    fn run_one(&self, slot: usize, generation: u64) {
        let taken = match self.slots.borrow_mut().get_mut(slot) {
            Some(Some(held)) if held.generation == generation => held
                .future
                .take()
                .map(|future| (future, held.waker.clone())),
            _ => None,
        };
        let Some((mut future, waker)) = taken else {
            return;
        };
        let is_done = future
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_ready();
        let mut slots = self.slots.borrow_mut();
        if let Some(Some(held)) = slots.get_mut(slot)
            && held.generation == generation
        {
            if is_done {
                slots[slot] = None;
            } else {
                held.future = Some(future);
            }
        }
    }

    /// When the next timer is due.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.timers
            .borrow()
            .first_key_value()
            .map(|((at, _), _)| *at)
    }

    /// Moves the time, and wakes whose timers are due.
    pub(crate) fn set_now(&self, now: Instant) {
        self.now.set(now);
        let mut due = self.timers.borrow_mut();
        let later = due.split_off(&(now, u64::MAX));
        let due = std::mem::replace(&mut *due, later);
        for waker in due.into_values() {
            waker.wake();
        }
    }

    /// Ends the tasks of a node.
    pub(crate) fn end(&self, node: usize) {
        self.end_if(|slot| slot.node == Some(node));
    }

    /// Ends all tasks.
    pub(crate) fn end_all(&self) {
        self.end_if(|_| true);
    }

    fn end_if(&self, is_ended: impl Fn(&Slot) -> bool) {
        let mut ended = Vec::new();
        for slot in self.slots.borrow_mut().iter_mut() {
            if slot.as_ref().is_some_and(&is_ended) {
                ended.push(slot.take());
            }
        }
        // Dropped with nothing borrowed: a task may hold a request, which takes itself back.
        drop(ended);
    }

    fn next_number(&self) -> u64 {
        self.started.replace(self.started.get() + 1)
    }
}

struct Sleep {
    tasks: Tasks,
    key: (Instant, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.tasks.now() >= self.key.0 {
            return Poll::Ready(());
        }
        self.tasks
            .timers
            .borrow_mut()
            .insert(self.key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.tasks.timers.borrow_mut().remove(&self.key);
    }
}

fn lock(woken: &Woken) -> std::sync::MutexGuard<'_, VecDeque<(usize, u64)>> {
    woken.lock().unwrap_or_else(PoisonError::into_inner)
}
