//! How registry versions travel between peers.
//!
//! | method | body | answer |
//! |---|---|---|
//! | [`NEWER_THAN`] | a version number, u64, little endian | newer versions, as [`encode`] writes them |

use millrace_protocol::frame::Method;
use millrace_protocol::identity::SIGNATURE_BYTES;
use millrace_protocol::registry::SignedVersion;

/// The first method of the registry exchange.
pub const FIRST_METHOD: Method = Method(0x0100);
/// The last method that is kept for it.
pub const LAST_METHOD: Method = Method(0x010f);

/// "Which versions do you hold above this number?"
pub const NEWER_THAN: Method = FIRST_METHOD;

/// An answer stops growing here; the next question brings the rest.
pub const ANSWER_BYTES_MAX: usize = 2 << 20;

/// Versions one after the other: length of the document (u32, little endian), document, signature.
/// The first is always there; the others as long as the answer stays below [`ANSWER_BYTES_MAX`].
pub fn encode<'a>(versions: impl Iterator<Item = &'a SignedVersion>) -> Vec<u8> {
    let mut out = Vec::new();
    for version in versions {
        let document = version.document.as_bytes();
        let bytes = 4 + document.len() + SIGNATURE_BYTES;
        if !out.is_empty() && out.len() + bytes > ANSWER_BYTES_MAX {
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

/// Reads what [`encode`] wrote; `None` when it is not that.
pub fn decode(mut bytes: &[u8]) -> Option<Vec<SignedVersion>> {
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
    fn versions_round_trip_and_stop_at_the_bound() {
        let version = |bytes: usize| SignedVersion {
            document: "#".repeat(bytes),
            signature: [9; SIGNATURE_BYTES],
        };
        let some = [version(0), version(5), version(70_000)];
        assert_eq!(decode(&encode(some.iter())).as_deref(), Some(&some[..]));
        let large = [version(1 << 20), version(1 << 20), version(1)];
        assert_eq!(decode(&encode(large.iter())).unwrap().len(), 1);
        for cut in [1, 3, 50] {
            let bytes = encode(some.iter());
            assert_eq!(decode(&bytes[..bytes.len() - cut]), None);
        }
        assert_eq!(decode(&u32::MAX.to_le_bytes()), None);
    }
}
