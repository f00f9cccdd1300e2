//! Bounds of half-open handshakes: against a list of all open ones, through the whole admission,
//! and from many threads.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::super::{Admission, AdmissionConfig, First};
use super::*;
use crate::limiter::Limit;
use crate::reason::Reason;
use crate::settings::Limits;
use crate::siphash::Key;
use crate::stress::Level;
use crate::token::{self, Minted, OriginalId};
use crate::{proof, settings};

const NOW: u64 = 5_000_000_000_000;
const WALL: u64 = 1_700_000_000_000_000_000;
const DCID: [u8; 8] = [3, 1, 4, 1, 5, 9, 2, 6];
const PEERS: [u32; 2] = [77, 78];
const PAIR: Key = Key { k0: 5, k1: 6 };

/// Few enough that they share prefixes at every level; the last is the first one's /24, as an
/// address.
const ADDRESSES: [&str; 10] = [
    "192.0.2.1",
    "192.0.2.2",
    "::ffff:192.0.2.1",
    "192.0.3.1",
    "2001:db8:1:2300::1",
    "2001:db8:1:2300::2",
    "2001:db8:1:2301::1",
    "2001:db8:1:2400::1",
    "2001:db8:2::1",
    "192.0.2.0",
];

/// Counts by looking at everything that is open.
struct Oracle {
    source_max: usize,
    peer_max: usize,
    open: Vec<(IpAddr, Entitlement)>,
}

/// The part of an address that it shares with others at a level; nothing past its last level.
fn prefix(address: IpAddr, level: usize) -> Option<(bool, u128)> {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let host_bits = [0, 8].get(level)?;
            Some((true, u128::from(u32::from(v4) >> host_bits)))
        }
        IpAddr::V6(v6) => Some((false, u128::from(v6) >> [64, 72, 80].get(level)?)),
    }
}

impl Oracle {
    fn begin(&mut self, address: IpAddr, by: Entitlement) -> Result<(), Full> {
        let full = match by {
            Entitlement::Peer(_) => {
                let held = self.open.iter().filter(|(_, other)| *other == by).count();
                (self.peer_max > 0 && held >= self.peer_max).then_some(Full::Peer)
            }
            _ => {
                let is_full =
                    |(level, factor): (usize, usize)| self.is_full(address, by, level, factor);
                let levels = [1, 2, 4].into_iter().enumerate();
                let any = self.source_max > 0 && levels.into_iter().any(is_full);
                any.then_some(Full::Source)
            }
        };
        match full {
            Some(full) => Err(full),
            None => {
                self.open.push((address, by));
                Ok(())
            }
        }
    }

    fn is_full(&self, address: IpAddr, by: Entitlement, level: usize, factor: usize) -> bool {
        let Some(shared) = prefix(address, level) else {
            return false;
        };
        let is_there = |(other, by): &&(IpAddr, Entitlement)| {
            !matches!(by, Entitlement::Peer(_)) && prefix(*other, level) == Some(shared)
        };
        let there: Vec<_> = self.open.iter().filter(is_there).collect();
        let is_unvalidated = |open: &&&(IpAddr, Entitlement)| open.1 == Entitlement::Unvalidated;
        let unvalidated = there.iter().filter(is_unvalidated).count();
        let max = self.source_max * factor;
        there.len() >= max || by == Entitlement::Unvalidated && unvalidated >= max / 2
    }

    fn of_source(&self, address: IpAddr) -> usize {
        let same = |open: &&(IpAddr, Entitlement)| {
            !matches!(open.1, Entitlement::Peer(_)) && prefix(open.0, 0) == prefix(address, 0)
        };
        self.open.iter().filter(same).count()
    }

    fn of_peer(&self, tag: u32) -> usize {
        let of = |open: &&(IpAddr, Entitlement)| open.1 == Entitlement::Peer(tag);
        self.open.iter().filter(of).count()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Begin(IpAddr, Entitlement),
    /// Of those that are open.
    End(prop::sample::Index),
}

fn by_token() -> Entitlement {
    Entitlement::Token(OriginalId::new(&DCID).unwrap())
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let address = prop::sample::select(&ADDRESSES[..]).prop_map(|text| text.parse().unwrap());
    let by = prop_oneof![
        4 => Just(Entitlement::Unvalidated),
        4 => Just(by_token()),
        1 => prop::sample::select(&PEERS[..]).prop_map(Entitlement::Peer),
    ];
    let step = prop_oneof![
        2 => (address, by).prop_map(|(address, by)| Step::Begin(address, by)),
        1 => any::<prop::sample::Index>().prop_map(Step::End),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #[test]
    fn agrees_with_a_list_of_all(steps in steps(), source_max in 0..6u32, peer_max in 0..4u32) {
        let machine = HandshakeCounts::new(source_max, peer_max);
        let mut oracle = Oracle {
            source_max: source_max as usize,
            peer_max: peer_max as usize,
            open: Vec::new(),
        };
        for step in steps {
            match step {
                Step::Begin(address, by) => {
                    let begun = machine.begin(Source::of(address), by);
                    prop_assert_eq!(begun, oracle.begin(address, by));
                }
                Step::End(_) if oracle.open.is_empty() => {}
                Step::End(index) => {
                    let (address, by) = oracle.open.swap_remove(index.index(oracle.open.len()));
                    machine.end(Source::of(address), by);
                }
            }
            for address in ADDRESSES.map(|text| text.parse().unwrap()) {
                let held = machine.of_source(Source::of(address)) as usize;
                prop_assert_eq!(held, oracle.of_source(address));
                prop_assert!(source_max == 0 || held <= source_max as usize);
            }
            for tag in PEERS {
                prop_assert_eq!(machine.of_peer(tag) as usize, oracle.of_peer(tag));
            }
            let held = machine.lock();
            let sources: BTreeSet<_> = held.levels.iter().map(BTreeMap::len).collect();
            prop_assert!(sources.last().is_some_and(|most| *most <= oracle.open.len()));
            prop_assert!(held.peers.len() <= oracle.open.len());
        }
        for (address, by) in oracle.open {
            machine.end(Source::of(address), by);
        }
        let held = machine.lock();
        prop_assert!(held.peers.is_empty() && held.levels.iter().all(BTreeMap::is_empty));
    }
}

/// Four for each source, three for each peer; rates and budgets as the test wants them.
fn admission(limits: Limits) -> Admission {
    let config = AdmissionConfig {
        limits,
        half_open_source_max: 4,
        half_open_peer_max: 3,
        sketch_buckets: 1 << 8,
        ..AdmissionConfig::default()
    };
    let mut number = 0u128;
    let random = || {
        number += 1;
        number.to_le_bytes()
    };
    let admission = Admission::new(config, NOW, random);
    admission.set_peers(PEERS.map(|tag| (tag, PAIR)).into());
    admission
}

fn free() -> Limits {
    Limits {
        unvalidated: Limit::NONE,
        source_quic: Limit::NONE,
        ..Limits::default()
    }
}

fn at(port: u16) -> SocketAddr {
    ([192, 0, 2, 1], port).into()
}

impl Admission {
    fn bare(&self, from: SocketAddr) -> First {
        self.first_packet(from, &DCID, &[], 0, NOW, WALL)
    }

    fn by_token(&self, from: SocketAddr) -> First {
        let minted = token::mint(&DCID, from, &self.keys(), NOW).unwrap();
        let Minted { retry_id, token } = &minted;
        self.first_packet(from, retry_id, token, 0, NOW, WALL)
    }

    fn by_proof(&self, from: SocketAddr, peer: u32, nonce: u8) -> First {
        let id = proof::make(9, peer, [nonce; 6], from.ip(), WALL, PAIR);
        self.first_packet(from, &id, &[], 0, NOW, WALL)
    }
}

const ACCEPTED: First = First::Accept(Entitlement::Unvalidated);

#[track_caller]
fn assert_retry(first: First) {
    assert!(matches!(first, First::Retry(_)), "{first:?}");
}

// Protects the owner of an address that others forge: their packets take half of the bound, and get
// only Retries after that.
#[test]
fn a_forged_address_keeps_a_share_for_its_owner() {
    let admission = admission(free());
    let source = Source::of(at(0).ip());
    assert_eq!([1, 2].map(|port| admission.bare(at(port))), [ACCEPTED; 2]);
    for port in 3..100 {
        assert_retry(admission.bare(at(port)));
    }
    assert_eq!(admission.half_open(source), 2);
    let token = First::Accept(by_token());
    assert_eq!([5, 6].map(|port| admission.by_token(at(port))), [token; 2]);
    assert_eq!(admission.by_token(at(7)), First::Full(Full::Source));
    assert_retry(admission.bare(at(8)));
    assert_eq!(admission.half_open(source), 4);
    // When any of them ends, a handshake with a token may take its place; one without a token only
    // that of another without.
    admission.handshake_over(at(5), by_token());
    assert_retry(admission.bare(at(8)));
    assert_eq!(admission.by_token(at(7)), token);
    admission.handshake_over(at(1), Entitlement::Unvalidated);
    assert_eq!(admission.bare(at(8)), ACCEPTED);
    assert_eq!(admission.half_open(source), 4);
}

#[test]
fn without_forgeries_a_source_has_all_of_its_bound() {
    let admission = admission(free());
    let token = First::Accept(by_token());
    assert_eq!(
        [1, 2, 3, 4].map(|port| admission.by_token(at(port))),
        [token; 4]
    );
    assert_eq!(admission.by_token(at(5)), First::Full(Full::Source));
    assert_retry(admission.bare(at(5)));
}

#[test]
fn peers_are_bounded_by_themselves_and_by_nobody_else() {
    let admission = admission(free());
    for port in 0..10 {
        admission.by_token(at(port));
    }
    let [one, two] = PEERS;
    let accepted = |peer| First::Accept(Entitlement::Peer(peer));
    let firsts = [1, 2, 3, 4].map(|nonce| admission.by_proof(at(9), one, nonce));
    let full = First::Full(Full::Peer);
    assert_eq!(firsts, [accepted(one), accepted(one), accepted(one), full]);
    // The peer comes from another address too; the other peer has its own bound.
    let elsewhere = ([198, 51, 100, 1], 9).into();
    assert_eq!(admission.by_proof(elsewhere, one, 5), full);
    assert_eq!(admission.by_proof(at(9), two, 6), accepted(two));
    // None of that counts for the source.
    assert_eq!(admission.half_open(Source::of(at(0).ip())), 4);
    assert_eq!(admission.by_token(elsewhere), First::Accept(by_token()));
    admission.handshake_over(at(9), Entitlement::Peer(one));
    assert_eq!(admission.half_open_of_peer(one), 2);
    admission.set_stress(Level::Peers);
    assert_eq!(admission.by_proof(elsewhere, one, 7), accepted(one));
}

// What the kernel charges, it charges for packets; how handshakes end it does not see.
#[test]
fn the_bounds_hold_where_the_kernel_charges_too() {
    let admission = admission(free());
    admission.set_kernel_charges(true);
    assert_eq!([1, 2].map(|port| admission.bare(at(port))), [ACCEPTED; 2]);
    assert_retry(admission.bare(at(3)));
    let token = First::Accept(by_token());
    assert_eq!([5, 6].map(|port| admission.by_token(at(port))), [token; 2]);
    assert_eq!(admission.by_token(at(7)), First::Full(Full::Source));
    let firsts = [1, 2, 3, 4].map(|nonce| admission.by_proof(at(9), PEERS[0], nonce));
    assert_eq!(firsts[3], First::Full(Full::Peer));
}

#[test]
fn what_is_refused_holds_and_costs_nothing() {
    let hour = |burst| Limit::per(1, Duration::from_secs(3_600), burst);
    let limits = Limits {
        unvalidated: hour(1),
        source_quic: hour(5),
        peer: hour(2),
        proof: hour(1),
        ..free()
    };
    let admission = admission(limits);
    let source = Source::of(at(0).ip());
    // The budget is spent: a client that gets a Retry holds nothing.
    assert_eq!(admission.bare(at(1)), ACCEPTED);
    assert_retry(admission.bare(at(2)));
    assert_eq!(admission.half_open(source), 1);
    admission.handshake_over(at(1), Entitlement::Unvalidated);
    // Packets that were refused for lack of room cost no rate: four, and the fifth of the burst
    // once there is room again.
    for port in 1..=4 {
        assert_eq!(admission.by_token(at(port)), First::Accept(by_token()));
    }
    for port in 5..20 {
        assert_eq!(admission.by_token(at(port)), First::Full(Full::Source));
    }
    admission.handshake_over(at(1), by_token());
    assert_eq!(admission.by_token(at(5)), First::Accept(by_token()));
    admission.handshake_over(at(2), by_token());
    let refused = First::Drop(Reason::QuicSourceRate);
    assert_eq!(admission.by_token(at(6)), refused);
    assert_eq!(admission.half_open(source), 3);
    // A proof that was used before, and a peer that dials too often.
    let first = |nonce| admission.by_proof(at(1), PEERS[0], nonce);
    assert!(matches!(first(1), First::Accept(_)));
    assert_eq!(first(1), First::Drop(Reason::QuicProofReplayed));
    assert!(matches!(first(2), First::Accept(_)));
    assert_eq!(first(3), First::Drop(Reason::QuicPeerBudget));
    assert_eq!(admission.half_open_of_peer(PEERS[0]), 2);
    assert_eq!(settings::levels(hour(5)).len(), LEVEL_FACTORS.len());
}

#[test]
fn threads_never_pass_the_bound() {
    const ROUNDS: usize = 3_000;
    let admission = admission(free());
    let held = AtomicU32::new(0);
    let (most, full) = (AtomicU32::new(0), AtomicU32::new(0));
    let hammer = |port: u16| {
        let mut mine = Vec::new();
        for round in 0..ROUNDS {
            let first = if round % 3 == 0 {
                admission.bare(at(port))
            } else {
                admission.by_token(at(port))
            };
            if let First::Accept(by) = first {
                most.fetch_max(held.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                mine.push(by);
            } else {
                full.fetch_add(1, Ordering::SeqCst);
            }
            // Seldom enough that each thread meets the bound even if it runs alone.
            if round % 7 == 0 || round + 1 == ROUNDS {
                for by in mine.drain(..) {
                    // Before the guard is given back, so that this count never exceeds the one in
                    // the table.
                    held.fetch_sub(1, Ordering::SeqCst);
                    admission.handshake_over(at(port), by);
                }
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| hammer(1));
        scope.spawn(|| hammer(2));
        hammer(3);
    });
    assert!(most.into_inner() <= 4);
    assert!(full.into_inner() > 0, "the bound was never reached");
    assert_eq!(admission.half_open(Source::of(at(0).ip())), 0);
}
