//! The journal: the state of an edge that the kernel does not hold, in one file beside the pins.
//! The maps hold number and mode of the set in force.
//!
//! 1. The file is replaced whole, under [`EdgeLock`]. A process that is killed at any point of a
//!    write leaves the old text or the new one.
//! 2. A file of another format is refused, not guessed at.
//! 3. This crate reads and writes the interfaces. The rest belongs to the control loop, `C`, and
//!    stays as it is.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::interface::Interface;
use crate::pins::{EdgeLock, Pins};

/// Format of the file that this binary writes and reads.
pub const FORMAT: u32 = 2;

/// The file. `C` is the part of the control loop; a new edge gets its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    bound(
        serialize = "C: Serialize",
        deserialize = "C: DeserializeOwned + Default"
    )
)]
pub struct Journal<C = serde_json::Value> {
    /// [`FORMAT`].
    pub format: u32,
    /// Interfaces that the edge is attached to.
    pub interfaces: Vec<Interface>,
    /// The part of the control loop.
    #[serde(default)]
    pub control: C,
}

/// Why the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// It could not be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// It could not be written.
    #[error("cannot write {}: {source}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The file is no journal.
    #[error("{} is no journal of the edge: {source}; detach and attach again", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Another version of this program wrote it.
    #[error("{} has format {found}, this program knows {FORMAT}; detach and attach again", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

impl JournalError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Read { .. } => "journal_read",
            Self::Write { .. } => "journal_write",
            Self::Parse { .. } => "journal_parse",
            Self::Format { .. } => "journal_format",
        }
    }
}

impl<C: Default> Default for Journal<C> {
    fn default() -> Self {
        Self {
            format: FORMAT,
            interfaces: Vec::new(),
            control: C::default(),
        }
    }
}

impl<C: Serialize + DeserializeOwned + Default> Journal<C> {
    /// Reads the file beside the pins; an empty journal if there is none. Takes no lock: the file
    /// is whole at any time.
    ///
    /// # Errors
    ///
    /// See [`JournalError`].
    pub fn read(pins: &Pins) -> Result<Self, JournalError> {
        let path = pins.journal_path();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(JournalError::Read { path, source }),
        };
        let parse = |source| JournalError::Parse {
            path: path.clone(),
            source,
        };
        // The format first: other formats have other fields.
        let Format { format } = serde_json::from_slice(&text).map_err(parse)?;
        if format != FORMAT {
            return Err(JournalError::Format {
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
    /// [`JournalError::Write`]. The file is as before; if the folder could not be synced, it may be
    /// the new one.
    pub fn write(&self, pins: &Pins, _lock: &EdgeLock) -> Result<(), JournalError> {
        let path = pins.journal_path();
        let text = serde_json::to_vec(self).map_err(|source| JournalError::Parse {
            path: path.clone(),
            source,
        })?;
        replace(&path, &text).map_err(|source| JournalError::Write { path, source })
    }
}

/// The one field that all formats have.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// How far a process is with an interface or with a write of the journal: what it has done when it
/// is killed there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing is written.
    Begin,
    /// Half of the text is in the temporary file.
    Half,
    /// All of it is.
    Written,
    /// The temporary file is on the disk.
    Synced,
    /// It has the journal's name.
    Renamed,
    /// The name is on the disk, too.
    Done,
    /// One more link of an interface is pinned, and the journal does not name the interface yet.
    Linked,
}

static OBSERVER: OnceLock<fn(Step)> = OnceLock::new();

/// Calls a function at every later step of this process. Tests end the process there. The first
/// observer stays.
pub fn observe_steps(observer: fn(Step)) {
    // A second observer is ignored, as documented.
    let _ = OBSERVER.set(observer);
}

pub(crate) fn reach(step: Step) {
    if let Some(observe) = OBSERVER.get() {
        observe(step);
    }
}

/// Replaces a file. A link that was put in its place is replaced as well, and not followed.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    reach(Step::Begin);
    // A killed process may have left it.
    let _ = fs::remove_file(&new);
    let mut file = File::create_new(&new)?;
    let (first, second) = text.split_at(text.len() / 2);
    file.write_all(first)?;
    reach(Step::Half);
    file.write_all(second)?;
    reach(Step::Written);
    file.sync_all()?;
    reach(Step::Synced);
    fs::rename(&new, path)?;
    reach(Step::Renamed);
    File::open(path.parent().unwrap_or_else(|| Path::new(".")))?.sync_all()?;
    reach(Step::Done);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::interface::AttachMode;

    fn pins() -> (tempfile::TempDir, Pins) {
        let folder = tempfile::tempdir().unwrap();
        let pins = Pins::at(folder.path().join("edge"));
        (folder, pins)
    }

    #[test]
    fn what_is_written_is_read() {
        let (_folder, pins) = pins();
        assert_eq!(Journal::read(&pins).unwrap(), <Journal>::default());
        let journal: Journal = Journal {
            interfaces: vec![Interface {
                name: "eth0.100".into(),
                index: 7,
                mode: AttachMode::Generic,
            }],
            control: serde_json::json!({"set": 12}),
            ..Journal::default()
        };
        journal.write(&pins, &pins.lock().unwrap()).unwrap();
        assert_eq!(Journal::read(&pins).unwrap(), journal);
    }

    // Protects the host from the owner of the folder: what root writes goes into no other file.
    #[test]
    fn links_are_replaced_and_not_followed() {
        let (folder, pins) = pins();
        let precious = folder.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        let path = pins.journal_path();
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
        fs::write(pins.journal_path(), r#"{"format": 1, "colour": "blue"}"#).unwrap();
        let error = <Journal>::read(&pins).unwrap_err();
        assert!(
            matches!(error, JournalError::Format { found: 1, .. }),
            "{error}"
        );
        fs::write(pins.journal_path(), r#"{"format": 2"#).unwrap();
        assert!(matches!(
            <Journal>::read(&pins).unwrap_err(),
            JournalError::Parse { .. }
        ));
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

    // Protects an edge from a second node: the one that lives keeps the lock, and its end gives it
    // back.
    #[test]
    fn a_node_locks_the_other_out() {
        let (_folder, pins) = pins();
        let lock = pins.lock_node(Duration::ZERO).unwrap().unwrap();
        assert!(pins.lock_node(Duration::ZERO).unwrap().is_none());
        drop(lock);
        assert!(pins.lock_node(Duration::ZERO).unwrap().is_some());
    }
}
