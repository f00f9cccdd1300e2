//! Interfaces that the edge is attached to, and how.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use serde::{Deserialize, Serialize};

/// Whether the network namespace of the calling thread has an interface of this name.
#[must_use]
pub fn exists(name: &str) -> bool {
    index_of(name).is_ok()
}

/// The number of an interface in the network namespace of the calling thread.
///
/// # Errors
///
/// The kernel's error: most often there is none of this name.
pub fn index_of(name: &str) -> io::Result<u32> {
    Ok(netdevice::name_to_index(any_socket()?, name)?)
}

/// A socket in the network namespace of the calling thread, to ask the kernel by.
pub(crate) fn any_socket() -> io::Result<OwnedFd> {
    let (kind, flags) = (SocketType::DGRAM, SocketFlags::CLOEXEC);
    Ok(socket_with(AddressFamily::INET, kind, flags, None)?)
}

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
