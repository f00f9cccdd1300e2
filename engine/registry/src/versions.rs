//! The registry versions that a node holds, and the members they make: folder and peers in,
//! topology out.
//!
//! 1. Shards never wait for a file or for a signature check: what they ask for is a copy. Nor do
//!    threads that answer an operator: `held` is locked for no file.
//! 2. The newest version that the node has seen is on disk before it is in force, and no older one
//!    is taken after that, also not by a later run. A version that cannot be written waits; what is
//!    in force stays.
//! 3. Locks are taken in this order: `intake`, `held`, `names`.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use millrace_protocol::address::{HostName, NodeAddress};
use millrace_protocol::id::{NodeId, SubnetId};
use millrace_protocol::identity::PublicKey;
use millrace_protocol::names::{Change, Found, NameStatus, Names, NamesConfig};
use millrace_protocol::registry::RegistryConfig;
use millrace_protocol::tls_keys::TlsKeys;
use millrace_protocol::topology::{Member, Topology};

use crate::held::Held;
use crate::intake::Intake;
use crate::lookups::Resolver;
use crate::questions::Questions;
use crate::reader::FolderReader;
use crate::sources::Sources;
use crate::wire::{Encoded, Newer};

mod taking;

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
    /// Its identity key.
    pub public_key: PublicKey,
    /// The keys that its certificate may carry.
    pub tls_keys: TlsKeys,
    /// Where it listens, in the order to try.
    pub addresses: Vec<NodeAddress>,
}

/// The versions that a node holds. The registry's threads write; shards and the admin thread read.
#[derive(Debug)]
pub struct Versions {
    me: NodeId,
    /// This node and its seeds: the members before the first version.
    first: Vec<KnownNode>,
    subnet: Option<SubnetId>,
    key: PublicKey,
    config: RegistryConfig,
    folder: Option<Arc<FolderReader>>,
    /// Held while a version is written and put in force.
    intake: Mutex<Intake>,
    held: Mutex<Held>,
    newest: AtomicU64,
    /// Peers are asked for versions above this number.
    known: AtomicU64,
    /// The newest versions, for peers. A copy, because shards read it and must not wait for what is
    /// counted and looked up under the lock of `held`.
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
    /// How long ago the node saw the newest version first, in this run or an earlier one, by the
    /// host's clock; none before the first version.
    pub age: Option<Duration>,
    /// How many writes of the newest version failed.
    pub writes_failed: u64,
    /// Why the newest version is not kept for the next run, or that of an earlier run cannot be
    /// read. A version that could not be written is not in force.
    pub kept_failure: Option<String>,
    /// Why the registry folder cannot be read.
    pub folder_failure: Option<String>,
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
    /// The versions of the node with this key: at first the one that is kept.
    pub fn new(me: &PublicKey, config: VersionsConfig, mut sources: Sources) -> Self {
        let mut first = config.seeds;
        if !first.is_empty() {
            first.push(KnownNode {
                public_key: *me,
                tls_keys: TlsKeys::one(*me),
                addresses: config.listen.into_iter().map(NodeAddress::Ip).collect(),
            });
        }
        let held = Held::of_earlier_run(&mut sources);
        let reader = |dir| FolderReader::new(dir, sources.key, sources.config);
        let folder = sources.folder.take().map(reader);
        let versions = Self {
            me: me.node_id(),
            first,
            subnet: config.subnet,
            key: sources.key,
            config: sources.config,
            folder: folder.map(Arc::new),
            intake: Mutex::new(Intake::new(sources.kept, held.registry.newest_number())),
            held: Mutex::new(held),
            newest: AtomicU64::new(0),
            known: AtomicU64::new(0),
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

    /// The folder, for the thread that reads it.
    pub(crate) fn folder(&self) -> Option<&Arc<FolderReader>> {
        self.folder.as_ref()
    }

    /// The number above which peers are asked for versions: those up to it are held, or too old.
    /// For shards.
    pub(crate) fn known(&self) -> u64 {
        self.known.load(Ordering::Acquire)
    }

    /// The encoded versions above a number (`wire.rs`): the answer to a peer that holds that
    /// one. A part of one buffer, as long as no newer version comes. For shards.
    pub fn newer_than(&self, number: u64) -> Bytes {
        self.newer(number).bytes
    }

    /// As [`Self::newer_than`], and what a shorter answer is made from.
    pub(crate) fn newer(&self, number: u64) -> Newer {
        lock(&self.shared).newer_than(number)
    }

    /// The questions to peers.
    pub(crate) fn questions(&self) -> &Arc<Questions> {
        &self.questions
    }

    /// Encodes the newest versions for peers, and takes up which names they have.
    fn share(&self, held: &Held) {
        let listed = self.listed(held);
        let hosts = listed.filter_map(|address| match address {
            NodeAddress::Ip(_) => None,
            NodeAddress::Name { host, .. } => Some(host),
        });
        self.names().want(hosts, Instant::now());
        let all: Vec<_> = held.registry.newer_than(0).collect();
        let encoded = Encoded::of(&all);
        let mut shared = lock(&self.shared);
        shared.replace(encoded);
        drop(shared);
        let number = held.registry.newest_number();
        self.newest.store(number, Ordering::Release);
        // Of an earlier run the number may be known, and the version not: that is asked for, too.
        let known = number.max(held.registry.number_min().saturating_sub(1));
        self.known.store(known, Ordering::Release);
    }

    /// Number of the newest version; 0 before the first. For shards.
    pub fn newest(&self) -> u64 {
        self.newest.load(Ordering::Acquire)
    }

    /// The members now: those of the subnet, or the seeds before the first version.
    pub fn topology(&self) -> Topology {
        let held = self.lock();
        match self.subnet_in(&held) {
            Some(subnet) => {
                let versions = held.registry.versions_in_use();
                Topology::union(&subnet, versions, &self.names())
            }
            None if held.registry.newest().is_none() => {
                let names = self.names();
                let first = self.first.iter().map(|node| Member {
                    public_key: node.public_key,
                    tls_keys: node.tls_keys,
                    addresses: names.resolve(&node.addresses),
                });
                Topology::from_members(first, 0)
            }
            // It has the version that removed this node: the transport ignores an older one.
            None => Topology::from_members([], held.registry.newest_number()),
        }
    }

    /// Why the registry folder cannot be read; none if it can, or there is none.
    pub fn folder_failure(&self) -> Option<String> {
        self.folder.as_ref()?.failure()
    }

    /// Logs how old the newest version is, unless this node has no other members to ask.
    pub(crate) fn tell_alone(&self) {
        let members = self.topology().len();
        let held = self.lock();
        let (number, age) = (held.registry.newest_number(), held.age());
        drop(held);
        let age_s = age.map(|age| age.as_secs());
        if members != 1 {
            tracing::warn!(
                number,
                age_s,
                "no peer is connected: none can tell whether the registry has a newer version"
            );
        }
    }

    /// What is held, in numbers.
    pub fn summary(&self) -> Summary {
        let held = self.lock();
        let names = self.names();
        Summary {
            newest: held.registry.newest_number(),
            age: held.age(),
            writes_failed: held.writes_failed,
            kept_failure: held.kept_failure.clone(),
            folder_failure: self.folder_failure(),
            skipped: held
                .registry
                .newest()
                .map_or(0, |version| version.skipped.len() as u64),
            refused: held
                .refused
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
        let held = self.lock();
        let listed: BTreeSet<NodeAddress> = self.listed(&held).cloned().collect();
        let names = self.names();
        let members: BTreeSet<IpAddr> = listed
            .iter()
            .flat_map(|address| names.resolve(std::slice::from_ref(address)))
            .map(|address| address.ip())
            .collect();
        drop(names);
        let newest = held.registry.newest();
        FirewallRecords {
            version: held.registry.newest_number(),
            tables: newest.map_or_else(Vec::new, |version| version.firewall.clone()),
            members: members.into_iter().collect(),
            subnet: self.subnet_in(&held),
        }
    }

    /// The configured subnet, or the one of this node's record.
    fn subnet_in(&self, held: &Held) -> Option<SubnetId> {
        let newest = held.registry.newest()?;
        let mine = newest.nodes.iter().find(|node| node.id == self.me);
        self.subnet.or_else(|| mine.map(|node| node.subnet))
    }

    /// All addresses of all held versions, and of the seeds.
    fn listed<'f>(&'f self, held: &'f Held) -> impl Iterator<Item = &'f NodeAddress> {
        let nodes = held.registry.versions().flat_map(|version| &version.nodes);
        let seeds = self.first.iter().flat_map(|node| &node.addresses);
        nodes.flat_map(|node| &node.addresses).chain(seeds)
    }

    /// Hosts whose names have a node among these, in the newest version or the seeds.
    pub(crate) fn hosts_of(&self, is_among: impl Fn(&NodeId) -> bool) -> BTreeSet<HostName> {
        let held = self.lock();
        let newest = held.registry.newest();
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
        lock(&self.names)
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        lock(&self.held)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
mod tests;
