//! Keeps lines that strangers can cause from filling the log: one of each kind in
//! [`INTERVAL`], which says how many were left out.
//!
//! Kinds are `&'static str`s of our own code, so no peer can grow the map.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// An operator who watches sees the first line at once; a day of an attack is 8,640 lines a kind.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);

/// When lines of each kind were written.
#[derive(Debug, Default)]
pub(crate) struct LogLimit {
    kinds: BTreeMap<&'static str, Kind>,
}

#[derive(Debug)]
struct Kind {
    last: Instant,
    left_out: u64,
}

impl LogLimit {
    /// Whether a line of this kind may be written at `now`; the number of those that were left out
    /// since the last one.
    pub(crate) fn admit(&mut self, kind: &'static str, now: Instant) -> Option<u64> {
        let Some(held) = self.kinds.get_mut(kind) else {
            let first = Kind {
                last: now,
                left_out: 0,
            };
            self.kinds.insert(kind, first);
            return Some(0);
        };
        if now < held.last + INTERVAL {
            held.left_out += 1;
            return None;
        }
        held.last = now;
        Some(std::mem::take(&mut held.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_one_line_in_the_interval() {
        let (mut limit, start) = (LogLimit::default(), Instant::now());
        let cases = [
            ("a", 0, Some(0)),
            ("a", 1, None),
            ("b", 1, Some(0)),
            ("a", 9_999, None),
            ("a", 10_000, Some(2)),
            ("a", 19_999, None),
            ("b", 20_000, Some(0)),
        ];
        for (kind, at_ms, admitted) in cases {
            let now = start + Duration::from_millis(at_ms);
            assert_eq!(limit.admit(kind, now), admitted, "{kind} at {at_ms} ms");
        }
    }
}
