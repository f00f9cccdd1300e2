//! The threads of a node's edge: one renews the lease, the other reconciles (`Reconciler`).
//!
//! 1. The lease is renewed whatever else fails, and in time: the thread that renews it waits
//!    neither for `nft` nor for [`EdgeLock`](millrace_edge::pins::EdgeLock).

use std::iter::{once, repeat};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use millrace_edge::clock::now_ns;
use millrace_edge::helper::{HangUp, Helper};
use millrace_edge::lease::{NodeLease, unpredictable};
use millrace_edge::metrics::Counters;
use millrace_edge::publish::Publisher;
use millrace_edge_policy::settings::{Caps, Limits, Mode};
use millrace_edge_policy::stress::{BudgetLoad, LoadSample, Stress, StressConfig};
use millrace_tuning::NodeConfig;

use crate::error::{ControlError, Fault};
use crate::open::{EdgeContext, EdgeHandles};
use crate::probe::NodeProbe;
use crate::reconcile::Reconciler;
use crate::view::EdgeView;

/// Wakes in each lease, so that a late one costs nothing.
const WAKES_PER_LEASE: u32 = 5;

/// The threads of a node's edge. They stop when this is dropped, and the lease ends with them.
#[derive(Debug)]
pub struct EdgeAgent {
    /// Before the threads, which may wait for the helper.
    _hang_up: Option<HangUp>,
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
        let context = Arc::new(EdgeContext {
            node,
            config,
            handles,
            view,
        });
        let period = context.config.edge.lease.get() / WAKES_PER_LEASE;
        let kernel = context.handles.kernel.as_ref();
        let helper = kernel.and_then(|kernel| kernel.helper.as_ref());
        let hang_up = helper.map(Helper::hang_up_on_drop);
        let reconciler = context.handles.kernel.clone().map(|edge| {
            let mut reconciler = Reconciler::new(Arc::clone(&context), edge);
            Periodic::start("millrace-rules", period, move |wakes| {
                wakes.for_each(|()| reconciler.wake());
            })
        });
        let lease = Periodic::start("millrace-edge", period, move |wakes| {
            let mut lease_loop = LeaseLoop::new(&context);
            wakes.for_each(|()| lease_loop.wake());
            if let Some(lease) = &lease_loop.lease {
                lease.end();
            }
        })?;
        Ok(Self {
            _hang_up: hang_up,
            _reconciler: reconciler.transpose()?,
            _lease: lease,
        })
    }
}

/// A thread that does something again and again until this is dropped.
#[derive(Debug)]
struct Periodic(Option<(SyncSender<()>, JoinHandle<()>)>);

impl Periodic {
    /// `run` gets a wake at once, and then one in each period, until there is no more.
    fn start(
        name: &'static str,
        period: Duration,
        run: impl FnOnce(&mut dyn Iterator<Item = ()>) + Send + 'static,
    ) -> Result<Self, ControlError> {
        let (stop, stopped) = sync_channel::<()>(0);
        let waits = once(Duration::ZERO).chain(repeat(period));
        let mut wakes = waits.map_while(move |wait| {
            (stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout)).then_some(())
        });
        let thread = std::thread::Builder::new().name(name.into());
        let thread = thread.spawn(move || run(&mut wakes)).map_err(|error| {
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
    context: &'k EdgeContext,
    lease: Option<NodeLease<'k>>,
    stress: Stress,
    /// Of the set that was in force at the last wake.
    limits: Option<(Limits, Caps)>,
}

impl<'k> LeaseLoop<'k> {
    fn new(context: &'k EdgeContext) -> Self {
        let handles = &context.handles;
        let lease = handles.kernel.as_ref().map(|kernel| {
            NodeLease::begin(
                kernel.edge.maps(),
                kernel.counts.run(),
                context.config.edge.lease.get(),
                &handles.limits,
                &handles.admission.keys(),
            )
        });
        Self {
            context,
            lease,
            stress: Stress::new(StressConfig::default(), now_ns()),
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
        let Some(kernel) = &self.context.handles.kernel else {
            return;
        };
        let publisher = Publisher::new(kernel.edge.maps());
        let admission = &self.context.handles.admission;
        let charges = self.context.view.status().is_in_kernel && publisher.mode() == Mode::Enforce;
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
        let admission = &self.context.handles.admission;
        let changed = admission.tick(now_ns(), unpredictable);
        if let Some(lease) = &mut self.lease {
            if changed {
                lease.set_keys(&admission.keys());
            }
            lease.tick(unpredictable);
        }
    }

    fn judge_stress(&mut self) {
        let (half_open, half_open_max) = self.context.node.half_open();
        let kernel = self.context.handles.kernel.as_ref();
        let counters = kernel.map(|kernel| Counters::read(kernel.edge.maps().counters()));
        let [quic, syn] = match (counters, &self.limits) {
            (Some(Ok(counters)), Some((limits, _))) => {
                let budgets = [limits.unvalidated, limits.syn];
                self.stress.loads(counters.unvalidated(), budgets)
            }
            _ => [BudgetLoad::default(); 2],
        };
        let sample = LoadSample {
            half_open,
            half_open_max,
            quic,
            syn,
        };
        let before = self.stress.level();
        let level = self.stress.tick(sample, now_ns());
        self.context.handles.admission.set_stress(level);
        if let Some(lease) = &self.lease {
            lease.set_stress(level);
        }
        self.context.view.status().stress = level as u32;
        if level != before {
            tracing::warn!(?before, ?level, ?sample, "stress");
        }
    }

    fn follow_peers(&mut self) {
        let peers = self.context.node.peer_keys();
        let set = self.lease.as_mut().map(|lease| lease.set_peers(&peers));
        if let Some(Err(error)) = set {
            let peers = peers.len();
            tracing::warn!(%error, peers, "the kernel does not know all peers; raise peers_max in [edge]");
        }
    }
}
