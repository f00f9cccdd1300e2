//! The datagram by which a listener asks its dialler to dial.

use millrace_edge_policy::packet::Quic;
use millrace_edge_policy::siphash::siphash24;
use millrace_fuzz::{Seed, target};
use millrace_protocol::dial_request::{DialRequest, Sealed};
use millrace_testkit::ids::node_id;
use millrace_transport::driver::dial_requests::{open, seal};

use crate::key;

fn seeds() -> Vec<Seed> {
    let request = DialRequest {
        sender: node_id(1),
        target: node_id(2),
        index: 0,
        sent_ms: 1_800_000_000_000,
    };
    let last = DialRequest {
        index: 3,
        sent_ms: (1 << 56) - 1,
        ..request
    };
    vec![
        Seed::new("first", *seal(&request, key(1)).as_bytes()),
        Seed::new("last", *seal(&last, key(1)).as_bytes()),
    ]
}

target!(
    /// Protects a dialler: a request that opens is, byte for byte, what a holder of the pair's key
    /// sealed; and the edge lets it pass.
    dial_request, seeds, |bytes| {
        let Some(sealed) = Sealed::read(bytes) else {
            return false;
        };
        assert_eq!(sealed.as_bytes()[..], *bytes);
        assert_eq!(Quic::parse(bytes), Ok(Quic::DialRequest));
        let opened = open(&sealed, |_| Some(key(1)));
        if let Some(request) = opened {
            assert_eq!(seal(&request, key(1)), sealed);
        }
        assert_eq!(open(&sealed, |_| None), None);

        // What the holder of the key would have to seal for the bytes that the MAC covers.
        let mut claimed = None;
        let refused = sealed.open(|request, words| {
            claimed = Some((*request, siphash24(key(2), words)));
            None
        });
        assert_eq!(refused, None);
        let (request, mac) = claimed.unwrap();
        let right = seal(&request, key(2));
        let covered = bytes.len() - 8;
        assert_eq!(right.as_bytes()[..covered], bytes[..covered]);
        assert_eq!(right.as_bytes()[covered..], mac.to_le_bytes());
        assert_eq!(open(&right, |_| Some(key(2))), Some(request));
        opened.is_some()
    }
);
