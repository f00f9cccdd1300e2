//! The folder whose names keep programs, maps and links alive without any process.
//!
//! 1. It is a bpffs of its own: `ip netns exec` mounts another `/sys`, which would hide pins under
//!    it.
//! 2. Everything of one layout of the maps is in one folder. A binary touches no other layout,
//!    except to remove it.
//! 3. Links are named by interface index: a bpffs allows no dot in a name, interface names do.
//! 4. A process that changes the pins, or publishes, holds the lock. A trace holds another.
//! 5. Only the owner has access to pins and lock: any user who could open the lock's file could
//!    keep the lock.
//! 6. Nothing is pinned in a bpffs that ends with a mount namespace, such as that of `ip netns
//!    exec` or of a unit with `PrivateTmp=`.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock, statfs};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde::{Deserialize, Serialize};

use crate::netns::{self, NetworkNamespace};
use crate::sys;

/// Layout of the maps that this binary knows: `EDGE_LAYOUT`.
pub const LAYOUT: u32 = crate::abi::LAYOUT;

/// The place of the pins. It holds no descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pins {
    root: PathBuf,
}

/// The kind of object that a pin keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A map.
    Map,
    /// A program.
    Program,
    /// A link.
    Link,
}

impl Kind {
    fn folder(self) -> &'static str {
        match self {
            Self::Map => "maps",
            Self::Program => "programs",
            Self::Link => "links",
        }
    }
}

/// Why pins could not be read, made or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PinError {
    /// The folder is no bpffs, and none could be mounted there.
    #[error("cannot mount a bpffs at {}: {source}; it takes CAP_SYS_ADMIN, or mount one there before", .path.display())]
    Mount {
        /// The folder.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Only this mount namespace has the bpffs, which would end with the namespace.
    #[error(
        "the bpffs at {} would end with this process's mount namespace, and the edge with it; mount one for all before, from outside: \
         `mount -t bpf -o mode=0700 bpf {}`; `nsenter --net=` enters a network namespace without other mounts, `ip netns exec` does not",
        .path.display(), .path.display()
    )]
    Private {
        /// The folder.
        path: PathBuf,
    },
    /// A folder could not be made.
    #[error("cannot make {}: {source}{}", .path.display(), way_out(.source))]
    Create {
        /// The folder.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A folder or a pin could not be read.
    #[error("cannot read {}: {source}{}", .path.display(), way_out(.source))]
    Read {
        /// The folder or the pin.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// An object could not be pinned.
    #[error("cannot pin {}: {source}{}", .path.display(), way_out(.source))]
    Pin {
        /// The name that it should have.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A pin could not be removed, or its link not detached.
    #[error("cannot remove {}: {source}{}", .path.display(), way_out(.source))]
    Remove {
        /// The pin.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The file that guards the pins could not be made.
    #[error("cannot lock {}: {source}{}", .path.display(), way_out(.source))]
    Lock {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Another process changes the pins.
    #[error("another process holds {}; try again when it is done", .path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
}

impl PinError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Mount { .. } => "pin_mount",
            Self::Private { .. } => "pin_private",
            Self::Create { .. } => "pin_create",
            Self::Read { .. } => "pin_read",
            Self::Pin { .. } => "pin_pin",
            Self::Remove { .. } => "pin_remove",
            Self::Lock { .. } => "pin_lock",
            Self::Busy { .. } => "pin_busy",
        }
    }
}

/// What an operator can do about a file or a pin.
fn way_out(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            "; it belongs to the user who attached: run the command as that user (usually root), with CAP_BPF and CAP_NET_ADMIN"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::ReadOnlyFilesystem => {
            "; the file system there is full or read-only: free it, or choose another folder for pins in [edge]"
        }
        io::ErrorKind::NotFound => {
            "; another process removed it meanwhile: `millrace xdp detach` removes the rest"
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "; something else is in its place: remove that, or choose another folder for pins in [edge]"
        }
        _ => "; `millrace xdp detach` removes what is there",
    }
}

/// The right to change an edge: its pins, the set in force, its table and its journal. Dropping it
/// or the death of its process gives it back.
#[derive(Debug)]
pub struct EdgeLock {
    /// None: another process holds the lock for this one.
    _file: Option<File>,
}

impl EdgeLock {
    /// The lock of the process that sent a request and waits for the answer.
    pub(crate) fn of_requester() -> Self {
        Self { _file: None }
    }
}

/// The right to be the node of an edge: two nodes would overwrite each other's keys and counts.
/// Dropping it or the death of its process gives it back.
#[derive(Debug)]
pub struct NodeLock {
    _file: File,
}

/// The turn to trace. Dropping it or the death of its process gives it back.
#[derive(Debug)]
pub(crate) struct TraceLock {
    _file: File,
}

/// Time between two attempts to take a [`NodeLock`].
const NODE_LOCK_RETRY: Duration = Duration::from_millis(5);

impl Default for Pins {
    fn default() -> Self {
        Self::at("/run/millrace/edge")
    }
}

impl Pins {
    /// Pins in this folder, which becomes a bpffs if it is not in one.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder as an absolute path without symbolic links.
    pub(crate) fn canonical_root(&self) -> PathBuf {
        let root = std::path::absolute(&self.root).unwrap_or_else(|_| self.root.clone());
        let Some(above) = root.parent() else {
            return root;
        };
        // A part of the path that does not exist yet is no link.
        let found = above
            .ancestors()
            .find_map(|above| Some((above, fs::canonicalize(above).ok()?)));
        match found.and_then(|(above, real)| Some(real.join(root.strip_prefix(above).ok()?))) {
            Some(real) => real,
            None => root,
        }
    }

    /// The journal beside the folder; see [`crate::journal`].
    #[must_use]
    pub fn journal_path(&self) -> PathBuf {
        beside(&self.root, "json")
    }

    /// Path of one pin.
    #[must_use]
    pub fn path(&self, kind: Kind, name: &str) -> PathBuf {
        self.of_layout(LAYOUT).join(kind.folder()).join(name)
    }

    /// Whether something is pinned under the layout that this binary knows.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.of_layout(LAYOUT).is_dir()
    }

    /// Device and inode of a pin, which tell this edge from one that is attached here later. None
    /// if nothing is pinned.
    #[must_use]
    pub fn identity(&self) -> Option<(u64, u64)> {
        let pin = fs::metadata(self.path(Kind::Map, "control")).ok()?;
        Some((pin.dev(), pin.ino()))
    }

    /// Names of the pins of a kind, in order; none if nothing is pinned.
    ///
    /// # Errors
    ///
    /// [`PinError::Read`] if the folder is there and cannot be read.
    pub fn names(&self, kind: Kind) -> Result<Vec<String>, PinError> {
        names_in(&self.of_layout(LAYOUT).join(kind.folder()))
    }

    /// Other layouts that are pinned, by another version of this program.
    ///
    /// # Errors
    ///
    /// [`PinError::Read`] if the folder is there and cannot be read.
    pub fn foreign_layouts(&self) -> Result<Vec<String>, PinError> {
        let mut layouts = self.layouts()?;
        let own = layout_name(LAYOUT);
        layouts.retain(|name| *name != own);
        Ok(layouts)
    }

    /// Takes the lock if it is free, and does not wait.
    ///
    /// # Errors
    ///
    /// [`PinError::Busy`] if another process or thread holds it.
    pub fn lock(&self) -> Result<EdgeLock, PinError> {
        self.locked(FlockOperation::NonBlockingLockExclusive)
    }

    /// Takes the lock, and waits for the process that has it.
    ///
    /// # Errors
    ///
    /// [`PinError::Lock`] if the file beside the folder cannot be made.
    pub fn lock_waiting(&self) -> Result<EdgeLock, PinError> {
        self.locked(FlockOperation::LockExclusive)
    }

    /// Takes the lock of the edge's node. Waits up to `patience` for a node that is ending: the
    /// kernel ends a killed process some milliseconds after its successor can start. None if
    /// another node lives.
    ///
    /// # Errors
    ///
    /// [`PinError::Lock`] if the file beside the folder cannot be made.
    pub fn lock_node(&self, patience: Duration) -> Result<Option<NodeLock>, PinError> {
        let until = Instant::now() + patience;
        loop {
            match self.flock("node", FlockOperation::NonBlockingLockExclusive) {
                Ok(file) => return Ok(Some(NodeLock { _file: file })),
                Err(PinError::Busy { .. }) if Instant::now() < until => {
                    std::thread::sleep(NODE_LOCK_RETRY);
                }
                Err(PinError::Busy { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for the turn to trace: the program leaves its decision in one place, so traces run one
    /// at a time.
    ///
    /// # Errors
    ///
    /// [`PinError::Lock`] if the file beside the folder cannot be made.
    pub(crate) fn lock_trace(&self) -> Result<TraceLock, PinError> {
        let file = self.flock("trace", FlockOperation::LockExclusive)?;
        Ok(TraceLock { _file: file })
    }

    fn locked(&self, operation: FlockOperation) -> Result<EdgeLock, PinError> {
        let file = self.flock("lock", operation)?;
        Ok(EdgeLock { _file: Some(file) })
    }

    /// Locks a file beside the folder.
    fn flock(&self, extension: &str, operation: FlockOperation) -> Result<File, PinError> {
        let path = beside(&self.root, extension);
        let failed = |source| PinError::Lock {
            path: path.clone(),
            source,
        };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match flock(&file, operation) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(PinError::Busy { path }),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    /// Makes the folders, and the bpffs if there is none.
    ///
    /// # Errors
    ///
    /// [`PinError::Mount`] without the capability to mount; [`PinError::Private`] where the mount
    /// would end with the caller's mount namespace; [`PinError::Create`] otherwise.
    pub fn create(&self) -> Result<(), PinError> {
        let failed = |path: &Path, source| PinError::Create {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(&self.root).map_err(|source| failed(&self.root, source))?;
        if !self.is_bpffs() {
            mount(SOURCE, &self.root, "bpf", MountFlags::empty(), MODE).map_err(|errno| {
                PinError::Mount {
                    path: self.root.clone(),
                    source: errno.into(),
                }
            })?;
        }
        if !netns::lasts(&self.root) {
            self.unmount();
            return Err(PinError::Private {
                path: self.root.clone(),
            });
        }
        for kind in [Kind::Map, Kind::Program, Kind::Link] {
            let path = self.of_layout(LAYOUT).join(kind.folder());
            fs::create_dir_all(&path).map_err(|source| failed(&path, source))?;
        }
        Ok(())
    }

    /// Detaches every link and removes every pin, of every layout, then the journal, then the mount
    /// if [`Self::create`] made it. A missing part is no error.
    ///
    /// # Errors
    ///
    /// The error of the first part that could not be removed. It tries the others too.
    pub fn remove(&self) -> Result<(), PinError> {
        self.remove_layouts(|_| true)
    }

    /// [`Self::remove`] for the layout of this binary alone.
    ///
    /// # Errors
    ///
    /// The error of the first part that could not be removed. It tries the others too.
    pub(crate) fn remove_own(&self) -> Result<(), PinError> {
        self.remove_layouts(|name| name == layout_name(LAYOUT))
    }

    fn remove_layouts(&self, is_meant: impl Fn(&str) -> bool) -> Result<(), PinError> {
        let mut first = Ok(());
        let mut keep = |result: Result<(), PinError>| {
            if first.is_ok() {
                first = result;
            }
        };
        for layout in self.layouts()? {
            if !is_meant(&layout) {
                continue;
            }
            let folder = self.root.join(layout);
            // Links come first: an attached program must not outlive the names of its maps.
            let links = folder.join(Kind::Link.folder());
            for name in names_in(&links)? {
                keep(remove_link(&links.join(name)));
            }
            keep(remove_all(&folder));
        }
        if !self.layouts()?.is_empty() {
            return first;
        }
        let journal = self.journal_path();
        match fs::remove_file(&journal) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                keep(Err(PinError::Remove {
                    path: journal,
                    source,
                }));
            }
            _ => {}
        }
        self.unmount();
        first
    }

    /// All layouts that are pinned, those of other versions included.
    fn layouts(&self) -> Result<Vec<String>, PinError> {
        let mut names = names_in(&self.root)?;
        names.retain(|name| name.starts_with(LAYOUT_PREFIX));
        Ok(names)
    }

    /// Whether process 1 has a bpffs here that the caller does not have: then the caller cannot see
    /// what is pinned.
    ///
    /// # Errors
    ///
    /// [`PinError::Read`] if the folder is there and cannot be read.
    pub(crate) fn are_out_of_sight(&self) -> Result<bool, PinError> {
        Ok(self.layouts()?.is_empty() && netns::is_hidden(&self.canonical_root()))
    }

    /// Removes the mount that [`Self::create`] made; a mount of the host stays.
    fn unmount(&self) {
        if netns::is_mounted_as(&self.root, SOURCE) {
            // Fails where a process has a file of it open, or the folder belongs to a larger bpffs:
            // harmless.
            let _ = unmount(&self.root, UnmountFlags::empty());
        }
    }

    /// Records that the edge is attached in the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// [`PinError::Create`] if the record cannot be made.
    pub(crate) fn set_namespace(&self, namespace: NetworkNamespace) -> Result<(), PinError> {
        self.set_label(NAMESPACE, &namespace.label())
    }

    /// The network namespace that the edge is attached in, under any layout; none without a record.
    pub(crate) fn namespace(&self) -> Option<NetworkNamespace> {
        let layouts = self.layouts().ok()?;
        layouts
            .iter()
            .find_map(|layout| NetworkNamespace::of_label(&self.label(layout, NAMESPACE)?))
    }

    /// Records the build of the pinned programs.
    ///
    /// # Errors
    ///
    /// [`PinError::Create`] if the record cannot be made.
    pub(crate) fn set_build(&self, build: &str) -> Result<(), PinError> {
        self.set_label(BUILD, build)
    }

    /// The build of the pinned programs. None without a record, and after a process died while it
    /// replaced them.
    #[must_use]
    pub fn build(&self) -> Option<String> {
        self.label(&layout_name(LAYOUT), BUILD)
    }

    /// A bpffs holds no files, so a label is the name of an empty folder: `KEY-VALUE`.
    fn set_label(&self, key: &str, value: &str) -> Result<(), PinError> {
        let folder = self.of_layout(LAYOUT).join(LABELS);
        let new = folder.join(format!("{key}-{value}"));
        let failed = |source| PinError::Create {
            path: new.clone(),
            source,
        };
        let before = names_in(&folder)?;
        fs::create_dir_all(&new).map_err(failed)?;
        for name in before {
            let other = folder.join(&name);
            if has_key(&name, key) && other != new {
                fs::remove_dir(&other).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// The value of a label; none without the label, or with more than one.
    fn label(&self, layout: &str, key: &str) -> Option<String> {
        let mut labels = names_in(&self.root.join(layout).join(LABELS)).ok()?;
        labels.retain(|name| has_key(name, key));
        let [label] = labels.as_slice() else {
            return None;
        };
        Some(label[key.len() + 1..].to_owned())
    }

    /// Links of all layouts.
    pub(crate) fn all_links(&self) -> Result<Vec<PathBuf>, PinError> {
        let mut links = Vec::new();
        for layout in self.layouts()? {
            let folder = self.root.join(layout).join(Kind::Link.folder());
            links.extend(names_in(&folder)?.iter().map(|name| folder.join(name)));
        }
        Ok(links)
    }

    fn of_layout(&self, layout: u32) -> PathBuf {
        self.root.join(layout_name(layout))
    }

    fn is_bpffs(&self) -> bool {
        statfs(&self.root).is_ok_and(|stat| stat.f_type == BPF_FS_MAGIC)
    }
}

/// Detaches a link, whatever process holds it, and removes its name.
///
/// # Errors
///
/// [`PinError::Remove`] if the kernel refuses either.
pub(crate) fn remove_link(path: &Path) -> Result<(), PinError> {
    let failed = |source| PinError::Remove {
        path: path.to_owned(),
        source,
    };
    let link = sys::open_pin(path).map_err(failed)?;
    match sys::link_detach(link.as_fd()) {
        // Links of tracepoints cannot be detached. They end with their last holder, which is the
        // name below.
        Err(error) if error.kind() != io::ErrorKind::Unsupported => Err(failed(error)),
        _ => fs::remove_file(path).map_err(failed),
    }
}

fn remove_all(folder: &Path) -> Result<(), PinError> {
    fs::remove_dir_all(folder).map_err(|source| PinError::Remove {
        path: folder.to_owned(),
        source,
    })
}

fn names_in(folder: &Path) -> Result<Vec<String>, PinError> {
    let failed = |source| PinError::Read {
        path: folder.to_owned(),
        source,
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(failed(source)),
    };
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(failed)?;
    names.sort();
    Ok(names)
}

fn has_key(label: &str, key: &str) -> bool {
    label
        .strip_prefix(key)
        .is_some_and(|rest| rest.starts_with('-'))
}

fn layout_name(layout: u32) -> String {
    format!("{LAYOUT_PREFIX}{layout}")
}

/// `/run/millrace/edge` becomes `/run/millrace/edge.json`.
fn beside(root: &Path, extension: &str) -> PathBuf {
    let mut name = root.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(extension);
    root.with_file_name(name)
}

/// Mount option of the bpffs: without it, every user may make folders in it, as in `/tmp`.
const MODE: Option<&CStr> = Some(c"mode=0700");

const LAYOUT_PREFIX: &str = "layout-";

/// Source under which the edge mounts a bpffs.
const SOURCE: &str = "millrace";

/// The folder of labels, and their keys.
const LABELS: &str = "labels";
const NAMESPACE: &str = "netns";
const BUILD: &str = "build";

/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

#[cfg(test)]
mod tests {
    use super::*;

    // Protects an operator from guessing: each error says what to do.
    #[test]
    fn errors_of_pins_have_a_way_out() {
        let path = || PathBuf::from("/run/millrace/edge");
        let source = |kind: io::ErrorKind| io::Error::from(kind);
        let errors = [
            (
                PinError::Create {
                    path: path(),
                    source: source(io::ErrorKind::ReadOnlyFilesystem),
                },
                "choose another folder",
            ),
            (
                PinError::Read {
                    path: path(),
                    source: source(io::ErrorKind::PermissionDenied),
                },
                "as that user",
            ),
            (
                PinError::Pin {
                    path: path(),
                    source: source(io::ErrorKind::AlreadyExists),
                },
                "remove that",
            ),
            (
                PinError::Remove {
                    path: path(),
                    source: source(io::ErrorKind::NotFound),
                },
                "millrace xdp detach",
            ),
            (
                PinError::Lock {
                    path: path(),
                    source: source(io::ErrorKind::StorageFull),
                },
                "free it",
            ),
            (
                PinError::Create {
                    path: path(),
                    source: io::Error::from_raw_os_error(libc::EBUSY),
                },
                "millrace xdp detach",
            ),
        ];
        for (error, way_out) in errors {
            let text = error.to_string();
            assert!(
                text.contains("/run/millrace/edge") && text.contains(way_out),
                "{text}"
            );
        }
    }
}
