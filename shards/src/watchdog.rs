//! The fallback for lost wake-ups: one thread for all shards of the process, which wakes a shard
//! asleep with work to do.
//!
//! glommio can fall asleep with runnable tasks when its preempt timer fires at the wrong moment
//! (see `runtime`). The loop's recipe keeps that from happening. Should it still happen, it costs
//! milliseconds and is counted; it does not stop the shard.
//!
//! Invariants:
//!
//! 1. A shard is woken only when its heartbeat stood still over a tick, its thread sleeps in the
//!    kernel, and it had not announced a park or has runnable tasks.
//! 2. The thread runs while a shard is watched: the end of the last one ends it.
//! 3. A look allocates nothing: a busy machine makes many of them.
//! 4. While all shards are parked and idle, the looks are up to [`IDLE_TICKS_MAX`] ticks apart, so
//!    that an idle process does not wake for them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::park::Parker;
use crate::stats::ShardStats;

/// Ticks between two looks at most. A wake-up that is lost while all sleep costs as many.
const IDLE_TICKS_MAX: u32 = 8;

/// The thread, while it runs. Locked before [`Watchdog::state`].
static RUNNING: Mutex<Option<Running>> = Mutex::new(None);

struct Running {
    watchdog: Arc<Watchdog>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Watchdog {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    shards: Vec<Watched>,
    is_ended: bool,
}

struct Watched {
    parker: Arc<Parker>,
    stats: Arc<ShardStats>,
    beat: u64,
    /// What the kernel says of the shard's thread.
    thread: File,
}

/// A shard that is watched, until this is dropped on its thread.
pub(crate) struct Watch {
    parker: Arc<Parker>,
}

/// Watches a shard. The first one starts the thread and sets its tick. None if it cannot be
/// watched.
pub(crate) fn watch(
    parker: &Arc<Parker>,
    stats: &Arc<ShardStats>,
    tick: Duration,
) -> Option<Watch> {
    let thread = match File::open(format!("/proc/self/task/{}/stat", parker.thread())) {
        Ok(thread) => thread,
        Err(error) => {
            tracing::warn!(%error, "a shard is not watched: a lost wake-up would stop it");
            return None;
        }
    };
    let watched = Watched {
        parker: Arc::clone(parker),
        stats: Arc::clone(stats),
        beat: 0,
        thread,
    };
    let mut running = lock(&RUNNING);
    let watchdog = match &*running {
        Some(running) => Arc::clone(&running.watchdog),
        None => match start(tick) {
            Ok(started) => Arc::clone(&running.insert(started).watchdog),
            Err(error) => {
                tracing::warn!(%error, "no watchdog thread: a lost wake-up would stop a shard");
                return None;
            }
        },
    };
    lock(&watchdog.state).shards.push(watched);
    Some(Watch {
        parker: Arc::clone(parker),
    })
}

fn start(tick: Duration) -> std::io::Result<Running> {
    let watchdog = Arc::new(Watchdog::default());
    let shared = Arc::clone(&watchdog);
    let thread = std::thread::Builder::new()
        .name("millrace-watch".to_owned())
        .spawn(move || shared.run(tick))?;
    Ok(Running { watchdog, thread })
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut running = lock(&RUNNING);
        let Some(watchdog) = running.as_ref().map(|one| Arc::clone(&one.watchdog)) else {
            return;
        };
        let mut state = lock(&watchdog.state);
        let is_other = |watched: &Watched| !Arc::ptr_eq(&watched.parker, &self.parker);
        state.shards.retain(is_other);
        if !state.shards.is_empty() {
            return;
        }
        state.is_ended = true;
        drop(state);
        watchdog.ended.notify_all();
        let ended = running.take();
        // A shard that starts meanwhile has a thread of its own.
        drop(running);
        if let Some(ended) = ended {
            // It waits for nothing but the notice. A panic there was reported there.
            let _ = ended.thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watchdog {
    fn run(&self, tick: Duration) {
        let mut state = lock(&self.state);
        let mut ticks = 1;
        loop {
            let waited = self
                .ended
                .wait_timeout_while(state, tick * ticks, |state| !state.is_ended);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if state.is_ended {
                return;
            }
            let mut is_idle = true;
            for watched in &mut state.shards {
                is_idle &= watched.look();
            }
            ticks = if is_idle {
                IDLE_TICKS_MAX.min(2 * ticks)
            } else {
                1
            };
        }
    }
}

impl Watched {
    /// Wakes the shard if it sleeps with work to do. Whether it slept without, since the last look.
    fn look(&mut self) -> bool {
        let beat = self.parker.heartbeat();
        let stood_still = std::mem::replace(&mut self.beat, beat) == beat;
        let should_run = !self.parker.is_parked() || self.parker.any_runnable();
        if stood_still && should_run && sleeps(&self.thread) {
            self.stats.watchdog_wakes.add_shared(1);
            self.parker.wake_executor();
        }
        stood_still && !should_run
    }
}

/// Whether a thread sleeps in the kernel, as opposed to running or waiting to run; by its `stat`.
fn sleeps(thread: &File) -> bool {
    // These hold the number, the name and the state (proc_pid_stat(5)); the rest is not needed.
    let mut begin = [0; 64];
    let Ok(bytes) = thread.read_at(&mut begin, 0) else {
        return false;
    };
    // The state is the letter behind the name; the name stands in parentheses and may hold some.
    let stat = &begin[..bytes];
    let name_end = stat.windows(2).rposition(|two| two == b") ");
    name_end.is_some_and(|end| stat.get(end + 2) == Some(&b'S'))
}
