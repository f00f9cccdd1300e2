//! Keeps the edge true while the node runs: a thread that wakes several times in each lease, and one that follows what others change
//! ([`Following`]).
//!
//! 1. A lease is renewed whatever else fails, and in time: the thread that renews it waits neither for `nft` nor
//!    for a lock of files.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use millrace_edge::metrics::Counters;
use millrace_edge::presence::Presence;
use millrace_edge::publish::Publisher;
use millrace_edge::state::Refused;
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::settings::{Caps, Limits, Mode};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::stress::{BudgetLoad, Level, LoadSample, Stress, StressConfig};
use millrace_node::Node;
use millrace_tuning::NodeConfig;

use super::follow::Following;
use super::start::{Kept, Kernel, unpredictable};
use crate::exit::Failure;

/// Wakes in each lease, so that a late one costs nothing.
const WAKES_PER_LEASE: u32 = 5;

/// What `/metrics` and `/status` show of the edge.
#[derive(Debug)]
pub(crate) struct EdgeView {
    pub(crate) kernel: Option<Arc<Kernel>>,
    /// Somebody has detached it.
    pub(crate) detached: AtomicBool,
    pub(crate) steering: &'static str,
    pub(crate) stress: AtomicU32,
    pub(crate) registry_version: AtomicU64,
    /// A newer version whose rules are refused.
    pub(crate) refused_now: Mutex<Option<Refused>>,
    /// Sets that were refused, by reason.
    pub(crate) refused: Mutex<BTreeMap<&'static str, u64>>,
    /// How often the table of nftables was put back.
    pub(crate) tables_restored: AtomicU64,
    /// How often the program was put on an interface that was made anew.
    pub(crate) reattached: AtomicU64,
    /// How often it could not be.
    pub(crate) attach_failures: AtomicU64,
    /// Interfaces that it is not on, though it should.
    pub(crate) gone: Mutex<Vec<String>>,
}

/// What somebody may have left in a panic is still to be seen.
pub(crate) fn held<T>(of_view: &Mutex<T>) -> MutexGuard<'_, T> {
    of_view.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EdgeView {
    pub(crate) fn of(kept: &Kept) -> Self {
        Self {
            kernel: kept.kernel.clone(),
            detached: AtomicBool::new(false),
            steering: kept.steering,
            stress: AtomicU32::new(0),
            registry_version: AtomicU64::new(0),
            refused_now: Mutex::default(),
            refused: Mutex::default(),
            tables_restored: AtomicU64::new(0),
            reattached: AtomicU64::new(0),
            attach_failures: AtomicU64::new(0),
            gone: Mutex::default(),
        }
    }

    /// `kernel` or `user_space`: who refuses.
    pub(crate) fn place(&self) -> &'static str {
        if self.is_in_kernel() {
            "kernel"
        } else {
            "user_space"
        }
    }

    pub(crate) fn is_in_kernel(&self) -> bool {
        self.kernel.is_some() && !self.detached.load(Ordering::Relaxed)
    }
}

/// The threads; they stop when this is dropped, and the lease with them.
pub(crate) struct Keeper {
    _keeping: Ticker,
    _following: Option<Ticker>,
}

impl Keeper {
    pub(crate) fn start(
        node: Node,
        config: NodeConfig,
        kept: Kept,
        view: Arc<EdgeView>,
    ) -> Result<Self, Failure> {
        let period = config.edge.lease.get() / WAKES_PER_LEASE;
        let (config, kept) = (Arc::new(config), Arc::new(kept));
        let following = kept.kernel.clone().map(|kernel| {
            let of_follower =
                Following::new(node.clone(), Arc::clone(&config), kernel, Arc::clone(&view));
            Ticker::start("millrace-rules", period, move |ticks| {
                let mut following = of_follower;
                following.wake();
                while ticks.next() {
                    following.wake();
                }
            })
        });
        let keeping = Ticker::start("millrace-edge", period, move |ticks| {
            let mut keeping = Keeping::new(&node, &config, &kept, &view);
            keeping.wake();
            while ticks.next() {
                keeping.wake();
            }
            if let Some(presence) = &keeping.presence {
                presence.end();
            }
        })?;
        Ok(Self {
            _following: following.transpose()?,
            _keeping: keeping,
        })
    }
}

/// A thread that does something again and again until it is dropped.
struct Ticker {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// When it does.
struct Ticks {
    stopped: Receiver<()>,
    period: Duration,
}

impl Ticks {
    /// Waits for the next one; false when there is none any more.
    fn next(&self) -> bool {
        self.stopped.recv_timeout(self.period) == Err(RecvTimeoutError::Timeout)
    }
}

impl Ticker {
    fn start(
        name: &'static str,
        period: Duration,
        run: impl FnOnce(&Ticks) + Send + 'static,
    ) -> Result<Self, Failure> {
        let (stop, stopped) = sync_channel::<()>(0);
        let ticks = Ticks { stopped, period };
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || run(&ticks))
            .map_err(|error| Failure::io("a thread of the edge", &error))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
    }
}

/// Packets so far whose address nobody has shown, of one kind.
#[derive(Debug, Clone, Copy, Default)]
struct BudgetCounters {
    /// By a Retry or a SYN cookie.
    answered: u64,
    /// Within a budget.
    admitted: u64,
    /// Beyond it.
    dropped: u64,
}

impl BudgetCounters {
    /// What was asked of a budget since then.
    fn load_since(self, before: Self, level: Level, budget: Limit) -> BudgetLoad {
        let answered = self.answered.saturating_sub(before.answered);
        let admitted = self.admitted.saturating_sub(before.admitted);
        let dropped = self.dropped.saturating_sub(before.dropped);
        BudgetLoad {
            refused: match level {
                Level::Normal => answered + dropped,
                // Everybody is answered, which no budget asked for.
                _ => 0,
            },
            unvalidated: answered + admitted + dropped,
            per_second: NANOSECONDS.checked_div(budget.interval_ns).unwrap_or(0),
        }
    }
}

const NANOSECONDS: u64 = 1_000_000_000;

struct Keeping<'k> {
    node: &'k Node,
    config: &'k NodeConfig,
    kept: &'k Kept,
    view: &'k EdgeView,
    presence: Option<Presence<'k>>,
    stress: Stress,
    /// Of QUIC, and of TCP.
    seen: Option<[BudgetCounters; 2]>,
    peers: Option<BTreeMap<u32, Key>>,
    /// Of the set that was in force at the last wake.
    limits: Option<(Limits, Caps)>,
}

impl<'k> Keeping<'k> {
    fn new(node: &'k Node, config: &'k NodeConfig, kept: &'k Kept, view: &'k EdgeView) -> Self {
        let presence = kept.kernel.as_ref().map(|kernel| {
            Presence::begin(
                kernel.edge.maps(),
                kernel.counts.run(),
                config.edge.lease.get(),
                &kept.settings.limits,
                &kept.admission.keys(),
            )
        });
        Self {
            node,
            config,
            kept,
            view,
            presence,
            stress: Stress::new(StressConfig::default(), millrace_edge::clock::now_ns()),
            seen: None,
            peers: None,
            limits: None,
        }
    }

    fn wake(&mut self) {
        if let Some(presence) = &self.presence {
            presence.renew();
        }
        self.follow_set();
        self.turn_keys();
        self.judge_stress();
        self.follow_peers();
    }

    /// Caps and rates are those of the set in force, here and in the sketch, whoever put it there and however long it stays.
    fn follow_set(&mut self) {
        let Some(kernel) = &self.kept.kernel else {
            return;
        };
        let publisher = Publisher::new(kernel.edge.maps());
        let admission = &self.kept.admission;
        let charges = self.view.is_in_kernel() && publisher.mode() == Mode::Enforce;
        admission.set_kernel_charges(charges);
        let now = publisher.limits();
        if let Some((limits, caps)) = now.filter(|_| now != self.limits) {
            admission.set_limits(limits, caps);
            if let Some(presence) = &mut self.presence {
                presence.set_limits(&limits);
            }
            self.limits = now;
        }
    }

    fn turn_keys(&mut self) {
        let now_ns = millrace_edge::clock::now_ns();
        let changed = self.kept.admission.tick(now_ns, unpredictable);
        if let Some(presence) = &mut self.presence {
            if changed {
                presence.set_keys(&self.kept.admission.keys());
            }
            presence.tick(unpredictable);
        }
    }

    fn judge_stress(&mut self) {
        let shards = self.node.transport().status().shards();
        let [quic, syn] = self.budget_loads();
        let sample = LoadSample {
            half_open: shards.iter().map(|shard| shard.handshakes).sum(),
            half_open_max: shards.len()
                * super::plan::to_usize(self.config.transport.handshakes_max),
            quic,
            syn,
        };
        let before = self.stress.level();
        let level = self.stress.tick(sample, millrace_edge::clock::now_ns());
        self.kept.admission.set_stress(level);
        if let Some(presence) = &self.presence {
            presence.set_stress(level);
        }
        self.view.stress.store(level as u32, Ordering::Relaxed);
        if level != before {
            tracing::warn!(?before, ?level, ?sample, "stress");
        }
    }

    /// What was asked of the budgets of QUIC and of SYNs since the last time.
    fn budget_loads(&mut self) -> [BudgetLoad; 2] {
        let (Some(kernel), Some((limits, _))) = (&self.kept.kernel, &self.limits) else {
            return [BudgetLoad::default(); 2];
        };
        let Ok(counters) = Counters::read(kernel.edge.maps().counters()) else {
            return [BudgetLoad::default(); 2];
        };
        let both = |reason| counters.acted_on(reason) + counters.counted_as(reason);
        let quic = BudgetCounters {
            answered: both(Reason::TxRetry),
            admitted: both(Reason::PassQuicInitial),
            dropped: 0,
        };
        let tcp = BudgetCounters {
            answered: both(Reason::TxSynCookie),
            admitted: both(Reason::PassTcpSyn),
            dropped: both(Reason::TcpSynBudget),
        };
        let before = self.seen.replace([quic, tcp]).unwrap_or([quic, tcp]);
        let level = self.stress.level();
        [
            quic.load_since(before[0], level, limits.unvalidated),
            tcp.load_since(before[1], level, limits.syn),
        ]
    }

    fn follow_peers(&mut self) {
        let Some(presence) = &self.presence else {
            return;
        };
        let peers = self.node.transport().peer_keys();
        if self.peers.as_ref() != Some(&peers) {
            match presence.set_peers(&peers) {
                Ok(()) => self.peers = Some(peers),
                Err(error) => tracing::warn!(
                    %error,
                    peers = peers.len(),
                    "the kernel does not know all peers; raise peers_max in [edge]"
                ),
            }
        }
    }
}
