//! The regression gate: instruction counts of the pieces against a committed baseline.
//!
//! 1. A count more than [`LIMIT_PERCENT`] above its baseline fails; one as far below passes, and
//!    asks for a new baseline, so that the gain is kept.
//! 2. A piece without a baseline fails, and so does a baseline without its piece: nothing leaves
//!    the gate unseen.
//! 3. Only a count of the whole gate replaces the baseline, and only when asked for.

mod callgrind;
mod table;

pub use callgrind::{CountError, count};
pub use table::table;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How much more a piece may cost. Counts repeat exactly; the rest is for what the optimiser does
/// to one piece when another changes.
pub const LIMIT_PERCENT: u64 = 3;

/// Instructions of one pass, by piece.
pub type Counts = BTreeMap<String, u64>;

/// The counts that later ones are compared with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// The compiler that built the pieces: another one gives other counts.
    pub compiler: String,
    /// The architecture that they were counted on.
    pub architecture: String,
    /// Instructions of one pass, by piece.
    pub instructions: Counts,
}

/// Why there is no baseline to compare with.
#[derive(Debug, Error)]
pub enum BaselineError {
    /// The file cannot be read or written.
    #[error("cannot access {path}: {source}")]
    LocalFile {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The file is not a baseline.
    #[error("{path} is not a baseline: {source}")]
    LocalFormat {
        /// The file.
        path: PathBuf,
        /// The parse error, with its position.
        source: serde_json::Error,
    },
}

impl Baseline {
    /// Reads a baseline.
    ///
    /// # Errors
    /// When the file cannot be read, or is not a baseline.
    pub fn read(path: &Path) -> Result<Self, BaselineError> {
        let text = fs::read_to_string(path).map_err(|source| BaselineError::LocalFile {
            path: path.to_owned(),
            source,
        })?;
        serde_json::from_str(&text).map_err(|source| BaselineError::LocalFormat {
            path: path.to_owned(),
            source,
        })
    }

    /// Writes a baseline, one piece a line, so that a change of it can be reviewed.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), BaselineError> {
        let file = |source| BaselineError::LocalFile {
            path: path.to_owned(),
            source,
        };
        let text = serde_json::to_string_pretty(self).map_err(|source| file(source.into()))?;
        fs::write(path, text + "\n").map_err(file)
    }
}

/// The outcome for one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Within the limit.
    Holds,
    /// Costs more than the limit allows.
    Slower,
    /// Costs less by more than the limit.
    Faster,
    /// Counted, but not in the baseline.
    NoBaseline,
    /// In the baseline, but not counted.
    NoPiece,
}

impl Verdict {
    /// Whether the gate fails by it.
    #[must_use]
    pub fn fails(self) -> bool {
        matches!(self, Self::Slower | Self::NoBaseline | Self::NoPiece)
    }
}

/// One piece, compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// The piece.
    pub name: String,
    /// Instructions in the baseline.
    pub before: Option<u64>,
    /// Instructions counted.
    pub now: Option<u64>,
    /// The outcome.
    pub verdict: Verdict,
}

/// Compares every piece of either side.
#[must_use]
pub fn compare(before: &Counts, now: &Counts) -> Vec<Comparison> {
    let mut names: Vec<&String> = before.keys().chain(now.keys()).collect();
    names.sort();
    names.dedup();
    names
        .into_iter()
        .map(|name| {
            let (before, now) = (before.get(name).copied(), now.get(name).copied());
            let verdict = match (before, now) {
                (Some(before), Some(now)) => judge(before, now),
                (None, _) => Verdict::NoBaseline,
                (_, None) => Verdict::NoPiece,
            };
            Comparison {
                name: name.clone(),
                before,
                now,
                verdict,
            }
        })
        .collect()
}

fn judge(before: u64, now: u64) -> Verdict {
    let (before, now) = (u128::from(before), u128::from(now));
    let limit = u128::from(LIMIT_PERCENT);
    if now * 100 > before * (100 + limit) {
        Verdict::Slower
    } else if now * 100 < before * (100 - limit) {
        Verdict::Faster
    } else {
        Verdict::Holds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pairs: &[(&str, u64)]) -> Counts {
        pairs
            .iter()
            .map(|(name, n)| ((*name).to_owned(), *n))
            .collect()
    }

    /// Invariant 1: the limit itself holds, one instruction above it fails.
    #[test]
    fn over_three_percent_fails() {
        let table = [
            (10_000, 10_000, Verdict::Holds),
            (10_000, 10_300, Verdict::Holds),
            (10_000, 10_301, Verdict::Slower),
            (10_000, 9_700, Verdict::Holds),
            (10_000, 9_699, Verdict::Faster),
            (10_000, 20_000, Verdict::Slower),
            (u64::MAX, u64::MAX, Verdict::Holds),
            (0, 1, Verdict::Slower),
        ];
        for (before, now, want) in table {
            let compared = compare(&counts(&[("piece", before)]), &counts(&[("piece", now)]));
            assert_eq!(compared.len(), 1);
            assert_eq!(compared[0].verdict, want, "{before} -> {now}");
            assert_eq!(compared[0].verdict.fails(), want == Verdict::Slower);
        }
    }

    /// Invariant 2: neither a new piece nor a lost one passes.
    #[test]
    fn missing_sides_fail() {
        let compared = compare(
            &counts(&[("lost", 5), ("same", 5)]),
            &counts(&[("new", 5), ("same", 5)]),
        );
        let verdicts: Vec<_> = compared
            .iter()
            .map(|c| (c.name.as_str(), c.verdict))
            .collect();
        assert_eq!(
            verdicts,
            [
                ("lost", Verdict::NoPiece),
                ("new", Verdict::NoBaseline),
                ("same", Verdict::Holds)
            ]
        );
        assert_eq!(compared.iter().filter(|c| c.verdict.fails()).count(), 2);
    }

    /// The committed baseline is readable and knows exactly the pieces that there are.
    #[test]
    fn committed_baseline_is_complete() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("gate/baseline.json");
        let baseline = Baseline::read(&path).unwrap();
        let mut names: Vec<_> = crate::pieces::ALL.iter().map(|piece| piece.name).collect();
        names.sort_unstable();
        assert_eq!(baseline.instructions.keys().collect::<Vec<_>>(), names);
    }
}
