//! On one thread the limits are exact: `burst + floor(rate * time)`.

use super::*;

/// Offers packets at every quarter of an interval, more than the limit admits; returns how many it
/// admitted.
fn admitted(limit: Limit, elapsed_ns: u64, mut charge: impl FnMut(u64) -> bool) -> u64 {
    let start_ns = 5_000_000_000_000_000;
    let mut admitted = 0;
    for step in 0..=elapsed_ns / (limit.interval_ns / 4) {
        let now_ns = start_ns + step * (limit.interval_ns / 4);
        while charge(now_ns) {
            admitted += 1;
        }
    }
    admitted
}

// Protects the promise that a source gets all that its limit allows, and nothing beyond.
#[test]
fn admits_burst_and_rate() {
    for limit in limits() {
        let elapsed_ns = 400 * limit.interval_ns + limit.interval_ns * 3 / 4;
        let word = AtomicU64::new(0);
        let by_word = admitted(limit, elapsed_ns, |now_ns| {
            charge_word(&word, limit, now_ns)
        });
        assert_eq!(by_word, allowance(limit, elapsed_ns), "{limit:?}");

        let buckets = OwnedBuckets::new(16);
        let sketch = sketch(&buckets);
        let by_sketch = admitted(limit, elapsed_ns, |now_ns| {
            let look = sketch.look([1, 2], Purpose::Quic, 0, limit, now_ns);
            let charge = sketch.charge([1, 2], Purpose::Quic, 0, limit, now_ns);
            assert_eq!(look, charge, "a look says what a charge would");
            charge
        });
        assert_eq!(by_sketch, allowance(limit, elapsed_ns), "{limit:?}");
    }
}
