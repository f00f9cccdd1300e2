//! The id of a body: SHA-256, chunk by chunk, so that a shard can do other work in between.

use millrace_protocol::id::ArtifactId;
use millrace_shards::chunk::Body;
use ring::digest::{Context, SHA256};

/// A hash that is being computed.
#[derive(Clone)]
pub struct Hasher(Context);

impl std::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hasher")
    }
}

impl Default for Hasher {
    fn default() -> Self {
        Self::new()
    }
}

impl Hasher {
    /// The hash of no bytes.
    pub fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The id of all bytes.
    pub fn finish(self) -> ArtifactId {
        let digest = self.0.finish();
        let mut hash = [0; 32];
        hash.copy_from_slice(digest.as_ref());
        ArtifactId::from_bytes(hash)
    }
}

/// The id of a body, at once: for threads that are no shard.
pub fn of_body(body: &Body) -> ArtifactId {
    let mut hasher = Hasher::new();
    for chunk in body.chunks() {
        hasher.update(chunk);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use millrace_shards::chunk::ChunkPool;
    use millrace_shards::config::HugePages;

    use super::*;

    #[test]
    fn the_id_is_the_sha_256_of_the_bytes() {
        let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| i as u8).collect();
        let body = Body::copy_from_slice(&pool, &bytes).unwrap();
        let expected = ring::digest::digest(&SHA256, &bytes);
        assert_eq!(of_body(&body).as_bytes().as_slice(), expected.as_ref());
    }
}
