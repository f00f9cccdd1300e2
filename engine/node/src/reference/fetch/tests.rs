//! Who is asked, for how long, and what a fetch says when no peer gives the artifact.

use millrace_protocol::score::AskOrder;
use millrace_shards::chunk::UNIT_BYTES;

use super::super::candidates::WAVE;
use super::super::network::fake::{BODY, Fake, Script, failure, id, peer, run};
use super::*;

const LACKS: RpcError = RpcError::Peer(FailureCode::NotFound);
const TIMEOUT: FetchError = FetchError::Unavailable {
    last: RpcError::Timeout,
};

struct Testbed {
    fake: Fake,
    candidates: Candidates,
    store: Arc<Store>,
}

impl Testbed {
    fn new(scripts: impl IntoIterator<Item = Script>) -> Self {
        Self {
            fake: Fake::new(scripts),
            candidates: Candidates::new(1),
            store: Arc::new(Store::new(UNIT_BYTES as u64)),
        }
    }

    /// What a fetch gives, and the milliseconds that it takes.
    fn fetch(&self) -> (Result<Vec<u8>, FetchError>, u64) {
        let fetch = Fetch {
            network: &self.fake,
            candidates: &self.candidates,
            store: &self.store,
            peers: self.fake.peers(),
            id: id(),
            body_bytes_max: 1 << 20,
        };
        let (fetched, ms) = run(fetch.run());
        let bytes = |body: Body| {
            body.chunks()
                .iter()
                .flat_map(|chunk| chunk.to_vec())
                .collect()
        };
        (fetched.map(bytes), ms)
    }

    /// Fetches the artifact; the milliseconds that it takes.
    fn fetched(&self) -> u64 {
        let (fetched, ms) = self.fetch();
        assert_eq!(fetched.as_deref(), Ok(BODY));
        ms
    }

    /// The peer's turn comes before that of peers of which nothing is known.
    fn prefer(&self, n: u8) {
        self.note(n, Outcome::Served);
    }

    fn note(&self, n: u8, outcome: Outcome) {
        self.candidates.note(peer(n), outcome, Instant::now());
    }

    fn ask_order(&self, n: u8) -> AskOrder {
        self.candidates.ask_order(&peer(n), Instant::now())
    }

    fn asked_for_body(&self, n: u8) -> usize {
        self.fake.asked(n, wire::GET)
    }
}

/// Says that it holds the artifact after so long, and sends nothing of it.
fn claims(ms: u64) -> Script {
    Script {
        look_up: (ms, Ok(wire::encode_length(BODY.len() as u64))),
        ..Script::silent()
    }
}

fn holds(ms: u64) -> Script {
    Script {
        get: (ms, Ok(BODY.to_vec())),
        ..claims(ms)
    }
}

fn fails(error: RpcError) -> Script {
    Script {
        look_up: (1, Err(error)),
        ..Script::silent()
    }
}

/// Says that it holds the artifact, and answers this.
fn answers(answer: Result<Vec<u8>, RpcError>) -> Script {
    Script {
        get: (1, answer),
        ..claims(1)
    }
}

// Protects a node that fetches from a member that answers nothing: it costs two round trips, and
// soon nothing, because it is asked last.
#[test]
fn a_silent_peer_holds_up_no_artifact_that_another_one_has() {
    let testbed = Testbed::new([Script::silent(), holds(5)]);
    for _ in 0..3 {
        let ms = testbed.fetched();
        assert!((90..150).contains(&ms), "{ms}");
    }
    assert_eq!(testbed.ask_order(0), AskOrder::Last);
    assert!(testbed.fetched() < 20);
    assert_eq!(testbed.fake.asked(0, wire::LOOK_UP), 3);
}

// Protects a node that fetches what no peer has: a silent member costs the time of a small question
// once. It did not say that it lacks the artifact.
#[test]
fn a_silent_peer_holds_up_what_no_peer_has_once() {
    let testbed = Testbed::new([Script::silent(), fails(LACKS)]);
    let (fetched, ms) = testbed.fetch();
    assert_eq!(fetched, Err(TIMEOUT));
    assert!((2_050..2_200).contains(&ms), "{ms}");
    assert_eq!(testbed.ask_order(0), AskOrder::Last);
    let (fetched, ms) = testbed.fetch();
    assert_eq!(fetched, Err(TIMEOUT));
    assert!(ms < 150, "{ms}");
}

// Protects a node that fetches from a member that says that it holds everything: it is left for the
// next one after two round trips in which nothing came.
#[test]
fn a_holder_that_sends_nothing_is_left_for_another_one() {
    let testbed = Testbed::new([claims(1), holds(5)]);
    testbed.prefer(0);
    let ms = testbed.fetched();
    assert_eq!(testbed.asked_for_body(0), 1);
    assert!((90..150).contains(&ms), "{ms}");
    assert_eq!(testbed.candidates.outcomes()["slow"], 1);

    // Alone, it has more time, and is asked last after that.
    let testbed = Testbed::new([claims(1)]);
    let (fetched, ms) = testbed.fetch();
    assert_eq!(fetched, Err(TIMEOUT));
    assert!((4_950..5_150).contains(&ms), "{ms}");
    assert_eq!(testbed.ask_order(0), AskOrder::Last);
}

// Protects an artifact whose holders are slow: those that were left are asked again.
#[test]
fn a_holder_that_is_late_gives_the_artifact_when_no_other_one_does() {
    let late = Script {
        get: (1_000, Ok(BODY.to_vec())),
        ..claims(1)
    };
    let testbed = Testbed::new([late, claims(150), fails(LACKS)]);
    let ms = testbed.fetched();
    assert!((1_050..1_300).contains(&ms), "{ms}");
    // One that is asked last is waited for as long, where there is no other.
    let testbed = Testbed::new([holds(500)]);
    testbed.note(0, Outcome::Stalled);
    testbed.fetched();
    // Where there is, it has four round trips: a packet may be lost.
    let far = Script {
        rtt: Duration::from_millis(600),
        ..holds(2_000)
    };
    let testbed = Testbed::new([far, fails(LACKS)]);
    testbed.note(0, Outcome::Stalled);
    testbed.fetched();
}

// Protects the nearest peer from the requests of all, and the choice by scores from the round trip:
// the first to answer is not the one that is asked for the body.
#[test]
fn the_holder_whose_turn_it_is_sends_and_not_the_nearest() {
    let testbed = Testbed::new([holds(1), holds(60)]);
    testbed.prefer(1);
    testbed.fetched();
    assert_eq!([0, 1].map(|n| testbed.asked_for_body(n)), [0, 1]);
}

// Protects a node that fetches from a member that sends other bytes: it is banned, and not asked
// while it is; and it did not say that it lacks the artifact.
#[test]
fn a_peer_that_sends_other_bytes_is_left_and_banned() {
    let testbed = Testbed::new([answers(Ok(b"other".to_vec())), holds(5)]);
    testbed.prefer(0);
    testbed.fetched();
    assert_eq!(testbed.asked_for_body(0), 1);
    assert_eq!(testbed.candidates.outcomes()["invalid"], 1);

    let testbed = Testbed::new([answers(Ok(b"other".to_vec())), fails(LACKS)]);
    let last = RpcError::PeerProtocol;
    for _ in 0..3 {
        assert_eq!(testbed.fetch().0, Err(FetchError::Unavailable { last }));
    }
    assert_eq!(testbed.ask_order(0), AskOrder::Banned);
    assert_eq!(testbed.fetch().0, Err(FetchError::NotFound { asked: 1 }));
    assert_eq!(testbed.asked_for_body(0), 3);
}

// Protects an artifact that one of many has: all are asked, some at a time, and those that were not
// needed as holders at first are still there when others fail.
#[test]
fn every_peer_is_asked_until_one_gives_the_artifact() {
    let lacking = || (0..20).map(|_| fails(LACKS));
    let testbed = Testbed::new(lacking());
    assert_eq!(testbed.fetch().0, Err(FetchError::NotFound { asked: 20 }));
    for n in 0..20 {
        assert_eq!(testbed.fake.asked(n, wire::LOOK_UP), 1, "{n}");
    }
    Testbed::new(lacking().chain([holds(5)])).fetched();

    let busy = || answers(Err(failure(FailureCode::Busy)));
    let testbed = Testbed::new([busy(), busy(), holds(50)]);
    [0, 1].into_iter().for_each(|n| testbed.prefer(n));
    testbed.fetched();
    assert_eq!([0, 1, 2].map(|n| testbed.asked_for_body(n)), [1, 1, 1]);
}

// Protects a node that fetches from many silent members: each wave has its two round trips.
#[test]
fn many_silent_peers_do_not_add_up() {
    let silent = (0..60).map(|_| Script::silent());
    let testbed = Testbed::new(silent.chain([holds(5)]));
    let waves = 61_u64.div_ceil(WAVE as u64);
    assert!(testbed.fetched() < waves * 100 + 50);

    let silent = (0..60).map(|_| Script::silent());
    let testbed = Testbed::new(silent.chain([fails(LACKS)]));
    let (fetched, ms) = testbed.fetch();
    assert_eq!(fetched, Err(TIMEOUT));
    assert!(ms < waves * 100 + 2_100, "{ms}");
    assert_eq!(testbed.ask_order(7), AskOrder::Last);
    let (fetched, ms) = testbed.fetch();
    assert_eq!(fetched, Err(TIMEOUT));
    assert!(ms < waves * 100 + 50, "{ms}");
}

// Protects a subnet while its nodes are replaced one after the other.
#[test]
fn a_peer_that_does_not_know_the_question_is_asked_for_the_body() {
    let before = |get| Script {
        get: (1, get),
        ..fails(failure(FailureCode::UnknownMethod))
    };
    Testbed::new([before(Err(LACKS)), before(Ok(BODY.to_vec()))]).fetched();
    let testbed = Testbed::new([before(Err(LACKS)), fails(LACKS)]);
    assert_eq!(testbed.fetch().0, Err(FetchError::NotFound { asked: 2 }));
}

// Protects the node from a peer's word on the length, and from an answer that is none.
#[test]
fn a_length_is_the_word_of_a_peer() {
    let lies = Script {
        look_up: (1, Ok(wire::encode_length(u64::MAX))),
        ..holds(1)
    };
    Testbed::new([lies]).fetched();
    let malformed = Script {
        look_up: (1, Ok(vec![0; 7])),
        ..holds(1)
    };
    let testbed = Testbed::new([malformed]);
    let last = RpcError::PeerProtocol;
    assert_eq!(testbed.fetch().0, Err(FetchError::Unavailable { last }));
    assert_eq!(testbed.candidates.outcomes()["failed"], 1);
}

// Protects a fetch from what this node holds of the same peer.
#[test]
fn what_is_held_of_a_peer_makes_room_for_its_answer() {
    let testbed = Testbed::new([answers(Err(RpcError::LocalNoBudget))]);
    let pool = testbed.fake.pool_with_room().unwrap();
    let body = Body::copy_from_slice(pool, b"before").unwrap();
    let before = ArtifactId::from_bytes([1; 32]);
    testbed.store.insert(Some(peer(0)), before, body).unwrap();
    let last = RpcError::LocalNoBudget;
    assert_eq!(testbed.fetch().0, Err(FetchError::Unavailable { last }));
    assert_eq!(testbed.asked_for_body(0), 2);
    assert!(!testbed.store.contains(&before));
    assert_eq!(
        testbed.ask_order(0),
        AskOrder::Usual,
        "no fault of the peer"
    );
}

/// Protects an operator from the word that an artifact is nowhere while a peer is only busy.
#[test]
fn not_found_is_what_every_peer_said() {
    let busy = RpcError::Peer(FailureCode::Busy);
    let lost = RpcError::ConnectionLost;
    let of = |failures: &[RpcError]| FetchError::of(failures.len(), failures);
    assert_eq!(of(&[]), FetchError::NotFound { asked: 0 });
    assert_eq!(of(&[LACKS, LACKS]), FetchError::NotFound { asked: 2 });
    assert_eq!(of(&[lost, LACKS]), FetchError::Unavailable { last: lost });
    let some_busy = of(&[LACKS, busy, lost]);
    assert_eq!(some_busy, FetchError::Unavailable { last: busy });
    assert!(some_busy.is_for_now() && !of(&[lost]).is_for_now());
}
