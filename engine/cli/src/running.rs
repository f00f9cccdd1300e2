//! A node that runs: transport, store and registry under one handle, for the admin socket, `node` and `dev`.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use millrace_protocol::frame::Class;
use millrace_protocol::id::{ArtifactId, NodeId};
use millrace_protocol::identity::SigningKey;
use millrace_protocol::topology::Topology;
use millrace_registry::Versions;
use millrace_registry::wire::{ANSWER_BYTES_MAX, NEWER_THAN};
use millrace_shards::chunk::{Body, BodyMut, ChunkPool};
use millrace_shards::config::ShardConfig;
use millrace_shards::socket::UdpGroupConfig;
use millrace_transport::{
    EdgeStart, Payload, Request, Router, RpcError, Transport, TransportConfig, TransportStart,
};

use crate::app::announced::Announced;
use crate::app::handler::{App, joined, payload_of};
use crate::app::hash;
use crate::app::store::Store;
use crate::app::wire::{self, Announce};
use crate::edge::keeper::EdgeView;
use crate::exit::{Exit, Failure};

/// A small question to a peer.
const ASK_DEADLINE: Duration = Duration::from_secs(5);
/// A body of 128 MiB at a hundredth of a Gbit/s.
const BODY_DEADLINE: Duration = Duration::from_secs(120);

/// What a node is started with.
pub(crate) struct Start {
    pub(crate) identity: SigningKey,
    pub(crate) transport: TransportConfig,
    pub(crate) shards: Vec<ShardConfig>,
    pub(crate) udp: UdpGroupConfig,
    pub(crate) store_bytes: u64,
    pub(crate) body_bytes_max: u64,
    pub(crate) versions: Arc<Versions>,
    /// What the edge of this node shares with its transport.
    pub(crate) edge: EdgeStart,
    /// What there is to see of it.
    pub(crate) view: Option<Arc<EdgeView>>,
}

/// A running node.
pub(crate) struct Running {
    pub(crate) transport: Transport,
    pub(crate) store: Arc<Store>,
    pub(crate) versions: Arc<Versions>,
    pub(crate) started: Instant,
    pub(crate) body_bytes_max: u64,
    pub(crate) topology: Changes,
    pub(crate) edge: Option<Arc<EdgeView>>,
    announced: Arc<Announced>,
}

/// How the topology moved since the start.
#[derive(Debug)]
pub(crate) struct Changes {
    last: Mutex<Arc<Topology>>,
    pub(crate) members: AtomicU64,
    pub(crate) changes: AtomicU64,
    pub(crate) removed: AtomicU64,
}

impl Changes {
    fn new(first: &Arc<Topology>) -> Self {
        Self {
            last: Mutex::new(Arc::clone(first)),
            members: AtomicU64::new(first.len() as u64),
            changes: AtomicU64::new(0),
            removed: AtomicU64::new(0),
        }
    }

    /// Counts what differs from the last time; the same topology may come again.
    fn now(&self, topology: &Arc<Topology>) {
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

/// What became of an artifact at one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// The peer holds it, and computed its hash.
    Delivered,
    /// The peer held it before.
    Held,
    /// It did not arrive.
    Failed(&'static str),
}

impl Delivery {
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Held => "held",
            Self::Failed(reason) => reason,
        }
    }

    pub(crate) fn is_there(&self) -> bool {
        !matches!(self, Self::Failed(_))
    }
}

/// Why an artifact could not be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FetchError {
    /// Neither this node nor a connected peer has it.
    #[error("neither this node nor one of its {asked} connected peers has it")]
    NotFound { asked: usize },
    /// The pool has no room for it.
    #[error("the chunk pool is full")]
    PoolFull,
}

impl Running {
    pub(crate) fn start(start: Start) -> Result<Arc<Self>, Failure> {
        let store = Arc::new(Store::new(start.store_bytes));
        let versions = start.versions;
        let topology = Arc::new(versions.topology());
        let announced = Arc::new(Announced::new(&topology));
        let changes = Changes::new(&topology);
        let parts = TransportStart {
            identity: start.identity,
            config: start.transport,
            shards: start.shards,
            udp: start.udp,
            topology,
            edge: start.edge,
        };
        let app = (
            Arc::clone(&store),
            Arc::clone(&versions),
            Arc::clone(&announced),
        );
        let transport = Transport::start(parts, move |messenger| {
            let (store, versions, announced) = app.clone();
            let app = App::new(messenger, store, versions, announced);
            Router::new().serve(wire::METHODS, app)
        })
        .map_err(|error| {
            Failure::new(
                Exit::Failed,
                format!("the transport did not start: {error}"),
            )
        })?;
        Ok(Arc::new(Self {
            transport,
            store,
            versions,
            started: Instant::now(),
            body_bytes_max: start.body_bytes_max,
            topology: changes,
            edge: start.view,
            announced,
        }))
    }

    pub(crate) fn node_id(&self) -> NodeId {
        self.transport.node_id()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.transport.local_addr()
    }

    /// Tells the shards who is a member now. A full mailbox is tried again by the next poll.
    pub(crate) fn apply_topology(&self) -> bool {
        let topology = Arc::new(self.versions.topology());
        self.topology.now(&topology);
        self.announced.set_members(&topology);
        self.transport.update_topology(&topology)
    }

    /// The peers that are up, each once, by ascending round trip.
    pub(crate) fn peers(&self) -> Vec<NodeId> {
        let mut nearest: BTreeMap<NodeId, Duration> = BTreeMap::new();
        for peer in self.transport.status().peers() {
            let rtt = peer.rtt.unwrap_or(Duration::MAX);
            let held = nearest.entry(peer.node_id).or_insert(rtt);
            *held = rtt.min(*held);
        }
        let mut peers: Vec<_> = nearest.into_iter().collect();
        peers.sort_by_key(|(_, rtt)| *rtt);
        peers.into_iter().map(|(peer, _)| peer).collect()
    }

    /// The pool with the most free chunks.
    fn pool(&self) -> Option<&ChunkPool> {
        let pools = (0..self.transport.shards()).filter_map(|shard| self.transport.pool(shard));
        pools.max_by_key(|pool| pool.free_chunks())
    }

    /// Chunks for a body that is about to be received from a client.
    pub(crate) fn reserve(&self, length: usize) -> Option<BodyMut> {
        BodyMut::with_len(self.pool()?, length)
    }

    /// Holds a hashed body and sends it to every peer that is up.
    pub(crate) async fn publish(
        &self,
        id: ArtifactId,
        body: Body,
    ) -> Result<Vec<(NodeId, Delivery)>, Failure> {
        self.store
            .insert(id, body.clone())
            .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
        let payload = payload_of(body);
        let deliveries = self.peers().into_iter().map(|peer| {
            let payload = payload.clone();
            async move { (peer, self.deliver(peer, id, payload).await) }
        });
        Ok(join_all(deliveries).await)
    }

    async fn deliver(&self, peer: NodeId, id: ArtifactId, body: Payload) -> Delivery {
        match self.try_deliver(peer, id, body).await {
            Ok(delivery) => delivery,
            Err(error) => Delivery::Failed(error.reason()),
        }
    }

    async fn try_deliver(
        &self,
        peer: NodeId,
        id: ArtifactId,
        body: Payload,
    ) -> Result<Delivery, RpcError> {
        let announce = Announce {
            id,
            length: body.len(),
        };
        let ask = Request {
            class: Class::Normal,
            method: wire::ANNOUNCE,
            body: announce.encode().into(),
            deadline: ASK_DEADLINE,
        };
        let answer = self.transport.request(peer, ask).await?;
        if answer.as_slice() == Some(wire::HELD) {
            return Ok(Delivery::Held);
        }
        let put = Request {
            class: Class::Bulk,
            method: wire::PUT,
            body,
            deadline: BODY_DEADLINE,
        };
        let answer = self.transport.request(peer, put).await?;
        let echoed = answer.as_slice().and_then(wire::decode_id);
        Ok(if echoed == Some(id) {
            Delivery::Delivered
        } else {
            Delivery::Failed("wrong_hash")
        })
    }

    /// An artifact from the store, or from the nearest peer that has it.
    pub(crate) async fn fetch(&self, id: ArtifactId) -> Result<Body, FetchError> {
        if let Some(body) = self.store.get(&id) {
            return Ok(body);
        }
        let peers = self.peers();
        for peer in &peers {
            let ask = Request {
                class: Class::Bulk,
                method: wire::GET,
                body: id.as_bytes().to_vec().into(),
                deadline: BODY_DEADLINE,
            };
            let answer = match self.transport.request(*peer, ask).await {
                Ok(answer) => answer,
                Err(error) => {
                    tracing::debug!(%peer, reason = error.reason(), "peer does not give the artifact");
                    continue;
                }
            };
            let body = self.body_of(answer).ok_or(FetchError::PoolFull)?;
            if hash::of_body(&body) == id {
                // A body too large for the store is still given to the client.
                if let Err(error) = self.store.insert(id, body.clone()) {
                    tracing::debug!(%error, "fetched body is not held");
                }
                return Ok(body);
            }
            tracing::warn!(%peer, %id, "a peer answered with other bytes");
        }
        Err(FetchError::NotFound { asked: peers.len() })
    }

    fn body_of(&self, payload: Payload) -> Option<Body> {
        match payload {
            Payload::Chunks(body) => Some(body),
            Payload::Bytes(bytes) => Body::copy_from_slice(self.pool()?, &bytes),
            Payload::Empty => Body::from_chunks(Vec::new()),
        }
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
    pub(crate) fn readiness(&self) -> Result<(), &'static str> {
        if self.versions.newest() == 0 {
            return Err("no registry version is held");
        }
        let members = self.topology.members.load(Ordering::Relaxed);
        if members == 0 {
            return Err("the registry does not list this node");
        }
        if members > 1 && self.transport.status().peers().is_empty() {
            return Err("no peer is connected");
        }
        Ok(())
    }
}

/// All outputs, in order; every future makes progress while the others wait.
async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<Pin<Box<F>>> = futures.into_iter().map(Box::pin).collect();
    let mut outputs: Vec<Option<F::Output>> = running.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        let mut pending = false;
        for (future, output) in running.iter_mut().zip(&mut outputs) {
            if output.is_none() {
                match future.as_mut().poll(context) {
                    Poll::Ready(value) => *output = Some(value),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
    outputs.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use millrace_protocol::topology::Member;

    use super::*;

    fn topology(seeds: &[u8], version: u64) -> Arc<Topology> {
        let members = seeds.iter().map(|seed| Member {
            public_key: SigningKey::from_seed([*seed; 32]).public_key(),
            addresses: vec![([127, 0, 0, *seed], 4100).into()],
        });
        Arc::new(Topology::from_members(members, version))
    }

    /// A node that takes another's place is a removal, though the number of members stays.
    #[test]
    fn changes_count_members_that_differ_not_how_many_there_are() {
        let changes = Changes::new(&topology(&[1, 2], 1));
        changes.now(&topology(&[1, 3], 2));
        changes.now(&topology(&[1, 3], 2));
        changes.now(&topology(&[1, 3, 4], 3));
        let counted = [&changes.members, &changes.changes, &changes.removed]
            .map(|count| count.load(Ordering::Relaxed));
        assert_eq!(counted, [3, 2, 1]);
    }
}
