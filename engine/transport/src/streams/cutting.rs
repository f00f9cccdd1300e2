//! Cuts the answers of a connection that its peer does not read.
//!
//! Invariant: what is cut gives back all that it holds, here and in the path.

use std::time::{Duration, Instant};

use millrace_protocol::frame::{Header, Kind};

use super::{Active, CODE_CANCELLED, StreamCarrier};
use crate::carrier::Outgoing;
use crate::path::StreamPath;
use crate::progress::{Turn, unread};

/// What answers must bring, not to be cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// In each interval.
    pub(crate) progress_bytes: u64,
    /// How long they may wait for their streams while nothing comes forward.
    pub(crate) patience: Duration,
}

impl StreamCarrier {
    /// Whether there may be an answer that the peer has not read.
    #[inline]
    pub(crate) fn may_have_answers(&self) -> bool {
        !self.is_idle() || self.answers.may_have_sent()
    }

    /// Cuts the answers that the peer does not read: those with a stream of which too little came
    /// forward since the last call, and of those before them; and all that wait, when as little
    /// came forward of all for `patience`. `lanes_bytes`: what lanes brought meanwhile, which are
    /// fed first. Their headers; none when there is nothing left to judge.
    pub(crate) fn cut_unread<P: StreamPath>(
        &mut self,
        path: &mut P,
        lanes_bytes: u64,
        terms: &Terms,
        now: Instant,
    ) -> Option<Vec<Header>> {
        let Terms {
            progress_bytes,
            patience,
        } = *terms;
        let mut turns = self.answers.take_turns();
        turns.push(Turn {
            place: (0, 0),
            bytes: lanes_bytes,
            is_judged: false,
        });
        turns.extend(self.active.iter_mut().map(Active::take_turn));
        let moved_bytes: u64 = turns.iter().map(|turn| turn.bytes).sum();
        if moved_bytes >= progress_bytes {
            self.moved_at = Some(now);
        }
        let moved_at = *self.moved_at.get_or_insert(now);
        let mut cut = Vec::new();
        for stream in unread(turns, progress_bytes) {
            match self.active.iter().position(|one| one.stream == stream) {
                Some(at) => {
                    cut.push(self.active[at].message.header);
                    self.reset_active(path, at);
                }
                None => {
                    cut.extend(self.answers.take_sent(stream));
                    path.stream_reset(stream, CODE_CANCELLED);
                }
            }
        }
        if now >= moved_at + patience {
            self.cut_waiting(&mut cut);
        }
        if !cut.is_empty() {
            self.answers.on_cut();
        }
        let is_answer = |message: &Outgoing| message.header.kind == Kind::Response;
        let has_more = self.active.iter().any(Active::is_answer)
            || self.waiting.iter().flatten().any(is_answer)
            || self.answers.has_sent();
        if !has_more {
            self.moved_at = None;
        }
        (has_more || !cut.is_empty()).then_some(cut)
    }

    fn cut_waiting(&mut self, cut: &mut Vec<Header>) {
        for queue in &mut self.waiting {
            queue.retain(|message| {
                let is_kept = message.header.kind != Kind::Response;
                if !is_kept {
                    cut.push(message.header);
                    self.answers.remove(message);
                }
                is_kept
            });
        }
    }
}
