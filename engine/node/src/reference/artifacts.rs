//! Publishes artifacts to peers and fetches them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use millrace_protocol::frame::{Class, FailureCode};
use millrace_protocol::id::{ArtifactId, NodeId};
use millrace_shards::chunk::{Body, BodyMut, ChunkPool};
use millrace_transport::{Deadline, Payload, Request, RpcError, Transport};

use super::announced::Announced;
use super::hash;
use super::store::{Store, TooLarge, Usage};
use super::wire::{self, Announce};
use crate::payload::payload_of;
use crate::peers::nearest;

/// A small question to a peer: as long as a peer may be silent by default. On the longest paths of
/// the reference (619 ms, 13 % loss) each lost packet costs 1 to 2 s.
const ASK_DEADLINE: Duration = Duration::from_secs(15);

/// What became of an artifact at one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// The peer holds it, and computed its hash.
    Delivered,
    /// The peer held it before.
    Held,
    /// It did not arrive; why.
    Failed(&'static str),
}

impl Delivery {
    /// The outcome as a label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Held => "held",
            Self::Failed(reason) => reason,
        }
    }

    /// Whether the peer holds the artifact now.
    pub fn is_there(&self) -> bool {
        !matches!(self, Self::Failed(_))
    }
}

/// Why an artifact could not be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// Neither this node nor a connected peer has it.
    #[error("neither this node nor one of its {asked} connected peers has it")]
    NotFound {
        /// Peers that were asked.
        asked: usize,
    },
    /// No peer gave it, and not every one said that it does not have it. It may come later.
    #[error("no peer gives it now, and not every one lacks it: {last}")]
    Unavailable {
        /// That a peer is busy, if one said so; else what the last one failed with.
        last: RpcError,
    },
    /// The chunk pool has no room for it.
    #[error("the chunk pool is full")]
    PoolFull,
}

impl FetchError {
    /// Of `asked` peers, none gave the artifact; they failed with these.
    fn of(asked: usize, failures: &[RpcError]) -> Self {
        let busy = RpcError::Peer(FailureCode::Busy);
        let lacks = RpcError::Peer(FailureCode::NotFound);
        let last = failures.iter().rfind(|failure| **failure != lacks);
        match last {
            None => Self::NotFound { asked },
            Some(_) if failures.contains(&busy) => Self::Unavailable { last: busy },
            Some(last) => Self::Unavailable { last: *last },
        }
    }

    /// Whether the same question may have another answer in a moment.
    pub(crate) fn is_for_now(&self) -> bool {
        let last = RpcError::Peer(FailureCode::Busy);
        *self == Self::Unavailable { last }
    }
}

/// The artifacts of a node: its store, and the way to those of its peers. For threads that are no
/// shard.
#[derive(Debug)]
pub struct Artifacts {
    transport: Transport,
    pub(crate) store: Arc<Store>,
    pub(crate) announced: Arc<Announced>,
    body_bytes_max: u64,
}

impl Artifacts {
    pub(crate) fn new(
        transport: Transport,
        store: Arc<Store>,
        announced: Arc<Announced>,
        body_bytes_max: u64,
    ) -> Self {
        Self {
            transport,
            store,
            announced,
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

    /// The pool with the most free chunks.
    fn pool(&self) -> Option<&ChunkPool> {
        let pools = (0..self.transport.shards()).filter_map(|shard| self.transport.pool(shard));
        pools.max_by_key(|pool| pool.free_chunks())
    }

    /// Chunks for a body of `length` bytes; none if the pools have no room for it.
    pub fn reserve(&self, length: usize) -> Option<BodyMut> {
        BodyMut::with_len(self.pool()?, length)
    }

    /// Holds a hashed body and sends it to every peer that is up.
    ///
    /// # Errors
    /// [`TooLarge`] if the store cannot hold it.
    pub async fn publish(
        &self,
        id: ArtifactId,
        body: Body,
    ) -> Result<Vec<(NodeId, Delivery)>, TooLarge> {
        self.store.insert(None, id, body.clone())?;
        let payload = payload_of(body);
        let deliveries = nearest(&self.transport).into_iter().map(|peer| {
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
            deadline: ASK_DEADLINE.into(),
        };
        let answer = self.transport.request(peer, ask).await?;
        if answer.as_slice() == Some(wire::HELD) {
            return Ok(Delivery::Held);
        }
        let put = Request {
            class: Class::Bulk,
            method: wire::PUT,
            body,
            // Its answer is an id.
            deadline: Deadline::Progress {
                answer_bytes_max: 0,
            },
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
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn fetch(&self, id: ArtifactId) -> Result<Body, FetchError> {
        if let Some(body) = self.store.get(&id) {
            return Ok(body);
        }
        let peers = nearest(&self.transport);
        let mut failures = Vec::with_capacity(peers.len());
        for peer in &peers {
            let ask = Request {
                class: Class::Bulk,
                method: wire::GET,
                body: id.as_bytes().to_vec().into(),
                deadline: Deadline::Progress {
                    answer_bytes_max: self.body_bytes_max,
                },
            };
            let mut answer = self.transport.request(*peer, ask.clone()).await;
            if let Err(RpcError::LocalNoBudget) = answer {
                // What the store holds of this peer's is charged to it: drop some, and ask once
                // more.
                drop(Store::expect(&self.store, *peer, self.body_bytes_max));
                answer = self.transport.request(*peer, ask).await;
            }
            let answer = match answer {
                Ok(answer) => answer,
                Err(error) => {
                    let reason = error.reason();
                    tracing::debug!(%peer, reason, "peer does not give the artifact");
                    failures.push(error);
                    continue;
                }
            };
            let body = self.body_of(answer).ok_or(FetchError::PoolFull)?;
            if hash::of_body(&body) == id {
                // A body too large for the store is still given to the client.
                if let Err(error) = self.store.insert(Some(*peer), id, body.clone()) {
                    tracing::debug!(%error, "fetched body is not held");
                }
                return Ok(body);
            }
            tracing::warn!(%peer, %id, "a peer answered with other bytes");
        }
        Err(FetchError::of(peers.len(), &failures))
    }

    fn body_of(&self, payload: Payload) -> Option<Body> {
        match payload {
            Payload::Chunks(body) => Some(body),
            Payload::Bytes(bytes) => Body::copy_from_slice(self.pool()?, &bytes),
            Payload::Empty => Body::from_chunks(Vec::new()),
        }
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
    use super::*;

    /// Protects an operator from the word that an artifact is nowhere while a peer is only busy.
    #[test]
    fn not_found_is_what_every_peer_said() {
        let [lacks, busy] = [FailureCode::NotFound, FailureCode::Busy].map(RpcError::Peer);
        let lost = RpcError::ConnectionLost;
        let of = |failures: &[RpcError]| FetchError::of(failures.len(), failures);
        assert_eq!(of(&[]), FetchError::NotFound { asked: 0 });
        assert_eq!(of(&[lacks, lacks]), FetchError::NotFound { asked: 2 });
        assert_eq!(of(&[lost, lacks]), FetchError::Unavailable { last: lost });
        let some_busy = of(&[lacks, busy, lost]);
        assert_eq!(some_busy, FetchError::Unavailable { last: busy });
        assert!(some_busy.is_for_now() && !of(&[lost]).is_for_now());
    }
}
