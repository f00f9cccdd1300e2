//! Errors of attaching, adopting, reloading and detaching the edge.

use std::io;
use std::path::PathBuf;

use crate::abi::LAYOUT;
use crate::journal::JournalError;
use crate::load::LoadError;
use crate::maps::MapError;
use crate::netns::NetworkNamespace;
use crate::pins::PinError;
use crate::publish::PublishError;
use crate::selftest::SelfTestError;

/// Why the edge could not be attached, adopted, reloaded or detached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EdgeError {
    /// The programs could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A new program does not pass the self-test, and was not put in force.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    /// Pins could not be read, made or removed.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// The file beside the pins could not be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A map could not be opened.
    #[error(transparent)]
    Maps(#[from] MapError),
    /// A set could not be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The process has no descriptor left for a program.
    #[error("cannot hold a program: {0}; raise the limit of open files (ulimit -n)")]
    Handle(#[source] libbpf_rs::Error),
    /// An edge is attached already.
    #[error("an edge is pinned at {}; detach it (millrace xdp detach), or keep it", .root.display())]
    Present {
        /// The folder of pins.
        root: PathBuf,
    },
    /// No edge is attached.
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
        /// The layout that is there.
        found: String,
    },
    /// A pin is missing.
    #[error("the pins are incomplete: {}: {source}; detach (millrace xdp detach) and attach again", .path.display())]
    Incomplete {
        /// The pin.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The edge is attached in another network namespace.
    #[error("the edge at {} is in another network namespace, {namespace}; give the command there", .root.display())]
    Elsewhere {
        /// The folder of pins.
        root: PathBuf,
        /// The namespace of the attachment.
        namespace: NetworkNamespace,
    },
    /// The pins are in a mount namespace that is not the caller's.
    #[error("the pins of the edge at {} are not visible here; give the command in the mount namespace of process 1 (nsenter --mount=/proc/1/ns/mnt)", .root.display())]
    OutOfSight {
        /// The folder of pins.
        root: PathBuf,
    },
    /// The network namespace has no such interface.
    #[error("no interface {name}: {source}; `ip link` lists the interfaces")]
    Interface {
        /// Its name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// The edge is not attached to this interface.
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
        /// The kernel's error.
        source: io::Error,
    },
    /// A link did not take the new program; all links have their old one.
    #[error("{} does not take the new program: {source}", .path.display())]
    Update {
        /// The link's pin.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Some or all TCP connections that are open already were not counted.
    #[error("cannot count the TCP connections that are open already: {source}")]
    Walk {
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel gives no random bytes.
    #[error("cannot make keys: the kernel gives no random bytes: {source}")]
    Random {
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel does not say which network namespace this is.
    #[error("cannot read the network namespace: {source}; it takes Linux 5.14")]
    Namespace {
        /// The kernel's error.
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
            Self::Journal(error) => error.reason(),
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

/// What the operator can do about a refusal.
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
