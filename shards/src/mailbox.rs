//! A shard's mailbox: a bounded queue that any thread may push to and that the shard's loop polls.
//!
//! Cost: a push to a busy shard is one queue operation, a fence and a load; only a parked shard
//! costs its sender a wake-up.
//!
//! Invariants:
//!
//! 1. The queue never grows: a full mailbox is the sender's to handle.
//! 2. A message is visible before its wake-up is decided.
//! 3. After the receiver is gone every send fails with `Closed`.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::park::Parker;
use crate::sync::{ArrayQueue, AtomicBool, Ordering, fence};

struct Shared<M> {
    queue: ArrayQueue<M>,
    closed: AtomicBool,
    parker: Arc<Parker>,
}

/// Makes a mailbox of `capacity` messages, at least one, before its shard exists, so that shards
/// can be given each other's senders.
///
/// # Errors
/// The kernel's, when the pipe that wakes the shard cannot be made: `EMFILE` or `ENFILE` (pipe(2)).
pub fn mailbox<M: Send>(capacity: usize) -> io::Result<(MailSender<M>, MailReceiver<M>)> {
    let shared = Arc::new(Shared {
        queue: ArrayQueue::new(capacity.max(1)),
        closed: AtomicBool::new(false),
        parker: Arc::new(Parker::new()?),
    });
    Ok((
        MailSender {
            shared: Arc::clone(&shared),
        },
        MailReceiver { shared },
    ))
}

/// Sends to one shard, from any thread.
pub struct MailSender<M> {
    shared: Arc<Shared<M>>,
}

/// Why a message was not taken; gives it back.
#[derive(thiserror::Error)]
pub enum MailError<M> {
    /// The shard has as many messages waiting as its config allows.
    #[error("the shard's mailbox is full")]
    Full(M),
    /// The shard has stopped.
    #[error("the shard has stopped")]
    Closed(M),
}

impl<M> MailError<M> {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Full(_) => "full",
            Self::Closed(_) => "closed",
        }
    }

    /// The message that was not taken.
    #[must_use]
    pub fn into_message(self) -> M {
        match self {
            Self::Full(message) | Self::Closed(message) => message,
        }
    }
}

impl<M> fmt::Debug for MailError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

impl<M: Send> MailSender<M> {
    /// Queues a message and wakes the shard if it sleeps. Messages of one thread keep their order.
    ///
    /// # Errors
    /// [`MailError::Full`] when the mailbox is full, [`MailError::Closed`] when its shard has
    /// stopped; both give the message back. A message that is sent while the shard stops may be
    /// taken and then dropped.
    pub fn try_send(&self, message: M) -> Result<(), MailError<M>> {
        if self.is_closed() {
            return Err(MailError::Closed(message));
        }
        self.shared.queue.push(message).map_err(MailError::Full)?;
        // Pairs with the fence of the receiver's drop: one of the two sees the other, so that no
        // message is left in a queue that no shard reads.
        fence(Ordering::SeqCst);
        if self.is_closed() {
            while self.shared.queue.pop().is_some() {}
        }
        self.shared.parker.wake();
        Ok(())
    }

    /// Whether the shard has stopped.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// Messages waiting now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.queue.len()
    }

    /// Whether no message waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shared.queue.is_empty()
    }
}

impl<M> Clone for MailSender<M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<M> fmt::Debug for MailSender<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MailSender")
            .field("waiting", &self.shared.queue.len())
            .finish()
    }
}

/// The shard's end of a mailbox.
pub struct MailReceiver<M> {
    shared: Arc<Shared<M>>,
}

impl<M: Send> MailReceiver<M> {
    /// The next message, without a wait.
    pub fn try_recv(&mut self) -> Option<M> {
        self.shared.queue.pop()
    }

    /// Whether no message waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shared.queue.is_empty()
    }

    /// A sender to this mailbox.
    #[must_use]
    pub fn sender(&self) -> MailSender<M> {
        MailSender {
            shared: Arc::clone(&self.shared),
        }
    }

    pub(crate) fn parker(&self) -> Arc<Parker> {
        Arc::clone(&self.shared.parker)
    }
}

impl<M> Drop for MailReceiver<M> {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        // What waits is dropped here and not with the last sender, which may live much longer.
        while self.shared.queue.pop().is_some() {}
    }
}

impl<M> fmt::Debug for MailReceiver<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MailReceiver")
            .field("waiting", &self.shared.queue.len())
            .finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// A full mailbox gives the message back and takes one again after a receive.
    #[test]
    fn full_then_free() {
        let (sender, mut receiver) = mailbox(2).unwrap();
        sender.try_send(1).unwrap();
        sender.try_send(2).unwrap();
        let refused = sender.try_send(3).unwrap_err();
        assert_eq!(refused.reason(), "full");
        assert_eq!(refused.into_message(), 3);
        assert_eq!(receiver.try_recv(), Some(1));
        sender.try_send(4).unwrap();
        assert_eq!(receiver.try_recv(), Some(2));
        assert_eq!(receiver.try_recv(), Some(4));
        assert_eq!(receiver.try_recv(), None);
    }

    /// A stopped shard's mailbox refuses, and drops what waited.
    #[test]
    fn closed() {
        let (sender, receiver) = mailbox(2).unwrap();
        let witness = Arc::new(());
        sender.try_send(Arc::clone(&witness)).unwrap();
        drop(receiver);
        assert_eq!(Arc::strong_count(&witness), 1);
        assert_eq!(sender.try_send(witness).unwrap_err().reason(), "closed");
        assert!(sender.is_closed());
    }
}
