//! Follows what others change while the node runs: rules by the registry and by operators, the table of nftables and interfaces by the host.
//!
//! 1. It waits for `nft` and for the helper, so it is a thread of its own: nothing that must come in time comes from here.
//! 2. A node that starts puts its own config in force, in the mode that it finds. From then on it goes on from the set in force, whoever applied
//!    it: that changes when the registry, the members or the temporary rules did, or when somebody left one by halves, and not otherwise. A set
//!    on probation is left alone, and one that has lapsed stays so.
//! 3. An edge that somebody detached is not this node's any more: nothing is put in force behind their back.
//! 4. What fails is said once; what may come right by itself is tried again after [`RETRY`].

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use millrace_edge::helper::Request;
use millrace_edge::publish::{Publisher, Standing};
use millrace_edge::state::{Interface, Lapsed, State};
use millrace_edge_policy::rules::Temporary;
use millrace_edge_policy::settings::Mode;
use millrace_node::Node;
use millrace_tuning::NodeConfig;
use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use super::applied::Applied;
use super::commands::attach_options;
use super::force::{self, Order, Planned, Turn};
use super::keeper::{EdgeView, held};
use super::plan::Firewall;
use super::sets::{self, Origin};
use super::start::Kernel;
use super::table::{self, LeftAlone, Nftables, Restored};
use crate::exit::{Exit, Failure};
use crate::versions;

/// What may come right by itself is left alone for so long: a process that is missing, an interface that is not ready.
const RETRY: Duration = Duration::from_secs(5);

/// Between two looks at the table, however often nftables changes: `nft` is a process.
const TABLE_LOOK: Duration = Duration::from_secs(1);

/// Between two looks at interfaces.
const INTERFACES_LOOK: Duration = Duration::from_secs(1);

/// What should be in force, and what was when it was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Basis {
    version: u64,
    members: Vec<IpAddr>,
    temporary: Vec<Temporary>,
    applied: Applied,
    mode: Mode,
    lapsed: Option<Lapsed>,
    in_force: u32,
    /// Table and state have followed it.
    settled: bool,
}

pub(super) struct Following {
    node: Node,
    config: Arc<NodeConfig>,
    kernel: Arc<Kernel>,
    view: Arc<EdgeView>,
    /// Of the last set that was tried.
    tried: Option<Basis>,
    /// The config's side of the set in force, as far as it is known.
    applied: Applied,
    /// What is in force is not older than this node: its own config has had its turn, or somebody has applied another since.
    started: bool,
    /// The set that this node found.
    found: u32,
    retry_at: Option<Instant>,
    /// Somebody changed something in nftables since the last look.
    told: bool,
    table_at: Instant,
    interfaces_at: Instant,
    /// As the state said last.
    interfaces: Vec<Interface>,
    said: BTreeMap<Topic, String>,
}

/// What a failure is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Topic {
    Rules,
    Lapsed,
    Applied,
    Table,
    Interface(String),
}

impl Following {
    pub(super) fn new(
        node: Node,
        config: Arc<NodeConfig>,
        kernel: Arc<Kernel>,
        view: Arc<EdgeView>,
    ) -> Self {
        let now = Instant::now();
        let applied = Applied::of(&config, node.address().port());
        let publisher = Publisher::new(kernel.edge.maps());
        Self {
            applied,
            // Whoever waits for a confirmation has applied something else than what this node was started with.
            started: matches!(publisher.standing(), Standing::Probation { .. }),
            found: publisher.config().set,
            node,
            config,
            kernel,
            view,
            tried: None,
            retry_at: None,
            // Of what came before, nobody told.
            told: true,
            table_at: now,
            interfaces_at: now,
            interfaces: Vec::new(),
            said: BTreeMap::new(),
        }
    }

    pub(super) fn wake(&mut self) {
        let kernel = Arc::clone(&self.kernel);
        // Somebody who is at it now is followed the next time.
        let Ok(Some(turn)) = Turn::now(kernel.edge.pins()) else {
            return;
        };
        // In this order: whoever detaches has the turn.
        if !kernel.is_attached() {
            return self.go_on_alone();
        }
        self.follow_interfaces(&kernel);
        self.follow_rules(&kernel, &turn);
        self.follow_table(&kernel, &turn);
    }

    fn go_on_alone(&self) {
        if !self.view.detached.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "the edge was detached: user space holds caps and rates; restart the node when it is attached again"
            );
        }
    }

    fn follow_rules(&mut self, kernel: &Kernel, turn: &Turn) {
        let waits = matches!(
            Publisher::new(kernel.edge.maps()).standing(),
            Standing::Probation { .. }
        );
        let now = Instant::now();
        if waits || self.retry_at.is_some_and(|at| now < at) {
            return;
        }
        let (firewall, basis) = match self.basis(kernel, turn) {
            Ok(basis) => basis,
            Err(failure) => return self.refuse(kernel, &failure, "state"),
        };
        if self.tried.as_ref() == Some(&basis) {
            return;
        }
        match self.put(kernel, turn, &firewall, &basis) {
            Ok(()) => {
                self.started = true;
                self.applied = basis.applied.clone();
                self.tried = Some(Basis {
                    in_force: Publisher::new(kernel.edge.maps()).config().set,
                    settled: true,
                    ..basis
                });
                self.retry_at = None;
                self.said.remove(&Topic::Rules);
            }
            Err(failure) if failure.exit == Exit::BadConfig => {
                // Tried once: what was refused is refused again.
                self.tried = Some(basis);
                let state = force::read_state(kernel.edge.pins());
                *held(&self.view.refused_now) = state.ok().and_then(|state| state.refused);
                self.refuse(kernel, &failure, "rules");
            }
            Err(failure) => self.refuse(kernel, &failure, "publish"),
        }
    }

    /// What should be in force now; first, what somebody left by halves is finished.
    fn basis(&mut self, kernel: &Kernel, turn: &Turn) -> Result<(Firewall, Basis), Failure> {
        let pins = kernel.edge.pins();
        let publisher = Publisher::new(kernel.edge.maps());
        if let Some(set) = force::finish(&kernel.edge, turn, nftables(kernel))? {
            tracing::info!(set, "finished what somebody left by halves");
        }
        force::note_lapsed(&kernel.edge, turn)?;
        let in_force = publisher.config().set;
        let of_set = sets::origin(pins, in_force);
        let mut state = force::read_state(pins)?;
        if state.set == 0 && in_force != 0 {
            // Somebody removed the file: what it said that is known elsewhere is said again.
            state.interfaces.clone_from(&self.interfaces);
            state.temporary = of_set.as_ref().map_or_else(Vec::new, Origin::temporary);
            force::write_state(pins, &state)?;
        }
        state.expire(SystemTime::now());
        let applied = self.applied(of_set, in_force, &state);
        let firewall = match applied.onto(&self.config) {
            Some(config) => versions::firewall(self.node.versions(), &config.edge.roles),
            None => versions::firewall(self.node.versions(), &self.config.edge.roles),
        };
        let basis = Basis {
            version: firewall.version,
            members: firewall.members.clone(),
            temporary: state.temporary,
            applied,
            mode: publisher.mode(),
            lapsed: state.lapsed,
            in_force,
            settled: in_force == state.set,
        };
        Ok((firewall, basis))
    }

    /// The config's side that should be in force: that of the set in force, whoever applied it; at the start that of this node, unless it was tried
    /// and has lapsed.
    fn applied(&mut self, of_set: Option<Origin>, in_force: u32, state: &State) -> Applied {
        self.started |= in_force != self.found;
        let Some(of_set) = of_set.map(|origin| origin.applied) else {
            return self.applied.clone();
        };
        let own = Applied::of(&self.config, self.node.address().port());
        let lapsed = state.lapsed.as_ref().map(|lapsed| &lapsed.config);
        let has_lapsed = lapsed == Some(&own.keys) && own.keys != of_set.keys;
        if !self.started && !has_lapsed {
            return own;
        }
        if !self.started && self.says(Topic::Applied, "lapsed") {
            tracing::warn!(
                keys = own.differs_in(&of_set).join(", "),
                "this node's config was tried and has lapsed: what is in force stays, until somebody applies anew"
            );
        }
        Applied {
            port: own.port,
            ..of_set
        }
    }

    /// Puts in force what is not yet.
    fn put(
        &mut self,
        kernel: &Kernel,
        turn: &Turn,
        firewall: &Firewall,
        basis: &Basis,
    ) -> Result<(), Failure> {
        let config = basis.applied.onto(&self.config).ok_or_else(|| {
            let message = "the set in force was applied by a version with other keys; `millrace xdp apply` mends it";
            Failure::new(Exit::Failed, message)
        })?;
        let order = Order {
            config: &config,
            port: basis.applied.port,
            firewall,
            mode: basis.mode,
            probation: None::<Duration>,
            or_last_good: true,
            anew: false,
        };
        let planned = force::plan(&kernel.edge, turn, &order, nftables(kernel))?;
        let version = planned.version();
        self.note_refused(&planned);
        self.note_lapsed(basis, version);
        let is_there = || sets::origin(kernel.edge.pins(), basis.in_force);
        if !self.started || !basis.settled || is_there().as_ref() != Some(&planned.origin) {
            let done = force::put(&kernel.edge, turn, &order, planned, nftables(kernel))?;
            tracing::info!(set = done.set, version, mode = done.mode, "rules in force");
        }
        self.view.registry_version.store(version, Ordering::Relaxed);
        Ok(())
    }

    /// Says, once, that a version is passed over because it has lapsed.
    fn note_lapsed(&mut self, basis: &Basis, version: u64) {
        let passed_over = basis
            .lapsed
            .as_ref()
            .filter(|lapsed| version < basis.version && basis.version <= lapsed.registry_version);
        if passed_over.is_some() && self.says(Topic::Lapsed, &basis.version.to_string()) {
            tracing::warn!(
                version = basis.version,
                stays = version,
                "a version of the registry was tried and has lapsed: it is not put in force, until somebody applies anew or a newer one comes"
            );
        }
    }

    /// Says, once, that older rules stand in for the newest.
    fn note_refused(&self, planned: &Planned) {
        {
            let mut now = held(&self.view.refused_now);
            if *now == planned.refused {
                return;
            }
            now.clone_from(&planned.refused);
        }
        if let Some(refused) = &planned.refused {
            tracing::error!(
                version = refused.registry_version,
                message = refused.message,
                stays = planned.version(),
                "rules refused; those of the last good version stay in force"
            );
            self.count_refused("rules");
        }
    }

    fn refuse(&mut self, kernel: &Kernel, failure: &Failure, reason: &'static str) {
        let is_wrong = failure.exit == Exit::BadConfig;
        self.retry_at = (!is_wrong).then(|| Instant::now() + RETRY);
        if self.says(Topic::Rules, &failure.message) {
            let set = Publisher::new(kernel.edge.maps()).config().set;
            tracing::error!(%failure, set, reason, "rules do not follow; this set is in force");
            self.count_refused(reason);
        }
    }

    fn count_refused(&self, reason: &'static str) {
        *held(&self.view.refused).entry(reason).or_default() += 1;
    }

    /// Puts the table back that others have changed or removed.
    fn follow_table(&mut self, kernel: &Kernel, turn: &Turn) {
        let Some(helper) = &kernel.helper else {
            return;
        };
        // Without a subscription, it is looked at again and again.
        self.told |= kernel.ruleset.as_ref().is_none_or(|w| w.has_changed());
        let now = Instant::now();
        if !self.told || now < self.table_at {
            return;
        }
        // Before the look: what changes meanwhile is told again.
        self.told = false;
        self.table_at = now + TABLE_LOOK;
        match table::restore(kernel.edge.pins(), turn, helper) {
            Ok(restored) => {
                self.said.remove(&Topic::Table);
                match restored {
                    Some(Restored::Changed) => {
                        self.view.tables_restored.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(
                            "somebody changed or removed the edge's table of nftables: it is back"
                        );
                    }
                    Some(Restored::Missing) => {
                        tracing::info!(
                            "the edge's table of nftables, which could not be put in force before, is"
                        );
                    }
                    None => {}
                }
            }
            Err(failure) => {
                self.told = true;
                self.table_at = now + RETRY;
                if self.says(Topic::Table, &failure.message) {
                    tracing::error!(%failure, "cannot keep the edge's table of nftables");
                }
            }
        }
    }

    /// Attaches again to interfaces that were made anew, or have lost a program.
    fn follow_interfaces(&mut self, kernel: &Kernel) {
        let now = Instant::now();
        if now < self.interfaces_at {
            return;
        }
        self.interfaces_at = now + INTERFACES_LOOK;
        let Ok(mut interfaces) = kernel.edge.interfaces() else {
            // The rules say so.
            return;
        };
        if !interfaces.is_empty() {
            self.interfaces.clone_from(&interfaces);
        }
        interfaces.retain(|interface| !kernel.edge.is_live(interface));
        for interface in &interfaces {
            if exists(&interface.name) {
                self.attach_again(kernel, interface);
            } else if self.says(Topic::Interface(interface.name.clone()), "gone") {
                tracing::warn!(
                    interface = interface.name,
                    "an interface of the edge is gone; it is attached again when it is back"
                );
            }
        }
        interfaces.retain(|interface| !kernel.edge.is_live(interface));
        let gone = interfaces.into_iter().map(|interface| interface.name);
        *held(&self.view.gone) = gone.collect();
    }

    fn attach_again(&mut self, kernel: &Kernel, interface: &Interface) {
        let name = &interface.name;
        let request = Request::Attach {
            interface: name.clone(),
            // As it was asked for, and not what came of it on an interface that is no more.
            mode: attach_options(&self.config).mode,
        };
        let attached = match &kernel.helper {
            Some(helper) => helper.request(&request).map_err(|error| error.to_string()),
            None => Err("there is no helper".to_owned()),
        };
        let topic = Topic::Interface(name.clone());
        match attached {
            Ok(()) => {
                self.said.remove(&topic);
                self.view.reattached.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    interface = name,
                    "an interface was made anew, or had lost a program: the edge is on it again"
                );
            }
            Err(error) => {
                self.view.attach_failures.fetch_add(1, Ordering::Relaxed);
                self.interfaces_at = Instant::now() + RETRY;
                if self.says(topic, &error) {
                    tracing::error!(
                        interface = name,
                        error,
                        "an interface was made anew, or has lost a program, and the edge cannot be attached to it: closed in mode enforce"
                    );
                }
            }
        }
    }

    /// Whether this is something else than what was said last about the same.
    fn says(&mut self, topic: Topic, message: &str) -> bool {
        let before = self.said.insert(topic, message.to_owned());
        before.as_deref() != Some(message)
    }
}

/// Who changes nftables for this node.
fn nftables(kernel: &Kernel) -> &dyn Nftables {
    match &kernel.helper {
        Some(helper) => helper,
        None => &LeftAlone,
    }
}

/// Whether the thread's network namespace has an interface of this name.
fn exists(name: &str) -> bool {
    socket(AddressFamily::INET, SocketType::DGRAM, None)
        .and_then(|any| netdevice::name_to_index(any, name))
        .is_ok()
}
