//! What may go wrong with a node, by whose fault it is.

use std::error::Error;
use std::fmt;
use std::io;
use std::ops::RangeInclusive;

use millrace_edge_control::ControlError;
use millrace_protocol::frame::Method;
use millrace_protocol::id::NodeId;
use millrace_registry::KeyError;
use millrace_shards::runtime::StartError as ShardError;
use millrace_shards::socket::SocketError;
use millrace_transport::{RouterError, StartError as TransportError};

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
    /// The program's: a service asks for methods that are reserved for the node's own services.
    #[error(
        "methods {}..={} of a service are reserved for the node; fix: give it methods from {} on",
        .methods.start().0, .methods.end().0, .first_free.0
    )]
    ReservedMethods {
        /// What the service asks for.
        methods: RangeInclusive<Method>,
        /// The first method that is free.
        first_free: Method,
    },
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

const NO_TRANSPORT: &str = "the transport did not start";

/// Why the transport did not start.
pub(crate) fn transport_failed(error: TransportError) -> StartError {
    match error {
        TransportError::NoShards => StartError::Config {
            key: "shards.cores".to_owned(),
            reason: error.to_string(),
        },
        TransportError::Socket(error) => socket_failed(error),
        TransportError::Services(error) => error.into(),
        TransportError::Shard { source, .. }
            if matches!(source, ShardError::CpuNotAllowed { .. }) =>
        {
            StartError::Config {
                key: "shards.cores".to_owned(),
                reason: source.to_string(),
            }
        }
        error => StartError::host(NO_TRANSPORT, error),
    }
}

/// Why the transport has no sockets.
pub(crate) fn socket_failed(error: SocketError) -> StartError {
    let text = error.to_string();
    match error {
        SocketError::Shards { .. } => StartError::Config {
            key: "shards.cores".to_owned(),
            reason: text,
        },
        SocketError::Bind { addr, source } => match source.kind() {
            io::ErrorKind::AddrInUse => StartError::Taken {
                what: format!("{NO_TRANSPORT}: {text}"),
            },
            io::ErrorKind::AddrNotAvailable => StartError::Config {
                key: format!("listen.address = \"{addr}\""),
                reason: format!("no interface of this host has the address: {source}"),
            },
            _ => StartError::io(format_args!("cannot bind {addr}"), source),
        },
        SocketError::Create { ref source } | SocketError::Option { ref source, .. }
            if source.kind() == io::ErrorKind::PermissionDenied =>
        {
            StartError::NotPermitted {
                what: NO_TRANSPORT.to_owned(),
                source: io::Error::new(io::ErrorKind::PermissionDenied, error),
            }
        }
        error => StartError::host(NO_TRANSPORT, error),
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
    /// A shard's thread has ended by a panic, most likely in a service.
    #[error("shard {shard} has ended; fix: restart the node, its log says why")]
    ShardEnded {
        /// The shard.
        shard: usize,
    },
    /// The node was asked to stop, or has stopped.
    #[error("the node stops")]
    Stopping,
    /// The registry folder was there and cannot be read, or hangs.
    #[error("the registry folder cannot be read; status says why")]
    RegistryFolder,
    /// The folder and the peers gave no version that verifies.
    #[error("no registry version is held")]
    NoRegistry,
    /// The node's record names TLS keys, and none of them has a secret half here.
    #[error("the registry names other TLS keys for this node than it has; status says which")]
    NoTlsKey,
    /// The newest version has no record of this node, or of its subnet.
    #[error("the registry does not list this node")]
    NotListed,
    /// The subnet has other members; none is connected.
    #[error("no peer is connected")]
    NoPeer,
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn errno(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    fn bind(code: i32) -> SocketError {
        SocketError::Bind {
            addr: SocketAddr::from(([192, 0, 2, 1], 443)),
            source: errno(code),
        }
    }

    fn fault(error: &StartError) -> &'static str {
        match error {
            StartError::Config { .. } => "config",
            StartError::Taken { .. } => "other process",
            StartError::NotPermitted { .. } => "permission",
            StartError::Host { .. } => "host",
            _ => "other",
        }
    }

    /// Protects exit codes, and operators who read them: `millrace` makes the code from the fault.
    #[test]
    fn each_failure_of_the_sockets_says_whose_fault_it_is() {
        // Errno: EPERM 1, ENOMEM 12, EACCES 13, EMFILE 24, EADDRINUSE 98, EADDRNOTAVAIL 99.
        let option = |code| SocketError::Option {
            option: "SO_RCVBUF",
            source: errno(code),
        };
        let create = |code| SocketError::Create {
            source: errno(code),
        };
        let table = [
            (bind(98), "other process", "192.0.2.1:443"),
            (bind(99), "config", "listen.address = \"192.0.2.1:443\""),
            (bind(13), "permission", "192.0.2.1:443"),
            (bind(1), "permission", "192.0.2.1:443"),
            (bind(12), "host", "192.0.2.1:443"),
            (
                SocketError::Shards { shards: 300 },
                "config",
                "shards.cores",
            ),
            (create(24), "host", "open files"),
            (create(13), "permission", "UDP socket"),
            (option(12), "host", "SO_RCVBUF"),
            (option(1), "permission", "SO_RCVBUF"),
        ];
        for (error, wanted, part) in table {
            let shown = format!("{error:?}");
            let failed = transport_failed(TransportError::Socket(error));
            assert_eq!(fault(&failed), wanted, "{shown}");
            assert!(failed.to_string().contains(part), "{failed}");
        }
    }

    /// Protects the operator from a key that no config has.
    #[test]
    fn an_error_of_the_config_names_a_key_that_exists() {
        let default = millrace_tuning::NodeConfig::default();
        let source = ShardError::CpuNotAllowed {
            cpu: 99,
            allowed: vec![0],
        };
        let no_core = transport_failed(TransportError::Shard { shard: 0, source });
        assert!(
            no_core.to_string().starts_with("shards.cores: "),
            "{no_core}"
        );
        let no_shards = transport_failed(TransportError::NoShards);
        assert!(
            no_shards.to_string().starts_with("shards.cores: "),
            "{no_shards}"
        );
        // The keys that are named above.
        let _ = (
            &default.shards.cores,
            &default.listen.address,
            &default.admin.socket,
        );
    }
}
