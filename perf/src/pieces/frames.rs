//! The code that every message and every datagram passes: frame headers, lanes, connection IDs.

use std::hint::black_box;

use millrace_edge_policy::cid::{Kind as CidKind, LocalCid, dcid_of, initial_dcid};
use millrace_protocol::frame::{Carriage, Class, Header, Kind, LaneParser, Limits, Method};
use millrace_protocol::rng::Rng;

use super::{Piece, rng};

const HEADERS: usize = 1024;
const LANE_FRAMES: usize = 512;
const DATAGRAMS: usize = 1024;
/// STREAM payload of a packet of 1452 bytes, which quiche hands over at a time.
const READ_BYTES: usize = 1413;

pub(super) const FRAME_ENCODE: Piece = Piece {
    name: "frame_encode",
    operations: HEADERS as u64,
    prepare: || {
        let headers = headers(&mut rng(), HEADERS, 16 << 10);
        let mut wire = Vec::with_capacity(HEADERS * Header::BYTES);
        Box::new(move || {
            wire.clear();
            for header in black_box(&headers) {
                wire.extend_from_slice(&header.encode());
            }
            black_box(&wire);
        })
    },
};

pub(super) const FRAME_DECODE: Piece = Piece {
    name: "frame_decode",
    operations: HEADERS as u64,
    prepare: || {
        let limits = Limits::default();
        let wire: Vec<_> = headers(&mut rng(), HEADERS, 16 << 10)
            .iter()
            .map(Header::encode)
            .collect();
        Box::new(move || {
            let mut body_bytes = 0;
            for bytes in black_box(&wire) {
                let header = Header::decode(bytes).expect("the headers are valid");
                if header.check(Carriage::Lane, &limits).is_ok() {
                    body_bytes += u64::from(header.body_bytes);
                }
            }
            black_box(body_bytes);
        })
    },
};

pub(super) const LANE_PARSER: Piece = Piece {
    name: "lane_parser",
    operations: LANE_FRAMES as u64,
    prepare: || {
        let mut rng = rng();
        let mut lane = Vec::new();
        for header in headers(&mut rng, LANE_FRAMES, 1200) {
            lane.extend_from_slice(&header.encode());
            lane.resize(lane.len() + header.body_bytes as usize, 7);
        }
        let mut parser = LaneParser::new(Limits::default());
        Box::new(move || {
            let mut body_bytes = 0;
            for read in black_box(&lane).chunks(READ_BYTES) {
                parser
                    .push(read, &mut |header, body| {
                        body_bytes += body.len();
                        black_box(header.id);
                    })
                    .expect("the frames are valid");
            }
            assert_eq!(parser.kept_bytes(), 0);
            black_box(body_bytes);
        })
    },
};

pub(super) const CID_ROUTE: Piece = Piece {
    name: "cid_route",
    operations: DATAGRAMS as u64,
    prepare: || {
        let mut rng = rng();
        let datagrams: Vec<_> = (0..DATAGRAMS).map(|_| datagram(&mut rng)).collect();
        Box::new(move || {
            let mut slots = 0u64;
            for bytes in black_box(&datagrams) {
                let Some((dcid, long)) = dcid_of(bytes) else {
                    continue;
                };
                slots += u64::from(LocalCid::owner(dcid, 8)) + u64::from(long);
                if let Some(cid) = LocalCid::decode(dcid) {
                    slots += u64::from(cid.slot) + u64::from(cid.generation);
                }
            }
            black_box(slots);
        })
    },
};

/// Headers of the kinds that travel most, with bodies of up to `body_bytes_max`.
fn headers(rng: &mut Rng, count: usize, body_bytes_max: u64) -> Vec<Header> {
    let kinds = [
        Kind::Request,
        Kind::Response,
        Kind::Send,
        Kind::Probe,
        Kind::Cancel,
    ];
    (0..count as u32)
        .map(|id| {
            let kind = kinds[rng.below(kinds.len() as u64) as usize];
            let body_bytes = match kind {
                Kind::Probe | Kind::Cancel => 0,
                _ => rng.below(body_bytes_max + 1) as u32,
            };
            Header {
                kind,
                class: Class::ALL[rng.below(3) as usize],
                method: Method(rng.below(64) as u16),
                id,
                body_bytes,
                arg: rng.below(10_000) as u32,
            }
        })
        .collect()
}

/// The start of a datagram: 15 of 16 with a short header, the others a dialler's first.
fn datagram(rng: &mut Rng) -> [u8; 64] {
    let mut bytes = [0; 64];
    rng.fill(&mut bytes);
    if rng.below(16) == 0 {
        bytes[..6].copy_from_slice(&[0xc0, 0, 0, 0, 1, LocalCid::BYTES as u8]);
        let mut random = [0; 15];
        rng.fill(&mut random);
        let dcid = initial_dcid(rng.below(256) as u8, random);
        bytes[6..6 + dcid.len()].copy_from_slice(&dcid);
    } else {
        let cid = LocalCid {
            shard: rng.below(8) as u8,
            generation: 1,
            slot: rng.below(4096) as u32,
            nonce: rng.below(1 << 16) as u16,
            kind: CidKind::Roaming,
            key: 0,
            epoch: 0,
            tag: rng.below(u64::MAX),
        };
        bytes[0] = 0x40;
        bytes[1..=LocalCid::BYTES].copy_from_slice(&cid.encode());
    }
    bytes
}
