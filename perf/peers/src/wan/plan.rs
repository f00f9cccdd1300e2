//! What is measured: the parts of a run, in order, and who takes part in each.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use millrace_perf::relay::LinkConfig;

use super::child::Before;
use crate::settings::{Congestion, Settings};
use crate::{Error, Result};

pub(super) const MBIT: u64 = 1_000_000;
/// The rate of every link but those that say otherwise.
pub(super) const LINK_MBIT_PER_S: u64 = 300;
pub(super) const QUEUE: Duration = Duration::from_millis(50);
/// The row that has rounds and targets.
pub(super) const BODY_RTT_MS: u64 = 150;
const GRID_RTTS_MS: [u64; 3] = [1, 50, 600];
/// Percent of the packets, each way.
const LOSSES: [Loss; 4] = [Loss(0), Loss(3_000), Loss(20_000), Loss(50_000)];
pub(super) const SATELLITE_RTT_MS: u64 = 620;
pub(super) const SATELLITE_MBIT_PER_S: u64 = 100;
const SATELLITE_LOSS: Loss = Loss(130_000);

/// Packets lost of a million, each way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Loss(pub(super) u32);

impl Loss {
    pub(super) const NONE: Self = Self(0);
}

/// In percent.
impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / 1e4)
    }
}

/// Who sends the body, and after what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Contender {
    /// millrace on its defaults, after idleness.
    Millrace,
    /// millrace on its defaults, after small messages.
    MillraceMessages,
    /// quinn with cubic.
    QuinnCubic,
    /// quinn with BBR.
    QuinnBbr,
    /// s2n-quic.
    S2n,
    /// Datagrams without a protocol.
    Link,
}

impl Contender {
    /// Whether its rows have targets, or are a part of one.
    pub(super) fn has_targets(self) -> bool {
        !matches!(self, Self::S2n | Self::Link)
    }

    /// What a peer is given.
    pub(super) fn settings(self, changes: &[String]) -> Result<Settings> {
        let congestion = match self {
            Self::QuinnBbr => Congestion::Bbr,
            _ => Congestion::Cubic,
        };
        let mut settings = Settings::wan(congestion);
        for change in changes {
            let (name, value) = change.split_once('=').ok_or("--set wants NAME=VALUE")?;
            settings.set(name, value)?;
        }
        Ok(settings)
    }

    /// What its connection carries before the first body.
    pub(super) fn before(self) -> Before {
        match self {
            Self::MillraceMessages => Before::SmallMessages { seconds: 10.0 },
            // Until its last datagram has arrived.
            Self::Link => Before::Idle { seconds: 1.0 },
            _ => Before::Idle { seconds: 5.0 },
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// Who sends through a link that two share, and who begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Order {
    /// millrace and s2n-quic's cubic begin at once.
    Together,
    CubicFirst,
    MillraceFirst,
    /// s2n-quic's cubic, and the same 5 s later: how cubic shares with itself.
    CubicAlone,
}

impl Order {
    pub(super) const ALL: [Self; 4] = [
        Self::Together,
        Self::CubicFirst,
        Self::MillraceFirst,
        Self::CubicAlone,
    ];

    pub(super) fn contenders(self) -> [Contender; 2] {
        // quinn's cubic gives up its connection at the losses that two bodies make.
        match self {
            Self::Together | Self::MillraceFirst => [Contender::Millrace, Contender::S2n],
            Self::CubicFirst => [Contender::S2n, Contender::Millrace],
            Self::CubicAlone => [Contender::S2n; 2],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Together => "together",
            Self::CubicFirst => "cubic-first",
            Self::MillraceFirst => "millrace-first",
            Self::CubicAlone => "cubic-alone",
        }
    }
}

/// One part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// A body over the reference link, with rounds.
    Body(Loss),
    /// One body for each contender.
    Grid { rtt_ms: u64, loss: Loss },
    /// Bodies of millrace and of cubic through one link.
    Shares(Order),
    /// 8 MiB over the worst pair of the reference.
    Satellite,
    /// 13 nodes, a link for each pair.
    Mesh,
    /// A second body after a restart, of the sender or of both ends.
    Resume { both: bool },
}

impl Part {
    /// All parts, in the order of a run.
    pub(super) fn all() -> Vec<Self> {
        let mut all: Vec<_> = LOSSES.map(Self::Body).into();
        all.push(Self::Satellite);
        all.extend(Order::ALL.map(Self::Shares));
        all.extend([false, true].map(|both| Self::Resume { both }));
        all.push(Self::Mesh);
        for rtt_ms in GRID_RTTS_MS {
            all.extend(LOSSES.map(|loss| Self::Grid { rtt_ms, loss }));
        }
        all
    }

    /// Those that a run with `--only` names takes: a name, or the beginning of several to a dash.
    pub(super) fn named(names: &[String]) -> Result<Vec<Self>> {
        let all = Self::all();
        let mut taken = Vec::new();
        for name in names {
            let before = taken.len();
            taken.extend(all.iter().copied().filter(|part| part.is_named(name)));
            if taken.len() == before {
                let known: Vec<_> = all.iter().map(ToString::to_string).collect();
                let known = known.join(", ");
                return Err(Error::from(format!(
                    "no part is named {name}; there are: {known}"
                )));
            }
        }
        taken.sort_by_key(|part| all.iter().position(|other| other == part));
        taken.dedup();
        Ok(taken)
    }

    fn is_named(self, name: &str) -> bool {
        let own = self.to_string();
        let rest = own.strip_prefix(name);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }

    pub(super) fn contenders(self) -> Vec<Contender> {
        use Contender::{Link, Millrace, MillraceMessages, QuinnBbr, QuinnCubic, S2n};
        match self {
            Self::Body(loss) if loss == LOSSES[3] => {
                vec![Millrace, QuinnCubic, QuinnBbr, S2n, Link]
            }
            Self::Body(_) => vec![Millrace, MillraceMessages, QuinnCubic, QuinnBbr, S2n, Link],
            Self::Grid { .. } => vec![Millrace, QuinnCubic, QuinnBbr, S2n, Link],
            Self::Shares(_) | Self::Satellite | Self::Mesh | Self::Resume { .. } => {
                vec![Millrace]
            }
        }
    }

    /// Whether a contender takes part in a quick run: who has a target, or is a part of one.
    pub(super) fn is_in_quick_run(self, contender: Contender) -> bool {
        use Contender::{Millrace, QuinnBbr, QuinnCubic};
        match self {
            Self::Body(loss) if loss == LOSSES[3] => contender == Millrace,
            _ => matches!(contender, Millrace | QuinnCubic | QuinnBbr),
        }
    }

    /// Whether a contender takes part in every round, or in the first alone.
    pub(super) fn has_rounds(self, contender: Contender) -> bool {
        let is_repeated = match self {
            Self::Body(loss) => loss != LOSSES[3],
            Self::Shares(_) => true,
            _ => false,
        };
        is_repeated && contender.has_targets()
    }

    /// The losses of a round are the same for all contenders, and others in the next.
    pub(super) fn link(self, round: usize) -> LinkConfig {
        let (rtt_ms, mbit_per_s, loss) = match self {
            Self::Body(loss) => (BODY_RTT_MS, LINK_MBIT_PER_S, loss),
            Self::Grid { rtt_ms, loss } => (rtt_ms, LINK_MBIT_PER_S, loss),
            Self::Satellite => (SATELLITE_RTT_MS, SATELLITE_MBIT_PER_S, SATELLITE_LOSS),
            Self::Shares(_) | Self::Resume { .. } | Self::Mesh => {
                (BODY_RTT_MS, LINK_MBIT_PER_S, Loss::NONE)
            }
        };
        LinkConfig {
            rtt: Duration::from_millis(rtt_ms),
            bits_per_second: mbit_per_s * MBIT,
            queue: QUEUE,
            loss_ppm: loss.0,
            seed: 1 + round as u64,
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Body(loss) => write!(f, "body-{BODY_RTT_MS}-{loss}"),
            Self::Grid { rtt_ms, loss } => write!(f, "grid-{rtt_ms}-{loss}"),
            Self::Shares(order) => write!(f, "shares-{}", order.name()),
            Self::Satellite => f.write_str("satellite"),
            Self::Mesh => f.write_str("mesh"),
            Self::Resume { both: false } => f.write_str("resume-sender"),
            Self::Resume { both: true } => f.write_str("resume-both"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_taken_by_name_or_by_its_beginning_in_the_order_of_a_run() {
        let names = |given: &[&str]| -> Vec<String> {
            let given: Vec<_> = given.iter().map(|name| (*name).to_owned()).collect();
            let parts = Part::named(&given).unwrap();
            parts.iter().map(ToString::to_string).collect()
        };
        assert_eq!(names(&["body-150-0.3"]), ["body-150-0.3"]);
        assert_eq!(
            names(&["mesh", "body", "body-150-2"]),
            [
                "body-150-0",
                "body-150-0.3",
                "body-150-2",
                "body-150-5",
                "mesh"
            ]
        );
        assert_eq!(names(&["grid-600"]).len(), 4);
        // The beginning of a word is no name.
        assert!(Part::named(&["bod".to_owned()]).is_err());
    }
}
