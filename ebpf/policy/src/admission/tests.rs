//! Admission of first packets, by each of the reasons that user space can see.

use std::thread;
use std::time::Duration;

use super::*;
use crate::cid::{HANDSHAKE_EPOCH_SHIFT, Place, ROAMING_EPOCH_SHIFT};
use crate::stress::StressConfig;

const NOW: u64 = 5_000_000_000_000;
const WALL: u64 = 1_700_000_000_000_000_000;
const DCID: [u8; 8] = [3, 1, 4, 1, 5, 9, 2, 6];
const NODE: u32 = 77;
const PAIR: Key = Key { k0: 5, k1: 6 };

fn config() -> AdmissionConfig {
    let second = |burst| Limit::per(1, Duration::from_secs(1), burst);
    AdmissionConfig {
        limits: Limits {
            unvalidated: second(4),
            source_quic: Limit::per(1, Duration::from_secs(60), 3),
            peer: second(5),
            proof: second(2),
            ..Limits::default()
        },
        caps: Caps { quic: 2, tcp: 0 },
        sources_max: 3,
        half_open_retry: 10,
        half_open_non_members_max: 15,
        // Bounds of their own are tested in a place of their own.
        half_open_source_max: 0,
        half_open_peer_max: 0,
        sketch_buckets: 1 << 8,
    }
}

/// Bytes that differ at every call.
fn numbered() -> impl FnMut() -> [u8; 16] {
    let mut number = 0u128;
    move || {
        number += 1;
        number.to_le_bytes()
    }
}

fn admission() -> Admission {
    let admission = Admission::new(config(), NOW, numbered());
    admission.set_peers(BTreeMap::from([(NODE, PAIR)]));
    admission
}

fn from(host: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, host, 1], 4_100))
}

impl Admission {
    /// A first packet with nothing to show.
    fn plain(&self, from: SocketAddr) -> First {
        self.first_packet(from, &DCID, &[], 0, NOW, WALL)
    }

    fn prove(&self, from: SocketAddr, nonce: u8) -> First {
        let id = proof::make(9, NODE, [nonce; 6], from.ip(), WALL, PAIR);
        self.first_packet(from, &id, &[], 0, NOW, WALL)
    }

    /// A first packet with the ID and the token of an earlier Retry.
    fn with_token(&self, from: SocketAddr, minted: &Minted, now_ns: u64) -> First {
        self.first_packet(from, &minted.retry_id, &minted.token, 0, now_ns, WALL)
    }

    /// What a Retry gives this client now.
    fn retried(&self, from: SocketAddr) -> Minted {
        token::mint(&DCID, from, &self.keys(), NOW).unwrap()
    }
}

fn accepted() -> First {
    First::Accept(Entitlement::Unvalidated)
}

fn accepted_by_token() -> First {
    First::Accept(Entitlement::Token(OriginalId::new(&DCID).unwrap()))
}

#[track_caller]
fn assert_retry(admission: &Admission, first: First, from: SocketAddr) {
    let First::Retry(minted) = first else {
        panic!("{first:?} is no Retry");
    };
    assert_eq!(
        admission.with_token(from, &minted, NOW),
        accepted_by_token()
    );
}

#[test]
fn non_members_share_a_budget_and_then_get_a_retry() {
    let admission = admission();
    for host in 0..4 {
        assert_eq!(admission.plain(from(host)), accepted());
    }
    assert_retry(&admission, admission.plain(from(4)), from(4));
    // Time refills it.
    let later = NOW + 1_000_000_000;
    let first = admission.first_packet(from(5), &DCID, &[], 0, later, WALL);
    assert_eq!(first, accepted());
}

#[test]
fn many_half_open_handshakes_and_stress_ask_for_an_address() {
    let admission = admission();
    let first = admission.first_packet(from(1), &DCID, &[], 9, NOW, WALL);
    assert_eq!(first, accepted());
    let first = admission.first_packet(from(2), &DCID, &[], 10, NOW, WALL);
    assert_retry(&admission, first, from(2));
    admission.set_stress(Level::Retry);
    assert_retry(&admission, admission.plain(from(3)), from(3));
}

// Protects peers: non-members with any number of addresses leave them room.
#[test]
fn what_a_shard_holds_last_is_for_proven_peers() {
    let admission = admission();
    let minted = admission.retried(from(1));
    let token = |half_open| {
        let (id, token) = (&minted.retry_id, &minted.token);
        admission.first_packet(from(1), id, token, half_open, NOW, WALL)
    };
    assert_eq!(token(14), accepted_by_token());
    assert_eq!(token(15), First::Full(Full::Shard));
    let id = proof::make(9, NODE, [1; 6], from(1).ip(), WALL, PAIR);
    let first = admission.first_packet(from(1), &id, &[], 15, NOW, WALL);
    assert_eq!(first, First::Accept(Entitlement::Peer(NODE)));
    // What was refused has cost the source nothing: two of its three are left.
    assert_eq!(
        [14, 14, 14].map(token),
        [
            accepted_by_token(),
            accepted_by_token(),
            First::Drop(Reason::QuicSourceRate)
        ]
    );
}

// Else non-members would fill a shard for good before stress shuts them out.
#[test]
fn stress_rises_to_peers_before_non_members_find_a_shard_full() {
    let percent = StressConfig::default().peers.enter.half_open_percent;
    for handshakes_max in [1, 10, 16, 100, 1_024, 65_535] {
        let config = config().with_handshakes(handshakes_max);
        let non_members = config.half_open_non_members_max;
        assert!(non_members as u64 * 100 >= percent * handshakes_max as u64);
        assert_eq!(non_members < handshakes_max, handshakes_max >= 16);
        assert!(config.half_open_retry <= non_members);
    }
}

#[test]
fn under_the_highest_stress_only_proven_peers_come_in() {
    let admission = admission();
    admission.set_stress(Level::Peers);
    let refused = First::Drop(Reason::QuicPeersOnly);
    assert_eq!(admission.plain(from(1)), refused);
    assert_eq!(
        admission.with_token(from(1), &admission.retried(from(1)), NOW),
        refused
    );
    assert_eq!(
        admission.prove(from(1), 1),
        First::Accept(Entitlement::Peer(NODE))
    );
}

#[test]
fn proofs_have_budgets_of_their_own() {
    let admission = admission();
    let peer = First::Accept(Entitlement::Peer(NODE));
    // The same proof twice, which is the burst of proofs; each use costs the peer one of five.
    assert_eq!(
        [(); 3].map(|()| admission.prove(from(1), 1)),
        [peer, peer, First::Drop(Reason::QuicProofReplayed)]
    );
    assert_eq!(
        [2, 3, 4, 5].map(|nonce| admission.prove(from(1), nonce)),
        [peer, peer, peer, First::Drop(Reason::QuicPeerBudget)]
    );
    // None of that costs the address anything.
    assert_eq!(admission.plain(from(1)), accepted());
}

#[test]
fn a_proof_from_elsewhere_is_any_id() {
    let admission = admission();
    let id = proof::make(9, NODE, [1; 6], from(1).ip(), WALL, PAIR);
    let first = |from| admission.first_packet(from, &id, &[], 0, NOW, WALL);
    assert_eq!(first(from(2)), accepted());
    admission.set_stress(Level::Peers);
    assert_eq!(first(from(2)), First::Drop(Reason::QuicPeersOnly));
    admission.set_peers(BTreeMap::new());
    assert_eq!(first(from(1)), First::Drop(Reason::QuicPeersOnly));
}

// Protects clients that another server at this address gave a token to, or that kept one of an
// earlier release in another form: RFC 9000, 8.1.3.
#[test]
fn a_token_of_another_server_is_no_token() {
    let admission = admission();
    let unknown: [&[u8]; 3] = [&[7], &[0x4d; 32], &[0; 300]];
    for token in unknown {
        let first = admission.first_packet(from(1), &DCID, token, 0, NOW, WALL);
        assert_eq!(first, accepted(), "{} bytes", token.len());
        admission.handshake_over(from(1), Entitlement::Unvalidated);
    }
    admission.set_stress(Level::Retry);
    for token in unknown {
        let first = admission.first_packet(from(1), &DCID, token, 0, NOW, WALL);
        assert_retry(&admission, first, from(1));
    }
    admission.set_stress(Level::Peers);
    let first = admission.first_packet(from(1), &DCID, unknown[0], 0, NOW, WALL);
    assert_eq!(first, First::Drop(Reason::QuicPeersOnly));
}

#[test]
fn tokens_serve_their_own_address_and_time() {
    let admission = admission();
    let minted = admission.retried(from(1));
    assert_eq!(
        admission.with_token(from(2), &minted, NOW),
        First::Drop(Reason::QuicBadToken)
    );
    let first = admission.first_packet(from(1), &DCID, &minted.token, 0, NOW, WALL);
    assert_eq!(
        first,
        First::Drop(Reason::QuicBadToken),
        "another destination ID"
    );
    let late = NOW + (2 << HANDSHAKE_EPOCH_SHIFT);
    let first = admission.with_token(from(1), &minted, late);
    assert_eq!(first, First::Drop(Reason::QuicExpiredToken));
    assert_eq!(
        admission.with_token(from(1), &minted, NOW),
        accepted_by_token()
    );
}

#[test]
fn a_shown_address_is_charged() {
    let refused = First::Drop(Reason::QuicSourceRate);
    // By tokens: a burst of three.
    let admission = admission();
    let minted = admission.retried(from(1));
    let firsts = [(); 4].map(|()| admission.with_token(from(1), &minted, NOW));
    assert_eq!(
        firsts,
        [
            accepted_by_token(),
            accepted_by_token(),
            accepted_by_token(),
            refused
        ]
    );
    assert_eq!(admission.plain(from(1)), refused);
    assert_eq!(admission.plain(from(2)), accepted());
}

// Protects the owners of addresses that others forge.
#[test]
fn an_address_that_was_not_shown_is_not_charged() {
    let admission = admission();
    for _ in 0..100 {
        admission.plain(from(1));
    }
    assert_eq!(
        admission.with_token(from(1), &admission.retried(from(1)), NOW),
        accepted_by_token()
    );
    // Completed handshakes do show it.
    for _ in 0..2 {
        admission.validated(from(1), NOW);
    }
    assert_eq!(
        admission.plain(from(1)),
        First::Drop(Reason::QuicSourceRate)
    );
}

#[test]
fn connections_are_capped_exactly() {
    let admission = admission();
    let (one, same) = (
        from(1),
        SocketAddr::new("::ffff:192.0.1.1".parse().unwrap(), 9),
    );
    assert_eq!(
        [admission.opened(one), admission.opened(same)],
        [Ok(()), Ok(())]
    );
    assert_eq!(admission.connections(Source::of(one.ip())), 2);
    assert_eq!(admission.opened(one), Err(Reason::QuicSourceCap));
    assert_eq!(admission.plain(one), First::Drop(Reason::QuicSourceCap));
    admission.closed(same);
    assert_eq!(admission.plain(one), accepted());
    assert_eq!(admission.opened(one), Ok(()));
    assert_eq!(admission.opened(one), Err(Reason::QuicSourceCap));
}

#[test]
fn sources_are_bounded_and_forgotten() {
    let admission = admission();
    for host in 0..3 {
        assert_eq!(admission.opened(from(host)), Ok(()));
    }
    assert_eq!(admission.opened(from(3)), Err(Reason::QuicSourceCap));
    admission.closed(from(0));
    assert_eq!(admission.connections(Source::of(from(0).ip())), 0);
    assert_eq!(admission.opened(from(3)), Ok(()));
}

#[test]
fn without_a_cap_connections_are_only_counted() {
    let config = AdmissionConfig {
        caps: Caps { quic: 0, tcp: 0 },
        ..config()
    };
    let admission = Admission::new(config, NOW, numbered());
    for _ in 0..50 {
        assert_eq!(admission.opened(from(1)), Ok(()));
    }
    assert_eq!(admission.connections(Source::of(from(1).ip())), 50);
}

#[test]
fn limits_change_while_connections_are_open() {
    let admission = admission();
    admission.opened(from(1)).unwrap();
    admission.opened(from(1)).unwrap();
    let AdmissionConfig { limits, .. } = config();
    admission.set_limits(limits, Caps { quic: 1, tcp: 0 });
    admission.closed(from(1));
    assert_eq!(admission.opened(from(1)), Err(Reason::QuicSourceCap));
    admission.set_limits(limits, Caps { quic: 3, tcp: 0 });
    assert_eq!(admission.opened(from(1)), Ok(()));

    let unvalidated = Limit::per(1, Duration::from_secs(1), 1);
    admission.set_limits(
        Limits {
            unvalidated,
            ..limits
        },
        config().caps,
    );
    assert_eq!(admission.plain(from(2)), accepted());
    assert_retry(&admission, admission.plain(from(2)), from(2));
}

#[test]
fn threads_never_pass_the_cap() {
    let admission = admission();
    let hammer = || {
        for _ in 0..2_000 {
            if admission.opened(from(1)).is_ok() {
                assert!((1..=2).contains(&admission.connections(Source::of(from(1).ip()))));
                admission.closed(from(1));
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(hammer);
        scope.spawn(hammer);
        hammer();
    });
    assert_eq!(admission.connections(Source::of(from(1).ip())), 0);
}

#[test]
fn what_the_kernel_charges_is_not_charged_twice() {
    let admission = admission();
    admission.set_kernel_charges(true);
    for nonce in 0..50 {
        assert_eq!(admission.plain(from(1)), accepted());
        let peer = First::Accept(Entitlement::Peer(NODE));
        assert_eq!(admission.prove(from(1), nonce), peer);
        let minted = admission.retried(from(1));
        assert_eq!(
            admission.with_token(from(1), &minted, NOW),
            accepted_by_token()
        );
        admission.validated(from(1), NOW);
    }
    // Tokens, half-open handshakes and caps remain.
    let minted = admission.retried(from(2));
    assert_eq!(
        admission.with_token(from(1), &minted, NOW),
        First::Drop(Reason::QuicBadToken)
    );
    let first = admission.first_packet(from(1), &DCID, &[], 10, NOW, WALL);
    assert_retry(&admission, first, from(1));
    admission.opened(from(1)).unwrap();
    admission.opened(from(1)).unwrap();
    assert_eq!(admission.plain(from(1)), First::Drop(Reason::QuicSourceCap));
}

// Protects the limits: the kernel passes a packet with an ID of this node unchecked, so such a
// packet must not begin a connection.
#[test]
fn our_own_ids_begin_nothing() {
    let admission = admission();
    let place = Place {
        shard: 0,
        generation: 1,
        slot: 2,
    };
    let keys = admission.keys();
    for id in [
        LocalCid::issue_roaming(place, 0, &keys, NOW),
        LocalCid::issue_handshake(place, 0, from(1), &keys, NOW),
    ] {
        let first = admission.first_packet(from(1), &id, &[], 0, NOW, WALL);
        assert_eq!(first, First::Drop(Reason::QuicUnknownId));
    }
}

#[test]
fn ids_of_a_wrong_length_are_refused() {
    let admission = admission();
    for len in 0..40 {
        let first = admission.first_packet(from(1), &vec![1; len], &[], 99, NOW, WALL);
        assert_eq!(
            matches!(first, First::Retry(_)),
            (8..=20).contains(&len),
            "{len}: {first:?}"
        );
    }
}

#[test]
fn a_turn_of_the_sketch_forgets_nobody() {
    let (admission, mut random) = (admission(), numbered());
    let refused = First::Drop(Reason::QuicSourceRate);
    let first = |now_ns| admission.first_packet(from(1), &DCID, &[], 0, now_ns, WALL);
    let due_at = admission.housekeeping().rotation.due_at_ns();
    for _ in 0..3 {
        admission.validated(from(1), due_at - 1);
    }
    assert_eq!(first(due_at - 1), refused);
    admission.tick(due_at, &mut random);
    assert_eq!(admission.present().active, 1);
    assert_eq!(first(due_at), refused);
    assert_eq!(first(due_at + 60_000_000_000), accepted());
}

#[test]
fn keys_change_with_the_epoch() {
    let (admission, mut random) = (admission(), numbered());
    let before = admission.keys();
    let next_epoch = ((NOW >> ROAMING_EPOCH_SHIFT) + 1) << ROAMING_EPOCH_SHIFT;
    assert!(!admission.tick(next_epoch - 1, &mut random));
    assert_eq!(admission.keys(), before);
    assert!(admission.tick(next_epoch, &mut random));
    assert_eq!(admission.keys().active, (before.active + 1) % 4);
    // A Retry from before the change of keys is still valid.
    let minted = token::mint(&DCID, from(1), &before, next_epoch - 1).unwrap();
    assert_eq!(
        admission.with_token(from(1), &minted, next_epoch),
        accepted_by_token()
    );
}
