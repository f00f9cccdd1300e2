//! What can go wrong with programs, pins and links.

use std::io;
use std::path::PathBuf;

/// Why pins could not be read, made or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PinError {
    /// The folder is no bpffs, and none could be mounted there.
    #[error("cannot mount a bpffs at {}: {source}; it takes CAP_SYS_ADMIN, or mount one there before", .path.display())]
    Mount {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A folder could not be made.
    #[error("cannot make {}: {source}", .path.display())]
    Create {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A folder or a pin could not be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The folder or the pin.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// An object could not be pinned.
    #[error("cannot pin {}: {source}", .path.display())]
    Pin {
        /// The name that it should have.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A pin could not be removed, or its link not detached.
    #[error("cannot remove {}: {source}", .path.display())]
    Remove {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file that guards the pins could not be made.
    #[error("cannot lock {}: {source}", .path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
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
            Self::Create { .. } => "pin_create",
            Self::Read { .. } => "pin_read",
            Self::Pin { .. } => "pin_pin",
            Self::Remove { .. } => "pin_remove",
            Self::Lock { .. } => "pin_lock",
            Self::Busy { .. } => "pin_busy",
        }
    }
}
