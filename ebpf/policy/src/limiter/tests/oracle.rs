//! The sketch against exact GCRAs in a map, through turns of its generations.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Exact GCRAs: the sketch without its sketchiness.
#[derive(Default)]
struct Oracle(BTreeMap<(u64, u64, usize), u64>);

impl Oracle {
    fn offer(&mut self, key: (u64, u64, usize), limit: Limit, now_ns: u64, take: bool) -> bool {
        let paid = self.0.entry(key).or_default();
        let base = (*paid).max(now_ns);
        let admitted = base - now_ns <= limit.tolerance_ns;
        if admitted && take {
            *paid = base + limit.interval_ns;
        }
        admitted
    }
}

#[derive(Clone, Debug)]
struct Offer {
    key: u64,
    purpose: Purpose,
    level: usize,
    /// In quarters of the interval, since the last offer.
    quarters: u64,
    take: bool,
}

fn offers() -> impl Strategy<Value = Vec<Offer>> {
    let purpose = prop::sample::select(vec![Purpose::Quic, Purpose::Tcp, Purpose::Peer]);
    // Mostly dense, so that limits refuse; now and then a pause after which every word is idle.
    let quarters = prop_oneof![20 => 0..3u64, 1 => 0..400u64];
    let offer = (0..4u64, purpose, 0..LEVELS, quarters, any::<bool>()).prop_map(
        |(key, purpose, level, quarters, take)| Offer {
            key,
            purpose,
            level,
            quarters,
            take,
        },
    );
    prop::collection::vec(offer, 1..400)
}

const LEVELS: usize = 3;

proptest! {
    #[test]
    fn agrees_with_exact_counting(
        offers in offers(),
        start_ns in 0..1u64 << 62,
        seeds: [[u8; 16]; 2],
        choice in 0..1_000usize,
    ) {
        let limits: Vec<_> = limits().collect();
        let limit = limits[choice % limits.len()];
        let buckets = OwnedBuckets::new(1 << 10);
        let seed = seeds.map(Key::from_bytes);
        let mut sketch = Sketch { buckets: &buckets, seed, active: 0, old_until_ns: 0 };
        let mut rotation = Rotation::new(0, [limit], start_ns);
        let mut oracle = Oracle::default();
        let mut now_ns = start_ns;
        let mut turns = 0u8;
        for offer in offers {
            let Offer { key, purpose, level, quarters, take } = offer;
            now_ns += quarters * (limit.interval_ns / 4);
            while now_ns >= rotation.due_at_ns() {
                turns = turns.wrapping_add(1);
                turn(&mut sketch, &mut rotation, [turns; 16]);
            }
            let expected = oracle.offer((key, purpose as u64, level), limit, now_ns, take);
            let admitted = if take {
                sketch.charge([key, !key], purpose, level, limit, now_ns)
            } else {
                sketch.look([key, !key], purpose, level, limit, now_ns)
            };
            prop_assert_eq!(admitted, expected, "{:?} at {}", limit, now_ns);
        }
    }
}

/// The steps of a sketch's owner as soon as a turn is due.
fn turn(sketch: &mut Sketch<'_, OwnedBuckets>, rotation: &mut Rotation, random: [u8; 16]) {
    sketch.clear_idle();
    let switch = rotation.turn(rotation.due_at_ns(), random).unwrap();
    sketch.seed[switch.active] = switch.seed;
    sketch.old_until_ns = switch.old_until_ns;
    sketch.active = switch.active;
}
