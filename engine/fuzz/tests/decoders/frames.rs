//! The header of a frame, and the hello.

use millrace_fuzz::{Seed, target};
use millrace_protocol::frame::{
    Carriage, Class, FailureCode, FrameError, Header, Hello, HelloError, Kind, Limits, Method,
    StreamKind, VersionRange,
};

use crate::{assert_label, refused};

/// A header of each kind, with a body that its carriage may have.
pub(crate) fn headers() -> Vec<(&'static str, Header)> {
    let header = |kind, class, body_bytes, arg| Header {
        kind,
        class,
        method: Method(3),
        id: 7,
        body_bytes,
        arg,
    };
    let hello_bytes = Hello::BYTES as u32;
    vec![
        ("hello", header(Kind::Hello, Class::Latency, hello_bytes, 0)),
        ("request", header(Kind::Request, Class::Normal, 5, 1_000)),
        ("response", header(Kind::Response, Class::Bulk, 6, 0)),
        (
            "failure",
            header(Kind::Failure, Class::Normal, 0, FailureCode::Busy.to_arg()),
        ),
        ("cancel", header(Kind::Cancel, Class::Latency, 0, 0)),
        ("send", header(Kind::Send, Class::Bulk, 70_000, 0)),
        ("probe", header(Kind::Probe, Class::Latency, 0, 9)),
        (
            "probe-reply",
            header(Kind::ProbeReply, Class::Latency, 0, 9),
        ),
    ]
}

fn header_seeds() -> Vec<Seed> {
    let seed = |(name, header): (_, Header)| Seed::new(name, header.encode());
    headers().into_iter().map(seed).collect()
}

/// The defaults, and limits that the largest body of a lane exceeds.
const LIMITS: [Limits; 2] = [
    Limits {
        lane_body_bytes_max: 16 << 10,
        body_bytes_max: 128 << 20,
    },
    Limits {
        lane_body_bytes_max: 64,
        body_bytes_max: 32,
    },
];

target!(
    /// Protects memory: no header passes whose body its carriage may not have.
    frame_header, header_seeds, |bytes| {
        if let Some(first) = bytes.first() {
            match StreamKind::decode(*first) {
                Ok(kind) => assert_eq!(kind.encode(), *first),
                Err(error) => assert_label(error.reason()),
            }
        }
        let Some(bytes) = bytes.first_chunk() else {
            return false;
        };
        let header = match Header::decode(bytes) {
            Ok(header) => header,
            Err(error) => return refused(error.reason()),
        };
        assert_eq!(header.encode(), *bytes);
        let code = FailureCode::from_arg(header.arg);
        assert_eq!(code.to_arg(), header.arg);
        assert_label(code.reason());
        for limits in &LIMITS {
            for carriage in [Carriage::Lane, Carriage::Stream, Carriage::Datagram] {
                check(&header, carriage, limits);
            }
        }
        true
    }
);

fn check(header: &Header, carriage: Carriage, limits: &Limits) {
    let bytes_max = match (carriage, header.kind) {
        (Carriage::Datagram, Kind::Probe) => Header::PROBE_BODY_BYTES_MAX,
        (Carriage::Stream, _) => limits.body_bytes_max,
        (Carriage::Lane | Carriage::Datagram, _) => {
            limits.lane_body_bytes_max.min(limits.body_bytes_max)
        }
    };
    match header.check(carriage, limits) {
        Ok(()) => {
            assert!(header.body_bytes <= bytes_max);
            let is_message = matches!(
                header.kind,
                Kind::Request | Kind::Response | Kind::Failure | Kind::Send
            );
            assert!(carriage != Carriage::Stream || is_message);
        }
        Err(error) => {
            assert_label(error.reason());
            if let FrameError::PeerBodyTooLong {
                body_bytes,
                max_bytes,
            } = error
            {
                assert_eq!(body_bytes, header.body_bytes);
                assert!(max_bytes < body_bytes && max_bytes <= bytes_max);
            }
        }
    }
}

fn hello_seeds() -> Vec<Seed> {
    let next = Hello {
        versions: VersionRange { min: 1, max: 2 },
        features: 0b101,
        ..Hello::new(u64::MAX, u8::MAX)
    };
    let longer = [&next.encode()[..], b"what a later version adds"].concat();
    vec![
        Seed::new("first", Hello::new(12, 2).encode()),
        Seed::new("next", next.encode()),
        Seed::new("longer", longer),
    ]
}

target!(
    /// Protects a connection's first frame: both sides find the same in two hellos.
    hello, hello_seeds, |bytes| {
        let theirs = match Hello::decode(bytes) {
            Ok(hello) => hello,
            Err(error) => {
                let is_short = bytes.len() < Hello::BYTES;
                assert_eq!(error == HelloError::PeerTooShort(bytes.len()), is_short);
                return refused(error.reason());
            }
        };
        assert_eq!(theirs.encode(), bytes[..Hello::BYTES]);
        assert!(theirs.shards > 0 && theirs.versions.min <= theirs.versions.max);
        let ours = Hello::new(12, 2);
        match (ours.negotiate(&theirs), theirs.negotiate(&ours)) {
            (Ok(here), Ok(there)) => {
                assert_eq!((here.version, here.features), (there.version, there.features));
                for range in [ours.versions, theirs.versions] {
                    assert!((range.min..=range.max).contains(&here.version));
                }
                assert_eq!((here.shards, there.shards), (theirs.shards, ours.shards));
            }
            (Err(here), Err(there)) => {
                assert_label(here.reason());
                assert_eq!(here.reason(), there.reason());
            }
            disagree => panic!("{disagree:?}"),
        }
        true
    }
);
