//! The keys that this node shares with each member, computed when the members change.
//!
//! A key costs a scalar multiplication, so the keys of members that stay are kept. A shard never
//! computes them.

use std::collections::BTreeMap;
use std::sync::Arc;

use millrace_edge_policy::proof::node_tag_of;
use millrace_edge_policy::siphash::Key;
use millrace_protocol::id::NodeId;
use millrace_protocol::identity::SigningKey;
use millrace_protocol::pair::PairKey;
use millrace_protocol::topology::Topology;

/// The keys that a shard dials with, by peer.
pub(crate) type DialKeys = Arc<BTreeMap<NodeId, Key>>;

/// Keys of the members of the last topology.
#[derive(Debug)]
pub(crate) struct PairKeys {
    mine: SigningKey,
    by_member: DialKeys,
    /// Newest registry version of the topology that the keys are of.
    version: u64,
}

impl PairKeys {
    pub(crate) fn new(mine: SigningKey) -> Self {
        Self {
            mine,
            by_member: DialKeys::default(),
            version: 0,
        }
    }

    /// Newest registry version of the last topology.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// The keys of the members now.
    pub(crate) fn update(&mut self, topology: &Topology) -> DialKeys {
        self.version = topology.newest_version();
        let me = self.mine.node_id();
        let others = topology.iter().filter(|(id, _)| **id != me);
        let keys = others.filter_map(|(id, member)| {
            let held = self.by_member.get(id).copied();
            let agree = || {
                let key = PairKey::agree(&self.mine, &member.public_key)?;
                Some(Key::from_bytes(*key.as_bytes()))
            };
            Some((*id, held.or_else(agree)?))
        });
        self.by_member = Arc::new(keys.collect());
        Arc::clone(&self.by_member)
    }

    /// The same keys by the tag that stands for a node in a proof, as a listener looks them up. Of
    /// two members with one tag, the one with the higher ID proves itself; a listener treats the
    /// other as any client.
    pub(crate) fn by_tag(&self) -> BTreeMap<u32, Key> {
        let tagged = |(id, key): (&NodeId, &Key)| (node_tag_of(id.as_bytes()), *key);
        self.by_member.iter().map(tagged).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_protocol::topology::Member;

    // Protects proofs: the key that one end dials with is the key that the other looks up, and a
    // member that left has none.
    #[test]
    fn both_ends_hold_the_same_key() {
        let [a, b] = [1, 2].map(|n| SigningKey::from_seed([n; 32]));
        let member = |key: &SigningKey| Member::new(key.public_key(), Vec::new());
        let both = Topology::from_members([member(&a), member(&b)], 1);
        let mut at = [a.clone(), b.clone()].map(PairKeys::new);
        let [dialled, _] = at.each_mut().map(|keys| keys.update(&both));
        assert_eq!(dialled.len(), 1);
        let listened = at[1].by_tag();
        let tag = node_tag_of(a.node_id().as_bytes());
        assert_eq!(dialled.get(&b.node_id()), listened.get(&tag));
        assert_eq!(
            at[1].update(&Topology::from_members([member(&b)], 2)).len(),
            0
        );
    }
}
