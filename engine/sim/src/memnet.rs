//! A network in memory: messages in, messages out at their time.
//!
//! 1. What a link delivers was sent on it; at most twice, and never before its latency has passed.
//! 2. A link carries at most its capacity: messages wait in a queue, and are dropped when that is
//!    full, as by a switch.
//! 3. An ordered link never overtakes itself; another may, by its jitter.
//! 4. Every drop is counted by its reason.

use millrace_protocol::rng::Rng;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// A place that messages come from and go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(pub u32);

/// Properties of one direction between two endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    /// From the last byte sent to its arrival.
    pub latency: Duration,
    /// Added at random, from nothing to this.
    pub jitter: Duration,
    /// Messages lost, in a million.
    pub loss_ppm: u32,
    /// Messages delivered twice, in a million.
    pub duplicate_ppm: u32,
    /// Capacity; none is without bound.
    pub bytes_per_second: Option<u64>,
    /// Bytes that may wait for the capacity.
    pub queue_bytes_max: u64,
    /// Whether messages arrive in the order in which they were sent.
    pub ordered: bool,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            latency: Duration::from_millis(1),
            jitter: Duration::ZERO,
            loss_ppm: 0,
            duplicate_ppm: 0,
            bytes_per_second: None,
            queue_bytes_max: 1 << 20,
            ordered: false,
        }
    }
}

/// What became of a message that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Queued,
    /// The link's queue is full.
    QueueFull,
    /// Chance took it.
    Lost,
    /// The endpoints are cut off from each other.
    Cut,
}

/// A message at its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery<T> {
    /// Who sent it.
    pub from: Endpoint,
    /// Where it is.
    pub to: Endpoint,
    /// When it arrived.
    pub at: Instant,
    /// The message.
    pub message: T,
}

/// Messages since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounters {
    /// Handed over, duplicates included.
    pub delivered: u64,
    /// Delivered a second time.
    pub duplicated: u64,
    /// Taken by chance.
    pub lost: u64,
    /// Dropped because a queue was full.
    pub queue_full: u64,
    /// Sent, or under way, between endpoints that are cut off.
    pub cut: u64,
}

/// The network.
#[derive(Debug)]
pub struct MemNet<T> {
    default: LinkConfig,
    links: BTreeMap<(Endpoint, Endpoint), Link>,
    cuts: BTreeSet<(Endpoint, Endpoint)>,
    /// By arrival, then by order of sending: bounded by the links' queues and latencies.
    under_way: BTreeMap<(Instant, u64), Delivery<T>>,
    sent: u64,
    rng: Rng,
    counters: NetCounters,
}

#[derive(Debug, Default)]
struct Link {
    config: Option<LinkConfig>,
    /// When the last byte that waits will have been sent.
    busy_until: Option<Instant>,
    last_arrival: Option<Instant>,
}

impl<T: Clone> MemNet<T> {
    /// A network whose links are `default` until they are set.
    pub fn new(default: LinkConfig, seed: u64) -> Self {
        Self {
            default,
            links: BTreeMap::new(),
            cuts: BTreeSet::new(),
            under_way: BTreeMap::new(),
            sent: 0,
            rng: Rng::new(seed),
            counters: NetCounters::default(),
        }
    }

    /// Sets what links without properties of their own are like.
    pub fn set_default(&mut self, config: LinkConfig) {
        self.default = config;
    }

    /// Sets one direction.
    pub fn set_link(&mut self, from: Endpoint, to: Endpoint, config: LinkConfig) {
        self.links.entry((from, to)).or_default().config = Some(config);
    }

    /// Cuts two endpoints off from each other; what is under way between them is lost.
    pub fn cut(&mut self, a: Endpoint, b: Endpoint) {
        self.cuts.insert((a.min(b), a.max(b)));
        let before = self.under_way.len();
        self.under_way
            .retain(|_, d| (d.from.min(d.to), d.from.max(d.to)) != (a.min(b), a.max(b)));
        self.counters.cut += (before - self.under_way.len()) as u64;
    }

    /// Undoes a cut.
    pub fn heal(&mut self, a: Endpoint, b: Endpoint) {
        self.cuts.remove(&(a.min(b), a.max(b)));
    }

    /// Undoes all cuts.
    pub fn heal_all(&mut self) {
        self.cuts.clear();
    }

    /// Whether two endpoints are cut off from each other.
    pub fn is_cut(&self, a: Endpoint, b: Endpoint) -> bool {
        self.cuts.contains(&(a.min(b), a.max(b)))
    }

    /// Sends a message of `bytes` bytes.
    pub fn send(
        &mut self,
        from: Endpoint,
        to: Endpoint,
        message: T,
        bytes: u64,
        now: Instant,
    ) -> Sent {
        if self.is_cut(from, to) {
            self.counters.cut += 1;
            return Sent::Cut;
        }
        let link = self.links.entry((from, to)).or_default();
        let config = link.config.unwrap_or(self.default);
        let Some(departs) = link.departure(&config, bytes, now) else {
            self.counters.queue_full += 1;
            return Sent::QueueFull;
        };
        // Loss takes the capacity all the same: it happens on the way.
        if self.rng.chance(config.loss_ppm) {
            self.counters.lost += 1;
            return Sent::Lost;
        }
        let twice = self.rng.chance(config.duplicate_ppm);
        for _ in 0..=u32::from(twice) {
            let jitter = self.rng.duration(Duration::ZERO, config.jitter);
            let mut at = departs + config.latency + jitter;
            if config.ordered {
                at = link.last_arrival.map_or(at, |last| last.max(at));
                link.last_arrival = Some(at);
            }
            self.sent += 1;
            let delivery = Delivery {
                from,
                to,
                at,
                message: message.clone(),
            };
            self.under_way.insert((at, self.sent), delivery);
        }
        self.counters.duplicated += u64::from(twice);
        Sent::Queued
    }

    /// Bytes that wait for the capacity of a link; none do without a capacity.
    pub fn waiting_bytes(&self, from: Endpoint, to: Endpoint, now: Instant) -> u64 {
        let Some((rate, busy_until)) = self.backlog(from, to) else {
            return 0;
        };
        let ns = busy_until.saturating_duration_since(now).as_nanos();
        u64::try_from(ns * rate / 1_000_000_000).unwrap_or(u64::MAX)
    }

    /// When no more than `bytes` will wait for the capacity of a link, if nothing more is sent.
    pub fn drained_to(&self, from: Endpoint, to: Endpoint, bytes: u64, now: Instant) -> Instant {
        let Some((rate, busy_until)) = self.backlog(from, to) else {
            return now;
        };
        let ns = u64::try_from(u128::from(bytes) * 1_000_000_000 / rate).unwrap_or(u64::MAX);
        let spare = Duration::from_nanos(ns);
        busy_until.checked_sub(spare).map_or(now, |at| at.max(now))
    }

    /// What a link is like.
    pub fn link(&self, from: Endpoint, to: Endpoint) -> LinkConfig {
        let link = self.links.get(&(from, to));
        link.and_then(|link| link.config).unwrap_or(self.default)
    }

    /// The next message that has arrived by `now`.
    pub fn poll(&mut self, now: Instant) -> Option<Delivery<T>> {
        let entry = self.under_way.first_entry()?;
        if entry.key().0 > now {
            return None;
        }
        self.counters.delivered += 1;
        Some(entry.remove())
    }

    /// When the next message arrives.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.under_way.first_key_value().map(|((at, _), _)| *at)
    }

    fn backlog(&self, from: Endpoint, to: Endpoint) -> Option<(u128, Instant)> {
        let rate = self.link(from, to).bytes_per_second?;
        let busy_until = self.links.get(&(from, to))?.busy_until?;
        Some((u128::from(rate.max(1)), busy_until))
    }

    /// Messages under way.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Messages since the start.
    pub fn counters(&self) -> NetCounters {
        self.counters
    }
}

impl Link {
    /// When the last byte of a message leaves; none if the queue has no room for it.
    fn departure(&mut self, config: &LinkConfig, bytes: u64, now: Instant) -> Option<Instant> {
        let Some(rate) = config.bytes_per_second else {
            return Some(now);
        };
        let rate = u128::from(rate.max(1));
        let starts = self.busy_until.map_or(now, |busy| busy.max(now));
        let waiting_bytes = (starts - now).as_nanos() * rate / 1_000_000_000;
        if waiting_bytes + u128::from(bytes) > u128::from(config.queue_bytes_max) {
            return None;
        }
        let ns = u128::from(bytes) * 1_000_000_000 / rate;
        let departs = starts + Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX));
        self.busy_until = Some(departs);
        Some(departs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Endpoint = Endpoint(1);
    const B: Endpoint = Endpoint(2);
    const MS: Duration = Duration::from_millis(1);

    fn drain<T: Clone>(net: &mut MemNet<T>) -> Vec<Delivery<T>> {
        let mut out = Vec::new();
        while let Some(at) = net.poll_timeout() {
            out.extend(net.poll(at));
        }
        out
    }

    // Protects measurements in simulations: a link is as fast as it says.
    #[test]
    fn capacity_and_queue_hold() {
        let config = LinkConfig {
            bytes_per_second: Some(1_000_000),
            queue_bytes_max: 10_000,
            ..LinkConfig::default()
        };
        let (mut net, now) = (MemNet::new(config, 1), Instant::now());
        let sent: Vec<_> = (0..12).map(|n| net.send(A, B, n, 1000, now)).collect();
        assert_eq!(sent[..10], [Sent::Queued; 10]);
        assert_eq!(sent[10..], [Sent::QueueFull; 2]);
        assert_eq!(net.waiting_bytes(A, B, now + 4 * MS), 6_000);
        assert_eq!(net.drained_to(A, B, 2_000, now), now + 8 * MS);
        assert_eq!(net.waiting_bytes(B, A, now), 0);
        assert_eq!(net.drained_to(A, B, 20_000, now + MS), now + MS);
        let arrivals: Vec<_> = drain(&mut net).iter().map(|d| d.at - now).collect();
        assert_eq!(arrivals, (1..=10).map(|n| n * MS + MS).collect::<Vec<_>>());
        assert_eq!(
            net.send(A, B, 99, 1000, now + 10 * MS),
            Sent::Queued,
            "the queue is empty"
        );
        assert_eq!(
            net.send(B, A, 99, 1000, now),
            Sent::Queued,
            "the other direction is free"
        );
    }

    #[test]
    fn cuts_take_what_is_under_way() {
        let (mut net, now) = (MemNet::new(LinkConfig::default(), 1), Instant::now());
        net.send(A, B, 1, 1, now);
        net.send(A, Endpoint(3), 2, 1, now);
        net.cut(B, A);
        assert_eq!(
            (net.send(A, B, 3, 1, now), net.send(B, A, 4, 1, now)),
            (Sent::Cut, Sent::Cut)
        );
        net.heal(A, B);
        assert_eq!(net.send(A, B, 5, 1, now), Sent::Queued);
        let got: Vec<_> = drain(&mut net).iter().map(|d| d.message).collect();
        assert_eq!((got, net.counters().cut), (vec![2, 5], 3));
        assert_eq!(net.poll(now), None);
    }

    proptest! {
        #[test]
        fn delivers_what_was_sent(
            seed: u64,
            ordered: bool,
            loss_ppm in 0u32..500_000,
            duplicate_ppm in 0u32..500_000,
            gaps in proptest::collection::vec(0u64..3000, 1..100),
        ) {
            let jitter = 10 * MS;
            let config =
                LinkConfig { jitter, loss_ppm, duplicate_ppm, ordered, ..LinkConfig::default() };
            let run = || {
                let (mut net, start) = (MemNet::new(config, seed), Instant::now());
                let mut now = start;
                let mut sent = Vec::new();
                for (n, gap) in gaps.iter().enumerate() {
                    now += Duration::from_micros(*gap);
                    let what = net.send(A, B, n, 1, now);
                    sent.push((what == Sent::Queued, now - start));
                }
                let got: Vec<_> =
                    drain(&mut net).into_iter().map(|d| (d.message, d.at - start)).collect();
                (sent, got, net.counters())
            };
            let (sent, got, counters) = run();
            prop_assert_eq!(&(sent.clone(), got.clone(), counters), &run());
            prop_assert_eq!(got.len() as u64, counters.delivered);
            for (n, (queued, at)) in sent.iter().enumerate() {
                let times: Vec<_> = got.iter().filter(|g| g.0 == n).map(|g| g.1).collect();
                prop_assert!(times.len() <= 2 && *queued != times.is_empty());
                prop_assert!(times.iter().all(|t| *t >= *at + MS));
                prop_assert!(ordered || times.iter().all(|t| *t <= *at + MS + jitter));
            }
            prop_assert!(got.is_sorted_by_key(|g| g.1));
            prop_assert!(!ordered || got.is_sorted());
        }
    }
}
