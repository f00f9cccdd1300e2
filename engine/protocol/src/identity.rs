//! Ed25519 keys (RFC 8032): a node's own, and those of its peers.
//!
//! 1. A secret never reaches `Debug`, and its seed is wiped when the key is dropped.
//! 2. The private DER form is PKCS#8 version 0: BoringSSL refuses version 1, which `ring` writes.

use crate::id::{IdError, NodeId, parse_hex};
use data_encoding::HEXLOWER;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use std::{fmt, str::FromStr};
use thiserror::Error;

/// `SEQUENCE { SEQUENCE { OID 1.3.101.112 }, BIT STRING }`, up to the key.
const SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0,
];
/// `SEQUENCE { 0, SEQUENCE { OID }, OCTET STRING { OCTET STRING } }`, up to the seed.
const PKCS8_PREFIX: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

/// Bytes of a signature.
pub const SIGNATURE_BYTES: usize = 64;

/// The signature was not made by this key over these bytes.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("signature does not verify")]
pub struct BadSignature;

impl BadSignature {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        "bad_signature"
    }
}

/// An Ed25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// The key with these raw bytes. All bytes are accepted; with bytes that are no point of the
    /// curve no signature verifies.
    pub fn from_bytes(raw: [u8; 32]) -> Self {
        Self(raw)
    }

    /// The raw bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The DER form, SubjectPublicKeyInfo (RFC 8410, section 4).
    pub fn to_spki_der(&self) -> [u8; 44] {
        let mut der = [0; 44];
        der[..12].copy_from_slice(&SPKI_PREFIX);
        der[12..].copy_from_slice(&self.0);
        der
    }

    /// The name of the node that has this key.
    pub fn node_id(&self) -> NodeId {
        NodeId::from_public_key_der(&self.to_spki_der())
    }

    /// Checks `signature` over `message`.
    ///
    /// # Errors
    /// When the signature does not verify.
    pub fn verify(
        &self,
        message: &[u8],
        signature: &[u8; SIGNATURE_BYTES],
    ) -> Result<(), BadSignature> {
        UnparsedPublicKey::new(&ED25519, &self.0)
            .verify(message, signature)
            .map_err(|_| BadSignature)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        parse_hex(text).map(Self)
    }
}

/// An Ed25519 signing key.
pub struct SigningKey {
    seed: [u8; 32],
    pair: Ed25519KeyPair,
    public: PublicKey,
}

impl SigningKey {
    /// The key with this seed. The seed is the secret.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        let pair =
            Ed25519KeyPair::from_seed_unchecked(&seed).expect("every 32 bytes are an Ed25519 seed");
        let public = pair.public_key().as_ref().try_into().map(PublicKey);
        Self {
            seed,
            public: public.expect("an Ed25519 public key has 32 bytes"),
            pair,
        }
    }

    /// The public half.
    pub fn public_key(&self) -> PublicKey {
        self.public
    }

    /// The name of the node that has this key.
    pub fn node_id(&self) -> NodeId {
        self.public.node_id()
    }

    /// Signs `message`.
    pub fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_BYTES] {
        let mut signature = [0; SIGNATURE_BYTES];
        signature.copy_from_slice(self.pair.sign(message).as_ref());
        signature
    }

    /// PKCS#8 version 0 (RFC 5958), the form that BoringSSL reads. Secret.
    pub fn pkcs8_v0_der(&self) -> [u8; 48] {
        let mut der = [0; 48];
        der[..16].copy_from_slice(&PKCS8_PREFIX);
        der[16..].copy_from_slice(&self.seed);
        der
    }

    /// The seed, for the key file. Secret.
    pub fn seed(&self) -> &[u8; 32] {
        &self.seed
    }
}

impl Clone for SigningKey {
    fn clone(&self) -> Self {
        Self::from_seed(self.seed)
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey(of {})", self.public)
    }
}

impl Drop for SigningKey {
    fn drop(&mut self) {
        self.seed.fill(0);
        // Keeps the compiler from dropping a store that nothing reads afterwards.
        std::hint::black_box(&self.seed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex<const N: usize>(text: &str) -> [u8; N] {
        parse_hex(text).unwrap()
    }

    // Protects interoperability: RFC 8032, section 7.1, test 2.
    #[test]
    fn rfc_8032_vector() {
        let key = SigningKey::from_seed(hex(
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        ));
        let public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c";
        assert_eq!(key.public_key(), public.parse().unwrap());
        let signature = hex(
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da\
             085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        );
        assert_eq!(key.sign(&[0x72]), signature);
        assert_eq!(key.public_key().verify(&[0x72], &signature), Ok(()));
        assert_eq!(
            key.public_key().verify(&[0x73], &signature),
            Err(BadSignature)
        );
        let other = SigningKey::from_seed([1; 32]).public_key();
        assert_eq!(other.verify(&[0x72], &signature), Err(BadSignature));
    }

    #[test]
    fn der_forms() {
        let key = SigningKey::from_seed([7; 32]);
        let der = key.pkcs8_v0_der();
        assert_eq!(der[..16], hex::<16>("302e020100300506032b657004220420"));
        assert_eq!(der[16..], [7; 32]);
        assert!(Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).is_ok());
        let spki = key.public_key().to_spki_der();
        assert_eq!(spki[..12], hex::<12>("302a300506032b6570032100"));
        assert_eq!(spki[12..], *key.public_key().as_bytes());
    }

    // Protects the key: logs print structures that hold it.
    #[test]
    fn debug_hides_the_secret() {
        let key = SigningKey::from_seed([0xab; 32]);
        assert!(!format!("{key:?} {:?}", key.clone()).contains("abab"));
    }
}
