//! Answers on one connection that their peer has not read: what they may hold, and for how long.
//!
//! An answer waits for its stream, is fed to the path, and is then in flight until the peer has
//! acknowledged its last byte.
//!
//! Invariants
//! 1. An answer in chunks counts ([`UnreadAnswer`]) from when it is queued until nothing of it is
//!    held here or in quiche.
//! 2. An answer in memory of its own counts from when it is queued until the path has taken all of
//!    it, or it is taken back.
//! 3. Once the path has taken all of an answer in chunks, there is an entry for it while quiche
//!    holds any of it; entries of others are dropped when they are as many.

use std::rc::{Rc, Weak};

use millrace_protocol::frame::{Header, Kind};
use millrace_protocol::id::NodeId;

use crate::carrier::{Outgoing, QueueFull};
use crate::progress::{Finished, Turn};
use crate::queue_account::QueueAccount;
use crate::service::message::Payload;
use crate::unread::{SharedUnread, UnreadAnswer};

/// Entries of answers that the path has taken, before those that were read are looked for.
const SENT_LOOK_MIN: usize = 64;

/// What came of a message since it was looked at last.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Look {
    seen_bytes: u64,
    /// A whole interval has passed since the message got its stream.
    is_judged: bool,
}

impl Look {
    /// Bytes since the last look. `moved_bytes`: those so far. They fall while quiche holds a slice
    /// twice, for a moment.
    fn bytes(&self, moved_bytes: u64) -> u64 {
        moved_bytes.saturating_sub(self.seen_bytes)
    }

    /// Ends the interval.
    pub(crate) fn take_turn(&mut self, place: (usize, u64), moved_bytes: u64) -> Turn {
        let turn = Turn {
            place,
            bytes: self.bytes(moved_bytes),
            is_judged: std::mem::replace(&mut self.is_judged, true),
        };
        self.seen_bytes = self.seen_bytes.max(moved_bytes);
        turn
    }
}

/// An answer of which the path has taken all.
#[derive(Debug)]
struct Sent {
    header: Header,
    stream: u64,
    /// Bytes of the body, and with its opening.
    body_bytes: u64,
    total_bytes: u64,
    look: Look,
    answer: Weak<UnreadAnswer>,
}

/// The unread answers of one connection.
#[derive(Debug)]
pub(crate) struct Answers {
    peer: NodeId,
    /// In memory of their own, and the bound.
    plain_bytes: u64,
    plain_bytes_max: u64,
    /// What all connections of the shard hold queued, `plain_bytes` among it.
    queues: Rc<QueueAccount>,
    unread: SharedUnread,
    sent: Vec<Sent>,
    /// Entries at which those that were read are looked for.
    sent_look: usize,
    /// Messages that the path has taken or the peer has read since progress was judged.
    finished: Finished,
}

impl Answers {
    pub(crate) fn new(
        peer: NodeId,
        plain_bytes_max: u64,
        queues: &Rc<QueueAccount>,
        unread: &SharedUnread,
    ) -> Self {
        Self {
            peer,
            plain_bytes: 0,
            plain_bytes_max,
            queues: Rc::clone(queues),
            unread: Rc::clone(unread),
            sent: Vec::new(),
            sent_look: SENT_LOOK_MIN,
            finished: Finished::default(),
        }
    }

    /// Counts `message`, if it is an answer.
    ///
    /// # Errors
    /// When there is no room for it. Nothing changes then.
    pub(crate) fn add(&mut self, message: &mut Outgoing) -> Result<(), QueueFull> {
        if message.header.kind != Kind::Response {
            return Ok(());
        }
        match &message.body {
            Payload::Empty => {}
            Payload::Bytes(bytes) => {
                let bytes = bytes.len() as u64;
                if self.plain_bytes + bytes > self.plain_bytes_max {
                    return Err(QueueFull::Queue);
                }
                self.queues.try_add(self.plain_bytes, bytes)?;
                self.plain_bytes += bytes;
            }
            Payload::Chunks(body) => {
                let unread = UnreadAnswer::new(&self.unread, self.peer, body);
                message.unread = Some(unread.map_err(QueueFull::Unread)?);
            }
        }
        Ok(())
    }

    /// The message waits no more, and is not fed. One in chunks counts until it is dropped.
    pub(crate) fn remove(&mut self, message: &Outgoing) {
        if message.header.kind == Kind::Response
            && let Payload::Bytes(bytes) = &message.body
        {
            let bytes = bytes.len() as u64;
            self.plain_bytes -= bytes;
            self.queues.remove(bytes);
        }
    }

    /// The path has taken all of a message, `total_bytes` with what goes before its body. To be
    /// called before it is dropped.
    pub(crate) fn on_sent(
        &mut self,
        message: &Outgoing,
        stream: u64,
        total_bytes: u64,
        look: Look,
    ) {
        let Some(answer) = &message.unread else {
            let class = message.header.class;
            return self.finished.add(class, stream, look.bytes(total_bytes));
        };
        answer.set_sent(true);
        if self.sent.len() >= self.sent_look {
            self.drop_read();
            self.sent_look = SENT_LOOK_MIN.max(2 * self.sent.len());
        }
        self.sent.push(Sent {
            header: message.header,
            stream,
            body_bytes: message.body.len(),
            total_bytes,
            look,
            answer: Rc::downgrade(answer),
        });
    }

    /// Drops the entries of answers that were read to their end.
    fn drop_read(&mut self) {
        let finished = &mut self.finished;
        self.sent.retain(|sent| {
            let is_held = sent.answer.strong_count() > 0;
            if !is_held {
                let moved_bytes = sent.look.bytes(sent.total_bytes + sent.body_bytes);
                finished.add(sent.header.class, sent.stream, moved_bytes);
            }
            is_held
        });
    }

    /// Whether quiche holds some of an answer that the path has taken.
    pub(crate) fn has_sent(&mut self) -> bool {
        self.drop_read();
        !self.sent.is_empty()
    }

    /// Whether there may be such an answer.
    #[inline]
    pub(crate) fn may_have_sent(&self) -> bool {
        !self.sent.is_empty()
    }

    /// What came of the messages in the last interval that the path has taken.
    pub(crate) fn take_turns(&mut self) -> Vec<Turn> {
        self.drop_read();
        let mut turns: Vec<Turn> = self.finished.take_turns().collect();
        turns.extend(self.sent.iter_mut().map(|sent| {
            let acknowledged_bytes = match sent.answer.upgrade() {
                Some(answer) => answer.acknowledged_bytes(sent.body_bytes),
                None => sent.body_bytes,
            };
            let place = (sent.header.class.index(), sent.stream);
            sent.look
                .take_turn(place, sent.total_bytes + acknowledged_bytes)
        }));
        turns
    }

    /// Forgets the answer on this stream, of which the path has taken all: it is cut.
    pub(crate) fn take_sent(&mut self, stream: u64) -> Option<Header> {
        let at = self.sent.iter().position(|sent| sent.stream == stream)?;
        let sent = self.sent.swap_remove(at);
        sent.forget();
        Some(sent.header)
    }

    /// An answer was cut because the peer did not read it.
    pub(crate) fn on_cut(&self) {
        self.unread.borrow_mut().on_cut(self.peer);
    }

    /// Bytes of answers in memory of their own that wait or flow.
    #[cfg(test)]
    pub(crate) fn plain_bytes(&self) -> u64 {
        self.plain_bytes
    }

    /// The connection is gone.
    pub(crate) fn clear(&mut self) {
        self.queues.remove(std::mem::take(&mut self.plain_bytes));
        self.sent.drain(..).for_each(|sent| sent.forget());
    }
}

impl Sent {
    /// It will not be read to its end.
    fn forget(&self) {
        if let Some(answer) = self.answer.upgrade() {
            answer.set_sent(false);
        }
    }
}
