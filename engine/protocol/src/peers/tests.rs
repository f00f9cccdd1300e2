mod contest;
mod dial_queue;

use super::*;
use crate::{identity::SigningKey, topology::Member};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

const MS: Duration = Duration::from_millis(1);
/// Milliseconds since 1970 when a testbed starts.
const WALL_MS: u64 = 1_800_000_000_000;

const INBOUND: Direction = Direction::Inbound {
    from: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 4_000),
};

/// An address that no topology has.
fn elsewhere(host: u8) -> SocketAddr {
    ([192, 0, 2, host], 4100).into()
}

/// Members in the order of their ids, so that index 0 dials everyone.
fn members(count: u8) -> Vec<(NodeId, Member)> {
    let mut members: Vec<_> = (0..count)
        .map(|seed| {
            let public_key = SigningKey::from_seed([seed; 32]).public_key();
            let addresses = vec![SocketAddr::from(([127, 0, 0, 1], 4000 + u16::from(seed)))];
            (public_key.node_id(), Member::new(public_key, addresses))
        })
        .collect();
    members.sort_by_key(|(id, _)| *id);
    members
}

fn topology(members: &[(NodeId, Member)]) -> Arc<Topology> {
    Arc::new(Topology::from_members(
        members.iter().map(|(_, member)| member.clone()),
        1,
    ))
}

struct Testbed {
    peers: Peers,
    now: Instant,
    start: Instant,
    ids: Vec<NodeId>,
    all: Vec<(NodeId, Member)>,
}

impl Testbed {
    /// Node `me` of `count`; its first dials are drained.
    fn new(me: usize, count: u8) -> Self {
        Self::with_config(me, count, PeersConfig::default())
    }

    fn with_config(me: usize, count: u8, config: PeersConfig) -> Self {
        let (all, now) = (members(count), Instant::now());
        let mut peers = Peers::new(all[me].0, config, 0, 1, now);
        peers.set_topology(topology(&all), now);
        Self {
            peers,
            now,
            start: now,
            ids: all.iter().map(|(id, _)| *id).collect(),
            all,
        }
    }

    fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.peers.poll_action()).collect()
    }

    /// A dial request of `peer` arrives from an address; it was sent now.
    fn request_from(&mut self, peer: NodeId, from: SocketAddr) {
        let wall_ms = WALL_MS + (self.now - self.start).as_millis() as u64;
        let request = DialRequest {
            sender: peer,
            target: self.peers.id,
            index: 0,
            sent_ms: wall_ms,
        };
        self.peers.dial_requested(&request, from, wall_ms, self.now);
    }

    /// A dial request from where the topology has its sender.
    fn request(&mut self, peer: NodeId) {
        let sender = self.all.iter().find(|(id, _)| *id == peer);
        let from = sender.map_or_else(|| elsewhere(0), |(_, member)| member.addresses[0]);
        self.request_from(peer, from);
    }

    fn dial(&mut self) -> Attempt {
        match self.actions()[..] {
            [.., Action::Dial { attempt, .. }] => attempt,
            ref other => panic!("no dial in {other:?}"),
        }
    }

    /// Runs the clock to the next timeout and handles it.
    fn next_timeout(&mut self) -> Duration {
        let before = self.now;
        while self.peers.actions.is_empty() {
            self.now = self.peers.poll_timeout().expect("something waits");
            self.peers.handle_timeout(self.now);
        }
        self.now - before
    }

    fn up(&mut self, conn: u64, peer: usize, direction: Direction) -> ConnectionNumber {
        let (conn, peer) = (ConnKey(conn), self.ids[peer]);
        self.peers
            .handshake_done(conn, peer, direction, self.now)
            .unwrap();
        self.peers.hello_received(conn, self.now);
        let (current, number) = self.peers.current(&peer).unwrap();
        assert_eq!(current, conn);
        number
    }
}

#[test]
fn lower_id_dials_and_others_are_refused() {
    let mut testbed = Testbed::new(1, 3);
    let dialled: Vec<_> = testbed.actions();
    assert!(matches!(dialled[..], [Action::Dial { peer, .. }] if peer == testbed.ids[2]));
    let non_member = SigningKey::from_seed([99; 32]).node_id();
    let (ids, now) = (testbed.ids.clone(), testbed.now);
    let outbound = |n| Direction::Outbound(Attempt(n));
    let cases = [
        (ids[2], INBOUND, Err(Refusal::WrongDirection)),
        (ids[1], INBOUND, Err(Refusal::SelfConnection)),
        (non_member, INBOUND, Err(Refusal::NotAMember)),
        (ids[2], outbound(77), Err(Refusal::StaleAttempt)),
        (ids[0], outbound(1), Err(Refusal::StaleAttempt)),
        (ids[2], outbound(1), Ok(())),
        (ids[2], outbound(1), Err(Refusal::StaleAttempt)),
        (ids[0], INBOUND, Ok(())),
    ];
    for (conn, (peer, direction, want)) in cases.into_iter().enumerate() {
        let got = testbed
            .peers
            .handshake_done(ConnKey(conn as u64), peer, direction, now);
        assert_eq!(got, want, "{peer:?} {direction:?}");
    }
    assert_eq!(testbed.peers.counters().refused, 6);
}

// Protects against counting a connection that the server has not yet judged.
#[test]
fn up_at_hello_and_newer_replaces_older() {
    let mut testbed = Testbed::new(1, 2);
    let peer = testbed.ids[0];
    testbed
        .peers
        .handshake_done(ConnKey(1), peer, INBOUND, testbed.now)
        .unwrap();
    assert_eq!(testbed.peers.current(&peer), None);
    testbed.peers.hello_received(ConnKey(1), testbed.now);
    let first = testbed.peers.current(&peer).unwrap().1;
    assert_eq!(
        testbed.actions(),
        [Action::Up {
            peer,
            conn: ConnKey(1),
            number: first
        }]
    );
    let second = testbed.up(2, 0, INBOUND);
    assert!(second > first);
    let up = Action::Up {
        peer,
        conn: ConnKey(2),
        number: second,
    };
    assert_eq!(testbed.actions(), [Action::Drain { conn: ConnKey(1) }, up]);
    // A third before the first has drained: the first has had its time.
    testbed.up(3, 0, INBOUND);
    let closed = Action::Close {
        conn: ConnKey(1),
        reason: CloseReason::Drained,
    };
    assert!(testbed.actions().contains(&closed));
    testbed.next_timeout();
    let closed = Action::Close {
        conn: ConnKey(2),
        reason: CloseReason::Drained,
    };
    assert_eq!(testbed.actions(), [closed]);
    // The hello of a connection that is gone changes nothing.
    testbed.peers.hello_received(ConnKey(1), testbed.now);
    assert_eq!(testbed.actions(), []);
}

// Protects a body that is under way when its connection is replaced, and the bound on how long a
// replaced connection lives.
#[test]
fn a_replaced_connection_drains_while_its_messages_come_forward() {
    let config = PeersConfig::default();
    let (timeout, max) = (config.drain_timeout, config.drain_max);
    // When it is said, after the replacement, that the connection may go on until when; its end.
    let cases: [(&[(Duration, Duration)], Duration); 5] = [
        (&[], timeout),
        (&[(timeout / 2, 3 * timeout)], 3 * timeout),
        // A report does not bring the end forward.
        (
            &[(timeout / 2, 3 * timeout), (timeout, 2 * timeout)],
            3 * timeout,
        ),
        (&[(timeout / 2, timeout / 2 + MS)], timeout),
        (&[(timeout / 2, 2 * max)], max),
    ];
    for (reports, end) in cases {
        let mut testbed = Testbed::new(1, 2);
        testbed.up(1, 0, INBOUND);
        testbed.up(2, 0, INBOUND);
        testbed.actions();
        let replaced_at = testbed.now;
        for (at, until) in reports {
            testbed.now = replaced_at + *at;
            testbed.peers.handle_timeout(testbed.now);
            testbed.peers.drains_on(ConnKey(1), replaced_at + *until);
            // Of one that is current it changes nothing.
            testbed.peers.drains_on(ConnKey(2), replaced_at + *until);
        }
        testbed.next_timeout();
        let late = (testbed.now - replaced_at).saturating_sub(end);
        assert!(
            testbed.now - replaced_at >= end && late <= 2 * MS,
            "{reports:?}"
        );
        let closed = Action::Close {
            conn: ConnKey(1),
            reason: CloseReason::Drained,
        };
        assert_eq!(testbed.actions(), [closed]);
    }
}

// Protects a connection whose path turned out to be another than it was tuned for: it stays in use
// until its replacement is up, one attempt is made at a time, and one that fails costs nothing.
#[test]
fn a_connection_is_replaced_while_it_is_in_use() {
    let mut testbed = Testbed::new(0, 2);
    let attempt = testbed.dial();
    let first = testbed.up(1, 1, Direction::Outbound(attempt));
    testbed.actions();
    assert!(!testbed.peers.replace(ConnKey(9), testbed.now));
    assert!(testbed.peers.replace(ConnKey(1), testbed.now));
    assert!(!testbed.peers.replace(ConnKey(1), testbed.now));
    let failed = testbed.dial();
    testbed.peers.dial_failed(failed, testbed.now);
    let current = |testbed: &Testbed| testbed.peers.current(&testbed.ids[1]);
    assert_eq!(current(&testbed), Some((ConnKey(1), first)));
    assert_eq!(testbed.peers.poll_timeout(), None);

    assert!(testbed.peers.replace(ConnKey(1), testbed.now));
    let attempt = testbed.dial();
    testbed.up(2, 1, Direction::Outbound(attempt));
    let drained = Action::Drain { conn: ConnKey(1) };
    assert!(testbed.actions().contains(&drained));

    // The first one still carries a body.
    assert!(!testbed.peers.replace(ConnKey(2), testbed.now));
    testbed
        .peers
        .closed(ConnKey(1), CloseKind::Clean, testbed.now);
    // The connection is lost meanwhile: the attempt that is under way is the only one.
    assert!(testbed.peers.replace(ConnKey(2), testbed.now));
    let attempt = testbed.dial();
    testbed
        .peers
        .closed(ConnKey(2), CloseKind::Lost, testbed.now);
    let dials = testbed.actions();
    let is_dial = |action: &Action| matches!(action, Action::Dial { .. });
    assert!(!dials.iter().any(is_dial), "{dials:?}");
    testbed.up(3, 1, Direction::Outbound(attempt));
    // Where the peer dials, it replaces.
    let mut listener = Testbed::new(1, 2);
    listener.up(1, 0, INBOUND);
    assert!(!listener.peers.replace(ConnKey(1), listener.now));
}

#[test]
fn redial_backs_off_and_a_stable_connection_resets_it() {
    let mut testbed = Testbed::new(0, 2);
    let mut attempt = testbed.dial();
    let mut step = 50 * MS;
    for _ in 0..12 {
        testbed.peers.dial_failed(attempt, testbed.now);
        let waited = testbed.next_timeout();
        assert!(
            waited >= step / 2 && waited <= step + 2 * MS,
            "{waited:?} at {step:?}"
        );
        step = (step * 2).min(Duration::from_secs(10));
        attempt = testbed.dial();
    }
    // Up, but closed before it was stable: no dial at once, although it ended cleanly.
    testbed.up(1, 1, Direction::Outbound(attempt));
    testbed
        .peers
        .closed(ConnKey(1), CloseKind::Clean, testbed.now);
    assert!(
        !testbed
            .actions()
            .iter()
            .any(|a| matches!(a, Action::Dial { .. }))
    );
    assert!(testbed.next_timeout() >= Duration::from_secs(5));
    attempt = testbed.dial();
    testbed.up(2, 1, Direction::Outbound(attempt));
    testbed.actions();
    testbed.now += Duration::from_secs(2);
    testbed
        .peers
        .closed(ConnKey(2), CloseKind::Clean, testbed.now);
    attempt = testbed.dial();
    testbed.up(3, 1, Direction::Outbound(attempt));
    testbed.actions();
    testbed.now += Duration::from_secs(2);
    testbed
        .peers
        .closed(ConnKey(3), CloseKind::Lost, testbed.now);
    testbed.actions();
    assert!(testbed.next_timeout() <= 51 * MS);
}

#[test]
fn attempt_and_hello_have_deadlines() {
    let mut testbed = Testbed::new(0, 2);
    let attempt = testbed.dial();
    assert_eq!(
        testbed.next_timeout(),
        PeersConfig::default().connect_timeout
    );
    assert_eq!(testbed.actions(), [Action::Abandon { attempt }]);
    let peer = testbed.ids[1];
    let late = Direction::Outbound(attempt);
    let judged = testbed
        .peers
        .handshake_done(ConnKey(1), peer, late, testbed.now);
    assert_eq!(judged, Err(Refusal::StaleAttempt));
    testbed.next_timeout();
    let attempt = Direction::Outbound(testbed.dial());
    testbed
        .peers
        .handshake_done(ConnKey(2), peer, attempt, testbed.now)
        .unwrap();
    testbed.next_timeout();
    let closed = Action::Close {
        conn: ConnKey(2),
        reason: CloseReason::HelloTimeout,
    };
    assert_eq!(testbed.actions(), [closed]);
    testbed.next_timeout();
    testbed.dial();
}

#[test]
fn removed_peer_is_cut_and_added_one_dialled() {
    let mut testbed = Testbed::new(0, 3);
    let dials = testbed.actions();
    let Action::Dial { peer, attempt, .. } = dials[0] else {
        panic!("{dials:?}")
    };
    testbed
        .peers
        .handshake_done(ConnKey(1), peer, Direction::Outbound(attempt), testbed.now)
        .unwrap();
    testbed.peers.hello_received(ConnKey(1), testbed.now);
    let number = testbed.peers.current(&peer).unwrap().1;
    testbed.actions();
    testbed
        .peers
        .set_topology(topology(&testbed.all[..1]), testbed.now);
    let actions = testbed.actions();
    let reason = CloseReason::NotAMember;
    assert!(actions.contains(&Action::Close {
        conn: ConnKey(1),
        reason
    }));
    assert!(actions.contains(&Action::Down { peer, number }));
    assert_eq!(
        actions
            .iter()
            .filter(|a| matches!(a, Action::Abandon { .. }))
            .count(),
        1
    );
    assert_eq!(testbed.peers.poll_timeout(), None);
    testbed
        .peers
        .closed(ConnKey(1), CloseKind::Clean, testbed.now);
    assert_eq!(testbed.actions(), []);
    testbed
        .peers
        .set_topology(topology(&testbed.all), testbed.now);
    assert_eq!(testbed.actions().len(), 2);
    // This node itself is removed: it leaves everyone alone.
    testbed
        .peers
        .set_topology(topology(&testbed.all[1..]), testbed.now);
    assert!(
        testbed
            .actions()
            .iter()
            .all(|a| matches!(a, Action::Abandon { .. }))
    );
    assert_eq!(testbed.peers.iter().count(), 0);
}

#[test]
fn new_address_is_dialled_at_once() {
    let mut testbed = Testbed::new(0, 2);
    let old = testbed.dial();
    testbed.all[1].1.addresses[0].set_port(9);
    testbed
        .peers
        .set_topology(topology(&testbed.all), testbed.now);
    let actions = testbed.actions();
    assert!(
        matches!(actions[..], [Action::Abandon { attempt }, Action::Dial { address, .. }]
        if attempt == old && address.port() == 9)
    );
}

// Protects the second after a repair: a listener need not wait for the dialler's backoff.
#[test]
fn dial_requests_bring_a_dial_forward() {
    let mut testbed = Testbed::new(0, 2);
    let peer = testbed.ids[1];
    let mut attempt = testbed.dial();
    for _ in 0..10 {
        testbed.peers.dial_failed(attempt, testbed.now);
        testbed.next_timeout();
        attempt = testbed.dial();
    }
    testbed.peers.dial_failed(attempt, testbed.now);
    // Brought forward, but not to less than the interval after the last dial, however many
    // requests come: they must not make a node send a first packet each.
    testbed.request(peer);
    testbed.request(peer);
    let waited = testbed.next_timeout();
    assert!((100 * MS..=101 * MS).contains(&waited), "{waited:?}");
    attempt = testbed.dial();
    testbed.now += 200 * MS;
    testbed.request(peer);
    assert_eq!(testbed.actions(), [], "the attempt is young");
    // Each restart grants the next attempt twice the time: a slow handshake gets through.
    for patience in [250 * MS, 500 * MS, 1000 * MS, 2000 * MS] {
        testbed.now += patience;
        testbed.request(peer);
        let abandoned = Action::Abandon { attempt };
        let actions = testbed.actions();
        assert!(
            actions.contains(&abandoned),
            "{actions:?} after {patience:?}"
        );
        let [.., Action::Dial { attempt: next, .. }] = actions[..] else {
            panic!("{actions:?}")
        };
        attempt = next;
        testbed.now += patience;
        testbed.request(peer);
        assert_eq!(testbed.actions(), []);
        testbed.now -= patience;
    }
}

#[test]
fn dial_request_on_a_live_connection_asks_for_proof() {
    let mut testbed = Testbed::new(0, 2);
    let peer = testbed.ids[1];
    let attempt = testbed.dial();
    testbed.up(1, 1, Direction::Outbound(attempt));
    testbed.actions();
    testbed.request(peer);
    assert_eq!(testbed.actions(), [], "overtaken by the connection");
    testbed.now += Duration::from_secs(3);
    for _ in 0..2 {
        testbed.request(peer);
        assert_eq!(testbed.actions(), [Action::Verify { conn: ConnKey(1) }]);
        testbed.request(peer);
        assert_eq!(testbed.actions(), []);
        testbed.peers.verified(ConnKey(1));
        assert_eq!(testbed.peers.poll_timeout(), None);
    }
    testbed.request(peer);
    testbed.actions();
    testbed.next_timeout();
    let actions = testbed.actions();
    let closed = Action::Close {
        conn: ConnKey(1),
        reason: CloseReason::Unresponsive,
    };
    assert_eq!(actions[0], closed);
    assert!(
        matches!(actions[1..], [Action::Down { .. }, Action::Dial { .. }]),
        "{actions:?}"
    );
}

/// What is dialled next; the attempt before it has failed.
fn dialled_after_failure(testbed: &mut Testbed, attempt: Attempt) -> (SocketAddr, Attempt) {
    testbed.peers.dial_failed(attempt, testbed.now);
    testbed.next_timeout();
    match testbed.actions()[..] {
        [
            Action::Dial {
                address, attempt, ..
            },
        ] => (address, attempt),
        ref other => panic!("no dial in {other:?}"),
    }
}

// Protects the listener that has another address than the registry says: it is dialled there at
// once, and where the registry says again when that fails.
#[test]
fn a_listener_is_dialled_where_its_dial_requests_come_from() {
    let mut testbed = Testbed::new(0, 2);
    let (peer, listed) = (testbed.ids[1], testbed.all[1].1.addresses[0]);
    let old = testbed.dial();
    testbed.now += 100 * MS;
    testbed.request_from(peer, elsewhere(1));
    let [
        Action::Abandon { attempt },
        Action::Dial {
            address,
            attempt: new,
            ..
        },
    ] = testbed.actions()[..]
    else {
        panic!("the attempt goes on")
    };
    assert_eq!((attempt, address), (old, elsewhere(1)));
    // It is elsewhere again at once: this attempt is left its time.
    testbed.now += 200 * MS;
    testbed.request_from(peer, elsewhere(2));
    assert_eq!(testbed.actions(), []);
    let (first, attempt) = dialled_after_failure(&mut testbed, new);
    let (second, attempt) = dialled_after_failure(&mut testbed, attempt);
    let (third, _) = dialled_after_failure(&mut testbed, attempt);
    let expected = [elsewhere(2), listed, listed];
    assert_eq!([first, second, third], expected, "both candidates failed");
}

#[test]
fn a_connected_listener_that_moved_is_dialled_there_first() {
    let mut testbed = Testbed::new(0, 2);
    let peer = testbed.ids[1];
    let attempt = testbed.dial();
    testbed.up(1, 1, Direction::Outbound(attempt));
    testbed.actions();
    testbed.now += Duration::from_secs(3);
    testbed.request_from(peer, elsewhere(1));
    assert_eq!(testbed.actions(), [Action::Verify { conn: ConnKey(1) }]);
    // On a long path the answer takes longer than the config grants.
    let wait = Duration::from_secs(4);
    testbed.peers.verify_within(ConnKey(1), wait, testbed.now);
    assert_eq!(testbed.next_timeout(), wait);
    let [
        Action::Close { .. },
        Action::Down { .. },
        Action::Dial { address, .. },
    ] = testbed.actions()[..]
    else {
        panic!("no dial after the close")
    };
    assert_eq!(address, elsewhere(1));
    // The registry says where it is: nothing else is dialled.
    testbed.all[1].1.addresses[0].set_port(9);
    testbed
        .peers
        .set_topology(topology(&testbed.all), testbed.now);
    let [
        Action::Abandon { .. },
        Action::Dial {
            address, attempt, ..
        },
    ] = testbed.actions()[..]
    else {
        panic!("no dial of the new address")
    };
    assert_eq!(address.port(), 9);
    let (next, _) = dialled_after_failure(&mut testbed, attempt);
    assert_eq!(next.port(), 9);
}

// Protects a subnet of names from one that is not resolved: its peer waits, and is dialled where
// its request comes from, or when it is resolved.
#[test]
fn a_peer_without_an_address_waits_for_one() {
    let mut testbed = Testbed::new(0, 3);
    testbed.actions();
    let (peer, other) = (testbed.ids[1], testbed.ids[2]);
    let mut nameless = testbed.all.clone();
    nameless[1].1.addresses.clear();
    nameless[2].1.addresses.clear();
    testbed.peers.set_topology(topology(&nameless), testbed.now);
    let gave_up = testbed.actions();
    assert!(matches!(
        gave_up[..],
        [Action::Abandon { .. }, Action::Abandon { .. }]
    ));
    testbed.now += Duration::from_secs(9);
    testbed.peers.handle_timeout(testbed.now);
    assert_eq!(testbed.actions(), []);
    testbed.request_from(peer, elsewhere(1));
    assert!(
        matches!(testbed.actions()[..], [Action::Dial { address, .. }] if address == elsewhere(1))
    );
    nameless[2] = testbed.all[2].clone();
    testbed.peers.set_topology(topology(&nameless), testbed.now);
    assert!(matches!(testbed.actions()[..], [Action::Dial { peer, .. }] if peer == other));
    // A listener that knows no address asks none.
    let mut listener = Testbed::new(1, 2);
    listener.all[0].1.addresses.clear();
    let nowhere = topology(&listener.all);
    listener.peers.set_topology(nowhere, listener.now);
    listener.now += Duration::from_secs(2);
    listener.peers.handle_timeout(listener.now);
    assert_eq!(listener.actions(), []);
}

#[test]
fn listener_requests_dials_until_connected() {
    let mut testbed = Testbed::new(1, 2);
    let peer = testbed.ids[0];
    let mut last = Duration::ZERO;
    for _ in 0..10 {
        last = testbed.next_timeout();
        assert!(
            matches!(testbed.actions()[..], [Action::RequestDial { peer: p, .. }] if p == peer)
        );
        assert!(last <= 502 * MS);
    }
    assert!(last >= 250 * MS);
    testbed.up(1, 0, INBOUND);
    testbed.actions();
    assert_eq!(testbed.peers.poll_timeout(), None);
    testbed
        .peers
        .closed(ConnKey(1), CloseKind::Lost, testbed.now);
    testbed.actions();
    assert!(testbed.next_timeout() <= 52 * MS);
}

// Protects shards from sharing a peer: each connection to a peer is dialled by exactly one of them,
// and has a number of its own.
#[test]
fn shards_divide_the_peers() {
    let (all, now) = (members(20), Instant::now());
    let mut seen = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for (shard, index) in (0..3).flat_map(|shard| [(shard, 0), (shard, 1)]) {
        let config = PeersConfig {
            shard,
            shards: 3,
            index,
            ..PeersConfig::default()
        };
        let mut peers = Peers::new(all[0].0, config, 1000, 1, now);
        peers.set_topology(topology(&all), now);
        while let Some(Action::Dial { peer, attempt, .. }) = peers.poll_action() {
            assert!(seen.insert((index, peer)));
            let conn = ConnKey(attempt.0);
            peers
                .handshake_done(conn, peer, Direction::Outbound(attempt), now)
                .unwrap();
        }
        for conn in 1..=seen.len() as u64 {
            peers.hello_received(ConnKey(conn), now);
        }
        while let Some(action) = peers.poll_action() {
            let Action::Up { number, .. } = action else {
                panic!("{action:?}")
            };
            assert!(number.0 > 1000 && numbers.insert(number));
        }
        let wrong = peers.handshake_done(
            ConnKey(999),
            *seen
                .iter()
                .map(|(_, peer)| peer)
                .find(|id| id.owner_shard(index, 3) != shard)
                .unwrap_or(&all[0].0),
            Direction::Outbound(Attempt(0)),
            now,
        );
        assert!(matches!(
            wrong,
            Err(Refusal::WrongShard | Refusal::SelfConnection)
        ));
    }
    assert_eq!((seen.len(), numbers.len()), (2 * 19, 2 * 19));
}

#[test]
fn peers_are_bounded() {
    let (all, now) = (members(5), Instant::now());
    let config = PeersConfig {
        peers_max: 2,
        ..PeersConfig::default()
    };
    let mut peers = Peers::new(all[4].0, config, 0, 1, now);
    peers.set_topology(topology(&all), now);
    assert_eq!(
        (peers.iter().count(), peers.counters().members_left_out),
        (2, 2)
    );
    let judged = peers.handshake_done(ConnKey(1), all[3].0, INBOUND, now);
    assert_eq!(judged, Err(Refusal::TooMany));
}

proptest! {
    // Protects the machine from its shell: any order of reports keeps the invariants (which the
    // machine asserts after each), numbers rise, and one Up is undone by one Down.
    #[test]
    fn any_reports_keep_the_invariants(
        me in 0usize..4,
        steps in proptest::collection::vec((0u8..10, 0usize..5, 0u64..12, 0u64..3000), 1..150),
    ) {
        let mut testbed = Testbed::new(me, 4);
        let mut up: BTreeMap<NodeId, ConnectionNumber> = BTreeMap::new();
        let mut highest = BTreeMap::new();
        let mut attempts = vec![Attempt(0)];
        let (mut open, mut fresh) = (vec![ConnKey(0)], 0);
        for (kind, peer, pick, ms) in steps {
            let id = testbed.ids.get(peer).copied().unwrap_or_else(|| NodeId::from_bytes([0; 29]));
            let conn = open[pick as usize % open.len()];
            let now = testbed.now;
            match kind {
                0 | 1 => {
                    let attempt = attempts[attempts.len() - 1 - pick as usize % attempts.len()];
                    let outbound = Direction::Outbound(attempt);
                    let direction = if kind == 0 { INBOUND } else { outbound };
                    fresh += 1;
                    if testbed.peers.handshake_done(ConnKey(fresh), id, direction, now).is_ok() {
                        open.push(ConnKey(fresh));
                    }
                }
                2 => testbed.peers.hello_received(conn, now),
                3 => testbed.peers.closed(conn, CloseKind::Clean, now),
                4 => testbed.peers.closed(conn, CloseKind::Lost, now),
                5 if ms % 2 == 0 => testbed.request(id),
                5 => testbed.request_from(id, elsewhere(pick as u8)),
                6 => testbed.peers.dial_failed(attempts[pick as usize % attempts.len()], now),
                7 => {
                    let members = &testbed.all[usize::from(ms % 2 == 0)..peer.max(1)];
                    testbed.peers.set_topology(topology(members), now);
                }
                8 => {
                    testbed.peers.replace(conn, now);
                }
                _ => {
                    testbed.now += Duration::from_millis(ms);
                    testbed.peers.handle_timeout(testbed.now);
                }
            }
            for action in testbed.actions() {
                match action {
                    Action::Dial { attempt, peer, .. } => {
                        prop_assert!(testbed.ids[me] < peer);
                        attempts.push(attempt);
                    }
                    Action::Up { peer, number, .. } => {
                        let before = highest.insert(peer, number);
                        prop_assert!(before.is_none_or(|before| before < number));
                        up.insert(peer, number);
                    }
                    Action::Down { peer, number } => prop_assert_eq!(up.remove(&peer), Some(number)),
                    _ => {}
                }
            }
            let current: BTreeMap<_, _> =
                testbed.peers.iter().filter_map(|(id, conn)| Some((id, conn?.1))).collect();
            prop_assert_eq!(&current, &up);
        }
    }
}
