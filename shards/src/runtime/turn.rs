//! The loop: what a shard does in one turn, in which order, and how it falls asleep.
//!
//! Cost of a busy turn beyond the datapath's own: one clock read, one `io_uring_enter`, a few
//! loads.
//!
//! Invariants:
//!
//! 1. Every step has a budget; what is left over is taken up in the next turn, before any park.
//! 2. A park is announced before the last look for work, and undone when there is any.
//! 3. The eventfd speaks only during a park in glommio.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use glommio::io::BufferedFile;

use crate::config::ShardConfig;
use crate::datapath::{Datapath, Transmit};
use crate::local::Local;
use crate::mailbox::MailReceiver;
use crate::park::{self, Class, Parker};
use crate::ring::Ring;
use crate::stats::ShardStats;

/// How often woken local tasks may wake others in one turn.
const LOCAL_ROUNDS: usize = 4;

/// A shard on its thread.
pub(super) struct Shard<D: Datapath> {
    pub(super) config: ShardConfig,
    pub(super) datapath: D,
    pub(super) ring: Ring,
    pub(super) mailbox: MailReceiver<D::Message>,
    pub(super) local: Rc<Local>,
    pub(super) parker: Arc<Parker>,
    pub(super) stats: Arc<ShardStats>,
    pub(super) eventfd: BufferedFile,
}

/// What the loop remembers from turn to turn.
struct TurnState {
    /// When this turn began.
    now: Instant,
    /// When the datapath's timer is due.
    deadline: Option<Instant>,
    /// `transmit` has more.
    more: bool,
    /// Since when nothing happened.
    idle_since: Option<Instant>,
    housekeeping_at: Instant,
    glommio_at: Instant,
    stopping: bool,
}

impl<D: Datapath> Shard<D> {
    /// Runs the shard until its datapath has stopped.
    pub(super) async fn run(mut self) {
        self.show_executor().await;
        let mut state = TurnState::new(&self.config);
        state.deadline = self.datapath.next_timeout();
        loop {
            self.parker.beat();
            self.stats.turns.add(1);

            // 1. Messages, up to a budget.
            let mut worked = self.take_messages(state.now);
            if self.parker.stop_requested() && !state.stopping {
                state.stopping = true;
                worked = true;
                self.datapath.on_stop(state.now);
            }

            // 2. Completions. The submit that ended the turn before ran what was deferred, so a
            //    busy shard finds some here without entering the kernel.
            worked |= self.ring.reap() || (self.ring.poll() && self.ring.reap());
            while let Some(refused) = self.ring.take_refused() {
                self.datapath.on_refused(&refused, state.now);
                worked = true;
            }

            // 3. Datagrams, up to a budget.
            worked |= self.take_datagrams(state.now);

            // 4. Timers.
            worked |= self.local.fire_timers(state.now);
            if state.deadline.is_some_and(|deadline| deadline <= state.now) {
                self.datapath.on_timeout(state.now);
                worked = true;
            }

            // 5. Local tasks that any of this woke, so that what they send leaves in this turn.
            if self.run_tasks().await {
                state.now = Instant::now();
                worked = true;
            }

            // 6. Packets to send, up to a budget, and one submit for all.
            if worked || state.more || self.datapath.has_pending() {
                worked = true;
                let Self { ring, datapath, .. } = &mut self;
                let sent = ring.transmit(|trains| datapath.transmit(trains, state.now));
                state.more = sent == Transmit::More;
                state.deadline = self.datapath.next_timeout();
            }
            self.ring.submit();

            // 7. Now and then: counters, glommio's turn, the end.
            if state.now >= state.housekeeping_at {
                state.housekeeping_at = state.now + self.config.housekeeping;
                self.datapath.on_housekeeping(state.now);
            }
            if state.stopping && self.datapath.is_stopped(state.now) {
                break;
            }
            self.give_glommio_a_turn(&mut state).await;

            // 8. Spin a little, then park.
            self.idle(&mut state, worked).await;
        }
        self.end().await;
    }

    /// Drops all local tasks and sends the last wake-ups.
    async fn end(&mut self) {
        self.local.end_tasks();
        while self.parker.any_runnable() {
            // A task woken from another thread is known to glommio's notifier only.
            self.local.signal();
            let mut state = TurnState::new(&self.config);
            self.sleep_in_glommio(&mut state).await;
        }
        // What drops from here on cannot wait for a submit of ours.
        park::set_drives_a_ring(false);
        self.ring.submit();
    }

    fn take_messages(&mut self, now: Instant) -> bool {
        let mut count = 0;
        while count < self.config.mailbox_batch
            && let Some(message) = self.mailbox.try_recv()
        {
            count += 1;
            self.datapath.on_message(message, now);
        }
        if count > 0 {
            self.stats.messages.add(count as u64);
        }
        count > 0
    }

    fn take_datagrams(&mut self, now: Instant) -> bool {
        let mut any = false;
        for _ in 0..self.config.receive_batch {
            if !self
                .ring
                .receive(|datagrams| self.datapath.on_datagrams(datagrams, now))
            {
                break;
            }
            any = true;
            if self.datapath.wants_to_send() {
                break;
            }
        }
        any
    }

    /// Runs woken local tasks. Returns whether there were any.
    async fn run_tasks(&mut self) -> bool {
        let mut any = false;
        for _ in 0..LOCAL_ROUNDS {
            if !self.parker.runnable(Class::Latency) {
                break;
            }
            // First in, first out: all tasks woken before this run before the loop does.
            yield_once().await;
            any = true;
        }
        if self.parker.runnable(Class::Other) {
            // glommio chooses by the queues' shares.
            glommio::executor().yield_task_queue_now().await;
            any = true;
        }
        any
    }

    /// Lets glommio look at its rings and its notifier, when the loop is too busy to park there.
    async fn give_glommio_a_turn(&mut self, state: &mut TurnState) {
        let foreign = self.parker.take_foreign();
        let due = self.local.waits_in_executor()
            && state.now - state.glommio_at >= self.config.glommio_turn;
        if foreign || due {
            self.stats.glommio_turns.add(1);
            // Signalled beforehand: the park ends as soon as glommio has been through its rings.
            self.local.signal();
            self.sleep_in_glommio(state).await;
        }
    }

    /// Ends a turn: at once after work, by spinning within the budget, by parking after it.
    async fn idle(&mut self, state: &mut TurnState, worked: bool) {
        let before = state.now;
        state.now = Instant::now();
        if worked || state.more {
            self.stats
                .busy_ns
                .add((state.now - before).as_nanos() as u64);
            if state.idle_since.take().is_some() {
                self.stats.spins_won.add(1);
            }
            return;
        }
        let Some(since) = state.idle_since else {
            // Look once more before anything else.
            state.idle_since = Some(state.now);
            return;
        };
        if state.now - since < self.config.spin {
            std::hint::spin_loop();
            return;
        }
        self.park(state).await;
        state.idle_since = None;
        state.now = Instant::now();
    }

    /// Sleeps until there is something to do.
    async fn park(&mut self, state: &mut TurnState) {
        let in_glommio = self.local.waits_in_executor() || self.parker.any_runnable();
        let until = state.next_deadline(&self.config, self.local.next_timer());
        let Some(timeout) = until
            .checked_duration_since(state.now)
            .filter(|left| !left.is_zero())
        else {
            return;
        };
        if in_glommio {
            self.ring.arm_timer(until, state.now);
            self.ring.submit();
            self.ring.enable_eventfd();
        }
        let may_sleep = self.parker.begin_park(state.stopping, || {
            let woken = !in_glommio && self.parker.any_runnable();
            let pending = self.datapath.has_pending();
            woken || pending || !self.mailbox.is_empty() || self.ring.has_work()
        });
        // Otherwise something came between the last look and the announcement.
        if may_sleep && in_glommio {
            self.stats.eventfd_parks.add(1);
            self.sleep_in_glommio(state).await;
        } else if may_sleep {
            self.stats.direct_parks.add(1);
            self.ring.park(timeout);
        }
        if in_glommio {
            self.ring.silence_eventfd();
        }
        self.parker.end_park();
    }

    /// Awaits the eventfd, which makes glommio go through its rings, and sleep if nothing is there.
    async fn sleep_in_glommio(&mut self, state: &mut TurnState) {
        self.local.set_asleep(true);
        // Wake-ups that tasks send meanwhile cannot wait for this loop's submit.
        park::set_drives_a_ring(false);
        if let Err(error) = self.eventfd.read_at(0, 8).await {
            // Cannot be told from a wake-up here; the loop polls, so nothing is lost but time.
            tracing::error!(%error, "the ring's eventfd cannot be read");
        }
        park::set_drives_a_ring(true);
        self.local.set_asleep(false);
        state.now = Instant::now();
        state.glommio_at = state.now;
    }

    /// Gives the watchdog a waker of this executor.
    async fn show_executor(&mut self) {
        let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
        self.parker.set_executor(Some(waker));
    }
}

impl TurnState {
    fn new(config: &ShardConfig) -> Self {
        let now = Instant::now();
        Self {
            now,
            deadline: None,
            more: false,
            idle_since: None,
            housekeeping_at: now + config.housekeeping,
            glommio_at: now,
            stopping: false,
        }
    }

    /// When a park must end: the first of all timers and the longest park.
    fn next_deadline(&self, config: &ShardConfig, timer: Option<Instant>) -> Instant {
        let longest = (self.now + config.direct_park_max).min(self.housekeeping_at);
        [self.deadline, timer]
            .into_iter()
            .flatten()
            .fold(longest, Instant::min)
    }
}

/// Goes to the back of the loop's own task queue once.
async fn yield_once() {
    let mut yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
