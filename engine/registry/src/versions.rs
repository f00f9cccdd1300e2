//! The registry versions that a node holds, and the members they make: folder and peers in,
//! topology out.
//!
//! 1. Shards never wait for the folder or for a signature check: what they ask for is a copy.
//! 2. Who locks both locks the follower before the names.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use millrace_protocol::address::{HostName, NodeAddress};
use millrace_protocol::id::{NodeId, SubnetId};
use millrace_protocol::identity::PublicKey;
use millrace_protocol::names::{Change, Found, NameStatus, Names, NamesConfig};
use millrace_protocol::registry::{Offered, RegistryError, SignedVersion};
use millrace_protocol::topology::{Member, Topology};

use crate::folder::Follower;
use crate::lookups::Resolver;
use crate::questions::{Offer, Questions};
use crate::wire::{self, Encoded, Newer};

/// What a node knows before it holds a version.
#[derive(Debug, Clone, Default)]
pub struct VersionsConfig {
    /// The node's subnet; none: the subnet that the newest version puts the node in.
    pub subnet: Option<SubnetId>,
    /// Members to ask for the first version.
    pub seeds: Vec<KnownNode>,
    /// Where this node listens: an address for the seeds to know it by.
    pub listen: Vec<SocketAddr>,
    /// Bounds and times of the lookups of names.
    pub names: NamesConfig,
}

/// A node that is known before any version is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownNode {
    /// The key that its certificate must carry.
    pub public_key: PublicKey,
    /// Where it listens, in the order to try.
    pub addresses: Vec<NodeAddress>,
}

/// The versions that a node holds. The registry thread writes; shards and the admin thread read.
#[derive(Debug)]
pub struct Versions {
    me: NodeId,
    /// This node and its seeds: the members before the first version.
    first: Vec<KnownNode>,
    subnet: Option<SubnetId>,
    follower: Mutex<Follower>,
    newest: AtomicU64,
    /// The newest versions, for peers. A copy, because shards read it and must not wait for the
    /// follower, which reads files and checks signatures.
    shared: Mutex<Encoded>,
    questions: Arc<Questions>,
    /// Hosts' names of all held versions and of the seeds.
    names: Mutex<Names>,
}

/// What a node shows of the versions it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Number of the newest version; 0 before the first.
    pub newest: u64,
    /// Records of the newest version that cannot be used.
    pub skipped: u64,
    /// How many versions were refused, by reason.
    pub refused: Vec<(&'static str, u64)>,
    /// How many questions to peers for newer versions failed, by reason.
    pub questions_failed: Vec<(&'static str, u64)>,
    /// The names of hosts that versions and seeds have.
    pub names: Vec<NameStatus>,
    /// Names beyond the bound, which are not looked up.
    pub names_left_out: u64,
}

/// What the registry says about the firewall of a node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FirewallRecords {
    /// The newest version; 0: none is held.
    pub version: u64,
    /// Its `[[firewall]]` tables, in their order.
    pub tables: Vec<toml::Table>,
    /// Addresses of all nodes of all held versions and of the seeds, ascending.
    pub members: Vec<IpAddr>,
    /// The node's subnet, as far as it is known.
    pub subnet: Option<SubnetId>,
}

impl Versions {
    /// The versions of the node with this key; what `follower` holds already counts.
    pub fn new(me: &PublicKey, config: VersionsConfig, follower: Follower) -> Self {
        let mut first = config.seeds;
        if !first.is_empty() {
            first.push(KnownNode {
                public_key: *me,
                addresses: config.listen.into_iter().map(NodeAddress::Ip).collect(),
            });
        }
        let versions = Self {
            me: me.node_id(),
            first,
            subnet: config.subnet,
            follower: Mutex::new(follower),
            newest: AtomicU64::new(0),
            shared: Mutex::default(),
            questions: Arc::default(),
            names: Mutex::new(Names::new(config.names)),
        };
        versions.share(&versions.lock());
        versions
    }

    /// This node.
    pub fn node_id(&self) -> NodeId {
        self.me
    }

    /// Takes what is new in the folder; whether something changed. Reads files: not for shards.
    pub fn poll_folder(&self) -> bool {
        let mut follower = self.lock();
        let changed = follower.poll().changed;
        if changed {
            self.share(&follower);
        }
        changed
    }

    /// Takes a version; whether something changed. Checks a signature: not for shards.
    ///
    /// # Errors
    /// Why the version is refused; it is counted.
    pub fn offer(&self, version: SignedVersion) -> Result<bool, RegistryError> {
        let mut follower = self.lock();
        let offered = follower.offer(version)?;
        let changed = matches!(offered, Offered::Newest { .. });
        if changed {
            self.share(&follower);
        }
        Ok(changed)
    }

    /// Takes an answer that a peer sent, up to its first version that is refused; whether something
    /// changed. Checks signatures: not for shards.
    pub fn take(&self, offer: &Offer) -> bool {
        let peer = offer.peer();
        let Some(versions) = wire::decode(&wire::contiguous(&offer.versions)) else {
            self.questions.count_failed("unreadable");
            tracing::warn!(%peer, "an answer with registry versions cannot be read");
            return false;
        };
        let mut changed = false;
        for version in versions {
            match self.offer(version) {
                Ok(newest) => changed |= newest,
                Err(error) => {
                    // An honest peer sends none that is refused. The rest would cost a signature's
                    // check and a line in the log for each 68 bytes.
                    tracing::warn!(%peer, reason = error.reason(), "registry version refused");
                    break;
                }
            }
        }
        changed
    }

    /// The encoded versions above a number (see [`wire`]): the answer to a peer that holds that
    /// one. A part of one buffer, as long as no newer version comes. For shards.
    pub fn newer_than(&self, number: u64) -> Bytes {
        self.newer(number).bytes
    }

    /// As [`Self::newer_than`], and what a shorter answer is made from.
    pub(crate) fn newer(&self, number: u64) -> Newer {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.newer_than(number)
    }

    /// The questions to peers.
    pub(crate) fn questions(&self) -> &Arc<Questions> {
        &self.questions
    }

    /// Encodes the newest versions for peers, and takes up which names they have.
    fn share(&self, follower: &Follower) {
        let listed = self.listed(follower);
        let hosts = listed.filter_map(|address| match address {
            NodeAddress::Ip(_) => None,
            NodeAddress::Name { host, .. } => Some(host),
        });
        self.names().want(hosts, Instant::now());
        let held: Vec<_> = follower.registry().newer_than(0).collect();
        let encoded = Encoded::of(&held);
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.replace(encoded);
        drop(shared);
        let number = follower.registry().newest_number();
        self.newest.store(number, Ordering::Release);
    }

    /// Number of the newest version; 0 before the first. For shards.
    pub fn newest(&self) -> u64 {
        self.newest.load(Ordering::Acquire)
    }

    /// The members now: those of the subnet, or the seeds before the first version.
    pub fn topology(&self) -> Topology {
        let follower = self.lock();
        match self.subnet_in(&follower) {
            Some(subnet) => {
                let versions = follower.registry().versions_in_use();
                Topology::union(&subnet, versions, &self.names())
            }
            None if follower.registry().newest().is_none() => {
                let names = self.names();
                let first = self.first.iter().map(|node| Member {
                    public_key: node.public_key,
                    addresses: names.resolve(&node.addresses),
                });
                Topology::from_members(first, 0)
            }
            // It has the version that removed this node: the transport ignores an older one.
            None => Topology::from_members([], follower.registry().newest_number()),
        }
    }

    /// What is held, in numbers.
    pub fn summary(&self) -> Summary {
        let follower = self.lock();
        let names = self.names();
        Summary {
            newest: follower.registry().newest_number(),
            skipped: follower
                .registry()
                .newest()
                .map_or(0, |version| version.skipped.len() as u64),
            refused: follower
                .refused()
                .iter()
                .map(|(reason, count)| (*reason, *count))
                .collect(),
            questions_failed: self.questions.failed(),
            names: names.iter().collect(),
            names_left_out: names.left_out(),
        }
    }

    /// What the registry says about this node's firewall.
    pub fn firewall(&self) -> FirewallRecords {
        let follower = self.lock();
        let listed: BTreeSet<NodeAddress> = self.listed(&follower).cloned().collect();
        let names = self.names();
        let members: BTreeSet<IpAddr> = listed
            .iter()
            .flat_map(|address| names.resolve(std::slice::from_ref(address)))
            .map(|address| address.ip())
            .collect();
        drop(names);
        let newest = follower.registry().newest();
        FirewallRecords {
            version: follower.registry().newest_number(),
            tables: newest.map_or_else(Vec::new, |version| version.firewall.clone()),
            members: members.into_iter().collect(),
            subnet: self.subnet_in(&follower),
        }
    }

    /// The configured subnet, or the one of this node's record.
    fn subnet_in(&self, follower: &Follower) -> Option<SubnetId> {
        let newest = follower.registry().newest()?;
        let mine = newest.nodes.iter().find(|node| node.id == self.me);
        self.subnet.or_else(|| mine.map(|node| node.subnet))
    }

    /// All addresses of all held versions, and of the seeds.
    fn listed<'f>(&'f self, follower: &'f Follower) -> impl Iterator<Item = &'f NodeAddress> {
        let nodes = follower
            .registry()
            .versions()
            .flat_map(|version| &version.nodes);
        let seeds = self.first.iter().flat_map(|node| &node.addresses);
        nodes.flat_map(|node| &node.addresses).chain(seeds)
    }

    /// Hosts whose names have a node among these, in the newest version or the seeds.
    pub(crate) fn hosts_of(&self, is_among: impl Fn(&NodeId) -> bool) -> BTreeSet<HostName> {
        let follower = self.lock();
        let newest = follower.registry().newest();
        let nodes = newest.iter().flat_map(|version| &version.nodes);
        let nodes = nodes.map(|node| (node.id, &node.addresses));
        let seeds = self.first.iter();
        let seeds = seeds.map(|node| (node.public_key.node_id(), &node.addresses));
        let is_asked = |(id, _): &(NodeId, _)| is_among(id);
        nodes
            .chain(seeds.filter(|_| newest.is_none()))
            .filter(is_asked)
            .flat_map(|(_, addresses)| addresses)
            .filter_map(|address| match address {
                NodeAddress::Ip(_) => None,
                NodeAddress::Name { host, .. } => Some(host.clone()),
            })
            .collect()
    }

    /// Looks up every name once, one after the other: for a program that runs no thread.
    pub fn resolve_all(&self, resolver: &dyn Resolver) {
        let count = self.names().iter().count();
        // Not until none is due: one that fails is due again while the others are looked up.
        for _ in 0..count {
            let next = self.names().next_lookup(Instant::now());
            let Some(host) = next else { return };
            let found = resolver.lookup(&host);
            self.looked_up(&host, found);
        }
    }

    /// Takes the end of a lookup; whether the addresses are others than before.
    pub(crate) fn looked_up(&self, host: &HostName, found: Result<Found, String>) -> bool {
        let ended = self.names().ended(host, found, Instant::now());
        if let Some(change) = ended.change {
            tell(host, &change);
        }
        ended.is_new
    }

    /// The names, for the thread that keeps them fresh.
    pub(crate) fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Follower> {
        self.follower.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Logs that the state of a name is another than before.
pub(crate) fn tell(host: &HostName, change: &Change) {
    match change {
        Change::Failing { reason, kept } => {
            tracing::warn!(%host, reason, kept, "a node's name does not resolve; the addresses kept stay in use");
        }
        Change::Resolved => tracing::info!(%host, "a node's name resolves again"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use millrace_protocol::identity::SigningKey;
    use millrace_protocol::registry::RegistryConfig;

    use super::*;
    use crate::{Draft, keys};

    fn versions(key: &SigningKey, me: &PublicKey) -> Versions {
        let follower = Follower::new(None, key.public_key(), RegistryConfig::default());
        Versions::new(me, VersionsConfig::default(), follower)
    }

    /// Protects the removal of this node itself: the transport ignores a topology that is older
    /// than the one in force, and the empty one of a removed node must not count as older.
    #[test]
    fn the_empty_topology_of_a_removed_node_has_the_version_that_removed_it() {
        let key = keys::generate().unwrap();
        let nodes = [0, 1].map(|n| {
            let address: SocketAddr = ([127, 0, 0, 1], 4100 + n).into();
            (keys::generate().unwrap().public_key(), address)
        });
        let versions = versions(&key, &nodes[0].0);
        let first = Draft::with_nodes("test", &nodes).unwrap();
        assert!(versions.offer(first.sign(&key).unwrap()).unwrap());
        let both = versions.topology();
        assert_eq!((both.len(), both.newest_version()), (2, 1));

        let mut second = Draft::after(first.version().clone());
        second.remove_node(versions.node_id()).unwrap();
        assert!(versions.offer(second.sign(&key).unwrap()).unwrap());
        let none = versions.topology();
        assert_eq!((none.len(), none.newest_version()), (0, 2));
    }

    /// Protects the thread that checks signatures from an answer of many refused versions.
    #[test]
    fn an_answer_ends_at_its_first_refusal() {
        let [key, other] = [0, 1].map(|_| keys::generate().unwrap());
        let versions = versions(&key, &other.public_key());
        let draft = Draft::first("test").unwrap();
        let [good, bad] = [&key, &other].map(|key| draft.sign(key).unwrap());
        let take = |answer: &[&SignedVersion]| {
            let question = versions.questions().ask(versions.node_id()).unwrap();
            let answer = wire::encode(answer.iter().copied());
            versions.take(&Offer::new(question, answer.into()))
        };
        assert!(!take(&[&bad, &bad, &good]));
        let refused: u64 = versions
            .summary()
            .refused
            .iter()
            .map(|(_, count)| count)
            .sum();
        assert_eq!((versions.newest(), refused), (0, 1));
        assert!(take(&[&good, &bad]));
        assert_eq!(versions.newest(), 1);
    }
}
