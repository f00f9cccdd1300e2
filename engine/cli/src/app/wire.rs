//! What nodes say to each other: methods, and the few fixed forms of their bodies.

use millrace_protocol::frame::Method;
use millrace_protocol::id::ArtifactId;
use millrace_protocol::identity::SIGNATURE_BYTES;
use millrace_protocol::registry::SignedVersion;

/// "I have an artifact of this id and length": [`Announce`]; answered by [`WANTED`] or [`HELD`].
pub(crate) const ANNOUNCE: Method = Method(1);
/// The announced body; answered by the id that the peer computed.
pub(crate) const PUT: Method = Method(2);
/// An id; answered by the body.
pub(crate) const GET: Method = Method(3);
/// A registry version number; answered by newer versions, see [`encode_versions`].
pub(crate) const REGISTRY: Method = Method(4);

/// Answer to an announcement: send it.
pub(crate) const WANTED: &[u8] = &[0];
/// Answer to an announcement: it is here already.
pub(crate) const HELD: &[u8] = &[1];

/// An answer with registry versions stops growing here; the next question brings the rest.
pub(crate) const VERSIONS_BYTES_MAX: usize = 2 << 20;

/// Id and length of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Announce {
    pub(crate) id: ArtifactId,
    pub(crate) length: u64,
}

impl Announce {
    pub(crate) fn encode(&self) -> Vec<u8> {
        [self.id.as_bytes().as_slice(), &self.length.to_le_bytes()].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (id, length) = bytes.split_first_chunk::<32>()?;
        let length = u64::from_le_bytes(length.try_into().ok()?);
        Some(Self {
            id: ArtifactId::from_bytes(*id),
            length,
        })
    }
}

pub(crate) fn decode_id(bytes: &[u8]) -> Option<ArtifactId> {
    bytes.try_into().ok().map(ArtifactId::from_bytes)
}

/// Versions one after the other: length of the document (u32, little endian), document, signature. At least one,
/// if there is one, then as many as fit.
pub(crate) fn encode_versions<'a>(versions: impl Iterator<Item = &'a SignedVersion>) -> Vec<u8> {
    let mut out = Vec::new();
    for version in versions {
        let document = version.document.as_bytes();
        let bytes = 4 + document.len() + SIGNATURE_BYTES;
        if !out.is_empty() && out.len() + bytes > VERSIONS_BYTES_MAX {
            break;
        }
        let Ok(length) = u32::try_from(document.len()) else {
            break;
        };
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(document);
        out.extend_from_slice(&version.signature);
    }
    out
}

/// Reads what [`encode_versions`] wrote; `None` when it is not that.
pub(crate) fn decode_versions(mut bytes: &[u8]) -> Option<Vec<SignedVersion>> {
    let mut versions = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (document, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        let (signature, rest) = rest.split_first_chunk::<SIGNATURE_BYTES>()?;
        let document = std::str::from_utf8(document).ok()?.to_owned();
        versions.push(SignedVersion {
            document,
            signature: *signature,
        });
        bytes = rest;
    }
    Some(versions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_round_trip_and_refuse_other_lengths() {
        let announce = Announce {
            id: ArtifactId::from_bytes([7; 32]),
            length: 1 << 27,
        };
        assert_eq!(Announce::decode(&announce.encode()), Some(announce));
        assert_eq!(Announce::decode(&announce.encode()[1..]), None);
        assert_eq!(decode_id(&[1; 32]), Some(ArtifactId::from_bytes([1; 32])));
        assert_eq!(decode_id(&[1; 33]), None);
    }

    #[test]
    fn versions_round_trip_and_stop_at_the_bound() {
        let version = |bytes: usize| SignedVersion {
            document: "#".repeat(bytes),
            signature: [9; SIGNATURE_BYTES],
        };
        let some = [version(0), version(5), version(70_000)];
        assert_eq!(
            decode_versions(&encode_versions(some.iter())).as_deref(),
            Some(&some[..])
        );
        let large = [version(1 << 20), version(1 << 20), version(1)];
        assert_eq!(
            decode_versions(&encode_versions(large.iter()))
                .unwrap()
                .len(),
            1
        );
        for cut in [1, 3, 50] {
            let bytes = encode_versions(some.iter());
            assert_eq!(decode_versions(&bytes[..bytes.len() - cut]), None);
        }
        assert_eq!(decode_versions(&u32::MAX.to_le_bytes()), None);
    }
}
