//! Rows: one filter against one kind of packet from a number of sources, in interleaved rounds.
//!
//! A row is an error unless every packet that was sent is accounted for: received by the node's
//! device, seen by the filter's own counters, and decided as the row says.

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::Result;
use crate::cpu::Clock;
use crate::edge::Case;
use crate::filters::{Filter, Installed, Parts};
use crate::frames::Shape;
use crate::generator::{Generator, Sources, Traffic};
use crate::tally::Tally;

/// Packets before the measurement: sets fill up (65,535 entries), bursts are spent, caches and
/// branch predictors settle.
const WARM_UP: u32 = 100_000;
/// How long the last packets may take until they are counted.
const SETTLE: Duration = Duration::from_secs(2);
/// Share of the packets that must get the expected decision. It is below 1, because the edge's
/// budgets let a few through, however low they are.
pub(crate) const EXPECTED_SHARE: f64 = 0.999;
/// The same where all sources are listed: a few cannot be. See [`crate::reference`].
const EXPECTED_SHARE_LISTED: f64 = 0.99;

/// The measurement of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Row {
    pub(crate) filter: Filter,
    pub(crate) shape: Shape,
    pub(crate) sources: Sources,
}

/// One measurement of a row.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Measured {
    /// By the core's time, generator and veth included.
    pub(crate) mpps_per_cpu_second: f64,
    pub(crate) ns_per_packet: f64,
    /// Share that reached the stack.
    pub(crate) passed: f64,
    /// Share that the filter answered by itself.
    pub(crate) answered: f64,
}

/// Every row, filters side by side.
pub(crate) fn all() -> Vec<Row> {
    use Sources as S;
    let row = |filter, shape, sources| Row {
        filter,
        shape,
        sources,
    };
    let mut rows = Vec::new();
    for sources in [S::ONE, S::SIXTEEN_THOUSAND, S::MILLION, S::ALL] {
        let mut initial = |filter| rows.push(row(filter, Shape::Initial, sources));
        initial(Filter::Floor);
        initial(Filter::Edge(Case::Deny));
        // No source of 2^32 made-up ones can be charged: there the way ends in a Retry.
        if sources != S::ALL {
            initial(Filter::Edge(Case::Rate));
        }
        if matches!(sources, S::ONE | S::MILLION) {
            initial(Filter::Edge(Case::Cap));
        }
        initial(Filter::Edge(Case::Retry));
        initial(Filter::Reference);
        if matches!(sources, S::ONE | S::MILLION | S::ALL) {
            initial(Filter::ReferenceListed);
        }
        if matches!(sources, S::ONE | S::MILLION) {
            initial(Filter::XdpTools);
            initial(Filter::NftIngress);
        }
        if matches!(sources, S::ONE | S::MILLION) {
            rows.push(row(Filter::Pass, Shape::InitialElsewhere, sources));
        }
    }
    rows.push(row(Filter::Edge(Case::Garbage), Shape::ShortHeader, S::ALL));
    rows.push(row(Filter::Edge(Case::Syn), Shape::Syn, S::ALL));
    rows.push(row(Filter::Reference, Shape::Syn, S::ALL));
    rows
}

impl Row {
    pub(crate) fn name(self) -> String {
        format!(
            "{}, {}, {}",
            self.filter.label(),
            self.shape.label(),
            self.sources.label()
        )
    }

    /// Measures it once, for about `lasts` of the core's time.
    pub(crate) fn measure(
        self,
        parts: &Parts<'_>,
        clock: &Clock,
        lasts: Duration,
    ) -> Result<Measured> {
        let mut object = MaybeUninit::uninit();
        let traffic = Traffic {
            shape: self.shape,
            sources: self.sources,
            interface: parts.testbed.client_index(),
            packets_per_second: None,
            is_answered: self.filter == Filter::Edge(Case::Retry),
        };
        let generator = Generator::load(&mut object, traffic)?;
        let installed = self.filter.install(parts, self.sources)?;
        let rest = Snapshot::read(parts, &installed, &generator)?;
        let pace = timed_send(parts, clock, &generator, WARM_UP)?;
        let before = Snapshot::settled(parts, &installed, &generator, rest)?;
        installed.check()?;
        // One call: each call ends by waiting, for tens of milliseconds, until all cores release
        // its pages.
        let packets = lasts.as_nanos() * u128::from(WARM_UP) / pace.as_nanos().max(1);
        let packets = u32::try_from(packets)?.max(WARM_UP);
        let cpu = timed_send(parts, clock, &generator, packets)?;
        let after = Snapshot::settled(parts, &installed, &generator, before)?;

        let sent = after.sent - before.sent;
        self.check(before, after)?;
        let share =
            |of: fn(&Tally) -> u64| (of(&after.tally) - of(&before.tally)) as f64 / sent as f64;
        Ok(Measured {
            mpps_per_cpu_second: sent as f64 / cpu.as_secs_f64() / 1e6,
            ns_per_packet: cpu.as_nanos() as f64 / sent as f64,
            passed: share(|tally| tally.passed),
            answered: share(|tally| tally.answered),
        })
    }

    fn expected_share(self) -> f64 {
        match self.filter {
            Filter::ReferenceListed => EXPECTED_SHARE_LISTED,
            _ => EXPECTED_SHARE,
        }
    }

    fn check(self, before: Snapshot, after: Snapshot) -> Result<()> {
        let sent = after.sent - before.sent;
        let expected = after.tally.expected - before.tally.expected;
        let answered = after.tally.answered - before.tally.answered;
        let returned = after.returned - before.returned;
        // ICMP and resets of the stack come back as well, but only if packets reached the stack.
        let lost = answered != returned && after.tally.passed == before.tally.passed;
        if (expected as f64) < sent as f64 * self.expected_share() || lost {
            let name = self.name();
            return Err(format!(
                "{name}: {sent} packets sent, {expected} went the expected way; \
                 {answered} answered, {returned} answers came back"
            )
            .into());
        }
        Ok(())
    }
}

/// Sends from the attacker's namespace; returns the time of the core.
fn timed_send(
    parts: &Parts<'_>,
    clock: &Clock,
    generator: &Generator<'_>,
    packets: u32,
) -> Result<Duration> {
    let _client = parts.testbed.enter_client()?;
    let before = clock.now()?;
    generator.send(packets)?;
    Ok(clock.now()?.saturating_sub(before))
}

/// All counters at one moment.
#[derive(Clone, Copy, Debug)]
struct Snapshot {
    sent: u64,
    received: u64,
    /// Answers of the filter that the attacker has received.
    returned: u64,
    tally: Tally,
}

impl Snapshot {
    /// Reads the counters until every packet sent since `earlier` is accounted for.
    ///
    /// # Errors
    ///
    /// If that takes too long: packets were lost, or counted twice.
    fn settled(
        parts: &Parts<'_>,
        installed: &Installed<'_>,
        generator: &Generator<'_>,
        earlier: Self,
    ) -> Result<Self> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = Self::read(parts, installed, generator)?;
            let sent = now.sent - earlier.sent;
            let seen = now.tally.seen.saturating_sub(earlier.tally.seen);
            let received = now.received.saturating_sub(earlier.received);
            if seen == sent && received == sent {
                return Ok(now);
            }
            if Instant::now() > deadline {
                return Err(
                    format!("{sent} packets sent, {received} received, {seen} seen").into(),
                );
            }
        }
    }

    fn read(
        parts: &Parts<'_>,
        installed: &Installed<'_>,
        generator: &Generator<'_>,
    ) -> Result<Self> {
        let received = parts.testbed.received()?;
        if received.dropped > 0 {
            return Err(format!("the veth's ring dropped {} packets", received.dropped).into());
        }
        let counts = parts.receiver.counts()?;
        Ok(Self {
            sent: generator.sent()?,
            received: received.packets,
            returned: counts.retries + counts.answers,
            tally: installed.tally()?,
        })
    }
}
