//! The journal: the state of an edge that the kernel does not hold, in one file beside the pins.
//! The maps hold number and mode of the set in force.
//!
//! 1. The file is replaced whole, under [`EdgeLock`]. A process that is killed at any point of a
//!    write leaves the old text or the new one.
//! 2. A file of another format is refused, not guessed at.
//! 3. This crate reads and writes the interfaces. The rest belongs to the control loop, `C`, and
//!    stays as it is.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

use crate::interface::Interface;
use crate::pins::{EdgeLock, Pins};

/// Format of the file that this binary writes and reads.
pub const FORMAT: u32 = 2;

/// Longest file, in bytes: four sets (the one in force, the one before or after it, the committed
/// one, the one that was rolled back) of 32 MiB, the longest message to a helper.
pub const JOURNAL_BYTES_MAX: u64 = 128 << 20;

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
    #[serde(default, deserialize_with = "default_if_null")]
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
    /// It is longer than every journal.
    #[error("{} has {bytes} bytes, a journal at most {JOURNAL_BYTES_MAX}; detach and attach again", .path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
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
            Self::TooLong { .. } => "journal_too_long",
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
        let file = match File::open(&path) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            file => file,
        };
        let failed = |source| JournalError::Read {
            path: path.clone(),
            source,
        };
        let file = file.map_err(failed)?;
        check_length(&path, file.metadata().map_err(failed)?.len())?;
        let mut text = Vec::new();
        let mut bounded = file.take(JOURNAL_BYTES_MAX);
        bounded.read_to_end(&mut text).map_err(failed)?;
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
    /// [`JournalError::Write`], or [`JournalError::TooLong`]. The file is as before; if the folder
    /// could not be synced, it may be the new one.
    pub fn write(&self, pins: &Pins, _lock: &EdgeLock) -> Result<(), JournalError> {
        let path = pins.journal_path();
        let text = serde_json::to_vec(self).map_err(|source| JournalError::Parse {
            path: path.clone(),
            source,
        })?;
        check_length(&path, text.len() as u64)?;
        replace(&path, &text).map_err(|source| JournalError::Write { path, source })
    }
}

/// A journal as it was read last: a file that has not changed is not read again.
#[derive(Debug)]
pub struct CachedJournal<C> {
    /// Device, inode, length and time of the file that was read: every write makes another file.
    read: Option<(u64, u64, u64, i64, i64)>,
    journal: Arc<Journal<C>>,
}

impl<C: Default> Default for CachedJournal<C> {
    fn default() -> Self {
        let (read, journal) = (None, Arc::default());
        Self { read, journal }
    }
}

impl<C: Serialize + DeserializeOwned + Default> CachedJournal<C> {
    /// Reads the file if it changed, and writes it again as it was read last if it was removed.
    ///
    /// # Errors
    ///
    /// See [`JournalError`]. The next call tries again.
    pub fn read(&mut self, pins: &Pins, lock: &EdgeLock) -> Result<Arc<Journal<C>>, JournalError> {
        let path = pins.journal_path();
        if self.read.is_some() && !path.exists() {
            self.journal.write(pins, lock)?;
        }
        let file = fs::metadata(path).ok();
        let now = file.map(|f| (f.dev(), f.ino(), f.size(), f.mtime(), f.mtime_nsec()));
        if now.is_none() || self.read != now {
            self.journal = Arc::new(Journal::read(pins)?);
            self.read = now;
        }
        Ok(Arc::clone(&self.journal))
    }
}

/// A new edge has a control part of null.
fn default_if_null<'de, D, C>(deserializer: D) -> Result<C, D::Error>
where
    D: Deserializer<'de>,
    C: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

fn check_length(path: &Path, bytes: u64) -> Result<(), JournalError> {
    let path = path.to_owned();
    (bytes <= JOURNAL_BYTES_MAX)
        .then_some(())
        .ok_or(JournalError::TooLong { path, bytes })
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

    // Protects the memory of a node: the size is checked before a byte is read.
    #[test]
    fn a_file_above_the_bound_is_refused() {
        let (_folder, pins) = pins();
        let file = File::create(pins.journal_path()).unwrap();
        file.set_len(JOURNAL_BYTES_MAX + 1).unwrap();
        let error = <Journal>::read(&pins).unwrap_err();
        assert_eq!(error.reason(), "journal_too_long", "{error}");
        file.set_len(JOURNAL_BYTES_MAX).unwrap();
        let error = <Journal>::read(&pins).unwrap_err();
        assert_eq!(error.reason(), "journal_parse", "{error}");
    }

    // Protects what a running node knows: a file that was removed is written again, one that
    // changed is read again.
    #[test]
    fn a_removed_journal_is_written_again() {
        let (_folder, pins) = pins();
        let lock = pins.lock().unwrap();
        let mut cached = CachedJournal::<u32>::default();
        assert_eq!(cached.read(&pins, &lock).unwrap().control, 0);
        assert!(!pins.journal_path().exists(), "nothing was known");
        for control in 1..3 {
            let journal = Journal {
                control,
                ..Journal::default()
            };
            journal.write(&pins, &lock).unwrap();
            assert_eq!(*cached.read(&pins, &lock).unwrap(), journal);
            fs::remove_file(pins.journal_path()).unwrap();
            assert_eq!(*cached.read(&pins, &lock).unwrap(), journal);
            assert_eq!(Journal::read(&pins).unwrap(), journal);
        }
    }

    // Protects a process that died before the first set: the edge that it attached has no control
    // part yet.
    #[test]
    fn a_new_edge_has_a_default_control_part() {
        let (_folder, pins) = pins();
        let new = <Journal>::default();
        new.write(&pins, &pins.lock().unwrap()).unwrap();
        assert_eq!(Journal::<u32>::read(&pins).unwrap().control, 0);
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
