//! What may go wrong with a node, by whose fault it is.

use std::error::Error;
use std::fmt;
use std::io;

use millrace_edge_control::ControlError;
use millrace_protocol::id::NodeId;
use millrace_registry::KeyError;
use millrace_shards::socket::SocketError;
use millrace_transport::RouterError;

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The operator's: the config asks for what cannot be.
    #[error("{key}: {reason}")]
    Config {
        /// The key, with its value where that says more.
        key: String,
        /// Why it cannot be.
        reason: String,
    },
    /// The operator's: a key of the config or of a key file.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Another process's: it has what this node needs.
    #[error("{what}")]
    Taken {
        /// What it has, and how to go on.
        what: String,
    },
    /// The system's rules: they do not permit it.
    #[error("{what}: {source}")]
    NotPermitted {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The program's: its services ask for methods that are not free.
    #[error(transparent)]
    Services(#[from] RouterError),
    /// The edge's; it says whose fault that is.
    #[error(transparent)]
    Edge(#[from] ControlError),
    /// The host's: it lacks something, or failed.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: Box<dyn Error + Send + Sync>,
    },
}

impl StartError {
    pub(crate) fn host(
        what: impl fmt::Display,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self::Host {
            what: what.to_string(),
            source: source.into(),
        }
    }

    /// An error of the system about a file, a socket or a thread.
    pub(crate) fn io(what: impl fmt::Display, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::NotPermitted {
                what: what.to_string(),
                source,
            },
            _ => Self::host(what, source),
        }
    }
}

/// Why the transport has no sockets.
pub(crate) fn socket_failed(error: SocketError) -> StartError {
    let what = "the transport did not start";
    match &error {
        SocketError::Bind { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
            StartError::Taken {
                what: format!("{what}: {error}"),
            }
        }
        _ => StartError::host(what, error),
    }
}

/// The peers that were waited for are not up in time. Theirs, or the path's to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotConnected {
    /// Too few are.
    #[error("{up} of {wanted} peers are connected")]
    Few {
        /// Peers that are up.
        up: usize,
        /// Peers that were waited for.
        wanted: usize,
    },
    /// One is not.
    #[error("peer {peer} is not connected")]
    Peer {
        /// The peer.
        peer: NodeId,
    },
}

/// Why a running node cannot do its work now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotReady {
    /// The folder and the peers gave no version that verifies.
    #[error("no registry version is held")]
    NoRegistry,
    /// The newest version has no record of this node, or of its subnet.
    #[error("the registry does not list this node")]
    NotListed,
    /// The subnet has other members; none is connected.
    #[error("no peer is connected")]
    NoPeer,
}
