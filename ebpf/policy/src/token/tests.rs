//! Tokens: the layout shared with the kernel, the addresses that may use them, and their lifetime.

use std::net::Ipv6Addr;

use proptest::prelude::*;

use super::*;
use crate::siphash::Key;

const EPOCH: u64 = 1 << HANDSHAKE_EPOCH_SHIFT;

fn keys(active: u8) -> Keys {
    let keys = std::array::from_fn(|i| Key {
        k0: 100 + i as u64,
        k1: 200 + i as u64,
    });
    Keys { keys, active }
}

fn client() -> SocketAddr {
    "192.0.2.1:4100".parse().unwrap()
}

fn original_ids() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), ID_BYTES_MIN..=ID_BYTES_MAX)
}

/// Everything that differs from `bytes` in one bit.
fn flipped<const N: usize>(bytes: [u8; N]) -> impl Iterator<Item = [u8; N]> {
    (0..N * 8).map(move |bit| {
        let mut flipped = bytes;
        flipped[bit / 8] ^= 1 << (bit % 8);
        flipped
    })
}

// Protects the agreement with the kernel's program, which makes the tokens that user space opens.
#[test]
fn layout_is_fixed() {
    let (keys, now_ns) = (keys(3), 45 * EPOCH + 1);
    let Minted { token, retry_id } =
        mint(&[8, 7, 6, 5, 4, 3, 2, 1, 9], client(), &keys, now_ns).unwrap();
    let mut head = [0; 24];
    head[..12].copy_from_slice(&[0x4d, (3 << 5) | (45 % 32), 9, 8, 7, 6, 5, 4, 3, 2, 1, 9]);
    assert_eq!(token[..24], head);
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
    let address = u64::from_le_bytes([0, 0, 0xff, 0xff, 192, 0, 2, 1]);
    let tag = siphash24(
        keys.keys[3],
        &[word(0), word(8), word(16), 0, address, 4_100, 45],
    );
    assert_eq!(token[24..], tag.to_le_bytes());
    assert_eq!(retry_id[0], 8);
    assert_eq!(retry_id[1..9], tag.to_le_bytes());
    assert_eq!(
        retry_id[9..],
        tag.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[..7]
    );
}

#[test]
fn only_possible_ids_get_a_token() {
    for len in 0..=40 {
        let minted = mint(&vec![1; len], client(), &keys(0), 0);
        assert_eq!(minted.is_some(), (8..=20).contains(&len), "{len} bytes");
    }
}

#[test]
fn tokens_expire_at_the_end_of_the_epoch_after_their_own() {
    let (keys, original) = (keys(0), [7; 8]);
    for epoch in 0..=64 {
        for minted_at in [epoch * EPOCH, (epoch + 1) * EPOCH - 1] {
            let minted = mint(&original, client(), &keys, minted_at).unwrap();
            let open = |now_ns| open(&minted.token, &minted.retry_id, client(), &keys, now_ns);
            assert!(open(minted_at).is_ok());
            assert!(open((epoch + 2) * EPOCH - 1).is_ok());
            assert_eq!(open((epoch + 2) * EPOCH), Err(BadToken::Expired));
            assert_eq!(open((epoch + 32) * EPOCH - 1), Err(BadToken::Expired));
            for rounds in [1, 2, 8] {
                let again = (epoch + rounds * 32) * EPOCH;
                assert_eq!(
                    open(again),
                    Err(BadToken::Forged),
                    "its bits have come round"
                );
            }
            if let Some(before) = (epoch * EPOCH).checked_sub(1) {
                assert_eq!(open(before), Err(BadToken::Forged), "from the future");
            }
        }
    }
}

// A token that only a holder of the keys could make is none either, if it has not the one form.
#[test]
fn form_is_checked_under_a_right_tag() {
    let keys = keys(0);
    let opened = |change: fn(&mut [u8; BYTES])| {
        let mut token = mint(&[7; 8], client(), &keys, 0).unwrap().token;
        change(&mut token);
        let tag = tag(&token, 0, client(), &keys);
        token[24..].copy_from_slice(&tag.to_le_bytes());
        let retry_id = retry_id(&OriginalId::new(&[7; 8]).unwrap(), tag);
        open(&token, &retry_id, client(), &keys, 0)
    };
    assert!(opened(|_| ()).is_ok());
    assert_eq!(opened(|token| token[0] = 0x4c), Err(BadToken::Unknown));
    assert_eq!(opened(|token| token[2] = 7), Err(BadToken::Unknown));
    assert_eq!(opened(|token| token[2] = 21), Err(BadToken::Unknown));
    assert_eq!(opened(|token| token[2] = 255), Err(BadToken::Unknown));
    assert_eq!(opened(|token| token[11] = 1), Err(BadToken::Unknown));
    assert_eq!(opened(|token| token[23] = 1), Err(BadToken::Unknown));
}

proptest! {
    #[test]
    fn round_trips(
        id in original_ids(),
        address: [u8; 16],
        port: u16,
        active in 0..4u8,
        now_ns in 0..u64::MAX / 2,
    ) {
        let (keys, client) = (keys(active), SocketAddr::from((address, port)));
        let Minted { token, retry_id } = mint(&id, client, &keys, now_ns).unwrap();
        let opened = open(&token, &retry_id, client, &keys, now_ns).unwrap();
        prop_assert_eq!(opened.as_bytes(), &id[..]);
        prop_assert_eq!(retry_id[0], id[0], "the shard stays");
    }

    #[test]
    fn every_bit_counts(id in original_ids(), port: u16, now_ns in 0..u64::MAX / 2) {
        let keys = keys(2);
        let address: Ipv6Addr = "2001:db8::77".parse().unwrap();
        let client = SocketAddr::from((address, port));
        let Minted { token, retry_id } = mint(&id, client, &keys, now_ns).unwrap();
        for forged in flipped(token) {
            let opened = open(&forged, &retry_id, client, &keys, now_ns);
            prop_assert!(matches!(opened, Err(BadToken::Forged | BadToken::Unknown)));
        }
        for other in flipped(retry_id) {
            let opened = open(&token, &other, client, &keys, now_ns);
            prop_assert_eq!(opened, Err(BadToken::Forged));
        }
        let elsewhere = flipped(address.octets())
            .map(|address| SocketAddr::from((address, port)))
            .chain((0..16).map(|bit| SocketAddr::from((address, port ^ 1 << bit))));
        for other in elsewhere {
            let opened = open(&token, &retry_id, other, &keys, now_ns);
            prop_assert_eq!(opened, Err(BadToken::Forged), "from {}", other);
        }
    }

    #[test]
    fn any_bytes_are_refused(
        token in prop::collection::vec(any::<u8>(), 0..40),
        id in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let opened = open(&token, &id, client(), &keys(0), 0);
        prop_assert!(matches!(opened, Err(BadToken::Forged | BadToken::Unknown)));
    }
}

#[test]
fn another_length_is_refused() {
    let keys = keys(0);
    let Minted { token, retry_id } = mint(&[7; 20], client(), &keys, 0).unwrap();
    let longer = [&token[..], &[0]].concat();
    for token in [&token[..31], &longer, &[]] {
        assert_eq!(
            open(token, &retry_id, client(), &keys, 0),
            Err(BadToken::Unknown)
        );
    }
    for id in [&retry_id[..15], &[], &[7; 20]] {
        assert_eq!(open(&token, id, client(), &keys, 0), Err(BadToken::Forged));
    }
}

#[test]
fn ipv4_is_the_same_however_it_is_written() {
    let keys = keys(0);
    let minted = mint(&[7; 8], client(), &keys, 0).unwrap();
    let mapped = "[::ffff:192.0.2.1]:4100".parse().unwrap();
    assert!(open(&minted.token, &minted.retry_id, mapped, &keys, 0).is_ok());
}
