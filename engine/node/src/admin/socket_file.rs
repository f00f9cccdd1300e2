//! The file of the admin socket, and who may remove it.
//!
//! 1. A node removes the file only if it is the one that the node's own socket made: another node
//!    may have made a new one at the same path.
//! 2. It removes the file while its socket still listens: until then no other node takes the file
//!    for a stale one.
//! 3. Of nodes that start over one stale file, one at a time looks, removes and binds: it holds a
//!    lock on the folder (flock(2)), which leaves no file behind.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::StartError;

/// How long to wait for the lock of the folder, which a node holds for some milliseconds, and the
/// time between two attempts. Any process that may read the folder can hold it for longer.
const LOCKED_WITHIN: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// The file that a socket of this process made; removed when dropped, if it is still that one.
/// Drop it before the socket.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    inode: Inode,
}

/// Device and number. The socket holds its inode, so that no other file gets the same number.
type Inode = (u64, u64);

impl SocketFile {
    /// Has `bind` make a socket at `path`, in the place of one that no process listens on.
    ///
    /// # Errors
    /// [`StartError::Taken`] if a process listens there, the file is no socket, or another process
    /// holds the folder's lock for 5 seconds; [`StartError::Config`] if the path is too long for a
    /// socket; otherwise the system's rules or the host. Nothing is removed.
    pub(super) fn bind<L>(
        path: &Path,
        bind: impl FnOnce(&Path) -> io::Result<L>,
    ) -> Result<(L, Self), StartError> {
        let _lock = lock_folder(path)?;
        remove_stale(path)?;
        let socket = bind(path).map_err(|error| bind_failed(path, error))?;
        let inode = inode(path).map_err(|error| StartError::io(path.display(), error))?;
        let path = path.to_owned();
        Ok((socket, Self { path, inode }))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|inode| inode == self.inode) {
            // Gone already is what we want.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<Inode> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn bind_failed(path: &Path, error: io::Error) -> StartError {
    match error.kind() {
        io::ErrorKind::AddrInUse => StartError::Taken {
            what: format!("{}: {error}", path.display()),
        },
        // The address of a Unix socket holds 107 bytes (unix(7)).
        io::ErrorKind::InvalidInput => StartError::Config {
            key: format!("admin.socket = \"{}\"", path.display()),
            reason: error.to_string(),
        },
        _ => StartError::io(path.display(), error),
    }
}

/// The lock of the folder that `path` is in, held until the file is dropped.
fn lock_folder(path: &Path) -> Result<File, StartError> {
    let folder = path.parent().filter(|name| !name.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    let failed = |error| StartError::io(folder.display(), error);
    let file = File::open(folder).map_err(failed)?;
    let until = Instant::now() + LOCKED_WITHIN;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(LOCK_RETRY);
            }
            Err(TryLockError::WouldBlock) => {
                let what = format!("{}: another process holds its lock", folder.display());
                return Err(StartError::Taken { what });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
    }
}

/// Removes a socket file that no process listens on; refuses to take one from a running node. The
/// caller holds the lock of the folder.
///
/// # Errors
/// [`StartError::Taken`] if a process listens there, or the file is no socket; otherwise the
/// system's rules or the host.
fn remove_stale(path: &Path) -> Result<(), StartError> {
    let name = path.display();
    match std::fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let what = format!("{name} is not a socket; remove it or choose another");
            return Err(StartError::Taken { what });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => {
            let what = format!("{name}: a node is running with this socket");
            return Err(StartError::Taken { what });
        }
        // The one answer that says that no process listens (connect(2)).
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        // Another node removed it meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(StartError::io(name, error)),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StartError::io(name, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::Barrier;

    use super::*;

    fn bind(path: &Path) -> Result<(UnixListener, SocketFile), StartError> {
        SocketFile::bind(path, |path| UnixListener::bind(path))
    }

    #[test]
    fn the_file_ends_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (_listener, file) = bind(&path).unwrap();
        assert!(path.exists());
        drop(file);
        assert!(!path.exists());
    }

    /// Protects the node that runs: one that fails to start must not take its file away.
    #[test]
    fn a_failed_bind_removes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (_listener, _file) = bind(&path).unwrap();
        let error = bind(&path).unwrap_err();
        assert!(matches!(error, StartError::Taken { .. }), "{error:?}");
        let error = remove_stale(&path).unwrap_err();
        assert!(matches!(error, StartError::Taken { .. }), "{error:?}");
        assert!(UnixStream::connect(&path).is_ok());
    }

    /// Protects a node that took the path over: the end of the one before it is not its own.
    #[test]
    fn a_file_that_another_socket_made_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (_before, before) = bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (_listener, _file) = bind(&path).unwrap();
        drop(before);
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn a_stale_file_is_removed_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        remove_stale(&path).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        remove_stale(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "").unwrap();
        let error = remove_stale(&path).unwrap_err();
        assert!(matches!(error, StartError::Taken { .. }), "{error:?}");
        assert!(path.exists());
    }

    /// Protects a node that starts beside another one after a crash: neither removes the new file
    /// of the other.
    #[test]
    fn of_many_that_start_over_one_stale_file_one_gets_it() {
        const NODES: usize = 4;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for _ in 0..200 {
            drop(UnixListener::bind(&path).unwrap());
            let start = Barrier::new(NODES);
            let run = || {
                start.wait();
                bind(&path).ok()
            };
            let bound = std::thread::scope(|scope| {
                let nodes = [(); NODES].map(|()| scope.spawn(run));
                nodes.map(|node| node.join().unwrap())
            });
            assert_eq!(bound.iter().flatten().count(), 1);
            assert!(UnixStream::connect(&path).is_ok());
            for (listener, file) in bound.into_iter().flatten() {
                drop(file);
                drop(listener);
            }
            assert!(!path.exists());
        }
    }

    /// Each failure says whose fault it is, and keeps what the system said.
    #[test]
    fn a_path_that_cannot_be_bound_says_whose_fault_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(200));
        let error = bind(&long).unwrap_err();
        assert!(matches!(error, StartError::Config { .. }), "{error:?}");
        let error = bind(&folder.path().join("none/socket")).unwrap_err();
        assert!(matches!(error, StartError::Host { .. }), "{error:?}");
        let source = std::error::Error::source(&error).unwrap();
        let source: &io::Error = source.downcast_ref().unwrap();
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
    }
}
