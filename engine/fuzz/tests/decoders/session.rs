//! The streams and datagrams of an established connection, from the hello to the services.
//!
//! An input is what a member does on its connection: records of four bytes and more.
//!
//! ```text
//! 0        1        2         4
//! | stream | action | length  | bytes ...
//! ```

mod script;
mod service;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_fuzz::{Seed, target};
use millrace_protocol::frame::{Header, Hello, Kind, Method, StreamKind};
use millrace_protocol::id::ConnectionNumber;
use millrace_shards::chunk::ChunkPool;
use millrace_shards::config::HugePages;
use millrace_testkit::ids::node_id;
use millrace_transport::driver::{BodyAllocator, Session, ShardState};
use millrace_transport::{Router, TransportConfig};

use crate::assert_label;
use crate::frames::headers;
use script::{DATAGRAM, FIN, REPEAT, REPEATS, RESET, Record, STOP, Scripted, WAIT, records};
use service::{BUSY, Heard, LIMITS, REFUSED, STREAMED, Taker, WHOLE};

const POOL_BYTES: u64 = 4 << 20;
/// What a shard reads of a lane at a time.
const SCRATCH_BYTES: usize = 64 << 10;

fn config() -> TransportConfig {
    TransportConfig {
        limits: LIMITS,
        streams_max: 16,
        ..TransportConfig::default()
    }
}

fn record(stream: u8, action: u8, bytes: &[u8]) -> Vec<u8> {
    let record = Record {
        stream,
        action,
        bytes,
    };
    record.encode()
}

/// The head of a message with a stream of its own.
fn head(stream: u8, kind: Kind, method: Method, body_bytes: usize) -> Vec<u8> {
    let header = Header {
        kind,
        method,
        body_bytes: body_bytes as u32,
        ..headers()[1].1
    };
    let bytes = [&[StreamKind::Message.encode()], &header.encode()[..]].concat();
    record(stream, 0, &bytes)
}

fn hello() -> Vec<u8> {
    let body = Hello::new(5, 2).encode();
    let mut bytes = vec![StreamKind::Lane.encode()];
    bytes.extend(headers()[0].1.encode());
    bytes.extend(body);
    record(0, 0, &bytes)
}

fn seeds() -> Vec<Seed> {
    let framed = |(_, header): (_, Header)| {
        let body_bytes = header.body_bytes.min(20);
        let header = Header {
            body_bytes,
            ..header
        };
        let mut bytes = header.encode().to_vec();
        bytes.resize(bytes.len() + body_bytes as usize, 0xbb);
        bytes
    };
    let lane: Vec<u8> = headers().into_iter().skip(1).flat_map(framed).collect();
    let datagrams = headers()
        .into_iter()
        .flat_map(|header| record(DATAGRAM, 0, &framed(header)));
    let with_hello = |rest: &[Vec<u8>]| [vec![hello()], rest.to_vec()].concat().concat();
    /// 32 of it are just over what is taken inline.
    const PIECE: [u8; 2_064] = [0xbb; 2_064];
    let large = |stream, kind, method| {
        let head = head(stream, kind, method, PIECE.len() * REPEATS);
        [head, record(stream, REPEAT | FIN, &PIECE)].concat()
    };
    let small = |stream, kind, method, bytes| {
        let head = head(stream, kind, method, bytes);
        [head, record(stream, FIN, &PIECE[..bytes])].concat()
    };
    let unfinished = || {
        let head = head(2, Kind::Request, STREAMED, 70_000);
        [head, record(2, 0, &PIECE)].concat()
    };
    vec![
        Seed::new("lane", with_hello(&[record(0, 0, &lane)])),
        Seed::new("datagrams", with_hello(&[datagrams.collect::<Vec<u8>>()])),
        Seed::new(
            "small",
            with_hello(&[
                small(1, Kind::Request, WHOLE, 100),
                small(2, Kind::Send, REFUSED, 0),
                small(3, Kind::Response, WHOLE, 50),
                small(4, Kind::Request, BUSY, 9),
                small(5, Kind::Request, Method(99), 9),
            ]),
        ),
        Seed::new(
            "large",
            with_hello(&[
                large(1, Kind::Request, WHOLE),
                large(2, Kind::Send, STREAMED),
                large(3, Kind::Request, REFUSED),
            ]),
        ),
        Seed::new(
            "stalled",
            with_hello(&[
                unfinished(),
                record(3, WAIT, &[StreamKind::Message.encode()]),
                record(2, WAIT, &[1]),
            ]),
        ),
        Seed::new(
            "taken-back",
            with_hello(&[
                unfinished(),
                record(2, RESET, &[]),
                record(3, STOP, &[StreamKind::Lane.encode()]),
            ]),
        ),
        Seed::refused("no-hello", record(0, FIN, &[StreamKind::Lane.encode()])),
    ]
}

thread_local! {
    /// Its pages are touched once for all inputs.
    static POOL: ChunkPool = ChunkPool::new(POOL_BYTES, HugePages::Never).unwrap();
}

target!(
    /// Protects a node from a member: whatever it does on its streams, its bodies stay within
    /// their limits, each sink is ended once, and nothing is held when the connection is gone.
    session, seeds, |bytes| POOL.with(|pool| run(bytes, pool).is_some())
);

/// What came of a connection, if its hello was read.
#[derive(Debug)]
struct Outcome {
    heard: Heard,
    /// What the node refused.
    reasons: Vec<&'static str>,
}

fn run(input: &[u8], pool: &ChunkPool) -> Option<Outcome> {
    let mut now = Instant::now();
    let state = ShardState::for_driver(config(), now);
    let heard = Rc::<RefCell<Heard>>::default();
    let service = Taker(Rc::clone(&heard));
    let mut router = Router::new().serve(WHOLE..=BUSY, service).unwrap();
    let mut bodies = BodyAllocator::new(state.config().receive_budget(), pool.clone());
    let mut path = Scripted::default();
    let mut scratch = vec![0; SCRATCH_BYTES];
    let peer = node_id(1);
    let mut session = Session::new(&state, 0, peer, true, &Hello::new(5, 1));
    for record in records(input) {
        path.arrive(&record);
        if session.negotiated().is_none() {
            match session.receive_hello(&mut path) {
                None => {}
                Some(Ok(negotiated)) => {
                    session.up(&path, ConnectionNumber(1), now);
                    router.on_up(peer, ConnectionNumber(1), &negotiated);
                }
                Some(Err(error)) => {
                    assert_label(error.reason());
                    break;
                }
            }
        }
        let received = session.receive(&mut path, &mut router, &mut scratch, &mut bodies, now);
        if let Some(fault) = received.fault {
            assert_label(fault);
            break;
        }
        bodies.settle();
        assert!(bodies.held_bytes(&peer) <= POOL_BYTES);
        if session.poll_transmit(&mut path).is_stopped {
            break;
        }
        if record.action & WAIT != 0 {
            now += Duration::from_secs(6);
            state.set_now(now);
            session.housekeep(&mut path);
            if session.on_timeout(&mut path, now).is_some() {
                break;
            }
        }
    }
    let is_up = session.negotiated().is_some();
    session.close(&mut router);
    drop(router);
    bodies.settle();
    assert_eq!(bodies.held_bytes(&peer), 0);
    assert_eq!(pool.free_bytes(), POOL_BYTES);
    let heard = heard.take();
    assert_eq!(
        heard.sinks,
        heard.cut + heard.streamed,
        "a sink was not ended once"
    );
    let reasons = state.counters().reasons();
    let reasons: Vec<_> = reasons.into_iter().map(|(_, reason, _)| reason).collect();
    reasons.iter().for_each(|reason| assert_label(reason));
    is_up.then_some(Outcome { heard, reasons })
}

/// Protects the target above from seeds that do not come to what they are for.
#[test]
fn seeds_reach_the_services_and_the_refusals() {
    #[rustfmt::skip]
    let cases: [(&str, u64, u64, u64, &[&str]); 6] = [
        // (seed, taken, streamed, cut, reasons)
        ("lane", 2, 0, 0, &[]),
        ("datagrams", 2, 0, 0, &[]),
        ("small", 3, 0, 0, &["unknown_method"]),
        ("large", 2, 1, 0, &["refused_by_service"]),
        ("stalled", 0, 0, 1, &["peer_stalled"]),
        ("taken-back", 0, 0, 1, &["peer_reset"]),
    ];
    for (name, taken, streamed, cut, wanted) in cases {
        let seed = seeds().into_iter().find(|seed| seed.name == name).unwrap();
        let Outcome { heard, reasons } = POOL.with(|pool| run(&seed.bytes, pool)).unwrap();
        let found = (heard.taken, heard.streamed, heard.cut);
        assert_eq!(
            found,
            (taken, streamed, cut),
            "{name}: {heard:?} {reasons:?}"
        );
        let has_all = wanted.iter().all(|reason| reasons.contains(reason));
        assert!(has_all, "{name}: {reasons:?}");
    }
}
