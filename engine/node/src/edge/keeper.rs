//! Keeps the edge true while the node runs: a thread that wakes several times in each lease.
//!
//! 1. A lease is renewed whatever else fails: rules that do not compile must not end counts and stress.
//! 2. The set in force changes when the registry, the members, the temporary rules or the mode did, and not otherwise.
//! 3. A set on probation is left alone.
//! 4. An edge that somebody detached is not this node's any more: nothing is put in force behind their back.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use millrace_edge::helper::Request;
use millrace_edge::metrics::Counters;
use millrace_edge::nft::Table;
use millrace_edge::presence::Presence;
use millrace_edge::publish::{Publisher, Standing};
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::Temporary;
use millrace_edge_policy::settings::Mode;
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::stress::{Level, Sample, Stress, StressConfig};
use millrace_tuning::NodeConfig;

use super::force::{self, Order, Turn};
use super::plan::Firewall;
use super::start::{Kept, Kernel, unpredictable};
use crate::exit::{Exit, Failure};
use crate::running::Running;

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
    /// Sets that were refused, by reason.
    pub(crate) refused: Mutex<BTreeMap<&'static str, u64>>,
}

impl EdgeView {
    pub(crate) fn of(kept: &Kept) -> Self {
        Self {
            kernel: kept.kernel.clone(),
            detached: AtomicBool::new(false),
            steering: kept.steering,
            stress: AtomicU32::new(0),
            registry_version: AtomicU64::new(0),
            refused: Mutex::default(),
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

/// The thread; stops when dropped, and its lease with it.
pub(crate) struct Keeper {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(crate) fn start(
        node: Arc<Running>,
        config: NodeConfig,
        kept: Kept,
        view: Arc<EdgeView>,
    ) -> Result<Self, Failure> {
        let period = config.edge.lease.get() / WAKES_PER_LEASE;
        let (stop, stopped) = sync_channel::<()>(0);
        let thread = std::thread::Builder::new()
            .name("millrace-edge".into())
            .spawn(move || {
                let mut keeping = Keeping::new(&node, &config, &kept, &view);
                keeping.wake();
                while stopped.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
                    keeping.wake();
                }
                if let Some(presence) = &keeping.presence {
                    presence.end();
                }
            })
            .map_err(|error| Failure::io("the edge's thread", &error))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
    }
}

/// What a set is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Basis {
    version: u64,
    members: Vec<IpAddr>,
    temporary: Vec<Temporary>,
    enforce: bool,
}

/// Packets so far whose address nobody has shown.
#[derive(Debug, Clone, Copy)]
struct Pressed {
    /// By a Retry or a SYN cookie.
    answered: u64,
    /// Within a budget.
    admitted: u64,
    /// Beyond it.
    dropped: u64,
}

struct Keeping<'k> {
    node: &'k Running,
    config: &'k NodeConfig,
    kept: &'k Kept,
    view: &'k EdgeView,
    presence: Option<Presence<'k>>,
    stress: Stress,
    seen: Option<Pressed>,
    peers: Option<BTreeMap<u32, Key>>,
    /// Of the last set that was tried.
    basis: Option<Basis>,
}

impl<'k> Keeping<'k> {
    fn new(node: &'k Running, config: &'k NodeConfig, kept: &'k Kept, view: &'k EdgeView) -> Self {
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
            basis: None,
        }
    }

    fn wake(&mut self) {
        if let Some(presence) = &self.presence {
            presence.renew();
        }
        self.turn_keys();
        self.judge_stress();
        self.follow_peers();
        self.follow_rules();
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
        let shards = self.node.transport.status().shards();
        let (refused, unvalidated) = self.pressed();
        let sample = Sample {
            half_open: shards.iter().map(|shard| shard.handshakes).sum(),
            half_open_max: shards.len()
                * super::plan::to_usize(self.config.transport.handshakes_max),
            refused,
            unvalidated,
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

    /// What budgets refused, and what came without an address that is shown, since the last time.
    fn pressed(&mut self) -> (u64, u64) {
        let Some(kernel) = &self.kept.kernel else {
            return (0, 0);
        };
        let Ok(counters) = Counters::read(kernel.edge.maps().counters()) else {
            return (0, 0);
        };
        let both = |reason| counters.acted_on(reason) + counters.counted_as(reason);
        let now = Pressed {
            answered: both(Reason::TxRetry) + both(Reason::TxSynCookie),
            admitted: both(Reason::PassQuicInitial) + both(Reason::PassTcpSyn),
            dropped: both(Reason::TcpSynBudget),
        };
        let before = self.seen.replace(now).unwrap_or(now);
        let answered = now.answered.saturating_sub(before.answered);
        let admitted = now.admitted.saturating_sub(before.admitted);
        let dropped = now.dropped.saturating_sub(before.dropped);
        let refused = match self.stress.level() {
            Level::Normal => answered + dropped,
            // Everybody is answered, which no budget asked for.
            _ => 0,
        };
        (refused, answered + admitted + dropped)
    }

    fn follow_peers(&mut self) {
        let Some(presence) = &self.presence else {
            return;
        };
        let peers = self.node.transport.peer_keys();
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

    fn follow_rules(&mut self) {
        let Some(kernel) = self.kept.kernel.clone() else {
            return;
        };
        if !kernel.is_attached() {
            return self.go_on_alone();
        }
        // Somebody who is at it now is followed the next time.
        let Ok(Some(turn)) = Turn::now(kernel.edge.pins()) else {
            return;
        };
        let firewall = self.node.versions.firewall(&self.config.edge.roles);
        let Ok(mut state) = force::read_state(kernel.edge.pins()) else {
            return;
        };
        state.expire(SystemTime::now());
        let basis = Basis {
            version: firewall.version,
            members: firewall.members.clone(),
            temporary: state.temporary,
            enforce: state.enforce,
        };
        let waits = matches!(
            Publisher::new(kernel.edge.maps()).standing(),
            Standing::Probation { .. }
        );
        if self.basis.as_ref() == Some(&basis) || waits {
            return;
        }
        self.kept.admission.set_kernel_charges(basis.enforce);
        match self.put(&kernel, &turn, &firewall, basis.enforce) {
            Ok(set) => {
                self.view
                    .registry_version
                    .store(basis.version, Ordering::Relaxed);
                tracing::info!(set, version = basis.version, "rules in force");
            }
            Err(failure) => {
                tracing::error!(%failure, "rules refused; the last good set stays in force");
                let reason = if failure.exit == Exit::BadConfig {
                    "rules"
                } else {
                    "publish"
                };
                let mut refused = self
                    .view
                    .refused
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                *refused.entry(reason).or_default() += 1;
            }
        }
        // Tried once: what was refused is refused again.
        self.basis = Some(basis);
    }

    fn go_on_alone(&self) {
        self.kept.admission.set_kernel_charges(false);
        if !self.view.detached.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "the edge was detached: user space holds caps and rates; restart the node when it is attached again"
            );
        }
    }

    fn put(
        &mut self,
        kernel: &Kernel,
        turn: &Turn,
        firewall: &Firewall,
        enforce: bool,
    ) -> Result<u32, Failure> {
        let order = Order {
            config: self.config,
            port: self.node.address().port(),
            firewall,
            mode: if enforce { Mode::Enforce } else { Mode::Count },
            probation: None::<Duration>,
        };
        let nft = |table: &Table| match &kernel.helper {
            Some(helper) => helper
                .request(&Request::ApplyNft(table.clone()))
                .map_err(|error| Failure::new(Exit::Failed, error.to_string())),
            // The table that is there closes the same ports; only outbound rules stay as they were.
            None => Ok(()),
        };
        let done = force::put(&kernel.edge, turn, &order, nft)?;
        if let Some(presence) = &mut self.presence {
            presence.set_limits(&self.kept.settings.limits);
        }
        Ok(done.set)
    }
}
