//! Mutual TLS that every engine uses: Ed25519 self-signed certificates, each side pins the other's.
//!
//! A certificate follows from its seed, so both processes know what to expect without a file. The
//! verifier compares the whole certificate and then checks the CertificateVerify signature for
//! real.

use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, DistinguishedName,
    NamedGroup, ServerConfig, SignatureScheme,
};

use crate::Result;
use crate::settings::Crypto;

pub(crate) const ALPN: &[u8] = b"millrace-peers";

/// Seed of the driving node's key.
pub(crate) const DRIVER_SEED: u8 = 1;
/// Seed of the serving nodes' keys.
pub(crate) const SERVER_SEED: u8 = 2;

pub(crate) fn server_config(crypto: Crypto) -> Result<ServerConfig> {
    let provider = provider(crypto);
    let verifier = Pinned::new(DRIVER_SEED, &provider)?;
    let (certificate, key) = certificate(SERVER_SEED)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // No resumption, and no tickets, which no client of this bench would use.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(config)
}

pub(crate) fn client_config(crypto: Crypto) -> Result<ClientConfig> {
    let provider = provider(crypto);
    let verifier = Pinned::new(SERVER_SEED, &provider)?;
    let (certificate, key) = certificate(DRIVER_SEED)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// AES-128-GCM and X25519 only.
fn provider(crypto: Crypto) -> Arc<CryptoProvider> {
    let mut provider = match crypto {
        Crypto::AwsLc => aws_lc_rs::default_provider(),
        Crypto::Ring => ring::default_provider(),
    };
    provider
        .cipher_suites
        .retain(|suite| suite.suite() == CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
        .kx_groups
        .retain(|group| group.name() == NamedGroup::X25519);
    Arc::new(provider)
}

fn certificate(seed: u8) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>)> {
    // PKCS#8 version 0: what BoringSSL, ring and aws-lc all read.
    let mut pkcs8 = vec![
        0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04,
        0x20,
    ];
    pkcs8.extend_from_slice(&[seed; 32]);
    let key = PrivatePkcs8KeyDer::from(pkcs8);
    let pair = KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ED25519)?;
    let certificate = CertificateParams::default().self_signed(&pair)?;
    Ok((certificate.der().clone(), PrivateKeyDer::Pkcs8(key)))
}

#[derive(Debug)]
struct Pinned {
    expected: CertificateDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn new(seed: u8, provider: &CryptoProvider) -> Result<Arc<Self>> {
        let (expected, _key) = certificate(seed)?;
        Ok(Arc::new(Self {
            expected,
            algorithms: provider.signature_verification_algorithms,
        }))
    }

    fn check(&self, presented: &CertificateDer<'_>) -> std::result::Result<(), rustls::Error> {
        if presented.as_ref() == self.expected.as_ref() {
            Ok(())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
}

fn no_tls12() -> rustls::Error {
    rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered)
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificate_follows_from_its_seed_and_another_is_refused() {
        let provider = provider(Crypto::AwsLc);
        let pinned = Pinned::new(SERVER_SEED, &provider).unwrap();
        assert!(pinned.check(&certificate(SERVER_SEED).unwrap().0).is_ok());
        assert!(pinned.check(&certificate(DRIVER_SEED).unwrap().0).is_err());
    }

    #[test]
    fn one_cipher_and_one_group() {
        for crypto in [Crypto::AwsLc, Crypto::Ring] {
            let provider = provider(crypto);
            assert_eq!(provider.cipher_suites.len(), 1);
            assert_eq!(provider.kx_groups.len(), 1);
        }
    }
}
