//! How the members moved since the start.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use millrace_protocol::topology::Topology;

/// Counts changes of the topology.
#[derive(Debug)]
pub(crate) struct TopologyChanges {
    last: Mutex<Arc<Topology>>,
    pub(crate) members: AtomicU64,
    pub(crate) changes: AtomicU64,
    pub(crate) removed: AtomicU64,
    /// Members that have no room on this node.
    pub(crate) left_out: AtomicU64,
}

impl TopologyChanges {
    pub(crate) fn new(first: &Arc<Topology>) -> Self {
        Self {
            last: Mutex::new(Arc::clone(first)),
            members: AtomicU64::new(first.len() as u64),
            changes: AtomicU64::new(0),
            removed: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
        }
    }

    /// Counts what differs from the last time; the same topology may come again.
    pub(crate) fn count(&self, topology: &Arc<Topology>) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let diff = topology.diff(&last);
        if !diff.is_empty() {
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
        self.removed
            .fetch_add(diff.removed.len() as u64, Ordering::Relaxed);
        self.members.store(topology.len() as u64, Ordering::Relaxed);
        *last = Arc::clone(topology);
    }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::identity::SigningKey;
    use millrace_protocol::topology::Member;

    use super::*;

    fn topology(seeds: &[u8], version: u64) -> Arc<Topology> {
        let members = seeds.iter().map(|seed| {
            let public_key = SigningKey::from_seed([*seed; 32]).public_key();
            Member::new(public_key, vec![([127, 0, 0, *seed], 4100).into()])
        });
        Arc::new(Topology::from_members(members, version))
    }

    /// A node that takes another's place is a removal, though the number of members stays.
    #[test]
    fn changes_count_members_that_differ_not_how_many_there_are() {
        let changes = TopologyChanges::new(&topology(&[1, 2], 1));
        changes.count(&topology(&[1, 3], 2));
        changes.count(&topology(&[1, 3], 2));
        changes.count(&topology(&[1, 3, 4], 3));
        let counted = [&changes.members, &changes.changes, &changes.removed]
            .map(|count| count.load(Ordering::Relaxed));
        assert_eq!(counted, [3, 2, 1]);
    }
}
