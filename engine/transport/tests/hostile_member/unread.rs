//! A member that fetches bodies and does not read them holds no more than its share of the pool,
//! and not for long. Meanwhile an honest peer puts and gets, and what it hears is true.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use millrace_protocol::frame::{FailureCode, Header, Kind, Method};
use millrace_protocol::rpc::RpcError;
use millrace_shards::chunk::Body;
use millrace_transport::{
    Answer, Defer, EdgeStart, Inbound, InboundBody, Payload, Router, Service, ShardMessenger,
};

use super::*;

/// Puts a body on the shelf.
const PUT: Method = Method(20);
/// Answers with the newest body on the shelf.
const NEWEST: Method = Method(21);
const METHODS: RangeInclusive<Method> = PUT..=NEWEST;

/// Bodies on the shelf, as in a store.
const SHELF: usize = 2;
const BODY_BYTES: u64 = MIB;
/// The receive budget; unread answers have half of it, and one peer alone half of that.
const BUDGET_BYTES: u64 = 8 * MIB;
const UNREAD_BYTES: u64 = BUDGET_BYTES / 2;
const UNREAD_PEER_BYTES: u64 = UNREAD_BYTES / 2;

type Shelf = Arc<Mutex<VecDeque<Body>>>;

fn put(shelf: &Shelf, body: Body) {
    let mut shelf = shelf.lock().unwrap();
    shelf.push_back(body);
    while shelf.len() > SHELF {
        shelf.pop_front().unwrap().uncharge();
    }
}

struct Library {
    shelf: Shelf,
}

impl Service for Library {
    fn on_request(&mut self, request: Inbound<'_>, _defer: Defer<'_>) -> Answer {
        match (request.method, request.body) {
            (PUT, InboundBody::Chunks(body)) => {
                put(&self.shelf, body);
                Answer::Reply(Payload::Empty)
            }
            (NEWEST, _) => {
                let newest = self.shelf.lock().unwrap().back().cloned();
                newest.map_or(Answer::Failure(FailureCode::NotFound), |body| {
                    Answer::Reply(body.into())
                })
            }
            (method, body) => panic!("method {} with {body:?}", method.0),
        }
    }

    fn on_send(&mut self, _message: Inbound<'_>) {}
}

/// A victim with a shelf, an honest member and a hostile one.
struct LibraryBed {
    hostile: SigningKey,
    honest: Node,
    victim: Node,
    shelf: Shelf,
    _alone: MutexGuard<'static, ()>,
}

impl LibraryBed {
    fn new(progress_interval: Duration) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut keys: Vec<_> = (1..=3).map(key).collect();
        keys.sort_by_key(SigningKey::node_id);
        let addrs: Vec<_> = keys.iter().map(|_| free_addr()).collect();
        let members = keys.iter().zip(&addrs);
        let topology = topology(members.map(|(key, addr)| member(key, *addr)), 1);
        let config = TransportConfig {
            receive_budget_bytes: BUDGET_BYTES,
            receive_budget_peer_bytes: BUDGET_BYTES / 2,
            stream_progress_interval: progress_interval,
            ..TransportConfig::default()
        };
        let shelf = Shelf::default();
        let of_services = Arc::clone(&shelf);
        let services = move |_messenger: ShardMessenger| {
            let shelf = Arc::clone(&of_services);
            Router::new().serve(METHODS, Library { shelf })
        };
        let shards = vec![shard_config(POOL_BYTES)];
        let edge = EdgeStart::default();
        let victim = keys.remove(2);
        let victim =
            Node::start_serving(victim, addrs[2], &topology, config, shards, edge, services);
        let config = TransportConfig::default();
        let honest = Node::start(keys.remove(1), addrs[1], &topology, config, POOL_BYTES);
        honest.wait_for_peers(&[victim.id()]);
        Self {
            hostile: keys.remove(0),
            honest,
            victim,
            shelf,
            _alone: alone,
        }
    }

    fn connect(&self, windows_bytes: [u64; 2]) -> Raw {
        let options = RawOptions {
            windows_bytes,
            ..RawOptions::of(&self.hostile)
        };
        let mut raw = Raw::dial(self.victim.transport.local_addr(), &options);
        raw.introduce();
        raw
    }

    /// Bytes of the victim's pool that are in use, beside the shelf.
    fn pinned_bytes(&self) -> u64 {
        let pool = self.victim.transport.pool(0).unwrap();
        let shelf = self.shelf.lock().unwrap();
        let shelf_bytes: u64 = shelf.iter().map(|body| body.len() as u64).sum();
        (pool.total_bytes() - pool.free_bytes()).saturating_sub(shelf_bytes)
    }

    fn cut(&self) -> u64 {
        self.victim.reason(Family::Failed, "answer_unread")
    }

    /// As the node itself does with a body of its own.
    fn publish(&self) {
        put(&self.shelf, self.victim.body(BODY_BYTES as usize));
    }

    /// The honest peer puts a body.
    fn honest_put(&self) -> Result<Payload, RpcError> {
        let body = self.honest.body(BODY_BYTES as usize);
        let put = request(PUT, Class::Bulk, body);
        let answer = self.honest.transport.request(self.victim.id(), put);
        answer.wait(PATIENCE)
    }

    fn honest_get(&self) -> Result<Payload, RpcError> {
        let get = request(NEWEST, Class::Bulk, Payload::Empty);
        let answer = self.honest.transport.request(self.victim.id(), get);
        answer.wait(PATIENCE)
    }

    fn check_honest(&self) {
        assert_eq!(self.honest_put().map(|answer| answer.len()), Ok(0));
        assert_eq!(self.honest_get().map(|body| body.len()), Ok(BODY_BYTES));
    }
}

/// Asks for the newest body.
fn ask(raw: &mut Raw, id: u32) {
    let header = Header {
        kind: Kind::Request,
        class: Class::Bulk,
        method: NEWEST,
        id,
        body_bytes: 0,
        arg: 60_000,
    };
    assert!(raw.send(Raw::LANE, &header.encode(), false));
    speak(raw);
}

/// Sends what is to be sent, and hears nothing.
fn speak(raw: &mut Raw) {
    for (packet, to) in raw.outgoing() {
        raw.send_datagram(&packet, to);
    }
}

/// Nothing is cut in a test that is not about that.
const NEVER: Duration = Duration::from_secs(3_600);
/// Less than a body: the rest waits until the test reads, which it does not.
const SMALL_WINDOWS: [u64; 2] = [16 << 10, 1 << 20];

// Protects the pool of a node whose bodies a member fetches and does not read, while the node drops
// them for newer ones: the member gets its share, and hears that there is no more now.
#[test]
fn a_member_that_does_not_read_holds_its_share_of_the_pool() {
    let bed = LibraryBed::new(NEVER);
    let mut raw = bed.connect(SMALL_WINDOWS);
    let share = UNREAD_PEER_BYTES / BODY_BYTES;
    let mut refused = 0;
    for id in 0..3 * POOL_BYTES / BODY_BYTES {
        bed.publish();
        ask(&mut raw, id as u32 + 1);
        if id >= share {
            let failure = raw.failure(PATIENCE).expect("the request is refused");
            assert_eq!(failure, (id as u32 + 1, FailureCode::Busy));
            refused += 1;
        }
        assert!(bed.pinned_bytes() <= UNREAD_PEER_BYTES + BODY_BYTES);
    }
    assert!(refused > 0 && bed.cut() == 0);
    bed.check_honest();
    assert_eq!(bed.victim.reason(Family::Rejected, "pool_exhausted"), 0);
}

// Protects a publisher from those that read its bodies: what the store has dropped, and they do not
// read, is not charged to it.
#[test]
fn a_publisher_does_not_pay_for_what_others_do_not_read() {
    let bed = LibraryBed::new(NEVER);
    let mut raw = bed.connect(SMALL_WINDOWS);
    for id in 1..=3 * BUDGET_BYTES / BODY_BYTES {
        bed.check_honest();
        ask(&mut raw, id as u32);
    }
    for reason in ["budget_peer_share", "budget_exhausted", "pool_exhausted"] {
        assert_eq!(bed.victim.reason(Family::Rejected, reason), 0, "{reason}");
    }
}

// Protects the pool in the long run: an answer that its peer does not read is cut, and the peer
// gets one at a time then. Its connection stays.
#[test]
fn an_answer_that_is_not_read_is_cut() {
    let bed = LibraryBed::new(Duration::from_millis(200));
    let mut raw = bed.connect(SMALL_WINDOWS);
    bed.publish();
    ask(&mut raw, 1);
    ask(&mut raw, 2);
    let mut failures = [1, 2].map(|_| raw.failure(PATIENCE).expect("it is cut"));
    failures.sort_unstable_by_key(|(id, _)| *id);
    let late = FailureCode::DeadlineExceeded;
    assert_eq!(failures, [(1, late), (2, late)]);
    assert_eq!(bed.cut(), 2);
    for _ in 0..SHELF {
        bed.publish();
    }
    assert_eq!(bed.pinned_bytes(), 0, "what was cut is free");
    ask(&mut raw, 3);
    ask(&mut raw, 4);
    assert_eq!(raw.failure(PATIENCE), Some((4, FailureCode::Busy)));
    assert_eq!(raw.failure(PATIENCE), Some((3, late)));
    assert!(raw.quic.is_established() && !raw.quic.is_closed());
    bed.check_honest();
}

// Protects the pool from a peer that lets a node send all of an answer, and acknowledges none of
// it.
#[test]
fn an_answer_that_is_not_acknowledged_is_cut() {
    let bed = LibraryBed::new(Duration::from_millis(200));
    let mut raw = bed.connect([4 << 20, 16 << 20]);
    let body = bed.victim.body(70_000);
    put(&bed.shelf, body);
    ask(&mut raw, 1);
    bed.victim.wait_for_count(Counter::SentBulk, 1);
    for _ in 0..SHELF {
        bed.publish();
    }
    let until = Instant::now() + PATIENCE;
    while bed.cut() == 0 {
        assert!(Instant::now() < until, "it is not cut");
        // Says that it lives, and hears nothing.
        raw.quic.send_ack_eliciting().ok();
        if raw.quic.timeout().is_some_and(|left| left.is_zero()) {
            raw.quic.on_timeout();
        }
        speak(&mut raw);
        std::thread::yield_now();
    }
    let until = Instant::now() + PATIENCE;
    while bed.pinned_bytes() > 0 {
        assert!(Instant::now() < until, "{} bytes", bed.pinned_bytes());
        std::thread::yield_now();
    }
    bed.check_honest();
}
