//! The lock of the state folder: one node at a time runs in it.
//!
//! 1. A node takes the lock before it looks at its address, and holds it until its last thread has
//!    ended.
//! 2. The file stays. A process that removed it could remove the one that another has just locked.
//! 3. No lock is stale: the kernel releases it when its process ends, however that ends (flock(2)).

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::StartError;

/// The file in the state folder.
const FILE_NAME: &str = "node.lock";

/// The process's number in the file: so many digits and spaces, and a line's end. Of one length, so
/// that a new one covers the whole of an old one.
const PID_BYTES: usize = 11;

/// How long a process that was killed may still have its lock, and the time between two attempts.
const ENDING: Duration = Duration::from_millis(250);
const RETRY: Duration = Duration::from_millis(5);

/// The lock of a state folder, until it is dropped. The file has the number of the process.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes the lock of `folder`.
    ///
    /// # Errors
    /// [`StartError::Taken`] with the number of the process that has it; otherwise the system's
    /// rules or the host.
    pub fn take(folder: &Path) -> Result<Self, StartError> {
        let path = folder.join(FILE_NAME);
        let failed = |error| StartError::io(path.display(), error);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(failed)?;
        let until = Instant::now() + ENDING;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    std::thread::sleep(RETRY);
                }
                Err(TryLockError::WouldBlock) => {
                    let what = taken(folder, pid_in(&file));
                    return Err(StartError::Taken { what });
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
        if let Err(error) = write_pid(&file) {
            // The lock holds all the same; only a second process cannot name this one.
            tracing::warn!(file = %path.display(), %error, "the lock cannot name this process");
        }
        Ok(Self { _file: file })
    }
}

fn write_pid(file: &File) -> io::Result<()> {
    let pid = format!("{:<width$}\n", std::process::id(), width = PID_BYTES - 1);
    file.write_all_at(pid.as_bytes(), 0)
}

/// None while the holder has not written it yet.
fn pid_in(file: &File) -> Option<u32> {
    let mut text = [0; PID_BYTES];
    file.read_exact_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text).ok()?.trim().parse().ok()
}

fn taken(folder: &Path, pid: Option<u32>) -> String {
    let holder = pid.map_or_else(|| "another node".to_owned(), |pid| format!("process {pid}"));
    format!(
        "{holder} runs a node in {}; fix: stop it, or give this one a node.state_dir of its own",
        folder.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects the node that runs in a folder, and the operator who looks for it.
    #[test]
    fn a_folder_has_one_lock_and_its_file_names_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE_NAME);
        // A longer number of a process that has ended leaves nothing of itself.
        std::fs::write(&file, "4194304999\n").unwrap();
        let first = StateLock::take(folder.path()).unwrap();
        let pid = std::process::id().to_string();
        assert_eq!(std::fs::read_to_string(&file).unwrap().trim(), pid);
        let error = StateLock::take(folder.path()).unwrap_err();
        assert!(matches!(error, StartError::Taken { .. }), "{error:?}");
        assert!(
            error.to_string().contains(&format!("process {pid} ")),
            "{error}"
        );
        drop(first);
        StateLock::take(folder.path()).unwrap();
    }

    /// Each failure says whose fault it is.
    #[test]
    fn a_folder_that_cannot_be_locked_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let error = StateLock::take(&folder.path().join("none")).unwrap_err();
        assert!(matches!(error, StartError::Host { .. }), "{error:?}");
        assert!(error.to_string().contains(FILE_NAME), "{error}");
    }
}
