//! Questions to peers for registry versions: which are under way, what they brought, why they
//! failed.
//!
//! 1. A peer is asked one question at a time, by all shards together: a second one has to wait
//!    until the answer to the first was checked. So a peer has at most one place in the queue of
//!    answers, however often it connects.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_protocol::id::NodeId;
use millrace_transport::Payload;

/// The questions of one node.
#[derive(Debug, Default)]
pub(crate) struct Questions {
    /// At most as many as there are connected peers, and answers that are checked or wait for it
    /// ([`ANSWERS_MAX`](crate::follow::ANSWERS_MAX)): their peers may have left.
    asked: Mutex<BTreeSet<NodeId>>,
    failed: Mutex<BTreeMap<&'static str, u64>>,
}

/// A question to a peer, under way until this is dropped.
#[derive(Debug)]
pub(crate) struct Question {
    peer: NodeId,
    questions: Arc<Questions>,
}

impl Questions {
    /// Begins a question to `peer`; none while another one is under way.
    pub(crate) fn ask(self: &Arc<Self>, peer: NodeId) -> Option<Question> {
        let is_first = lock(&self.asked).insert(peer);
        is_first.then(|| Question {
            peer,
            questions: Arc::clone(self),
        })
    }

    /// Counts a question that failed; whether it is the first for this reason.
    pub(crate) fn count_failed(&self, reason: &'static str) -> bool {
        let mut failed = lock(&self.failed);
        let count = failed.entry(reason).or_default();
        *count += 1;
        *count == 1
    }

    /// How many questions failed, by reason.
    pub(crate) fn failed(&self) -> Vec<(&'static str, u64)> {
        let failed = lock(&self.failed);
        failed
            .iter()
            .map(|(reason, count)| (*reason, *count))
            .collect()
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        lock(&self.questions.asked).remove(&self.peer);
    }
}

/// Versions that a peer sent, as they came. The peer is not asked again while this exists.
#[derive(Debug)]
pub struct Offer {
    question: Question,
    /// The answer: its chunks stay charged to the peer.
    pub(crate) versions: Payload,
}

impl Offer {
    pub(crate) fn new(question: Question, versions: Payload) -> Self {
        Self { question, versions }
    }

    /// The peer that sent them.
    pub fn peer(&self) -> NodeId {
        self.question.peer
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
