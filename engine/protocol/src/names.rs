//! The names of nodes' hosts: what they stand for, and when to look each up again.
//!
//! The shell asks the host's resolver, off the shards, and reports what it said. After every input,
//! drain [`Names::next_lookup`], and call [`Names::handle_timeout`] at [`Names::poll_timeout`].
//!
//! 1. A name keeps the addresses of its last good lookup until another one gives others; a failed
//!    lookup changes nothing but the state.
//! 2. A lookup begins when the last one's time is over: the time to live that the resolver told, at
//!    most `interval`. A name that failed, or whose node is not connected, is looked up every
//!    `retry_interval`.
//! 3. At most `lookups_max` lookups are under way, one of a name that stays wanted. One that takes
//!    longer than `lookup_timeout` counts as failed; it is under way until it ends, because no host
//!    can end it.
//! 4. Names, and addresses of a name, are bounded: see [`NamesConfig`].

use crate::address::{HostName, NodeAddress};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

/// Bounds and times of [`Names`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamesConfig {
    /// Names held; those beyond are counted and never looked up.
    pub names_max: usize,
    /// Addresses kept of one name, in the resolver's order.
    pub addresses_max: usize,
    /// Lookups under way at once: each takes a thread.
    pub lookups_max: usize,
    /// Longest time between two lookups of a name.
    pub interval: Duration,
    /// Shortest time between two lookups of a name.
    pub retry_interval: Duration,
    /// When a lookup counts as failed.
    pub lookup_timeout: Duration,
}

impl Default for NamesConfig {
    fn default() -> Self {
        Self {
            // A registry version of 1 MiB has about 3,000 nodes.
            names_max: 4_096,
            // As many as a node may list.
            addresses_max: 8,
            lookups_max: 4,
            interval: Duration::from_secs(60),
            retry_interval: Duration::from_secs(5),
            // A resolver library gives a silent server 5 s.
            lookup_timeout: Duration::from_secs(5),
        }
    }
}

/// What a lookup found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Addresses, the best first.
    pub addresses: Vec<IpAddr>,
    /// How long they hold; none when the resolver does not say.
    pub ttl: Option<Duration>,
}

/// A change of a name's state: one line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The first lookup after the last success failed.
    Failing {
        /// Why.
        reason: String,
        /// Addresses that stay in use.
        kept: usize,
    },
    /// The first success after a failure.
    Resolved,
}

/// What a lookup's end meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// The addresses are others than before, in any order.
    pub is_new: bool,
    /// The state is another than before.
    pub change: Option<Change>,
}

/// A name as `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameStatus {
    /// The name.
    pub host: HostName,
    /// What it stands for, as far as is known.
    pub addresses: Vec<IpAddr>,
    /// Why its last lookup failed; none after a success, and before the first end.
    pub failure: Option<String>,
}

/// The names of one registry.
#[derive(Clone, Debug, Default)]
pub struct Names {
    config: NamesConfig,
    names: BTreeMap<HostName, Name>,
    /// Lookups that have not ended, those of names that are wanted no more included.
    under_way: usize,
    left_out: u64,
}

#[derive(Clone, Debug)]
struct Name {
    addresses: Vec<IpAddr>,
    failure: Option<String>,
    /// A node of it is not connected.
    is_urgent: bool,
    /// When the last lookup began, while it is under way; and whether it counts as failed.
    began: Option<(Instant, bool)>,
    /// Earliest and latest time of the next lookup.
    soonest: Instant,
    latest: Instant,
}

impl Name {
    fn due(&self) -> Option<Instant> {
        let is_early = self.is_urgent || self.failure.is_some();
        let at = if is_early { self.soonest } else { self.latest };
        self.began.is_none().then_some(at)
    }

    fn fail(&mut self, reason: String) -> Option<Change> {
        let kept = self.addresses.len();
        let is_first = self.failure.replace(reason.clone()).is_none();
        is_first.then_some(Change::Failing { reason, kept })
    }
}

impl Names {
    /// A machine without names.
    pub fn new(config: NamesConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// Sets which names are looked up; what is known of others is forgotten.
    pub fn want<'a>(&mut self, hosts: impl IntoIterator<Item = &'a HostName>, now: Instant) {
        let wanted: BTreeSet<&HostName> = hosts.into_iter().collect();
        self.names.retain(|host, _| wanted.contains(host));
        self.left_out = 0;
        for host in wanted {
            if self.names.contains_key(host) {
                continue;
            }
            if self.names.len() >= self.config.names_max {
                self.left_out += 1;
                continue;
            }
            let name = Name {
                addresses: Vec::new(),
                failure: None,
                is_urgent: false,
                began: None,
                soonest: now,
                latest: now,
            };
            self.names.insert(host.clone(), name);
        }
    }

    /// Tells whose nodes are not connected: they may be elsewhere by now.
    pub fn set_urgent(&mut self, is_urgent: impl Fn(&HostName) -> bool) {
        for (host, name) in &mut self.names {
            name.is_urgent = is_urgent(host);
        }
    }

    /// The next name to look up; the shell reports the end by [`Self::ended`].
    pub fn next_lookup(&mut self, now: Instant) -> Option<HostName> {
        if self.under_way >= self.config.lookups_max {
            return None;
        }
        let due = |(host, name): (&HostName, &Name)| Some((name.due()?, host.clone()));
        let (at, host) = self.names.iter().filter_map(due).min()?;
        let name = self.names.get_mut(&host).filter(|_| at <= now)?;
        name.began = Some((now, false));
        self.under_way += 1;
        Some(host)
    }

    /// Takes the end of a lookup that [`Self::next_lookup`] began.
    pub fn ended(&mut self, host: &HostName, found: Result<Found, String>, now: Instant) -> Ended {
        self.under_way = self.under_way.saturating_sub(1);
        let config = self.config;
        // One that was wanted no more, and is again, may have a lookup of its own by now: two say
        // the same.
        let Some(name) = self.names.get_mut(host) else {
            return Ended::default();
        };
        name.began = None;
        name.soonest = now + config.retry_interval;
        name.latest = now + config.interval;
        let (addresses, ttl) = match found.map(|found| (usable(&found, &config), found.ttl)) {
            Ok((addresses, ttl)) if !addresses.is_empty() => (addresses, ttl),
            Ok(_) => return Ended::failed(name.fail("it has no address".into())),
            Err(reason) => return Ended::failed(name.fail(reason)),
        };
        if let Some(ttl) = ttl {
            name.latest = now + ttl.clamp(config.retry_interval, config.interval);
        }
        let sorted = |addresses: &[IpAddr]| BTreeSet::from_iter(addresses.iter().copied());
        // A resolver that turns the order from answer to answer has nothing new to say.
        let is_new = sorted(&name.addresses) != sorted(&addresses);
        if is_new {
            name.addresses = addresses;
        }
        let change = name.failure.take().map(|_| Change::Resolved);
        Ended { is_new, change }
    }

    /// Counts lookups that take too long as failed; gives those that do since the last call.
    pub fn handle_timeout(&mut self, now: Instant) -> Vec<(HostName, Change)> {
        let timeout = self.config.lookup_timeout;
        let mut changes = Vec::new();
        for (host, name) in &mut self.names {
            if let Some((began, false)) = name.began
                && began + timeout <= now
            {
                name.began = Some((began, true));
                let change = name.fail(format!("no answer within {} s", timeout.as_secs()));
                changes.extend(change.map(|change| (host.clone(), change)));
            }
        }
        changes
    }

    /// When there is something to do; none while no name is wanted.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let has_room = self.under_way < self.config.lookups_max;
        let of = |name: &Name| match name.began {
            Some((began, false)) => Some(began + self.config.lookup_timeout),
            Some((_, true)) => None,
            None => name.due().filter(|_| has_room),
        };
        self.names.values().filter_map(of).min()
    }

    /// The addresses that a node's list stands for now, in its order; each once.
    pub fn resolve(&self, listed: &[NodeAddress]) -> Vec<SocketAddr> {
        let mut resolved = Vec::with_capacity(listed.len());
        for address in listed {
            let (ips, port) = match address {
                NodeAddress::Ip(address) => (&[address.ip()][..], address.port()),
                NodeAddress::Name { host, port } => {
                    let name = self.names.get(host);
                    (name.map_or(&[][..], |name| &name.addresses), *port)
                }
            };
            for ip in ips {
                let address = SocketAddr::new(*ip, port);
                if !resolved.contains(&address) {
                    resolved.push(address);
                }
            }
        }
        resolved
    }

    /// All names, in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = NameStatus> {
        self.names.iter().map(|(host, name)| NameStatus {
            host: host.clone(),
            addresses: name.addresses.clone(),
            failure: name.failure.clone(),
        })
    }

    /// Names beyond `names_max`, which are not looked up.
    pub fn left_out(&self) -> u64 {
        self.left_out
    }
}

impl Ended {
    fn failed(change: Option<Change>) -> Self {
        Self {
            is_new: false,
            change,
        }
    }
}

/// The addresses that can be dialled, up to the bound, in the form in which a registry would say
/// them.
fn usable(found: &Found, config: &NamesConfig) -> Vec<IpAddr> {
    let mut usable = Vec::new();
    for ip in found.addresses.iter().map(IpAddr::to_canonical) {
        let is_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let is_host = !is_local && !ip.is_unspecified() && !ip.is_multicast();
        if is_host && !usable.contains(&ip) && usable.len() < config.addresses_max {
            usable.push(ip);
        }
    }
    usable
}

#[cfg(test)]
mod tests;
