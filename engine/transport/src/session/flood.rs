//! Whether what the peer of a session sends is read: now, later, or never again.

use std::time::Instant;

use millrace_protocol::flood::{Flood, FloodGuard, PacketCounts, Verdict};

use super::Session;
use crate::config::TransportConfig;
use crate::counters::Counter;
use crate::service::handle::ConnectionHandle;

/// What [`FloodGuard`] said of a session.
#[derive(Debug)]
pub(super) struct Flow {
    guard: FloodGuard,
    /// Nothing is read before then.
    held_until: Option<Instant>,
    /// How often frames were held back.
    holds: u64,
    /// What the session is to be closed for.
    cut: Option<Flood>,
}

impl Flow {
    pub(super) fn new(config: &TransportConfig, now: Instant) -> Self {
        Self {
            guard: FloodGuard::new(config.floods(), now),
            held_until: None,
            holds: 0,
            cut: None,
        }
    }

    /// Whether anything may be read now.
    #[inline]
    pub(super) fn is_open(&self, now: Instant) -> bool {
        self.cut.is_none() && self.held_until.is_none_or(|until| until <= now)
    }

    /// As [`Self::is_open`], after a look at what came if one is due.
    #[inline]
    pub(super) fn goes_on(&mut self, handle: &ConnectionHandle, now: Instant) -> bool {
        if handle.work.is_due() {
            self.judge(handle, now);
        }
        self.is_open(now)
    }

    /// When reading goes on that is held back.
    pub(super) fn opens_at(&self) -> Option<Instant> {
        self.held_until
    }

    /// Asks the guard about all that came.
    pub(super) fn judge(&mut self, handle: &ConnectionHandle, now: Instant) {
        let verdict = self.guard.judge(&handle.work.take(), now);
        self.take_up(verdict, handle);
    }

    fn take_up(&mut self, verdict: Verdict, handle: &ConnectionHandle) {
        match verdict {
            Verdict::Go => {}
            Verdict::Hold(until) => {
                self.held_until = Some(until);
                self.holds += 1;
                handle.state.counters.add(Counter::FramesHeld, 1);
            }
            Verdict::Cut(flood) => self.cut = self.cut.or(Some(flood)),
        }
    }
}

impl Session {
    /// What the connection is to be closed for, if the peer floods it.
    #[inline]
    pub fn flood(&self) -> Option<Flood> {
        self.flow.cut
    }

    /// How often frames of the peer were held back, because they came too fast.
    pub fn holds(&self) -> u64 {
        self.flow.holds
    }

    /// Whether frames were held back until now; said once. What waits is to be received then.
    pub fn take_release(&mut self, now: Instant) -> bool {
        self.flow
            .held_until
            .take_if(|until| *until <= now)
            .is_some()
    }

    /// Takes up what QUIC says of packets; the frames in them are the session's to say.
    pub(crate) fn judge_packets(&mut self, packets: PacketCounts, now: Instant) {
        let mut counts = self.handle.work.take();
        counts.packets = PacketCounts {
            frames: self.handle.work.take_frames_in_packets(),
            ..packets
        };
        let verdict = self.flow.guard.judge(&counts, now);
        self.flow.take_up(verdict, &self.handle);
    }
}
