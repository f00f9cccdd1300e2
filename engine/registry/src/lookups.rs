//! Lookups of hosts' names: a thread for each, because the host's resolver blocks.
//!
//! 1. At most `NamesConfig::lookups_max` threads exist. A shard never waits for one.
//! 2. A thread holds a name and the way to report its addresses, nothing else of the node. The host
//!    cannot end a lookup, so one that hangs may outlive the node by as long as the host's resolver
//!    waits for its servers.

use std::fmt::Debug;
use std::io;
use std::net::ToSocketAddrs;
use std::sync::Arc;

use millrace_protocol::address::HostName;
use millrace_protocol::names::Found;

/// Says what names stand for.
pub trait Resolver: Debug + Send + Sync {
    /// Addresses of a host, the best first, and how long they hold. May block.
    ///
    /// # Errors
    /// Why there are none, in words for the operator.
    fn lookup(&self, host: &HostName) -> Result<Found, String>;
}

/// The host's own resolver (getaddrinfo): its hosts file, its name services, its search domains. It
/// tells no time to live.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostResolver;

impl Resolver for HostResolver {
    fn lookup(&self, host: &HostName) -> Result<Found, String> {
        // The port is no part of the question.
        let found = (host.as_str(), 0).to_socket_addrs();
        let found = found.map_err(|error| error.to_string())?;
        Ok(Found {
            addresses: found.map(|address| address.ip()).collect(),
            ttl: None,
        })
    }
}

/// Looks up `host` on a thread of its own, which ends with `report`.
pub(crate) fn start(
    resolver: &Arc<dyn Resolver>,
    host: HostName,
    report: impl FnOnce(HostName, Result<Found, String>) + Send + 'static,
) -> io::Result<()> {
    let resolver = Arc::clone(resolver);
    let run = move || {
        let found = resolver.lookup(&host);
        report(host, found);
    };
    let thread = std::thread::Builder::new().name("millrace-lookup".into());
    // It ends by itself: see the module's second invariant.
    thread.spawn(run).map(drop)
}
