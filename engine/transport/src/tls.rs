//! Pinned mutual TLS: which nodes may connect, and which node a connection belongs to.
//!
//! A certificate is self-signed by the node's TLS key (Ed25519), and only that key counts: not the
//! dates, because a wrong clock must not cut a node off, and not the names. The dialler accepts the
//! keys that the registry names for the node that it dials. The listener accepts any key of the
//! current [`Members`], and they say which node has it. BoringSSL checks the CertificateVerify
//! signature (RFC 8446, 4.4.3) after the callback here has accepted the key.
//!
//! Invariants
//! 1. Both sides present a certificate. A peer without one is refused, and counted apart from a
//!    peer with a wrong one: [`handshake_end`](crate::handshake_end).
//! 2. No session is resumed: a resumed session skips the callback, and would let a removed node in.
//! 3. Only Ed25519 signatures, only X25519 (one packet less in each direction than the hybrid
//!    default).
//! 4. Contexts never change: a new certificate comes with new ones. A handshake that is under way
//!    ends with those that it began with.

use std::fmt;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use boring::error::ErrorStack;
use boring::pkey::{Id, PKey};
use boring::ssl::{
    SslAlert, SslContextBuilder, SslMethod, SslOptions, SslRef, SslSessionCacheMode,
    SslSignatureAlgorithm, SslVerifyError, SslVerifyMode,
};
use boring::x509::{X509, X509Ref};
use millrace_protocol::id::NodeId;
use millrace_protocol::identity::{PublicKey, SigningKey};
use millrace_protocol::tls_keys::{TlsKeys, Validity};
use millrace_protocol::topology::Topology;

/// Application protocol of connections between nodes (RFC 7301).
pub(crate) const ALPN_NODE: &[u8] = b"millrace/1";

/// Why TLS could not be set up; always local.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// BoringSSL refused the key, the certificate or a setting.
    #[error("TLS set-up failed: {0}")]
    Boring(#[from] ErrorStack),
    /// The certificate could not be made from the key.
    #[error("certificate could not be made: {0}")]
    Certificate(#[from] rcgen::Error),
    /// quiche refused the configuration.
    #[error("QUIC configuration refused: {0}")]
    Quic(#[from] quiche::Error),
}

/// The members that may connect now, shared with the verify callback, which runs inside BoringSSL
/// on the shard's thread.
///
/// Written on a registry change only; read once in a handshake.
#[derive(Clone, Debug)]
pub(crate) struct Members(Arc<RwLock<Arc<Topology>>>);

impl Members {
    pub(crate) fn new(topology: Arc<Topology>) -> Self {
        Self(Arc::new(RwLock::new(topology)))
    }

    pub(crate) fn replace(&self, topology: Arc<Topology>) {
        match self.0.write() {
            Ok(mut held) => *held = topology,
            Err(poisoned) => *poisoned.into_inner() = topology,
        }
    }

    fn node_of(&self, key: &PublicKey) -> Option<NodeId> {
        match self.0.read() {
            Ok(held) => held.node_of_key(key),
            Err(poisoned) => poisoned.into_inner().node_of_key(key),
        }
    }
}

/// A TLS key of this node and a certificate for it, in the forms that BoringSSL takes.
#[derive(Clone)]
pub struct Credentials {
    public: PublicKey,
    key: PKey<boring::pkey::Private>,
    certificate: X509,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("public", &self.public)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Makes a certificate for `key`, which says that it is valid then.
    ///
    /// # Errors
    /// [`TlsError`]: when BoringSSL or the maker of certificates refuses the key.
    pub fn new(key: &SigningKey, validity: Validity) -> Result<Self, TlsError> {
        // Version 0 of PKCS #8, without the public key: BoringSSL refuses version 1, which ring and
        // rcgen write.
        let der = key.pkcs8_v0_der();
        let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(
            &der.as_slice().into(),
            &rcgen::PKCS_ED25519,
        )?;
        let mut parameters = rcgen::CertificateParams::new(Vec::new())?;
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        let at = |second| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(second);
        parameters.not_before = at(validity.not_before_s());
        parameters.not_after = at(validity.not_after_s());
        let certificate = parameters.self_signed(&pair)?;
        Ok(Self {
            public: key.public_key(),
            key: PKey::private_key_from_pkcs8(&der)?,
            certificate: X509::from_der(certificate.der())?,
        })
    }

    /// The key.
    pub fn public_key(&self) -> PublicKey {
        self.public
    }

    fn builder(&self) -> Result<SslContextBuilder, TlsError> {
        let mut builder = SslContextBuilder::new(SslMethod::tls())?;
        builder.set_private_key(&self.key)?;
        builder.set_certificate(&self.certificate)?;
        builder.check_private_key()?;
        // BoringSSL signs with Ed25519 by default but does not accept it by default.
        builder.set_verify_algorithm_prefs(&[SslSignatureAlgorithm::ED25519])?;
        builder.set_curves_list("X25519")?;
        builder.set_options(SslOptions::NO_TICKET);
        builder.set_session_cache_mode(SslSessionCacheMode::OFF);
        Ok(builder)
    }

    /// The context of the listening side: any key of `members`.
    pub(crate) fn server(&self, members: &Members) -> Result<SslContextBuilder, TlsError> {
        let mut builder = self.builder()?;
        let members = members.clone();
        builder.set_custom_verify_callback(
            SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT,
            move |ssl| {
                let node = peer_key(ssl).and_then(|key| members.node_of(&key));
                accept_if(node.is_some())
            },
        );
        Ok(builder)
    }

    /// The context of the dialling side; [`pin`] then names the keys that a connection accepts.
    pub(crate) fn client(&self) -> Result<SslContextBuilder, TlsError> {
        let mut builder = self.builder()?;
        // Replaced by `pin` before the first packet; a connection that was not pinned must fail.
        builder.set_custom_verify_callback(SslVerifyMode::PEER, |_| accept_if(false));
        Ok(builder)
    }
}

/// What the verify callback answers. [`handshake_end`](crate::handshake_end) tells by the alert
/// that it was the callback which refused.
fn accept_if(is_accepted: bool) -> Result<(), SslVerifyError> {
    let refusal = SslVerifyError::Invalid(SslAlert::CERTIFICATE_UNKNOWN);
    if is_accepted { Ok(()) } else { Err(refusal) }
}

/// Makes `ssl` accept the `expected` keys and nothing else. Call between `connect` and the first
/// packet.
pub(crate) fn pin(ssl: &mut SslRef, expected: TlsKeys) {
    ssl.set_custom_verify_callback(SslVerifyMode::PEER, move |ssl| {
        accept_if(peer_key(ssl).is_some_and(|key| expected.contains(&key)))
    });
}

/// Whether the handshake that BoringSSL has just given up had no group for the key exchange in
/// common with the peer. Its alert is that of other mismatches too (RFC 8446, 6.2), so the answer
/// is in BoringSSL's queue of errors, until the thread's next call of it: ask at once.
pub(crate) fn has_no_common_group() -> bool {
    let errors = ErrorStack::get();
    errors
        .errors()
        .iter()
        .any(|error| error.reason() == Some("NO_SHARED_GROUP"))
}

/// The Ed25519 key of the peer's certificate; `None` when there is no certificate or its key is of
/// another kind.
pub(crate) fn peer_key(ssl: &SslRef) -> Option<PublicKey> {
    let certificate = ssl.peer_certificate()?;
    ed25519_key(&certificate)
}

/// The key is all that counts of a certificate: it is the same whatever the dates and the signature
/// of the certificate say.
fn ed25519_key(certificate: &X509Ref) -> Option<PublicKey> {
    let key = certificate.public_key().ok()?;
    if key.id() != Id::ED25519 {
        return None;
    }
    let mut raw = [0; 32];
    key.raw_public_key(&mut raw)
        .ok()
        .filter(|bytes| bytes.len() == 32)?;
    Some(PublicKey::from_bytes(raw))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::PublicKeyData;

    // Protects against a key that is taken for a node's and is none.
    #[test]
    fn only_an_ed25519_key_is_a_nodes() {
        let of = |pair: &rcgen::KeyPair| {
            let parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
            let certificate = parameters.self_signed(pair).unwrap();
            ed25519_key(&X509::from_der(certificate.der()).unwrap())
        };
        let ed25519 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let raw: [u8; 32] = ed25519.public_key_raw().try_into().unwrap();
        assert_eq!(of(&ed25519), Some(PublicKey::from_bytes(raw)));
        // An X25519 key has as many bytes; the two types differ in the last byte of their OID.
        let info = ed25519.subject_public_key_info();
        let parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        let mut other = parameters.self_signed(&ed25519).unwrap().der().to_vec();
        let at = other.windows(info.len()).position(|window| window == info);
        let oid_at = at.unwrap() + info.windows(2).position(|two| two == [0x65, 0x70]).unwrap();
        other[oid_at + 1] = 0x6e;
        let other = X509::from_der(&other).unwrap();
        assert_eq!(other.public_key().unwrap().id(), Id::X25519);
        assert_eq!(ed25519_key(&other), None);
        for other in [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
        ] {
            assert_eq!(of(&rcgen::KeyPair::generate_for(other).unwrap()), None);
        }
    }
}
