//! One answer in chunks that its peer has not read: it counts until nothing of it is held.
//!
//! Its message holds it while it waits and is fed; quiche holds it by the slices that it was given,
//! each until the peer has acknowledged it.
//!
//! Invariant: while any of it is held, it is one of the shard's [`UnreadAnswers`]. Its
//! `in_flight_bytes` are those of the living slices.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use millrace_protocol::id::NodeId;
use millrace_protocol::unread::{BodyKey, UnreadAnswers, UnreadError};
use millrace_shards::chunk::{Body, Chunk, taken_bytes};

/// The unread answers of a shard, which its connections share.
pub(crate) type SharedUnread = Rc<RefCell<UnreadAnswers>>;

/// An answer in chunks that is not read to its end.
#[derive(Debug)]
pub(crate) struct UnreadAnswer {
    unread: SharedUnread,
    peer: NodeId,
    body: BodyKey,
    /// The chunk that names the body: nothing else lies there while the answer is counted.
    _first: Option<Chunk>,
    /// What quiche holds of it.
    in_flight_bytes: Cell<u64>,
    is_sent: Cell<bool>,
}

impl UnreadAnswer {
    /// Counts an answer with this body, which is not empty.
    ///
    /// # Errors
    /// When the peer, or all peers, have their share already.
    pub(crate) fn new(
        unread: &SharedUnread,
        peer: NodeId,
        body: &Body,
    ) -> Result<Rc<Self>, UnreadError> {
        let first = body
            .chunks()
            .first()
            .map_or(0, |chunk| chunk.as_ptr() as usize);
        let taken = body
            .chunks()
            .iter()
            .map(|chunk| taken_bytes(chunk.len() as u64));
        let key = (first, taken.sum());
        let mut held = unread.borrow_mut();
        held.add(peer, key)?;
        drop(held);
        Ok(Rc::new(Self {
            unread: Rc::clone(unread),
            peer,
            body: key,
            _first: body.chunks().first().cloned(),
            in_flight_bytes: Cell::new(0),
            is_sent: Cell::new(false),
        }))
    }

    /// Whether the path has taken all of it, and it was not cut since. If so, the peer has read it
    /// when it is dropped.
    pub(crate) fn set_sent(&self, is_sent: bool) {
        self.is_sent.set(is_sent);
    }

    /// Of the first `taken_bytes`, which the path has taken, those that the peer acknowledged.
    pub(crate) fn acknowledged_bytes(&self, taken_bytes: u64) -> u64 {
        taken_bytes.saturating_sub(self.in_flight_bytes.get())
    }
}

impl Drop for UnreadAnswer {
    fn drop(&mut self) {
        let mut unread = self.unread.borrow_mut();
        unread.remove(&self.peer, self.body);
        if self.is_sent.get() {
            unread.on_read(&self.peer);
        }
    }
}

/// A slice of an unread answer that the path holds.
#[derive(Debug)]
pub(crate) struct UnreadSlice {
    answer: Rc<UnreadAnswer>,
    bytes: u64,
}

impl UnreadSlice {
    pub(crate) fn new(answer: &Rc<UnreadAnswer>, bytes: usize) -> Rc<Self> {
        let in_flight = &answer.in_flight_bytes;
        in_flight.set(in_flight.get() + bytes as u64);
        Rc::new(Self {
            answer: Rc::clone(answer),
            bytes: bytes as u64,
        })
    }

    /// As two slices, of which the first has `at` bytes.
    pub(crate) fn split(&self, at: usize) -> [Rc<Self>; 2] {
        let rest = self.bytes.saturating_sub(at as u64);
        [at, rest as usize].map(|bytes| Self::new(&self.answer, bytes))
    }
}

impl Drop for UnreadSlice {
    fn drop(&mut self) {
        let in_flight = &self.answer.in_flight_bytes;
        in_flight.set(in_flight.get().saturating_sub(self.bytes));
    }
}
