//! Compares what should be in force with what is, and mends it, while the node runs: rules, the
//! table of nftables, interfaces.
//!
//! 1. It waits for `nft` and the helper, so it has a thread of its own, and nothing is due here.
//! 2. A node that starts puts its own config in force, in the mode that it finds. From then on it
//!    goes on from the set in force, whichever process applied it.
//! 3. A set that awaits a confirmation is left alone, and one that was rolled back stays so.
//! 4. An edge that was detached is not this node's any more: nothing is put in force after that.
//! 5. A failure is told once, and stands in the status until it is over; one that may come right by
//!    itself is tried again after [`RETRY`].

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use millrace_edge::helper::Request;
use millrace_edge::interface::{self, Interface};
use millrace_edge::journal::CachedJournal;
use millrace_edge::pins::PinError;
use millrace_edge::publish::Publisher;
use millrace_edge_policy::settings::Mode;

use crate::apply::{ApplyOptions, ApplyReport, ApplyRequest, LockedEdge};
use crate::error::{ControlError, Fault, Retry};
use crate::journal::{Journal, Record, RolledBack};
use crate::open::{AttachedEdge, EdgeContext};
use crate::plan::SetInputs;
use crate::policy::{EdgePolicy, ProgramPolicy};
use crate::view::EdgeStatus;

/// Between two attempts at what may come right by itself: a missing process, a busy interface.
const RETRY: Duration = Duration::from_secs(5);
/// Between two looks at the table or the interfaces: a look at the table starts `nft`.
const LOOK: Duration = Duration::from_secs(1);

/// What failures and looks are about.
const LOCK: &str = "lock";
const JOURNAL: &str = "journal";
const RULES: &str = "rules";
const PUBLISH: &str = "publish";
const TABLE: &str = "table";
const INTERFACES: &str = "interfaces";

/// What should be in force, and what was when it was tried.
#[derive(Debug, Clone, PartialEq)]
struct DesiredState {
    inputs: SetInputs,
    mode: Mode,
    rolled_back: Option<RolledBack>,
    in_force: u32,
    /// Table and journal have followed it.
    committed: bool,
}

/// Mends an edge when it is woken.
pub(crate) struct Reconciler {
    context: Arc<EdgeContext>,
    edge: Arc<AttachedEdge>,
    journal: CachedJournal<Record>,
    /// The last state that was tried.
    tried: Option<DesiredState>,
    /// This node's config has had its turn, or another policy was applied since the start.
    started: bool,
    /// The set that this node found.
    found: u32,
    /// Not before then is it the turn of these.
    due: BTreeMap<&'static str, Instant>,
    /// Nftables has changed since the last look.
    table_changed: bool,
}

impl Reconciler {
    pub(crate) fn new(context: Arc<EdgeContext>, edge: Arc<AttachedEdge>) -> Self {
        let publisher = Publisher::new(edge.edge.maps());
        Self {
            // What awaits a confirmation is another config than this node's.
            started: publisher.awaits_confirm(),
            found: publisher.config().set,
            context,
            edge,
            journal: CachedJournal::default(),
            tried: None,
            due: BTreeMap::new(),
            // The kernel told nothing of earlier changes.
            table_changed: true,
        }
    }

    /// Compares and mends, unless another process is changing the edge: then the next wake does.
    pub(crate) fn wake(&mut self) {
        if !self.is_due(LOCK) {
            return;
        }
        let edge = Arc::clone(&self.edge);
        let lock = match edge.edge.pins().lock() {
            Ok(lock) => lock,
            Err(PinError::Busy { .. }) => return,
            Err(error) => return self.refuse(LOCK, &error.into()),
        };
        self.settle(LOCK);
        // In this order: a process that detaches holds the lock.
        if edge.is_attached() {
            let locked = edge.locked(&lock);
            self.follow_interfaces(&locked);
            self.follow_rules(&locked);
            self.follow_table(&locked);
        } else if std::mem::take(&mut self.status().is_in_kernel) {
            tracing::error!(
                "the edge was detached: user space holds caps and rates; restart the node when it is attached again"
            );
        }
    }

    fn follow_rules(&mut self, locked: &LockedEdge<'_>) {
        let is_due = self.is_due(JOURNAL) && self.is_due(PUBLISH);
        if locked.publisher().awaits_confirm() || !is_due {
            return;
        }
        let desired = match self.desired(locked) {
            Ok(desired) => desired,
            Err(error) => return self.refuse(JOURNAL, &error),
        };
        self.settle(JOURNAL);
        if self.tried.as_ref() == Some(&desired) {
            return;
        }
        match self.apply(locked, &desired) {
            Ok(()) => {
                self.started = true;
                self.tried = Some(DesiredState {
                    in_force: locked.set_in_force(),
                    committed: true,
                    ..desired
                });
                self.settle(RULES);
                self.settle(PUBLISH);
            }
            Err(error) if error.fault.retry() == Retry::AfterChange => {
                self.tried = Some(desired);
                let record = locked.record().ok();
                self.status().refused = record.and_then(|record| record.refused);
                self.settle(PUBLISH);
                self.refuse(RULES, &error);
            }
            Err(error) => self.refuse(PUBLISH, &error),
        }
    }

    /// What should be in force now. First, a change that was left half done is finished.
    fn desired(&mut self, locked: &LockedEdge<'_>) -> Result<DesiredState, ControlError> {
        let (pins, lock) = (locked.edge.pins(), locked.lock);
        if self.journal.read(pins, lock)?.control.pending.is_some() {
            if let Some(set) = locked.finish()? {
                tracing::info!(set, "finished a change that was left half done");
            }
            locked.note_rolled_back()?;
        }
        let journal = self.journal.read(pins, lock)?;
        let (record, in_force) = (&journal.control, locked.set_in_force());
        let rules = record.set(in_force).map_or(0, |set| set.rules.len());
        self.status().rules = (in_force, rules);
        let policy = self.desired_policy(in_force, record);
        let context = &self.context;
        Ok(DesiredState {
            inputs: SetInputs {
                registry: context.config.registry.public_key.clone(),
                firewall: context.node.firewall(&policy.roles),
                port: context.handles.port,
                policy,
                temporary: record.live_temporary(SystemTime::now()),
            },
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
        let own = EdgePolicy::of(&self.context.config.edge);
        let Some(policy) = record.inputs(in_force).map(|inputs| &inputs.policy) else {
            let tried = self.tried.as_ref();
            return tried.map_or(own, |tried| tried.inputs.policy.clone());
        };
        let rolled_back = record.rolled_back.as_ref().map(|set| &set.inputs.policy);
        if self.started {
            self.settle("config");
        } else if rolled_back != Some(&own) || own == *policy {
            return own;
        } else if self.fails("config", "tried and rolled back") {
            tracing::warn!(
                keys = own.differing_keys(policy).join(", "),
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
        let done = locked.apply(&ApplyRequest {
            inputs: desired.inputs.clone(),
            program: ProgramPolicy::of(&self.context.config.edge),
            options: ApplyOptions {
                or_last_good: true,
                anew: false,
                only_changes: self.started,
                ..ApplyOptions::committed(desired.mode)
            },
        })?;
        self.note_older(desired, &done);
        let mut status = self.status();
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
        let (newest, stays) = (desired.inputs.firewall.version, done.registry_version);
        let rolled_back = desired.rolled_back.as_ref();
        let is_passed_over =
            stays < newest && rolled_back.is_some_and(|set| newest <= set.inputs.firewall.version);
        if !is_passed_over {
            self.settle("registry");
        } else if self.fails("registry", &format!("version {newest} was rolled back")) {
            tracing::warn!(
                version = newest,
                stays,
                "a version of the registry was rolled back: it is not put in force, until an operator applies anew or a newer one comes"
            );
        }
        let mut status = self.status();
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

    fn is_due(&self, about: &str) -> bool {
        let due = self.due.get(about);
        due.is_none_or(|at| Instant::now() >= *at)
    }

    fn wait(&mut self, about: &'static str, period: Duration) {
        self.due.insert(about, Instant::now() + period);
    }

    fn status(&self) -> MutexGuard<'_, EdgeStatus> {
        self.context.view.status()
    }

    fn refuse(&mut self, about: &'static str, error: &ControlError) {
        if error.fault.retry() == Retry::Later {
            self.wait(about, RETRY);
        }
        if self.fails(about, &error.text) {
            let set = Publisher::new(self.edge.edge.maps()).config().set;
            tracing::error!(%error, set, about, "the edge does not follow; this set is in force");
            *self.status().refusals.entry(about).or_default() += 1;
        }
    }

    /// Keeps a failure for the status. Whether it is another than the last one about the same.
    fn fails(&self, about: &str, text: &str) -> bool {
        let failures = &mut self.status().failures;
        failures.insert(about.into(), text.into()).as_deref() != Some(text)
    }

    fn settle(&self, about: &str) {
        self.status().failures.remove(about);
    }

    /// Puts the table back that another program has changed or removed.
    fn follow_table(&mut self, locked: &LockedEdge<'_>) {
        let edge = Arc::clone(&self.edge);
        let Some(helper) = &edge.helper else {
            return;
        };
        // Without news of nftables, it is looked at again and again; so is one that is missing, of
        // which nothing is told.
        let news = edge.ruleset.as_ref();
        self.table_changed |= news.is_none_or(|news| news.has_changed());
        let journal = self.journal.read(locked.edge.pins(), locked.lock);
        let is_missing = |journal: &Arc<Journal>| journal.control.fingerprint.is_none();
        self.table_changed |= journal.as_ref().is_ok_and(is_missing);
        if !self.table_changed || !self.is_due(TABLE) {
            return;
        }
        // Before the look: what changes meanwhile is told again.
        self.table_changed = false;
        self.wait(TABLE, LOOK);
        match journal
            .map_err(ControlError::from)
            .and_then(|journal| locked.restore_table(helper, &journal.control))
        {
            Ok(by_others) => {
                self.settle(TABLE);
                if by_others {
                    self.status().tables_restored += 1;
                    tracing::warn!(
                        "another program changed or removed the edge's table of nftables: it is back"
                    );
                }
            }
            Err(error) => {
                self.table_changed = true;
                self.wait(TABLE, RETRY);
                self.refuse(TABLE, &error);
            }
        }
    }

    /// Attaches again to interfaces that were made anew, or have lost a program.
    fn follow_interfaces(&mut self, locked: &LockedEdge<'_>) {
        if !self.is_due(INTERFACES) {
            return;
        }
        // An error of the journal is told with the rules.
        let Ok(journal) = self.journal.read(locked.edge.pins(), locked.lock) else {
            return;
        };
        self.wait(INTERFACES, LOOK);
        for interface in &journal.interfaces {
            let about = format!("interface {}", interface.name);
            if locked.edge.is_live(interface) {
                self.settle(&about);
            } else if interface::exists(&interface.name) {
                self.attach_again(interface, &about);
            } else if self.fails(&about, "gone") {
                tracing::warn!(
                    interface = interface.name,
                    "an interface of the edge is gone; it is attached again when it is back"
                );
            }
        }
        let gone = journal
            .interfaces
            .iter()
            .filter(|known| !locked.edge.is_live(known));
        self.status().interfaces_gone = gone.map(|gone| gone.name.clone()).collect();
    }

    fn attach_again(&mut self, interface: &Interface, about: &str) {
        let name = &interface.name;
        let request = Request::Attach {
            interface: name.clone(),
            // As it was asked for, and not what came of it on an interface that is no more.
            mode: ProgramPolicy::of(&self.context.config.edge).attach_mode(),
        };
        let attached = match &self.edge.helper {
            Some(helper) => helper.request(&request).map_err(ControlError::from),
            None => Err(ControlError::new(Fault::Host, "there is no helper")),
        };
        if let Err(error) = attached {
            self.status().attach_failures += 1;
            self.wait(INTERFACES, RETRY);
            if self.fails(about, &error.text) {
                tracing::error!(
                    interface = name,
                    %error,
                    "an interface was made anew, or has lost a program, and the edge cannot be attached to it: closed in mode enforce"
                );
            }
            return;
        }
        self.settle(about);
        self.status().reattached += 1;
        tracing::warn!(
            interface = name,
            "an interface was made anew, or had lost a program: the edge is on it again"
        );
    }
}
