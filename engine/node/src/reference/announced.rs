//! What peers announced and have not sent yet, over all shards of the node: with several
//! connections to a peer, an announcement and its body arrive on different ones.
//!
//! The lock is taken twice for each artifact and peer, so one for the node is enough.
//!
//! 1. Only members have a list; a node that leaves the topology loses it at once, and cannot get
//!    another.
//! 2. A list has at most `ANNOUNCED_MAX` entries; a new one takes the place of the oldest.
//! 3. A peer begins at most one body for each of its announcements at a time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_protocol::id::NodeId;
use millrace_protocol::topology::Topology;

use super::wire::Announce;

/// As many bodies as a peer may be sending at a time by default: only announcements without a body
/// are ever evicted.
pub(crate) const ANNOUNCED_MAX: usize = 256;

#[derive(Debug)]
pub(crate) struct Announced {
    /// Each member's, the oldest first.
    lists: Mutex<BTreeMap<NodeId, VecDeque<Announce>>>,
    /// How many bodies of a peer and a length are coming; never zero. Locked after `lists`.
    coming: Mutex<BTreeMap<(NodeId, u64), usize>>,
}

/// A body that has begun to come; until this is dropped.
#[derive(Debug)]
pub(crate) struct Coming {
    announced: Arc<Announced>,
    body: (NodeId, u64),
}

impl Drop for Coming {
    fn drop(&mut self) {
        let mut coming = self.announced.coming();
        if let Some(count) = coming.get_mut(&self.body) {
            *count -= 1;
            if *count == 0 {
                coming.remove(&self.body);
            }
        }
    }
}

impl Announced {
    pub(crate) fn new(topology: &Topology) -> Self {
        let announced = Self {
            lists: Mutex::default(),
            coming: Mutex::default(),
        };
        announced.set_members(topology);
        announced
    }

    /// Keeps the lists of the members that stay. Call it before the transport learns of a new
    /// topology.
    pub(crate) fn set_members(&self, topology: &Topology) {
        let mut lists = self.lock();
        let mut before = std::mem::take(&mut *lists);
        *lists = topology
            .iter()
            .map(|(id, _)| (*id, before.remove(id).unwrap_or_default()))
            .collect();
    }

    /// Whether the announcement was noted. One that is made twice counts twice: the peer may send
    /// the body twice.
    pub(crate) fn push(&self, peer: &NodeId, announce: Announce) -> bool {
        let mut lists = self.lock();
        let Some(list) = lists.get_mut(peer) else {
            return false;
        };
        if list.len() == ANNOUNCED_MAX {
            list.pop_front();
        }
        list.push_back(announce);
        true
    }

    /// Whether the peer announced a body of this length. The body's id is known only after it was
    /// hashed.
    pub(crate) fn has_length(&self, peer: &NodeId, length: u64) -> bool {
        let lists = self.lock();
        lists
            .get(peer)
            .is_some_and(|list| list.iter().any(|one| one.length == length))
    }

    /// Begins a body of this length; `None` when as many are coming as the peer announced.
    pub(crate) fn begin(announced: &Arc<Self>, peer: NodeId, length: u64) -> Option<Coming> {
        let lists = announced.lock();
        let of_length = |one: &&Announce| one.length == length;
        let count = lists.get(&peer)?.iter().filter(of_length).count();
        let body = (peer, length);
        let mut coming = announced.coming();
        let begun = coming.get(&body).copied().unwrap_or(0);
        if begun >= count {
            return None;
        }
        coming.insert(body, begun + 1);
        Some(Coming {
            announced: Arc::clone(announced),
            body,
        })
    }

    /// Takes the announcement of a body that has arrived; false when there was none.
    pub(crate) fn take(&self, peer: &NodeId, announce: &Announce) -> bool {
        let mut lists = self.lock();
        let Some(list) = lists.get_mut(peer) else {
            return false;
        };
        let at = list.iter().position(|one| one == announce);
        at.and_then(|at| list.remove(at)).is_some()
    }

    fn coming(&self) -> MutexGuard<'_, BTreeMap<(NodeId, u64), usize>> {
        self.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, VecDeque<Announce>>> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::id::ArtifactId;
    use millrace_protocol::identity::SigningKey;
    use millrace_protocol::topology::Member;

    use super::*;

    fn announce(n: usize) -> Announce {
        let mut id = [0; 32];
        id[..8].copy_from_slice(&n.to_le_bytes());
        Announce {
            id: ArtifactId::from_bytes(id),
            length: 1000 + n as u64,
        }
    }

    fn topology(seeds: &[u8]) -> (Topology, Vec<NodeId>) {
        let keys: Vec<_> = seeds
            .iter()
            .map(|seed| SigningKey::from_seed([*seed; 32]).public_key())
            .collect();
        let ids = keys.iter().map(|key| key.node_id()).collect();
        let at = vec![([127, 0, 0, 1], 4100).into()];
        let members = keys
            .into_iter()
            .map(|public_key| Member::new(public_key, at.clone()));
        (Topology::from_members(members, 1), ids)
    }

    #[test]
    fn an_announcement_is_taken_once_and_by_its_own_peer_only() {
        let (topology, ids) = topology(&[1, 2]);
        let announced = Announced::new(&topology);
        assert!(announced.push(&ids[0], announce(1)));
        assert!(announced.has_length(&ids[0], 1001) && !announced.has_length(&ids[1], 1001));
        assert!(!announced.has_length(&ids[0], 1002));
        assert!(!announced.take(&ids[1], &announce(1)));
        assert!(!announced.take(&ids[0], &announce(2)));
        assert!(announced.take(&ids[0], &announce(1)));
        assert!(!announced.take(&ids[0], &announce(1)));
    }

    // Protects the store from headers without end: each body that is expected was announced.
    #[test]
    fn a_peer_begins_one_body_for_each_announcement() {
        let (topology, ids) = topology(&[1, 2]);
        let announced = Arc::new(Announced::new(&topology));
        let begin = |n: usize| Announced::begin(&announced, ids[n], 1001);
        assert!(begin(0).is_none(), "without an announcement");
        announced.push(&ids[0], announce(1));
        announced.push(&ids[1], announce(1));
        let first = begin(0).unwrap();
        assert!(begin(0).is_none() && begin(1).is_some());
        announced.push(&ids[0], announce(1));
        let second = begin(0).unwrap();
        assert!(begin(0).is_none());
        // One was cut, and may come again; one came whole.
        drop(first);
        let again = begin(0).unwrap();
        assert!(begin(0).is_none() && announced.take(&ids[0], &announce(1)));
        drop(second);
        assert!(begin(0).is_none());
        drop(again);
        assert!(begin(0).is_some() && announced.coming().is_empty());
    }

    #[test]
    fn a_list_is_bounded_and_drops_its_oldest() {
        let (topology, ids) = topology(&[1, 2]);
        let announced = Announced::new(&topology);
        announced.push(&ids[1], announce(0));
        for n in 0..=ANNOUNCED_MAX {
            announced.push(&ids[0], announce(n));
        }
        assert_eq!(announced.lock()[&ids[0]].len(), ANNOUNCED_MAX);
        assert!(!announced.take(&ids[0], &announce(0)), "the oldest");
        assert!(announced.take(&ids[0], &announce(1)) && announced.take(&ids[1], &announce(0)));
    }

    #[test]
    fn only_members_have_a_list() {
        let (both, ids) = topology(&[1, 2]);
        let (first, _) = topology(&[1]);
        let announced = Announced::new(&both);
        announced.push(&ids[0], announce(1));
        announced.push(&ids[1], announce(1));
        announced.set_members(&first);
        assert!(
            announced.take(&ids[0], &announce(1)),
            "who stays keeps its list"
        );
        assert!(!announced.push(&ids[1], announce(2)));
        announced.set_members(&both);
        assert!(!announced.has_length(&ids[1], 1001), "who left starts anew");
    }
}
