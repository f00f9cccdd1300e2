//! Reads what is new in the registry folder, and says whether the folder can be read.
//!
//! 1. Who asks about the folder never waits for it: a file of a network or a user's file system may
//!    hang for ever, and only the thread that reads hangs with it.
//! 2. A version that was refused is counted once, and again only when its files change.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use millrace_protocol::identity::PublicKey;
use millrace_protocol::registry::{
    RegistryConfig, RegistryVersion, SignedVersion, document_file_name, signature_file_name,
};

use crate::folder::{self, read_verified};

/// How long the folder may take to be read before it counts as one that cannot.
const SLOW_AFTER: Duration = Duration::from_secs(10);

/// A version that verified.
pub(crate) type Verified = (SignedVersion, RegistryVersion);

/// What one look at the folder brought.
#[derive(Debug, Default)]
pub(crate) struct Look {
    /// Newer versions, ascending.
    pub(crate) versions: Vec<Verified>,
    /// Reasons of versions that were refused now for the first time.
    pub(crate) refused: Vec<&'static str>,
}

/// A registry folder that is read again and again.
#[derive(Debug)]
pub(crate) struct FolderReader {
    dir: PathBuf,
    key: PublicKey,
    config: RegistryConfig,
    /// Held while files are read.
    files: Mutex<Files>,
    /// Held for an instant at a time.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct Files {
    /// Whether there ever was a folder: a node that learns from peers alone needs none.
    was_there: bool,
    /// Versions that were refused, with the state of their files then.
    refused: BTreeMap<u64, FileState>,
}

/// Length and time of a version's two files.
type FileState = [Option<(u64, SystemTime)>; 2];

#[derive(Debug, Default)]
struct State {
    reading_since: Option<Instant>,
    /// Why the last look failed.
    failure: Option<String>,
    /// Whether the log has the failure.
    is_told: bool,
}

impl FolderReader {
    pub(crate) fn new(dir: PathBuf, key: PublicKey, config: RegistryConfig) -> Self {
        Self {
            dir,
            key,
            config,
            files: Mutex::default(),
            state: Mutex::default(),
        }
    }

    /// Reads the versions from number `from` on. May block for as long as the file system does.
    pub(crate) fn read(&self, from: u64) -> Look {
        lock(&self.state)
            .reading_since
            .get_or_insert_with(Instant::now);
        let mut files = lock(&self.files);
        let mut look = Look::default();
        let failure = match newest_numbers(&self.dir, self.config.versions_max) {
            Ok(numbers) => {
                files.was_there = true;
                for number in numbers.into_iter().filter(|number| *number >= from) {
                    self.read_version(number, &mut files, &mut look);
                }
                None
            }
            Err(error) if error.kind() == ErrorKind::NotFound && !files.was_there => None,
            Err(error) => Some(error.to_string()),
        };
        let mut state = lock(&self.state);
        state.reading_since = None;
        state.failure = failure;
        drop(state);
        self.tell();
        look
    }

    fn read_version(&self, number: u64, files: &mut Files, look: &mut Look) {
        let state = file_state(&self.dir, number);
        if files.refused.get(&number) == Some(&state) {
            return;
        }
        match read_verified(&self.dir, number, &self.key, &self.config) {
            Ok(version) => {
                files.refused.remove(&number);
                look.versions.push(version);
            }
            Err(error) => {
                let reason = error.reason();
                tracing::warn!(number, reason, %error, "registry version refused");
                look.refused.push(reason);
                files.refused.insert(number, state);
                // Bounded: who can write to the folder must not make the map grow without end.
                while files.refused.len() > self.config.versions_max {
                    files.refused.pop_first();
                }
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn is_reading(&self) -> bool {
        lock(&self.state).reading_since.is_some()
    }

    /// Makes the next read hang until the guard is dropped, as a file system could.
    #[cfg(test)]
    pub(crate) fn hang(&self) -> impl Sized + '_ {
        lock(&self.files)
    }

    /// Why the folder cannot be read now; none if it can, or is not there and never was.
    pub(crate) fn failure(&self) -> Option<String> {
        lock(&self.state).failure(Instant::now())
    }

    /// Logs that the folder cannot be read, or can be again: once each. Call it now and then, for a
    /// read that does not come back says nothing.
    pub(crate) fn tell(&self) {
        let mut state = lock(&self.state);
        let failure = state.failure(Instant::now());
        if state.is_told == failure.is_some() {
            return;
        }
        state.is_told = failure.is_some();
        drop(state);
        let dir = self.dir.display();
        match failure {
            Some(why) => tracing::warn!(
                %dir, why,
                "the registry folder cannot be read; the node is not ready, and versions come from \
                 peers alone"
            ),
            None => tracing::info!(%dir, "the registry folder can be read again"),
        }
    }
}

impl State {
    fn failure(&self, now: Instant) -> Option<String> {
        let reading = self
            .reading_since
            .map(|since| now.saturating_duration_since(since));
        match reading {
            Some(taken) if taken >= SLOW_AFTER => {
                Some(format!("it has been read for {} s", taken.as_secs()))
            }
            _ => self.failure.clone(),
        }
    }
}

/// The numbers of the newest versions in a folder, ascending: only those that would be held are
/// worth a signature's check, and a long series takes no memory.
fn newest_numbers(dir: &Path, count_max: usize) -> io::Result<BTreeSet<u64>> {
    let mut numbers = BTreeSet::new();
    for number in folder::numbers(dir)? {
        numbers.insert(number?);
        if numbers.len() > count_max {
            numbers.pop_first();
        }
    }
    Ok(numbers)
}

fn file_state(dir: &Path, number: u64) -> FileState {
    [document_file_name(number), signature_file_name(number)].map(|name| {
        let metadata = std::fs::metadata(dir.join(name)).ok()?;
        Some((metadata.len(), metadata.modified().ok()?))
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use millrace_protocol::identity::SigningKey;

    use super::*;
    use crate::folder::tests::{key, version};
    use crate::folder::write;

    fn reader(dir: &Path) -> FolderReader {
        FolderReader::new(
            dir.to_owned(),
            key().public_key(),
            RegistryConfig::default(),
        )
    }

    /// The numbers that a look brought, and the reasons of its refusals.
    fn read(reader: &FolderReader, from: u64) -> (Vec<u64>, Vec<&'static str>) {
        let found = reader.read(from);
        let numbers = found.versions.iter().map(|(_, version)| version.number);
        (numbers.collect(), found.refused)
    }

    #[test]
    fn versions_are_read_as_they_appear() {
        let dir = tempfile::tempdir().unwrap();
        let reader = reader(dir.path());
        assert_eq!(read(&reader, 0), (vec![], vec![]));
        for number in [1, 2] {
            write(dir.path(), number, &version(number, &key())).unwrap();
            assert_eq!(read(&reader, number), (vec![number], vec![]));
            assert_eq!(read(&reader, number + 1), (vec![], vec![]));
        }
        assert_eq!(read(&reader, 0).0, [1, 2]);
    }

    /// A forged, an unsigned and a misnamed version are each refused with a reason, counted once,
    /// and do not hide the good one behind them.
    #[test]
    fn refused_versions_are_counted_once_and_do_not_hide_good_ones() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, &version(1, &SigningKey::from_seed([8; 32]))).unwrap();
        std::fs::write(dir.path().join(document_file_name(2)), "number = 2\n").unwrap();
        write(dir.path(), 3, &version(30, &key())).unwrap();
        write(dir.path(), 4, &version(4, &key())).unwrap();
        std::fs::write(dir.path().join("notes.txt"), "not a version").unwrap();
        let reader = reader(dir.path());
        let refused = vec![
            "registry_bad_signature",
            "registry_unreadable",
            "registry_misnamed",
        ];
        assert_eq!(read(&reader, 1), (vec![4], refused));
        assert_eq!(read(&reader, 5), (vec![], vec![]));
    }

    /// A copy in progress: refused while half there, taken when its signature arrives.
    #[test]
    fn a_version_is_tried_again_when_its_files_change() {
        let dir = tempfile::tempdir().unwrap();
        let signed = version(1, &key());
        std::fs::write(dir.path().join(document_file_name(1)), &signed.document).unwrap();
        let reader = reader(dir.path());
        assert_eq!(read(&reader, 1), (vec![], vec!["registry_unreadable"]));
        assert_eq!(read(&reader, 1), (vec![], vec![]));
        std::fs::write(
            dir.path().join(signature_file_name(1)),
            signed.signature_hex(),
        )
        .unwrap();
        assert_eq!(read(&reader, 1), (vec![1], vec![]));
    }

    /// Protects a node with a long series: the oldest versions cost nothing.
    #[test]
    fn only_the_newest_versions_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        for number in 1..=9 {
            std::fs::write(dir.path().join(document_file_name(number)), "").unwrap();
        }
        let newest = newest_numbers(dir.path(), 3).unwrap();
        assert_eq!(newest.into_iter().collect::<Vec<_>>(), [7, 8, 9]);
    }

    /// Protects the operator: a folder that vanishes is told, one that never was is not.
    #[test]
    fn a_folder_that_cannot_be_read_says_why() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("registry");
        let reader = reader(&dir);
        reader.read(0);
        assert_eq!(reader.failure(), None);
        std::fs::write(&dir, "no folder").unwrap();
        reader.read(0);
        assert!(reader.failure().is_some());
        std::fs::remove_file(&dir).unwrap();
        std::fs::create_dir(&dir).unwrap();
        reader.read(0);
        assert_eq!(reader.failure(), None);
        std::fs::remove_dir(&dir).unwrap();
        reader.read(0);
        assert!(reader.failure().is_some());
    }

    /// Protects the operator: a read that does not come back counts as a failure after a while.
    #[test]
    fn a_read_that_takes_too_long_is_a_failure() {
        let begun = Instant::now();
        let state = State {
            reading_since: Some(begun),
            ..State::default()
        };
        let late = SLOW_AFTER - Duration::from_millis(1);
        assert_eq!(state.failure(begun + late), None);
        assert!(state.failure(begun + SLOW_AFTER).is_some());
    }
}
