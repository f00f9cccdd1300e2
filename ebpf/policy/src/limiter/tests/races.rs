//! Two threads at one budget: they never get more than one thread would; and naive limiters, which
//! do give more.

use std::sync::Barrier;
use std::thread;

use super::*;

const START_NS: u64 = 3_000_000_000_000_000;
const ROUNDS: u64 = 600;
/// Rounds in an interval: with two threads, four packets for each one that may pass.
const ROUNDS_EACH: u64 = 2;

/// Two threads in step: each offers one packet a round. `attempt(thread, now, barrier)` waits at
/// the barrier exactly once.
fn in_step(limit: Limit, attempt: impl Fn(usize, u64, &Barrier) -> bool + Sync) -> u64 {
    let barrier = Barrier::new(2);
    let offer = |thread| {
        let mut admitted = 0;
        for round in 0..ROUNDS {
            let now_ns = START_NS + round * limit.interval_ns / ROUNDS_EACH;
            admitted += u64::from(attempt(thread, now_ns, &barrier));
            barrier.wait();
        }
        admitted
    };
    thread::scope(|scope| {
        let second = scope.spawn(|| offer(1));
        offer(0) + second.join().unwrap()
    })
}

fn allowed_in_step(limit: Limit) -> u64 {
    allowance(limit, (ROUNDS - 1) * limit.interval_ns / ROUNDS_EACH)
}

/// Two threads that run freely and advance the clock; returns what they admitted and how long that
/// took by the clock.
fn running_free(limit: Limit, charge: impl Fn(u64) -> bool + Sync) -> (u64, u64) {
    const STEPS: u64 = 20_000;
    let elapsed_ns = (STEPS / 4 * limit.interval_ns).min(TOLERANCE_MAX_NS);
    let late_max = CLOCK_SLACK_NS / (elapsed_ns / STEPS).max(1);
    let clock = AtomicU64::new(0);
    // The step that each is at.
    let at = [AtomicU64::new(0), AtomicU64::new(0)];
    let offer = |thread: usize| {
        let mut admitted = 0;
        loop {
            let step = clock.fetch_add(1, Ordering::Relaxed);
            if step > STEPS {
                at[thread].store(u64::MAX, Ordering::Release);
                return admitted;
            }
            at[thread].store(step, Ordering::Release);
            while at[thread ^ 1]
                .load(Ordering::Acquire)
                .saturating_add(late_max)
                < step
            {
                thread::yield_now();
            }
            let now_ns = START_NS + elapsed_ns * step / STEPS;
            admitted += u64::from(charge(now_ns)) + u64::from(charge(now_ns));
        }
    };
    let admitted = thread::scope(|scope| {
        let second = scope.spawn(|| offer(1));
        offer(0) + second.join().unwrap()
    });
    (admitted, elapsed_ns)
}

#[test]
fn two_threads_get_no_more_than_one() {
    for limit in limits() {
        let word = AtomicU64::new(0);
        let (admitted, elapsed_ns) =
            running_free(limit, |now_ns| charge_word(&word, limit, now_ns));
        assert!(
            admitted <= allowance(limit, elapsed_ns),
            "word, {limit:?}: {admitted}"
        );

        let buckets = OwnedBuckets::new(1);
        let sketch = sketch(&buckets);
        let (admitted, elapsed_ns) = running_free(limit, |now_ns| {
            sketch.charge([1, 2], Purpose::Quic, 0, limit, now_ns)
        });
        assert!(
            admitted <= allowance(limit, elapsed_ns),
            "sketch, {limit:?}: {admitted}"
        );
    }
}

#[test]
fn two_threads_in_step_get_what_one_would() {
    for limit in limits().filter(|limit| limit.burst() < ROUNDS / 2) {
        let word = AtomicU64::new(0);
        let admitted = in_step(limit, |_, now_ns, barrier| {
            barrier.wait();
            charge_word(&word, limit, now_ns)
        });
        assert_eq!(admitted, allowed_in_step(limit), "word, {limit:?}");

        let buckets = OwnedBuckets::new(1);
        let sketch = sketch(&buckets);
        let admitted = in_step(limit, |_, now_ns, barrier| {
            barrier.wait();
            sketch.charge([1, 2], Purpose::Quic, 0, limit, now_ns)
        });
        assert_eq!(admitted, allowed_in_step(limit), "sketch, {limit:?}");
    }
}

// A new key: both threads find no word and an idle slot.
#[test]
fn two_threads_place_a_key_once() {
    let limit = Limit::per(1, HOUR, 1);
    let buckets = OwnedBuckets::new(1 << 12);
    let sketch = sketch(&buckets);
    let barrier = Barrier::new(2);
    let offer = || -> Vec<bool> {
        (0..2_000)
            .map(|key| {
                barrier.wait();
                sketch.charge([key, 0], Purpose::Quic, 0, limit, START_NS)
            })
            .collect()
    };
    let (first, second) = thread::scope(|scope| {
        let second = scope.spawn(offer);
        (offer(), second.join().unwrap())
    });
    for (key, (first, second)) in first.into_iter().zip(second).enumerate() {
        assert!(first != second, "key {key}: {first} and {second}");
    }
}

/// The naive limiters must be seen to fail, or the tests above prove nothing.
#[track_caller]
fn exceeds(limit: Limit, attempt: impl Fn(usize, u64, &Barrier) -> bool + Sync) {
    let (admitted, allowed) = (in_step(limit, attempt), allowed_in_step(limit));
    assert!(
        admitted > allowed,
        "{limit:?}: {admitted} of {allowed}: the control holds"
    );
}

/// The GCRA's decision on a word; none: refused.
fn next(word: u64, limit: Limit, now_ns: u64) -> Option<u64> {
    let base = word.max(now_ns);
    (base - now_ns <= limit.tolerance_ns).then(|| base + limit.interval_ns)
}

#[test]
fn control_without_compare_and_swap_exceeds() {
    for limit in limits().filter(|limit| limit.burst() < ROUNDS / 4) {
        let word = AtomicU64::new(0);
        exceeds(limit, |_, now_ns, barrier| {
            let next = next(word.load(Ordering::SeqCst), limit, now_ns);
            barrier.wait();
            next.inspect(|&next| word.store(next, Ordering::SeqCst))
                .is_some()
        });
    }
}

#[test]
fn control_with_a_word_for_each_thread_exceeds() {
    for limit in limits().filter(|limit| limit.burst() < ROUNDS / 4) {
        let words = [AtomicU64::new(0), AtomicU64::new(0)];
        exceeds(limit, |thread, now_ns, barrier| {
            barrier.wait();
            charge_word(&words[thread], limit, now_ns)
        });
    }
}

#[test]
fn control_with_tokens_and_timestamp_exceeds() {
    for limit in limits().filter(|limit| limit.burst() < ROUNDS / 4) {
        let tokens = AtomicU64::new(limit.burst());
        let filled_at_ns = AtomicU64::new(START_NS);
        exceeds(limit, |_, now_ns, barrier| {
            let since_ns = filled_at_ns.load(Ordering::SeqCst);
            let earned = (now_ns - since_ns) / limit.interval_ns;
            let held = (tokens.load(Ordering::SeqCst) + earned).min(limit.burst());
            barrier.wait();
            if held == 0 {
                return false;
            }
            filled_at_ns.store(since_ns + earned * limit.interval_ns, Ordering::SeqCst);
            tokens.store(held - 1, Ordering::SeqCst);
            true
        });
    }
}
