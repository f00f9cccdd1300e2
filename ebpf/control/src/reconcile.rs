//! Compares what should be in force with what is, and mends it, while the node runs: rules, the
//! table of nftables, interfaces.
//!
//! 1. It waits for `nft` and the helper, so it has a thread of its own, and nothing is due here.
//! 2. A node that starts puts its own config in force, in the mode that it finds. From then on it
//!    goes on from the set in force, whichever process applied it.
//! 3. A set that awaits a confirmation is left alone, and one that was rolled back stays so.
//! 4. An edge that was detached is not this node's any more: nothing is put in force after that.
//! 5. A failure is told once; one that may come right by itself is tried again after [`RETRY`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use millrace_edge::helper::Request;
use millrace_edge::interface::{self, Interface};
use millrace_edge::publish::Publisher;
use millrace_edge_policy::rules::Temporary;
use millrace_edge_policy::settings::Mode;
use millrace_tuning::NodeConfig;

use crate::apply::{ApplyOptions, ApplyReport, ApplyRequest, LockedEdge};
use crate::error::{ControlError, Fault, Retry};
use crate::journal::{CachedJournal, Record, RolledBack};
use crate::nftables::Restored;
use crate::open::AttachedEdge;
use crate::plan::Firewall;
use crate::policy::{EdgePolicy, ProgramPolicy};
use crate::probe::NodeProbe;
use crate::view::EdgeView;

/// Between two attempts at what may come right by itself: a missing process, a busy interface.
const RETRY: Duration = Duration::from_secs(5);
/// Between two looks at the table or the interfaces: a look at the table starts `nft`.
const LOOK: Duration = Duration::from_secs(1);

/// What failures are about.
const RULES: &str = "rules";
const TABLE: &str = "table";

/// What should be in force, and what was when it was tried.
#[derive(Debug, Clone, PartialEq)]
struct DesiredState {
    firewall: Firewall,
    temporary: Vec<Temporary>,
    policy: EdgePolicy,
    mode: Mode,
    rolled_back: Option<RolledBack>,
    in_force: u32,
    /// Table and journal have followed it.
    committed: bool,
}

/// Mends an edge when it is woken.
pub(crate) struct Reconciler {
    node: Arc<dyn NodeProbe>,
    config: Arc<NodeConfig>,
    port: u16,
    edge: Arc<AttachedEdge>,
    view: Arc<EdgeView>,
    journal: CachedJournal,
    /// The last state that was tried.
    tried: Option<DesiredState>,
    /// The policy of this node's config, and that of the set in force as far as it is known.
    own: EdgePolicy,
    policy: EdgePolicy,
    /// This node's config has had its turn, or another policy was applied since the start.
    started: bool,
    /// The set that this node found.
    found: u32,
    retry_at: Option<Instant>,
    /// Nftables has changed since the last look.
    table_changed: bool,
    table_at: Instant,
    interfaces_at: Instant,
    said: BTreeMap<String, String>,
}

impl Reconciler {
    pub(crate) fn new(
        node: Arc<dyn NodeProbe>,
        config: Arc<NodeConfig>,
        port: u16,
        edge: Arc<AttachedEdge>,
        view: Arc<EdgeView>,
    ) -> Self {
        let now = Instant::now();
        let own = EdgePolicy::of(&config.edge);
        let publisher = Publisher::new(edge.edge.maps());
        Self {
            // What awaits a confirmation is another config than this node's.
            started: publisher.awaits_confirm(),
            found: publisher.config().set,
            node,
            port,
            edge,
            view,
            journal: CachedJournal::default(),
            tried: None,
            policy: own.clone(),
            own,
            config,
            retry_at: None,
            // The kernel told nothing of earlier changes.
            table_changed: true,
            table_at: now,
            interfaces_at: now,
            said: BTreeMap::new(),
        }
    }

    /// Compares and mends, unless another process is changing the edge: then the next wake does.
    pub(crate) fn wake(&mut self) {
        let edge = Arc::clone(&self.edge);
        let Ok(lock) = edge.edge.pins().lock() else {
            return;
        };
        // In this order: a process that detaches holds the lock.
        if edge.is_attached() {
            let locked = edge.locked(&lock);
            self.follow_interfaces(&locked);
            self.follow_rules(&locked);
            self.follow_table(&locked);
        } else if std::mem::take(&mut self.view.status().is_in_kernel) {
            tracing::error!(
                "the edge was detached: user space holds caps and rates; restart the node when it is attached again"
            );
        }
    }

    fn follow_rules(&mut self, locked: &LockedEdge<'_>) {
        let is_late = |at: Instant| Instant::now() >= at;
        if locked.publisher().awaits_confirm() || !self.retry_at.is_none_or(is_late) {
            return;
        }
        let desired = match self.desired(locked) {
            Ok(desired) => desired,
            Err(error) => return self.refuse(locked, &error, "journal"),
        };
        if self.tried.as_ref() == Some(&desired) {
            return;
        }
        match self.apply(locked, &desired) {
            Ok(()) => {
                self.started = true;
                self.policy = desired.policy.clone();
                self.tried = Some(DesiredState {
                    in_force: locked.set_in_force(),
                    committed: true,
                    ..desired
                });
                self.retry_at = None;
                self.said.remove(RULES);
            }
            Err(error) if error.fault.retry() == Retry::AfterChange => {
                self.tried = Some(desired);
                let record = locked.record().ok();
                self.view.status().refused = record.and_then(|record| record.refused);
                self.refuse(locked, &error, "rules");
            }
            Err(error) => self.refuse(locked, &error, "publish"),
        }
    }

    /// What should be in force now. First, a change that was left half done is finished.
    fn desired(&mut self, locked: &LockedEdge<'_>) -> Result<DesiredState, ControlError> {
        let (pins, lock) = (locked.edge.pins(), locked.lock);
        if self.journal.read(pins, lock)?.pending.is_some() {
            if let Some(set) = locked.finish()? {
                tracing::info!(set, "finished a change that was left half done");
            }
            locked.note_rolled_back()?;
        }
        let record = self.journal.read(pins, lock)?;
        let in_force = locked.set_in_force();
        let rules = record.set(in_force).map_or(0, |set| set.rules.len());
        self.view.status().rules = (in_force, rules);
        let policy = self.desired_policy(in_force, &record);
        Ok(DesiredState {
            firewall: self.node.firewall(&policy.roles),
            temporary: record.live_temporary(SystemTime::now()),
            policy,
            mode: locked.publisher().mode(),
            rolled_back: record.rolled_back.clone(),
            in_force,
            committed: in_force == record.set,
        })
    }

    /// The policy of the set in force, whichever process applied it; at the start that of this
    /// node's config, unless it was tried and rolled back.
    fn desired_policy(&mut self, in_force: u32, record: &Record) -> EdgePolicy {
        self.started |= in_force != self.found;
        let Some(policy) = record.inputs(in_force).map(|inputs| &inputs.policy) else {
            return self.policy.clone();
        };
        let rolled_back = record.rolled_back.as_ref().map(|set| &set.inputs.policy);
        let was_rolled_back = rolled_back == Some(&self.own) && self.own != *policy;
        if !self.started && !was_rolled_back {
            return self.own.clone();
        }
        if !self.started && self.says("policy", "rolled back") {
            tracing::warn!(
                keys = self.own.differing_keys(policy).join(", "),
                "this node's config was tried and rolled back: what is in force stays, until an operator applies anew"
            );
        }
        policy.clone()
    }

    /// Puts in force what is not yet.
    fn apply(
        &mut self,
        locked: &LockedEdge<'_>,
        desired: &DesiredState,
    ) -> Result<(), ControlError> {
        let options = ApplyOptions {
            or_last_good: true,
            anew: false,
            only_changes: self.started,
            ..ApplyOptions::committed(desired.mode)
        };
        let firewall = desired.firewall.clone();
        let mut request = ApplyRequest::new(&self.config, self.port, firewall, options);
        request.inputs.policy = desired.policy.clone();
        let done = locked.apply(&request)?;
        self.note_older(desired, &done);
        let mut status = self.view.status();
        status.rules = (done.set, done.rules);
        status.registry_version = done.registry_version;
        if done.set != desired.in_force {
            let (set, version, mode) = (done.set, done.registry_version, done.mode);
            tracing::info!(set, version, mode, "rules in force");
        }
        Ok(())
    }

    /// Says, once, why older rules stand in for the newest: those are refused, or were rolled back.
    fn note_older(&mut self, desired: &DesiredState, done: &ApplyReport) {
        let (newest, stays) = (desired.firewall.version, done.registry_version);
        let rolled_back = desired.rolled_back.as_ref();
        let is_passed_over =
            stays < newest && rolled_back.is_some_and(|set| newest <= set.inputs.firewall.version);
        if is_passed_over && self.says("rolled back", &newest.to_string()) {
            tracing::warn!(
                version = newest,
                stays,
                "a version of the registry was rolled back: it is not put in force, until an operator applies anew or a newer one comes"
            );
        }
        let mut status = self.view.status();
        if status.refused == done.refused {
            return;
        }
        status.refused.clone_from(&done.refused);
        if let Some(refused) = &done.refused {
            *status.refusals.entry("rules").or_default() += 1;
            tracing::error!(
                version = refused.registry_version,
                message = refused.message,
                stays,
                "rules refused; those of the last good version stay in force"
            );
        }
    }

    fn refuse(&mut self, locked: &LockedEdge<'_>, error: &ControlError, reason: &'static str) {
        let is_tried_again = error.fault.retry() == Retry::Later;
        self.retry_at = is_tried_again.then(|| Instant::now() + RETRY);
        if self.says(RULES, &error.text) {
            let set = locked.set_in_force();
            tracing::error!(%error, set, reason, "rules do not follow; this set is in force");
            *self.view.status().refusals.entry(reason).or_default() += 1;
        }
    }

    /// Puts the table back that another program has changed or removed.
    fn follow_table(&mut self, locked: &LockedEdge<'_>) {
        let edge = Arc::clone(&self.edge);
        let Some(helper) = &edge.helper else {
            return;
        };
        // Without news of nftables, it is looked at again and again.
        let news = edge.ruleset.as_ref();
        self.table_changed |= news.is_none_or(|news| news.has_changed());
        let now = Instant::now();
        if !self.table_changed || now < self.table_at {
            return;
        }
        // Before the look: what changes meanwhile is told again.
        self.table_changed = false;
        self.table_at = now + LOOK;
        let record = self.journal.read(locked.edge.pins(), locked.lock);
        match record.and_then(|record| locked.restore_table(helper, &record)) {
            Ok(restored) => {
                self.said.remove(TABLE);
                // No other program is to blame for a table that could not be put in force before.
                if restored == Some(Restored::Changed) {
                    self.view.status().tables_restored += 1;
                    tracing::warn!(
                        "another program changed or removed the edge's table of nftables: it is back"
                    );
                }
            }
            Err(error) => {
                self.table_changed = true;
                self.table_at = now + RETRY;
                if self.says(TABLE, &error.text) {
                    tracing::error!(%error, "cannot keep the edge's table of nftables");
                }
            }
        }
    }

    /// Attaches again to interfaces that were made anew, or have lost a program.
    fn follow_interfaces(&mut self, locked: &LockedEdge<'_>) {
        let now = Instant::now();
        // An error of the journal is told with the rules.
        if now < self.interfaces_at || self.journal.read(locked.edge.pins(), locked.lock).is_err() {
            return;
        }
        self.interfaces_at = now + LOOK;
        let mut interfaces = self.journal.interfaces.clone();
        interfaces.retain(|interface| !locked.edge.is_live(interface));
        for interface in &interfaces {
            if interface::exists(&interface.name) {
                self.attach_again(interface);
            } else if self.says(&about(interface), "gone") {
                tracing::warn!(
                    interface = interface.name,
                    "an interface of the edge is gone; it is attached again when it is back"
                );
            }
        }
        interfaces.retain(|interface| !locked.edge.is_live(interface));
        self.view.status().interfaces_gone = interfaces.into_iter().map(|gone| gone.name).collect();
    }

    fn attach_again(&mut self, interface: &Interface) {
        let name = &interface.name;
        let request = Request::Attach {
            interface: name.clone(),
            // As it was asked for, and not what came of it on an interface that is no more.
            mode: ProgramPolicy::of(&self.config.edge).attach_mode(),
        };
        let attached = match &self.edge.helper {
            Some(helper) => helper.request(&request).map_err(ControlError::from),
            None => Err(ControlError::new(Fault::Host, "there is no helper")),
        };
        if let Err(error) = attached {
            self.view.status().attach_failures += 1;
            self.interfaces_at = Instant::now() + RETRY;
            if self.says(&about(interface), &error.text) {
                tracing::error!(
                    interface = name,
                    %error,
                    "an interface was made anew, or has lost a program, and the edge cannot be attached to it: closed in mode enforce"
                );
            }
            return;
        }
        self.said.remove(&about(interface));
        self.view.status().reattached += 1;
        tracing::warn!(
            interface = name,
            "an interface was made anew, or had lost a program: the edge is on it again"
        );
    }

    /// Whether this is something else than what was said last about the same.
    fn says(&mut self, about: &str, message: &str) -> bool {
        let before = self.said.insert(about.to_owned(), message.to_owned());
        before.as_deref() != Some(message)
    }
}

fn about(interface: &Interface) -> String {
    format!("interface {}", interface.name)
}
