//! What an operator asked of the edge, in a file beside the pins: what the maps cannot say. Mode and number of the set in force are
//! not here: the maps say them.
//!
//! 1. The file is replaced whole, and only by whoever holds the lock of the pins.
//! 2. A file of another format is refused, not guessed at.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millrace_edge_policy::rules::Temporary;
use serde::{Deserialize, Serialize};

use crate::pins::{Lock, Pins};

/// Format of the file that this binary writes and reads.
pub const FORMAT: u32 = 1;

/// How a program is attached to an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// In the driver where it can, else in the kernel's generic code.
    #[default]
    Auto,
    /// In the driver, or not at all.
    Native,
    /// In the kernel's generic code: right everywhere, and slower.
    Generic,
}

impl AttachMode {
    /// The word for it in configs and on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

/// What an operator asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`FORMAT`].
    pub format: u32,
    /// Interfaces, by name.
    pub interfaces: Vec<Interface>,
    /// Number of the last set that table and state have followed; the kernel's own number is ahead of it while something is half done.
    pub set: u32,
    /// Version of the registry that it came from, if it came from one.
    pub registry_version: Option<u64>,
    /// Rules that end by themselves, in the order of their issue.
    pub temporary: Vec<Temporary>,
    /// A newer version of the registry, whose rules are refused.
    #[serde(default)]
    pub refused: Option<Refused>,
    /// The last set that was on probation and was not confirmed, until somebody applies anew.
    #[serde(default)]
    pub lapsed: Option<Lapsed>,
    /// Keys of the config and their values, as the program was loaded with.
    #[serde(default)]
    pub attached: BTreeMap<String, String>,
    /// Keys of the config and their values, as the node was started with.
    #[serde(default)]
    pub node: BTreeMap<String, String>,
}

/// A set that was put in force on probation, and that nobody confirmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lapsed {
    /// Its number.
    pub set: u32,
    /// Public key of the registry that it came from.
    pub registry: String,
    /// Version of that registry.
    pub registry_version: u64,
    /// Its side of the config: keys and their values.
    pub config: BTreeMap<String, String>,
}

/// A version of the registry that cannot be put in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    /// Its number.
    pub registry_version: u64,
    /// What is wrong with it, for people.
    pub message: String,
}

/// An interface that the program is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// Its name when it was attached.
    pub name: String,
    /// Its index, by which the links are named.
    pub index: u32,
    /// What was asked for.
    pub mode: AttachMode,
}

/// Why the file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It could not be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It could not be written.
    #[error("cannot write {}: {source}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not what this program writes.
    #[error("{} is no state of the edge: {source}; detach and attach again", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// It was written by another version of this program.
    #[error("{} has format {found}, this program knows {FORMAT}; detach and attach again", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

impl StateError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Read { .. } => "state_read",
            Self::Write { .. } => "state_write",
            Self::Parse { .. } => "state_parse",
            Self::Format { .. } => "state_format",
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            format: FORMAT,
            interfaces: Vec::new(),
            set: 0,
            registry_version: None,
            temporary: Vec::new(),
            refused: None,
            lapsed: None,
            attached: BTreeMap::new(),
            node: BTreeMap::new(),
        }
    }
}

impl State {
    /// Reads the file beside the pins; an empty state if there is none.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub fn read(pins: &Pins) -> Result<Self, StateError> {
        let path = pins.state_path();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(StateError::Read { path, source }),
        };
        let parse = |source| StateError::Parse {
            path: path.clone(),
            source,
        };
        // The format first: other formats have other fields.
        let Format { format } = serde_json::from_slice(&text).map_err(parse)?;
        if format != FORMAT {
            return Err(StateError::Format {
                path,
                found: format,
            });
        }
        serde_json::from_slice(&text).map_err(parse)
    }

    /// Replaces the file beside the pins.
    ///
    /// # Errors
    ///
    /// [`StateError::Write`]; the file is as before.
    pub fn write(&self, pins: &Pins, _lock: &Lock) -> Result<(), StateError> {
        let path = pins.state_path();
        let text = serde_json::to_vec_pretty(self).map_err(|source| StateError::Parse {
            path: path.clone(),
            source,
        })?;
        replace(&path, &text).map_err(|source| StateError::Write { path, source })
    }

    /// Drops rules whose time is over, and gives how long it is until the next one ends.
    pub fn expire(&mut self, now: SystemTime) -> Option<Duration> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.temporary
            .retain(|rule| Duration::from_secs(rule.until_unix_seconds) > now);
        let next = self
            .temporary
            .iter()
            .map(|rule| rule.until_unix_seconds)
            .min()?;
        Some(Duration::from_secs(next).saturating_sub(now))
    }
}

/// The one field that all formats have.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// Replaces a file beside the pins: whoever reads it, and whoever comes after a full disk or a crash, finds the old text or the new one.
/// A link that somebody has put in its place is replaced as well, and not followed.
///
/// # Errors
///
/// What the kernel says; the file is as before.
pub fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    // Left by a process that died here.
    let _ = fs::remove_file(&new);
    let mut file = File::create_new(&new)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_edge_policy::rules::RuleAction;

    fn pins() -> (tempfile::TempDir, Pins) {
        let folder = tempfile::tempdir().unwrap();
        let pins = Pins::at(folder.path().join("edge"));
        (folder, pins)
    }

    #[test]
    fn what_is_written_is_read() {
        let (_folder, pins) = pins();
        assert_eq!(State::read(&pins).unwrap(), State::default());
        let state = State {
            format: FORMAT,
            interfaces: vec![Interface {
                name: "eth0.100".into(),
                index: 7,
                mode: AttachMode::Generic,
            }],
            set: 12,
            registry_version: Some(40),
            temporary: vec![Temporary {
                prefix: "2001:db8::/32".parse().unwrap(),
                action: RuleAction::Deny,
                until_unix_seconds: 1_900_000_000,
            }],
            refused: Some(Refused {
                registry_version: 41,
                message: "rule 1".into(),
            }),
            lapsed: Some(Lapsed {
                set: 13,
                registry: "ab".into(),
                registry_version: 42,
                config: BTreeMap::from([("tcp_ports".into(), "[80]".into())]),
            }),
            attached: BTreeMap::from([("xdp".into(), "\"native\"".into())]),
            node: BTreeMap::from([("lease".into(), "\"2s\"".into())]),
        };
        state.write(&pins, &pins.lock().unwrap()).unwrap();
        assert_eq!(State::read(&pins).unwrap(), state);
    }

    // Protects the host from whoever owns the folder: what root writes goes into no other file.
    #[test]
    fn links_are_replaced_and_not_followed() {
        let (folder, pins) = pins();
        let precious = folder.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        let path = pins.state_path();
        let new = folder.path().join("edge.json.new");
        for link in [&path, &new] {
            std::os::unix::fs::symlink(&precious, link).unwrap();
        }
        replace(&path, b"text").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
        assert!(!new.exists() && !path.is_symlink());
    }

    #[test]
    fn another_format_is_refused() {
        let (_folder, pins) = pins();
        fs::write(pins.state_path(), r#"{"format": 2, "colour": "blue"}"#).unwrap();
        let error = State::read(&pins).unwrap_err();
        assert!(
            matches!(error, StateError::Format { found: 2, .. }),
            "{error}"
        );
        fs::write(pins.state_path(), r#"{"format": 1"#).unwrap();
        assert!(matches!(
            State::read(&pins).unwrap_err(),
            StateError::Parse { .. }
        ));
    }

    #[test]
    fn rules_end_when_their_time_is_over() {
        let rule = |until| Temporary {
            prefix: "192.0.2.0/24".parse().unwrap(),
            action: RuleAction::Allow,
            until_unix_seconds: until,
        };
        let mut state = State {
            temporary: vec![rule(100), rule(160)],
            ..State::default()
        };
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(state.expire(at(99)), Some(Duration::from_secs(1)));
        assert_eq!(state.expire(at(100)), Some(Duration::from_secs(60)));
        assert_eq!(state.temporary, [rule(160)]);
        assert_eq!(state.expire(at(200)), None);
    }

    #[test]
    fn the_lock_is_held_by_one() {
        let (_folder, pins) = pins();
        let lock = pins.lock().unwrap();
        assert!(matches!(
            pins.lock().unwrap_err(),
            crate::pins::PinError::Busy { .. }
        ));
        drop(lock);
        pins.lock().unwrap();
    }
}
