//! The address of a packet as the edge keeps it: 16 bytes, IPv4 mapped into IPv6.
//!
//! 1. `1.2.3.4` and `::ffff:1.2.3.4` are the same source.
//! 2. A source at a level has no bit set behind the prefix of that level.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// The most levels of a source: IPv6 is counted by /64, /56 and /48.
pub const LEVELS_MAX: usize = 3;

const V4_MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
/// Bits of the 128 that each level keeps.
const V4_LEVELS: [u32; 2] = [128, 120];
const V6_LEVELS: [u32; LEVELS_MAX] = [64, 56, 48];

/// An address, or the prefix under which it is counted. Laid out as `struct edge_source`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Source([u8; 16]);

impl Source {
    /// The source with this address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self(v4.to_ipv6_mapped().octets()),
            IpAddr::V6(v6) => Self(v6.octets()),
        }
    }

    /// The source with these bytes: IPv6, or IPv4 mapped into it, in network order.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes, in network order.
    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The bytes as two little-endian words, the input of hashes.
    pub fn words(&self) -> [u64; 2] {
        let both = u128::from_le_bytes(self.0);
        [both as u64, (both >> 64) as u64]
    }

    /// Whether it is an IPv4 address.
    pub fn is_v4(&self) -> bool {
        self.0.starts_with(&V4_MAPPED)
    }

    /// The number of levels at which it is counted: two for IPv4 (/32, /24), three for IPv6 (/64,
    /// /56, /48).
    pub fn levels(&self) -> usize {
        self.prefixes().len()
    }

    /// The prefix under which it is counted at this level. A level past the last gives the last.
    pub fn at_level(&self, level: usize) -> Self {
        let prefixes = self.prefixes();
        let kept = prefixes[level.min(prefixes.len() - 1)];
        Self((u128::from_be_bytes(self.0) & (u128::MAX << (128 - kept))).to_be_bytes())
    }

    /// The prefix under which its connections are counted: IPv4 /32, IPv6 /64.
    pub fn cap_key(&self) -> Self {
        self.at_level(0)
    }

    /// The address; a mapped one as IPv4.
    pub fn to_ip(&self) -> IpAddr {
        IpAddr::V6(Ipv6Addr::from_octets(self.0)).to_canonical()
    }

    fn prefixes(&self) -> &'static [u32] {
        if self.is_v4() { &V4_LEVELS } else { &V6_LEVELS }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({})", self.to_ip())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_ip().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(address: &str) -> Source {
        Source::of(address.parse().unwrap())
    }

    // Protects the limits: sources with a common prefix share its level, and no others do.
    #[test]
    fn levels_are_prefixes() {
        let cases: [(&str, &[&str]); 4] = [
            ("192.0.2.77", &["192.0.2.77", "192.0.2.0"]),
            ("::ffff:192.0.2.77", &["192.0.2.77", "192.0.2.0"]),
            (
                "2001:db8:1:2345:6:7:8:9",
                &["2001:db8:1:2345::", "2001:db8:1:2300::", "2001:db8:1::"],
            ),
            ("::1", &["::", "::", "::"]),
        ];
        for (address, levels) in cases {
            let address = source(address);
            assert_eq!(address.levels(), levels.len());
            for (level, expected) in levels.iter().enumerate() {
                assert_eq!(
                    address.at_level(level),
                    source(expected),
                    "{address} at {level}"
                );
            }
            assert_eq!(address.cap_key(), address.at_level(0));
            assert_eq!(address.at_level(9), address.at_level(levels.len() - 1));
        }
    }

    #[test]
    fn mapped_addresses_are_ipv4() {
        assert_eq!(source("::ffff:192.0.2.1"), source("192.0.2.1"));
        assert!(source("::ffff:192.0.2.1").is_v4());
        assert!(!source("::192.0.2.1").is_v4());
        assert_eq!(source("::ffff:192.0.2.1").to_string(), "192.0.2.1");
        assert_eq!(
            source("192.0.2.1").words(),
            [0, u64::from_le_bytes([0, 0, 0xff, 0xff, 192, 0, 2, 1])]
        );
    }
}
