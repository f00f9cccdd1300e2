//! Puts sets in force: for a command, and for a node whose registry changed.
//!
//! 1. The words of its rules, the kernel, nftables, the state, in this order: whoever dies in between leaves what the next one repeats.
//! 2. A set on probation changes neither nftables nor the state before it is confirmed, so nothing but the kernel has to go back.
//! 3. Whoever changes set, table or state has the [`Turn`] from before it reads until it has written.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use millrace_edge::edge::Edge;
use millrace_edge::nft::Table;
use millrace_edge::pins::Pins;
use millrace_edge::publish::{Publisher, Standing};
use millrace_edge::state::{self, State};
use millrace_edge_policy::settings::Mode;
use millrace_tuning::NodeConfig;
use serde::{Deserialize, Serialize};

use super::commands::of_edge;
use super::plan::{self, Firewall};
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
    /// Waits a little for a node that is just ending.
    pub(crate) fn take(pins: &Pins) -> Result<Self, Failure> {
        let (locked, path) = open_beside(pins, NODE)?;
        let until = Instant::now() + CLAIM_PATIENCE;
        loop {
            match locked.try_lock() {
                Ok(()) => return Ok(Self { _locked: locked }),
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    std::thread::sleep(CLAIM_RETRY);
                }
                Err(TryLockError::WouldBlock) => {
                    let message = format!(
                        "another node uses the edge at {}; give each its own pins in [edge]",
                        pins.root().display()
                    );
                    return Err(Failure::new(Exit::Failed, message));
                }
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
}

/// A set that is on probation, and what follows when it is confirmed.
#[derive(Debug, Serialize, Deserialize)]
struct Pending {
    set: u32,
    enforce: bool,
    registry_version: u64,
    table: Table,
}

/// Compiles and publishes. `nft` replaces the table; with a probation it is not asked.
pub(crate) fn put(
    edge: &Edge,
    _turn: &Turn,
    order: &Order<'_>,
    nft: impl FnOnce(&Table) -> Result<(), Failure>,
) -> Result<Done, Failure> {
    let mut state = read_state(edge.pins())?;
    let version = order.firewall.version;
    let settings = plan::settings(order.config, order.port, order.mode);
    let set = plan::compiled(order.config, &settings, order.firewall, &state.temporary)
        .map_err(|error| Failure::new(Exit::BadConfig, error.to_string()))?;
    let in_force = Publisher::new(edge.maps()).config().set;
    // What waits, or has lapsed, keeps its number for itself.
    let waits = read_pending(edge.pins()).map_or(0, |pending| pending.set);
    state.set = state.set.max(in_force).max(waits) + 1;
    sets::write(edge.pins(), state.set, in_force, &set)?;
    edge.publish(&set, state.set, order.probation)
        .map_err(|error| of_edge(&error))?;
    let sampling = millrace_edge::abi::EdgeSampling {
        every: plan::to_u32(order.config.edge.sample_every),
        ..Default::default()
    };
    edge.maps().sampling.store(0, &sampling);
    let pending = Pending {
        set: state.set,
        enforce: order.mode == Mode::Enforce,
        registry_version: version,
        table: Table::of(&set),
    };
    match order.probation {
        Some(_) => write_pending(edge.pins(), &pending)?,
        None => {
            settle(edge, &pending, nft)?;
            forget_pending(edge.pins())?;
        }
    }
    Ok(Done {
        set: pending.set,
        mode: show::mode_word(order.mode),
        registry_version: version,
        rules: set.rules.len(),
        interfaces: state.interfaces.into_iter().map(|i| i.name).collect(),
        probation_seconds: order.probation.map(|period| period.as_secs_f64()),
    })
}

/// What follows a confirmation; the number of the set.
pub(crate) fn confirmed(
    edge: &Edge,
    _turn: &Turn,
    nft: impl FnOnce(&Table) -> Result<(), Failure>,
) -> Result<u32, Failure> {
    let pending = read_pending(edge.pins())?;
    settle(edge, &pending, nft)?;
    forget_pending(edge.pins())?;
    Ok(pending.set)
}

/// Whether the set in force was confirmed in the kernel, and neither table nor state has followed: somebody died there, or `nft` refused.
pub(crate) fn is_half_confirmed(edge: &Edge) -> bool {
    let publisher = Publisher::new(edge.maps());
    publisher.standing() == Standing::Settled
        && read_pending(edge.pins()).is_ok_and(|pending| pending.set == publisher.config().set)
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
    pending: &Pending,
    nft: impl FnOnce(&Table) -> Result<(), Failure>,
) -> Result<(), Failure> {
    nft(&pending.table)?;
    let mut state = read_state(edge.pins())?;
    state.set = pending.set;
    state.enforce = pending.enforce;
    state.registry_version = Some(pending.registry_version);
    write_state(edge.pins(), &state)
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
