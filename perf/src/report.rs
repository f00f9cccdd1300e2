//! What the reports of all benches share: targets, their table, the file, and the verdict.
//!
//! 1. A target without a value does not hold: what was not measured shows nothing.
//! 2. A value that is [`COLLAPSE`] times worse than its target has collapsed. The median of three
//!    quick rounds on a shared host stays far from that, so continuous integration fails by it
//!    alone.

use std::fs;
use std::io;
use std::path::Path;

use clap::ValueEnum;
use serde::Serialize;

/// How many times worse than its target a value is that has collapsed.
pub const COLLAPSE: f64 = 3.0;

/// Which direction is the good one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// A rate, or a ratio of rates.
    Higher,
    /// A time, a cost, or a ratio of either.
    Lower,
}

/// A figure that a bench computes from its rows, and what it should be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Target {
    /// What was measured, with its unit.
    pub name: String,
    /// Null when the run left an engine or a row of it out.
    pub value: Option<f64>,
    /// What the value should be.
    pub target: f64,
    /// Which side of the target is the good one.
    pub better: Better,
    /// Whether the value was measured, and is on the good side or equal.
    pub holds: bool,
}

impl Target {
    /// Compares a value with its target.
    #[must_use]
    pub fn new(name: impl Into<String>, value: Option<f64>, target: f64, better: Better) -> Self {
        let mut this = Self {
            name: name.into(),
            value,
            target,
            better,
            holds: false,
        };
        this.holds = this.is_within(1.0);
        this
    }

    /// Whether the value is at most `factor` times worse than its target.
    fn is_within(&self, factor: f64) -> bool {
        self.value.is_some_and(|value| match self.better {
            Better::Higher => value >= self.target / factor,
            Better::Lower => value <= self.target * factor,
        })
    }

    fn describe(&self) -> String {
        match self.value {
            Some(value) => format!("{}: {value:.2}, not {:.2}", self.name, self.target),
            None => format!("{}: not measured", self.name),
        }
    }
}

/// What makes a run fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Check {
    /// A target that does not hold.
    Targets,
    /// A target that was missed by a factor of three.
    Collapse,
}

/// The targets that fail a run, one line each.
#[must_use]
pub fn faults(targets: &[Target], check: Check) -> Vec<String> {
    let factor = match check {
        Check::Targets => 1.0,
        Check::Collapse => COLLAPSE,
    };
    targets
        .iter()
        .filter(|target| !target.is_within(factor))
        .map(Target::describe)
        .collect()
}

/// The table of the targets, under a heading.
#[must_use]
pub fn targets_table(heading: &str, targets: &[Target]) -> String {
    let mut table = format!("{heading:<64} {:>8} {:>9}  holds\n", "value", "target");
    for target in targets {
        let sign = match target.better {
            Better::Higher => ">=",
            Better::Lower => "<=",
        };
        let verdict = match (target.value, target.holds) {
            (None, _) => "not measured",
            (_, true) => "yes",
            (_, false) => "NO",
        };
        table += &format!(
            "{:<64} {} {sign} {:>6.2}  {verdict}\n",
            target.name,
            cell(target.value, 8, 2),
            target.target
        );
    }
    table
}

/// A number of a table, or a dash where there is none.
#[must_use]
pub fn cell(value: Option<f64>, width: usize, places: usize) -> String {
    value.map_or_else(
        || format!("{:>width$}", "-"),
        |value| format!("{value:>width$.places$}"),
    )
}

/// The middle value; of two middle values their mean; nothing of no values.
#[must_use]
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Writes a report as JSON and makes its folder.
///
/// # Errors
/// When the folder cannot be made, the file cannot be written, or the report is no JSON.
pub fn write_json(path: &Path, report: &impl Serialize) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn a_target_fails_by_its_direction_and_a_collapse_by_three_times() {
        use Better::{Higher, Lower};
        let cases = [
            (Some(1.5), 1.5, Higher, true, true),
            (Some(0.5), 1.5, Higher, false, true),
            (Some(0.49), 1.5, Higher, false, false),
            (Some(0.25), 0.25, Lower, true, true),
            (Some(0.75), 0.25, Lower, false, true),
            (Some(0.76), 0.25, Lower, false, false),
            (None, 1.0, Higher, false, false),
            (None, 1.0, Lower, false, false),
        ];
        for case @ (value, target, better, holds, stands) in cases {
            let target = [Target::new("a ratio", value, target, better)];
            assert_eq!(target[0].holds, holds, "{case:?}");
            assert_eq!(
                faults(&target, Check::Targets).is_empty(),
                holds,
                "{case:?}"
            );
            assert_eq!(
                faults(&target, Check::Collapse).is_empty(),
                stands,
                "{case:?}"
            );
        }
    }
}
