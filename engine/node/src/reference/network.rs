//! What publishing and fetching need of the node: requests to peers, and memory for answers.

use std::future::Future;

use millrace_protocol::frame::FailureCode;
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;
use millrace_protocol::score::Outcome;
use millrace_shards::chunk::ChunkPool;
use millrace_transport::{Payload, RemoteAnswer, Request, Transport};

/// The node, as publishing and fetching see it.
pub(super) trait Network {
    /// The answer to a request; dropped, it takes the request back.
    type Answer: Future<Output = Result<Payload, RpcError>>;

    /// Asks a peer.
    fn ask(&self, peer: NodeId, request: Request) -> Self::Answer;

    /// The pool with the most free chunks.
    fn pool_with_room(&self) -> Option<&ChunkPool>;
}

impl Network for Transport {
    type Answer = RemoteAnswer;

    fn ask(&self, peer: NodeId, request: Request) -> RemoteAnswer {
        self.request(peer, request)
    }

    fn pool_with_room(&self) -> Option<&ChunkPool> {
        let pools = (0..self.shards()).filter_map(|shard| self.pool(shard));
        pools.max_by_key(|pool| pool.free_chunks())
    }
}

/// What a failure says of the peer; none where it is no fault of it: what it lacks, that it is
/// busy, and what this node has no room for.
pub(super) fn outcome_of(error: &RpcError) -> Option<Outcome> {
    match error {
        RpcError::Timeout => Some(Outcome::Stalled),
        RpcError::PeerProtocol
        | RpcError::Peer(FailureCode::Malformed | FailureCode::Internal | FailureCode::Other(_)) => {
            Some(Outcome::Failed)
        }
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod fake {
    //! Peers that answer as a script says, in milliseconds that are counted and not waited for.

    use std::collections::BTreeMap;
    use std::pin::{Pin, pin};
    use std::sync::Mutex;
    use std::task::{Context, Poll, Waker};
    use std::time::Duration;

    use millrace_protocol::frame::Method;
    use millrace_protocol::id::ArtifactId;
    use millrace_shards::config::HugePages;
    use millrace_transport::Deadline;

    use super::super::hash::Hasher;
    use super::super::wire;
    use super::*;

    pub(crate) const BODY: &[u8] = b"the artifact";

    /// The id of [`BODY`].
    pub(crate) fn id() -> ArtifactId {
        let mut hasher = Hasher::new();
        hasher.update(BODY);
        hasher.finish()
    }

    /// Milliseconds until an answer, and the answer.
    pub(crate) type Reply = (u64, Result<Vec<u8>, RpcError>);

    /// What a peer answers.
    #[derive(Clone)]
    pub(crate) struct Script {
        pub(crate) rtt: Duration,
        pub(crate) announce: Reply,
        pub(crate) put: Reply,
        pub(crate) look_up: Reply,
        pub(crate) get: Reply,
    }

    impl Script {
        /// Answers nothing.
        pub(crate) fn silent() -> Self {
            let never = || (u64::MAX, Ok(Vec::new()));
            Self {
                rtt: Duration::from_millis(1),
                announce: never(),
                put: never(),
                look_up: never(),
                get: never(),
            }
        }
    }

    pub(crate) fn peer(n: u8) -> NodeId {
        NodeId::from_bytes([n; 29])
    }

    pub(crate) fn failure(code: FailureCode) -> RpcError {
        RpcError::Peer(code)
    }

    pub(crate) struct Fake {
        scripts: Vec<Script>,
        pool: ChunkPool,
        asked: Mutex<Vec<(NodeId, Method)>>,
    }

    impl Fake {
        pub(crate) fn new(scripts: impl IntoIterator<Item = Script>) -> Self {
            Self {
                scripts: scripts.into_iter().collect(),
                pool: ChunkPool::new(4 << 20, HugePages::Never).unwrap(),
                asked: Mutex::default(),
            }
        }

        /// All peers, with their round trips.
        pub(crate) fn peers(&self) -> BTreeMap<NodeId, Option<Duration>> {
            let peers = (0..).zip(&self.scripts);
            peers.map(|(n, of)| (peer(n), Some(of.rtt))).collect()
        }

        /// How often the peer was asked so.
        pub(crate) fn asked(&self, n: u8, method: Method) -> usize {
            let asked = self.asked.lock().unwrap();
            asked
                .iter()
                .filter(|one| **one == (peer(n), method))
                .count()
        }
    }

    impl Network for Fake {
        type Answer = FakeAnswer;

        fn ask(&self, peer: NodeId, request: Request) -> FakeAnswer {
            self.asked.lock().unwrap().push((peer, request.method));
            let script = &self.scripts[usize::from(peer.as_bytes()[0])];
            let (ms, answer) = match request.method {
                wire::ANNOUNCE => &script.announce,
                wire::PUT => &script.put,
                wire::LOOK_UP => &script.look_up,
                _ => &script.get,
            };
            let limit = match request.deadline {
                Deadline::After(limit) => limit,
                Deadline::Progress { patience, .. } => patience.unwrap_or(Duration::from_secs(30)),
            };
            let limit_ms = limit.as_millis() as u64;
            let answer = match answer {
                _ if *ms > limit_ms => Err(RpcError::Timeout),
                Ok(bytes) => Ok(bytes.clone().into()),
                Err(error) => Err(*error),
            };
            FakeAnswer {
                left_ms: (*ms).min(limit_ms),
                answer: Some(answer),
            }
        }

        fn pool_with_room(&self) -> Option<&ChunkPool> {
            Some(&self.pool)
        }
    }

    /// Each poll is a millisecond.
    pub(crate) struct FakeAnswer {
        left_ms: u64,
        answer: Option<Result<Payload, RpcError>>,
    }

    impl Future for FakeAnswer {
        type Output = Result<Payload, RpcError>;

        fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
            if self.left_ms > 0 {
                self.left_ms -= 1;
                return Poll::Pending;
            }
            self.answer.take().map_or(Poll::Pending, Poll::Ready)
        }
    }

    /// Runs a future whose answers are those of a [`Fake`]; its output, and the milliseconds that
    /// it took.
    pub(crate) fn run<F: Future>(future: F) -> (F::Output, u64) {
        let mut future = pin!(future);
        let mut context = Context::from_waker(Waker::noop());
        for ms in 0..1_000_000 {
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return (output, ms);
            }
        }
        panic!("it does not end");
    }
}
