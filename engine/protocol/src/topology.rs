//! The members of the subnet: the union over the registry versions in use.
//!
//! 1. A node counts while any version from the oldest in use to the newest names it, so that it is
//!    not cut off while others still rely on it.
//! 2. Its addresses are those of the newest version that names it.
//! 3. Its TLS keys are those of the newest version that names it: a retired key counts no more,
//!    also while an older version is in use. Where versions give one key to two nodes, the newer
//!    version decides.
//! 4. A topology never changes: a newer one replaces it whole, and [`Topology::diff`] says how.

use crate::{
    id::{NodeId, SubnetId},
    identity::PublicKey,
    names::Names,
    registry::RegistryVersion,
    tls_keys::TlsKeys,
};
use std::{collections::BTreeMap, net::SocketAddr};

/// A node of the subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its identity key.
    pub public_key: PublicKey,
    /// The keys that its certificate may carry.
    pub tls_keys: TlsKeys,
    /// Addresses at which it listens, in the order to try; empty while no name that the registry
    /// gives it is resolved.
    pub addresses: Vec<SocketAddr>,
}

impl Member {
    /// A member whose TLS key is its identity key.
    pub fn new(public_key: PublicKey, addresses: Vec<SocketAddr>) -> Self {
        Self {
            public_key,
            tls_keys: TlsKeys::one(public_key),
            addresses,
        }
    }

    /// The node's name, which its identity key determines.
    pub fn id(&self) -> NodeId {
        self.public_key.node_id()
    }
}

/// The members of one subnet at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    members: BTreeMap<NodeId, Member>,
    /// The members by their TLS keys.
    by_tls_key: BTreeMap<PublicKey, NodeId>,
    oldest: u64,
    newest: u64,
}

/// How one topology differs from another; each list is in the order of ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopologyDiff {
    /// In the newer only.
    pub added: Vec<NodeId>,
    /// In the older only.
    pub removed: Vec<NodeId>,
    /// In both, with other addresses or TLS keys.
    pub changed: Vec<NodeId>,
}

impl TopologyDiff {
    /// Whether both topologies have the same members, with the same keys, at the same addresses.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty()
    }
}

impl Topology {
    /// A subnet without members, as before the first registry version.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The members of `subnet` over `versions`, which come oldest first; hosts' names stand for
    /// what `names` knows of them.
    pub fn union<'a>(
        subnet: &SubnetId,
        versions: impl IntoIterator<Item = &'a RegistryVersion>,
        names: &Names,
    ) -> Self {
        let mut topology = Self::default();
        for version in versions {
            if topology.newest == 0 {
                topology.oldest = version.number;
            }
            topology.newest = version.number;
            for node in version.nodes.iter().filter(|node| node.subnet == *subnet) {
                let addresses = names.resolve(&node.addresses);
                let member = Member {
                    tls_keys: node.tls_keys,
                    ..Member::new(node.public_key, addresses)
                };
                topology.insert(member);
            }
        }
        topology
    }

    /// A topology of these members, for tests and for a subnet without a registry.
    pub fn from_members(members: impl IntoIterator<Item = Member>, version: u64) -> Self {
        let mut topology = Self {
            oldest: version,
            newest: version,
            ..Self::default()
        };
        for member in members {
            topology.insert(member);
        }
        topology
    }

    /// Adds a member, in place of its record in an older version.
    fn insert(&mut self, member: Member) {
        let id = member.id();
        let old = self.members.get(&id).map(|old| old.tls_keys);
        for key in old.iter().flat_map(TlsKeys::iter) {
            if self.by_tls_key.get(&key) == Some(&id) {
                self.by_tls_key.remove(&key);
            }
        }
        for key in member.tls_keys.iter() {
            self.by_tls_key.insert(key, id);
        }
        self.members.insert(id, member);
    }

    /// The node with this name.
    pub fn member(&self, id: &NodeId) -> Option<&Member> {
        self.members.get(id)
    }

    /// The member whose TLS key this is; a handshake with any other key is refused.
    pub fn node_of_key(&self, key: &PublicKey) -> Option<NodeId> {
        self.by_tls_key.get(key).copied()
    }

    /// All members, in the order of ids.
    pub fn iter(&self) -> impl Iterator<Item = (&NodeId, &Member)> {
        self.members.iter()
    }

    /// Number of members.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// How many peers of `me` each of `shards` shards owns, for the connections of this `index`;
    /// none while `me` is no member.
    pub fn peers_by_shard(&self, me: &NodeId, index: u8, shards: u8) -> Vec<usize> {
        let mut peers = vec![0; usize::from(shards.max(1))];
        if self.member(me).is_some() {
            for id in self.members.keys().filter(|id| *id != me) {
                peers[usize::from(id.owner_shard(index, shards))] += 1;
            }
        }
        peers
    }

    /// Whether there are no members.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Oldest registry version that counts.
    pub fn oldest_version(&self) -> u64 {
        self.oldest
    }

    /// Newest registry version that counts; 0 before the first.
    pub fn newest_version(&self) -> u64 {
        self.newest
    }

    /// The changes when this topology replaces `older`.
    pub fn diff(&self, older: &Self) -> TopologyDiff {
        let mut diff = TopologyDiff::default();
        for (id, member) in &self.members {
            match older.members.get(id) {
                None => diff.added.push(*id),
                Some(old) if old != member => diff.changed.push(*id),
                Some(_) => {}
            }
        }
        diff.removed.extend(
            older
                .members
                .keys()
                .filter(|id| !self.members.contains_key(id)),
        );
        diff
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{identity::SigningKey, registry::NodeRecord};

    fn node(seed: u8, port: u16) -> NodeRecord {
        let public_key = SigningKey::from_seed([seed; 32]).public_key();
        let addresses = vec![SocketAddr::from(([127, 0, 0, 1], port)).into()];
        NodeRecord::new(public_key, subnet(), addresses)
    }

    fn tls_key(seed: u8) -> PublicKey {
        PublicKey::from_bytes([seed; 32])
    }

    fn subnet() -> SubnetId {
        SubnetId::from_public_key_der(b"subnet")
    }

    fn version(number: u64, nodes: Vec<NodeRecord>) -> RegistryVersion {
        RegistryVersion {
            number,
            nodes,
            ..RegistryVersion::default()
        }
    }

    // Protects a subnet that still relies on a node which the newest version removed.
    #[test]
    fn union_keeps_removed_and_takes_newest_address() {
        let mut elsewhere = node(9, 9);
        elsewhere.subnet = SubnetId::from_public_key_der(b"another");
        let versions = [
            version(4, vec![node(1, 10), node(2, 20)]),
            version(5, vec![node(1, 11), node(3, 30), elsewhere]),
        ];
        let names = Names::default();
        let both = Topology::union(&subnet(), &versions, &names);
        assert_eq!(
            (both.oldest_version(), both.newest_version(), both.len()),
            (4, 5, 3)
        );
        assert_eq!(
            both.member(&node(1, 0).id).unwrap().addresses,
            names.resolve(&node(1, 11).addresses)
        );
        assert_eq!(
            both.node_of_key(&node(2, 0).public_key),
            Some(node(2, 0).id)
        );
        assert_eq!(both.node_of_key(&node(9, 0).public_key), None);

        let newest = Topology::union(&subnet(), &versions[1..], &names);
        let diff = newest.diff(&both);
        assert_eq!(
            (diff.added, diff.removed, diff.changed),
            (vec![], vec![node(2, 0).id], vec![])
        );
        let oldest = Topology::union(&subnet(), &versions[..1], &names);
        let diff = both.diff(&oldest);
        assert_eq!(
            (diff.added, diff.changed),
            (vec![node(3, 0).id], vec![node(1, 0).id])
        );
        assert!(both.diff(&both).is_empty() && Topology::empty().is_empty());
    }

    // Protects the refusal of a retired key: which keys count says the newest version that names
    // the node, whatever versions are in use.
    #[test]
    fn a_member_is_known_by_the_tls_keys_of_the_newest_version() {
        let identity = node(1, 10).public_key;
        let of = |seeds: &[u8]| {
            let keys: Vec<_> = seeds.iter().map(|seed| tls_key(*seed)).collect();
            let mut record = node(1, 10);
            record.tls_keys = TlsKeys::of(&keys).unwrap_or(record.tls_keys);
            record
        };
        let mut heir = node(2, 20);
        heir.tls_keys = TlsKeys::one(tls_key(50));
        let versions = [
            version(1, vec![of(&[])]),
            version(2, vec![of(&[50, 51])]),
            version(3, vec![of(&[51])]),
            version(4, vec![of(&[51]), heir.clone()]),
            version(5, vec![of(&[50]), node(2, 20)]),
        ];
        let known = |range: std::ops::Range<usize>| {
            let topology = Topology::union(&subnet(), &versions[range], &Names::default());
            [identity, tls_key(50), tls_key(51)].map(|key| topology.node_of_key(&key))
        };
        let (none, one, two) = (None, Some(node(1, 10).id), Some(heir.id));
        assert_eq!(known(0..1), [one, none, none]);
        assert_eq!(known(1..2), [none, one, one]);
        assert_eq!(known(0..3), [none, none, one], "both were retired");
        assert_eq!(known(1..4), [none, two, one], "another node has it now");
        assert_eq!(known(3..5), [none, one, none], "and gave it back");

        let topology = |number: usize| {
            Topology::union(&subnet(), &versions[number..=number], &Names::default())
        };
        let diff = topology(1).diff(&topology(0));
        assert_eq!(diff.changed, [node(1, 10).id]);
    }

    // Protects the sizes of tables: a peer is counted at the shard that owns it, as its connections
    // are, and the node itself at none.
    #[test]
    fn peers_are_counted_at_their_owners() {
        let nodes: Vec<_> = (0..40).map(|seed| node(seed, 10)).collect();
        let me = nodes[0].id;
        let topology = Topology::union(&subnet(), &[version(1, nodes)], &Names::default());
        for (index, shards) in [(0, 1), (0, 3), (1, 3), (7, 255)] {
            let peers = topology.peers_by_shard(&me, index, shards);
            assert_eq!(peers.len(), usize::from(shards));
            assert_eq!(peers.iter().sum::<usize>(), 39);
            for (count, shard) in peers.into_iter().zip(0..) {
                let is_owned = |id: &&NodeId| **id != me && id.owner_shard(index, shards) == shard;
                let owned = topology.iter().map(|(id, _)| id).filter(is_owned);
                assert_eq!(owned.count(), count, "{index} {shards}");
            }
        }
        let non_member = node(99, 10).id;
        assert_eq!(topology.peers_by_shard(&non_member, 0, 2), [0, 0]);
    }
}
