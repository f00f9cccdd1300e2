//! The machine over a model of a path: it carries packets up to a size, or none; replies come a
//! round trip later.

use super::*;

const RTT: Duration = Duration::from_millis(20);
const PTO: Duration = Duration::from_millis(45);
const MAX: usize = 1_452;

struct Path {
    mtu: PathMtu,
    now: Instant,
    /// The largest packets that arrive; `None`: nothing does.
    carries: Option<usize>,
    /// Whether the device refuses what is larger than it carries.
    refuses: bool,
    traffic: Traffic,
    /// Replies on their way.
    replies: Vec<(Instant, u32)>,
    probes: usize,
    /// The one probe that congestion loses, counted from 0.
    loses: Option<usize>,
    /// Whether probes are a little smaller than wanted: a packet number takes 1 to 4 bytes.
    shortens: bool,
}

impl Path {
    fn new(carries: usize) -> Self {
        let now = Instant::now();
        let traffic = Traffic {
            timeout: PTO,
            ..Traffic::default()
        };
        let mut path = Self {
            mtu: PathMtu::new(MAX, true, now),
            now,
            carries: Some(carries),
            refuses: false,
            traffic,
            replies: Vec::new(),
            probes: 0,
            loses: None,
            shortens: false,
        };
        path.mtu.start();
        path
    }

    /// Lets `time` pass, and things happen in it.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.send();
            let reply = self.replies.iter().map(|(at, _)| *at).min();
            let next = [reply, self.mtu.next_timeout()].into_iter().flatten().min();
            let Some(at) = next.filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(at);
            let (come, later) = self.replies.iter().partition(|(at, _)| *at <= self.now);
            self.replies = later;
            for (_, number) in come {
                self.mtu.on_reply(number, self.now);
            }
            self.small_packets_pass();
            self.mtu.on_timeout(&self.traffic, self.now);
        }
        self.now = end;
    }

    fn small_packets_pass(&mut self) {
        if self.carries.is_some() {
            self.traffic.acked_bytes += 100;
        }
    }

    fn send(&mut self) {
        while let Some((number, bytes)) = self.mtu.next_probe() {
            assert!(PathMtu::is_reply(number), "{number:#x}");
            let bytes = if self.shortens {
                bytes - self.probes % 4
            } else {
                bytes
            };
            self.mtu.on_probe_sent(bytes, PTO, self.now);
            self.probes += 1;
            if self.loses == Some(self.probes - 1) {
                continue;
            }
            if self.carries.is_some_and(|carries| bytes <= carries) {
                self.replies.push((self.now + RTT, number));
            } else if self.refuses {
                self.mtu.on_refused(bytes, self.now);
            }
        }
    }

    /// QUIC's timer expires, as it does when nothing is acknowledged.
    fn time_out(&mut self) {
        self.traffic.timeouts += 1;
        self.mtu.on_timeout(&self.traffic, self.now);
    }

    fn assert_close_to(&self, carries: usize) {
        let bytes = self.mtu.bytes();
        let is_found = bytes <= carries && bytes + PRECISION_BYTES > carries.min(MAX);
        assert!(is_found, "{bytes} on a path that carries {carries}");
    }
}

const SECOND: Duration = Duration::from_secs(1);

// Protects invariant 1, and the cost of a search.
#[test]
fn finds_what_a_path_carries() {
    for (carries, probes_max) in [
        (9_000, 1),
        (1_452, 1),
        (1_451, 14),
        (1_372, 14),
        (1_352, 14),
        (1_252, 14),
        (1_232, 14),
        (1_200, 17),
    ] {
        let mut path = Path::new(carries);
        assert_eq!(path.mtu.bytes(), BASE_BYTES);
        path.run(SECOND);
        path.assert_close_to(carries);
        assert!(path.probes <= probes_max, "{carries}: {}", path.probes);
        assert_eq!(path.mtu.take_reduction(), None, "{carries}");
    }
}

// Protects the rate for good: congestion loses a probe now and then, whichever it is, and a path is
// not taken for a smaller one until a search for more.
#[test]
fn one_lost_probe_excludes_nothing() {
    for carries in [1_452, 1_451, 1_420, 1_372, 1_352, 1_300, 1_252, 1_216] {
        let mut path = Path::new(carries);
        path.run(SECOND);
        for loses in 0..path.probes {
            let mut path = Path::new(carries);
            path.loses = Some(loses);
            path.run(2 * SECOND);
            path.assert_close_to(carries);
            assert!(
                matches!(path.mtu.state, State::Settled),
                "{carries} {loses}"
            );
        }
        // And after a fallback.
        for loses in 0..2 * path.probes {
            let mut path = Path::new(MAX);
            path.run(SECOND);
            path.carries = Some(carries);
            path.loses = Some(path.probes + loses);
            path.time_out();
            path.time_out();
            path.run(2 * SECOND);
            path.assert_close_to(carries);
        }
    }
}

// Protects the path from a search without end: a probe that was smaller than wanted proves less.
#[test]
fn probes_that_are_smaller_than_wanted_end_a_search_too() {
    for carries in 1_216..1_452 {
        let mut path = Path::new(carries);
        path.shortens = true;
        path.run(5 * SECOND);
        assert!(matches!(path.mtu.state, State::Settled), "{carries}");
        assert!(path.probes <= 30, "{carries}: {}", path.probes);
        let bytes = path.mtu.bytes();
        let is_found = bytes <= carries && bytes + PRECISION_BYTES + 3 > carries;
        assert!(is_found, "{bytes} on a path that carries {carries}");
    }
}

// Protects a body under way: two PTOs, and what the second sends is small enough.
#[test]
fn falls_back_at_the_second_timeout_and_finds_the_rest() {
    for carries in [1_372, 1_300, 1_252, 1_205] {
        let mut path = Path::new(MAX);
        path.run(SECOND);
        path.carries = Some(carries);
        path.time_out();
        assert_eq!(path.mtu.bytes(), MAX);
        path.time_out();
        assert_eq!(path.mtu.bytes(), BASE_BYTES);
        path.run(SECOND);
        path.assert_close_to(carries);
        let reduction = path.mtu.take_reduction().unwrap();
        assert_eq!(reduction.cause, Cause::BlackHole);
        assert_eq!(
            (reduction.from_bytes, reduction.to_bytes),
            (MAX, path.mtu.bytes())
        );
        // And again: 1,400, then 1,300.
        path.carries = Some(1_204);
        path.time_out();
        path.time_out();
        path.run(SECOND);
        path.assert_close_to(1_204);
    }
}

// Protects the rate: an error costs one round trip, and is no black hole.
#[test]
fn a_false_alarm_is_over_after_a_round_trip() {
    let mut path = Path::new(MAX);
    path.run(SECOND);
    path.time_out();
    path.time_out();
    assert_eq!(path.mtu.bytes(), BASE_BYTES);
    path.run(RTT);
    assert_eq!(path.mtu.bytes(), MAX);
    assert_eq!(path.mtu.take_reduction(), None);
}

// A timer that expires now and then, as on a lossy path, is answered by a probe, and forgotten.
#[test]
fn timeouts_between_proofs_do_not_add_up() {
    let mut path = Path::new(MAX);
    path.run(SECOND);
    for _ in 0..10 {
        path.time_out();
        path.run(RTT);
        assert_eq!(path.mtu.bytes(), MAX);
    }
}

// Protects the body after idleness: small packets alone keep a connection up.
#[test]
fn an_idle_connection_notices_that_its_path_shrank() {
    let mut path = Path::new(MAX);
    path.run(SECOND);
    path.carries = Some(1_352);
    path.run(VERIFY_INTERVAL + SECOND);
    path.assert_close_to(1_352);
    // An idle connection sends little: a proof in each interval.
    let probes = path.probes;
    path.run(10 * VERIFY_INTERVAL);
    assert!(
        (9..=11).contains(&(path.probes - probes)),
        "{}",
        path.probes
    );
}

// Protects a body beside small packets, whose acknowledgements keep QUIC's timer from expiring.
#[test]
fn losses_make_the_machine_look() {
    let mut path = Path::new(MAX);
    path.run(2 * SECOND);
    path.carries = Some(1_300);
    path.traffic.lost_packets += 1;
    path.mtu.on_timeout(&path.traffic, path.now);
    path.run(8 * REPLY_TIMEOUT_MIN);
    path.assert_close_to(1_300);
    // Not more than once in a while.
    let mut path = Path::new(MAX);
    path.run(SECOND / 2);
    for _ in 0..20 {
        path.traffic.lost_packets += 1;
        path.mtu.on_timeout(&path.traffic, path.now);
        path.run(SECOND / 20);
    }
    assert!(path.probes <= 2, "{}", path.probes);
}

// Protects invariant 3.
#[test]
fn an_outage_is_no_black_hole() {
    let mut path = Path::new(MAX);
    path.run(SECOND);
    path.carries = None;
    path.time_out();
    path.time_out();
    path.run(20 * SECOND);
    assert_eq!(path.mtu.bytes(), BASE_BYTES);
    let probes = path.probes;
    path.run(20 * SECOND);
    assert!(path.probes <= probes + 40, "the wait doubles");
    path.carries = Some(MAX);
    path.run(REPLY_TIMEOUT_MAX + RTT);
    assert_eq!(path.mtu.bytes(), MAX);
    assert_eq!(path.mtu.take_reduction(), None);
}

// Protects a path that recovers, whatever it could not carry before.
#[test]
fn goes_up_again_when_bytes_enough_are_sent() {
    for before in [1_205, 1_252, 1_352] {
        let mut path = Path::new(before);
        path.run(SECOND);
        path.carries = Some(MAX);
        path.run(5 * RAISE_INTERVAL_MIN);
        path.assert_close_to(before);
        path.traffic.sent_bytes += RAISE_SENT_BYTES;
        path.run(RAISE_INTERVAL_MIN + SECOND);
        assert_eq!(path.mtu.bytes(), MAX);
    }
}

// Protects the path: what it does not carry is tried seldom.
#[test]
fn tries_in_vain_become_rare() {
    let mut path = Path::new(1_352);
    path.run(SECOND);
    let probes = path.probes;
    for _ in 0..3_600 {
        path.traffic.sent_bytes += RAISE_SENT_BYTES;
        path.run(SECOND);
    }
    // A proof in each interval, and a few searches that find nothing.
    let searches = path.probes - probes - 360;
    assert!(searches <= 12 * (1 + ROUND_PROBES), "{searches}");
    path.assert_close_to(1_352);
}

// The kernel says at once what a device does not carry.
#[test]
fn a_device_that_refuses_is_no_black_hole() {
    let mut path = Path::new(MAX);
    path.run(SECOND);
    (path.carries, path.refuses) = (Some(1_372), true);
    path.mtu.on_refused(MAX, path.now);
    assert_eq!(path.mtu.bytes(), BASE_BYTES);
    // Trains that were under way.
    path.mtu.on_refused(MAX, path.now);
    path.run(3 * RTT);
    path.assert_close_to(1_372);
    let reduction = path.mtu.take_reduction().unwrap();
    assert_eq!(reduction.cause, Cause::Device);
    // What no path of QUIC may refuse is not heard.
    path.mtu.on_refused(BASE_BYTES, path.now);
    path.assert_close_to(1_372);
}

#[test]
fn a_size_that_is_given_stays() {
    let now = Instant::now();
    let mut mtu = PathMtu::new(9_000, false, now);
    mtu.start();
    mtu.on_refused(9_000, now);
    let traffic = Traffic {
        timeouts: 9,
        lost_packets: 9,
        ..Traffic::default()
    };
    mtu.on_timeout(&traffic, now);
    assert_eq!((mtu.bytes(), mtu.next_probe()), (9_000, None));
    assert_eq!(mtu.next_timeout(), None);
}

// A reply that no probe waits for, or that comes twice, proves nothing.
#[test]
fn a_strange_reply_proves_nothing() {
    let mut path = Path::new(1_300);
    for number in [0, MARK, MARK | 7, u32::MAX] {
        path.mtu.on_reply(number, path.now);
    }
    assert_eq!(path.mtu.bytes(), BASE_BYTES);
    for number in [0, 7, CHALLENGE, CHALLENGE | MARK] {
        assert!(!PathMtu::is_reply(number));
    }
}
