//! The ID and the token of a first packet, up to the decision in user space.

use std::collections::BTreeMap;

use millrace_edge_policy::admission::{Admission, AdmissionConfig, Entitlement, First};
use millrace_edge_policy::source::Source;
use millrace_edge_policy::{proof, token};
use millrace_fuzz::{Seed, target};

use crate::first_packet::{NOW_NS, PEER, WALL_NS, client, peer_proof};
use crate::{assert_label, key};

/// Room for a few sources: the default costs megabytes for each input.
fn fresh() -> Admission {
    let config = AdmissionConfig {
        sketch_buckets: 4,
        sources_max: 4,
        ..AdmissionConfig::default()
    };
    let mut seed = 0;
    let random = || {
        seed += 1;
        [seed; 16]
    };
    let admission = Admission::new(config, NOW_NS, random);
    admission.set_peers(BTreeMap::from([(PEER, key(9))]));
    admission
}

/// The length of the ID, the ID, the token.
fn opening(id: &[u8], token: &[u8]) -> Vec<u8> {
    [&[id.len() as u8], id, token].concat()
}

fn seeds() -> Vec<Seed> {
    let minted = token::mint(&[0xdd; 8], client(), &fresh().keys(), NOW_NS).unwrap();
    vec![
        Seed::new("stranger", opening(&[0xdd; 8], &[])),
        Seed::new("peer", opening(&peer_proof(), &[])),
        Seed::new("token", opening(&minted.retry_id, &minted.token)),
        Seed::refused("short", opening(&[0xdd; 7], &[])),
    ]
}

target!(
    /// Protects the count of handshakes: what is accepted is entitled to it, and is uncounted when
    /// it is over.
    admission, seeds, |bytes| {
        let Some((len, rest)) = bytes.split_first() else {
            return false;
        };
        let (id, token) = rest.split_at(rest.len().min((*len).into()));
        let admission = fresh();
        let mut is_accepted = false;
        // Within the room for non-members, beyond it, and where only peers have any.
        for half_open in [0, 600, usize::MAX] {
            let decided = admission.first_packet(client(), id, token, half_open, NOW_NS, WALL_NS);
            match decided {
                First::Accept(by) => {
                    match by {
                        Entitlement::Peer(tag) => {
                            let proven = proof::check(id, client().ip(), WALL_NS, |_| Some(key(9)));
                            assert_eq!((tag, proven), (PEER, Some(PEER)));
                        }
                        Entitlement::Token(original) => {
                            let keys = admission.keys();
                            let opened = token::open(token, id, client(), &keys, NOW_NS);
                            assert_eq!(opened, Ok(original));
                            assert_ne!(half_open, usize::MAX);
                        }
                        Entitlement::Unvalidated => assert_eq!(half_open, 0),
                    }
                    admission.handshake_over(client(), by);
                    is_accepted = true;
                }
                First::Retry(minted) => assert_eq!(minted.retry_id[0], id[0], "another shard"),
                First::Drop(reason) => assert_label(reason.label()),
                First::Full(full) => assert_label(full.label()),
            }
            assert_eq!(admission.half_open(Source::of(client().ip())), 0);
            assert_eq!(admission.half_open_of_peer(PEER), 0);
        }
        is_accepted
    }
);
