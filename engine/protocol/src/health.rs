//! Probes of one connection: round trip, loss, and when to give it up.
//!
//! A probe is a datagram, which QUIC never repeats. On a path that loses 13 % of its packets each
//! way, a probe or its reply is lost with 24 %, and three in a row once in about 90 s. So a probe
//! measures, and silence judges.
//!
//! 1. A probe is sent every `interval`, at a time of the grid, and earlier only on request.
//! 2. The connection fails when `missed_max` probes in a row have been out for an interval without
//!    a reply, and nothing else of the peer arrived since the first of them was sent; the machine
//!    reports that once.
//! 3. A reply counts for the probe with its number, once; any other is ignored.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::time_grid::TimeGrid;

/// Times and bounds of [`Health`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthConfig {
    /// Time between probes; also how long a reply may take before the probe counts as lost.
    pub interval: Duration,
    /// Unanswered probes in a row that end the connection, if nothing arrives meanwhile.
    pub missed_max: u32,
    /// Probes that the loss is computed over; at least `missed_max` are kept.
    pub window: usize,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(1),
            missed_max: 10,
            window: 32,
        }
    }
}

/// What the shell must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthAction {
    /// Send a probe with this number.
    Probe {
        /// The number that the peer's reply repeats.
        sequence: u32,
    },
    /// Close the connection as lost; connection management dials again.
    CloseAndRedial,
}

/// Round-trip times of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rtt {
    /// Round trip of the last reply.
    pub last: Duration,
    /// The smallest round trip since the connection came up.
    pub min: Duration,
    /// Moving mean, in which a new sample weighs an eighth (RFC 9002, section 5.3).
    pub smoothed: Duration,
}

/// Probe machine of one connection.
#[derive(Debug)]
pub struct Health {
    config: HealthConfig,
    grid: TimeGrid,
    next_at: Instant,
    sequence: u32,
    /// The last probes, oldest first.
    probes: VecDeque<Probe>,
    /// When the caller last said that something had arrived.
    alive_at: Option<Instant>,
    rtt: Option<Rtt>,
    probe_due: bool,
    failed: bool,
    failure_told: bool,
}

#[derive(Debug)]
struct Probe {
    sequence: u32,
    sent: Instant,
    answered: bool,
}

impl Health {
    /// A machine that sends its first probe at once, and the others at times of `grid`.
    pub fn new(config: HealthConfig, grid: TimeGrid, now: Instant) -> Self {
        Self {
            config,
            grid,
            next_at: now,
            sequence: 0,
            probes: VecDeque::new(),
            alive_at: None,
            rtt: None,
            probe_due: false,
            failed: false,
            failure_told: false,
        }
    }

    /// Takes another interval, from the next probe on.
    pub fn set_interval(&mut self, interval: Duration) {
        self.config.interval = interval;
    }

    /// Sends a probe now, whatever the interval: the caller doubts the connection.
    pub fn probe_now(&mut self) {
        self.probe_due = true;
    }

    /// Takes the report that an authentic packet of the peer, of whatever kind, arrived since the
    /// last report. Probes sent before `now` do not fail the connection any more.
    pub fn alive(&mut self, now: Instant) {
        self.alive_at = Some(now);
    }

    /// Takes a reply and returns its round trip; none when no probe waits for it.
    pub fn reply_received(&mut self, sequence: u32, now: Instant) -> Option<Duration> {
        let unanswered = |probe: &&mut Probe| probe.sequence == sequence && !probe.answered;
        let probe = self.probes.iter_mut().rev().find(unanswered)?;
        probe.answered = true;
        let last = now.saturating_duration_since(probe.sent);
        self.rtt = Some(match self.rtt {
            None => Rtt {
                last,
                min: last,
                smoothed: last,
            },
            Some(rtt) => Rtt {
                last,
                min: rtt.min.min(last),
                smoothed: (rtt.smoothed * 7 + last) / 8,
            },
        });
        Some(last)
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        if now < self.next_at || self.failed {
            return;
        }
        self.next_at = self.grid.next(now, self.config.interval);
        let judged = |probe: &&Probe| probe.answered || self.is_overdue(probe, now);
        let latest = self.probes.iter().rev().filter(judged);
        let is_silent =
            |probe: &&Probe| !probe.answered && self.alive_at.is_none_or(|at| at <= probe.sent);
        let in_a_row = latest.take_while(is_silent).count();
        self.failed = in_a_row >= self.config.missed_max as usize;
        self.probe_due = !self.failed;
        self.invariants();
    }

    /// When to call [`Self::handle_timeout`]; none after the connection has failed.
    pub fn poll_timeout(&self) -> Option<Instant> {
        (!self.failed).then_some(self.next_at)
    }

    /// The next thing to do.
    pub fn poll_action(&mut self, now: Instant) -> Option<HealthAction> {
        if self.failed {
            let first = !std::mem::replace(&mut self.failure_told, true);
            return first.then_some(HealthAction::CloseAndRedial);
        }
        if !std::mem::take(&mut self.probe_due) {
            return None;
        }
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        if self.probes.len() >= self.config.window.max(self.config.missed_max as usize + 1) {
            self.probes.pop_front();
        }
        self.probes.push_back(Probe {
            sequence,
            sent: now,
            answered: false,
        });
        Some(HealthAction::Probe { sequence })
    }

    /// Round-trip times; none before the first reply.
    pub fn rtt(&self) -> Option<Rtt> {
        self.rtt
    }

    /// Lost probes of the window, in a thousand. A probe that is still awaited does not count.
    pub fn loss_per_mille(&self, now: Instant) -> u32 {
        let (mut lost, mut known) = (0, 0);
        for probe in &self.probes {
            let overdue = self.is_overdue(probe, now);
            known += u32::from(probe.answered || overdue);
            lost += u32::from(!probe.answered && overdue);
        }
        (lost * 1000_u32).checked_div(known).unwrap_or(0)
    }

    /// Whether a reply was to be there: at the next time of the grid it was.
    fn is_overdue(&self, probe: &Probe, now: Instant) -> bool {
        now >= probe.sent + TimeGrid::least(self.config.interval)
    }

    fn invariants(&self) {
        let kept_max = self.config.window.max(self.config.missed_max as usize + 1);
        debug_assert!(self.probes.len() <= kept_max);
        debug_assert!(
            self.rtt
                .is_none_or(|rtt| rtt.min <= rtt.last && rtt.min <= rtt.smoothed)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);
    const THREE: HealthConfig = HealthConfig {
        interval: SECOND,
        missed_max: 3,
        window: 32,
    };

    fn probe(health: &mut Health, now: Instant) -> Option<u32> {
        health.handle_timeout(now);
        match health.poll_action(now) {
            Some(HealthAction::Probe { sequence }) => Some(sequence),
            _ => None,
        }
    }

    #[test]
    fn measures_round_trips_and_loss() {
        let start = Instant::now();
        let mut health = Health::new(THREE, TimeGrid::through(start), start);
        assert_eq!((health.rtt(), health.loss_per_mille(start)), (None, 0));
        for (n, rtt) in [(0, 20 * MS), (1, 10 * MS), (2, 90 * MS)] {
            let now = start + n * SECOND;
            let sequence = probe(&mut health, now).unwrap();
            assert_eq!(health.poll_action(now), None);
            assert_eq!(health.reply_received(sequence + 1, now), None);
            assert_eq!(health.reply_received(sequence, now + rtt), Some(rtt));
            assert_eq!(
                health.reply_received(sequence, now + rtt),
                None,
                "answered twice"
            );
        }
        let rtt = health.rtt().unwrap();
        assert_eq!((rtt.last, rtt.min), (90 * MS, 10 * MS));
        assert_eq!(
            rtt.smoothed,
            ((20 * MS * 7 + 10 * MS) / 8 * 7 + 90 * MS) / 8
        );
        probe(&mut health, start + 3 * SECOND).unwrap();
        assert_eq!(
            health.loss_per_mille(start + 3 * SECOND),
            0,
            "still awaited"
        );
        assert_eq!(health.loss_per_mille(start + 4 * SECOND), 250);
    }

    // Protects detection: a dead peer is given up after the probes that the config grants.
    #[test]
    fn fails_once_after_the_missed_probes() {
        let start = Instant::now();
        let mut health = Health::new(THREE, TimeGrid::through(start), start);
        for n in 0..3 {
            assert!(probe(&mut health, start + n * SECOND).is_some());
        }
        let now = start + 3 * SECOND;
        assert_eq!(probe(&mut health, now), None);
        let mut told = Health::new(THREE, TimeGrid::through(start), start);
        for n in 0..=3 {
            told.handle_timeout(start + n * SECOND);
            let action = told.poll_action(start + n * SECOND);
            assert_eq!(action == Some(HealthAction::CloseAndRedial), n == 3);
        }
        assert_eq!((told.poll_action(now), told.poll_timeout()), (None, None));
    }

    // Protects a connection on a path that loses probes: whatever arrives says that the peer lives,
    // and only what came after a probe was sent.
    #[test]
    fn a_packet_of_any_kind_is_a_sign_of_life() {
        // Seconds at which something had arrived; when the connection fails.
        let cases: [(&[u32], Option<u32>); 5] = [
            (&[], Some(3)),
            (&[0], Some(3)),
            (&[2], Some(5)),
            (&[1, 3, 5, 7, 9], None),
            (&[3], Some(6)),
        ];
        for (heard, failure) in cases {
            let start = Instant::now();
            let mut health = Health::new(THREE, TimeGrid::through(start), start);
            let failed = (0..=10).find(|n| {
                let now = start + *n * SECOND;
                if heard.contains(n) {
                    health.alive(now);
                }
                probe(&mut health, now).is_none()
            });
            assert_eq!(failed, failure, "{heard:?}");
            // Loss stays what the probes measured.
            let loss = health.loss_per_mille(start + 11 * SECOND);
            assert_eq!(loss, 1_000, "{heard:?}");
        }
    }

    #[test]
    fn a_reply_to_an_early_probe_proves_life() {
        let start = Instant::now();
        let mut health = Health::new(THREE, TimeGrid::through(start), start);
        for n in 0..3 {
            probe(&mut health, start + n * SECOND).unwrap();
        }
        let late = start + 2 * SECOND + 900 * MS;
        health.probe_now();
        let Some(HealthAction::Probe { sequence }) = health.poll_action(late) else {
            panic!("no probe on request");
        };
        health.reply_received(sequence, late + 10 * MS);
        assert!(probe(&mut health, start + 3 * SECOND).is_some());
    }

    proptest! {
        // Against a plain reading of rule 2, for replies that come at once or never.
        #[test]
        fn fails_exactly_after_a_run_of_losses(replies in proptest::collection::vec(any::<bool>(), 1..80)) {
            let mut now = Instant::now();
            let mut health = Health::new(THREE, TimeGrid::through(now), now);
            let mut run = 0;
            for replied in replies {
                let sequence = probe(&mut health, now);
                prop_assert_eq!(sequence.is_none(), run >= 3, "after {} losses", run);
                let Some(sequence) = sequence else { break };
                run = if replied { 0 } else { run + 1 };
                if replied {
                    health.reply_received(sequence, now + MS);
                }
                now += SECOND;
            }
        }
    }
}
