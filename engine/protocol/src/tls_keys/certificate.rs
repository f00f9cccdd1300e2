//! How long a certificate says that it is valid, and when the node makes the next one.
//!
//! Peers trust the key that the registry names; they do not look at a certificate's dates, so that
//! a clock that is wrong cuts no node off. The dates are for programs that do look: scanners,
//! proxies and audits. What ends the trust in a key is a registry version without it.

use std::time::Duration;

/// How often a node compares its certificate with its clock: a clock that jumps is noticed by then.
pub const RENEWAL_CHECK_INTERVAL: Duration = Duration::from_secs(3_600);

/// A certificate is valid from this long before it is made, for readers whose clocks are behind.
const BACKDATED_S: u64 = 86_400;
/// The last second that a certificate can name: the end of 9999 (RFC 5280, 4.1.2.5).
const END_OF_TIME_S: u64 = 253_402_300_799;

/// The dates of a certificate, seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    not_before_s: u64,
    not_after_s: u64,
    /// When the next one is to be made.
    renew_at_s: u64,
}

impl Validity {
    /// The lifetime where none is chosen. Long enough that a node which stands still for a week has
    /// a valid certificate, short enough that its renewal is no rare event.
    pub const LIFETIME_DEFAULT: Duration = Duration::from_secs(30 * 86_400);

    /// Of a certificate that is made at `wall_s` for `lifetime`. It is renewed after two thirds of
    /// that.
    pub fn starting(wall_s: u64, lifetime: Duration) -> Self {
        let lifetime_s = lifetime.as_secs().clamp(1, END_OF_TIME_S);
        let wall_s = wall_s.min(END_OF_TIME_S - lifetime_s);
        Self {
            not_before_s: wall_s.saturating_sub(BACKDATED_S),
            not_after_s: wall_s + lifetime_s,
            renew_at_s: wall_s + lifetime_s - lifetime_s / 3,
        }
    }

    /// Whether the next certificate is to be made: two thirds of this one's time are over, or the
    /// clock was set back to before it is valid.
    pub fn is_due(&self, wall_s: u64) -> bool {
        wall_s >= self.renew_at_s || wall_s < self.not_before_s
    }

    /// How long to wait for the next look, by a clock that does not jump.
    pub fn next_check(&self, wall_s: u64) -> Duration {
        let left = Duration::from_secs(self.renew_at_s.saturating_sub(wall_s));
        left.min(RENEWAL_CHECK_INTERVAL)
    }

    /// The first second of it.
    pub fn not_before_s(&self) -> u64 {
        self.not_before_s
    }

    /// The last second of it.
    pub fn not_after_s(&self) -> u64 {
        self.not_after_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400;
    const NOW: u64 = 1_800_000_000;

    // Protects readers that look at the dates: there is a valid certificate at all times, also
    // after the clock jumped.
    #[test]
    fn a_certificate_is_renewed_before_it_ends_and_after_a_jump() {
        let made = Validity::starting(NOW, Duration::from_secs(30 * DAY));
        assert_eq!(
            (made.not_before_s(), made.not_after_s()),
            (NOW - DAY, NOW + 30 * DAY)
        );
        let hour = RENEWAL_CHECK_INTERVAL;
        let table = [
            ("at once", NOW, false, hour),
            ("soon", NOW + 20 * DAY - 60, false, Duration::from_secs(60)),
            ("after two thirds", NOW + 20 * DAY, true, Duration::ZERO),
            ("a jump ahead", NOW + 4_000 * DAY, true, Duration::ZERO),
            ("a jump within the day before", NOW - DAY, false, hour),
            ("a jump back", NOW - DAY - 1, true, hour),
            ("1970", 0, true, hour),
        ];
        for (what, wall_s, is_due, wait) in table {
            assert_eq!(made.is_due(wall_s), is_due, "{what}");
            assert_eq!(made.next_check(wall_s), wait, "{what}");
        }
    }

    // Protects a node with a broken clock: every time gives a certificate that is valid then, as
    // far as dates go.
    #[test]
    fn every_time_has_a_certificate() {
        for wall_s in [0, 1, DAY, NOW, END_OF_TIME_S - 1, END_OF_TIME_S, u64::MAX] {
            for lifetime_s in [0, 1, 2, 3, 30 * DAY, u64::MAX] {
                let made = Validity::starting(wall_s, Duration::from_secs(lifetime_s));
                assert!(made.not_before_s() < made.not_after_s(), "{wall_s}");
                assert!(made.not_after_s() <= END_OF_TIME_S, "{wall_s}");
            }
        }
    }
}
