//! Innocent sources among busy ones.

use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::source::Source;

/// A different IPv4 address for every number: an odd factor is a permutation of 32 bits.
fn source(number: u32) -> Source {
    Source::of(IpAddr::V4(Ipv4Addr::from_bits(
        number.wrapping_mul(0x9e37_79b1),
    )))
}

// Protects customers of a node under attack: the sketch must not take them for the attackers.
#[test]
fn busy_sources_hardly_ever_limit_innocent_ones() {
    const BUSY: u32 = 16_000;
    const INNOCENT: u32 = 1_000_000;
    let now_ns = 1_000_000_000_000;
    let buckets = OwnedBuckets::new(1 << 16);
    let sketch = sketch(&buckets);
    let limit = Limit::per(1_000, MINUTE, 10);
    let limits = [limit, limit.scaled(4), limit.scaled(16)];
    for number in 0..BUSY {
        let admitted = (0..20)
            .filter(|_| sketch.charge_source(source(number), Purpose::Quic, &limits, now_ns))
            .count();
        assert!(admitted <= 10);
    }
    let limited = (BUSY..BUSY + INNOCENT)
        .filter(|&number| !sketch.look_source(source(number), Purpose::Quic, &limits, now_ns))
        .count();
    assert!(
        limited * 10_000 < INNOCENT as usize,
        "{limited} of {INNOCENT} innocents limited"
    );
}
