//! Exponential backoff with jitter, for redials.
//!
//! 1. A delay lies between half of the current step and the whole step, so that peers that lost the
//!    same node do not redial it at the same moment.
//! 2. The step doubles from `base` up to `cap`, and never beyond.

use crate::rng::Rng;
use std::time::Duration;

/// Steps of a [`Backoff`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackoffConfig {
    /// The first step.
    pub base: Duration,
    /// The largest step.
    pub cap: Duration,
}

impl Default for BackoffConfig {
    fn default() -> Self {
        Self {
            base: Duration::from_millis(50),
            cap: Duration::from_secs(10),
        }
    }
}

/// The redial delay of one peer.
#[derive(Clone, Debug)]
pub struct Backoff {
    config: BackoffConfig,
    step: Duration,
    failures: u32,
}

impl Backoff {
    /// A backoff at its first step.
    pub fn new(config: BackoffConfig) -> Self {
        Self {
            config,
            step: config.base.min(config.cap),
            failures: 0,
        }
    }

    /// Starts again from the first step.
    pub fn reset(&mut self) {
        *self = Self::new(self.config);
    }

    /// Number of delays given since the last reset.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// The delay before the next attempt; the one after it is longer.
    pub fn next(&mut self, rng: &mut Rng) -> Duration {
        let delay = rng.duration(self.step / 2, self.step);
        self.step = self.step.saturating_mul(2).min(self.config.cap);
        self.failures = self.failures.saturating_add(1);
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Protects the network from redial storms, and the operator from a peer that stays away.
    #[test]
    fn doubles_to_the_cap_with_jitter() {
        let config = BackoffConfig::default();
        for seed in 0..50 {
            let (mut backoff, mut rng) = (Backoff::new(config), Rng::new(seed));
            let mut step = config.base;
            for _ in 0..20 {
                let delay = backoff.next(&mut rng);
                assert!(
                    delay >= step / 2 && delay <= step,
                    "{delay:?} at step {step:?}"
                );
                step = (step * 2).min(config.cap);
            }
            assert_eq!(backoff.failures(), 20);
            backoff.reset();
            assert!(backoff.next(&mut rng) <= config.base);
        }
    }
}
