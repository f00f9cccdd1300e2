//! The peer's requests that are answered later, and those that the peer took back.

use std::task::{Context, Poll};

use millrace_protocol::frame::Class;

use super::ConnectionHandle;
use crate::counters::{Counter, Family};

impl ConnectionHandle {
    pub(crate) fn open_inbound(&self, class: Class, id: u32) -> bool {
        self.inbound.borrow_mut().begin(id, class, None).is_ok()
    }

    pub(crate) fn close_inbound(&self, id: u32) -> bool {
        self.inbound.borrow_mut().end(id).is_some()
    }

    /// Ready when the peer no longer waits for the answer to its request `id`.
    pub(crate) fn poll_cancelled(&self, id: u32, context: &Context<'_>) -> Poll<()> {
        match self.inbound.borrow_mut().get_mut(id) {
            Some(waker) => {
                *waker = Some(context.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }

    pub(crate) fn is_inbound_open(&self, id: u32) -> bool {
        self.inbound.borrow_mut().get_mut(id).is_some()
    }

    /// The peer took its request back, or no longer wants the answer that is under way. False when
    /// the request is not in flight here: it was answered, or has not arrived whole. It is then
    /// remembered.
    pub(crate) fn on_cancel(&self, id: u32) -> bool {
        let ended = self.inbound.borrow_mut().end(id);
        if let Some(waker) = ended {
            self.state.counters.add(Counter::RequestsCancelled, 1);
            if let Some(waker) = waker {
                waker.wake();
            }
            return true;
        }
        if self.out.borrow_mut().withdraw_answer(id).is_err() {
            self.count_too_many_cancellations();
        }
        self.mark_dirty();
        let now = self.state.now.get();
        self.early_cancels.borrow_mut().insert(id, now);
        false
    }

    /// A cancellation of the peer's was dropped, as one too many.
    pub(crate) fn count_too_many_cancellations(&self) {
        let counters = &self.state.counters;
        counters.count(Family::Rejected, "peer_too_many_cancellations");
    }

    /// Whether the peer took the request `id` back before it arrived: no service is to hear of it.
    #[inline]
    pub(crate) fn take_early_cancel(&self, id: u32) -> bool {
        let now = self.state.now.get();
        self.early_cancels.borrow_mut().take(id, now)
    }
}
