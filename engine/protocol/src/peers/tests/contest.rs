//! Two nodes with one key, and nodes that look like two.

use super::*;

/// What a listener does with connections of its peer 0 that come from these hosts at these times,
/// and whether the one in place shows a sign of life when it is asked for one.
fn contest(arrivals: &[(u8, u64, Result<(), Refusal>)], lives: bool) -> Testbed {
    let mut testbed = Testbed::new(1, 2);
    let (peer, start) = (testbed.ids[0], testbed.now);
    for (conn, (host, at_ms, expected)) in arrivals.iter().enumerate() {
        testbed.now = start + Duration::from_millis(*at_ms);
        testbed.peers.handle_timeout(testbed.now);
        let (conn, from) = (ConnKey(conn as u64), elsewhere(*host));
        let direction = Direction::Inbound { from };
        let judged = testbed
            .peers
            .handshake_done(conn, peer, direction, testbed.now);
        assert_eq!(judged, *expected, "from host {host} at {at_ms} ms");
        testbed.peers.hello_received(conn, testbed.now);
        for action in testbed.actions() {
            if let (Action::Verify { conn }, true) = (action, lives) {
                testbed.peers.verified(conn);
            }
        }
    }
    testbed
}

// Protects a pair's connection from two nodes with one key, which would replace it about once a
// second: they change places after 10, 20, 40 s, and so on.
#[test]
fn two_nodes_with_one_key_change_places_ever_more_seldom() {
    const REFUSED: Result<(), Refusal> = Err(Refusal::DuplicateIdentity);
    let testbed = contest(
        &[
            (1, 0, Ok(())),
            (2, 1_000, Ok(())),
            (1, 2_000, REFUSED),
            (1, 3_000, REFUSED),
            (1, 11_999, REFUSED),
            (1, 12_000, Ok(())),
            (2, 13_000, REFUSED),
            (2, 31_999, REFUSED),
            (2, 32_000, Ok(())),
            (1, 50_000, REFUSED),
            (1, 71_999, REFUSED),
            (1, 72_000, Ok(())),
        ],
        true,
    );
    let (peer, counters) = (testbed.ids[0], testbed.peers.counters());
    assert_eq!(testbed.peers.duplicates_refused(&peer), 7);
    assert_eq!((counters.refused, counters.replaced), (7, 4));
}

// Protects a node that restarts or moves: it is taken at once.
#[test]
fn a_node_that_restarts_or_moves_once_is_no_duplicate() {
    // Restarts at its address, as often as it likes.
    let restarts = [0, 300, 600, 900, 1_200].map(|at_ms| (1, at_ms, Ok(())));
    contest(&restarts, true);
    // Moves, and moves on when it has been there for a while; the old connection may live on.
    let moves = [(1, 0, Ok(())), (2, 1_000, Ok(())), (3, 31_000, Ok(()))];
    let testbed = contest(&moves, true);
    assert_eq!(testbed.peers.duplicates_refused(&testbed.ids[0]), 0);
    // Moves on at once: its last connection is dead, and makes room within the time of a probe.
    let moves = [
        (1, 0, Ok(())),
        (2, 1_000, Ok(())),
        (3, 2_000, Err(Refusal::DuplicateIdentity)),
        (3, 2_700, Ok(())),
    ];
    contest(&moves, false);
}

// Protects the operator from a line for each refused connection, and from a contest without one.
#[test]
fn a_contest_is_to_be_told_once() {
    const REFUSED: Result<(), Refusal> = Err(Refusal::DuplicateIdentity);
    let mut testbed = contest(&[(1, 0, Ok(())), (2, 1_000, Ok(()))], true);
    let peer = testbed.ids[0];
    assert!(!testbed.peers.has_untold_duplicate(&peer));
    let mut arrive = |conn, host, after_ms| {
        testbed.now += Duration::from_millis(after_ms);
        let from = elsewhere(host);
        let direction = Direction::Inbound { from };
        let judged = testbed
            .peers
            .handshake_done(ConnKey(conn), peer, direction, testbed.now);
        if judged.is_ok() {
            testbed.peers.hello_received(ConnKey(conn), testbed.now);
        }
        testbed.peers.verified(ConnKey(1));
        let is_untold = testbed.peers.has_untold_duplicate(&peer);
        if is_untold {
            testbed.peers.duplicate_told(&peer);
        }
        (judged, is_untold)
    };
    assert_eq!(arrive(3, 1, 1_000), (REFUSED, true));
    assert_eq!(arrive(4, 1, 1_000), (REFUSED, false));
    assert_eq!(arrive(5, 1, 9_000), (Ok(()), false));
    assert_eq!(arrive(6, 2, 1_000), (REFUSED, false));
    // No other node came for a while: that is another contest.
    assert_eq!(arrive(7, 2, 30_000), (Ok(()), false));
    assert_eq!(arrive(8, 1, 1_000), (REFUSED, true));
}
