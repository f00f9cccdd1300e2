//! The frames of a lane.

use millrace_fuzz::{Seed, target};
use millrace_protocol::frame::{FrameError, Header, LaneParser, Limits};

use crate::assert_label;
use crate::frames::headers;

/// Small, so that mutants reach it.
const LIMITS: Limits = Limits {
    lane_body_bytes_max: 300,
    body_bytes_max: 1 << 20,
};

/// A frame with a body of these bytes, all `0xbb`.
fn frame(header: &Header, body_bytes: u32) -> Vec<u8> {
    let header = Header {
        body_bytes,
        ..*header
    };
    let mut frame = header.encode().to_vec();
    frame.resize(Header::BYTES + body_bytes as usize, 0xbb);
    frame
}

fn seeds() -> Vec<Seed> {
    let frames: Vec<_> = headers()
        .into_iter()
        .filter(|(_, header)| header.body_bytes <= LIMITS.lane_body_bytes_max)
        .collect();
    let all = frames.iter().flat_map(|(_, h)| frame(h, h.body_bytes));
    let request = &frames[1].1;
    vec![
        Seed::new("all", all.collect::<Vec<_>>()),
        Seed::new("longest", frame(request, LIMITS.lane_body_bytes_max)),
        Seed::refused("too-long", frame(request, LIMITS.lane_body_bytes_max + 1)),
        Seed::new(
            "cut",
            [frame(request, 0), frame(request, 40)[..30].to_vec()].concat(),
        ),
    ]
}

/// What a parser gave for an input that came in pieces.
#[derive(Debug, PartialEq)]
struct Parsed {
    frames: Vec<(Header, Vec<u8>)>,
    error: Option<FrameError>,
    kept_bytes: usize,
}

fn parse(input: &[u8], piece_bytes: usize) -> Parsed {
    let mut parser = LaneParser::new(LIMITS);
    let mut frames = Vec::new();
    let mut error = None;
    for piece in input.chunks(piece_bytes) {
        let before = frames.len();
        let result = parser.push(piece, &mut |header, body: &[u8]| {
            frames.push((header, body.to_vec()));
        });
        if let Some(error) = error {
            assert_eq!(result, Err(error), "the first error stays");
            assert_eq!(frames.len(), before, "frames come after an error");
        }
        error = error.or_else(|| result.err());
        let kept_bytes_max = Header::BYTES + LIMITS.lane_body_bytes_max as usize;
        assert!(parser.kept_bytes() <= kept_bytes_max);
    }
    Parsed {
        frames,
        error,
        kept_bytes: parser.kept_bytes(),
    }
}

target!(
    /// Protects a lane: its frames are those that were written, however packets cut it, and no
    /// more is kept than one frame.
    lane, seeds, |bytes| {
        let whole = parse(bytes, bytes.len().max(1));
        let written: Vec<u8> = whole
            .frames
            .iter()
            .flat_map(|(header, body)| [&header.encode()[..], body].concat())
            .collect();
        assert!(bytes.starts_with(&written), "other bytes than those that came");
        let rest = &bytes[written.len()..];
        match whole.error {
            Some(error) => {
                assert_label(error.reason());
                assert!(rest.len() >= Header::BYTES, "an error before a header");
            }
            // A header that is whole is kept apart.
            None if rest.len() < Header::BYTES => assert_eq!(whole.kept_bytes, rest.len()),
            None => assert_eq!(whole.kept_bytes, rest.len() - Header::BYTES),
        }
        // One byte at a time, and in pieces that fall everywhere in a header. A long input has the
        // same faults, and takes long.
        let pieces = [1, 7, 17, Header::BYTES + 5];
        for piece_bytes in pieces.map(|piece| piece.max(bytes.len() / 256)) {
            let pieces = parse(bytes, piece_bytes);
            assert_eq!((&pieces.frames, pieces.error), (&whole.frames, whole.error));
            if whole.error.is_none() {
                assert_eq!(pieces.kept_bytes, whole.kept_bytes);
            }
        }
        whole.error.is_none() && !whole.frames.is_empty()
    }
);
