//! The cost of the edge's program by itself: test runs over generated packets, without veth and
//! without stack.

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::Duration;

use crate::Result;
use crate::edge::{Case, Edges};
use crate::generator::{Generator, Sources, Traffic};
use crate::receiver::Receiver;
use crate::rows::EXPECTED_SHARE;

/// Runs of each measurement; the least counts.
const RUNS: usize = 5;

/// The program that runs, and the number of sources of its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Subject {
    pub(crate) case: Case,
    pub(crate) sources: Sources,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Mean for a packet, with the loop and the generator.
    pub(crate) gross_ns: f64,
    /// The loop, the generator and an empty program.
    pub(crate) loop_ns: f64,
}

impl Cost {
    pub(crate) fn net_ns(&self) -> f64 {
        self.gross_ns - self.loop_ns
    }
}

/// All measurements.
pub(crate) fn all() -> Vec<Subject> {
    use Sources as S;
    let of = |case, sources: &[S]| -> Vec<_> {
        sources
            .iter()
            .map(|&sources| Subject { case, sources })
            .collect()
    };
    [
        of(Case::Deny, &[S::ONE, S::ALL]),
        of(Case::Garbage, &[S::ALL]),
        of(Case::Rate, &[S::ONE, S::SIXTEEN_THOUSAND, S::MILLION]),
        of(Case::Rate6, &[S::ONE, S::MILLION]),
        of(Case::Cap, &[S::ONE, S::MILLION]),
        of(Case::Admitted, &[S::ONE, S::MILLION, S::ALL]),
        of(Case::Admitted6, &[S::ONE, S::MILLION, S::ALL]),
        of(Case::Prefixes, &[S::ALL]),
        of(Case::Retry, &[S::ALL]),
    ]
    .concat()
}

impl Subject {
    pub(crate) fn name(self) -> String {
        format!(
            "edge, {}, {} sources",
            self.case.label(),
            self.sources.label()
        )
    }

    /// Measures it over `packets` packets, several times.
    ///
    /// # Errors
    ///
    /// If one packet got another decision than the row is about.
    pub(crate) fn measure(
        self,
        edges: &Edges,
        receiver: &Receiver<'_>,
        packets: u32,
    ) -> Result<Cost> {
        let edge = edges.of(self.case, self.sources)?;
        let mut object = MaybeUninit::uninit();
        let traffic = Traffic {
            shape: self.case.shape(),
            sources: self.sources,
            interface: 0,
            packets_per_second: None,
            is_answered: false,
        };
        let generator = Generator::load(&mut object, traffic)?;
        // A Retry is shorter than the packet that it answers, so the next run must make the frame
        // long again.
        let empty = match self.case {
            Case::Retry => receiver.shorten(),
            _ => receiver.nothing(),
        };
        let mut cost = Cost {
            gross_ns: f64::MAX,
            loop_ns: f64::MAX,
        };
        // The first run also warms up; the least does not contain it.
        for _ in 0..RUNS {
            cost.loop_ns = cost
                .loop_ns
                .min(nanoseconds(generator.cost(&empty.as_fd(), packets)?));
            let before = edge.tally()?;
            let gross = generator.cost(&edge.program(), packets)?;
            let after = edge.tally()?;
            cost.gross_ns = cost.gross_ns.min(nanoseconds(gross));
            let (seen, expected) = (after.seen - before.seen, after.expected - before.expected);
            let share = expected as f64 / f64::from(packets);
            if seen != u64::from(packets) || share < EXPECTED_SHARE {
                let name = self.name();
                return Err(format!(
                    "{name}: {packets} packets, {seen} seen, {expected} went the expected way"
                )
                .into());
            }
        }
        Ok(cost)
    }
}

fn nanoseconds(duration: Duration) -> f64 {
    duration.as_nanos() as f64
}
