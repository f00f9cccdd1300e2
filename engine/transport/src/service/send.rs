//! What the code of a shard sends to the peers that the shard owns.
//!
//! Invariant: what is not sent is counted, with its reason.

use std::rc::Rc;

use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;

use super::command::{RemoteRequest, RemoteSend, RemoteWait};
use super::completion::{AnswerSlot, Completion};
use super::handle::{ConnectionHandle, ShardState};
use super::message::{Payload, Request};
use super::pending::PendingAnswer;
use super::remote::CallId;
use crate::counters::Family;

impl ShardState {
    /// The connection for the next message of `class` to `peer`.
    fn handle_for(&self, peer: &NodeId, class: Class) -> Result<Rc<ConnectionHandle>, RpcError> {
        if self.stopping.get() {
            return Err(self.failed(RpcError::LocalShuttingDown));
        }
        let handle = self.handle_to(peer, class);
        handle.ok_or_else(|| self.failed(RpcError::NotConnected))
    }

    fn failed(&self, error: RpcError) -> RpcError {
        self.counters.count(Family::Failed, error.reason());
        error
    }

    /// See [`Messenger::request`](super::messenger::Messenger::request).
    pub fn request(&self, peer: &NodeId, request: Request) -> PendingAnswer {
        match self.handle_for(peer, request.class) {
            Ok(handle) => PendingAnswer::ask(&handle, request),
            Err(error) => PendingAnswer::failed(error),
        }
    }

    /// A request of another shard or thread.
    pub(crate) fn request_remote(&self, remote: RemoteRequest) {
        let RemoteRequest {
            peer,
            request,
            completion,
        } = remote;
        if !completion.is_wanted() {
            // Dropped while the request was in the mailbox.
            return;
        }
        let handle = match self.handle_for(&peer, request.class) {
            Ok(handle) => handle,
            Err(error) => return completion.complete(Err(error)),
        };
        let tracker = completion.tracker();
        match handle.request(request, Completion::Remote(completion)) {
            Ok(header) => {
                let call = CallId {
                    slot: handle.slot,
                    serial: handle.serial,
                    header,
                };
                if !tracker.began(call) {
                    handle.cancel(header);
                }
            }
            Err((error, completion)) => completion.complete(Err(self.failed(error))),
        }
    }

    /// See [`Messenger::send`](super::messenger::Messenger::send).
    ///
    /// # Errors
    /// As that says.
    pub fn send(
        &self,
        peer: &NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        // A refusal is counted by the handle.
        self.handle_for(peer, class)?.send(class, method, body)
    }

    pub(crate) fn send_slice(
        &self,
        peer: &NodeId,
        class: Class,
        method: Method,
        body: &[u8],
    ) -> Result<(), RpcError> {
        self.handle_for(peer, class)?
            .send_slice(class, method, body)
    }

    /// See [`Messenger::on_writable`](super::messenger::Messenger::on_writable); the answer is
    /// empty.
    pub fn on_writable(&self, peer: &NodeId, class: Class) -> PendingAnswer {
        let answer = Rc::new(AnswerSlot::default());
        self.wait_writable(peer, class, Completion::Local(Rc::clone(&answer)));
        PendingAnswer::waiting(answer)
    }

    /// A wait of another shard.
    pub(crate) fn on_writable_remote(&self, remote: RemoteWait) {
        let RemoteWait {
            peer,
            class,
            completion,
        } = remote;
        self.wait_writable(&peer, class, Completion::Remote(completion));
    }

    /// A one-way message of another shard or thread.
    pub(crate) fn send_remote(&self, remote: RemoteSend) {
        let RemoteSend {
            peers,
            class,
            method,
            body,
        } = remote;
        for peer in peers.as_slice() {
            // Counted; the sender was told that only the mailbox took it.
            self.send(peer, class, method, body.clone()).ok();
        }
    }
}
