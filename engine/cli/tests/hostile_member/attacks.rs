//! What members do to the memory of a victim.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use millrace_edge_policy::cid::initial_dcid;
use millrace_node::reference::wire;
use millrace_node::{Class, FailureCode, Method, SigningKey};
use millrace_protocol::flood::Flood;
use millrace_protocol::frame::{Header, Kind, LaneParser, Limits, StreamKind};
use millrace_testkit::cpu_share;
use millrace_transport::CloseCode;
use millrace_transport::counters::Family;
use ring::digest::{SHA256, digest};

use crate::attacker::header;
use crate::common::PATIENCE;
use crate::packets::Fragments;
use crate::raw::{Raw, RawOptions};
use crate::testbed::{Victim, reason_sample, sample};

/// Attacks of a member until it is refused.
const ATTACKS_MAX: u32 = 7;

/// How long an attack may go on before the victim has seen through it.
pub const ATTACK_TIME_MAX: Duration = Duration::from_secs(120);

/// Packets that a client sends before it hears of the first: as a node's over a short path.
pub const WINDOW_PACKETS: usize = 128;

/// Members and their victim.
pub struct Attack<'a> {
    pub victim: &'a Victim,
    pub members: &'a [SigningKey],
}

impl Attack<'_> {
    /// A connection of a member, whose QUIC sends so many packets before it hears of the first.
    pub fn connect(&self, member: usize, window_packets: usize) -> Raw {
        let mut raw = self.dial(member, window_packets);
        raw.introduce();
        raw
    }

    /// As [`Self::connect`], not yet established.
    pub fn dial(&self, member: usize, window_packets: usize) -> Raw {
        // Two connections must not begin with the same ID.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut random = [9; 15];
        random[..8].copy_from_slice(&number.to_le_bytes());
        let key = &self.members[member];
        let options = RawOptions {
            window_packets,
            ..RawOptions::of(key)
        };
        let id = initial_dcid(key.node_id().spread(), random);
        Raw::dial_from("127.0.0.1:0", self.victim.address, &options, &id)
    }

    /// Attacks until the member's next connection is refused. The first penalty is a second, and
    /// each further one twice as long: a slow host dials in time in the end.
    pub fn until_refused(&self, member: usize, mut attack_once: impl FnMut()) {
        for _ in 0..ATTACKS_MAX {
            attack_once();
            let mut again = self.dial(member, WINDOW_PACKETS);
            // A node that takes the connection says hello.
            again.drive(PATIENCE, |quic| {
                quic.peer_error().is_some() || quic.readable().next().is_some()
            });
            if let Some(error) = again.quic.peer_error() {
                assert_eq!(error.error_code, CloseCode::Flood as u64, "{error:?}");
                return;
            }
        }
        panic!("the member is never refused");
    }
}

/// How often an attacker looks at the victim's metrics: each page takes time of the victim's.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The victim's metrics as of the last look.
struct Look<'a> {
    victim: &'a Victim,
    looked: Option<Instant>,
    page: String,
}

impl<'a> Look<'a> {
    fn at(victim: &'a Victim) -> Self {
        Self {
            victim,
            looked: None,
            page: String::new(),
        }
    }

    /// Looks again, if that is due.
    fn refresh(&mut self) {
        cpu_share::pace();
        if self.looked.is_none_or(|at| at.elapsed() >= LOOK_INTERVAL) {
            self.page = self.victim.node.get("/metrics").1;
            self.looked = Some(Instant::now());
        }
    }

    fn reason(&self, family: Family, reason: &str) -> u64 {
        sample(&self.page, &reason_sample(family, reason))
    }
}

/// Packets of a member before it is the next one's turn.
const PACKETS_IN_A_TURN: usize = 40;
/// Streams with a gap.
const FRAGMENT_STREAMS: u64 = 900;

/// Single bytes with a gap before them, 200 in a packet: they are worth little more than nothing to
/// the member, and 29 KiB to the victim.
pub fn single_bytes(attack: &Attack<'_>) {
    attack.until_refused(0, || {
        send_single_bytes(attack, usize::MAX, "excessive_load");
    });
}

/// As [`single_bytes`], but each in a packet of its own.
pub fn single_bytes_alone(attack: &Attack<'_>) {
    attack.until_refused(0, || send_single_bytes(attack, 1, Flood::Packets.reason()));
}

fn send_single_bytes(attack: &Attack<'_>, in_a_packet: usize, reason: &str) {
    let before = attack.victim.reason(Family::Closed, reason);
    let mut look = Look::at(attack.victim);
    let raw = attack.connect(0, WINDOW_PACKETS);
    let mut fragments = Fragments::new(&raw, FRAGMENT_STREAMS, 1, in_a_packet);
    let until = Instant::now() + ATTACK_TIME_MAX;
    while look.reason(Family::Closed, reason) <= before {
        look.refresh();
        assert!(Instant::now() < until, "{reason}: it is borne");
        for _ in 0..PACKETS_IN_A_TURN {
            raw.send_datagram(&fragments.packet(), attack.victim.address);
        }
    }
}

/// Pieces with a gap before them, of which the packets pay for all that the victim holds, and as
/// many as flow control allows: until both shards have ended a connection, because all of them hold
/// too much together.
pub fn pieces(attack: &Attack<'_>) {
    /// A block of quiche for each takes a third of the memory.
    const PIECE_BYTES: usize = 400;
    /// Of the connection's window of 32 MiB.
    const SENT_BYTES_MAX: u64 = 31 << 20;
    /// What may be on the way: no more than the buffers of the victim's sockets hold.
    const BEHIND_BYTES_MAX: u64 = 8 << 20;
    let mut look = Look::at(attack.victim);
    let connect = |member| {
        let raw = attack.connect(member, WINDOW_PACKETS);
        let fragments = Fragments::new(&raw, FRAGMENT_STREAMS, PIECE_BYTES, usize::MAX);
        (raw, fragments)
    };
    let members = 0..attack.members.len();
    let mut connections: Vec<_> = members.map(connect).collect();
    let until = Instant::now() + ATTACK_TIME_MAX;
    loop {
        look.refresh();
        let ended = look.reason(Family::Closed, "excessive_load");
        if ended >= 2 {
            return;
        }
        assert!(Instant::now() < until, "{ended} ended");
        let sent = connections.iter().map(|(_, of)| of.sent_bytes).sum::<u64>();
        let held = sample(&look.page, "millrace_transport_quic_heap_bytes");
        // Before the first end: the victim is behind.
        if ended == 0 && sent > held + BEHIND_BYTES_MAX {
            std::thread::sleep(LOOK_INTERVAL / 2);
        }
        for (raw, fragments) in &mut connections {
            for _ in 0..PACKETS_IN_A_TURN {
                if fragments.sent_bytes < SENT_BYTES_MAX {
                    raw.send_datagram(&fragments.packet(), attack.victim.address);
                }
            }
        }
    }
}

/// A connection of a member that asks, and reads the answers on lanes.
struct Asker {
    raw: Raw,
    next_stream: u64,
    next_id: u32,
    /// The node's lanes: whether their first byte was read, and what follows it.
    lanes: BTreeMap<u64, (bool, LaneParser)>,
    /// Requests that were answered, or refused.
    answered: BTreeSet<u32>,
    refused: BTreeMap<u32, FailureCode>,
}

/// The streams of a server that are its lanes (RFC 9000, 2.1): one of the latency class and four.
const SERVER_LANES: [u64; 5] = [3, 7, 11, 15, 19];

impl Asker {
    fn new(mut raw: Raw) -> Self {
        let stream = Raw::stream(0);
        assert!(raw.send(stream, &[StreamKind::Lane.encode()], false));
        Self {
            raw,
            next_stream: 1,
            next_id: 0,
            lanes: BTreeMap::new(),
            answered: BTreeSet::new(),
            refused: BTreeMap::new(),
        }
    }

    fn header(&mut self, class: Class, method: Method, body_bytes: usize) -> Header {
        self.next_id += 1;
        Header {
            class,
            ..header(Kind::Request, method, self.next_id, body_bytes as u32)
        }
    }

    /// A small request, on a lane; its id.
    fn ask(&mut self, method: Method, body: &[u8]) -> u32 {
        let header = self.header(Class::Normal, method, body.len());
        let frame = [&header.encode()[..], body].concat();
        self.send(Raw::stream(0), &frame, false);
        header.id
    }

    /// A request on a stream of its own, of which no more than `sent` bytes come; its id.
    fn ask_long(&mut self, class: Class, method: Method, body: &[u8], sent: usize) -> u32 {
        let header = self.header(class, method, body.len());
        let stream = Raw::stream(self.next_stream);
        self.next_stream += 1;
        let kind = [StreamKind::Message.encode()];
        let bytes = [&kind[..], &header.encode(), &body[..sent]].concat();
        self.send(stream, &bytes, sent == body.len());
        header.id
    }

    fn send(&mut self, stream: u64, bytes: &[u8], fin: bool) {
        let mut sent = 0;
        let until = Instant::now() + PATIENCE;
        while sent < bytes.len() {
            assert!(Instant::now() < until, "the victim takes no more");
            let error = self.raw.quic.peer_error();
            assert!(error.is_none(), "{error:?}");
            match self.raw.quic.stream_send(stream, &bytes[sent..], fin) {
                Ok(taken) => sent += taken,
                Err(quiche::Error::Done) => {}
                Err(error) => panic!("stream {stream}: {error}"),
            }
            if sent < bytes.len() {
                self.turn();
            }
        }
    }

    fn turn(&mut self) {
        cpu_share::pace();
        self.raw.turn();
        let mut bytes = [0; 4_096];
        for stream in SERVER_LANES {
            while let Ok((read, _)) = self.raw.quic.stream_recv(stream, &mut bytes) {
                let new = || (false, LaneParser::new(Limits::default()));
                let (is_open, parser) = self.lanes.entry(stream).or_insert_with(new);
                let skipped = usize::from(!std::mem::replace(is_open, true));
                let (answered, refused) = (&mut self.answered, &mut self.refused);
                let mut on_frame = |header: Header, _: &[u8]| match header.kind {
                    Kind::Response => {
                        answered.insert(header.id);
                    }
                    Kind::Failure => {
                        refused.insert(header.id, FailureCode::from_arg(header.arg));
                    }
                    _ => {}
                };
                parser.push(&bytes[skipped..read], &mut on_frame).unwrap();
            }
        }
    }

    /// Whether the victim answered, and did not refuse.
    fn is_answered(&mut self, id: u32) -> Result<(), FailureCode> {
        let until = Instant::now() + PATIENCE;
        while !self.answered.contains(&id) {
            if let Some(code) = self.refused.get(&id) {
                return Err(*code);
            }
            assert!(Instant::now() < until, "request {id} is not answered");
            self.turn();
        }
        Ok(())
    }

    fn announce(&mut self, bytes: &[u8]) -> u32 {
        let id = digest(&SHA256, bytes);
        let length = bytes.len() as u64;
        self.ask(
            wire::ANNOUNCE,
            &[id.as_ref(), &length.to_le_bytes()].concat(),
        )
    }

    /// Announces an artifact and sends it.
    fn put(&mut self, bytes: &[u8]) -> Result<(), FailureCode> {
        let announced = self.announce(bytes);
        self.is_answered(announced)?;
        let put = self.ask_long(Class::Bulk, wire::PUT, bytes, bytes.len());
        self.is_answered(put)
    }
}

/// Body of an artifact of a member.
const PUT_BYTES: usize = 4 << 20;
/// The victim's store at its default, in such bodies.
const STORE_BODIES: u64 = 64;

/// Another artifact for each number.
fn artifact(number: u64) -> Vec<u8> {
    let mut bytes = vec![7; PUT_BYTES];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// Artifacts without end, until the store has dropped a quarter of its size: those of the same
/// member.
pub fn puts(attack: &Attack<'_>) {
    let mut asker = Asker::new(attack.connect(0, WINDOW_PACKETS));
    let publisher = attack.members[0].node_id();
    let dropped = format!("millrace_artifacts_dropped_total{{publisher=\"{publisher}\"}}");
    let mut number = 0;
    while attack.victim.metric(&dropped) < STORE_BODIES / 4 {
        assert!(number < 2 * STORE_BODIES, "nothing is dropped");
        let put = asker.put(&artifact(number));
        assert!(put.is_ok(), "{put:?}");
        number += 1;
    }
}

/// Bodies up to 64 KiB on all streams, of which the last bytes do not come: until they are cut.
pub fn unfinished_bodies(attack: &Attack<'_>) {
    const BYTES: usize = 64 << 10;
    let body = vec![7; BYTES];
    let members = 0..attack.members.len();
    let connect = |member| Asker::new(attack.connect(member, WINDOW_PACKETS));
    let mut askers: Vec<_> = members.map(connect).collect();
    for asker in &mut askers {
        while asker.raw.quic.peer_streams_left_uni() > 0 {
            asker.ask_long(Class::Normal, wire::PUT, &body, UNFINISHED_BYTES);
        }
    }
    let until = Instant::now() + ATTACK_TIME_MAX;
    let mut look = Look::at(attack.victim);
    while look.reason(Family::Rejected, "peer_stalled") == 0 {
        look.refresh();
        assert!(Instant::now() < until, "none is cut");
        askers.iter_mut().for_each(Asker::turn);
    }
}

/// What comes of a body that stands still: the victim has the space of all of it.
const UNFINISHED_BYTES: usize = 1_024;

/// Bytes of the pool that are in use and not in the store.
fn pinned_bytes(page: &str) -> u64 {
    let shards = |name: &str| -> u64 {
        let shards = (0..).map(|shard| format!("{name}{{shard=\"{shard}\"}}"));
        let values = shards.map_while(|name| page.contains(&name).then(|| sample(page, &name)));
        values.sum()
    };
    let in_use = (shards("millrace_chunks") << 20) - shards("millrace_chunks_free_bytes");
    in_use.saturating_sub(sample(page, "millrace_artifacts_bytes"))
}

/// Artifacts that are put, fetched, and not read: until the victim refuses a member one, because it
/// has its share, or answers pin what the store has dropped.
pub fn unread_answers(attack: &Attack<'_>) {
    const PINNED_BYTES: u64 = 96 << 20;
    let mut look = Look::at(attack.victim);
    let members = 0..attack.members.len();
    let connect = |member| Asker::new(attack.connect(member, WINDOW_PACKETS));
    let mut askers: Vec<_> = members.map(connect).collect();
    let mut number = 0;
    loop {
        look.refresh();
        let refused = look.reason(Family::Rejected, "budget_peer_share");
        if refused > 0 || pinned_bytes(&look.page) >= PINNED_BYTES {
            return;
        }
        assert!(number < 4 * STORE_BODIES, "nothing is pinned");
        for asker in &mut askers {
            number += 1;
            let bytes = artifact(number);
            // Answers on lanes wait behind those that are not read.
            asker.announce(&bytes);
            asker.ask_long(Class::Bulk, wire::PUT, &bytes, bytes.len());
            // One that the victim has hashed by now, and still holds.
            let earlier = number.saturating_sub(4 * attack.members.len() as u64);
            asker.ask(wire::GET, digest(&SHA256, &artifact(earlier)).as_ref());
        }
    }
}
