//! The registry versions that this node holds, and the members they make: folder and peers in, topology out.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_edge_policy::rules::Locality;
use millrace_protocol::id::{NodeId, SubnetId};
use millrace_protocol::identity::PublicKey;
use millrace_protocol::registry::{Offered, SignedVersion};
use millrace_protocol::topology::{Member, Topology};
use millrace_tuning::NodeConfig;

use crate::app::wire;
use crate::edge::plan::Firewall;
use crate::exit::Failure;
use crate::keys;
use crate::registry_dir::Follower;

/// Shared by the thread that polls, the admin thread, and the shards that answer peers.
#[derive(Debug)]
pub(crate) struct Versions {
    me: NodeId,
    /// This node and its seeds: the members before the first version.
    first: Vec<Member>,
    subnet: Option<SubnetId>,
    follower: Mutex<Follower>,
    /// The newest versions, for peers: a copy, because shards answer them and must not wait for the follower, which
    /// reads files and checks signatures.
    shared: Mutex<Arc<[Shared]>>,
}

/// A version and its number.
type Shared = (u64, SignedVersion);

/// What the registry looks like from here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) newest: u64,
    pub(crate) skipped: u64,
    pub(crate) refused: Vec<(&'static str, u64)>,
}

impl Versions {
    pub(crate) fn new(
        me: &PublicKey,
        config: &NodeConfig,
        follower: Follower,
    ) -> Result<Self, Failure> {
        let subnet = match &config.node.subnet {
            Some(text) => Some(text.parse().map_err(|error| {
                let message = format!("node.subnet = \"{text}\": {error}");
                Failure::new(crate::exit::Exit::BadConfig, message)
            })?),
            None => None,
        };
        let seed = |seed: &millrace_tuning::config::Seed| {
            let public_key = keys::public_from_hex(&seed.public_key)?;
            Ok(Member {
                public_key,
                addresses: vec![seed.address],
            })
        };
        let mut first = config
            .registry
            .seeds
            .iter()
            .map(seed)
            .collect::<Result<Vec<_>, Failure>>()?;
        if !first.is_empty() {
            first.push(Member {
                public_key: *me,
                addresses: vec![config.listen.address],
            });
        }
        Ok(Self {
            me: me.node_id(),
            first,
            subnet,
            follower: Mutex::new(follower),
            shared: Mutex::new(Arc::new([])),
        })
    }

    /// Takes what is new in the folder; whether something changed.
    pub(crate) fn poll_folder(&self) -> bool {
        let mut follower = self.lock();
        let changed = follower.poll().changed;
        if changed {
            self.share(&follower);
        }
        changed
    }

    /// Takes versions that a peer sent; whether something changed.
    pub(crate) fn offer(&self, peer: &NodeId, bytes: &[u8]) -> bool {
        let Some(versions) = wire::decode_versions(bytes) else {
            tracing::warn!(%peer, "an answer with registry versions cannot be read");
            return false;
        };
        let mut follower = self.lock();
        let mut changed = false;
        for version in versions {
            match follower.offer(version) {
                Ok(offered) => changed |= matches!(offered, Offered::Newest { .. }),
                Err(error) => {
                    tracing::warn!(%peer, reason = error.reason(), "registry version refused");
                }
            }
        }
        if changed {
            self.share(&follower);
        }
        changed
    }

    /// The encoded versions above a number: the answer to a peer that holds that one. Called on shards.
    pub(crate) fn newer_than(&self, number: u64) -> Vec<u8> {
        let shared = Arc::clone(&self.shared.lock().unwrap_or_else(PoisonError::into_inner));
        let newer = shared.iter().filter(|(held, _)| *held > number);
        wire::encode_versions(newer.map(|(_, signed)| signed))
    }

    /// Copies the newest versions, as many as one answer takes. A peer that is further behind loses nothing: every
    /// version says everything.
    fn share(&self, follower: &Follower) {
        let held: Vec<_> = follower.registry.newer_than(0).collect();
        let mut bytes = 0;
        let fits = |(_, signed): &&(u64, &SignedVersion)| {
            bytes += signed.document.len();
            bytes <= wire::VERSIONS_BYTES_MAX
        };
        let mut newest: Vec<Shared> = held
            .iter()
            .rev()
            .take_while(fits)
            .map(|(number, signed)| (*number, (*signed).clone()))
            .collect();
        newest.reverse();
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = newest.into();
    }

    pub(crate) fn newest(&self) -> u64 {
        self.lock().registry.newest_number()
    }

    /// The members now: those of the subnet, or the seeds before the first version.
    pub(crate) fn topology(&self) -> Topology {
        let follower = self.lock();
        match self.subnet_in(&follower) {
            Some(subnet) => Topology::union(&subnet, follower.registry.versions_in_use()),
            None if follower.registry.newest().is_none() => {
                Topology::from_members(self.first.iter().cloned(), 0)
            }
            None => Topology::empty(),
        }
    }

    pub(crate) fn summary(&self) -> Summary {
        let follower = self.lock();
        Summary {
            newest: follower.registry.newest_number(),
            skipped: follower
                .registry
                .newest()
                .map_or(0, |version| version.skipped.len() as u64),
            refused: follower
                .refused()
                .iter()
                .map(|(reason, count)| (*reason, *count))
                .collect(),
        }
    }

    /// What the registry says to the edge; `roles` are this node's.
    pub(crate) fn firewall(&self, roles: &[String]) -> Firewall {
        let follower = self.lock();
        let subnet = self.subnet_in(&follower);
        let seeds = self.first.iter().flat_map(|member| &member.addresses);
        let members: BTreeSet<IpAddr> = follower
            .registry
            .versions()
            .flat_map(|version| &version.nodes)
            .flat_map(|node| &node.addresses)
            .chain(seeds)
            .map(|address| address.ip())
            .collect();
        let newest = follower.registry.newest();
        Firewall {
            version: follower.registry.newest_number(),
            tables: newest.map_or_else(Vec::new, |version| version.firewall.clone()),
            members: members.into_iter().collect(),
            locality: Locality {
                node: self.me.to_string(),
                subnet: subnet.map(|subnet| subnet.to_string()),
                roles: roles.to_vec(),
            },
        }
    }

    /// The configured subnet, or the first one that lists this node.
    fn subnet_in(&self, follower: &Follower) -> Option<SubnetId> {
        let newest = follower.registry.newest()?;
        let mine = newest.nodes.iter().find(|node| node.id == self.me);
        self.subnet.or_else(|| mine.map(|node| node.subnet))
    }

    fn lock(&self) -> MutexGuard<'_, Follower> {
        self.follower.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The registry's public key of a config.
pub(crate) fn registry_key(config: &NodeConfig) -> Result<PublicKey, Failure> {
    keys::public_from_hex(&config.registry.public_key)
}
