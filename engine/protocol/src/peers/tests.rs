use super::*;
use crate::{identity::SigningKey, topology::Member};
use proptest::prelude::*;
use std::collections::BTreeSet;

const MS: Duration = Duration::from_millis(1);

/// Members in the order of their ids, so that index 0 dials everyone.
fn members(count: u8) -> Vec<(NodeId, Member)> {
    let mut members: Vec<_> = (0..count)
        .map(|seed| {
            let public_key = SigningKey::from_seed([seed; 32]).public_key();
            let addresses = vec![SocketAddr::from(([127, 0, 0, 1], 4000 + u16::from(seed)))];
            (
                public_key.node_id(),
                Member {
                    public_key,
                    addresses,
                },
            )
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

struct Bench {
    peers: Peers,
    now: Instant,
    ids: Vec<NodeId>,
    all: Vec<(NodeId, Member)>,
}

impl Bench {
    /// Node `me` of `count`; its first dials are drained.
    fn new(me: usize, count: u8) -> Self {
        let (all, now) = (members(count), Instant::now());
        let mut peers = Peers::new(all[me].0, PeersConfig::default(), 0, 1, now);
        peers.set_topology(topology(&all), now);
        Self {
            peers,
            now,
            ids: all.iter().map(|(id, _)| *id).collect(),
            all,
        }
    }

    fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.peers.poll_action()).collect()
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
    let mut bench = Bench::new(1, 3);
    let dialled: Vec<_> = bench.actions();
    assert!(matches!(dialled[..], [Action::Dial { peer, .. }] if peer == bench.ids[2]));
    let stranger = SigningKey::from_seed([99; 32]).node_id();
    let (ids, now) = (bench.ids.clone(), bench.now);
    let outbound = |n| Direction::Outbound(Attempt(n));
    let cases = [
        (ids[2], Direction::Inbound, Err(Refusal::WrongDirection)),
        (ids[1], Direction::Inbound, Err(Refusal::SelfConnection)),
        (stranger, Direction::Inbound, Err(Refusal::NotAMember)),
        (ids[2], outbound(77), Err(Refusal::StaleAttempt)),
        (ids[0], outbound(1), Err(Refusal::StaleAttempt)),
        (ids[2], outbound(1), Ok(())),
        (ids[2], outbound(1), Err(Refusal::StaleAttempt)),
        (ids[0], Direction::Inbound, Ok(())),
    ];
    for (conn, (peer, direction, want)) in cases.into_iter().enumerate() {
        let got = bench
            .peers
            .handshake_done(ConnKey(conn as u64), peer, direction, now);
        assert_eq!(got, want, "{peer:?} {direction:?}");
    }
    assert_eq!(bench.peers.counters().refused, 6);
}

// Protects against counting a connection that the server has not yet judged.
#[test]
fn up_at_hello_and_newer_replaces_older() {
    let mut bench = Bench::new(1, 2);
    let peer = bench.ids[0];
    bench
        .peers
        .handshake_done(ConnKey(1), peer, Direction::Inbound, bench.now)
        .unwrap();
    assert_eq!(bench.peers.current(&peer), None);
    bench.peers.hello_received(ConnKey(1), bench.now);
    let first = bench.peers.current(&peer).unwrap().1;
    assert_eq!(
        bench.actions(),
        [Action::Up {
            peer,
            conn: ConnKey(1),
            number: first
        }]
    );
    let second = bench.up(2, 0, Direction::Inbound);
    assert!(second > first);
    let up = Action::Up {
        peer,
        conn: ConnKey(2),
        number: second,
    };
    assert_eq!(bench.actions(), [Action::Drain { conn: ConnKey(1) }, up]);
    // A third before the first has drained: the first has had its time.
    bench.up(3, 0, Direction::Inbound);
    let closed = Action::Close {
        conn: ConnKey(1),
        reason: CloseReason::Drained,
    };
    assert!(bench.actions().contains(&closed));
    bench.next_timeout();
    let closed = Action::Close {
        conn: ConnKey(2),
        reason: CloseReason::Drained,
    };
    assert_eq!(bench.actions(), [closed]);
    // The hello of a connection that is gone changes nothing.
    bench.peers.hello_received(ConnKey(1), bench.now);
    assert_eq!(bench.actions(), []);
}

#[test]
fn redial_backs_off_and_a_stable_connection_resets_it() {
    let mut bench = Bench::new(0, 2);
    let mut attempt = bench.dial();
    let mut step = 50 * MS;
    for _ in 0..12 {
        bench.peers.dial_failed(attempt, bench.now);
        let waited = bench.next_timeout();
        assert!(
            waited >= step / 2 && waited <= step + 2 * MS,
            "{waited:?} at {step:?}"
        );
        step = (step * 2).min(Duration::from_secs(10));
        attempt = bench.dial();
    }
    // Up, but closed before it was stable: no dial at once, although it ended cleanly.
    bench.up(1, 1, Direction::Outbound(attempt));
    bench.peers.closed(ConnKey(1), CloseKind::Clean, bench.now);
    assert!(
        !bench
            .actions()
            .iter()
            .any(|a| matches!(a, Action::Dial { .. }))
    );
    assert!(bench.next_timeout() >= Duration::from_secs(5));
    attempt = bench.dial();
    bench.up(2, 1, Direction::Outbound(attempt));
    bench.actions();
    bench.now += Duration::from_secs(2);
    bench.peers.closed(ConnKey(2), CloseKind::Clean, bench.now);
    attempt = bench.dial();
    bench.up(3, 1, Direction::Outbound(attempt));
    bench.actions();
    bench.now += Duration::from_secs(2);
    bench.peers.closed(ConnKey(3), CloseKind::Lost, bench.now);
    bench.actions();
    assert!(bench.next_timeout() <= 51 * MS);
}

#[test]
fn attempt_and_hello_have_deadlines() {
    let mut bench = Bench::new(0, 2);
    let attempt = bench.dial();
    assert_eq!(bench.next_timeout(), Duration::from_secs(10));
    assert_eq!(bench.actions(), [Action::Abandon { attempt }]);
    let peer = bench.ids[1];
    let late = Direction::Outbound(attempt);
    let judged = bench
        .peers
        .handshake_done(ConnKey(1), peer, late, bench.now);
    assert_eq!(judged, Err(Refusal::StaleAttempt));
    bench.next_timeout();
    let attempt = Direction::Outbound(bench.dial());
    bench
        .peers
        .handshake_done(ConnKey(2), peer, attempt, bench.now)
        .unwrap();
    bench.next_timeout();
    let closed = Action::Close {
        conn: ConnKey(2),
        reason: CloseReason::HelloTimeout,
    };
    assert_eq!(bench.actions(), [closed]);
    bench.next_timeout();
    bench.dial();
}

#[test]
fn removed_peer_is_cut_and_added_one_dialled() {
    let mut bench = Bench::new(0, 3);
    let dials = bench.actions();
    let Action::Dial { peer, attempt, .. } = dials[0] else {
        panic!("{dials:?}")
    };
    bench
        .peers
        .handshake_done(ConnKey(1), peer, Direction::Outbound(attempt), bench.now)
        .unwrap();
    bench.peers.hello_received(ConnKey(1), bench.now);
    let number = bench.peers.current(&peer).unwrap().1;
    bench.actions();
    bench
        .peers
        .set_topology(topology(&bench.all[..1]), bench.now);
    let actions = bench.actions();
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
    assert_eq!(bench.peers.poll_timeout(), None);
    bench.peers.closed(ConnKey(1), CloseKind::Clean, bench.now);
    assert_eq!(bench.actions(), []);
    bench.peers.set_topology(topology(&bench.all), bench.now);
    assert_eq!(bench.actions().len(), 2);
    // This node itself is removed: it leaves everyone alone.
    bench
        .peers
        .set_topology(topology(&bench.all[1..]), bench.now);
    assert!(
        bench
            .actions()
            .iter()
            .all(|a| matches!(a, Action::Abandon { .. }))
    );
    assert_eq!(bench.peers.iter().count(), 0);
}

#[test]
fn new_address_is_dialled_at_once() {
    let mut bench = Bench::new(0, 2);
    let old = bench.dial();
    bench.all[1].1.addresses[0].set_port(9);
    bench.peers.set_topology(topology(&bench.all), bench.now);
    let actions = bench.actions();
    assert!(
        matches!(actions[..], [Action::Abandon { attempt }, Action::Dial { address, .. }]
        if attempt == old && address.port() == 9)
    );
}

// Protects the second after a repair: a listener need not wait for the dialler's backoff.
#[test]
fn knocks_bring_a_dial_forward() {
    let mut bench = Bench::new(0, 2);
    let peer = bench.ids[1];
    let mut attempt = bench.dial();
    for _ in 0..10 {
        bench.peers.dial_failed(attempt, bench.now);
        bench.next_timeout();
        attempt = bench.dial();
    }
    bench.peers.dial_failed(attempt, bench.now);
    bench.peers.knocked(peer, bench.now);
    assert!(
        bench.next_timeout() <= 101 * MS,
        "brought forward, but not at once"
    );
    attempt = bench.dial();
    bench.now += 200 * MS;
    bench.peers.knocked(peer, bench.now);
    assert_eq!(bench.actions(), [], "the attempt is young");
    // Each restart grants the next attempt twice the time: a slow handshake gets through.
    for patience in [250 * MS, 500 * MS, 1000 * MS, 2000 * MS] {
        bench.now += patience;
        bench.peers.knocked(peer, bench.now);
        let abandoned = Action::Abandon { attempt };
        let actions = bench.actions();
        assert!(
            actions.contains(&abandoned),
            "{actions:?} after {patience:?}"
        );
        let [.., Action::Dial { attempt: next, .. }] = actions[..] else {
            panic!("{actions:?}")
        };
        attempt = next;
        bench.peers.knocked(peer, bench.now + patience);
        assert_eq!(bench.actions(), []);
    }
}

#[test]
fn knock_on_a_live_connection_asks_for_proof() {
    let mut bench = Bench::new(0, 2);
    let peer = bench.ids[1];
    let attempt = bench.dial();
    bench.up(1, 1, Direction::Outbound(attempt));
    bench.actions();
    bench.peers.knocked(peer, bench.now);
    assert_eq!(bench.actions(), [], "overtaken by the connection");
    bench.now += Duration::from_secs(3);
    for _ in 0..2 {
        bench.peers.knocked(peer, bench.now);
        assert_eq!(bench.actions(), [Action::Verify { conn: ConnKey(1) }]);
        bench.peers.knocked(peer, bench.now);
        assert_eq!(bench.actions(), []);
        bench.peers.verified(ConnKey(1));
        assert_eq!(bench.peers.poll_timeout(), None);
    }
    bench.peers.knocked(peer, bench.now);
    bench.actions();
    bench.next_timeout();
    let actions = bench.actions();
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

#[test]
fn listener_knocks_until_connected() {
    let mut bench = Bench::new(1, 2);
    let peer = bench.ids[0];
    let mut last = Duration::ZERO;
    for _ in 0..10 {
        last = bench.next_timeout();
        assert!(matches!(bench.actions()[..], [Action::Knock { peer: p, .. }] if p == peer));
        assert!(last <= 502 * MS);
    }
    assert!(last >= 250 * MS);
    bench.up(1, 0, Direction::Inbound);
    bench.actions();
    assert_eq!(bench.peers.poll_timeout(), None);
    bench.peers.closed(ConnKey(1), CloseKind::Lost, bench.now);
    bench.actions();
    assert!(bench.next_timeout() <= 52 * MS);
}

#[test]
fn shutting_down_closes_all_and_refuses() {
    let mut bench = Bench::new(0, 3);
    let dials = bench.actions();
    let Action::Dial { peer, attempt, .. } = dials[0] else {
        panic!("{dials:?}")
    };
    let direction = Direction::Outbound(attempt);
    bench
        .peers
        .handshake_done(ConnKey(1), peer, direction, bench.now)
        .unwrap();
    bench.peers.shut_down();
    let reason = CloseReason::ShuttingDown;
    assert!(bench.actions().contains(&Action::Close {
        conn: ConnKey(1),
        reason
    }));
    assert_eq!(bench.peers.poll_timeout(), None);
    let judged = bench
        .peers
        .handshake_done(ConnKey(2), peer, Direction::Inbound, bench.now);
    assert_eq!(judged, Err(Refusal::ShuttingDown));
}

// Protects shards from sharing a peer: each peer is dialled by exactly one of them.
#[test]
fn shards_divide_the_peers() {
    let (all, now) = (members(20), Instant::now());
    let mut seen = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for shard in 0..3 {
        let config = PeersConfig {
            shard,
            shards: 3,
            ..PeersConfig::default()
        };
        let mut peers = Peers::new(all[0].0, config, 1000, 1, now);
        peers.set_topology(topology(&all), now);
        while let Some(Action::Dial { peer, attempt, .. }) = peers.poll_action() {
            assert!(seen.insert(peer));
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
                .find(|id| id.owner_shard(0, 3) != shard)
                .unwrap_or(&all[0].0),
            Direction::Outbound(Attempt(0)),
            now,
        );
        assert!(matches!(
            wrong,
            Err(Refusal::WrongShard | Refusal::SelfConnection)
        ));
    }
    assert_eq!((seen.len(), numbers.len()), (19, 19));
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
    let judged = peers.handshake_done(ConnKey(1), all[3].0, Direction::Inbound, now);
    assert_eq!(judged, Err(Refusal::TooMany));
}

proptest! {
    // Protects the machine from its shell: any order of reports keeps the invariants (which the
    // machine asserts after each), numbers rise, and one Up is undone by one Down.
    #[test]
    fn any_reports_keep_the_invariants(
        me in 0usize..4,
        steps in proptest::collection::vec((0u8..9, 0usize..5, 0u64..12, 0u64..3000), 1..150),
    ) {
        let mut bench = Bench::new(me, 4);
        let mut up: BTreeMap<NodeId, ConnectionNumber> = BTreeMap::new();
        let mut highest = BTreeMap::new();
        let mut attempts = vec![Attempt(0)];
        let (mut open, mut fresh) = (vec![ConnKey(0)], 0);
        for (kind, peer, pick, ms) in steps {
            let id = bench.ids.get(peer).copied().unwrap_or_else(|| NodeId::from_bytes([0; 29]));
            let conn = open[pick as usize % open.len()];
            let now = bench.now;
            match kind {
                0 | 1 => {
                    let attempt = attempts[attempts.len() - 1 - pick as usize % attempts.len()];
                    let outbound = Direction::Outbound(attempt);
                    let direction = if kind == 0 { Direction::Inbound } else { outbound };
                    fresh += 1;
                    if bench.peers.handshake_done(ConnKey(fresh), id, direction, now).is_ok() {
                        open.push(ConnKey(fresh));
                    }
                }
                2 => bench.peers.hello_received(conn, now),
                3 => bench.peers.closed(conn, CloseKind::Clean, now),
                4 => bench.peers.closed(conn, CloseKind::Lost, now),
                5 => bench.peers.knocked(id, now),
                6 => bench.peers.dial_failed(attempts[pick as usize % attempts.len()], now),
                7 => {
                    let members = &bench.all[usize::from(ms % 2 == 0)..peer.max(1)];
                    bench.peers.set_topology(topology(members), now);
                }
                _ => {
                    bench.now += Duration::from_millis(ms);
                    bench.peers.handle_timeout(bench.now);
                }
            }
            for action in bench.actions() {
                match action {
                    Action::Dial { attempt, peer, .. } => {
                        prop_assert!(bench.ids[me] < peer);
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
                bench.peers.iter().filter_map(|(id, conn)| Some((id, conn?.1))).collect();
            prop_assert_eq!(&current, &up);
        }
    }
}
