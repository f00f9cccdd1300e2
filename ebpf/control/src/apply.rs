//! Puts sets in force: for a command, and for a node whose registry changed.
//!
//! The kernel says which set is in force, in which mode, and whether it awaits a confirmation:
//! [`Publisher`]. The journal says everything else: [`Record`].
//!
//! ```text
//!             apply                         apply, to be confirmed
//! committed ─────────▶ half done   committed ───────────────────▶ awaits confirmation
//!     ▲                   │            ▲                             │     │
//!     └───── finish ──────┘            └─ rolled back ◀─ time, revert ┘     │ confirm
//!                                                                          ▼
//!                                                committed ◀─ finish ─ half done
//!
//! committed     the kernel's set is the journal's
//! half done     the kernel has the pending set for good
//! rolled back   the kernel had the pending set, and has another one now
//! ```
//!
//! 1. Everything is checked first, also by nftables. Then come the journal with the pending set,
//!    the kernel, nftables and the journal again: the next process finishes what a dead one began.
//! 2. A set that awaits a confirmation changes neither nftables nor what is committed.
//! 3. [`EdgeLock`] is held from before the first read until after the last write.
//! 4. The rules of the set in force are good. They stand in for newer ones that are refused, if the
//!    request allows it, and for older ones that a command asks for.
//! 5. What was rolled back comes back only if an operator asks for it anew: without that, a
//!    registry version above the one in force, up to the one that was rolled back, is passed over.

use std::time::{Duration, SystemTime};

use millrace_edge::abi::{EdgeSampling, GENERATIONS};
use millrace_edge::edge::Edge;
use millrace_edge::nft::{Nft, Table};
use millrace_edge::pins::{EdgeLock, Pins};
use millrace_edge::publish::Publisher;
use millrace_edge_policy::rules::{Compiled, Temporary};
use millrace_edge_policy::settings::Mode;
use millrace_tuning::NodeConfig;
use millrace_tuning::units::to_u32;
use serde::Serialize;

use crate::error::{ControlError, Fault, Retry};
use crate::journal::{Pending, Record, Refused, RolledBack, SetRecord};
use crate::nftables::{Nftables, Tables, mend};
use crate::plan::{self, Firewall, SetInputs};
use crate::policy::{EdgePolicy, ProgramPolicy};

/// What is to be in force.
#[derive(Debug, Clone)]
pub struct ApplyRequest {
    /// What the set is made from. Its temporary rules are added to those that there are.
    pub inputs: SetInputs,
    /// What the program is loaded with.
    pub program: ProgramPolicy,
    /// How it is put in force.
    pub options: ApplyOptions,
}

impl ApplyRequest {
    /// What a config and the registry say.
    #[must_use]
    pub fn new(config: &NodeConfig, port: u16, firewall: Firewall, options: ApplyOptions) -> Self {
        Self {
            inputs: SetInputs {
                registry: config.registry.public_key.clone(),
                firewall,
                port,
                policy: EdgePolicy::of(&config.edge),
                temporary: Vec::new(),
            },
            program: ProgramPolicy::of(&config.edge),
            options,
        }
    }
}

/// How a set is put in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ApplyOptions {
    /// Whether the program refuses.
    pub mode: Mode,
    /// Until when the set must be confirmed, or the kernel goes back; none: it need not be.
    pub confirm_within: Option<Duration>,
    /// Where the registry's rules are refused, take those of the set in force.
    pub or_last_good: bool,
    /// An operator asks for it: what was rolled back may be in force again.
    pub anew: bool,
    /// Nothing changes if the same set is committed already.
    pub only_changes: bool,
}

impl ApplyOptions {
    /// In force for good, only with good rules, as an operator asks.
    #[must_use]
    pub fn committed(mode: Mode) -> Self {
        Self {
            mode,
            anew: true,
            ..Self::default()
        }
    }
}

/// A set that may be put in force, and what it was made from.
type Prepared = (Compiled, SetInputs);

/// What is in force now.
#[derive(Debug, Serialize)]
pub struct ApplyReport {
    /// Number of the set.
    pub set: u32,
    /// `count` or `enforce`.
    pub mode: &'static str,
    /// The version of the registry whose rules they are.
    pub registry_version: u64,
    /// Inbound rules.
    pub rules: usize,
    /// A newer version of the registry, whose rules are refused.
    pub refused: Option<Refused>,
}

/// An edge whose lock is held.
#[derive(Debug, Clone, Copy)]
pub struct LockedEdge<'e> {
    pub(crate) edge: &'e Edge,
    pub(crate) lock: &'e EdgeLock,
    pub(crate) tables: Tables<'e>,
}

impl<'e> LockedEdge<'e> {
    /// For a command, which has the privileges to change nftables itself.
    #[must_use]
    pub fn new(edge: &'e Edge, lock: &'e EdgeLock, nft: &'e Nft) -> Self {
        let tables = Tables::OfCommand(nft);
        Self { edge, lock, tables }
    }

    pub(crate) fn publisher(&self) -> Publisher<'e> {
        Publisher::new(self.edge.maps())
    }

    pub(crate) fn set_in_force(&self) -> u32 {
        self.publisher().config().set
    }

    pub(crate) fn record(&self) -> Result<Record, ControlError> {
        Record::read(self.edge.pins())
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Record)) -> Result<(), ControlError> {
        Record::update(self.edge.pins(), self.lock, change)
    }

    /// Puts in force what was asked for. A registry version that is refused is written down.
    ///
    /// # Errors
    ///
    /// [`Fault::Operator`] while a set awaits a confirmation; otherwise what the rules, the kernel,
    /// nftables or the journal refuse, with a text that says whether the kernel has the set.
    pub fn apply(&self, request: &ApplyRequest) -> Result<ApplyReport, ControlError> {
        self.publisher().check_turn()?;
        if let Err(error) = self.finish() {
            // What is asked for now takes its place.
            tracing::warn!(%error, "a change that was left half done stays so");
        }
        self.note_rolled_back()?;
        let (record, in_force) = (self.record()?, self.set_in_force());
        let ((set, inputs), refused) = self.prepare(request, &record, in_force)?;
        let is_committed = record.set == in_force
            && record.pending.is_none()
            && record.inputs(in_force) == Some(&inputs);
        let mut report = ApplyReport {
            set: in_force,
            mode: request.options.mode.word(),
            registry_version: inputs.firewall.version,
            rules: set.rules.len(),
            refused,
        };
        if !(request.options.only_changes && is_committed) {
            let pending = Pending {
                set: self.free_number(&record),
                to_confirm: request.options.confirm_within.is_some(),
                anew: request.options.anew,
                refused: report.refused.clone(),
            };
            report.set = pending.set;
            self.publish(request, &set, inputs, pending)?;
        }
        Ok(report)
    }

    /// Compiles, and asks nftables: the set, and why its rules are not the newest, if so. Nothing
    /// is in force that was not.
    fn prepare(
        &self,
        request: &ApplyRequest,
        record: &Record,
        in_force: u32,
    ) -> Result<(Prepared, Option<Refused>), ControlError> {
        let last = record.inputs(in_force);
        let last = last.filter(|inputs| inputs.registry == request.inputs.registry);
        let newest = newest(request, last, record.rolled_back.as_ref(), in_force)?;
        let mut inputs = request.inputs.clone();
        inputs.temporary = record.live_temporary(SystemTime::now());
        for rule in &request.inputs.temporary {
            inputs.temporary.retain(|known| known.prefix != rule.prefix);
            inputs.temporary.push(rule.clone());
        }
        let compile = |firewall| {
            let inputs = inputs.clone();
            self.compile(request, SetInputs { firewall, ..inputs })
        };
        let error = match compile(newest.clone()) {
            // The rules that stand in for a refused version are asked for as they are.
            Err(error) if error.fault.retry() == Retry::AfterChange => error,
            compiled => {
                let refused = record.refused.clone();
                let newer = refused.filter(|refused| refused.registry_version > newest.version);
                return Ok((compiled?, newer));
            }
        };
        if last.is_some_and(|inputs| inputs.firewall.version == newest.version) {
            // The config's or a temporary rule's fault, and not the registry's.
            return Err(error);
        }
        let refused = Some(Refused {
            registry_version: newest.version,
            message: error.to_string(),
        });
        if record.refused != refused {
            self.update(|record| record.refused.clone_from(&refused))?;
        }
        match last.filter(|_| request.options.or_last_good) {
            Some(good) => Ok((compile(good.rules_for(newest))?, refused)),
            None => Err(error),
        }
    }

    fn compile(&self, request: &ApplyRequest, inputs: SetInputs) -> Result<Prepared, ControlError> {
        let set = plan::compiled(&inputs, request.options.mode, request.program.bounds())?;
        // The maps may be smaller than this config's.
        self.publisher().check_room(&set)?;
        self.tables.check(Table::of(&set))?;
        Ok((set, inputs))
    }

    /// A set that is pending, was rolled back, or is in the idle generation keeps its number.
    fn free_number(&self, record: &Record) -> u32 {
        let pending = record.pending.as_ref().map_or(0, |set| set.set);
        let rolled_back = record.rolled_back.as_ref().map_or(0, |set| set.set);
        let taken = [record.set, pending, rolled_back].into_iter();
        taken.chain(self.numbers()).max().unwrap_or(0) + 1
    }

    /// Publishes a set; nftables and the journal follow unless it is to be confirmed.
    fn publish(
        &self,
        request: &ApplyRequest,
        set: &Compiled,
        inputs: SetInputs,
        pending: Pending,
    ) -> Result<(), ControlError> {
        let (edge, number, in_force) = (self.edge, pending.set, self.set_in_force());
        self.update(|record| {
            // Before the first set: what the program was loaded with a moment ago.
            let program = &mut record.program;
            program.get_or_insert_with(|| request.program.clone());
            record.keep(SetRecord::new(number, set, inputs), in_force);
            record.pending = Some(pending);
        })?;
        let confirm_within = request.options.confirm_within;
        if let Err(error) = edge.publish_under(set, number, confirm_within, self.lock) {
            // It never was in force, so it cannot be rolled back either.
            let forgotten = self.update(|record| record.pending = None);
            return Err(ControlError::from(error).after(forgotten));
        }
        let sampling = EdgeSampling {
            every: to_u32(request.inputs.policy.sample_every),
            ..Default::default()
        };
        edge.maps().sampling.store(0, &sampling);
        self.finish().map(drop)
    }

    /// Puts a temporary rule on top of the set in force, before all other rules. The request gives
    /// the registry's key and the node's locality; its other fields are not applied.
    ///
    /// # Errors
    ///
    /// As [`Self::apply`]; also [`Fault::Operator`] if the journal does not know the set in force.
    pub fn add_temporary(
        &self,
        rule: Temporary,
        request: ApplyRequest,
    ) -> Result<ApplyReport, ControlError> {
        // What waits for its table is in force in the kernel: this goes on from there.
        self.finish()?;
        let record = self.record()?;
        let inputs = record.inputs(self.set_in_force()).ok_or_else(|| {
            let text = "the journal does not say what the set in force was made from; `millrace xdp apply` does";
            operators(text.into())
        })?;
        let mut node = request.inputs.firewall;
        node.locality.roles.clone_from(&inputs.policy.roles);
        self.apply(&ApplyRequest {
            inputs: SetInputs {
                registry: request.inputs.registry,
                firewall: inputs.firewall_for(&node),
                temporary: vec![rule],
                ..inputs.clone()
            },
            program: request.program,
            options: ApplyOptions {
                anew: false,
                ..ApplyOptions::committed(self.publisher().mode())
            },
        })
    }

    /// Keeps the set that awaits a confirmation; its number.
    ///
    /// # Errors
    ///
    /// [`Fault::Operator`] if none does, or the journal holds what follows another set.
    pub fn confirm(&self) -> Result<u32, ControlError> {
        let set = self.set_in_force();
        if self.publisher().awaits_confirm() {
            // Before the kernel's set is there for good, and not after.
            let pending = self.record()?.pending.map_or(0, |pending| pending.set);
            if pending != set {
                return Err(operators(format!(
                    "set {set} awaits a confirmation, and the journal says what follows set {pending}: \
                     `millrace xdp revert`, then apply again"
                )));
            }
        } else if let Some(finished) = self.finish()? {
            return Ok(finished);
        }
        self.edge.confirm_under(self.lock)?;
        self.finish()?.ok_or_else(|| {
            operators(format!(
                "the journal does not say what follows set {set}; `millrace xdp apply` does"
            ))
        })
    }

    /// Takes back the set that awaits a confirmation; the number of the set that is in force again.
    ///
    /// # Errors
    ///
    /// [`Fault::Operator`] if none does.
    pub fn revert(&self) -> Result<u32, ControlError> {
        self.edge.revert_under(self.lock)?;
        // The kernel's set is what counts; the next process writes down what this one could not.
        self.note_rolled_back().map_err(|error| {
            error.reworded(|text| format!("reverted, and this could not be written down: {text}"))
        })?;
        Ok(self.set_in_force())
    }

    /// Writes down that a set was rolled back: another one than the pending one is in force.
    pub(crate) fn note_rolled_back(&self) -> Result<(), ControlError> {
        let record = self.record()?;
        let Some(pending) = &record.pending else {
            return Ok(());
        };
        if self.publisher().awaits_confirm() || pending.set == self.set_in_force() {
            return Ok(());
        }
        // What the kernel never had cannot be rolled back.
        let was_in_force = pending.to_confirm && self.numbers().contains(&pending.set);
        let inputs = record.inputs(pending.set).filter(|_| was_in_force);
        let (set, inputs) = (pending.set, inputs.cloned());
        let rolled_back = inputs.map(|inputs| RolledBack { set, inputs });
        self.update(|record| {
            record.pending = None;
            record.rolled_back = rolled_back.or_else(|| record.rolled_back.take());
        })
    }

    /// Numbers of the sets that the kernel has: one that was rolled back is there until the next.
    fn numbers(&self) -> [u32; GENERATIONS] {
        std::array::from_fn(|generation| self.edge.maps().load_config(generation).set)
    }

    /// Lets nftables and the journal follow a pending set that the kernel has for good: it was
    /// published a moment ago, or a process died there, or `nft` refused. Its number.
    ///
    /// # Errors
    ///
    /// What nftables or the journal refuse.
    pub fn finish(&self) -> Result<Option<u32>, ControlError> {
        let set = self.set_in_force();
        let record = self.record()?;
        let pending = record.pending.as_ref().filter(|pending| pending.set == set);
        let (Some(pending), Some(written), false) =
            (pending, record.set(set), self.publisher().awaits_confirm())
        else {
            return Ok(None);
        };
        let followed = self.tables.replace(&written.table).and_then(|fingerprint| {
            self.update(|record| {
                record.set = set;
                record.fingerprint = fingerprint;
                record.temporary.clone_from(&written.inputs.temporary);
                record.refused.clone_from(&pending.refused);
                record.pending = None;
                if pending.anew {
                    record.rolled_back = None;
                }
            })
        });
        followed.map(|()| Some(set)).map_err(|error| {
            let mode = self.publisher().mode().word();
            error.reworded(|text| {
                format!(
                    "set {set} is in force in the kernel, mode {mode}, and not all has followed: {text}; \
                     a running node finishes it, or `millrace xdp confirm`"
                )
            })
        })
    }

    /// Puts the table of the committed set in force again if it is not what the journal says; then
    /// whether another program is to blame.
    pub(crate) fn restore_table(
        &self,
        nftables: &dyn Nftables,
        record: &Record,
    ) -> Result<bool, ControlError> {
        let written = record.set(record.set);
        let mended = written.map(|set| mend(nftables, &set.table, record.fingerprint));
        let Some((fingerprint, by_others)) = mended.transpose()?.flatten() else {
            return Ok(false);
        };
        self.update(|record| record.fingerprint = fingerprint)?;
        Ok(by_others)
    }
}

/// The newest rules that may be in force.
fn newest(
    request: &ApplyRequest,
    last: Option<&SetInputs>,
    rolled_back: Option<&RolledBack>,
    in_force: u32,
) -> Result<Firewall, ControlError> {
    let asked = &request.inputs.firewall;
    let is_passed_over = |rolled_back: &RolledBack| {
        !request.options.anew
            && rolled_back.inputs.registry == request.inputs.registry
            && asked.version <= rolled_back.inputs.firewall.version
    };
    match last {
        Some(last) if last.firewall.version > asked.version => Ok(last.firewall_for(asked)),
        Some(last) if last.firewall.version == asked.version => Ok(asked.clone()),
        _ if !rolled_back.is_some_and(is_passed_over) => Ok(asked.clone()),
        Some(last) => Ok(last.rules_for(asked.clone())),
        None => Err(operators(format!(
            "registry version {} was rolled back, and the journal does not say what set {in_force} was made from; \
             `millrace xdp apply` decides",
            asked.version
        ))),
    }
}

fn operators(text: String) -> ControlError {
    ControlError::new(Fault::Operator, text)
}

/// Takes the edge away: the program first, because without it the table closes the ports instead of
/// leaving them open.
///
/// # Errors
///
/// What the kernel or nftables refuse; what could be removed is.
pub fn detach(pins: &Pins, lock: &EdgeLock) -> Result<(), ControlError> {
    Edge::detach_under(pins, lock)?;
    Ok(Nft::of(pins).remove()?)
}
