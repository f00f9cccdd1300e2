//! Why a handshake failed: the reason that is counted and logged, from the error by which either
//! side ended it.
//!
//! A TLS alert is a QUIC error of its own range (RFC 9001, 4.8). Each kind of mismatch has a
//! reason, because each has another cause at the operator: a node that is not in the registry, a
//! client of another protocol, a TLS library without X25519.

/// First QUIC error code of TLS alerts; the alert is the last byte (RFC 9001, 4.8).
const CRYPTO_ERROR: u64 = 0x100;

// Alerts (RFC 8446, 6).
const HANDSHAKE_FAILURE: u8 = 40;
const CERTIFICATE_UNKNOWN: u8 = 46;
const DECRYPT_ERROR: u8 = 51;
const PROTOCOL_VERSION: u8 = 70;
const MISSING_EXTENSION: u8 = 109;
const CERTIFICATE_REQUIRED: u8 = 116;
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandshakeRefusal {
    /// The key is not Ed25519, or the certificate could not be read.
    NotEd25519,
    /// The listener: no member of the current registry has this key.
    NotInRegistry,
    /// The dialler: the node at that address has another key.
    WrongKey,
    /// The peer presented no certificate.
    NoCertificate,
    /// The peer does not have the key of its certificate.
    BadSignature,
    /// The peer speaks no application protocol of ours (ALPN, RFC 7301).
    NoCommonProtocol,
    /// The peer offers no group for the key exchange that we take.
    NoCommonGroup,
    /// The peer offers no cipher suite, signature algorithm or TLS version that we take.
    NoCommonParameters,
    /// TLS failed in another way: the peer's messages are malformed, or in the wrong order.
    TlsFailed,
    /// The peer's packets break QUIC.
    QuicFailed,
    /// The peer ended it by a TLS alert: we have nothing that it takes, or nothing of its own is
    /// what we take.
    RefusedByPeer,
}

impl HandshakeRefusal {
    /// All of them, in the order of a handshake.
    pub const ALL: [Self; 11] = [
        Self::QuicFailed,
        Self::TlsFailed,
        Self::NoCommonParameters,
        Self::NoCommonGroup,
        Self::NoCommonProtocol,
        Self::NoCertificate,
        Self::NotEd25519,
        Self::NotInRegistry,
        Self::WrongKey,
        Self::BadSignature,
        Self::RefusedByPeer,
    ];

    /// For operators: what is wrong, in one sentence.
    pub fn describe(self) -> &'static str {
        match self {
            Self::QuicFailed => {
                "The packets of the other side break QUIC, or it speaks no version of this node."
            }
            Self::TlsFailed => "The TLS messages of the other side are malformed.",
            Self::NoCommonParameters => {
                "The client has no cipher suite, signature algorithm or TLS version of a node."
            }
            Self::NoCommonGroup => "The client does not offer X25519 for the key exchange.",
            Self::NoCommonProtocol => {
                "The client speaks another application protocol (ALPN): it is no node."
            }
            Self::NoCertificate => "The client has no certificate: it is no node.",
            Self::NotEd25519 => "The key of the client's certificate is not Ed25519.",
            Self::NotInRegistry => {
                "No member of this subnet has the client's key, in the registry version in force."
            }
            Self::WrongKey => "The node at the address that this node dialled has another key.",
            Self::BadSignature => "The other side does not have the key of its certificate.",
            Self::RefusedByPeer => {
                "The other side ended the handshake by a TLS alert; its log says why."
            }
        }
    }

    /// Label on `/metrics`.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotEd25519 => "not_ed25519",
            Self::NotInRegistry => "not_in_registry",
            Self::WrongKey => "wrong_key",
            Self::NoCertificate => "no_certificate",
            Self::BadSignature => "bad_signature",
            Self::NoCommonProtocol => "no_common_protocol",
            Self::NoCommonGroup => "no_common_group",
            Self::NoCommonParameters => "no_common_parameters",
            Self::TlsFailed => "tls_failed",
            Self::QuicFailed => "quic_failed",
            Self::RefusedByPeer => "refused_by_peer",
        }
    }

    /// Whether the peer had shown its address by then: its certificate comes under handshake keys,
    /// which only the owner of the address can have.
    pub(crate) fn is_of_validated_address(self) -> bool {
        matches!(
            self,
            Self::NotEd25519
                | Self::NotInRegistry
                | Self::WrongKey
                | Self::NoCertificate
                | Self::BadSignature
        )
    }
}

/// What is known of a handshake that was not completed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HandshakeEnd {
    /// This node listens.
    pub(crate) is_server: bool,
    /// The QUIC error by which this node ended it.
    pub(crate) ours: Option<u64>,
    /// The QUIC error by which the peer ended it.
    pub(crate) theirs: Option<u64>,
    /// The peer presented a certificate with an Ed25519 key.
    pub(crate) has_ed25519_key: bool,
    /// Our TLS found no group in common.
    pub(crate) has_no_common_group: bool,
}

impl HandshakeEnd {
    /// `None` when neither side refused anything: it was given up, or timed out.
    pub(crate) fn refusal(self) -> Option<HandshakeRefusal> {
        if let Some(code) = self.ours {
            return Some(match alert_of(code) {
                None => HandshakeRefusal::QuicFailed,
                Some(alert) => self.refusal_by_alert(alert),
            });
        }
        alert_of(self.theirs?)?;
        Some(HandshakeRefusal::RefusedByPeer)
    }

    fn refusal_by_alert(self, alert: u8) -> HandshakeRefusal {
        match alert {
            // Sent by the verify callback alone; see `tls`.
            CERTIFICATE_UNKNOWN if !self.is_server => HandshakeRefusal::WrongKey,
            CERTIFICATE_UNKNOWN if self.has_ed25519_key => HandshakeRefusal::NotInRegistry,
            CERTIFICATE_UNKNOWN => HandshakeRefusal::NotEd25519,
            CERTIFICATE_REQUIRED => HandshakeRefusal::NoCertificate,
            DECRYPT_ERROR => HandshakeRefusal::BadSignature,
            NO_APPLICATION_PROTOCOL => HandshakeRefusal::NoCommonProtocol,
            HANDSHAKE_FAILURE | MISSING_EXTENSION if self.has_no_common_group => {
                HandshakeRefusal::NoCommonGroup
            }
            HANDSHAKE_FAILURE | PROTOCOL_VERSION => HandshakeRefusal::NoCommonParameters,
            _ => HandshakeRefusal::TlsFailed,
        }
    }
}

/// The TLS alert that a QUIC error is.
fn alert_of(code: u64) -> Option<u8> {
    u8::try_from(code.checked_sub(CRYPTO_ERROR)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_mismatch_has_a_reason() {
        let ours = |alert: u64| HandshakeEnd {
            is_server: true,
            ours: Some(CRYPTO_ERROR + alert),
            ..HandshakeEnd::default()
        };
        let with_key = HandshakeEnd {
            has_ed25519_key: true,
            ..ours(46)
        };
        let without_group = |alert| HandshakeEnd {
            has_no_common_group: true,
            ..ours(alert)
        };
        let by_code = |ours, theirs| HandshakeEnd {
            ours,
            theirs,
            ..HandshakeEnd::default()
        };
        let cases = [
            (with_key, Some("not_in_registry")),
            (ours(46), Some("not_ed25519")),
            (by_code(Some(CRYPTO_ERROR + 46), None), Some("wrong_key")),
            (ours(116), Some("no_certificate")),
            (ours(51), Some("bad_signature")),
            (ours(120), Some("no_common_protocol")),
            (without_group(40), Some("no_common_group")),
            (without_group(109), Some("no_common_group")),
            (ours(40), Some("no_common_parameters")),
            (ours(70), Some("no_common_parameters")),
            // A client that sends no such extension at all, or nonsense.
            (ours(109), Some("tls_failed")),
            (ours(50), Some("tls_failed")),
            (by_code(Some(0x8), None), Some("quic_failed")),
            (
                by_code(None, Some(CRYPTO_ERROR + 40)),
                Some("refused_by_peer"),
            ),
            // The peer gave up, without an alert; neither side did anything.
            (by_code(None, Some(0)), None),
            (by_code(None, Some(0x200)), None),
            (by_code(None, None), None),
        ];
        for (end, reason) in cases {
            assert_eq!(
                end.refusal().map(HandshakeRefusal::reason),
                reason,
                "{end:?}"
            );
        }
    }
}
