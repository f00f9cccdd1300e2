//! Puts sets in force: for a command, and for a node whose registry changed.
//!
//! What is in force, and what was, is said in one place each:
//!
//! | what | where |
//! |---|---|
//! | number and mode of the set in force, and whether it is on probation | the kernel: [`Publisher`] |
//! | what a set was made from: registry version, config's side, temporary rules | `set-N.json`: [`sets::Origin`] |
//! | what is half done, and what follows once the kernel's set is for good | `pending.json`: [`Pending`] |
//! | what was refused, what lapsed, temporary rules, the last set that all has followed | the state: [`State`] |
//!
//! ```text
//!          put                           put, on probation
//! settled ─────▶ half done      settled ──────────────────▶ probation
//!    ▲               │             ▲                          │    │
//!    └── finish ─────┘             └─ lapsed ◀─ time, revert ─┘    │ confirm
//!                                                                  ▼
//!                                               settled ◀─ finish ─ half done
//!
//! settled     the kernel's set is the state's
//! probation   the kernel says so; what is pending has its number
//! half done   what is pending has the number of the kernel's set, which is for good
//! lapsed      what is pending was on probation, and the kernel has another set: it is written down as lapsed, if the kernel ever had it, and
//!             pending no more
//! ```
//!
//! 1. Everything is checked first, also by nftables. Then: the words of its rules, what is pending, the kernel, nftables, the state, in this
//!    order: whoever dies in between leaves what the next one finishes.
//! 2. A set on probation changes neither nftables nor the state before it is confirmed, so nothing but the kernel has to go back.
//! 3. Whoever changes set, table or state has the [`Turn`] from before it reads until it has written.
//! 4. Where the newest rules are refused, those of the set in force stand in for them if the order allows it: they are always good. So they do
//!    for somebody who knows older ones, as a command does whose registry folder lacks what the node has from its peers.
//! 5. What has lapsed unconfirmed comes back only if somebody asks for it anew: a registry version at or below the one that lapsed, and above
//!    the one in force, is passed over by everybody else.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use millrace_edge::abi::GENERATIONS;
use millrace_edge::edge::{Edge, EdgeError};
use millrace_edge::nft::{Nft, Table};
use millrace_edge::pins::Pins;
use millrace_edge::publish::{PublishError, Publisher, Standing};
use millrace_edge::state::{self, Lapsed, Refused, State};
use millrace_edge_policy::rules::{Compiled, Temporary};
use millrace_edge_policy::settings::Mode;
use millrace_tuning::NodeConfig;
use serde::{Deserialize, Serialize};

use super::applied;
use super::commands::of_edge;
use super::plan::{self, Firewall};
use super::table::{self, Nftables};
use super::{sets, show};
use crate::exit::{Exit, Failure};

/// What waits for a confirmation, beside the state: follows the name of the pins.
const PENDING: &str = "pending.json";

/// A file that nobody reads, locked by whoever has the turn: follows the name of the pins.
const TURN: &str = "turn";

/// Another, locked by the node that runs.
const NODE: &str = "node";

/// The kernel ends a process that was killed some milliseconds after its successor can start.
const CLAIM_PATIENCE: Duration = Duration::from_secs(3);
const CLAIM_RETRY: Duration = Duration::from_millis(5);

/// The right to change the edge: commands and a running node take turns. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    _locked: File,
}

impl Turn {
    /// Waits until it is there.
    pub(crate) fn wait(pins: &Pins) -> Result<Self, Failure> {
        let (locked, path) = open_beside(pins, TURN)?;
        match locked.lock() {
            Ok(()) => Ok(Self { _locked: locked }),
            Err(error) => Err(Failure::io(path.display(), &error)),
        }
    }

    /// None while somebody else has it.
    pub(crate) fn now(pins: &Pins) -> Result<Option<Self>, Failure> {
        let (locked, path) = open_beside(pins, TURN)?;
        match locked.try_lock() {
            Ok(()) => Ok(Some(Self { _locked: locked })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(Failure::io(path.display(), &error)),
        }
    }
}

/// The right to be the node of an edge: two would overwrite each other's keys and counts. Given back when dropped, or killed.
#[derive(Debug)]
pub(crate) struct Claim {
    _locked: File,
}

impl Claim {
    /// Waits a little for a node that is just ending; none if another one lives.
    pub(crate) fn take(pins: &Pins) -> Result<Option<Self>, Failure> {
        let (locked, path) = open_beside(pins, NODE)?;
        let until = Instant::now() + CLAIM_PATIENCE;
        loop {
            match locked.try_lock() {
                Ok(()) => return Ok(Some(Self { _locked: locked })),
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    std::thread::sleep(CLAIM_RETRY);
                }
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(Failure::io(path.display(), &error)),
            }
        }
    }
}

/// A file of mode 0600 beside the pins.
fn open_beside(pins: &Pins, extension: &str) -> Result<(File, PathBuf), Failure> {
    let path = pins.state_path().with_extension(extension);
    let failed = |error: std::io::Error| Failure::io(path.display(), &error);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        // Whoever can open it can keep the turn.
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    Ok((file, path))
}

/// What is to be in force.
#[derive(Debug)]
pub(crate) struct Order<'o> {
    pub(crate) config: &'o NodeConfig,
    /// The transport's.
    pub(crate) port: u16,
    pub(crate) firewall: &'o Firewall,
    pub(crate) mode: Mode,
    /// Only for so long unless it is confirmed.
    pub(crate) probation: Option<Duration>,
    /// Where the firewall's rules are refused, take those of the set in force.
    pub(crate) or_last_good: bool,
    /// Somebody asks for it: what has lapsed may be in force again.
    pub(crate) anew: bool,
}

/// A set that is ready to be put in force.
#[derive(Debug)]
pub(crate) struct Planned {
    set: Compiled,
    /// What it was made from.
    pub(crate) origin: sets::Origin,
    /// Why they are not the newest, if so.
    pub(crate) refused: Option<Refused>,
}

impl Planned {
    /// The version of the registry whose rules they are.
    pub(crate) fn version(&self) -> u64 {
        self.origin.version
    }
}

/// What is in force now.
#[derive(Debug, Serialize)]
pub(crate) struct Done {
    pub(crate) set: u32,
    pub(crate) mode: &'static str,
    pub(crate) registry_version: u64,
    pub(crate) rules: usize,
    pub(crate) interfaces: Vec<String>,
    pub(crate) probation_seconds: Option<f64>,
    /// A newer version of the registry, whose rules are refused.
    pub(crate) refused: Option<Refused>,
    /// Keys of `[edge]` that differ from what runs, and that this does not change.
    pub(crate) left_alone: Vec<String>,
}

/// A set that is about to be in force, and what follows once it is for good.
#[derive(Debug, Serialize, Deserialize)]
struct Pending {
    set: u32,
    /// What to write down if nobody confirms it; none: it is not on probation.
    on_probation: Option<Lapsed>,
    /// Somebody asked for it: what lapsed before is forgotten.
    anew: bool,
    registry_version: u64,
    refused: Option<Refused>,
    table: Table,
}

/// Compiles, and asks nftables. Nothing is in force that was not; what the registry is refused for is written down.
pub(crate) fn plan(
    edge: &Edge,
    turn: &Turn,
    order: &Order<'_>,
    nftables: &dyn Nftables,
) -> Result<Planned, Failure> {
    let publisher = Publisher::new(edge.maps());
    let in_force = publisher.config().set;
    if let Standing::Probation { left } = publisher.standing() {
        let error = PublishError::Probation {
            set: in_force,
            left,
        };
        return Err(of_edge(&EdgeError::Publish(error)));
    }
    if let Err(failure) = finish(edge, turn, nftables) {
        // What is asked for now takes its place.
        tracing::warn!(%failure, "what somebody left unfinished stays so");
    }
    note_lapsed(edge, turn)?;
    let mut state = read_state(edge.pins())?;
    state.expire(SystemTime::now());
    let of_set = sets::origin(edge.pins(), in_force)
        .filter(|origin| origin.registry == order.config.registry.public_key);
    let newest = newest(order, of_set.as_ref(), &state, in_force)?;
    let refused_before = state
        .refused
        .clone()
        .filter(|refused| refused.registry_version > newest.version);
    let failure = match planned(order, newest.clone(), &state.temporary, nftables) {
        Ok(planned) => {
            return Ok(Planned {
                // Whose rules stand in for it is asked for as they are.
                refused: refused_before,
                ..planned
            });
        }
        Err(failure) => failure,
    };
    let is_same = |origin: &sets::Origin| origin.version == newest.version;
    // Of the host, the config or a temporary rule, and not of the registry.
    if failure.exit != Exit::BadConfig || of_set.as_ref().is_some_and(is_same) {
        return Err(failure);
    }
    let refused = Some(Refused {
        registry_version: newest.version,
        message: failure.message.clone(),
    });
    if state.refused != refused {
        state.refused.clone_from(&refused);
        write_state(edge.pins(), &state)?;
    }
    let Some(good) = of_set.filter(|_| order.or_last_good) else {
        return Err(failure);
    };
    let firewall = Firewall {
        version: good.version,
        tables: good.tables,
        ..newest
    };
    Ok(Planned {
        refused,
        ..planned(order, firewall, &state.temporary, nftables)?
    })
}

/// The newest rules that may be in force.
fn newest(
    order: &Order<'_>,
    of_set: Option<&sets::Origin>,
    state: &State,
    in_force: u32,
) -> Result<Firewall, Failure> {
    let asked = order.firewall;
    let has_lapsed = |lapsed: &Lapsed| {
        !order.anew
            && lapsed.registry == order.config.registry.public_key
            && asked.version <= lapsed.registry_version
    };
    match of_set {
        Some(origin) if origin.version > asked.version => Ok(origin.firewall(asked)),
        Some(origin) if origin.version == asked.version => Ok(asked.clone()),
        _ if !state.lapsed.as_ref().is_some_and(has_lapsed) => Ok(asked.clone()),
        Some(origin) => Ok(Firewall {
            version: origin.version,
            tables: origin.tables.clone(),
            ..asked.clone()
        }),
        None => {
            let message = format!(
                "registry version {} has lapsed, and nobody wrote down what set {in_force} was made from; `millrace xdp apply` decides",
                asked.version
            );
            Err(Failure::new(Exit::Failed, message))
        }
    }
}

fn planned(
    order: &Order<'_>,
    firewall: Firewall,
    temporary: &[Temporary],
    nftables: &dyn Nftables,
) -> Result<Planned, Failure> {
    let settings = plan::settings(order.config, order.port, order.mode);
    let set = plan::compiled(order.config, &settings, &firewall, temporary)
        .map_err(|error| Failure::new(Exit::BadConfig, error.to_string()))?;
    table::check(nftables, &Table::of(&set))?;
    Ok(Planned {
        set,
        origin: sets::Origin::of(&firewall, order.config, order.port, temporary),
        refused: None,
    })
}

/// Publishes what was planned in the same turn, and changes nftables; with a probation, what comes after the kernel waits for [`confirmed`].
pub(crate) fn put(
    edge: &Edge,
    turn: &Turn,
    order: &Order<'_>,
    planned: Planned,
    nftables: &dyn Nftables,
) -> Result<Done, Failure> {
    let pins = edge.pins();
    let mut state = read_state(pins)?;
    if state.attached.is_empty() {
        // The first set of this edge: what the program was loaded with a moment ago.
        state.attached = applied::of_programs(order.config);
        write_state(pins, &state)?;
    }
    let in_force = Publisher::new(edge.maps()).config().set;
    // What waits, has lapsed, or is still in the idle generation keeps its number for itself.
    let in_kernel = numbers(edge).into_iter().max().unwrap_or(in_force);
    let waits = read_pending(pins).map_or(0, |pending| pending.set);
    let lapsed = state.lapsed.as_ref().map_or(0, |lapsed| lapsed.set);
    let number = state.set.max(in_kernel).max(waits).max(lapsed) + 1;
    let Planned {
        set,
        origin,
        refused,
    } = planned;
    sets::write(pins, number, in_force, &set, &origin)?;
    let pending = Pending {
        set: number,
        on_probation: order.probation.map(|_| Lapsed {
            set: number,
            registry: origin.registry.clone(),
            registry_version: origin.version,
            config: origin.applied.keys.clone(),
        }),
        anew: order.anew,
        registry_version: origin.version,
        refused: refused.clone(),
        table: Table::of(&set),
    };
    write_pending(pins, &pending)?;
    if let Err(error) = edge.publish(&set, number, order.probation) {
        // It never was in force, so it cannot lapse either.
        forget_pending(pins)?;
        return Err(of_edge(&error));
    }
    let sampling = millrace_edge::abi::EdgeSampling {
        every: plan::to_u32(order.config.edge.sample_every),
        ..Default::default()
    };
    edge.maps().sampling.store(0, &sampling);
    if order.probation.is_none() {
        settle(edge, turn, &pending, nftables)?;
    }
    Ok(Done {
        set: number,
        mode: show::mode_word(order.mode),
        registry_version: origin.version,
        rules: set.rules.len(),
        left_alone: Vec::new(),
        interfaces: state.interfaces.into_iter().map(|i| i.name).collect(),
        probation_seconds: order.probation.map(|period| period.as_secs_f64()),
        refused,
    })
}

/// Ends the probation of the set that it was written down for; its number.
pub(crate) fn confirm(edge: &Edge, turn: &Turn, nftables: &dyn Nftables) -> Result<u32, Failure> {
    let publisher = Publisher::new(edge.maps());
    let set = publisher.config().set;
    if let Standing::Probation { .. } = publisher.standing() {
        // Before the kernel's set is for good, and not after.
        let pending = read_pending(edge.pins())?;
        if pending.set != set {
            let message = format!(
                "set {set} is on probation, and what follows a confirmation was written down for set {}: \
                 `millrace xdp revert`, then apply again",
                pending.set
            );
            return Err(Failure::new(Exit::Failed, message));
        }
    }
    match edge.confirm() {
        Err(EdgeError::Publish(PublishError::NoProbation)) if is_half_done(edge) => {}
        confirmed => confirmed.map_err(|error| of_edge(&error))?,
    }
    confirmed(edge, turn, nftables)
}

/// Takes back what is on probation; the number of the set that is in force again.
pub(crate) fn revert(edge: &Edge, turn: &Turn) -> Result<u32, Failure> {
    edge.revert().map_err(|error| of_edge(&error))?;
    let reverted = note_lapsed(edge, turn);
    // The kernel's set is what counts; somebody else writes down what this could not.
    if let Err(failure) = reverted {
        let message = format!("reverted, and this could not be written down: {failure}");
        return Err(Failure::new(failure.exit, message));
    }
    Ok(Publisher::new(edge.maps()).config().set)
}

/// Writes down what was on probation and is not any more, without a confirmation.
pub(crate) fn note_lapsed(edge: &Edge, _turn: &Turn) -> Result<(), Failure> {
    let pins = edge.pins();
    let publisher = Publisher::new(edge.maps());
    let Ok(pending) = read_pending(pins) else {
        return Ok(());
    };
    let waits = matches!(publisher.standing(), Standing::Probation { .. });
    if waits || pending.set == publisher.config().set {
        return Ok(());
    }
    // Whoever was killed before the kernel had it has left no set that could lapse.
    let was_in_force = numbers(edge).contains(&pending.set);
    if let Some(lapsed) = pending.on_probation.filter(|_| was_in_force) {
        let mut state = read_state(pins)?;
        state.lapsed = Some(lapsed);
        write_state(pins, &state)?;
    }
    forget_pending(pins)
}

/// Of the sets that the kernel has, in force and before: a set that lapsed is there until the next is published.
fn numbers(edge: &Edge) -> [u32; GENERATIONS] {
    std::array::from_fn(|generation| edge.maps().load_config(generation).set)
}

/// What follows a confirmation; the number of the set.
fn confirmed(edge: &Edge, turn: &Turn, nftables: &dyn Nftables) -> Result<u32, Failure> {
    let set = Publisher::new(edge.maps()).config().set;
    let pending = read_pending(edge.pins())?;
    if pending.set != set {
        let message =
            format!("nobody wrote down what follows set {set}; `millrace xdp apply` does");
        return Err(Failure::new(Exit::Failed, message));
    }
    settle(edge, turn, &pending, nftables)?;
    Ok(set)
}

/// Whether the set in force is so for good, and table and state have not followed: somebody died there, or `nft` refused.
fn is_half_done(edge: &Edge) -> bool {
    let publisher = Publisher::new(edge.maps());
    !matches!(publisher.standing(), Standing::Probation { .. })
        && read_pending(edge.pins()).is_ok_and(|pending| pending.set == publisher.config().set)
}

/// Does what is left of what somebody did by halves; the number of the set.
pub(crate) fn finish(
    edge: &Edge,
    turn: &Turn,
    nftables: &dyn Nftables,
) -> Result<Option<u32>, Failure> {
    if is_half_done(edge) {
        confirmed(edge, turn, nftables).map(Some)
    } else {
        Ok(None)
    }
}

/// Takes the edge away: the program first, because without it the table closes the ports instead of leaving them open.
pub(crate) fn take_away(pins: &Pins, _turn: &Turn) -> Result<(), Failure> {
    Edge::detach(pins).map_err(|error| of_edge(&error))?;
    Nft::of(pins)
        .remove()
        .map_err(|error| table::of_nft(&error))?;
    table::forget(pins);
    sets::remove(pins);
    forget_pending(pins)
}

/// Nothing waits for a confirmation any more.
pub(crate) fn forget_pending(pins: &Pins) -> Result<(), Failure> {
    let path = pending_path(pins);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Failure::io(path.display(), &error))
        }
        _ => Ok(()),
    }
}

/// What a set that is in force for good implies: the table of nftables, and the state.
fn settle(
    edge: &Edge,
    turn: &Turn,
    pending: &Pending,
    nftables: &dyn Nftables,
) -> Result<(), Failure> {
    follow_set(edge, turn, pending, nftables).map_err(|failure| {
        let message = format!(
            "set {} is in force in the kernel, mode {}, and not all has followed: {failure}; \
             a running node finishes it, or `millrace xdp confirm`",
            pending.set,
            show::mode_word(Publisher::new(edge.maps()).mode())
        );
        Failure::new(failure.exit, message)
    })
}

fn follow_set(
    edge: &Edge,
    turn: &Turn,
    pending: &Pending,
    nftables: &dyn Nftables,
) -> Result<(), Failure> {
    table::replace(edge.pins(), turn, nftables, &pending.table)?;
    let mut state = read_state(edge.pins())?;
    state.set = pending.set;
    state.registry_version = Some(pending.registry_version);
    state.refused.clone_from(&pending.refused);
    if pending.anew {
        state.lapsed = None;
    }
    write_state(edge.pins(), &state)?;
    forget_pending(edge.pins())
}

pub(crate) fn read_state(pins: &Pins) -> Result<State, Failure> {
    State::read(pins).map_err(|error| of_edge(&error.into()))
}

pub(crate) fn write_state(pins: &Pins, state: &State) -> Result<(), Failure> {
    let lock = pins
        .lock_waiting()
        .map_err(|error| of_edge(&error.into()))?;
    state
        .write(pins, &lock)
        .map_err(|error| of_edge(&error.into()))
}

fn write_pending(pins: &Pins, pending: &Pending) -> Result<(), Failure> {
    let path = pending_path(pins);
    let text = serde_json::to_vec(pending)
        .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    state::replace(&path, &text).map_err(|error| Failure::io(path.display(), &error))
}

fn read_pending(pins: &Pins) -> Result<Pending, Failure> {
    let path = pending_path(pins);
    let text = fs::read(&path).map_err(|error| Failure::io(path.display(), &error))?;
    serde_json::from_slice(&text)
        .map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", path.display())))
}

fn pending_path(pins: &Pins) -> PathBuf {
    pins.state_path().with_extension(PENDING)
}
