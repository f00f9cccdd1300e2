//! The fallback for lost wake-ups: one thread per process that wakes a shard asleep with work to
//! do.
//!
//! glommio can fall asleep with runnable tasks when its preempt timer fires at the wrong moment
//! (see `runtime`). The loop's recipe keeps that from happening. Should it still happen, it costs
//! milliseconds and is counted; it does not stop the shard.
//!
//! Invariants:
//!
//! 1. A shard is woken only when its heartbeat stood still over a tick, its thread sleeps in the
//!    kernel, and it had not announced a park or has runnable tasks.
//! 2. The watchdog holds no shard alive.
//! 3. A look allocates nothing: a busy machine makes many of them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use crate::park::Parker;
use crate::stats::ShardStats;

struct Watched {
    parker: Weak<Parker>,
    stats: Arc<ShardStats>,
    beat: u64,
    /// What the kernel says of the shard's thread.
    thread: File,
}

#[derive(Default)]
struct Watchdog {
    shards: Mutex<Vec<Watched>>,
}

/// Watches a shard until its parker is gone. The first call starts the thread and sets its tick.
pub(crate) fn watch(parker: &Arc<Parker>, stats: &Arc<ShardStats>, tick: Duration) {
    static WATCHDOG: OnceLock<Arc<Watchdog>> = OnceLock::new();
    let watchdog = WATCHDOG.get_or_init(|| {
        let watchdog = Arc::new(Watchdog::default());
        let shared = Arc::clone(&watchdog);
        let thread = std::thread::Builder::new().name("millrace-watch".to_owned());
        if let Err(error) = thread.spawn(move || shared.run(tick)) {
            tracing::warn!(%error, "no watchdog thread: a lost wake-up would stop a shard");
        }
        watchdog
    });
    let thread = match File::open(format!("/proc/self/task/{}/stat", parker.thread())) {
        Ok(thread) => thread,
        Err(error) => {
            tracing::warn!(%error, "a shard is not watched: a lost wake-up would stop it");
            return;
        }
    };
    let watched = Watched {
        parker: Arc::downgrade(parker),
        stats: Arc::clone(stats),
        beat: 0,
        thread,
    };
    watchdog
        .shards
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(watched);
}

impl Watchdog {
    fn run(&self, tick: Duration) {
        loop {
            std::thread::sleep(tick);
            let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
            shards.retain_mut(Watched::look);
        }
    }
}

impl Watched {
    /// Looks at one shard; false when it is gone.
    fn look(&mut self) -> bool {
        let Some(parker) = self.parker.upgrade() else {
            return false;
        };
        let beat = parker.heartbeat();
        let stood_still = std::mem::replace(&mut self.beat, beat) == beat;
        let should_run = !parker.is_parked() || parker.any_runnable();
        if stood_still && should_run && sleeps(&self.thread) {
            self.stats.watchdog_wakes.add_shared(1);
            parker.wake_executor();
        }
        true
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
