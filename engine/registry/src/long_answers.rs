//! Answers that are longer than 64 KiB: they lie in chunks of the shard's pool, and peers that ask
//! the same within some seconds share one copy.
//!
//! 1. What peers ask has no influence on how much is copied and held: for one set of versions, an
//!    answer from the first question's beginning and one with the newest version alone. Any other
//!    question gets the one of them that fits. No peer loses by it: every version says everything.
//! 2. At most one task waits for the end of a copy.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::wire::Newer;

/// How long chunks are kept after the last copy: when a version comes, all peers ask within a few
/// poll intervals.
const TTL: Duration = Duration::from_secs(10);

/// The long answers of one shard. `B` is a copy in chunks.
#[derive(Debug)]
pub(crate) struct LongAnswers<B> {
    /// Which set of versions they are of.
    set: u64,
    /// Where the answer begins in the encoded set, and its copy: at most two.
    held: Vec<(usize, B)>,
    until: Option<Instant>,
}

impl<B> Default for LongAnswers<B> {
    fn default() -> Self {
        Self {
            set: 0,
            held: Vec::new(),
            until: None,
        }
    }
}

impl<B: Clone> LongAnswers<B> {
    /// The copy that answers a question for `newer`: one that is held, or what `copy` makes; none
    /// if it makes none.
    pub(crate) fn answer(
        &mut self,
        newer: &Newer,
        copy: impl FnOnce(&Bytes) -> Option<B>,
    ) -> Option<B> {
        if self.set != newer.set {
            // Before the copy: the pool may have room for one only.
            self.held.clear();
            self.set = newer.set;
        }
        let (begins, bytes) = match self.held.first() {
            None => (newer.begins, &newer.bytes),
            // The peer gets what is held, without the oldest that it asks for.
            Some((held, body)) if *held >= newer.begins => return Some(body.clone()),
            Some(_) => (newer.newest_begins, &newer.newest),
        };
        if let Some((_, body)) = self.held.iter().find(|(held, _)| *held == begins) {
            return Some(body.clone());
        }
        let body = copy(bytes)?;
        self.held.push((begins, body.clone()));
        Some(body)
    }

    /// What is held stays for a while from `now`. True: no task waits for its end yet, and the
    /// caller starts one.
    pub(crate) fn keep(&mut self, now: Instant) -> bool {
        self.until.replace(now + TTL).is_none()
    }

    /// How long the task has to wait from `now`. None: nothing is held any more, and the task ends.
    pub(crate) fn left(&mut self, now: Instant) -> Option<Duration> {
        let left = self.until?.checked_duration_since(now);
        let left = left.filter(|left| !left.is_zero());
        if left.is_none() {
            *self = Self {
                set: self.set,
                ..Self::default()
            };
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The newer versions of a set of three, from this one on; each takes a byte.
    fn newer(set: u64, begins: usize) -> Newer {
        let all = Bytes::from_static(b"abc");
        Newer {
            set,
            begins,
            bytes: all.slice(begins..),
            newest_begins: 2,
            newest: all.slice(2..),
        }
    }

    /// Protects a shard from a peer that asks for something else each time: it is answered, and
    /// makes the shard neither copy again nor wait in a second task.
    #[test]
    fn alternating_questions_make_two_copies_and_one_task() {
        let mut long = LongAnswers::default();
        let (mut copies, mut tasks) = (0, 0);
        let now = Instant::now();
        let mut ask = |set, begins| {
            let before = copies;
            let answer = long.answer(&newer(set, begins), |bytes| {
                copies += 1;
                Some(bytes.to_vec())
            });
            if copies != before {
                tasks += usize::from(long.keep(now));
            }
            answer.unwrap()
        };
        for _ in 0..100 {
            assert_eq!(ask(1, 0), b"abc");
            assert_eq!(ask(1, 1), b"c", "every version says everything");
            assert_eq!(ask(1, 2), b"c");
        }
        // The first question of a set says where its longest answer begins.
        assert_eq!(ask(2, 1), b"bc");
        assert_eq!(ask(2, 0), b"bc");
        assert_eq!((copies, tasks), (3, 1));
    }

    /// Protects the pool of a shard: what was copied is given back.
    #[test]
    fn what_is_held_ends_after_the_last_copy() {
        let mut long = LongAnswers::default();
        let start = Instant::now();
        let copy = |bytes: &Bytes| Some(bytes.to_vec());
        long.answer(&newer(1, 0), copy).unwrap();
        assert!(long.keep(start));
        long.answer(&newer(1, 1), copy).unwrap();
        assert!(!long.keep(start + TTL / 2));
        assert_eq!(long.left(start + TTL), Some(TTL / 2));
        assert_eq!(long.held.len(), 2);
        assert_eq!(long.left(start + TTL * 3 / 2), None);
        assert_eq!(long.held.len(), 0);
        long.answer(&newer(1, 0), copy).unwrap();
        assert!(long.keep(start + TTL * 2), "the task has ended");
    }

    /// Protects later questions from a pool that was full.
    #[test]
    fn a_copy_that_was_not_made_is_not_held() {
        let mut long = LongAnswers::default();
        assert_eq!(long.answer(&newer(1, 0), |_| None::<Vec<u8>>), None);
        let answer = long.answer(&newer(1, 1), |bytes| Some(bytes.to_vec()));
        assert_eq!(answer.as_deref(), Some(&b"bc"[..]));
    }
}
