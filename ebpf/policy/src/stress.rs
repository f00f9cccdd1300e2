//! The level of stress of a node, from samples of its load. The level decides what the edge demands
//! of clients.
//!
//! The node calls [`Stress::tick`] with what happened since the last tick. The level rises at once,
//! and falls one step at a time, each after a hold time of calm.
//!
//! 1. Between a rise to a level and the next step down lies at least that level's hold time: the
//!    level does not flap.
//! 2. Calm does not depend on the level's own effect: at [`Level::Retry`] no budget refuses
//!    anything, yet the packets that it would have refused are still counted.
//! 3. Packets are measured against the rate of their own budget, so that the same marks fit every
//!    budget.

use crate::limiter::Limit;

/// What the edge demands of clients. The order is that of `enum edge_stress`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Level {
    /// Nothing, within the budgets.
    #[default]
    Normal = 0,
    /// A validated address: Retry for QUIC, cookies for TCP.
    Retry = 1,
    /// The proof of a registry peer.
    Peers = 2,
}

impl Level {
    /// The level with this number; a number past the last gives the last.
    pub fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Normal,
            1 => Self::Retry,
            _ => Self::Peers,
        }
    }

    fn below(self) -> Self {
        match self {
            Self::Normal | Self::Retry => Self::Normal,
            Self::Peers => Self::Retry,
        }
    }
}

/// A load in percent, or marks to compare it with. A mark of `u64::MAX` is never reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadPercent {
    /// Half-open handshakes, in percent of their bound.
    pub half_open_percent: u64,
    /// Packets that a budget refused, in percent of its rate: the higher of the budgets.
    pub refused_percent: u64,
    /// First packets without token or proof, or SYNs, in percent of their budget's rate, whatever
    /// the edge did with them.
    pub unvalidated_percent: u64,
}

impl LoadPercent {
    fn reaches_any(&self, marks: &Self) -> bool {
        self.half_open_percent >= marks.half_open_percent
            || self.refused_percent >= marks.refused_percent
            || self.unvalidated_percent >= marks.unvalidated_percent
    }
}

/// When a level is entered and left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Entered when any measure reaches its mark here.
    pub enter: LoadPercent,
    /// Left when all measures have stayed below their marks here, and below those of `enter`, for
    /// `hold_ns`.
    pub leave: LoadPercent,
    /// Hold time, in nanoseconds.
    pub hold_ns: u64,
}

/// The marks of the two levels above normal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StressConfig {
    /// Marks of [`Level::Retry`].
    pub retry: Marks,
    /// Marks of [`Level::Peers`].
    pub peers: Marks,
}

impl Default for StressConfig {
    /// Retry when a budget refuses packets or half of the handshakes are taken; peers only when
    /// validated addresses alone take nearly all of them.
    ///
    /// A rate of packets never leads to peers only: Retries are cheap, and a spoofed flood would
    /// lock all other clients out.
    fn default() -> Self {
        const NEVER: u64 = u64::MAX;
        let retry = Marks {
            enter: LoadPercent {
                half_open_percent: 50,
                refused_percent: 5,
                unvalidated_percent: NEVER,
            },
            leave: LoadPercent {
                half_open_percent: 25,
                refused_percent: 5,
                // At twice that, the budget would refuse packets again.
                unvalidated_percent: 50,
            },
            hold_ns: 10_000_000_000,
        };
        let peers = Marks {
            enter: LoadPercent {
                half_open_percent: 90,
                refused_percent: NEVER,
                unvalidated_percent: NEVER,
            },
            leave: LoadPercent {
                half_open_percent: 50,
                refused_percent: NEVER,
                unvalidated_percent: NEVER,
            },
            hold_ns: 30_000_000_000,
        };
        Self { retry, peers }
    }
}

/// The load of a node since the last tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadSample {
    /// Handshakes that are begun and not completed, at the moment.
    pub half_open: usize,
    /// The bound on them; 0 counts as 1.
    pub half_open_max: usize,
    /// First packets of QUIC.
    pub quic: BudgetLoad,
    /// SYNs.
    pub syn: BudgetLoad,
}

/// The load of one budget since the last tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BudgetLoad {
    /// Packets that it refused.
    pub refused: u64,
    /// Packets without a validated address, whatever the edge did with them.
    pub unvalidated: u64,
    /// The budget's rate; 0: no budget, and so no load.
    pub per_second: u64,
}

impl BudgetLoad {
    /// A count since the last tick, in percent of the rate.
    fn percent(&self, count: u64, elapsed_ns: u64) -> u64 {
        let in_time = u128::from(self.per_second) * u128::from(elapsed_ns.max(1));
        let percent = (u128::from(count) * 100 * 1_000_000_000).checked_div(in_time);
        // Even the highest load stays below the mark that is never reached.
        u64::try_from(percent.unwrap_or(0)).map_or(u64::MAX - 1, |p| p.min(u64::MAX - 1))
    }
}

/// Packets so far from addresses that are not validated, of one protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnvalidatedPackets {
    /// Answered by a Retry or a SYN cookie.
    pub answered: u64,
    /// Within the budget.
    pub admitted: u64,
    /// Beyond it.
    pub dropped: u64,
}

impl UnvalidatedPackets {
    /// What was asked of a budget since an earlier count, at this level of stress.
    pub fn load_since(self, before: Self, level: Level, budget: Limit) -> BudgetLoad {
        const NANOSECONDS: u64 = 1_000_000_000;
        let answered = self.answered.saturating_sub(before.answered);
        let admitted = self.admitted.saturating_sub(before.admitted);
        let dropped = self.dropped.saturating_sub(before.dropped);
        BudgetLoad {
            refused: match level {
                Level::Normal => answered + dropped,
                // All are answered, which no budget asked for.
                Level::Retry | Level::Peers => 0,
            },
            unvalidated: answered + admitted + dropped,
            per_second: NANOSECONDS.checked_div(budget.interval_ns).unwrap_or(0),
        }
    }
}

/// Turns samples into a level.
#[derive(Clone, Debug)]
pub struct Stress {
    config: StressConfig,
    level: Level,
    sampled_at_ns: u64,
    /// Since when all measures have been below the marks for leaving the level.
    calm_since_ns: Option<u64>,
    /// Of QUIC and of TCP, at the last look.
    seen: Option<[UnvalidatedPackets; 2]>,
}

impl Stress {
    /// A node at [`Level::Normal`]; `now_ns` is CLOCK_MONOTONIC.
    pub fn new(config: StressConfig, now_ns: u64) -> Self {
        Self {
            config,
            level: Level::Normal,
            sampled_at_ns: now_ns,
            calm_since_ns: None,
            seen: None,
        }
    }

    /// What was asked of the budgets of QUIC and of SYNs since the last call. `now` counts all
    /// packets so far. Nothing at the first call.
    pub fn loads(&mut self, now: [UnvalidatedPackets; 2], budgets: [Limit; 2]) -> [BudgetLoad; 2] {
        let before = self.seen.replace(now).unwrap_or(now);
        std::array::from_fn(|of| now[of].load_since(before[of], self.level, budgets[of]))
    }

    /// The level since the last tick.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Takes a sample of the time since the last tick, and returns the level that holds now.
    pub fn tick(&mut self, sample: LoadSample, now_ns: u64) -> Level {
        let elapsed_ns = now_ns.saturating_sub(self.sampled_at_ns);
        self.sampled_at_ns = now_ns;
        let load = sample.load(elapsed_ns);
        let entered = self.entered(&load);
        if entered > self.level {
            self.level = entered;
            self.calm_since_ns = None;
        } else if self.is_calm(&load, entered) {
            self.descend(now_ns);
        } else {
            self.calm_since_ns = None;
        }
        self.level
    }

    /// The highest level that this load enters.
    fn entered(&self, load: &LoadPercent) -> Level {
        if load.reaches_any(&self.config.peers.enter) {
            Level::Peers
        } else if load.reaches_any(&self.config.retry.enter) {
            Level::Retry
        } else {
            Level::Normal
        }
    }

    fn is_calm(&self, load: &LoadPercent, entered: Level) -> bool {
        entered < self.level
            && self
                .marks()
                .is_some_and(|marks| !load.reaches_any(&marks.leave))
    }

    fn descend(&mut self, now_ns: u64) {
        let since_ns = *self.calm_since_ns.get_or_insert(now_ns);
        let hold_ns = self.marks().map_or(0, |marks| marks.hold_ns);
        if now_ns.saturating_sub(since_ns) >= hold_ns {
            self.level = self.level.below();
            self.calm_since_ns = None;
        }
    }

    /// Marks of the present level.
    fn marks(&self) -> Option<&Marks> {
        match self.level {
            Level::Normal => None,
            Level::Retry => Some(&self.config.retry),
            Level::Peers => Some(&self.config.peers),
        }
    }
}

impl LoadSample {
    fn load(&self, elapsed_ns: u64) -> LoadPercent {
        let budgets = [self.quic, self.syn];
        let highest = |count: fn(&BudgetLoad) -> u64| {
            let percents = budgets.iter().map(|b| b.percent(count(b), elapsed_ns));
            percents.max().unwrap_or(0)
        };
        let half_open_max = self.half_open_max.max(1) as u64;
        LoadPercent {
            half_open_percent: (self.half_open as u64).saturating_mul(100) / half_open_max,
            refused_percent: highest(|budget| budget.refused),
            unvalidated_percent: highest(|budget| budget.unvalidated),
        }
    }
}

#[cfg(test)]
mod tests;
