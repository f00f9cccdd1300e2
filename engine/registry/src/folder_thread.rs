//! The thread that reads the registry folder every poll interval: it alone hangs with a file system
//! that hangs.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::versions::Versions;

/// How long its end is waited for. A read that takes longer, on a file system that hangs, is left
/// behind: it takes nothing after that, and its thread ends with it, or with the process.
const END_WITHIN: Duration = Duration::from_millis(500);

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct FolderThread {
    is_over: Arc<AtomicBool>,
    stop: Option<Sender<()>>,
    /// In a lock, so that threads may share the owner.
    ended: Mutex<Receiver<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FolderThread {
    /// Starts it. `changed` is called when a newer version is held.
    ///
    /// # Errors
    /// The host's, if it gives no thread.
    pub(crate) fn start(
        versions: Arc<Versions>,
        interval: Duration,
        changed: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let is_over = Arc::new(AtomicBool::new(false));
        let (stop, stopped) = channel();
        let (ends, ended) = channel();
        let over = Arc::clone(&is_over);
        let run = move || {
            let _ends: Sender<()> = ends;
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                if versions.poll_folder_unless(|| over.load(Ordering::Acquire)) {
                    changed();
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("millrace-folder".into())
            .spawn(run)?;
        Ok(Self {
            is_over,
            stop: Some(stop),
            ended: Mutex::new(ended),
            thread: Some(thread),
        })
    }
}

impl Drop for FolderThread {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        drop(self.stop.take());
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        if ended.recv_timeout(END_WITHIN) == Err(RecvTimeoutError::Timeout) {
            return tracing::warn!("a read of the registry folder hangs; it is left behind");
        }
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use millrace_protocol::registry::RegistryConfig;

    use super::*;
    use crate::folder::tests::{key, version};
    use crate::{Sources, VersionsConfig, folder, keys};

    const SOON: Duration = Duration::from_millis(1);
    const PATIENCE: Duration = Duration::from_secs(30);

    /// Protects an operator from a file system that hangs: the node tells its state, takes what
    /// peers bring, and ends. What was read in the end is not taken by a node that has ended.
    #[test]
    fn a_read_that_hangs_holds_up_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources {
            folder: Some(dir.path().to_owned()),
            ..Sources::new(key().public_key(), RegistryConfig::default())
        };
        let me = keys::generate().unwrap().public_key();
        let versions = Arc::new(Versions::new(&me, VersionsConfig::default(), sources));
        let (told, tells) = channel();
        let changed = move || told.send(()).unwrap();
        folder::write(dir.path(), 1, &version(1, &key())).unwrap();
        let thread = FolderThread::start(Arc::clone(&versions), SOON, changed).unwrap();
        tells.recv_timeout(PATIENCE).unwrap();

        let reader = Arc::clone(versions.folder().unwrap());
        let hangs = reader.hang();
        folder::write(dir.path(), 2, &version(2, &key())).unwrap();
        while !reader.is_reading() {
            std::thread::yield_now();
        }
        assert_eq!(versions.summary().newest, 1);
        assert!(versions.offer(version(3, &key())).unwrap());
        let error = versions.poll_folder_within(SOON).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(thread);
        folder::write(dir.path(), 4, &version(4, &key())).unwrap();
        drop(hangs);
        // Its end is that of the thread that was left behind.
        assert!(tells.recv_timeout(PATIENCE).is_err());
        assert_eq!(versions.newest(), 3);
    }
}
