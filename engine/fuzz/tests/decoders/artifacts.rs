//! What peers say to the reference application.

use millrace_fuzz::{Seed, target};
use millrace_node::ArtifactId;
use millrace_node::reference::wire::{Announce, decode_id, decode_length, encode_length};

fn announcements() -> Vec<Seed> {
    let seed = |name, length| {
        let id = ArtifactId::from_bytes([7; 32]);
        Seed::new(name, Announce { id, length }.encode())
    };
    vec![seed("empty", 0), seed("longest", u64::MAX)]
}

target!(
    /// Protects the list of announcements: one has exactly its form.
    announcement, announcements, |bytes| {
        let announce = Announce::decode(bytes);
        assert_eq!(announce.is_some(), bytes.len() == 40);
        if let Some(announce) = announce {
            assert_eq!(announce.encode(), bytes);
        }
        announce.is_some()
    }
);

fn ids() -> Vec<Seed> {
    vec![Seed::new("id", [7; 32])]
}

target!(
    /// Protects the store: an id has exactly its form.
    artifact_id, ids, |bytes| {
        let id = decode_id(bytes);
        assert_eq!(id.is_some(), bytes.len() == 32);
        if let Some(id) = id {
            assert_eq!(id.as_bytes()[..], *bytes);
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        id.is_some()
    }
);

fn lengths() -> Vec<Seed> {
    vec![Seed::new("length", encode_length(1 << 27))]
}

target!(
    /// Protects a fetch: the answer to a small question has exactly its form.
    artifact_length, lengths, |bytes| {
        let length = decode_length(bytes);
        assert_eq!(length.is_some(), bytes.len() == 8);
        if let Some(length) = length {
            assert_eq!(encode_length(length), bytes);
        }
        length.is_some()
    }
);
