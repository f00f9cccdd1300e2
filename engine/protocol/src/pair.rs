//! The secret that two nodes share without a message: a dialler proves itself with it in its first
//! packet.
//!
//! The nodes' Ed25519 keys, converted to Curve25519, agree on it (X25519, RFC 7748). That takes one
//! scalar multiplication, once for each pair and registry version.
//!
//! 1. Both ends compute the same key; no third node can.
//! 2. A public key of low order, which would give every node one known secret, gives none.
//! 3. A key is never printed.

use std::fmt;

use curve25519_dalek::edwards::CompressedEdwardsY;
use sha2::{Digest, Sha256, Sha512};

use crate::identity::{PublicKey, SigningKey};

/// Keeps these keys apart from any other use of the same agreement.
const CONTEXT: &[u8] = b"millrace pair key 1\0";

/// The secret of a pair of nodes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PairKey([u8; 16]);

impl PairKey {
    /// The key that `mine` and `theirs` agree on; none when `theirs` is not a point of the curve's
    /// large group.
    pub fn agree(mine: &SigningKey, theirs: &PublicKey) -> Option<Self> {
        let point = CompressedEdwardsY(*theirs.as_bytes()).decompress()?;
        // RFC 8032, 5.1.5: the scalar is the lower half of the seed's hash, clamped.
        let hash: [u8; 64] = Sha512::digest(mine.seed()).into();
        let scalar = *hash.first_chunk()?;
        let shared = point.to_montgomery().mul_clamped(scalar).to_bytes();
        if shared == [0; 32] {
            return None;
        }
        let (me, peer) = (mine.node_id(), theirs.node_id());
        let key: [u8; 32] = Sha256::new()
            .chain_update(CONTEXT)
            .chain_update(shared)
            .chain_update(me.min(peer).as_bytes())
            .chain_update(me.max(peer).as_bytes())
            .finalize()
            .into();
        key.first_chunk().copied().map(Self)
    }

    /// The bytes, for a SipHash key. Secret.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for PairKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PairKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // Protects the conversion: the Curve25519 key of an Ed25519 seed, against the agreement of
    // RFC 7748, section 5.2 (first vector).
    #[test]
    fn multiplies_as_rfc_7748_says() {
        let hex = |text: &str| crate::id::parse_hex::<32>(text).unwrap();
        let scalar = hex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4");
        let point = hex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c");
        let shared = curve25519_dalek::MontgomeryPoint(point).mul_clamped(scalar);
        let expected = hex("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552");
        assert_eq!(shared.to_bytes(), expected);
    }

    // Protects the agreement: a key of low order would give every node the same, known secret.
    #[test]
    fn low_order_keys_agree_on_nothing() {
        let mine = SigningKey::from_seed([1; 32]);
        let identity = {
            let mut bytes = [0; 32];
            bytes[0] = 1;
            bytes
        };
        for bytes in [[0; 32], identity] {
            assert_eq!(PairKey::agree(&mine, &PublicKey::from_bytes(bytes)), None);
        }
        // No point of the curve has this ordinate.
        assert_eq!(PairKey::agree(&mine, &PublicKey::from_bytes([2; 32])), None);
    }

    #[test]
    fn debug_hides_the_secret() {
        let [a, b] = [[1; 32], [2; 32]].map(SigningKey::from_seed);
        let key = PairKey::agree(&a, &b.public_key()).unwrap();
        assert_eq!(format!("{key:?}"), "PairKey(..)");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn both_ends_agree_and_nobody_else(a: [u8; 32], b: [u8; 32], c: [u8; 32]) {
            prop_assume!(a != b && b != c && a != c);
            let [a, b, c] = [a, b, c].map(SigningKey::from_seed);
            let agree = |x: &SigningKey, y: &SigningKey| PairKey::agree(x, &y.public_key());
            let key = agree(&a, &b);
            prop_assert!(key.is_some());
            prop_assert_eq!(key, agree(&b, &a));
            prop_assert!(key != agree(&a, &c) && key != agree(&c, &b) && agree(&a, &c) != agree(&c, &b));
        }
    }
}
