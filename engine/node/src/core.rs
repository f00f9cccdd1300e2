//! What all parts of a running node share: transport, artifacts and registry.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use millrace_protocol::identity::PublicKey;
use millrace_protocol::tls_keys::Standing;
use millrace_protocol::topology::Topology;
use millrace_registry::Versions;
use millrace_transport::Transport;

use crate::edge::Report;
use crate::error::NotReady;
use crate::reference::Artifacts;
use crate::room::Room;
use crate::tls_keys::TlsBoard;
use crate::topology::TopologyChanges;

/// Shared by the threads of a node and by its handle.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) public_key: PublicKey,
    pub(crate) transport: Transport,
    pub(crate) artifacts: Artifacts,
    pub(crate) versions: Arc<Versions>,
    pub(crate) started: Instant,
    pub(crate) topology: TopologyChanges,
    pub(crate) edge: Option<Report>,
    pub(crate) room: Room,
    pub(crate) tls: Arc<TlsBoard>,
    /// The registry version whose topology was applied last; held while one is applied, because
    /// several threads do.
    pub(crate) applied: Mutex<u64>,
}

impl Core {
    /// Tells the shards which nodes are members now; false when a mailbox was full.
    pub(crate) fn apply_topology(&self) -> bool {
        let applied = self.applied();
        // Under the lock: of two threads with one version, the later one knows the newer addresses
        // of names.
        let topology = Arc::new(self.versions.topology());
        self.apply_locked(&topology, applied)
    }

    /// As [`Self::apply_topology`]. A topology older than the one in force is ignored: another
    /// thread was faster with the newer one.
    #[cfg(test)]
    pub(crate) fn apply(&self, topology: &Arc<Topology>) -> bool {
        self.apply_locked(topology, self.applied())
    }

    fn applied(&self) -> MutexGuard<'_, u64> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply_locked(&self, topology: &Arc<Topology>, mut applied: MutexGuard<'_, u64>) -> bool {
        if topology.newest_version() < *applied {
            return true;
        }
        let is_other = topology.newest_version() > *applied;
        *applied = topology.newest_version();
        self.topology.count(topology);
        self.count_left_out(topology, is_other);
        self.artifacts.announced.set_members(topology);
        let told = self.transport.update_topology(topology);
        let record = topology.member(&self.transport.node_id());
        self.tls.set_record(record.map(|record| record.tls_keys));
        let version = self.versions.newest();
        // A node that is no member holds a version all the same.
        self.transport.set_registry_version(version);
        tracing::info!(version, members = topology.len(), told, "registry changed");
        told
    }

    /// Counts the members that have no room on this node. A node that runs stays with the peers
    /// that it has: it says so for each version.
    fn count_left_out(&self, topology: &Topology, is_other: bool) {
        let members = self.room.members(&self.transport.node_id(), topology);
        self.topology
            .left_out
            .store(members.left_out, Ordering::Relaxed);
        if let Some(reason) = self.room.obstacle(&members).filter(|_| is_other) {
            tracing::error!(%reason, "members are left out");
        }
    }

    /// Whether all shards live that should; otherwise only a restart helps.
    pub(crate) fn health(&self) -> Result<(), NotReady> {
        let panicked = self.transport.status().first_panicked();
        panicked.map_or(Ok(()), |shard| Err(NotReady::ShardEnded { shard }))
    }

    /// Whether the node can do its work; otherwise why not.
    pub(crate) fn readiness(&self) -> Result<(), NotReady> {
        self.health()?;
        let status = self.transport.status();
        if status.is_stopping() {
            return Err(NotReady::Stopping);
        }
        if self.versions.folder_failure().is_some() {
            return Err(NotReady::RegistryFolder);
        }
        if self.versions.newest() == 0 {
            return Err(NotReady::NoRegistry);
        }
        if self.tls.state().standing == Standing::Refused {
            return Err(NotReady::NoTlsKey);
        }
        let members = self.topology.members.load(Ordering::Relaxed);
        if members == 0 {
            return Err(NotReady::NotListed);
        }
        if members > 1 && status.peers().is_empty() {
            return Err(NotReady::NoPeer);
        }
        Ok(())
    }
}
