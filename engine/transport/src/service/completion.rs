//! How the answer to a request reaches its asker, on the connection's own shard or elsewhere.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use millrace_protocol::rpc::RpcError;

use super::message::Payload;
use super::remote::RemoteCompletion;

/// Where the answer to a request goes. It is completed once.
#[derive(Debug)]
pub(crate) enum Completion {
    /// To a future on this shard.
    Local(Rc<AnswerSlot>),
    /// To another shard, or a thread outside the shards.
    Remote(RemoteCompletion),
}

impl Completion {
    pub(crate) fn complete(self, result: Result<Payload, RpcError>) {
        match self {
            Self::Local(slot) => slot.complete(result),
            Self::Remote(remote) => remote.complete(result),
        }
    }

    /// Whether the asker has dropped its future.
    pub(crate) fn is_abandoned(&self) -> bool {
        match self {
            Self::Local(slot) => Rc::strong_count(slot) == 1,
            Self::Remote(remote) => !remote.is_wanted(),
        }
    }
}

/// Where a future on this shard finds its answer.
#[derive(Debug, Default)]
pub(crate) struct AnswerSlot {
    result: RefCell<Option<Result<Payload, RpcError>>>,
    waker: RefCell<Option<Waker>>,
}

impl AnswerSlot {
    pub(crate) fn complete(&self, result: Result<Payload, RpcError>) {
        *self.result.borrow_mut() = Some(result);
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.result.borrow().is_some()
    }

    pub(crate) fn poll(&self, context: &Context<'_>) -> Poll<Result<Payload, RpcError>> {
        let result = self.result.borrow_mut().take();
        if let Some(result) = result {
            return Poll::Ready(result);
        }
        let mut waker = self.waker.borrow_mut();
        match waker.as_mut() {
            Some(held) => held.clone_from(context.waker()),
            None => *waker = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}
