//! How many attempts are under way, and which peer is next.

use super::*;

fn testbed(count: u8, dials_max: usize) -> Testbed {
    let config = PeersConfig {
        dials_max,
        ..PeersConfig::default()
    };
    Testbed::with_config(0, count, config)
}

impl Testbed {
    /// Dials since the last call: the numbers of the peers, and their attempts.
    fn dials(&mut self) -> Vec<(usize, Attempt)> {
        let actions = self.actions();
        let dials = actions.iter().filter_map(|action| match action {
            Action::Dial { peer, attempt, .. } => {
                let number = self.ids.iter().position(|id| id == peer)?;
                Some((number, *attempt))
            }
            _ => None,
        });
        dials.collect()
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.peers.handle_timeout(self.now);
    }

    /// Attempts that hold a turn, and peers that wait for one.
    fn turns(&self) -> (usize, usize) {
        let young = |peer: &&Peer| match peer.dial {
            Dial::Under { started, .. } => self.now < started + 2_000 * MS,
            _ => false,
        };
        let queued = |peer: &&Peer| matches!(peer.dial, Dial::Queued { .. });
        let peers = || self.peers.peers.values();
        (
            peers().filter(young).count(),
            peers().filter(queued).count(),
        )
    }
}

// Protects a subnet whose nodes all start at once: an attempt that ends makes room for the next
// peer, and one that is slow makes room too, so that a peer that is down keeps no other waiting.
#[test]
fn peers_wait_for_the_turn_of_an_attempt_that_ends_or_is_slow() {
    let mut testbed = testbed(8, 2);
    let first = testbed.dials();
    assert_eq!(first.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [1, 2]);
    // One is up: the next has its turn at once.
    testbed.up(1, 1, Direction::Outbound(first[0].1));
    assert!(matches!(testbed.dials()[..], [(3, _)]));
    // One has failed.
    testbed.peers.dial_failed(first[1].1, testbed.now);
    assert!(matches!(testbed.dials()[..], [(4, _)]));
    // One asks: it is next.
    let asks = testbed.ids[7];
    testbed.request(asks);
    assert!(testbed.dials().is_empty(), "it does not push another out");
    testbed.pass(2_001 * MS);
    let next: Vec<usize> = testbed.dials().iter().map(|(n, _)| *n).collect();
    assert!(next.len() == 2 && next.contains(&7), "{next:?}");
    assert_eq!(testbed.turns().0, 2);
}

// Protects the turn of an attempt that begins again because its peer asks for it.
#[test]
fn an_attempt_that_begins_again_keeps_its_turn() {
    let mut testbed = testbed(5, 1);
    assert!(matches!(testbed.dials()[..], [(1, _)]));
    testbed.now += 300 * MS;
    let asks = testbed.ids[1];
    testbed.request(asks);
    assert!(matches!(testbed.dials()[..], [(1, _)]));
}

proptest! {
    // Protects the bound, and each peer from waiting for ever.
    #[test]
    fn turns_are_bounded_and_none_is_left_unused(
        dials_max in 1usize..4,
        steps in proptest::collection::vec((0u8..5, 1usize..9, 0u64..1_500), 1..80),
    ) {
        let mut testbed = testbed(9, dials_max);
        let mut under: BTreeMap<usize, Attempt> = testbed.dials().into_iter().collect();
        let mut conn = 0;
        for (kind, peer, ms) in steps {
            let attempt = under.get(&peer).copied();
            match (kind, attempt) {
                (0, Some(attempt)) => {
                    conn += 1;
                    let outbound = Direction::Outbound(attempt);
                    let (id, now) = (testbed.ids[peer], testbed.now);
                    if testbed.peers.handshake_done(ConnKey(conn), id, outbound, now).is_ok() {
                        testbed.peers.hello_received(ConnKey(conn), now);
                    }
                }
                (1, Some(attempt)) => testbed.peers.dial_failed(attempt, testbed.now),
                (2, _) => {
                    let id = testbed.ids[peer];
                    testbed.request(id);
                }
                _ => testbed.pass(Duration::from_millis(ms)),
            }
            under.extend(testbed.dials());
            let (young, queued) = testbed.turns();
            prop_assert!(young <= dials_max, "{young} hold a turn");
            // A slow one is noticed when the timer of a peer that waits runs out.
            prop_assert!(queued == 0 || young > 0 || testbed.peers.poll_timeout().is_some());
        }
        // All but the first node's own id are dialled in the end.
        for _ in 0..20 {
            testbed.pass(2_001 * MS);
            under.extend(testbed.dials());
        }
        prop_assert_eq!(under.len(), 8);
    }
}
