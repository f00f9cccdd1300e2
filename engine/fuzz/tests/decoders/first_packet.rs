//! What stands in the header of a QUIC packet: IDs, tokens, proofs. The edge reads it in the
//! kernel's way, the transport by quiche; both must read the same.

use std::net::SocketAddr;

use millrace_edge_policy::cid::{
    HANDSHAKE_EPOCH_SHIFT, Keys, Kind, LocalCid, Place, ROAMING_EPOCH_SHIFT, dcid_of,
};
use millrace_edge_policy::packet::{ID_BYTES_MAX, INITIAL_BYTES_MIN, Quic};
use millrace_edge_policy::{proof, token};
use millrace_fuzz::{Seed, target};

use crate::{assert_label, key};

/// Later than two epochs of roaming IDs, so that there are epochs to expire from.
pub(crate) const NOW_NS: u64 = 3 << ROAMING_EPOCH_SHIFT;
pub(crate) const WALL_NS: u64 = 1_800_000_000_000_000_000;
/// The tag of the one registry peer.
pub(crate) const PEER: u32 = 0x0403_0201;

pub(crate) fn keys() -> Keys {
    Keys {
        keys: [1, 2, 3, 4].map(key),
        active: 1,
    }
}

pub(crate) fn client() -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 7], 40_000))
}

pub(crate) fn peer_proof() -> [u8; proof::BYTES] {
    proof::make(5, PEER, [6; 6], client().ip(), WALL_NS, key(9))
}

/// The token that the client of the seeds was given, and the ID to bring it back with.
pub(crate) fn retried() -> token::Minted {
    token::mint(&[0xdd; 8], client(), &keys(), NOW_NS).unwrap()
}

/// A long header, filled up to the size of a first packet (RFC 9000, 17.2).
fn long(first: u8, version: u32, destination_id: &[u8], token: &[u8]) -> Vec<u8> {
    let mut payload = vec![first];
    payload.extend(version.to_be_bytes());
    payload.push(destination_id.len() as u8);
    payload.extend(destination_id);
    payload.push(5);
    payload.extend([0x55; 5]);
    payload.push(token.len() as u8);
    payload.extend(token);
    payload.resize(INITIAL_BYTES_MIN, 0);
    payload
}

/// Payloads of UDP, one of each class.
pub(crate) fn payloads() -> Vec<Seed> {
    let place = Place {
        shard: 1,
        generation: 9,
        slot: 77,
    };
    let roaming = LocalCid::issue_roaming(place, 3, &keys(), NOW_NS);
    let handshake = LocalCid::issue_handshake(place, 3, client(), &keys(), NOW_NS);
    let retried = retried();
    let mut negotiation = long(0x80, 0, &[8; 8], &[]);
    negotiation.truncate(1 + 4 + 1 + 8 + 1 + 5);
    negotiation.extend(1_u32.to_be_bytes());
    vec![
        Seed::new("initial", long(0xc0, 1, &[0xdd; 8], &[])),
        Seed::new("initial-proof", long(0xc0, 1, &peer_proof(), &[])),
        Seed::new(
            "initial-token",
            long(0xc0, 1, &retried.retry_id, &retried.token),
        ),
        Seed::refused("zero-rtt", long(0xd0, 1, &[0xdd; 8], &[])),
        Seed::new("handshake", long(0xe0, 1, &handshake, &[])),
        Seed::new("retry", long(0xf0, 1, &handshake, &[])),
        Seed::new("other-version", long(0xc0, 0x1a2a_3a4a, &[7; 20], &[])),
        Seed::refused("long-id", long(0xc0, 0x1a2a_3a4a, &[7; 40], &[])),
        Seed::new("version-negotiation", negotiation),
        Seed::new("short", [&[0x40], &roaming[..], &[0; 23]].concat()),
    ]
}

target!(
    /// Protects a connection from a kernel that steers or drops by another ID than the one that
    /// quiche reads.
    quic_header, payloads, |bytes| {
        let mut copy = bytes.to_vec();
        let theirs = quiche::Header::from_slice(&mut copy, LocalCid::BYTES);
        let routed = dcid_of(bytes);
        if let Some((id, is_long)) = routed {
            assert!(id.len() <= ID_BYTES_MAX);
            assert_eq!(is_long, bytes[0] & 0x80 != 0);
        }
        let parsed = Quic::parse(bytes);
        match parsed {
            Ok(Quic::DialRequest) => assert!(bytes[0] & 0xc0 == 0, "may be QUIC (RFC 9443)"),
            Ok(Quic::Known(id)) => {
                assert_eq!(routed.map(|(id, _)| id), Some(id));
                if let Ok(header) = theirs {
                    assert_eq!(header.dcid.as_ref(), id);
                }
            }
            Ok(Quic::Version {
                destination_id,
                source_id,
            }) => {
                assert!(bytes.len() >= INITIAL_BYTES_MIN, "its answer would amplify");
                assert_eq!(routed, Some((destination_id, true)));
                if let Ok(header) = theirs {
                    assert!(!quiche::version_is_supported(header.version));
                    assert_eq!(header.dcid.as_ref(), destination_id);
                    assert_eq!(header.scid.as_ref(), source_id);
                }
            }
            Ok(Quic::Initial(initial)) => {
                assert_eq!(routed, Some((initial.destination_id, true)));
                assert_eq!(initial.datagram_bytes, bytes.len());
                match (initial.token(), theirs) {
                    (Ok(token), Ok(header)) => {
                        assert_eq!(header.ty, quiche::Type::Initial);
                        assert_eq!(header.dcid.as_ref(), initial.destination_id);
                        assert_eq!(header.scid.as_ref(), initial.source_id);
                        assert_eq!(header.token.as_deref(), Some(token));
                    }
                    (Err(reason), Err(_)) => assert_label(reason.label()),
                    disagree => panic!("{disagree:?}"),
                }
            }
            Err(reason) => {
                assert_label(reason.label());
                // Without the fixed bit it is not QUIC version 1, and early data is refused.
                let opens = theirs.is_ok_and(|header| {
                    let is_supported = quiche::version_is_supported(header.version);
                    is_supported && header.ty == quiche::Type::Initial
                });
                assert!(!opens || bytes[0] & 0x40 == 0, "{reason:?}");
            }
        }
        parsed.is_ok()
    }
);

fn connection_ids() -> Vec<Seed> {
    let place = Place {
        shard: 255,
        generation: 9,
        slot: 0x00ff_fffe,
    };
    let now = |kind: &str, ns| match kind {
        "handshake" => LocalCid::issue_handshake(place, 3, client(), &keys(), ns),
        _ => LocalCid::issue_roaming(place, 0xffff, &keys(), ns),
    };
    let epochs = |shift: u32, ago: u64| NOW_NS - (ago << shift);
    vec![
        Seed::new("handshake", now("handshake", NOW_NS)),
        Seed::new("roaming", now("roaming", NOW_NS)),
        Seed::new(
            "handshake-before",
            now("handshake", epochs(HANDSHAKE_EPOCH_SHIFT, 1)),
        ),
        Seed::refused(
            "roaming-expired",
            now("roaming", epochs(ROAMING_EPOCH_SHIFT, 2)),
        ),
    ]
}

/// The ID of the same fields that this node issues, at `now_ns`.
fn issued(cid: &LocalCid, now_ns: u64) -> [u8; LocalCid::BYTES] {
    let keys = Keys {
        active: cid.key,
        ..keys()
    };
    match cid.kind {
        Kind::Handshake => {
            LocalCid::issue_handshake(cid.place(), cid.nonce, client(), &keys, now_ns)
        }
        Kind::Roaming => LocalCid::issue_roaming(cid.place(), cid.nonce, &keys, now_ns),
    }
}

target!(
    /// Protects connections: an ID that is accepted is one that this node issued, in this epoch of
    /// its kind or the one before.
    connection_id, connection_ids, |bytes| {
        let Some(cid) = LocalCid::decode(bytes) else {
            assert_ne!(bytes.len(), LocalCid::BYTES);
            return false;
        };
        assert_eq!(cid.encode()[..], *bytes);
        assert!(LocalCid::owner(bytes, 7) < 7);
        let epoch_ns = match cid.kind {
            Kind::Handshake => 1 << HANDSHAKE_EPOCH_SHIFT,
            Kind::Roaming => 1 << ROAMING_EPOCH_SHIFT,
        };
        let is_accepted = LocalCid::check(bytes, &keys(), client(), NOW_NS).is_ok();
        if is_accepted {
            let made = [NOW_NS, NOW_NS - epoch_ns].map(|ns| issued(&cid, ns));
            assert!(made.iter().any(|id| id[..] == *bytes));
        }
        // Any fields make an ID that is accepted until the end of the next epoch.
        let own = issued(&cid, NOW_NS);
        let accepted = |now_ns| LocalCid::check(&own, &keys(), client(), now_ns).is_ok();
        assert!(accepted(NOW_NS) && accepted(NOW_NS + epoch_ns));
        assert!(!accepted(NOW_NS + 2 * epoch_ns) && !accepted(NOW_NS + 32 * epoch_ns));
        is_accepted
    }
);

/// The ID that brings the token, then the token.
fn tokens() -> Vec<Seed> {
    let seed = |name, original: &[u8], ns| {
        let minted = token::mint(original, client(), &keys(), ns).unwrap();
        Seed::new(name, [&minted.retry_id[..], &minted.token].concat())
    };
    vec![
        seed("shortest", &[0xdd; 8], NOW_NS),
        seed("longest", &[0xee; ID_BYTES_MAX], NOW_NS),
        Seed {
            is_accepted: false,
            ..seed("expired", &[0xdd; 8], NOW_NS - (2 << HANDSHAKE_EPOCH_SHIFT))
        },
    ]
}

target!(
    /// Protects addresses: a token that opens is one that this node gave to this client.
    token, tokens, |bytes| {
        let Some((id, token)) = bytes.split_first_chunk::<{ token::RETRY_ID_BYTES }>() else {
            return false;
        };
        let opened = token::open(token, id, client(), &keys(), NOW_NS);
        match opened {
            Ok(original) => {
                let keys = Keys {
                    active: token[1] >> 5 & 3,
                    ..keys()
                };
                let before_ns = NOW_NS - (1 << HANDSHAKE_EPOCH_SHIFT);
                let given = [NOW_NS, before_ns].map(|ns| {
                    let minted = token::mint(original.as_bytes(), client(), &keys, ns).unwrap();
                    (minted.retry_id, minted.token)
                });
                assert!(given.iter().any(|(i, t)| i == id && t[..] == *token));
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        let elsewhere = SocketAddr::from(([192, 0, 2, 8], 40_000));
        assert!(token::open(token, id, elsewhere, &keys(), NOW_NS).is_err());
        // Any ID of a client that may be one makes a token that opens.
        if let Some(minted) = token::mint(token, client(), &keys(), NOW_NS) {
            let opened = token::open(&minted.token, &minted.retry_id, client(), &keys(), NOW_NS);
            assert_eq!(opened.map(|id| id.as_bytes().to_vec()), Ok(token.to_vec()));
        } else {
            assert!(!(8..=ID_BYTES_MAX).contains(&token.len()));
        }
        opened.is_ok()
    }
);

fn proofs() -> Vec<Seed> {
    let seed = |name, wall_ns| {
        let proof = proof::make(5, PEER, [6; 6], client().ip(), wall_ns, key(9));
        Seed::new(name, proof)
    };
    let epoch_ns = 1 << proof::EPOCH_SHIFT;
    vec![
        seed("now", WALL_NS),
        seed("ahead", WALL_NS + epoch_ns),
        seed("behind", WALL_NS - epoch_ns),
        Seed {
            is_accepted: false,
            ..seed("expired", WALL_NS - 2 * epoch_ns)
        },
    ]
}

target!(
    /// Protects the room that members have: a proof that is accepted is one that a holder of the
    /// pair's key made, for this address and about now.
    proof, proofs, |bytes| {
        assert_eq!(proof::nonce_of(bytes).is_some(), bytes.len() == proof::BYTES);
        let check = |id: &[u8], number| {
            proof::check(id, client().ip(), WALL_NS, |_| Some(key(number)))
        };
        let Some(nonce) = proof::nonce_of(bytes) else {
            assert_eq!(check(bytes, 9), None);
            return false;
        };
        let tag = proof::node_tag_of(&bytes[2..6]);
        let made = |wall_ns, number| {
            proof::make(bytes[0], tag, nonce, client().ip(), wall_ns, key(number))
        };
        let epoch_ns = 1 << proof::EPOCH_SHIFT;
        let epochs = [WALL_NS - epoch_ns, WALL_NS, WALL_NS + epoch_ns];
        let found = check(bytes, 9);
        if let Some(found) = found {
            assert_eq!(found, tag);
            assert!(epochs.iter().any(|wall_ns| made(*wall_ns, 9)[..] == *bytes));
        }
        let refused = proof::check(bytes, client().ip(), WALL_NS, |_| None);
        assert_eq!(refused, None);
        for wall_ns in epochs {
            assert_eq!(check(&made(wall_ns, 8), 8), Some(tag));
        }
        found.is_some()
    }
);
