//! A table of datagrams, each a byte away from another class or reason.

use super::Quic;
use crate::packet::tests::with;
use crate::reason::Reason;

/// A long header with IDs of these lengths, and `rest` behind them.
pub(in crate::packet) fn long(
    first: u8,
    version: u32,
    destination: u8,
    source: u8,
    rest: &[u8],
) -> Vec<u8> {
    let mut payload = vec![first];
    payload.extend(version.to_be_bytes());
    payload.push(destination);
    payload.extend(vec![0xdd; destination.into()]);
    payload.push(source);
    payload.extend(vec![0x55; source.into()]);
    payload.extend(rest);
    payload
}

#[test]
fn quic_classes() {
    let dial_request = {
        let mut dial_request = vec![0x0d; 80];
        dial_request[2..6].copy_from_slice(b"dial");
        dial_request
    };
    let body = [0; 1_200];
    let id = [0xdd; 16];
    let cases: &[(&str, Vec<u8>, Result<Quic<'_>, Reason>)] = &[
        ("nothing", vec![], Err(Reason::QuicMalformed)),
        ("dial request", dial_request.clone(), Ok(Quic::DialRequest)),
        (
            "dial request of 79 bytes",
            dial_request[..79].to_vec(),
            Err(Reason::QuicFixedBit),
        ),
        (
            "dial request without its mark",
            with(dial_request, 2, b"dill"),
            Err(Reason::QuicFixedBit),
        ),
        (
            "short, ID",
            [&[0x40][..], &id].concat(),
            Ok(Quic::Known(&id)),
        ),
        (
            "short, 16 bytes",
            [&[0x40][..], &id[1..]].concat(),
            Err(Reason::QuicMalformed),
        ),
        ("short, no fixed bit", vec![0x3f], Err(Reason::QuicFixedBit)),
        (
            "long, 6 bytes",
            long(0xc0, 1, 0, 0, &[])[..6].to_vec(),
            Err(Reason::QuicMalformed),
        ),
        (
            "long, 7 bytes",
            long(0xe0, 1, 0, 0, &[]),
            Ok(Quic::Known(&[])),
        ),
        (
            "destination ID of 21",
            long(0xc0, 1, 21, 0, &body),
            Err(Reason::QuicIdLength),
        ),
        (
            "destination ID past the end",
            with(long(0xc0, 1, 4, 0, &[]), 5, &[5]),
            Err(Reason::QuicMalformed),
        ),
        (
            "source ID of 21",
            long(0xc0, 1, 8, 21, &body),
            Err(Reason::QuicIdLength),
        ),
        (
            "source ID past the end",
            with(long(0xc0, 1, 0, 0, &[]), 6, &[1]),
            Err(Reason::QuicMalformed),
        ),
        (
            "Version Negotiation",
            long(0x80, 0, 16, 3, &[]),
            Ok(Quic::Known(&id)),
        ),
        (
            "other version, short",
            long(0x80, 2, 16, 3, &[]),
            Err(Reason::QuicShortInitial),
        ),
        (
            "other version, long",
            long(0x80, 2, 16, 3, &body),
            Ok(Quic::Version {
                destination_id: &id,
                source_id: &[0x55; 3],
            }),
        ),
        (
            "no fixed bit",
            long(0x80, 1, 16, 3, &body),
            Err(Reason::QuicFixedBit),
        ),
        (
            "0-RTT",
            long(0xd0, 1, 16, 3, &body),
            Err(Reason::QuicZeroRtt),
        ),
        ("Handshake", long(0xe0, 1, 16, 3, &[]), Ok(Quic::Known(&id))),
        ("Retry", long(0xf0, 1, 16, 3, &[]), Ok(Quic::Known(&id))),
    ];
    for (name, payload, expected) in cases {
        assert_eq!(Quic::parse(payload), *expected, "{name}");
    }
}

#[test]
fn tokens_have_variable_lengths() {
    let token = |rest: &[u8]| {
        let payload = long(0xc0, 1, 8, 0, rest);
        let Ok(Quic::Initial(initial)) = Quic::parse(&payload) else {
            panic!("no Initial");
        };
        assert_eq!(initial.datagram_bytes, payload.len());
        initial.token().map(<[u8]>::len)
    };
    let cut_short = Err(Reason::QuicMalformed);
    assert_eq!(token(&[]), cut_short);
    assert_eq!(token(&[0]), Ok(0));
    assert_eq!(token(&[2, 7, 7, 9]), Ok(2));
    assert_eq!(token(&[3, 7, 7]), cut_short);
    assert_eq!(token(&[0x40]), cut_short);
    assert_eq!(token(&[0x40, 1, 7]), Ok(1));
    assert_eq!(token(&[0x80, 0, 0]), cut_short);
    assert_eq!(token(&[0x80, 0, 0, 1, 7]), Ok(1));
    assert_eq!(token(&[0xc0, 0, 0, 0, 0, 0, 0]), cut_short);
    assert_eq!(token(&[0xc0, 0, 0, 0, 0, 0, 0, 1, 7]), Ok(1));
    assert_eq!(token(&[0xff; 40]), cut_short);
}
