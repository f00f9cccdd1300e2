//! How registry versions travel between peers.
//!
//! | method | body | answer |
//! |---|---|---|
//! | [`NEWER_THAN`] | a version number, u64, little endian | newer versions, ascending |
//!
//! An answer is versions one after the other: length of the document (u32, little endian),
//! document, signature. It has the newest ones, at most [`ANSWER_VERSIONS_MAX`] of them in
//! [`ANSWER_BYTES_MAX`]; one of more than 64 KiB may have fewer of the newest. A peer that is
//! further behind loses nothing, because every version says everything; it does not ask for those
//! that are left out.

use std::borrow::Cow;

use bytes::Bytes;
use millrace_protocol::frame::Method;
use millrace_protocol::identity::SIGNATURE_BYTES;
use millrace_protocol::registry::SignedVersion;
use millrace_transport::Payload;

/// The first method of the registry exchange.
pub const FIRST_METHOD: Method = Method(0x0100);
/// The last method that is kept for it.
pub const LAST_METHOD: Method = Method(0x010f);

/// "Which versions do you hold above this number?"
pub const NEWER_THAN: Method = FIRST_METHOD;

/// Longest answer. Twice the longest document, so that the newest version always fits.
pub const ANSWER_BYTES_MAX: usize = 2 << 20;

/// Most versions of an answer; as many as a node holds by default.
pub const ANSWER_VERSIONS_MAX: usize = 32;

/// The newest versions that a node holds, encoded once for all peers that ask. A shard that has
/// given a long answer holds up to two copies in chunks for 10 seconds (`long_answers.rs`).
#[derive(Debug, Default)]
pub(crate) struct Encoded {
    /// Counts the sets that were encoded.
    set: u64,
    bytes: Bytes,
    /// Number of each version, ascending, and where it begins.
    versions: Vec<(u64, usize)>,
}

/// The answer to one question: parts of one buffer, as long as no newer version comes.
#[derive(Debug, Clone)]
pub(crate) struct Newer {
    /// The set of versions that it is of.
    pub(crate) set: u64,
    /// Where in the encoded set the answer begins.
    pub(crate) begins: usize,
    /// The answer; empty when there are no newer versions.
    pub(crate) bytes: Bytes,
    /// Where in the encoded set the newest version begins.
    pub(crate) newest_begins: usize,
    /// The newest version alone.
    pub(crate) newest: Bytes,
}

impl Encoded {
    /// Takes the place of the versions encoded before; the set has another number then.
    pub(crate) fn replace(&mut self, encoded: Self) {
        let set = self.set + 1;
        *self = Self { set, ..encoded };
    }

    /// Of the versions with their numbers, ascending: the newest, as many as an answer may have.
    pub(crate) fn of(versions: &[(u64, &SignedVersion)]) -> Self {
        let mut bytes = 0;
        let fits = |(_, signed): &&(u64, &SignedVersion)| {
            bytes += encoded_bytes(signed);
            bytes <= ANSWER_BYTES_MAX
        };
        let newest = versions.iter().rev().take(ANSWER_VERSIONS_MAX);
        let newest = &versions[versions.len() - newest.take_while(fits).count()..];
        let mut begins = 0;
        let index = newest.iter().map(|(number, signed)| {
            let at = begins;
            begins += encoded_bytes(signed);
            (*number, at)
        });
        Self {
            set: 0,
            versions: index.collect(),
            bytes: encode(newest.iter().map(|(_, signed)| *signed)).into(),
        }
    }

    /// The answer to a peer that holds this number.
    pub(crate) fn newer_than(&self, number: u64) -> Newer {
        let older = self.versions.partition_point(|(held, _)| *held <= number);
        let end = self.bytes.len();
        let begins = self.versions.get(older).map_or(end, |(_, begins)| *begins);
        let newest_begins = self.versions.last().map_or(end, |(_, begins)| *begins);
        Newer {
            set: self.set,
            begins,
            bytes: self.bytes.slice(begins..),
            newest_begins,
            newest: self.bytes.slice(newest_begins..),
        }
    }
}

fn encoded_bytes(version: &SignedVersion) -> usize {
    4 + version.document.len() + SIGNATURE_BYTES
}

/// The body of a question: the number that the asker holds.
pub fn encode_number(number: u64) -> [u8; 8] {
    number.to_le_bytes()
}

/// Reads a question; `None` when it has another length.
pub fn decode_number(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_le_bytes)
}

/// All of these versions, one after the other. A document has less than 4 GiB.
pub fn encode<'a>(versions: impl Iterator<Item = &'a SignedVersion> + Clone) -> Vec<u8> {
    let mut out = Vec::with_capacity(versions.clone().map(encoded_bytes).sum());
    for version in versions {
        let document = version.document.as_bytes();
        out.extend_from_slice(&(document.len() as u32).to_le_bytes());
        out.extend_from_slice(document);
        out.extend_from_slice(&version.signature);
    }
    out
}

/// Reads an answer; `None` when it is none: cut, longer than [`ANSWER_BYTES_MAX`], or more than
/// [`ANSWER_VERSIONS_MAX`] versions. All of it is checked before anything is allocated.
pub fn decode(bytes: &[u8]) -> Option<Vec<SignedVersion>> {
    if bytes.len() > ANSWER_BYTES_MAX {
        return None;
    }
    let (mut count, mut rest) = (0, bytes);
    while !rest.is_empty() {
        let (document, _, after) = split(rest)?;
        std::str::from_utf8(document).ok()?;
        count += 1;
        if count > ANSWER_VERSIONS_MAX {
            return None;
        }
        rest = after;
    }
    let mut versions = Vec::with_capacity(count);
    rest = bytes;
    while !rest.is_empty() {
        let (document, signature, after) = split(rest)?;
        versions.push(SignedVersion {
            document: std::str::from_utf8(document).ok()?.to_owned(),
            signature: *signature,
        });
        rest = after;
    }
    Some(versions)
}

/// The document and the signature of the first version, and what follows.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8; SIGNATURE_BYTES], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (document, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let (signature, rest) = rest.split_first_chunk::<SIGNATURE_BYTES>()?;
    Some((document, signature, rest))
}

/// The bytes of an answer in one piece: copied only if they lie in chunks.
pub(crate) fn contiguous(answer: &Payload) -> Cow<'_, [u8]> {
    match answer {
        Payload::Empty => Cow::Borrowed(&[]),
        Payload::Bytes(bytes) => Cow::Borrowed(bytes),
        Payload::Chunks(body) => {
            let mut bytes = Vec::with_capacity(body.len());
            for chunk in body.chunks() {
                bytes.extend_from_slice(chunk);
            }
            Cow::Owned(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::registry::RegistryConfig;

    use super::*;

    fn version(bytes: usize) -> SignedVersion {
        SignedVersion {
            document: "#".repeat(bytes),
            signature: [9; SIGNATURE_BYTES],
        }
    }

    fn numbered(versions: &[SignedVersion]) -> Vec<(u64, &SignedVersion)> {
        (1..).zip(versions).collect()
    }

    #[test]
    fn versions_round_trip_and_a_cut_answer_is_none() {
        let some = [version(0), version(5), version(70_000)];
        let bytes = encode(some.iter());
        assert_eq!(decode(&bytes).as_deref(), Some(&some[..]));
        for cut in [1, 3, 50] {
            assert_eq!(decode(&bytes[..bytes.len() - cut]), None);
        }
        assert_eq!(decode(&u32::MAX.to_le_bytes()), None);
    }

    /// Protects the memory of a node: an answer of empty documents would cost more than its bytes.
    #[test]
    fn an_answer_beyond_its_bounds_is_none() {
        let many = vec![version(0); ANSWER_VERSIONS_MAX + 1];
        assert!(decode(&encode(many[1..].iter())).is_some());
        assert_eq!(decode(&encode(many.iter())), None);
        let largest = ANSWER_BYTES_MAX - encoded_bytes(&version(0));
        assert!(decode(&encode([version(largest)].iter())).is_some());
        assert_eq!(decode(&encode([version(largest + 1)].iter())), None);
    }

    /// Protects every peer: the newest version is in an answer, whatever its length, and a node
    /// with the default config gives all that it holds.
    #[test]
    fn an_answer_has_space_for_what_a_node_may_hold() {
        let config = RegistryConfig::default();
        assert!(encoded_bytes(&version(config.document_bytes_max)) <= ANSWER_BYTES_MAX);
        assert_eq!(config.versions_max, ANSWER_VERSIONS_MAX);
    }

    /// Protects a peer that is far behind: the newest version is in every answer.
    #[test]
    fn an_answer_has_the_newest_versions_that_fit() {
        let some = [version(3), version(2), version(1)];
        let encoded = Encoded::of(&numbered(&some));
        for held in 0..4 {
            let newer = encoded.newer_than(held);
            assert_eq!(decode(&newer.bytes).unwrap(), some[held as usize..]);
            assert_eq!(decode(&newer.newest).unwrap(), some[2..]);
        }
        assert!(encoded.newer_than(u64::MAX).bytes.is_empty());
        assert!(Encoded::default().newer_than(0).newest.is_empty());
        let [one, other] = [0, 0].map(|held| encoded.newer_than(held).bytes.as_ptr());
        assert_eq!(one, other, "encoded once for all peers");

        // Their headers and signatures count: the documents alone would fit.
        let large = [version(1), version(1 << 20), version(1 << 20)];
        let answer = decode(&Encoded::of(&numbered(&large)).newer_than(0).bytes).unwrap();
        assert_eq!(answer, large[2..]);

        let many: Vec<_> = (0..ANSWER_VERSIONS_MAX + 5).map(version).collect();
        let answer = decode(&Encoded::of(&numbered(&many)).newer_than(0).bytes).unwrap();
        assert_eq!(answer, many[5..]);
    }
}
