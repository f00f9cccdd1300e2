//! Puts sets in force: for a command, and for a node whose registry changed.
//!
//! 1. Everything is checked first, also by nftables. Then: the words of its rules, what is pending, the kernel, nftables, the state, in this
//!    order: whoever dies in between leaves what the next one finishes.
//! 2. A set on probation changes neither nftables nor the state before it is confirmed, so nothing but the kernel has to go back.
//! 3. Whoever changes set, table or state has the [`Turn`] from before it reads until it has written.
//! 4. Where the newest rules are refused, those of the set in force stand in for them if the order allows it: they are always good. So they do
//!    for somebody who knows older ones, as a command does whose registry folder lacks what the node has from its peers.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use millrace_edge::edge::{Edge, EdgeError};
use millrace_edge::nft::{Nft, Table};
use millrace_edge::pins::Pins;
use millrace_edge::publish::{PublishError, Publisher, Standing};
use millrace_edge::state::{self, Refused, State};
use millrace_edge_policy::rules::{Compiled, Temporary};
use millrace_edge_policy::settings::Mode;
use millrace_tuning::NodeConfig;
use serde::{Deserialize, Serialize};

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
}

/// A set that is ready to be put in force.
#[derive(Debug)]
pub(crate) struct Planned {
    set: Compiled,
    /// Whose rules they are.
    firewall: Firewall,
    /// Why they are not the newest, if so.
    pub(crate) refused: Option<Refused>,
}

impl Planned {
    /// The version of the registry whose rules they are.
    pub(crate) fn version(&self) -> u64 {
        self.firewall.version
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
}

/// A set that is about to be in force, and what follows once it is for good.
#[derive(Debug, Serialize, Deserialize)]
struct Pending {
    set: u32,
    enforce: bool,
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
    let mut state = read_state(edge.pins())?;
    let of_set = sets::origin(edge.pins(), in_force)
        .filter(|origin| origin.registry == order.config.registry.public_key);
    let newest = match &of_set {
        Some(origin) if origin.version > order.firewall.version => origin.firewall(order.firewall),
        _ => order.firewall.clone(),
    };
    let failure = match compiled(order, &newest, &state.temporary, nftables) {
        Ok(set) => {
            return Ok(Planned {
                set,
                firewall: newest,
                refused: None,
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
        set: compiled(order, &firewall, &state.temporary, nftables)?,
        firewall,
        refused,
    })
}

fn compiled(
    order: &Order<'_>,
    firewall: &Firewall,
    temporary: &[Temporary],
    nftables: &dyn Nftables,
) -> Result<Compiled, Failure> {
    let settings = plan::settings(order.config, order.port, order.mode);
    let set = plan::compiled(order.config, &settings, firewall, temporary)
        .map_err(|error| Failure::new(Exit::BadConfig, error.to_string()))?;
    table::check(nftables, &Table::of(&set))?;
    Ok(set)
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
    let state = read_state(pins)?;
    let in_force = Publisher::new(edge.maps()).config().set;
    // What waits, or has lapsed, keeps its number for itself.
    let waits = read_pending(pins).map_or(0, |pending| pending.set);
    let number = state.set.max(in_force).max(waits) + 1;
    let Planned {
        set,
        firewall,
        refused,
    } = planned;
    let origin = sets::Origin::of(&firewall, order.config);
    sets::write(pins, number, in_force, &set, &origin)?;
    let pending = Pending {
        set: number,
        enforce: order.mode == Mode::Enforce,
        registry_version: firewall.version,
        refused: refused.clone(),
        table: Table::of(&set),
    };
    write_pending(pins, &pending)?;
    edge.publish(&set, number, order.probation)
        .map_err(|error| of_edge(&error))?;
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
        registry_version: firewall.version,
        rules: set.rules.len(),
        interfaces: state.interfaces.into_iter().map(|i| i.name).collect(),
        probation_seconds: order.probation.map(|period| period.as_secs_f64()),
        refused,
    })
}

/// What follows a confirmation; the number of the set.
pub(crate) fn confirmed(edge: &Edge, turn: &Turn, nftables: &dyn Nftables) -> Result<u32, Failure> {
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
pub(crate) fn is_half_done(edge: &Edge) -> bool {
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
    table::replace(edge.pins(), turn, nftables, &pending.table)?;
    let mut state = read_state(edge.pins())?;
    state.set = pending.set;
    state.enforce = pending.enforce;
    state.registry_version = Some(pending.registry_version);
    state.refused.clone_from(&pending.refused);
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
