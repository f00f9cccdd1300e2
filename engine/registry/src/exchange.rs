//! The exchange of registry versions with peers: a service with methods of its own.
//!
//! It answers peers, and asks them: a peer whose hello says that it holds a newer version at once,
//! and one peer in turn every poll interval. What peers answer goes to the thread that checks
//! signatures (`follow.rs`); a shard checks none.
//!
//! 1. A long answer stays in the chunks that it came in, charged to its peer, until it was checked.
//! 2. A question that fails is counted, one that is answered by nothing is not. Neither is
//!    repeated: the next interval asks the next peer.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use millrace_protocol::frame::{Class, FailureCode};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::rpc::RpcError;
use millrace_transport::{
    Answer, Body, Defer, INLINE_BYTES_MAX, Inbound, InboundBody, Messenger, Negotiated, Queue,
    Request, Service,
};

use crate::follow::OfferSender;
use crate::long_answers::LongAnswers;
use crate::questions::Offer;
use crate::versions::Versions;
use crate::wire::{self, Newer};

/// How long a peer may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// The exchange on one shard, for the methods [`wire::FIRST_METHOD`] to [`wire::LAST_METHOD`].
#[derive(Debug)]
pub struct Exchange<M> {
    asker: Asker<M>,
    long: Rc<RefCell<LongAnswers<Body>>>,
}

/// What asks peers, and where their answers go.
#[derive(Debug, Clone)]
struct Asker<M> {
    messenger: M,
    versions: Arc<Versions>,
    offers: OfferSender,
}

impl<M: Messenger> Exchange<M> {
    /// An exchange that gives what peers answer to the owner of `offers`.
    pub fn new(messenger: M, versions: Arc<Versions>, offers: OfferSender) -> Self {
        Self {
            asker: Asker {
                messenger,
                versions,
                offers,
            },
            long: Rc::default(),
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
        let Some(number) = wire::decode_number(bytes) else {
            return Answer::Failure(FailureCode::Malformed);
        };
        let newer = self.asker.versions.newer(number);
        if newer.bytes.len() <= INLINE_BYTES_MAX {
            return Answer::Reply(newer.bytes.into());
        }
        match self.in_chunks(&newer) {
            Some(body) => Answer::Reply(body.into()),
            None => Answer::Failure(FailureCode::Busy),
        }
    }

    /// The chunks of a long answer.
    fn in_chunks(&self, newer: &Newer) -> Option<Body> {
        let messenger = &self.asker.messenger;
        let mut long = self.long.borrow_mut();
        let mut is_new = false;
        let body = long.answer(newer, |bytes| {
            is_new = true;
            Body::copy_from_slice(messenger.pool(), bytes)
        });
        if is_new && body.is_some() && long.keep(messenger.now()) {
            let (waits, long) = (messenger.clone(), Rc::downgrade(&self.long));
            messenger.spawn(Queue::Background, async move {
                while let Some(long) = long.upgrade()
                    && let Some(left) = { long.borrow_mut().left(waits.now()) }
                {
                    drop(long);
                    waits.sleep(left).await;
                }
            });
        }
        body
    }
}

impl<M: Messenger> Asker<M> {
    async fn ask(&self, peer: NodeId) {
        let questions = self.versions.questions();
        // What is under way brings the versions, or the next interval does.
        let Some(question) = questions.ask(peer) else {
            return;
        };
        let request = Request {
            class: Class::Normal,
            method: wire::NEWER_THAN,
            body: wire::encode_number(self.versions.known()).to_vec().into(),
            deadline: DEADLINE.into(),
        };
        let versions = match self.messenger.request(peer, request).await {
            Ok(answer) if answer.is_empty() => return,
            Ok(answer) => answer,
            Err(error) => return self.failed(peer, &error),
        };
        if versions.len() > wire::ANSWER_BYTES_MAX as u64 {
            questions.count_failed("answer_too_long");
            return tracing::warn!(%peer, "an answer with registry versions is too long");
        }
        if !self.offers.offer(Offer::new(question, versions)) {
            questions.count_failed("answers_wait");
            tracing::warn!(%peer, "registry versions of a peer are dropped: too many wait");
        }
    }

    fn failed(&self, peer: NodeId, error: &RpcError) {
        let reason = error.reason();
        let is_first = self.versions.questions().count_failed(reason);
        // Bodies of the peer fill its share of the budget: an operator can change that.
        if is_first && *error == RpcError::LocalNoBudget {
            tracing::warn!(
                %peer,
                reason,
                "registry versions of a peer have no room in its share of the budget; peers are \
                 asked in turn"
            );
        } else {
            tracing::debug!(%peer, reason, "a peer does not say its versions");
        }
    }
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
