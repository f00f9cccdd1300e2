//! The artifacts of a node, for threads that are no shard.

use std::sync::Arc;

use millrace_protocol::id::{ArtifactId, NodeId};
use millrace_shards::chunk::{Body, BodyMut};
use millrace_transport::Transport;

use super::announced::Announced;
use super::candidates::Candidates;
use super::fetch::{Fetch, FetchError};
use super::network::Network;
use super::publish::{Delivery, Publication};
use super::store::{Store, TooLarge, Usage};
use crate::payload::payload_of;
use crate::peers::round_trips;

/// The artifacts of a node: its store, and the way to those of its peers. For threads that are no
/// shard.
#[derive(Debug)]
pub struct Artifacts {
    transport: Transport,
    pub(crate) store: Arc<Store>,
    pub(crate) announced: Arc<Announced>,
    pub(crate) candidates: Candidates,
    body_bytes_max: u64,
}

impl Artifacts {
    pub(crate) fn new(
        transport: Transport,
        store: Arc<Store>,
        announced: Arc<Announced>,
        body_bytes_max: u64,
    ) -> Self {
        let me = transport.node_id();
        Self {
            transport,
            store,
            announced,
            candidates: Candidates::new(seed(&me)),
            body_bytes_max,
        }
    }

    /// Longest body that peers accept.
    pub fn body_bytes_max(&self) -> u64 {
        self.body_bytes_max
    }

    /// An artifact that this node holds.
    pub fn held(&self, id: &ArtifactId) -> Option<Body> {
        self.store.get(id)
    }

    /// How full the store is.
    pub fn usage(&self) -> Usage {
        self.store.usage()
    }

    /// Chunks for a body of `length` bytes; none if the pools have no room for it.
    pub fn reserve(&self, length: usize) -> Option<BodyMut> {
        BodyMut::with_len(self.transport.pool_with_room()?, length)
    }

    /// Holds a hashed body and sends it to every peer that is up. It does not wait longer for a
    /// peer that lately did not serve than for the others, once one of them holds the artifact.
    ///
    /// # Errors
    /// [`TooLarge`] if the store cannot hold it.
    pub async fn publish(
        &self,
        id: ArtifactId,
        body: Body,
    ) -> Result<Vec<(NodeId, Delivery)>, TooLarge> {
        self.store.insert(None, id, body.clone())?;
        let publication = Publication {
            network: &self.transport,
            candidates: &self.candidates,
            peers: round_trips(&self.transport),
            id,
            body: payload_of(body),
        };
        Ok(publication.run().await)
    }

    /// An artifact from the store, or from a peer that has it.
    ///
    /// Peers are asked in waves whether they hold it, and then one that does for its body. A peer
    /// from which nothing comes within two round trips is left for another one, and asked again
    /// when no other one gives the artifact; one that does not serve is asked last, for a while.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn fetch(&self, id: ArtifactId) -> Result<Body, FetchError> {
        if let Some(body) = self.store.get(&id) {
            return Ok(body);
        }
        let fetch = Fetch {
            network: &self.transport,
            candidates: &self.candidates,
            store: &self.store,
            peers: round_trips(&self.transport),
            id,
            body_bytes_max: self.body_bytes_max,
        };
        fetch.run().await
    }
}

/// Another one on each node, so that not all ask the same peers first.
fn seed(me: &NodeId) -> u64 {
    let id = me.as_bytes();
    id.iter()
        .fold(0, |seed, byte| seed << 8 ^ seed >> 56 ^ u64::from(*byte))
}
