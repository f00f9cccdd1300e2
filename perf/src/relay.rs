//! A link in user space, as a pure machine: what a relay between two sockets asks for every packet.
//!
//! 1. Each direction has a rate, a queue in front of it, a delay of half of the RTT, and random
//!    loss behind the queue from a generator of its own: one seed, one sequence of losses.
//! 2. A packet that would wait longer than the queue holds is dropped (drop-tail). A packet that is
//!    lost at random has taken its time on the link.
//! 3. Packets of one direction keep their order.
//! 4. Bytes are UDP payload. So a link of 300 Mbit/s carries 300 Mbit/s of payload, and an engine's
//!    goodput is a share of that.

mod lateness;

use std::time::Duration;

use millrace_protocol::rng::Rng;

pub use lateness::Lateness;

/// What a link is like, the same in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    /// Round trip of a packet that never waits.
    pub rtt: Duration,
    /// UDP payload bits per second; at least 1.
    pub bits_per_second: u64,
    /// Longest wait in the queue.
    pub queue: Duration,
    /// Packets lost at random in each direction, of a million.
    pub loss_ppm: u32,
    /// The losses of both directions follow from it.
    pub seed: u64,
}

impl LinkConfig {
    /// The two directions, each with a sequence of losses of its own.
    #[must_use]
    pub fn directions(&self) -> [Direction; 2] {
        let mut seeds = Rng::new(self.seed);
        [seeds.fork(), seeds.fork()].map(|losses| Direction {
            config: *self,
            losses,
            free_at: Duration::ZERO,
            counts: Counts::default(),
        })
    }
}

/// The fate of a packet that came to a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It arrives at this time.
    Arrives(Duration),
    /// The queue was full.
    QueueFull,
    /// Lost on the way.
    Lost,
}

/// The packets of one direction, by their fate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Packets that the link took, lost ones included.
    pub taken: u64,
    /// Bytes that arrive or have arrived.
    pub bytes: u64,
    /// Packets that found the queue full.
    pub queue_full: u64,
    /// Packets lost at random.
    pub lost: u64,
}

/// One direction of a link.
#[derive(Clone, Debug)]
pub struct Direction {
    config: LinkConfig,
    losses: Rng,
    /// When the link has sent all that it took.
    free_at: Duration,
    counts: Counts,
}

impl Direction {
    /// A packet of so many UDP payload bytes comes. Times are those of any clock that never steps
    /// back.
    pub fn take(&mut self, bytes: usize, now: Duration) -> Fate {
        let begins = self.free_at.max(now);
        if begins - now > self.config.queue {
            self.counts.queue_full += 1;
            return Fate::QueueFull;
        }
        self.free_at = begins + self.time_on_link(bytes);
        self.counts.taken += 1;
        if self.losses.chance(self.config.loss_ppm) {
            self.counts.lost += 1;
            return Fate::Lost;
        }
        self.counts.bytes += bytes as u64;
        Fate::Arrives(self.free_at + self.config.rtt / 2)
    }

    /// What became of the packets so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    fn time_on_link(&self, bytes: usize) -> Duration {
        let nanos = bytes as u64 * 8 * 1_000_000_000 / self.config.bits_per_second.max(1);
        Duration::from_nanos(nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1,000 bytes take 1 ms.
    const LINK: LinkConfig = LinkConfig {
        rtt: Duration::from_millis(100),
        bits_per_second: 8_000_000,
        queue: Duration::from_millis(3),
        loss_ppm: 0,
        seed: 1,
    };

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn a_packet_waits_for_those_before_it_and_then_takes_half_of_the_round_trip() {
        use Fate::{Arrives, QueueFull};
        let [mut link, mut back] = LINK.directions();
        // When it comes (microseconds), its bytes, what becomes of it.
        let table = [
            (0, 1_000, Arrives(micros(51_000))),
            (0, 500, Arrives(micros(51_500))),
            (500, 1_000, Arrives(micros(52_500))),
            (500, 2_000, Arrives(micros(54_500))),
            // It would wait for 4 ms.
            (500, 100, QueueFull),
            (1_499, 100, QueueFull),
            // Exactly 3 ms.
            (1_500, 1_000, Arrives(micros(55_500))),
            // After a pause the link is free.
            (9_000, 1_000, Arrives(micros(60_000))),
        ];
        for case @ (at, bytes, fate) in table {
            assert_eq!(link.take(bytes, micros(at)), fate, "{case:?}");
        }
        let counts = Counts {
            taken: 6,
            bytes: 6_500,
            queue_full: 2,
            lost: 0,
        };
        assert_eq!(link.counts(), counts);
        // The other direction has a queue of its own.
        assert_eq!(back.take(1_000, micros(0)), Arrives(micros(51_000)));
    }

    #[test]
    fn losses_have_their_rate_follow_from_the_seed_and_take_time_on_the_link() {
        let config = LinkConfig {
            loss_ppm: 20_000,
            queue: Duration::from_secs(3_600),
            ..LINK
        };
        let fates = |mut link: Direction| -> Vec<Fate> {
            (0..50_000).map(|_| link.take(1_000, micros(0))).collect()
        };
        let [one, two] = config.directions();
        let first = fates(one.clone());
        assert_eq!(first, fates(config.directions()[0].clone()));
        assert_ne!(first, fates(two));
        let reseeded = LinkConfig { seed: 2, ..config };
        assert_ne!(first, fates(reseeded.directions()[0].clone()));
        let lost = first.iter().filter(|&&fate| fate == Fate::Lost).count();
        // 1,000 of 50,000 within five standard deviations.
        assert!((843..=1_157).contains(&lost), "{lost}");
        let mut link = one;
        for _ in 0..50_000 {
            link.take(1_000, micros(0));
        }
        assert_eq!(link.free_at, Duration::from_secs(50));
        assert_eq!(link.counts().lost, lost as u64);
        assert_eq!(link.counts().bytes, (50_000 - lost as u64) * 1_000);
    }
}
