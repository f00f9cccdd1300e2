//! The first frame of each side: which versions it speaks, and which registry it holds.
//!
//! Both sides send a hello at once and compute the same [`Negotiated`] from the two: the newest
//! version that both speak, and the features that both have. So a release that speaks versions n
//! and n + 1 talks to its neighbours on either side, and a subnet is upgraded node by node.
//!
//! ```text
//! 0              2              4          8                  16       17
//! | version min  | version max  | features | registry version | shards | later fields ...
//! ```
//!
//! 1. The fields of this layout keep their places in every version; bytes behind them are ignored,
//!    so that a later version can say more.
//! 2. `a.negotiate(b)` and `b.negotiate(a)` give the same version and features, or both fail.

use std::fmt;

use thiserror::Error;

/// Versions of the protocol, first and last included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionRange {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

impl VersionRange {
    /// The newest version that both ranges have.
    pub fn newest_common(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            return self.min.fmt(f);
        }
        write!(f, "{} to {}", self.min, self.max)
    }
}

/// Why a hello ends the connection. Always the peer's fault, or that of who runs both.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum HelloError {
    /// Shorter than the fields that every version has.
    #[error("hello of {0} bytes is too short")]
    PeerTooShort(usize),
    /// A range that has no version.
    #[error("peer claims to speak no version: {} to {}", .0.min, .0.max)]
    PeerNoVersions(VersionRange),
    /// No version is common to both.
    #[error(
        "peer speaks protocol version {theirs}, this node {ours}; fix: upgrade the older node to a \
         release that speaks a version of the newer one"
    )]
    Incompatible {
        /// Of this node.
        ours: VersionRange,
        /// Of the peer.
        theirs: VersionRange,
    },
    /// A node without shards.
    #[error("peer claims to have no shards")]
    PeerNoShards,
    /// The first frame of the peer's first lane is another one.
    #[error("peer did not begin with a hello")]
    PeerMissing,
}

impl HelloError {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::PeerTooShort(_) => "peer_hello_too_short",
            Self::PeerNoVersions(_) => "peer_hello_no_versions",
            Self::Incompatible { .. } => "incompatible_version",
            Self::PeerNoShards => "peer_hello_no_shards",
            Self::PeerMissing => "peer_hello_missing",
        }
    }
}

/// Body of a [`super::Kind::Hello`] frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Versions that the sender speaks.
    pub versions: VersionRange,
    /// A bit for each feature that the sender has; one is in use when both have it. None is given
    /// out yet.
    pub features: u32,
    /// Newest registry version that the sender holds.
    pub registry_version: u64,
    /// Shards of the sender, 1 to 255.
    pub shards: u8,
}

/// What two hellos agree on, and what the peer's said of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The version that this connection speaks.
    pub version: u16,
    /// Features that both sides have.
    pub features: u32,
    /// Newest registry version that the peer held when the connection began.
    pub registry_version: u64,
    /// Shards of the peer.
    pub shards: u8,
}

impl Hello {
    /// Versions that this code speaks.
    pub const VERSIONS: VersionRange = VersionRange { min: 1, max: 1 };
    /// Features that this code has.
    pub const FEATURES: u32 = 0;
    /// Bytes of the fields that this version writes.
    pub const BYTES: usize = 17;
    /// Longest hello that is read: room for later versions.
    pub const BYTES_MAX: u32 = 256;

    /// The hello of this release.
    pub fn new(registry_version: u64, shards: u8) -> Self {
        Self {
            versions: Self::VERSIONS,
            features: Self::FEATURES,
            registry_version,
            shards,
        }
    }

    /// The body as it stands on the wire.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..2].copy_from_slice(&self.versions.min.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.versions.max.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.features.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.registry_version.to_le_bytes());
        bytes[16] = self.shards;
        bytes
    }

    /// Reads a body, and ignores what a later version adds to it.
    ///
    /// # Errors
    /// When a field is missing or has a value that no version gives it.
    pub fn decode(body: &[u8]) -> Result<Self, HelloError> {
        let fields = (|| {
            let (min, rest) = body.split_first_chunk()?;
            let (max, rest) = rest.split_first_chunk()?;
            let (features, rest) = rest.split_first_chunk()?;
            let (registry_version, rest) = rest.split_first_chunk()?;
            let (&shards, _later) = rest.split_first()?;
            Some(Self {
                versions: VersionRange {
                    min: u16::from_le_bytes(*min),
                    max: u16::from_le_bytes(*max),
                },
                features: u32::from_le_bytes(*features),
                registry_version: u64::from_le_bytes(*registry_version),
                shards,
            })
        })();
        let hello = fields.ok_or(HelloError::PeerTooShort(body.len()))?;
        if hello.versions.min > hello.versions.max {
            return Err(HelloError::PeerNoVersions(hello.versions));
        }
        if hello.shards == 0 {
            return Err(HelloError::PeerNoShards);
        }
        Ok(hello)
    }

    /// What this hello and the peer's agree on.
    ///
    /// # Errors
    /// [`HelloError::Incompatible`] when no version is common to both.
    pub fn negotiate(&self, peer: &Self) -> Result<Negotiated, HelloError> {
        let version =
            self.versions
                .newest_common(peer.versions)
                .ok_or(HelloError::Incompatible {
                    ours: self.versions,
                    theirs: peer.versions,
                })?;
        Ok(Negotiated {
            version,
            features: self.features & peer.features,
            registry_version: peer.registry_version,
            shards: peer.shards,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello(min: u16, max: u16, features: u32) -> Hello {
        Hello {
            versions: VersionRange { min, max },
            features,
            registry_version: 77,
            shards: 3,
        }
    }

    // Protects rolling upgrades: neighbouring releases talk, in the newest version that both know,
    // whichever of them says hello to the other; releases too far apart say which versions they
    // have.
    #[test]
    fn neighbouring_releases_agree() {
        #[rustfmt::skip]
        let releases = [
            // (name, min, max, features)
            ("first",  1, 1, 0b0001),
            ("second", 1, 2, 0b0011),
            ("third",  2, 3, 0b0111),
            ("fourth", 4, 4, 0b1100),
        ];
        #[rustfmt::skip]
        let agreed = [
            // with first,          second,            third,             fourth
            [Some((1, 0b0001)), Some((1, 0b0001)), None,              None],
            [Some((1, 0b0001)), Some((2, 0b0011)), Some((2, 0b0011)), None],
            [None,              Some((2, 0b0011)), Some((3, 0b0111)), None],
            [None,              None,              None,              Some((4, 0b1100))],
        ];
        for ((mine, min, max, features), row) in releases.into_iter().zip(agreed) {
            let mine_says = hello(min, max, features);
            for ((theirs, min, max, features), agreed) in releases.into_iter().zip(row) {
                let theirs_says = hello(min, max, features);
                let result = mine_says.negotiate(&theirs_says);
                let found = result.map(|n| (n.version, n.features));
                let wanted = agreed.ok_or(HelloError::Incompatible {
                    ours: mine_says.versions,
                    theirs: theirs_says.versions,
                });
                assert_eq!(found, wanted, "{mine} release with {theirs}");
            }
        }
        let error = hello(1, 2, 0).negotiate(&hello(3, 3, 0)).unwrap_err();
        assert_eq!(error.reason(), "incompatible_version");
        let text = error.to_string();
        assert!(text.starts_with("peer speaks protocol version 3, this node 1 to 2; fix: "));
    }

    // Protects the wire: other versions read these bytes.
    #[test]
    fn layout_is_fixed_and_grows() {
        let hello = Hello {
            versions: VersionRange {
                min: 0x0201,
                max: 0x0403,
            },
            features: 0x0807_0605,
            registry_version: 0x100f_0e0d_0c0b_0a09,
            shards: 17,
        };
        let mut body: Vec<u8> = (1..=17).collect();
        assert_eq!(hello.encode().as_slice(), body);
        body.extend_from_slice(b"what a later version adds");
        assert_eq!(Hello::decode(&body), Ok(hello));
        assert_eq!(
            Hello::decode(&body[..16]),
            Err(HelloError::PeerTooShort(16))
        );
        body[16] = 0;
        assert_eq!(Hello::decode(&body), Err(HelloError::PeerNoShards));
        body[1] = 9;
        assert!(matches!(
            Hello::decode(&body),
            Err(HelloError::PeerNoVersions(_))
        ));
    }

    proptest! {
        /// Both sides compute the same, and never a version that one of them does not speak.
        #[test]
        fn negotiation_is_symmetric(a in (0u16..9, 0u16..9), b in (0u16..9, 0u16..9), x: u32, y: u32) {
            let [a, b] = [(a, x), (b, y)]
                .map(|((m, n), features)| hello(m.min(n), m.max(n), features));
            let (ab, ba) = (a.negotiate(&b), b.negotiate(&a));
            prop_assert_eq!(ab.is_ok(), ba.is_ok());
            let speaks = |range: VersionRange, version| (range.min..=range.max).contains(&version);
            let newest = (0..9).rev().find(|v| speaks(a.versions, *v) && speaks(b.versions, *v));
            prop_assert_eq!(ab.ok().map(|n| n.version), newest);
            if let (Ok(ab), Ok(ba)) = (ab, ba) {
                prop_assert_eq!(ab, ba);
                prop_assert_eq!(ab.features, x & y);
            }
        }
    }
}
