//! The threads of a node's edge: one renews the lease, the other reconciles (`Reconciler`).
//!
//! 1. The lease is renewed whatever else fails, and in time: the thread that renews it waits
//!    neither for `nft` nor for [`EdgeLock`](millrace_edge::pins::EdgeLock).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use millrace_edge::clock::now_ns;
use millrace_edge::lease::{NodeLease, unpredictable};
use millrace_edge::metrics::Counters;
use millrace_edge::publish::Publisher;
use millrace_edge_policy::settings::{Caps, Limits, Mode};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::stress::{
    BudgetLoad, LoadSample, Stress, StressConfig, UnvalidatedPackets,
};
use millrace_tuning::NodeConfig;

use crate::error::{ControlError, Fault};
use crate::open::EdgeHandles;
use crate::probe::NodeProbe;
use crate::reconcile::Reconciler;
use crate::view::EdgeView;

/// Wakes in each lease, so that a late one costs nothing.
const WAKES_PER_LEASE: u32 = 5;

/// The threads of a node's edge. They stop when this is dropped, and the lease ends with them.
#[derive(Debug)]
pub struct EdgeAgent {
    _lease: Periodic,
    _reconciler: Option<Periodic>,
}

impl EdgeAgent {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// [`Fault::Host`] if the host gives no thread.
    pub fn start(
        node: Arc<dyn NodeProbe>,
        config: Arc<NodeConfig>,
        handles: EdgeHandles,
        view: Arc<EdgeView>,
    ) -> Result<Self, ControlError> {
        let period = config.edge.lease.get() / WAKES_PER_LEASE;
        let reconciler = handles.kernel.clone().map(|edge| {
            let (node, config) = (Arc::clone(&node), Arc::clone(&config));
            let mut reconciler =
                Reconciler::new(node, config, handles.port, edge, Arc::clone(&view));
            Periodic::start("millrace-rules", period, move |next| {
                while next() {
                    reconciler.wake();
                }
            })
        });
        let lease = Periodic::start("millrace-edge", period, move |next| {
            let mut lease_loop = LeaseLoop::new(&*node, &config, &handles, &view);
            while next() {
                lease_loop.wake();
            }
            if let Some(lease) = &lease_loop.lease {
                lease.end();
            }
        })?;
        Ok(Self {
            _reconciler: reconciler.transpose()?,
            _lease: lease,
        })
    }
}

/// A thread that does something again and again until this is dropped.
#[derive(Debug)]
struct Periodic(Option<(SyncSender<()>, JoinHandle<()>)>);

/// True at once, and then after each period, until there is no more.
type Next<'n> = &'n mut dyn FnMut() -> bool;

impl Periodic {
    fn start(
        name: &'static str,
        period: Duration,
        run: impl FnOnce(Next<'_>) + Send + 'static,
    ) -> Result<Self, ControlError> {
        let (stop, stopped) = sync_channel::<()>(0);
        let mut wait = Duration::ZERO;
        let mut next = move || {
            let is_stopped = stopped.recv_timeout(wait) != Err(RecvTimeoutError::Timeout);
            wait = period;
            !is_stopped
        };
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || run(&mut next))
            .map_err(|error| {
                ControlError::new(Fault::Host, format!("a thread of the edge: {error}"))
            })?;
        Ok(Self(Some((stop, thread))))
    }
}

impl Drop for Periodic {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take() {
            drop(stop);
            // A panic there was reported there.
            let _ = thread.join();
        }
    }
}

/// Renews the lease, turns keys, judges stress, follows limits and peers.
struct LeaseLoop<'k> {
    node: &'k dyn NodeProbe,
    handles: &'k EdgeHandles,
    view: &'k EdgeView,
    lease: Option<NodeLease<'k>>,
    stress: Stress,
    /// Of QUIC, and of TCP.
    seen: Option<[UnvalidatedPackets; 2]>,
    peers: Option<BTreeMap<u32, Key>>,
    /// Of the set that was in force at the last wake.
    limits: Option<(Limits, Caps)>,
}

impl<'k> LeaseLoop<'k> {
    fn new(
        node: &'k dyn NodeProbe,
        config: &NodeConfig,
        handles: &'k EdgeHandles,
        view: &'k EdgeView,
    ) -> Self {
        let lease = handles.kernel.as_ref().map(|kernel| {
            NodeLease::begin(
                kernel.edge.maps(),
                kernel.counts.run(),
                config.edge.lease.get(),
                &handles.limits,
                &handles.admission.keys(),
            )
        });
        Self {
            node,
            handles,
            view,
            lease,
            stress: Stress::new(StressConfig::default(), now_ns()),
            seen: None,
            peers: None,
            limits: None,
        }
    }

    fn wake(&mut self) {
        if let Some(lease) = &self.lease {
            lease.renew();
        }
        self.follow_set();
        self.turn_keys();
        self.judge_stress();
        self.follow_peers();
    }

    /// Caps and rates are those of the set in force, here and in the sketch, whichever process put
    /// it there and however long it stays.
    fn follow_set(&mut self) {
        let Some(kernel) = &self.handles.kernel else {
            return;
        };
        let publisher = Publisher::new(kernel.edge.maps());
        let admission = &self.handles.admission;
        let charges = self.view.status().is_in_kernel && publisher.mode() == Mode::Enforce;
        admission.set_kernel_charges(charges);
        let now = publisher.limits();
        if let Some((limits, caps)) = now.filter(|_| now != self.limits) {
            admission.set_limits(limits, caps);
            if let Some(lease) = &mut self.lease {
                lease.set_limits(&limits);
            }
            self.limits = now;
        }
    }

    fn turn_keys(&mut self) {
        let admission = &self.handles.admission;
        let changed = admission.tick(now_ns(), unpredictable);
        if let Some(lease) = &mut self.lease {
            if changed {
                lease.set_keys(&admission.keys());
            }
            lease.tick(unpredictable);
        }
    }

    fn judge_stress(&mut self) {
        let (half_open, half_open_max) = self.node.half_open();
        let [quic, syn] = self.loads();
        let sample = LoadSample {
            half_open,
            half_open_max,
            quic,
            syn,
        };
        let before = self.stress.level();
        let level = self.stress.tick(sample, now_ns());
        self.handles.admission.set_stress(level);
        if let Some(lease) = &self.lease {
            lease.set_stress(level);
        }
        self.view.status().stress = level as u32;
        if level != before {
            tracing::warn!(?before, ?level, ?sample, "stress");
        }
    }

    /// What was asked of the budgets of QUIC and of SYNs since the last time.
    fn loads(&mut self) -> [BudgetLoad; 2] {
        let kernel = self.handles.kernel.as_ref();
        let counters = kernel.map(|kernel| Counters::read(kernel.edge.maps().counters()));
        let (Some(Ok(counters)), Some((limits, _))) = (counters, &self.limits) else {
            return [BudgetLoad::default(); 2];
        };
        let now = counters.unvalidated();
        let [quic, tcp] = self.seen.replace(now).unwrap_or(now);
        let level = self.stress.level();
        [
            now[0].load_since(quic, level, limits.unvalidated),
            now[1].load_since(tcp, level, limits.syn),
        ]
    }

    fn follow_peers(&mut self) {
        let Some(lease) = &self.lease else {
            return;
        };
        let peers = self.node.peer_keys();
        if self.peers.as_ref() != Some(&peers) {
            match lease.set_peers(&peers) {
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
