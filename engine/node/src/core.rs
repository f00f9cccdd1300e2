//! What all parts of a running node share: transport, artifacts and registry.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace_protocol::frame::Class;
use millrace_protocol::id::NodeId;
use millrace_protocol::identity::PublicKey;
use millrace_registry::Versions;
use millrace_registry::wire::{ANSWER_BYTES_MAX, NEWER_THAN};
use millrace_transport::{Payload, Request, Transport};

use crate::edge::EdgeReport;
use crate::error::NotReady;
use crate::payload::joined;
use crate::reference::Artifacts;
use crate::topology::TopologyChanges;

/// A question for registry versions.
const ASK_DEADLINE: Duration = Duration::from_secs(5);

/// Shared by the threads of a node and by its handle.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) public_key: PublicKey,
    pub(crate) transport: Transport,
    pub(crate) artifacts: Artifacts,
    pub(crate) versions: Arc<Versions>,
    pub(crate) started: Instant,
    pub(crate) topology: TopologyChanges,
    pub(crate) edge: Option<Arc<dyn EdgeReport>>,
    /// The shards have not heard of the newest versions: a mailbox was full.
    pub(crate) is_behind: AtomicBool,
}

impl Core {
    /// Tells the shards which nodes are members now. The registry thread tries a full mailbox again.
    pub(crate) fn apply_topology(&self) {
        let topology = Arc::new(self.versions.topology());
        self.topology.count(&topology);
        self.artifacts.announced.set_members(&topology);
        let told = self.transport.update_topology(&topology);
        self.is_behind.store(!told, Ordering::Relaxed);
        tracing::info!(
            version = self.versions.newest(),
            members = topology.len(),
            "registry changed"
        );
    }

    /// Asks one peer for newer registry versions; whether something changed.
    pub(crate) fn ask_for_versions(&self, peer: NodeId) -> bool {
        let ask = Request {
            class: Class::Normal,
            method: NEWER_THAN,
            body: self.versions.newest().to_le_bytes().to_vec().into(),
            deadline: ASK_DEADLINE,
        };
        let answer = self
            .transport
            .request(peer, ask)
            .wait(ASK_DEADLINE + ASK_DEADLINE);
        match answer {
            Ok(Payload::Empty) | Err(_) => false,
            Ok(Payload::Bytes(bytes)) => self.versions.offer_encoded(&peer, &bytes),
            // Bounded by the answer's own limit, and by the peer's receive budget before that.
            Ok(Payload::Chunks(body)) if body.len() <= 2 * ANSWER_BYTES_MAX => {
                self.versions.offer_encoded(&peer, &joined(body.chunks()))
            }
            Ok(Payload::Chunks(_)) => false,
        }
    }

    /// Whether the node can do its work; otherwise why not.
    pub(crate) fn readiness(&self) -> Result<(), NotReady> {
        if self.versions.newest() == 0 {
            return Err(NotReady::NoRegistry);
        }
        let members = self.topology.members.load(Ordering::Relaxed);
        if members == 0 {
            return Err(NotReady::NotListed);
        }
        if members > 1 && self.transport.status().peers().is_empty() {
            return Err(NotReady::NoPeer);
        }
        Ok(())
    }
}
