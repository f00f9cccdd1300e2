//! What waits and flows, its bounds, and what is cut.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::Method;
use millrace_protocol::id::NodeId;
use millrace_protocol::unread::UnreadAnswers;
use millrace_shards::chunk::{Body, ChunkPool, taken_bytes};
use millrace_shards::config::HugePages;
use proptest::prelude::*;

use super::*;
use crate::queue_account::QueueAccount;
use crate::room::Room;
use crate::unread::SharedUnread;

const PLAIN_BYTES: u64 = 1_000;
/// What answers must bring in an interval.
const PROGRESS_BYTES: u64 = 64 << 10;
const INTERVAL: Duration = Duration::from_secs(5);
/// Six intervals.
const TERMS: Terms = Terms {
    progress_bytes: PROGRESS_BYTES,
    patience: Duration::from_secs(30),
};
/// The first streams of messages.
const FIRST: u64 = 2;
const SECOND: u64 = 6;

fn message(kind: Kind, id: u32, body: Payload) -> Outgoing {
    let header = Header {
        kind,
        class: Class::Bulk,
        method: Method(0),
        id,
        body_bytes: body.len() as u32,
        arg: 0,
    };
    Outgoing::new(header, body)
}

fn body(pool: &ChunkPool, len: usize) -> Payload {
    Payload::Chunks(Body::copy_from_slice(pool, &vec![0; len]).unwrap())
}

/// The carrier of a connection, its path, and a clock.
struct Testbed {
    carrier: StreamCarrier,
    unread: SharedUnread,
    path: Room,
    now: Instant,
}

impl Testbed {
    fn new(unread_bytes: u64, active_max: usize) -> Self {
        let messages = PerClass {
            latency: 100,
            normal: 100,
            bulk: 100,
        };
        let account = Rc::new(QueueAccount::new(1 << 20));
        let unread = Rc::new(RefCell::new(UnreadAnswers::new(unread_bytes)));
        let answers = Answers::new(peer(), PLAIN_BYTES, &account, &unread);
        Self {
            carrier: StreamCarrier::new(FIRST, messages, answers, active_max),
            unread,
            path: Room::of(0),
            now: Instant::now(),
        }
    }

    /// With answers of this length, which have begun to be fed.
    fn answering(pool: &ChunkPool, count: u32, len: usize) -> Self {
        let mut bed = Self::new(64 << 20, 2);
        for id in 1..=count {
            let answer = message(Kind::Response, id, body(pool, len));
            bed.carrier.enqueue(answer).unwrap();
        }
        bed.take(0);
        bed
    }

    /// The path takes so many bytes.
    fn take(&mut self, bytes: usize) {
        self.path.bytes = bytes;
        self.carrier.poll_transmit(&mut self.path);
    }

    /// An interval passes; the ids of the answers that are cut, unless none is left to judge.
    fn judge(&mut self) -> Option<Vec<u32>> {
        self.now += INTERVAL;
        let cut = self
            .carrier
            .cut_unread(&mut self.path, 0, &TERMS, self.now)?;
        Some(cut.iter().map(|header| header.id).collect())
    }

    fn held_bytes(&self) -> u64 {
        self.unread.borrow().held_bytes(&peer())
    }
}

fn peer() -> NodeId {
    NodeId::from_bytes([1; 29])
}

// Protects the pool and the memory of the node from a peer that asks and does not take: where
// an answer lies decides which bound it counts against.
#[test]
fn answers_have_bounds_of_bytes_and_requests_have_not() {
    let mut bed = Testbed::new(200_000, 8);
    let pool = ChunkPool::new(16 << 20, HugePages::Never).unwrap();
    let mut send = |kind, body| bed.carrier.enqueue(message(kind, 0, body)).is_ok();
    let chunks = |len| body(&pool, len);
    let plain = |len: usize| Payload::from(vec![0; len]);
    for body in [plain(2_000), chunks(400_000)] {
        for kind in [Kind::Request, Kind::Send] {
            assert!(send(kind, body.clone()) && send(kind, body.clone()));
        }
    }
    // Up to the bound; the first one in chunks, however long.
    assert!(!send(Kind::Response, plain(1_001)));
    assert!(send(Kind::Response, plain(600)));
    assert!(!send(Kind::Response, plain(401)));
    assert!(send(Kind::Response, plain(400)));
    assert!(!send(Kind::Response, plain(1)));
    assert!(send(Kind::Response, chunks(400_000)));
    assert!(!send(Kind::Response, chunks(70_000)));
    assert!(send(Kind::Response, Payload::Empty));
}

// Protects the pool from answers that a peer does not read, and answers on a slow path from being
// cut: they may take as long as they take while they come forward.
#[test]
fn an_answer_is_cut_when_neither_it_nor_what_goes_before_it_comes_forward() {
    let pool = ChunkPool::new(16 << 20, HugePages::Never).unwrap();
    let mut bed = Testbed::answering(&pool, 3, 1 << 20);
    assert_eq!(bed.judge(), Some(vec![]), "an interval has not passed");
    // All of it goes to the first one; the others wait for it.
    for _ in 0..12 {
        bed.take(PROGRESS_BYTES as usize);
        assert_eq!(bed.judge(), Some(vec![]));
    }
    bed.take(PROGRESS_BYTES as usize - 1);
    assert_eq!(bed.judge(), Some(vec![1, 2]));
    assert_eq!(bed.path.resets, [FIRST, SECOND]);
    assert_eq!(bed.held_bytes(), 1 << 20, "the third");
    bed.take(0);
    assert_eq!(bed.judge(), Some(vec![]));
    assert_eq!(bed.judge(), Some(vec![3]));
    assert_eq!((bed.held_bytes(), bed.judge()), (0, None));
}

// Protects the pool from a peer that acknowledges none of an answer, or all but a part: the path
// has taken it, and holds it until the peer has acknowledged it.
#[test]
fn an_answer_that_is_sent_is_cut_when_it_is_not_acknowledged() {
    let pool = ChunkPool::new(16 << 20, HugePages::Never).unwrap();
    // Three slices each.
    let len = 700_000;
    let mut bed = Testbed::answering(&pool, 2, len);
    bed.take(4 << 20);
    assert_eq!(bed.judge(), Some(vec![]), "taken just now");
    // What opens the stream, and a slice.
    bed.path.acknowledge(FIRST);
    bed.path.acknowledge(FIRST);
    assert_eq!(bed.judge(), Some(vec![]));
    bed.path.acknowledge(FIRST);
    bed.path.acknowledge(FIRST);
    assert_eq!(bed.held_bytes(), taken_bytes(len as u64), "the second");
    assert_eq!(bed.judge(), Some(vec![]), "what went before it was read");
    assert_eq!(bed.judge(), Some(vec![2]));
    assert_eq!(bed.path.resets, [SECOND]);
    assert_eq!((bed.held_bytes(), bed.judge()), (0, None));
}

// Protects the pool from a peer that lets no stream be opened, and an answer that waits while the
// path is broken for a moment.
#[test]
fn answers_without_a_stream_are_cut_after_the_patience() {
    let pool = ChunkPool::new(16 << 20, HugePages::Never).unwrap();
    let mut bed = Testbed::new(64 << 20, 2);
    bed.path.streams = 0;
    let plain = Payload::from(vec![0; 100]);
    for (id, body) in [(1, body(&pool, 1 << 20)), (2, plain)] {
        let answer = message(Kind::Response, id, body);
        bed.carrier.enqueue(answer).unwrap();
    }
    let request = message(Kind::Request, 3, body(&pool, 1 << 20));
    bed.carrier.enqueue(request).unwrap();
    bed.take(1 << 20);
    for _ in 0..6 {
        assert_eq!(bed.judge(), Some(vec![]));
    }
    assert_eq!(bed.judge(), Some(vec![1, 2]));
    assert_eq!((bed.held_bytes(), bed.judge()), (0, None));
    assert!(!bed.carrier.is_idle(), "a request has another judge");
}

#[derive(Clone, Debug)]
enum Step {
    Answer(usize),
    Take(usize),
    Acknowledge(usize),
    Withdraw(u32),
    Judge,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (70_000usize..400_000).prop_map(Step::Answer),
        4 => (0usize..300_000).prop_map(Step::Take),
        4 => (0usize..10).prop_map(Step::Acknowledge),
        1 => (0u32..20).prop_map(Step::Withdraw),
        2 => Just(Step::Judge),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is taken, acknowledged, taken back and cut in whatever order: what counts as unread
    /// is what the carrier or the path holds, within the bound.
    #[test]
    fn what_counts_as_unread_is_what_is_held(steps in proptest::collection::vec(any_step(), 1..80)) {
        const UNREAD_BYTES: u64 = 2 << 20;
        let pool = ChunkPool::new(64 << 20, HugePages::Never).unwrap();
        let mut bed = Testbed::new(UNREAD_BYTES, 2);
        for (id, step) in (0..).zip(steps) {
            match step {
                Step::Answer(len) => {
                    let answer = message(Kind::Response, id, body(&pool, len));
                    let _ = bed.carrier.enqueue(answer);
                }
                Step::Take(bytes) => bed.take(bytes),
                Step::Acknowledge(at) => {
                    let held = bed.path.holding();
                    if !held.is_empty() {
                        bed.path.acknowledge(held[at % held.len()]);
                    }
                }
                Step::Withdraw(id) => bed.carrier.cancel_answers(&mut bed.path, &[id]),
                Step::Judge => {
                    bed.judge();
                }
            }
            // Bodies are one each here, and nothing else holds them.
            let in_pool = pool.total_bytes() - pool.free_bytes();
            prop_assert!(bed.held_bytes() <= UNREAD_BYTES);
            prop_assert!(in_pool >= bed.held_bytes(), "{in_pool}");
        }
        bed.carrier.clear();
        for stream in bed.path.holding() {
            bed.path.stream_reset(stream, 0);
        }
        prop_assert_eq!(bed.held_bytes(), 0);
        prop_assert_eq!(pool.free_bytes(), pool.total_bytes());
    }
}
