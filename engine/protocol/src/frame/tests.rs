use super::*;
use proptest::prelude::*;

fn headers() -> impl Strategy<Value = Header> {
    let kind = proptest::sample::select(&Kind::ALL[..]);
    let class = proptest::sample::select(&Class::ALL[..]);
    (
        kind,
        class,
        any::<u16>(),
        any::<u32>(),
        any::<u32>(),
        any::<u32>(),
    )
        .prop_map(|(kind, class, method, id, body_bytes, arg)| Header {
            kind,
            class,
            method: Method(method),
            id,
            body_bytes,
            arg,
        })
}

const SMALL: Limits = Limits {
    lane_body_bytes_max: 64,
    body_bytes_max: 1000,
};

fn frames() -> impl Strategy<Value = Vec<(Header, Vec<u8>)>> {
    let frame = (headers(), proptest::collection::vec(any::<u8>(), 0..=64)).prop_map(
        |(mut header, mut body)| {
            if !matches!(
                header.kind,
                Kind::Request | Kind::Response | Kind::Failure | Kind::Send
            ) && header.kind != Kind::Hello
            {
                body.clear();
            }
            header.body_bytes = body.len() as u32;
            (header, body)
        },
    );
    proptest::collection::vec(frame, 0..20)
}

// Protects the wire: other versions read these bytes.
#[test]
fn layout_is_fixed() {
    let header = Header {
        kind: Kind::Request,
        class: Class::Bulk,
        method: Method(0x0403),
        id: 0x0807_0605,
        body_bytes: 0x0c0b_0a09,
        arg: 0x100f_0e0d,
    };
    let bytes = [2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
    assert_eq!(header.encode(), bytes);
    assert_eq!(Header::decode(&bytes), Ok(header));
}

#[test]
fn unknown_is_refused() {
    let header = |kind, class| {
        let mut bytes = [0; Header::BYTES];
        (bytes[0], bytes[1]) = (kind, class);
        Header::decode(&bytes)
    };
    for kind in [0, 9, 255] {
        assert_eq!(header(kind, 0), Err(FrameError::PeerUnknownKind(kind)));
    }
    assert_eq!(header(1, 3), Err(FrameError::PeerUnknownClass(3)));
    assert_eq!(
        StreamKind::decode(0),
        Err(FrameError::PeerUnknownStreamKind(0))
    );
    for kind in [StreamKind::Lane, StreamKind::Message] {
        assert_eq!(StreamKind::decode(kind.encode()), Ok(kind));
    }
}

#[test]
fn sizes_are_checked_by_carriage_and_kind() {
    use Carriage::{Datagram, Lane, Stream};
    let limits = Limits::default();
    let check = |kind, body_bytes, carriage| {
        let header = Header {
            kind,
            class: Class::Normal,
            method: Method(0),
            id: 1,
            body_bytes,
            arg: 0,
        };
        header
            .check(carriage, &limits)
            .map_err(|error| error.reason())
    };
    let cases = [
        (Kind::Request, 16 << 10, Lane, Ok(())),
        (
            Kind::Request,
            (16 << 10) + 1,
            Lane,
            Err("peer_body_too_long"),
        ),
        (Kind::Response, 128 << 20, Stream, Ok(())),
        (
            Kind::Send,
            (128 << 20) + 1,
            Stream,
            Err("peer_body_too_long"),
        ),
        (Kind::Hello, 256, Lane, Ok(())),
        (Kind::Hello, 257, Lane, Err("peer_body_too_long")),
        (Kind::Hello, 15, Stream, Err("peer_misplaced_frame")),
        (Kind::Probe, 0, Lane, Ok(())),
        (Kind::Probe, 1, Lane, Err("peer_body_too_long")),
        (Kind::Probe, 16_383, Datagram, Ok(())),
        (Kind::Probe, 16_384, Datagram, Err("peer_body_too_long")),
        (Kind::ProbeReply, 1, Datagram, Err("peer_body_too_long")),
        (Kind::Cancel, 1, Lane, Err("peer_body_too_long")),
        (Kind::Cancel, 0, Stream, Err("peer_misplaced_frame")),
    ];
    for (kind, body_bytes, carriage, want) in cases {
        assert_eq!(
            check(kind, body_bytes, carriage),
            want,
            "{kind:?} {body_bytes} {carriage:?}"
        );
    }
}

// Protects the parser against a peer that stops in the middle: memory stays at one frame.
#[test]
fn keeps_at_most_one_frame_and_stays_failed() {
    let mut parser = LaneParser::new(SMALL);
    let mut header = Header {
        kind: Kind::Send,
        class: Class::Normal,
        method: Method(1),
        id: 0,
        body_bytes: 64,
        arg: 0,
    };
    let mut count = 0;
    parser
        .push(&header.encode(), &mut |_, _| count += 1)
        .unwrap();
    parser.push(&[1; 63], &mut |_, _| count += 1).unwrap();
    assert_eq!((parser.kept_bytes(), count), (63, 0));
    parser
        .push(&[1; 1], &mut |_, body| count += body.len())
        .unwrap();
    assert_eq!((parser.kept_bytes(), count), (0, 64));
    header.body_bytes = 65;
    let error = FrameError::PeerBodyTooLong {
        body_bytes: 65,
        max_bytes: 64,
    };
    assert_eq!(
        parser.push(&header.encode(), &mut |_, _| count += 1),
        Err(error)
    );
    header.body_bytes = 0;
    assert_eq!(
        parser.push(&header.encode(), &mut |_, _| count += 1),
        Err(error)
    );
    assert_eq!(count, 64);
}

proptest! {
    #[test]
    fn header_round_trips(header in headers()) {
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn failure_codes_round_trip(arg: u32, known in 0u32..12) {
        for arg in [arg, known] {
            prop_assert_eq!(FailureCode::from_arg(arg).to_arg(), arg);
        }
    }

    // Protects every message: however a lane's bytes are cut, the same frames come out.
    #[test]
    fn cuts_do_not_matter(frames in frames(), cuts in proptest::collection::vec(1usize..90, 1..40)) {
        let mut wire = Vec::new();
        for (header, body) in &frames {
            wire.extend_from_slice(&header.encode());
            wire.extend_from_slice(body);
        }
        let mut parser = LaneParser::new(SMALL);
        let mut got = Vec::new();
        let mut rest = &wire[..];
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (head, tail) = rest.split_at((*cut).min(rest.len()));
            parser.push(head, &mut |header, body| got.push((header, body.to_vec()))).unwrap();
            prop_assert!(parser.kept_bytes() <= 64);
            rest = tail;
        }
        prop_assert_eq!(got, frames);
        prop_assert_eq!(parser.kept_bytes(), 0);
    }

    #[test]
    fn any_bytes_are_frames_or_an_error(
        wire in proptest::collection::vec(prop_oneof![3 => 0u8..9, 1 => any::<u8>()], 0..400),
        cut in 1usize..50,
    ) {
        let mut parser = LaneParser::new(SMALL);
        let mut seen = 0;
        for piece in wire.chunks(cut) {
            let result = parser.push(piece, &mut |header, body| {
                assert_eq!(header.body_bytes as usize, body.len());
                seen += Header::BYTES + body.len();
            });
            if result.is_err() {
                return Ok(());
            }
            prop_assert!(parser.kept_bytes() <= 64);
        }
        prop_assert!(seen <= wire.len());
        let _ = Hello::decode(&wire);
    }
}
