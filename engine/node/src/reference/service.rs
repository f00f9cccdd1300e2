//! Answers peers, on each shard.

use std::sync::Arc;

use millrace_protocol::frame::FailureCode;
use millrace_protocol::id::{ArtifactId, NodeId};
use millrace_shards::Queue;
use millrace_shards::chunk::Body;
use millrace_transport::{
    Answer, BodyHead, BodyMode, Defer, Inbound, InboundBody, Messenger, Payload, Responder, Service,
};

use super::announced::Announced;
use super::hash;
use super::receiving::HashingSink;
use super::store::Store;
use super::wire::{self, Announce};
use crate::payload::payload_of;

pub(crate) struct ArtifactService<M> {
    messenger: M,
    store: Arc<Store>,
    announced: Arc<Announced>,
}

impl<M> ArtifactService<M> {
    fn announce(&self, from: &NodeId, body: &InboundBody<'_>) -> Answer {
        let InboundBody::Slice(bytes) = body else {
            return Answer::Failure(FailureCode::Malformed);
        };
        let Some(announce) = Announce::decode(bytes) else {
            return Answer::Failure(FailureCode::Malformed);
        };
        if self.store.contains(&announce.id) {
            return Answer::Reply(wire::HELD.to_vec().into());
        }
        if !self.store.fits(announce.length) {
            return Answer::Failure(FailureCode::TooLarge);
        }
        if !self.announced.push(from, announce) {
            // Cut already; this shard has not heard of it yet.
            return Answer::Failure(FailureCode::Busy);
        }
        Answer::Reply(wire::WANTED.to_vec().into())
    }
}

impl<M: Messenger> ArtifactService<M> {
    pub(crate) fn new(messenger: M, store: Arc<Store>, announced: Arc<Announced>) -> Self {
        Self {
            messenger,
            store,
            announced,
        }
    }

    /// A body is about to come: it is hashed while it does.
    fn receive(&self, from: NodeId, length: u64) -> BodyMode {
        if !self.announced.has_length(&from, length) {
            return BodyMode::Refuse(FailureCode::Malformed);
        }
        let Some(coming) = Announced::begin(&self.announced, from, length) else {
            return BodyMode::Refuse(FailureCode::Busy);
        };
        // Before the transport looks for space: what the store drops of this peer's is in it.
        let Some(expected) = Store::expect(&self.store, from, length) else {
            return BodyMode::Refuse(FailureCode::TooLarge);
        };
        let (sink, hashing) = HashingSink::new();
        let (store, announced) = (Arc::clone(&self.store), Arc::clone(&self.announced));
        self.messenger.spawn(Queue::Bulk, async move {
            let received = hashing.result().await;
            drop(expected);
            if let Some((id, body, responder)) = received {
                keep(&store, &announced, from, id, body, responder);
            }
            drop(coming);
        });
        BodyMode::Stream(Box::new(sink))
    }

    fn put(&self, from: NodeId, body: InboundBody<'_>, defer: &Defer<'_>) -> Answer {
        if !self.announced.has_length(&from, body.len()) {
            return Answer::Failure(FailureCode::Malformed);
        }
        let Some(responder) = defer.responder() else {
            return Answer::Failure(FailureCode::Busy);
        };
        match body {
            InboundBody::Slice(bytes) => {
                match Body::copy_from_slice(self.messenger.pool(), bytes) {
                    Some(body) => {
                        let id = hash::of_body(&body);
                        keep(&self.store, &self.announced, from, id, body, responder);
                    }
                    None => responder.fail(FailureCode::Busy),
                }
            }
            InboundBody::Streamed(body) => match body.into_sink::<HashingSink>() {
                Some(sink) => sink.finish(responder),
                None => responder.fail(FailureCode::Internal),
            },
            // Larger bodies go to a sink.
            InboundBody::Chunks(_) => responder.fail(FailureCode::Internal),
        }
        Answer::Deferred
    }

    /// Answers a question whose body is an id with what `answer` makes of the artifact.
    fn ask(&self, body: &InboundBody<'_>, answer: impl FnOnce(Body) -> Payload) -> Answer {
        let id = match body {
            InboundBody::Slice(bytes) => wire::decode_id(bytes),
            _ => None,
        };
        let Some(id) = id else {
            return Answer::Failure(FailureCode::Malformed);
        };
        match self.store.get(&id) {
            Some(body) => Answer::Reply(answer(body)),
            None => Answer::Failure(FailureCode::NotFound),
        }
    }
}

/// Stores a hashed body if its id was announced, and answers with the id.
fn keep(
    store: &Store,
    announced: &Announced,
    from: NodeId,
    id: ArtifactId,
    body: Body,
    responder: Responder,
) {
    let length = body.len() as u64;
    if !announced.take(&from, &Announce { id, length }) {
        tracing::warn!(peer = %from, %id, "a body has a hash that was not announced");
        return responder.fail(FailureCode::Malformed);
    }
    match store.insert(Some(from), id, body) {
        Ok(()) => responder.reply(id.as_bytes().to_vec().into()),
        Err(error) => {
            tracing::warn!(peer = %from, %error, "a body cannot be held");
            responder.fail(FailureCode::TooLarge);
        }
    }
}

impl<M: Messenger> Service for ArtifactService<M> {
    fn on_request(&mut self, request: Inbound<'_>, defer: Defer<'_>) -> Answer {
        match request.method {
            wire::ANNOUNCE => self.announce(&request.peer, &request.body),
            wire::PUT => self.put(request.peer, request.body, &defer),
            wire::GET => self.ask(&request.body, payload_of),
            wire::LOOK_UP => self.ask(&request.body, |body| {
                wire::encode_length(body.len() as u64).into()
            }),
            _ => Answer::Failure(FailureCode::UnknownMethod),
        }
    }

    fn make_room(&mut self, peer: NodeId, bytes: u64) -> bool {
        self.store.drop_charged(peer, bytes)
    }

    fn on_body(&mut self, head: &BodyHead) -> BodyMode {
        match head.method {
            wire::PUT => self.receive(head.peer, head.body_bytes),
            // No other message of this application has a body of this length.
            _ => BodyMode::Refuse(FailureCode::Malformed),
        }
    }

    fn on_send(&mut self, message: Inbound<'_>) {
        // This application has no one-way messages.
        tracing::debug!(peer = %message.peer, method = message.method.0, "one-way message ignored");
    }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::identity::SigningKey;
    use millrace_protocol::topology::{Member, Topology};

    use super::*;

    // Protects the node: the length in an announcement is a peer's word, and may be any number.
    #[test]
    fn an_announced_length_that_no_store_holds_is_too_large() {
        const STORE_BYTES: u64 = 1 << 20;
        let public_key = SigningKey::from_seed([1; 32]).public_key();
        let peer = public_key.node_id();
        let addresses = vec![([127, 0, 0, 1], 4100).into()];
        let member = Member::new(public_key, addresses);
        let topology = Topology::from_members([member], 1);
        let service = ArtifactService {
            messenger: (),
            store: Arc::new(Store::new(STORE_BYTES)),
            announced: Arc::new(Announced::new(&topology)),
        };
        let answer = |length: u64| {
            let announce = Announce {
                id: ArtifactId::from_bytes([7; 32]),
                length,
            };
            service.announce(&peer, &InboundBody::Slice(&announce.encode()))
        };
        let is_too_large =
            |answer: &Answer| matches!(answer, Answer::Failure(FailureCode::TooLarge));
        for length in [0, 1, STORE_BYTES] {
            assert!(matches!(answer(length), Answer::Reply(_)), "{length}");
        }
        let wrapping = u64::MAX - 0xfffe;
        for length in [STORE_BYTES + 1, wrapping - 1, wrapping, u64::MAX] {
            assert!(is_too_large(&answer(length)), "{length}");
            assert!(!service.announced.has_length(&peer, length), "{length}");
            assert!(Store::expect(&service.store, peer, length).is_none());
        }
    }
}
