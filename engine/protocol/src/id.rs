//! Names of nodes, subnets, artifacts and connections.
//!
//! 1. A node's name is the principal of its key: SHA-224 of the DER form, then the byte 2, as the
//!    Internet Computer's interface specification has it. So a key proves the name, and the name
//!    pins the key.
//! 2. The text form is canonical: a text that parses prints back as the same characters.

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use sha2::{Digest, Sha224};
use std::{fmt, str::FromStr};
use thiserror::Error;

const PRINCIPAL_BYTES: usize = 29;
/// Last byte of a principal that is made from a key.
const SELF_AUTHENTICATING: u8 = 2;
/// 4 bytes of checksum and 29 of principal are 53 base32 digits, in groups of 5.
const TEXT_CHARS: usize = 63;

/// Why a text is not a name.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum IdError {
    /// The text has another length than names of this kind.
    #[error("wrong length")]
    Length,
    /// The text has a character outside the alphabet.
    #[error("unknown character")]
    Alphabet,
    /// The checksum belongs to another principal.
    #[error("checksum does not match")]
    Checksum,
    /// The text decodes, but the name prints as another text.
    #[error("not the canonical text form")]
    NotCanonical,
    /// A principal of another kind (a canister, the anonymous caller).
    #[error("not the principal of a key")]
    NotSelfAuthenticating,
}

impl IdError {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Length => "id_length",
            Self::Alphabet => "id_alphabet",
            Self::Checksum => "id_checksum",
            Self::NotCanonical => "id_not_canonical",
            Self::NotSelfAuthenticating => "id_not_self_authenticating",
        }
    }
}

/// The name of a node: the principal of its public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId([u8; PRINCIPAL_BYTES]);

impl NodeId {
    /// The name of the node whose public key has this DER form (SubjectPublicKeyInfo).
    pub fn from_public_key_der(der: &[u8]) -> Self {
        Self(self_authenticating(der))
    }

    /// The shard that owns connection `index` to this peer, on a node with `shards` shards (1 to
    /// 255; 0 counts as 1).
    ///
    /// Both ends and the kernel compute the same shard: the dialler puts `spread + index` into the
    /// first byte of its initial destination connection ID, and steering takes that byte modulo the
    /// number of shards. The sum wraps, as the byte does: where 256 is no multiple of `shards`, two
    /// connections of a peer may have one owner.
    pub fn owner_shard(&self, index: u8, shards: u8) -> u8 {
        self.spread().wrapping_add(index) % shards.max(1)
    }

    /// A byte that is the same on all nodes and spreads peers over shards.
    pub fn spread(&self) -> u8 {
        // Any byte of a hash is as good as another.
        self.0[0]
    }
}

/// The name of a subnet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubnetId([u8; PRINCIPAL_BYTES]);

impl SubnetId {
    /// The name of the subnet whose public key has this DER form.
    pub fn from_public_key_der(der: &[u8]) -> Self {
        Self(self_authenticating(der))
    }
}

macro_rules! principal {
    ($name:ident) => {
        impl $name {
            /// The bytes as they are, without a look at their kind.
            pub fn from_bytes(bytes: [u8; PRINCIPAL_BYTES]) -> Self {
                Self(bytes)
            }

            /// The bytes of the principal.
            pub fn as_bytes(&self) -> &[u8; PRINCIPAL_BYTES] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&principal_text(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // The first group tells the nodes of a subnet apart; the whole is a line long.
                write!(
                    f,
                    "{}({})",
                    stringify!($name),
                    &principal_text(&self.0)[..11]
                )
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                parse_principal(text).map(Self)
            }
        }
    };
}

principal!(NodeId);
principal!(SubnetId);

/// The name of an artifact: SHA-256 of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ArtifactId([u8; 32]);

impl ArtifactId {
    /// The artifact whose SHA-256 this is.
    pub fn from_bytes(hash: [u8; 32]) -> Self {
        Self(hash)
    }

    /// The hash.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ArtifactId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for ArtifactId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ArtifactId({})", HEXLOWER.encode(&self.0[..4]))
    }
}

impl FromStr for ArtifactId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        parse_hex(text).map(Self)
    }
}

/// Numbers the connections of one process: a later connection has a higher number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionNumber(pub u64);

impl fmt::Display for ConnectionNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Exactly `N` bytes of lower-case hex.
pub(crate) fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], IdError> {
    if text.len() != 2 * N {
        return Err(IdError::Length);
    }
    let bytes = HEXLOWER
        .decode(text.as_bytes())
        .map_err(|_| IdError::Alphabet)?;
    bytes.try_into().map_err(|_| IdError::Length)
}

fn self_authenticating(der: &[u8]) -> [u8; PRINCIPAL_BYTES] {
    let mut bytes = [SELF_AUTHENTICATING; PRINCIPAL_BYTES];
    bytes[..28].copy_from_slice(&Sha224::digest(der));
    bytes
}

/// CRC-32 (big endian) and bytes, in base32 without padding, lower case, in groups of five.
fn principal_text(bytes: &[u8]) -> String {
    let mut checked = crc32fast::hash(bytes).to_be_bytes().to_vec();
    checked.extend_from_slice(bytes);
    let digits = BASE32_NOPAD.encode(&checked).to_ascii_lowercase();
    let mut text = String::with_capacity(digits.len() + digits.len() / 5);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && i % 5 == 0 {
            text.push('-');
        }
        text.push(digit);
    }
    text
}

fn parse_principal(text: &str) -> Result<[u8; PRINCIPAL_BYTES], IdError> {
    if text.len() != TEXT_CHARS {
        return Err(IdError::Length);
    }
    let digits: String = text
        .chars()
        .filter(|c| *c != '-')
        .map(|c| c.to_ascii_uppercase())
        .collect();
    let checked = BASE32_NOPAD
        .decode(digits.as_bytes())
        .map_err(|_| IdError::Alphabet)?;
    let Some((checksum, bytes)) = checked.split_at_checked(4) else {
        return Err(IdError::Length);
    };
    let bytes: [u8; PRINCIPAL_BYTES] = bytes.try_into().map_err(|_| IdError::Length)?;
    if checksum != crc32fast::hash(&bytes).to_be_bytes() {
        return Err(IdError::Checksum);
    }
    if principal_text(&bytes) != text {
        return Err(IdError::NotCanonical);
    }
    if bytes[PRINCIPAL_BYTES - 1] != SELF_AUTHENTICATING {
        return Err(IdError::NotSelfAuthenticating);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Public key of the Internet Computer's root subnet, and its published name.
    const ROOT_KEY_DER: &str = "308182301d060d2b0601040182dc7c0503010201060c2b0601040182dc7c05030\
        201036100814c0e6ec71fab583b08bd81373c255c3c371b2e84863c98a4f1e08b74235d14fb5d9c0cd546d968\
        5f913a0c0b2cc5341583bf4b4392e467db96d65b9bb4cb717112f8472e0d5a4d14505ffd7484b01291091c5f8\
        7b98883463f98091a0baaae";
    const ROOT_SUBNET: &str = "tdb26-jop6k-aogll-7ltgs-eruif-6kk7m-qpktf-gdiqx-mxtrf-vb5e6-eqe";

    // Protects the meaning of names: they are the Internet Computer's, bit for bit.
    #[test]
    fn known_vectors() {
        assert_eq!(principal_text(&[]), "aaaaa-aa");
        assert_eq!(principal_text(&[4]), "2vxsx-fae");
        assert_eq!(
            principal_text(&[0, 0, 0, 0, 0, 0, 0, 1, 1, 1]),
            "rrkah-fqaaa-aaaaa-aaaaq-cai"
        );
        let der = HEXLOWER.decode(ROOT_KEY_DER.replace(char::is_whitespace, "").as_bytes());
        let id = SubnetId::from_public_key_der(&der.unwrap());
        assert_eq!(id.to_string(), ROOT_SUBNET);
        assert_eq!(ROOT_SUBNET.parse(), Ok(id));
    }

    #[test]
    fn bad_text_is_refused() {
        let cases = [
            ("", IdError::Length),
            ("2vxsx-fae", IdError::Length),
            (&ROOT_SUBNET.to_uppercase(), IdError::NotCanonical),
            (
                &ROOT_SUBNET.replacen("tdb26", "tdb27", 1),
                IdError::Checksum,
            ),
            (
                &ROOT_SUBNET.replacen("tdb26", "tdb21", 1),
                IdError::Alphabet,
            ),
            // The last digit carries three bits that must be zero.
            (&ROOT_SUBNET.replacen("-eqe", "-eqf", 1), IdError::Alphabet),
            // Dashes elsewhere: the same characters, in other groups.
            (
                &ROOT_SUBNET.replacen("tdb26-j", "tdb2-6j", 1),
                IdError::NotCanonical,
            ),
            (&"é".repeat(31), IdError::Length),
            (&principal_text(&[9; 29]), IdError::NotSelfAuthenticating),
        ];
        for (text, want) in cases {
            assert_eq!(text.parse::<NodeId>(), Err(want), "{text}");
        }
        assert_eq!("00".parse::<ArtifactId>(), Err(IdError::Length));
        assert_eq!("g".repeat(64).parse::<ArtifactId>(), Err(IdError::Alphabet));
    }

    proptest! {
        #[test]
        fn text_round_trips(mut bytes in any::<[u8; 29]>(), hash in any::<[u8; 32]>()) {
            bytes[28] = SELF_AUTHENTICATING;
            let id = NodeId::from_bytes(bytes);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            let id = ArtifactId::from_bytes(hash);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }

        #[test]
        fn text_never_panics(text in ".{0,80}") {
            prop_assert!(text.parse::<NodeId>().is_err());
        }

        #[test]
        fn owner_is_what_steering_computes(byte in any::<u8>(), index in any::<u8>(), shards in 1u8..) {
            let id = NodeId::from_bytes([byte; 29]);
            prop_assert_eq!(id.owner_shard(index, shards), byte.wrapping_add(index) % shards);
        }
    }
}
