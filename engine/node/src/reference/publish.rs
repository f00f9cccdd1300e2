//! Sends an artifact to every peer that is up.
//!
//! 1. A peer that holds the artifact already is not sent it.
//! 2. A node waits for all peers; but for those that are asked last or banned, no longer than until
//!    all others are through and one peer holds the artifact. So one that does not serve costs its
//!    time once in a while, and not each time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use millrace_protocol::frame::Class;
use millrace_protocol::id::{ArtifactId, NodeId};
use millrace_protocol::rpc::RpcError;
use millrace_protocol::score::{AskOrder, Outcome};
use millrace_transport::{Deadline, Payload, Request};

use super::candidates::Candidates;
use super::network::{Network, outcome_of};
use super::racing::Race;
use super::waits;
use super::wire::{self, Announce};

/// What became of an artifact at one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// The peer holds it, and computed its hash.
    Delivered,
    /// The peer held it before.
    Held,
    /// It did not arrive; why.
    Failed(&'static str),
    /// The peer is asked last, because it lately did not serve, and took longer than all others.
    NotAwaited,
}

impl Delivery {
    /// The outcome as a label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Held => "held",
            Self::Failed(reason) => reason,
            Self::NotAwaited => "not_awaited",
        }
    }

    /// Whether the peer holds the artifact now.
    pub fn is_there(&self) -> bool {
        matches!(self, Self::Delivered | Self::Held)
    }
}

/// One artifact that is published.
#[derive(Debug)]
pub(super) struct Publication<'a, N> {
    pub(super) network: &'a N,
    pub(super) candidates: &'a Candidates,
    /// The peers that are up, and how far they are.
    pub(super) peers: BTreeMap<NodeId, Option<Duration>>,
    pub(super) id: ArtifactId,
    pub(super) body: Payload,
}

impl<N: Network> Publication<'_, N> {
    /// What became of the artifact at each peer.
    pub(super) async fn run(&self) -> Vec<(NodeId, Delivery)> {
        let now = Instant::now();
        let is_usual = |peer| self.candidates.ask_order(peer, now) == AskOrder::Usual;
        let mut is_awaited: Vec<bool> = self.peers.keys().map(is_usual).collect();
        if !is_awaited.contains(&true) {
            // It was this node that was cut off.
            is_awaited.fill(true);
        }
        let mut awaited = is_awaited.iter().filter(|is| **is).count();
        let mut is_held = false;
        let of_peer = |(peer, rtt): (&NodeId, &Option<Duration>)| self.deliver(*peer, *rtt);
        let mut race = Race::new(self.peers.iter().map(of_peer));
        let mut deliveries = vec![Delivery::NotAwaited; self.peers.len()];
        while awaited > 0 || !is_held {
            let Some((at, delivery)) = race.next().await else {
                break;
            };
            awaited -= usize::from(is_awaited[at]);
            is_held |= delivery.is_there();
            deliveries[at] = delivery;
        }
        self.peers.keys().copied().zip(deliveries).collect()
    }

    async fn deliver(&self, peer: NodeId, rtt: Option<Duration>) -> Delivery {
        let (delivery, outcome) = match self.try_deliver(peer, rtt).await {
            Ok(Some(delivery)) => (delivery, None),
            Ok(None) => (Delivery::Failed("wrong_hash"), Some(Outcome::Failed)),
            Err(error) => (Delivery::Failed(error.reason()), outcome_of(&error)),
        };
        if let Some(outcome) = outcome {
            self.candidates.note(peer, outcome, Instant::now());
        }
        delivery
    }

    /// None: the peer computed another hash.
    async fn try_deliver(
        &self,
        peer: NodeId,
        rtt: Option<Duration>,
    ) -> Result<Option<Delivery>, RpcError> {
        let announce = Announce {
            id: self.id,
            length: self.body.len(),
        };
        let ask = Request {
            class: Class::Normal,
            method: wire::ANNOUNCE,
            body: announce.encode().into(),
            deadline: waits::answer(rtt).into(),
        };
        let answer = self.network.ask(peer, ask).await?;
        if answer.as_slice() == Some(wire::HELD) {
            return Ok(Some(Delivery::Held));
        }
        let put = Request {
            class: Class::Bulk,
            method: wire::PUT,
            body: self.body.clone(),
            // Its answer is an id. Its last bytes may take longer than a hedge on a slow path.
            deadline: Deadline::Progress {
                answer_bytes_max: 0,
                patience: None,
            },
        };
        let answer = self.network.ask(peer, put).await?;
        let computed = answer.as_slice().and_then(wire::decode_id);
        Ok((computed == Some(self.id)).then_some(Delivery::Delivered))
    }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::frame::FailureCode;

    use super::super::network::fake::{Fake, Script, failure, id, peer, run};
    use super::*;

    const DELIVERED: Delivery = Delivery::Delivered;

    fn publish(fake: &Fake, candidates: &Candidates) -> (Vec<Delivery>, u64) {
        let publication = Publication {
            network: fake,
            candidates,
            peers: fake.peers(),
            id: id(),
            body: vec![7; 10].into(),
        };
        let (deliveries, ms) = run(publication.run());
        let peers = deliveries.iter().map(|(peer, _)| *peer);
        assert!(peers.eq(fake.peers().into_keys()), "each peer, once");
        (deliveries.into_iter().map(|(_, one)| one).collect(), ms)
    }

    fn takes(ms: u64) -> Script {
        Script {
            announce: (ms, Ok(wire::WANTED.to_vec())),
            put: (ms, Ok(id().as_bytes().to_vec())),
            ..Script::silent()
        }
    }

    fn note_all(candidates: &Candidates, peers: &[u8], outcome: Outcome) {
        for n in peers {
            candidates.note(peer(*n), outcome, Instant::now());
        }
    }

    // Protects an operator: what is reported of a peer is what it said.
    #[test]
    fn the_outcome_at_each_peer_is_what_it_said() {
        let refuses = Script {
            announce: (1, Err(failure(FailureCode::TooLarge))),
            ..Script::silent()
        };
        let holds = Script {
            announce: (1, Ok(wire::HELD.to_vec())),
            ..Script::silent()
        };
        let computes_another = Script {
            put: (1, Ok(vec![0; 32])),
            ..takes(1)
        };
        let fake = Fake::new([takes(1), holds, refuses, computes_another]);
        let (deliveries, _) = publish(&fake, &Candidates::new(1));
        let failed = ["peer_says_too_large", "wrong_hash"].map(Delivery::Failed);
        assert_eq!(deliveries[..2], [DELIVERED, Delivery::Held]);
        assert_eq!(deliveries[2..], failed);
        assert_eq!(fake.asked(1, wire::PUT), 0, "it holds the artifact");
    }

    // Protects a node that publishes from a member that answers nothing, or wants a body and takes
    // none of it: it costs its time once, and then no longer than the others take.
    #[test]
    fn a_peer_that_does_not_serve_is_waited_for_once() {
        let takes_no_body = Script {
            put: Script::silent().put,
            ..takes(1)
        };
        let fake = Fake::new([takes(20), Script::silent(), takes_no_body]);
        let candidates = Candidates::new(1);
        let (deliveries, ms) = publish(&fake, &candidates);
        let timeout = Delivery::Failed("timeout");
        assert_eq!(deliveries, [DELIVERED, timeout.clone(), timeout]);
        assert!((2_000..35_000).contains(&ms), "{ms}");
        let (deliveries, ms) = publish(&fake, &candidates);
        let expected = [DELIVERED, Delivery::NotAwaited, Delivery::NotAwaited];
        assert_eq!(deliveries, expected);
        assert!(ms < 50, "{ms}");
    }

    // Protects an artifact that only a peer takes which is asked last, and one that is banned for
    // what it sent but takes what it is sent.
    #[test]
    fn a_peer_that_is_asked_last_is_waited_for_while_no_other_one_holds_the_artifact() {
        let busy = Script {
            announce: (1, Err(failure(FailureCode::Busy))),
            ..Script::silent()
        };
        let fake = Fake::new([busy, takes(50), takes(20), takes(10)]);
        let candidates = Candidates::new(1);
        note_all(&candidates, &[1, 2], Outcome::Stalled);
        note_all(&candidates, &[3, 3, 3], Outcome::Invalid);
        let (deliveries, _) = publish(&fake, &candidates);
        let not_awaited = Delivery::NotAwaited;
        let expected = [
            Delivery::Failed("peer_busy"),
            not_awaited.clone(),
            not_awaited,
        ];
        assert_eq!(deliveries[..3], expected);
        assert_eq!(deliveries[3], DELIVERED);
        // All of them: it was this node that was cut off.
        note_all(&candidates, &[0], Outcome::Stalled);
        let (deliveries, _) = publish(&fake, &candidates);
        assert_eq!(deliveries[1..], [DELIVERED; 3]);
    }
}
