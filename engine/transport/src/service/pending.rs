//! The answer to a request of code on a shard.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use millrace_protocol::frame::Header;
use millrace_protocol::rpc::RpcError;

use super::completion::{AnswerSlot, Completion};
use super::handle::ConnectionHandle;
use super::message::{Payload, Request};
use super::remote::RemoteAnswer;
use crate::counters::Family;

/// The answer to a request, to be awaited on the shard that asked.
///
/// Dropped before it is ready, it takes the request back: before the request has left nothing is
/// sent, and after that the peer sees the request's stream reset, or a cancellation.
#[derive(Debug)]
#[must_use = "a request is taken back when its future is dropped"]
pub struct PendingAnswer(State);

#[derive(Debug)]
enum State {
    Failed(RpcError),
    /// The connection is this shard's.
    Here {
        answer: Rc<AnswerSlot>,
        /// Until the answer was taken.
        call: Option<(Rc<ConnectionHandle>, Header)>,
    },
    /// The connection is another shard's.
    Elsewhere(RemoteAnswer),
}

impl PendingAnswer {
    /// Sends `request` on a connection of this shard.
    pub(crate) fn ask(handle: &Rc<ConnectionHandle>, request: Request) -> Self {
        let answer = Rc::new(AnswerSlot::default());
        Self(
            match handle.request(request, Completion::Local(Rc::clone(&answer))) {
                Ok(header) => State::Here {
                    answer,
                    call: Some((Rc::clone(handle), header)),
                },
                Err((error, _)) => {
                    handle.state.counters.count(Family::Failed, error.reason());
                    State::Failed(error)
                }
            },
        )
    }

    /// Ready when `answer` is complete; there is nothing to take back.
    pub(crate) fn waiting(answer: Rc<AnswerSlot>) -> Self {
        Self(State::Here { answer, call: None })
    }

    pub(crate) fn failed(error: RpcError) -> Self {
        Self(State::Failed(error))
    }

    pub(crate) fn elsewhere(answer: RemoteAnswer) -> Self {
        Self(State::Elsewhere(answer))
    }
}

impl Future for PendingAnswer {
    type Output = Result<Payload, RpcError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Failed(error) => Poll::Ready(Err(*error)),
            State::Here { answer, call } => {
                let result = answer.poll(context);
                if result.is_ready() {
                    *call = None;
                }
                result
            }
            State::Elsewhere(answer) => Pin::new(answer).poll(context),
        }
    }
}

impl Drop for PendingAnswer {
    fn drop(&mut self) {
        if let State::Here { answer, call } = &mut self.0
            && let Some((handle, header)) = call.take()
            && !answer.is_complete()
        {
            handle.cancel(header);
        }
    }
}
