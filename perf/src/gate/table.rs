//! The comparison as a table.

use std::fmt::Write as _;

use super::{Comparison, LIMIT_PERCENT, Verdict};
use crate::pieces;

/// One line per piece: before, now, difference, instructions per operation, and what is wrong.
#[must_use]
pub fn table(compared: &[Comparison]) -> String {
    let mut text = format!(
        "{:<24}{:>12}{:>12}{:>10}{:>10}\n",
        "piece", "baseline", "now", "change", "per op"
    );
    for Comparison {
        name,
        before,
        now,
        verdict,
    } in compared
    {
        let number = |n: &Option<u64>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
        let change = match (before, now) {
            (Some(before), Some(now)) => {
                format!("{:+.2} %", (*now as f64 / *before as f64 - 1.0) * 100.0)
            }
            _ => "-".to_owned(),
        };
        let per_operation = now.zip(pieces::by_name(name)).map_or_else(
            || "-".to_owned(),
            |(n, piece)| format!("{:.1}", n as f64 / piece.operations as f64),
        );
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{name:<24}{:>12}{:>12}{change:>10}{per_operation:>10}{}",
            number(before),
            number(now),
            remark(*verdict),
        );
    }
    text
}

fn remark(verdict: Verdict) -> String {
    match verdict {
        Verdict::Holds => String::new(),
        Verdict::Slower => format!("  FAILS: over {LIMIT_PERCENT} % more"),
        Verdict::Faster => "  cheaper: record it".to_owned(),
        Verdict::NoBaseline => "  FAILS: not in the baseline".to_owned(),
        Verdict::NoPiece => "  FAILS: the piece is gone".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A failing line says so, and the figures are those compared.
    #[test]
    fn shows_figures_and_failures() {
        let line = |name: &str, before, now, verdict| Comparison {
            name: name.to_owned(),
            before,
            now,
            verdict,
        };
        let text = table(&[
            line("frame_decode", Some(20_480), Some(40_960), Verdict::Slower),
            line("gone", Some(1), None, Verdict::NoPiece),
            line("budget", Some(5_120), Some(5_120), Verdict::Holds),
        ]);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].contains("+100.00 %") && lines[1].contains("40.0"));
        assert!(lines[1].ends_with("FAILS: over 3 % more"));
        assert!(lines[2].ends_with("FAILS: the piece is gone"));
        assert!(lines[3].ends_with("10.0") && lines[3].contains("+0.00 %"));
    }
}
