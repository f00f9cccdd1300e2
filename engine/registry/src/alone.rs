//! When to tell that no peer is there to ask for newer versions.

use std::time::{Duration, Instant};

/// A node that has just started, or whose path was cut for a moment, is not told of.
const TELL_AFTER: Duration = Duration::from_secs(30);

/// A node that stays alone is told of now and then.
const TELL_AGAIN: Duration = Duration::from_secs(60 * 60);

/// Hears now and then whether there are peers.
#[derive(Debug, Default)]
pub(crate) struct Alone {
    tell_at: Option<Instant>,
}

impl Alone {
    /// Whether to tell now that there is no peer.
    pub(crate) fn tell(&mut self, has_peer: bool, now: Instant) -> bool {
        if has_peer {
            self.tell_at = None;
            return false;
        }
        let at = *self.tell_at.get_or_insert(now + TELL_AFTER);
        let is_due = at <= now;
        if is_due {
            self.tell_at = Some(now + TELL_AGAIN);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects the log from a node that is alone for days, and the operator of one that is alone
    /// for a minute.
    #[test]
    fn a_node_that_stays_alone_is_told_of_now_and_then() {
        let (mut alone, start) = (Alone::default(), Instant::now());
        let steps = [
            (0, false, false),
            (29, false, false),
            (30, false, true),
            (31, false, false),
            (30 + 3_599, false, false),
            (30 + 3_600, false, true),
            (4_000, true, false),
            (4_001, false, false),
            (4_030, false, false),
            (4_031, false, true),
        ];
        for (at_s, has_peer, told) in steps {
            let now = start + Duration::from_secs(at_s);
            assert_eq!(alone.tell(has_peer, now), told, "{at_s} s");
        }
    }
}
