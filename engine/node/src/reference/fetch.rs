//! Fetches an artifact from one of the peers that hold it.
//!
//! Peers are asked in waves whether they hold it; one that does is asked for it. A peer from which
//! nothing comes within two round trips is left for another one, and what came of each is noted
//! ([`Candidates`]). Those that were left are asked again, with more time, when no other peer gave
//! it.
//!
//! 1. A peer that answers nothing costs a fetch two round trips, and the time of a small question
//!    where no other peer gives the artifact; one that is asked last costs four round trips.
//! 2. Of the holders in a wave it is not the nearest that is asked: a fetch waits for two of them,
//!    or two round trips, and asks the one whose turn it is.
//! 3. "Not found" is what every peer said. A peer that was left, or that sent other bytes, did not.
//! 4. One body is under way at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, FailureCode, Method};
use millrace_protocol::id::{ArtifactId, NodeId};
use millrace_protocol::rpc::RpcError;
use millrace_protocol::score::Outcome;
use millrace_shards::chunk::Body;
use millrace_transport::{Deadline, Payload, Request};

use super::candidates::Candidates;
use super::network::{Network, outcome_of};
use super::racing::Race;
use super::store::Store;
use super::{hash, waits, wire};

/// Why an artifact could not be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// Neither this node nor a connected peer has it.
    #[error("neither this node nor one of the {asked} peers that it asked has it")]
    NotFound {
        /// Peers that were asked: those that are connected, but for banned ones.
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

/// One artifact that is fetched.
#[derive(Debug)]
pub(super) struct Fetch<'a, N> {
    pub(super) network: &'a N,
    pub(super) candidates: &'a Candidates,
    pub(super) store: &'a Arc<Store>,
    /// The peers that are up, and how far they are.
    pub(super) peers: BTreeMap<NodeId, Option<Duration>>,
    pub(super) id: ArtifactId,
    /// Longest body that this node takes.
    pub(super) body_bytes_max: u64,
}

/// What came of the peers that did not give the artifact.
#[derive(Debug, Default)]
struct Missed {
    failures: Vec<RpcError>,
    /// Those that were left for others before they had said or sent anything.
    late: Vec<NodeId>,
}

/// Why a peer that holds the artifact did not give it.
#[derive(Debug)]
enum GetError {
    Peer(RpcError),
    OtherBytes,
    /// No fault of the peer.
    PoolFull,
}

/// How long the peers of a wave are waited for.
#[derive(Clone, Copy, Debug)]
enum Pace {
    /// Two round trips: others are asked after that. `is_only`: there is no other wave, so a holder
    /// has the time that it would have later, if no other peer was late.
    Quick { is_only: bool },
    /// Four round trips, and no second time.
    Last,
    /// Ten or more: no other peer gave it.
    Patient,
}

impl<N: Network> Fetch<'_, N> {
    /// Runs until a peer gave the artifact, or none does.
    pub(super) async fn run(&self) -> Result<Body, FetchError> {
        let waves = self
            .candidates
            .waves(self.peers.keys().copied(), Instant::now());
        let asked = waves.iter().map(|wave| wave.peers.len()).sum();
        let has_usual = waves.iter().any(|wave| !wave.is_last);
        let mut missed = Missed::default();
        for (at, wave) in waves.iter().enumerate() {
            let pace = if wave.is_last && has_usual {
                Pace::Last
            } else {
                let is_only = at + 1 == waves.len();
                Pace::Quick { is_only }
            };
            if let Some(body) = self.ask_wave(&wave.peers, pace, &mut missed).await? {
                return Ok(body);
            }
        }
        let late = std::mem::take(&mut missed.late);
        // All at once: otherwise the times of silent ones would add up.
        let body = self.ask_wave(&late, Pace::Patient, &mut missed).await?;
        body.ok_or_else(|| FetchError::of(asked, &missed.failures))
    }

    /// Asks some peers whether they hold the artifact, and those that do for it, one after the
    /// other.
    async fn ask_wave(
        &self,
        wave: &[NodeId],
        pace: Pace,
        missed: &mut Missed,
    ) -> Result<Option<Body>, FetchError> {
        // Those that were late or are asked last are no choice: the first one is.
        let enough = match pace {
            Pace::Quick { .. } => 2,
            Pace::Last | Pace::Patient => 1,
        };
        let mut answers = Race::new(wave.iter().map(|peer| self.look_up(*peer, pace)));
        let mut holders = Vec::with_capacity(enough);
        loop {
            while holders.len() < enough {
                let Some((at, answer)) = answers.next().await else {
                    break;
                };
                match answer {
                    Ok(length) => holders.push((at, length)),
                    Err(error) => self.miss(wave[at], pace, error, missed),
                }
            }
            // The turn of a peer is its place in the wave.
            let turn = holders.iter().min().copied();
            let Some((at, length)) = turn else {
                return Ok(None);
            };
            holders.retain(|(other, _)| *other != at);
            let pace = match pace {
                Pace::Quick { is_only: true } if holders.is_empty() && missed.late.is_empty() => {
                    Pace::Patient
                }
                pace => pace,
            };
            match self.get(wave[at], length, pace).await {
                Ok(body) => return Ok(Some(body)),
                Err(GetError::PoolFull) => return Err(FetchError::PoolFull),
                Err(GetError::OtherBytes) => missed.failures.push(RpcError::PeerProtocol),
                Err(GetError::Peer(error)) => self.miss(wave[at], pace, error, missed),
            }
        }
    }

    /// Asks a peer whether it holds the artifact; the answer is its length.
    async fn look_up(&self, peer: NodeId, pace: Pace) -> Result<u64, RpcError> {
        let rtt = self.rtt(&peer);
        let deadline = match pace {
            Pace::Quick { .. } => waits::hedge(rtt),
            Pace::Last => waits::last(rtt),
            Pace::Patient => waits::answer(rtt),
        };
        let ask = self.question(Class::Normal, wire::LOOK_UP, deadline.into());
        let answer = match self.network.ask(peer, ask).await {
            // A node that does not know the question yet, and may hold the artifact all the same.
            Err(RpcError::Peer(FailureCode::UnknownMethod)) => return Ok(self.body_bytes_max),
            answer => answer?,
        };
        let length = answer.as_slice().and_then(wire::decode_length);
        length.ok_or(RpcError::PeerProtocol)
    }

    /// Asks a peer that holds the artifact for it.
    async fn get(&self, peer: NodeId, length: u64, pace: Pace) -> Result<Body, GetError> {
        let rtt = self.rtt(&peer);
        let patience = match pace {
            Pace::Quick { .. } => waits::hedge(rtt),
            Pace::Last => waits::last(rtt),
            Pace::Patient => waits::holder(rtt),
        };
        // The length is the peer's word.
        let length = length.min(self.body_bytes_max);
        let deadline = Deadline::Progress {
            answer_bytes_max: length,
            patience: Some(patience),
        };
        let ask = self.question(Class::Bulk, wire::GET, deadline);
        let mut answer = self.network.ask(peer, ask.clone()).await;
        if let Err(RpcError::LocalNoBudget) = answer {
            // What the store holds of this peer's is charged to it: drop some, and ask once more.
            drop(Store::expect(self.store, peer, length));
            answer = self.network.ask(peer, ask).await;
        }
        let answer = answer.map_err(GetError::Peer)?;
        let body = self.body_of(answer).ok_or(GetError::PoolFull)?;
        if hash::of_body(&body) != self.id {
            tracing::debug!(%peer, id = %self.id, "a peer answered with other bytes");
            self.note(peer, Outcome::Invalid);
            return Err(GetError::OtherBytes);
        }
        self.note(peer, Outcome::Served);
        // A body too large for the store is still given to the client.
        if let Err(error) = self.store.insert(Some(peer), self.id, body.clone()) {
            tracing::debug!(%error, "fetched body is not held");
        }
        Ok(body)
    }

    fn question(&self, class: Class, method: Method, deadline: Deadline) -> Request {
        Request {
            class,
            method,
            body: self.id.as_bytes().to_vec().into(),
            deadline,
        }
    }

    /// A peer did not give the artifact.
    fn miss(&self, peer: NodeId, pace: Pace, error: RpcError, missed: &mut Missed) {
        let reason = error.reason();
        tracing::debug!(%peer, id = %self.id, reason, "peer does not give the artifact");
        match (error, pace) {
            (RpcError::Timeout, Pace::Quick { .. }) => {
                self.note(peer, Outcome::Slow);
                missed.late.push(peer);
            }
            (RpcError::Timeout, Pace::Last) => {
                self.note(peer, Outcome::Slow);
                missed.failures.push(error);
            }
            _ => {
                if let Some(outcome) = outcome_of(&error) {
                    self.note(peer, outcome);
                }
                missed.failures.push(error);
            }
        }
    }

    fn note(&self, peer: NodeId, outcome: Outcome) {
        self.candidates.note(peer, outcome, Instant::now());
    }

    fn rtt(&self, peer: &NodeId) -> Option<Duration> {
        self.peers.get(peer).copied().flatten()
    }

    fn body_of(&self, payload: Payload) -> Option<Body> {
        match payload {
            Payload::Chunks(body) => Some(body),
            Payload::Bytes(bytes) => Body::copy_from_slice(self.network.pool_with_room()?, &bytes),
            Payload::Empty => Body::from_chunks(Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests;
