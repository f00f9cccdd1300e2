//! What can go wrong with programs, pins and links.

use std::io;
use std::path::PathBuf;

use crate::abi::LAYOUT;
use crate::load::LoadError;
use crate::maps::MapError;
use crate::netns::NetworkNamespace;
use crate::publish::PublishError;
use crate::selftest::SelfTestError;
use crate::state::StateError;

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
    /// The bpffs there is seen in this mount namespace alone, and would end with it.
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
        /// What the kernel said.
        source: io::Error,
    },
    /// A folder or a pin could not be read.
    #[error("cannot read {}: {source}{}", .path.display(), way_out(.source))]
    Read {
        /// The folder or the pin.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// An object could not be pinned.
    #[error("cannot pin {}: {source}{}", .path.display(), way_out(.source))]
    Pin {
        /// The name that it should have.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A pin could not be removed, or its link not detached.
    #[error("cannot remove {}: {source}{}", .path.display(), way_out(.source))]
    Remove {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file that guards the pins could not be made.
    #[error("cannot lock {}: {source}{}", .path.display(), way_out(.source))]
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

/// Why the edge could not be attached, adopted, reloaded or detached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EdgeError {
    /// The programs could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A new program does not decide as it should; it was not put in force.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    /// Pins could not be read, made or removed.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// The file beside the pins could not be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// A map could not be opened.
    #[error(transparent)]
    Maps(#[from] MapError),
    /// A set could not be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// There is no descriptor left for a program.
    #[error("cannot hold a program: {0}; raise the limit of open files (ulimit -n)")]
    Handle(#[source] libbpf_rs::Error),
    /// Something is attached already.
    #[error("an edge is pinned at {}; detach it (millrace xdp detach), or go on with it", .root.display())]
    Present {
        /// The folder of pins.
        root: PathBuf,
    },
    /// Nothing is attached.
    #[error("no edge is pinned at {}; attach first (millrace xdp attach)", .root.display())]
    Absent {
        /// The folder of pins.
        root: PathBuf,
    },
    /// Another version of this program has pinned other maps.
    #[error("{} holds {found}, this program knows layout {LAYOUT}; detach (millrace xdp detach) and attach again", .root.display())]
    Layout {
        /// The folder of pins.
        root: PathBuf,
        /// What is there.
        found: String,
    },
    /// Something that was pinned is missing.
    #[error("the pins are incomplete: {}: {source}; detach (millrace xdp detach) and attach again", .path.display())]
    Incomplete {
        /// What is missing.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is attached in another network namespace.
    #[error("the edge at {} is in another network namespace, {namespace}; give the command there", .root.display())]
    Elsewhere {
        /// The folder of pins.
        root: PathBuf,
        /// Where it is.
        namespace: NetworkNamespace,
    },
    /// Its pins are in a mount namespace that is not the caller's.
    #[error("the pins of the edge at {} are out of sight here; give the command in the mount namespace of process 1 (nsenter --mount=/proc/1/ns/mnt)", .root.display())]
    OutOfSight {
        /// The folder of pins.
        root: PathBuf,
    },
    /// There is no such interface.
    #[error("no interface {name}: {source}; `ip link` shows those that there are")]
    Interface {
        /// Its name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not attached to such an interface.
    #[error("the edge is not attached to {name}")]
    NotAttached {
        /// Its name.
        name: String,
    },
    /// The kernel refuses to attach.
    #[error("cannot attach {program} to {place}: {source}{}", hint(.source))]
    Attach {
        /// The program.
        program: &'static str,
        /// The interface or the tracepoint.
        place: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A link did not take the new program; all have their old one.
    #[error("{} does not take the new program: {source}", .path.display())]
    Update {
        /// The link's pin.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// TCP connections that are open already were not counted, or not all.
    #[error("cannot count the TCP connections that are open already: {source}")]
    Walk {
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel gives no random bytes.
    #[error("cannot make keys: the kernel gives no random bytes: {source}")]
    Random {
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel does not say which network namespace this is.
    #[error("cannot tell the network namespace: {source}; it takes Linux 5.14")]
    Namespace {
        /// What the kernel said.
        source: io::Error,
    },
}

impl EdgeError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Load(_) => "load",
            Self::SelfTest(_) => "self_test",
            Self::Pins(error) => error.reason(),
            Self::State(error) => error.reason(),
            Self::Maps(_) => "maps",
            Self::Publish(error) => error.reason(),
            Self::Handle(_) => "handle",
            Self::Present { .. } => "present",
            Self::Absent { .. } => "absent",
            Self::Layout { .. } => "layout",
            Self::Incomplete { .. } => "incomplete",
            Self::Elsewhere { .. } => "elsewhere",
            Self::OutOfSight { .. } => "out_of_sight",
            Self::Interface { .. } => "interface",
            Self::NotAttached { .. } => "not_attached",
            Self::Attach { .. } => "attach",
            Self::Update { .. } => "update",
            Self::Walk { .. } => "walk",
            Self::Random { .. } => "random",
            Self::Namespace { .. } => "namespace",
        }
    }
}

/// What an operator can do about a file or a pin.
fn way_out(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            "; it belongs to whoever attached: run the command as that user (as a rule root), with CAP_BPF and CAP_NET_ADMIN"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::ReadOnlyFilesystem => {
            "; the file system there is full or read-only: free it, or choose another folder for pins in [edge]"
        }
        io::ErrorKind::NotFound => {
            "; somebody removed it meanwhile: `millrace xdp detach` clears away what is left"
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "; something else is in its place: remove that, or choose another folder for pins in [edge]"
        }
        _ => "; `millrace xdp detach` takes away what is there",
    }
}

/// What an operator can do about a refusal.
fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::ResourceBusy | io::ErrorKind::AlreadyExists => {
            "; another program is attached there: see `ip link`, and detach it first"
        }
        io::ErrorKind::PermissionDenied => "; it takes CAP_BPF and CAP_NET_ADMIN",
        io::ErrorKind::Unsupported => "; the driver has no native XDP: use mode generic",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Protects an operator from guessing: each of them says what to do.
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
