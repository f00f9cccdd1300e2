//! The exchange of registry versions with peers: a service with methods of its own.
//!
//! It answers peers, and asks them: a peer whose hello says that it holds a newer version at once,
//! and one peer in turn every poll interval. What peers answer goes to the thread that checks
//! signatures (`follow.rs`); a shard checks none.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use millrace_protocol::frame::{Class, FailureCode};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_transport::{
    Answer, Body, Defer, INLINE_BYTES_MAX, Inbound, InboundBody, Messenger, Negotiated, Payload,
    Queue, Request, Service,
};

use crate::follow::{Event, Offer};
use crate::versions::Versions;
use crate::wire;

/// How long a peer may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// The exchange on one shard, for the methods [`wire::FIRST_METHOD`] to [`wire::LAST_METHOD`].
#[derive(Debug)]
pub struct Exchange<M> {
    asker: Asker<M>,
}

/// What asks peers, and where their answers go.
#[derive(Debug, Clone)]
struct Asker<M> {
    messenger: M,
    versions: Arc<Versions>,
    events: SyncSender<Event>,
}

impl<M: Messenger> Exchange<M> {
    /// An exchange that gives what peers answer to the owner of `events`.
    pub fn new(messenger: M, versions: Arc<Versions>, events: SyncSender<Event>) -> Self {
        Self {
            asker: Asker {
                messenger,
                versions,
                events,
            },
        }
    }

    /// Asks one peer of the node in turn, every `interval`, until the shard ends. Call it on one
    /// shard of a node.
    pub fn ask_every(&self, interval: Duration) {
        let asker = self.asker.clone();
        self.asker.messenger.spawn(Queue::Background, async move {
            let mut turn = 0;
            loop {
                asker.messenger.sleep(interval).await;
                let peers = asker.messenger.peers();
                if let Some(peer) = peers.get(turn % peers.len().max(1)) {
                    asker.ask(*peer).await;
                }
                turn += 1;
            }
        });
    }

    fn answer(&self, body: &InboundBody<'_>) -> Answer {
        let InboundBody::Slice(bytes) = body else {
            return Answer::Failure(FailureCode::Malformed);
        };
        let Ok(number) = <[u8; 8]>::try_from(*bytes) else {
            return Answer::Failure(FailureCode::Malformed);
        };
        let Asker {
            messenger,
            versions,
            ..
        } = &self.asker;
        let bytes = versions.newer_than(u64::from_le_bytes(number));
        if bytes.len() <= INLINE_BYTES_MAX {
            return Answer::Reply(bytes.into());
        }
        match Body::copy_from_slice(messenger.pool(), &bytes) {
            Some(body) => Answer::Reply(body.into()),
            None => Answer::Failure(FailureCode::Busy),
        }
    }
}

impl<M: Messenger> Asker<M> {
    async fn ask(&self, peer: NodeId) {
        let request = Request {
            class: Class::Normal,
            method: wire::NEWER_THAN,
            body: self.versions.newest().to_le_bytes().to_vec().into(),
            deadline: DEADLINE,
        };
        let answer = match self.messenger.request(peer, request).await {
            Ok(answer) => answer,
            Err(error) => {
                let reason = error.reason();
                return tracing::debug!(%peer, reason, "a peer does not say its versions");
            }
        };
        let Some(versions) = small(answer) else {
            return tracing::warn!(%peer, "an answer with registry versions is too long");
        };
        if versions.is_empty() {
            return;
        }
        match self.events.try_send(Event::Offer(Offer { peer, versions })) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            // The next question brings them again.
            Err(TrySendError::Full(_)) => {
                tracing::warn!(%peer, "registry versions of a peer are dropped: too many wait");
            }
        }
    }
}

/// The bytes of an answer; none if it is longer than any honest one.
fn small(answer: Payload) -> Option<Vec<u8>> {
    if answer.len() > 2 * wire::ANSWER_BYTES_MAX as u64 {
        return None;
    }
    Some(match answer {
        Payload::Empty => Vec::new(),
        Payload::Bytes(bytes) => bytes.to_vec(),
        Payload::Chunks(body) => {
            let chunks = body.chunks().iter();
            chunks.flat_map(|chunk| chunk.iter().copied()).collect()
        }
    })
}

impl<M: Messenger> Service for Exchange<M> {
    fn on_request(&mut self, request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        match request.method {
            wire::NEWER_THAN => self.answer(&request.body),
            _ => Answer::Failure(FailureCode::UnknownMethod),
        }
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        let method = message.method.0;
        tracing::debug!(peer = %message.peer, method, "one-way message ignored");
    }

    fn on_up(&mut self, peer: NodeId, _connection: ConnectionNumber, hello: &Negotiated) {
        if hello.registry_version > self.asker.versions.newest() {
            let asker = self.asker.clone();
            let ask = async move { asker.ask(peer).await };
            self.asker.messenger.spawn(Queue::Background, ask);
        }
    }
}
