//! Tables of loads that are borne and of floods, and properties over random loads.

use proptest::prelude::*;

use super::*;

const FRAMES_PER_SECOND: u64 = 100_000;

fn config() -> FloodConfig {
    let room = FloodRoom {
        frames_per_second: FRAMES_PER_SECOND,
        requests: 1_000,
        streams: 500,
        window_bytes: 1 << 20,
    };
    FloodConfig::new(&FloodRates::default(), &room)
}

fn guard(now: Instant) -> FloodGuard {
    FloodGuard::new(config(), now)
}

/// Work of one kind and nothing that pays for it.
fn only(flood: Flood, n: u64) -> Counts {
    let mut counts = Counts::default();
    let place = match flood {
        Flood::Frames => &mut counts.frames,
        Flood::Answers => &mut counts.unasked_answers,
        Flood::Cancellations => &mut counts.cancellations,
        Flood::Unfinished => &mut counts.unfinished,
        Flood::Stalled => &mut counts.stalled,
        Flood::Probes => &mut counts.probes,
        Flood::Packets => &mut counts.packets.received,
        Flood::PathChallenges => &mut counts.packets.path_challenges,
        Flood::RetiredIds => &mut counts.packets.retired_ids,
    };
    *place = n;
    counts
}

fn cuttable() -> impl Iterator<Item = Flood> {
    Flood::ALL.into_iter().filter(|kind| *kind != Flood::Frames)
}

// Protects a shard from each kind of flood, and a peer that stays within its allowance.
#[test]
fn each_kind_is_cut_one_beyond_its_allowance() {
    for flood in cuttable() {
        let Allowance { per_second, burst } = config().of(flood);
        let mut now = Instant::now();
        let mut guard = guard(now);
        assert_eq!(guard.judge(&only(flood, burst), now), Verdict::Go);
        for _ in 0..100 {
            now += Duration::from_secs(1);
            assert_eq!(guard.judge(&only(flood, per_second), now), Verdict::Go);
        }
        let verdict = guard.judge(&only(flood, 1), now);
        assert_eq!(verdict, Verdict::Cut(flood), "{flood:?}");
    }
}

#[test]
fn reasons_differ_and_are_numbered_in_order() {
    let mut reasons = Flood::ALL.map(Flood::reason).to_vec();
    for (number, flood) in Flood::ALL.into_iter().enumerate() {
        assert_eq!(flood as usize, number);
    }
    reasons.sort_unstable();
    reasons.dedup();
    assert_eq!(reasons.len(), Flood::COUNT);
}

// Protects a small rate from looks that come often: time that is shorter than a millisecond is not
// lost, nor counted twice.
#[test]
fn many_looks_take_off_as_much_as_one() {
    let start = Instant::now();
    let mut guard = guard(start);
    let Allowance { per_second, burst } = config().of(Flood::RetiredIds);
    assert_eq!(per_second, 1);
    guard.judge(&only(Flood::RetiredIds, burst), start);
    let step = Duration::from_micros(300);
    let mut now = start;
    while now < start + Duration::from_secs(3) {
        assert_eq!(guard.judge(&Counts::default(), now), Verdict::Go);
        now += step;
    }
    let mut verdict = |n| guard.judge(&only(Flood::RetiredIds, n), now);
    assert_eq!(verdict(3), Verdict::Go, "3 s take 3 off");
    assert_eq!(verdict(1), Verdict::Cut(Flood::RetiredIds));
}

/// What an honest peer's packets look like in a second.
fn honest_packets() -> [(&'static str, PacketCounts); 6] {
    let zero = PacketCounts::default();
    [
        (
            "a body of 1.4 GB/s from us, acknowledged in every second packet",
            PacketCounts {
                received: 500_000,
                sent: 1_000_000,
                acked_bytes: 1_400_000_000,
                ..zero
            },
        ),
        (
            "a body of 1.4 GB/s from the peer in packets of 1,200 bytes",
            PacketCounts {
                received: 1_200_000,
                sent: 10_000,
                read_bytes: 1_400_000_000,
                ..zero
            },
        ),
        (
            "the same, each packet twice",
            PacketCounts {
                received: 2_400_000,
                sent: 10_000,
                read_bytes: 1_400_000_000,
                ..zero
            },
        ),
        (
            "650,000 RPCs of one packet each way, each acknowledged by itself",
            PacketCounts {
                received: 1_300_000,
                sent: 1_300_000,
                acked_bytes: 650_000 * 60,
                frames: 650_000,
                ..zero
            },
        ),
        (
            "empty answers, many in a packet",
            PacketCounts {
                received: 20_000,
                sent: 20_000,
                acked_bytes: 10_000_000,
                frames: 650_000,
                ..zero
            },
        ),
        (
            "nothing but a PING in a second",
            PacketCounts {
                received: 2,
                sent: 2,
                acked_bytes: 40,
                ..zero
            },
        ),
    ]
}

// Protects honest peers at their best: what was measured on real connections never adds up.
#[test]
fn packets_that_are_paid_for_are_no_flood() {
    for (what, packets) in honest_packets() {
        let mut now = Instant::now();
        let mut guard = guard(now);
        for _ in 0..3_600 {
            now += Duration::from_secs(1);
            let counts = Counts {
                packets,
                ..Counts::default()
            };
            assert_eq!(guard.judge(&counts, now), Verdict::Go, "{what}");
        }
    }
}

// Protects the shard from packets that are cheap to send: what they make us send pays for nothing.
#[test]
fn packets_that_bring_nothing_are_a_flood() {
    let zero = PacketCounts::default();
    let floods = [
        (
            "PING, each answered",
            PacketCounts {
                received: 200_000,
                sent: 200_000,
                ..zero
            },
        ),
        (
            "a byte of a stream in each packet",
            PacketCounts {
                received: 200_000,
                sent: 10_000,
                read_bytes: 200_000,
                ..zero
            },
        ),
        (
            "a byte of a lane in each packet: a frame in 16",
            PacketCounts {
                received: 200_000,
                sent: 10_000,
                frames: 200_000 / 16,
                ..zero
            },
        ),
        (
            "PING beside a body of 10 MB/s from us",
            PacketCounts {
                received: 200_000,
                sent: 8_000,
                acked_bytes: 10_000_000,
                ..zero
            },
        ),
    ];
    for (what, packets) in floods {
        let mut now = Instant::now();
        let mut guard = guard(now);
        let is_cut = (0..10).any(|_| {
            now += Duration::from_secs(1);
            let counts = Counts {
                packets,
                ..Counts::default()
            };
            guard.judge(&counts, now) == Verdict::Cut(Flood::Packets)
        });
        assert!(is_cut, "{what}");
    }
}

// Protects a peer that takes back what it asked for, and the shard from one that takes back more.
#[test]
fn a_cancellation_is_paid_for_by_a_request() {
    let burst = config().of(Flood::Cancellations).burst;
    let now = Instant::now();
    let mut guard = guard(now);
    let counts = |requests, cancellations| Counts {
        requests,
        cancellations,
        ..Counts::default()
    };
    // All that may be in flight, twice over, then as fast as they come.
    assert_eq!(guard.judge(&counts(1_000_000, 0), now), Verdict::Go);
    assert_eq!(guard.judge(&counts(0, burst), now), Verdict::Go);
    for _ in 0..100 {
        assert_eq!(guard.judge(&counts(50_000, 50_000), now), Verdict::Go);
    }
    let verdict = guard.judge(&counts(10, 11), now);
    assert_eq!(verdict, Verdict::Cut(Flood::Cancellations));
}

// Protects the order of an honest peer's frames: above the rate they wait, and no longer than it
// takes to come down to it.
#[test]
fn frames_above_the_rate_are_read_later() {
    let start = Instant::now();
    let mut guard = guard(start);
    let Allowance { per_second, burst } = config().of(Flood::Frames);
    assert_eq!(guard.judge(&only(Flood::Frames, burst), start), Verdict::Go);
    let until = start + Duration::from_millis(100);
    let over = only(Flood::Frames, per_second / 10);
    assert_eq!(guard.judge(&over, start), Verdict::Hold(until));
    // What else is judged meanwhile does not lengthen it.
    let packets = only(Flood::Packets, 1);
    assert_eq!(guard.judge(&packets, start), Verdict::Go);
    assert_eq!(
        guard.judge(&only(Flood::Frames, 1), until),
        Verdict::Hold(until + Duration::from_millis(1))
    );
}

// Protects the shard from a peer that is held back and does not care.
#[test]
fn frames_that_stay_above_the_rate_are_cut_in_the_end() {
    let start = Instant::now();
    let (mut guard, mut now) = (guard(start), start);
    let mut verdict = Verdict::Go;
    while !matches!(verdict, Verdict::Cut(_)) {
        assert!(now < start + 4 * HELD_MAX, "it is held for ever");
        if let Verdict::Hold(until) = verdict {
            now = until;
        }
        verdict = guard.judge(&only(Flood::Frames, FRAMES_PER_SECOND / 10), now);
    }
    assert_eq!(verdict, Verdict::Cut(Flood::Frames));
    assert!(now >= start + HELD_MAX, "it was slowed first");
    // More at once than can be made up for in that time.
    let mut guard = FloodGuard::new(config(), now);
    let counts = only(Flood::Frames, 6 * FRAMES_PER_SECOND);
    assert_eq!(guard.judge(&counts, now), Verdict::Cut(Flood::Frames));
}

proptest! {
    // Protects every honest peer: whatever comes at or below all rates is never held nor cut.
    #[test]
    fn at_the_rates_nothing_happens(steps in prop::collection::vec(1_u64..5_000, 1..200)) {
        let start = Instant::now();
        let (mut guard, mut now) = (guard(start), start);
        for ms in steps {
            now += Duration::from_millis(ms);
            let n = |flood| config().of(flood).per_second * ms / 1_000;
            let counts = Counts {
                frames: n(Flood::Frames),
                unasked_answers: n(Flood::Answers),
                requests: 0,
                cancellations: n(Flood::Cancellations),
                unfinished: n(Flood::Unfinished),
                stalled: n(Flood::Stalled),
                probes: n(Flood::Probes),
                packets: PacketCounts {
                    received: n(Flood::Packets),
                    path_challenges: n(Flood::PathChallenges),
                    retired_ids: n(Flood::RetiredIds),
                    ..PacketCounts::default()
                },
            };
            prop_assert_eq!(guard.judge(&counts, now), Verdict::Go);
        }
    }

    // Protects the shard: of no kind more gets through than its rate and its burst, in any order of
    // looks.
    #[test]
    fn never_more_than_rate_and_burst(
        steps in prop::collection::vec((0_u64..200, 0_u64..3_000), 1..200),
        kind in 1..Flood::COUNT,
    ) {
        let flood = Flood::ALL[kind];
        let Allowance { per_second, burst } = config().of(flood);
        let start = Instant::now();
        let (mut guard, mut now, mut sum) = (guard(start), start, 0);
        for (ms, n) in steps {
            now += Duration::from_millis(ms);
            sum += n;
            let verdict = guard.judge(&only(flood, n), now);
            if verdict == Verdict::Cut(flood) {
                return Ok(());
            }
            let elapsed_ms = (now - start).as_millis() as u64;
            prop_assert!(sum <= burst + per_second * elapsed_ms / 1_000 + 1);
        }
    }

    // Protects the node from numbers that no connection reaches.
    #[test]
    fn no_count_panics(n in any::<u64>(), paid in any::<u64>(), ms in any::<u32>()) {
        let start = Instant::now();
        let mut guard = guard(start);
        for flood in Flood::ALL {
            let counts = Counts {
                requests: paid,
                ..only(flood, n)
            };
            guard.judge(&counts, start + Duration::from_millis(ms.into()));
        }
    }
}
