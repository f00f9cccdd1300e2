//! Connection IDs: the layout shared with the kernel, the addresses that may use them, and their
//! lifetime.

use proptest::prelude::*;

use super::*;
use crate::siphash::Key;

const EPOCH: u64 = 1 << HANDSHAKE_EPOCH_SHIFT;
const ROAMING_EPOCH: u64 = 1 << ROAMING_EPOCH_SHIFT;
const PLACE: Place = Place {
    shard: 3,
    generation: 9,
    slot: 0x03_0201,
};

fn keys(active: u8) -> Keys {
    let keys = std::array::from_fn(|i| Key {
        k0: 100 + i as u64,
        k1: 200 + i as u64,
    });
    Keys { keys, active }
}

fn peer() -> SocketAddr {
    "192.0.2.1:4100".parse().unwrap()
}

fn places() -> impl Strategy<Value = Place> {
    (any::<u8>(), any::<u8>(), 0..SLOTS_MAX).prop_map(|(shard, generation, slot)| Place {
        shard,
        generation,
        slot,
    })
}

/// Every ID that differs from `id` in one bit.
fn flipped(id: [u8; 16]) -> impl Iterator<Item = [u8; 16]> {
    (0..128).map(move |bit| (u128::from_le_bytes(id) ^ 1 << bit).to_le_bytes())
}

// Protects the agreement with the kernel's program: bytes and words as `docs/reference/edge.md` has
// them.
#[test]
fn layout_is_fixed() {
    let keys = keys(2);
    let now_ns = 5 * ROAMING_EPOCH + 37 * EPOCH;
    let id = LocalCid::issue_handshake(PLACE, 0x0605, peer(), &keys, now_ns);
    let about = (2 << 5) | (37 % 32);
    assert_eq!(id[..8], [3, 9, 1, 2, 3, about, 5, 6]);
    let words = [
        u64::from_le_bytes([3, 9, 1, 2, 3, about, 5, 6]),
        0,
        u64::from_le_bytes([0, 0, 0xff, 0xff, 192, 0, 2, 1]),
        4_100,
        now_ns >> 34,
    ];
    assert_eq!(id[8..], siphash24(keys.keys[2], &words).to_le_bytes());

    let id = LocalCid::issue_roaming(PLACE, 0x0605, &keys, now_ns);
    assert_eq!(id[..8], [3, 9, 1, 2, 3, 0x80 | 2 << 5 | 5, 5, 6]);
    let word = u64::from_le_bytes([3, 9, 1, 2, 3, 0x80 | 2 << 5 | 5, 5, 6]);
    assert_eq!(id[8..], siphash24(keys.keys[2], &[word, 5]).to_le_bytes());
}

#[test]
fn reads_its_own_form_only() {
    let id = LocalCid::issue_roaming(PLACE, 7, &keys(1), 0);
    let cid = LocalCid::decode(&id).unwrap();
    assert_eq!(
        (cid.place(), cid.nonce, cid.kind, cid.key),
        (PLACE, 7, Kind::Roaming, 1)
    );
    assert_eq!(LocalCid::decode(&id[..15]), None);
    assert_eq!(LocalCid::decode(&[0; 17]), None);
    assert_eq!(
        LocalCid::check(&id[..15], &keys(1), peer(), 0),
        Err(BadId::Unknown)
    );
}

#[test]
#[should_panic(expected = "does not fit")]
fn a_slot_beyond_the_layout_is_a_defect() {
    LocalCid::issue_roaming(
        Place {
            slot: SLOTS_MAX,
            ..PLACE
        },
        0,
        &keys(0),
        0,
    );
}

#[test]
fn a_handshake_id_belongs_to_one_address() {
    let keys = keys(0);
    let id = LocalCid::issue_handshake(PLACE, 1, peer(), &keys, 0);
    for (from, expected) in [
        ("192.0.2.1:4100", true),
        ("[::ffff:192.0.2.1]:4100", true),
        ("192.0.2.1:4101", false),
        ("192.0.2.2:4100", false),
        ("[2001:db8::1]:4100", false),
    ] {
        let checked = LocalCid::check(&id, &keys, from.parse().unwrap(), 0);
        assert_eq!(checked.is_ok(), expected, "{from}");
        assert!(expected || checked == Err(BadId::Unknown));
    }
}

// Also protects the end of an epoch's five bits: the lives of IDs begin in all of them once.
#[test]
fn ids_expire_at_the_end_of_the_epoch_after_their_own() {
    let keys = keys(3);
    for epoch in 0..=64 {
        for (length, kind) in [(EPOCH, Kind::Handshake), (ROAMING_EPOCH, Kind::Roaming)] {
            for issued_at in [epoch * length, (epoch + 1) * length - 1] {
                let id = LocalCid::issue(PLACE, 1, kind, peer(), &keys, issued_at);
                let check = |now_ns| LocalCid::check(&id, &keys, peer(), now_ns).map(|_| ());
                assert_eq!(check(issued_at), Ok(()));
                assert_eq!(check((epoch + 2) * length - 1), Ok(()));
                assert_eq!(check((epoch + 2) * length), Err(BadId::Expired));
                assert_eq!(check((epoch + 32) * length - 1), Err(BadId::Expired));
                for rounds in [1, 2, 8] {
                    let again = (epoch + rounds * 32) * length;
                    assert_eq!(
                        check(again),
                        Err(BadId::Unknown),
                        "its bits have come round"
                    );
                }
                if let Some(before) = (epoch * length).checked_sub(1) {
                    assert_eq!(check(before), Err(BadId::Unknown), "from the future");
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn round_trips(
        place in places(),
        nonce: u16,
        now_ns in 0..u64::MAX / 2,
        active in 0..4u8,
        address: [u8; 16],
        port: u16,
    ) {
        let keys = keys(active);
        let peer = SocketAddr::from((address, port));
        for kind in [Kind::Handshake, Kind::Roaming] {
            let id = LocalCid::issue(place, nonce, kind, peer, &keys, now_ns);
            let cid = LocalCid::decode(&id).unwrap();
            prop_assert_eq!(cid.encode(), id);
            prop_assert_eq!((cid.place(), cid.nonce, cid.kind, cid.key), (place, nonce, kind, active));
            prop_assert_eq!(LocalCid::check(&id, &keys, peer, now_ns), Ok(cid));
        }
    }

    #[test]
    fn every_bit_counts(place in places(), nonce: u16, now_ns in 0..u64::MAX / 2, port: u16) {
        let keys = keys(1);
        let peer = SocketAddr::new("2001:db8::77".parse().unwrap(), port);
        for kind in [Kind::Handshake, Kind::Roaming] {
            let id = LocalCid::issue(place, nonce, kind, peer, &keys, now_ns);
            for forged in flipped(id) {
                let checked = LocalCid::check(&forged, &keys, peer, now_ns);
                prop_assert_eq!(checked, Err(BadId::Unknown));
            }
        }
        let id = LocalCid::issue_handshake(place, nonce, peer, &keys, now_ns);
        let elsewhere = flipped("2001:db8::77".parse::<std::net::Ipv6Addr>().unwrap().octets())
            .map(|address| SocketAddr::from((address, port)))
            .chain((0..16).map(|bit| SocketAddr::new(peer.ip(), port ^ 1 << bit)));
        for other in elsewhere {
            let checked = LocalCid::check(&id, &keys, other, now_ns);
            prop_assert_eq!(checked, Err(BadId::Unknown), "from {}", other);
        }
    }

    #[test]
    fn nobody_guesses_an_id(id: [u8; 16]) {
        prop_assert_eq!(LocalCid::check(&id, &keys(0), peer(), 0), Err(BadId::Unknown));
    }

    #[test]
    fn roaming_ids_are_replaced_in_time(now_ns in 0..u64::MAX / 2) {
        let keys = keys(0);
        let id = LocalCid::issue_roaming(PLACE, 0, &keys, now_ns);
        let at = reissue_at(now_ns);
        prop_assert!(at - now_ns > ROAMING_EPOCH / 2);
        prop_assert!(LocalCid::check(&id, &keys, peer(), at + ROAMING_EPOCH / 2 - 1).is_ok());
        prop_assert!(LocalCid::check(&id, &keys, peer(), at + ROAMING_EPOCH / 2).is_err());
    }
}

/// Keys that can be told apart.
fn numbered() -> impl FnMut() -> [u8; 16] {
    let mut number = 0u128;
    move || {
        number += 1;
        number.to_le_bytes()
    }
}

// Protects live connections: no key goes before the IDs that it signed.
#[test]
fn a_key_outlives_its_ids() {
    for late_ns in [0, 1, ROAMING_EPOCH - 1] {
        let mut random = numbered();
        let start_ns = 6 * ROAMING_EPOCH + 17;
        let mut schedule = KeySchedule::new(start_ns, &mut random);
        let mut issued = Vec::new();
        for step in 0..40 {
            let now_ns = start_ns + step * ROAMING_EPOCH / 4;
            if now_ns >= schedule.due_at_ns() + late_ns {
                assert!(schedule.advance(now_ns, &mut random));
            }
            let keys = schedule.keys();
            issued.push((now_ns, LocalCid::issue_roaming(PLACE, 0, &keys, now_ns)));
            for (issued_at, id) in &issued {
                let ends_at = ((issued_at >> ROAMING_EPOCH_SHIFT) + 2) << ROAMING_EPOCH_SHIFT;
                let checked = LocalCid::check(id, &keys, peer(), now_ns);
                assert_eq!(
                    checked.is_ok(),
                    now_ns < ends_at,
                    "late by {late_ns}, step {step}"
                );
            }
        }
    }
}

// Protects against replay: when the five bits of an epoch come round, the epoch has another key.
#[test]
fn an_old_id_never_counts_again() {
    let mut random = numbered();
    let mut schedule = KeySchedule::new(0, &mut random);
    let id = LocalCid::issue_roaming(PLACE, 0, &schedule.keys(), 0);
    for epoch in 1..=64 {
        schedule.advance(epoch * ROAMING_EPOCH, &mut random);
        let checked = LocalCid::check(&id, &schedule.keys(), peer(), epoch * ROAMING_EPOCH);
        assert_eq!(checked.is_ok(), epoch == 1, "epoch {epoch}");
    }
}

#[test]
fn keys_change_one_at_a_time() {
    let mut random = numbered();
    let mut schedule = KeySchedule::new(5 * ROAMING_EPOCH, &mut random);
    assert_eq!(schedule.keys().active, 1);
    assert_eq!(schedule.due_at_ns(), 6 * ROAMING_EPOCH);
    assert!(!schedule.advance(6 * ROAMING_EPOCH - 1, &mut random));
    let before = schedule.keys();
    assert!(schedule.advance(6 * ROAMING_EPOCH, &mut random));
    let after = schedule.keys();
    assert_eq!(after.active, 2);
    // The key that signs was there before; only the one for epoch 7 is new.
    let changed: Vec<_> = (0..4)
        .filter(|&i| before.keys[i] != after.keys[i])
        .collect();
    assert_eq!(changed, [7 % 4]);
    assert!(!schedule.advance(6 * ROAMING_EPOCH, &mut random));
    // A clock that goes back changes nothing.
    assert!(!schedule.advance(0, &mut random));
    assert_eq!(schedule.keys(), after);
}

#[test]
fn after_a_long_sleep_all_keys_are_new() {
    let mut random = numbered();
    let mut schedule = KeySchedule::new(5 * ROAMING_EPOCH, &mut random);
    let before = schedule.keys();
    assert!(schedule.advance(1_000 * ROAMING_EPOCH, &mut random));
    let after = schedule.keys();
    assert_eq!(after.active, 0);
    assert!(
        before
            .keys
            .iter()
            .zip(&after.keys)
            .all(|(before, after)| before != after)
    );
    assert_eq!(
        random(),
        9u128.to_le_bytes(),
        "four keys and four more were asked for"
    );
}

// Protects steering: the sum is shared with a program in the kernel.
#[test]
fn byte_0_steers() {
    let id = LocalCid::issue_roaming(PLACE, 0, &keys(0), 0);
    assert_eq!(LocalCid::owner(&id, 2), 1);
    assert_eq!(LocalCid::owner(&[], 2), 0);
    assert_eq!(LocalCid::owner(&[5], 0), 0);
    assert_eq!(LocalCid::owner(&initial_dcid(7, [0; 15]), 4), 3);
}

#[test]
fn reads_both_headers() {
    let mut long = vec![0xc0, 0, 0, 0, 1, 16];
    long.extend_from_slice(&[5; 16]);
    assert_eq!(dcid_of(&long), Some((&[5; 16][..], true)));
    assert_eq!(dcid_of(&long[..21]), None);
    long[5] = 21;
    long.extend_from_slice(&[5; 40]);
    assert_eq!(dcid_of(&long), None);
    let mut short = vec![0x40];
    short.extend_from_slice(&[6; 20]);
    assert_eq!(dcid_of(&short), Some((&[6; 16][..], false)));
    assert_eq!(dcid_of(&short[..16]), None);
    assert_eq!(dcid_of(&[]), None);
}

proptest! {
    #[test]
    fn any_datagram_is_read_or_refused(datagram in prop::collection::vec(any::<u8>(), 0..60)) {
        if let Some((cid, long)) = dcid_of(&datagram) {
            prop_assert!(cid.len() <= 20);
            prop_assert!(long || cid.len() == LocalCid::BYTES);
        } else {
            prop_assert!(datagram.len() < 27 || datagram[5] > 20);
        }
    }
}
