//! The work that the peer of one connection makes, counted until [`FloodGuard`] is asked about it.
//!
//! On the path of a frame it is one addition.
//!
//! [`FloodGuard`]: millrace_protocol::flood::FloodGuard

use std::cell::Cell;

use millrace_protocol::flood::Counts;

/// The guard is asked once in so many frames: less than one lane brings in a read.
const FRAMES_PER_LOOK: u64 = 4_096;

/// Frames that a stream costs as much as: it is opened, read, and freed.
const STREAM_FRAMES: u64 = 8;

/// What came since the last look.
#[derive(Debug, Default)]
pub(crate) struct Work {
    frames: Cell<u64>,
    /// Frames that the look at packets has not taken up.
    frames_in_packets: Cell<u64>,
    requests: Cell<u64>,
    cancellations: Cell<u64>,
    unasked_answers: Cell<u64>,
    unfinished: Cell<u64>,
    stalled: Cell<u64>,
    probes: Cell<u64>,
    /// Requests of ours that ended without their answer: the peer may send it still, or reset its
    /// stream. Not more than requests were made.
    owed: Cell<u64>,
}

fn add(count: &Cell<u64>, n: u64) {
    count.set(count.get() + n);
}

impl Work {
    /// A frame came.
    #[inline]
    pub(crate) fn frame(&self) {
        add(&self.frames, 1);
    }

    /// The peer opened so many streams.
    pub(crate) fn streams(&self, opened: u64) {
        add(&self.frames, opened * STREAM_FRAMES);
    }

    /// The header of a request came.
    #[inline]
    pub(crate) fn request(&self) {
        add(&self.requests, 1);
    }

    /// A cancellation came.
    pub(crate) fn cancellation(&self) {
        add(&self.cancellations, 1);
    }

    /// A probe or its answer came, or a datagram that is no frame.
    pub(crate) fn probe(&self) {
        add(&self.probes, 1);
    }

    /// A message stood still and was cut.
    pub(crate) fn stalled(&self) {
        add(&self.stalled, 1);
    }

    /// A request of ours ends without its answer.
    pub(crate) fn owe(&self) {
        add(&self.owed, 1);
    }

    fn take_owed(&self) -> bool {
        let owed = self.owed.get();
        self.owed.set(owed.saturating_sub(1));
        owed > 0
    }

    /// An answer came that no request waits for.
    pub(crate) fn late_answer(&self) {
        if !self.take_owed() {
            add(&self.unasked_answers, 1);
        }
    }

    /// The peer ended a message before it was whole. `may_be_answer`: its header did not come, and
    /// it may be the answer to a request that we took back.
    pub(crate) fn unfinished(&self, may_be_answer: bool) {
        if !(may_be_answer && self.take_owed()) {
            add(&self.unfinished, 1);
        }
    }

    /// Whether the guard is to be asked.
    #[inline]
    pub(crate) fn is_due(&self) -> bool {
        self.frames.get() >= FRAMES_PER_LOOK
    }

    /// What came since the last call.
    pub(crate) fn take(&self) -> Counts {
        add(&self.frames_in_packets, self.frames.get());
        Counts {
            frames: self.frames.take(),
            unasked_answers: self.unasked_answers.take(),
            requests: self.requests.take(),
            cancellations: self.cancellations.take(),
            unfinished: self.unfinished.take(),
            stalled: self.stalled.take(),
            probes: self.probes.take(),
            ..Counts::default()
        }
    }

    /// Frames that came since the last call, for the look at packets.
    pub(crate) fn take_frames_in_packets(&self) -> u64 {
        self.frames_in_packets.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Protects an honest peer whose answers come after their deadline: each request that was given
    // up pays for one of them, or for one stream that is reset in its place.
    #[test]
    fn a_request_that_was_given_up_pays_for_its_answer() {
        let work = Work::default();
        for _ in 0..3 {
            work.owe();
        }
        work.late_answer();
        work.unfinished(true);
        work.unfinished(false);
        work.late_answer();
        work.late_answer();
        work.unfinished(true);
        let counts = work.take();
        assert_eq!((counts.unasked_answers, counts.unfinished), (1, 2));
        assert_eq!(work.take(), Counts::default(), "taken once");
    }

    #[test]
    fn streams_cost_more_than_frames_and_both_pay_for_packets() {
        let work = Work::default();
        work.streams(FRAMES_PER_LOOK / STREAM_FRAMES - 1);
        for _ in 1..STREAM_FRAMES {
            work.frame();
        }
        assert!(!work.is_due());
        work.frame();
        assert!(work.is_due());
        work.take();
        work.frame();
        work.take();
        assert_eq!(work.take_frames_in_packets(), FRAMES_PER_LOOK + 1);
        assert_eq!(work.take_frames_in_packets(), 0);
    }
}
