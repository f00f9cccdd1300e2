//! The signed, append-only series of registry versions.
//!
//! A version is a TOML document and a detached Ed25519 signature over [`SIGNED_PREFIX`] and the
//! document's bytes. In a folder they stand beside each other as `000000000001.toml` and
//! `000000000001.sig` (the signature in hex).
//!
//! 1. Nothing of a document is read before its size is checked and its signature verified.
//! 2. A record that cannot be used is skipped and reported; the others work. A version that gives
//!    one key to two nodes is refused whole: no reader could tell the two apart.
//! 3. The newest number never falls, and a number never gets other bytes. A caller that knows the
//!    newest number of an earlier run sets it ([`Registry::set_number_min`]).
//! 4. What is held is bounded: see [`RegistryConfig`].

use crate::{
    address::NodeAddress,
    id::{NodeId, SubnetId},
    identity::{BadSignature, PublicKey, SIGNATURE_BYTES, SigningKey},
    tls_keys::TlsKeys,
};
use data_encoding::HEXLOWER;
use std::collections::BTreeMap;
use thiserror::Error;

mod document;

/// What is signed before the document, so that the signature can mean nothing else.
pub const SIGNED_PREFIX: &[u8] = b"millrace registry version 1\0";

/// Why a version is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistryError {
    /// The document is above the bound; it was not hashed.
    #[error("document of {bytes} bytes, at most {max_bytes} are read")]
    TooLong {
        /// Length of the document.
        bytes: usize,
        /// Longest document allowed, [`RegistryConfig::document_bytes_max`].
        max_bytes: usize,
    },
    /// Not signed by the registry's key.
    #[error("not signed by the registry's key")]
    BadSignature,
    /// The signature file is not 128 hex digits.
    #[error("signature is not {SIGNATURE_BYTES} bytes of hex")]
    SignatureForm,
    /// The signature verifies, but the text is no registry document.
    #[error("document does not parse: {0}")]
    Syntax(String),
    /// The version is older than the newest that is held, and is not held itself.
    #[error("version {number} is older than version {newest}, which is held")]
    Older {
        /// Number of the offered version.
        number: u64,
        /// Number of the newest version held.
        newest: u64,
    },
    /// The registry's key signed two documents with one number.
    #[error("version {number} is held with other contents")]
    Conflict {
        /// The number of both.
        number: u64,
    },
    /// Two nodes have one key, as identity key or as TLS key.
    #[error("nodes {} and {} have one key, {key}; each node needs its own", .nodes[0], .nodes[1])]
    SharedKey {
        /// The key.
        key: PublicKey,
        /// The two nodes.
        nodes: [NodeId; 2],
    },
    /// The number is 0 or above [`NUMBER_MAX`].
    #[error("version number {0} is not between 1 and {NUMBER_MAX}")]
    Number(u64),
}

impl RegistryError {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLong { .. } => "registry_too_long",
            Self::BadSignature => "registry_bad_signature",
            Self::SignatureForm => "registry_signature_form",
            Self::Syntax(_) => "registry_syntax",
            Self::Older { .. } => "registry_older",
            Self::Conflict { .. } => "registry_conflict",
            Self::SharedKey { .. } => "registry_shared_key",
            Self::Number(_) => "registry_number",
        }
    }
}

impl From<BadSignature> for RegistryError {
    fn from(BadSignature: BadSignature) -> Self {
        Self::BadSignature
    }
}

/// Largest version number: a file name has 12 digits.
pub const NUMBER_MAX: u64 = 999_999_999_999;

/// The content of one version.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RegistryVersion {
    /// Position in the series, from 1.
    pub number: u64,
    /// The subnets.
    pub subnets: Vec<SubnetRecord>,
    /// The nodes of all subnets.
    pub nodes: Vec<NodeRecord>,
    /// Firewall rules as they are written; the edge's compiler reads them.
    pub firewall: Vec<toml::Table>,
    /// Settings for all subnets.
    pub settings: toml::Table,
    /// Records that could not be used.
    pub skipped: Vec<SkippedRecord>,
}

/// A subnet.
#[derive(Clone, Debug, PartialEq)]
pub struct SubnetRecord {
    /// Its name.
    pub id: SubnetId,
    /// A name for operators.
    pub name: Option<String>,
    /// Settings for this subnet.
    pub settings: toml::Table,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRecord {
    /// Its name, which belongs to the identity key.
    pub id: NodeId,
    /// Its identity key, which never changes.
    pub public_key: PublicKey,
    /// The keys that its certificate may carry; the identity key where the document names none.
    pub tls_keys: TlsKeys,
    /// The subnet that it belongs to.
    pub subnet: SubnetId,
    /// Where it listens, in the order to try; never empty.
    pub addresses: Vec<NodeAddress>,
}

impl NodeRecord {
    /// The record of a node that never rotated: its TLS key is its identity key.
    pub fn new(public_key: PublicKey, subnet: SubnetId, addresses: Vec<NodeAddress>) -> Self {
        Self {
            id: public_key.node_id(),
            public_key,
            tls_keys: TlsKeys::one(public_key),
            subnet,
            addresses,
        }
    }
}

/// A record that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkippedRecord {
    /// `nodes`, `subnets` or `firewall`.
    pub table: &'static str,
    /// Position in that table, from 0.
    pub index: usize,
    /// Stable label of the reason.
    pub reason: &'static str,
    /// The reason in words, for the operator.
    pub detail: String,
}

impl RegistryVersion {
    /// Reads a document; the caller has verified its signature.
    ///
    /// # Errors
    /// When the text is not TOML, has no usable version number, or gives one key to two nodes. A
    /// bad record is no error: it is skipped and listed in [`Self::skipped`].
    pub fn parse(document: &str) -> Result<Self, RegistryError> {
        document::parse(document)
    }

    /// The document that reads as this version; skipped records are lost.
    pub fn to_document(&self) -> String {
        document::write(self)
    }
}

/// A version as it is sent and stored: a document and its signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedVersion {
    /// The document, TOML.
    pub document: String,
    /// Ed25519 signature over [`SIGNED_PREFIX`] and the document (RFC 8032).
    pub signature: [u8; SIGNATURE_BYTES],
}

impl SignedVersion {
    /// Signs a document.
    pub fn sign(document: String, key: &SigningKey) -> Self {
        let signature = key.sign(&signed_bytes(&document));
        Self {
            document,
            signature,
        }
    }

    /// A version from the contents of its two files.
    ///
    /// # Errors
    /// When the signature is not 128 hexadecimal digits.
    pub fn from_files(document: String, signature_hex: &str) -> Result<Self, RegistryError> {
        let mut signature = [0; SIGNATURE_BYTES];
        let hex = signature_hex.trim();
        if hex.len() != 2 * SIGNATURE_BYTES {
            return Err(RegistryError::SignatureForm);
        }
        HEXLOWER
            .decode_mut(hex.as_bytes(), &mut signature)
            .map_err(|_| RegistryError::SignatureForm)?;
        Ok(Self {
            document,
            signature,
        })
    }

    /// The contents of the signature file.
    pub fn signature_hex(&self) -> String {
        HEXLOWER.encode(&self.signature)
    }

    /// Checks size and signature, then reads the document.
    ///
    /// # Errors
    /// When the document is too long, is not signed by `key`, or does not parse.
    pub fn verify(
        &self,
        key: &PublicKey,
        config: &RegistryConfig,
    ) -> Result<RegistryVersion, RegistryError> {
        let (bytes, max_bytes) = (self.document.len(), config.document_bytes_max);
        if bytes > max_bytes {
            return Err(RegistryError::TooLong { bytes, max_bytes });
        }
        key.verify(&signed_bytes(&self.document), &self.signature)?;
        RegistryVersion::parse(&self.document)
    }
}

fn signed_bytes(document: &str) -> Vec<u8> {
    [SIGNED_PREFIX, document.as_bytes()].concat()
}

/// File name of a version's document.
pub fn document_file_name(number: u64) -> String {
    format!("{number:012}.toml")
}

/// File name of a version's signature.
pub fn signature_file_name(number: u64) -> String {
    format!("{number:012}.sig")
}

/// The number in a document's file name; none for other files.
pub fn number_of_document_file(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".toml")?;
    let all_digits = digits.len() == 12 && digits.bytes().all(|b| b.is_ascii_digit());
    all_digits.then(|| digits.parse().ok()).flatten()
}

/// Bounds of a [`Registry`]: it holds at most their product in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegistryConfig {
    /// Longest document, in bytes.
    pub document_bytes_max: usize,
    /// Largest number of versions held; the oldest is dropped first, even if it is in use.
    pub versions_max: usize,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        // A node is about 300 bytes: 3,000 nodes and their rules fit.
        Self {
            document_bytes_max: 1 << 20,
            versions_max: 32,
        }
    }
}

/// The outcome of an offered version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// It is the newest now.
    Newest {
        /// Its number.
        number: u64,
        /// How many numbers between it and the one before it were never seen.
        missing: u64,
    },
    /// It was held already.
    Known {
        /// Its number.
        number: u64,
    },
}

/// The versions that a node holds.
#[derive(Clone, Debug)]
pub struct Registry {
    key: PublicKey,
    config: RegistryConfig,
    held: BTreeMap<u64, (SignedVersion, RegistryVersion)>,
    number_min: u64,
    oldest_in_use: Option<u64>,
    dropped_in_use: u64,
}

impl Registry {
    /// A registry that trusts `key` and holds no version.
    pub fn new(key: PublicKey, config: RegistryConfig) -> Self {
        Self {
            key,
            config,
            held: BTreeMap::new(),
            number_min: 0,
            oldest_in_use: None,
            dropped_in_use: 0,
        }
    }

    /// Takes a version from a file or from a peer.
    ///
    /// Numbers may be missing: each version is complete, and a node that was away longer than its
    /// peers keep versions must be able to come back.
    ///
    /// # Errors
    /// When the version does not verify, is older than the newest held, or differs from the held
    /// version of the same number. The registry does not change then.
    pub fn offer(&mut self, signed: SignedVersion) -> Result<Offered, RegistryError> {
        let version = signed.verify(&self.key, &self.config)?;
        self.offer_verified(signed, version)
    }

    /// As [`Self::offer`], for a version that the caller has verified with this registry's key and
    /// bounds: `version` is what [`SignedVersion::verify`] gave.
    ///
    /// # Errors
    /// When the version is older than the newest held, or differs from the held version of the same
    /// number. The registry does not change then.
    pub fn offer_verified(
        &mut self,
        signed: SignedVersion,
        version: RegistryVersion,
    ) -> Result<Offered, RegistryError> {
        let (number, newest) = (version.number, self.newest_number());
        if let Some((held, _)) = self.held.get(&number) {
            if held.document == signed.document {
                return Ok(Offered::Known { number });
            }
            return Err(RegistryError::Conflict { number });
        }
        if number < self.number_min() {
            let newest = self.number_min();
            return Err(RegistryError::Older { number, newest });
        }
        self.held.insert(number, (signed, version));
        self.prune();
        let missing = if newest == 0 { 0 } else { number - newest - 1 };
        Ok(Offered::Newest { number, missing })
    }

    /// Sets the oldest version whose members count; a lower number than before changes nothing.
    ///
    /// The layer above calls this: a replica's unfinished heights refer to older versions, and the
    /// members of those must stay connected. Without a call only the newest version counts.
    pub fn set_oldest_in_use(&mut self, number: u64) {
        let number = self.oldest_in_use.map_or(number, |old| old.max(number));
        self.oldest_in_use = Some(number);
        self.prune();
    }

    /// Refuses versions below `number` from now on; a lower number than before changes nothing.
    pub fn set_number_min(&mut self, number: u64) {
        self.number_min = self.number_min.max(number);
    }

    /// The lowest number that is not refused: that of the newest version held, or the one that was
    /// set, whichever is higher.
    pub fn number_min(&self) -> u64 {
        self.newest_number().max(self.number_min)
    }

    /// Oldest version in use; none means that only the newest counts.
    pub fn oldest_in_use(&self) -> Option<u64> {
        self.oldest_in_use
    }

    /// Number of the newest version; 0 before the first.
    pub fn newest_number(&self) -> u64 {
        self.held.last_key_value().map_or(0, |(number, _)| *number)
    }

    /// All versions that are held, the oldest first.
    pub fn versions(&self) -> impl Iterator<Item = &RegistryVersion> {
        self.held.values().map(|(_, version)| version)
    }

    /// The newest version.
    pub fn newest(&self) -> Option<&RegistryVersion> {
        self.held.last_key_value().map(|(_, (_, version))| version)
    }

    /// Held versions above `number`, oldest first: what a peer that holds `number` lacks.
    pub fn newer_than(&self, number: u64) -> impl Iterator<Item = (u64, &SignedVersion)> {
        let newer = self.held.range(number.saturating_add(1)..);
        newer.map(|(number, (signed, _))| (*number, signed))
    }

    /// Number of versions that the bound pushed out although they were in use.
    pub fn dropped_in_use(&self) -> u64 {
        self.dropped_in_use
    }

    /// The versions whose members count now, oldest first: what `Topology::union` takes.
    pub fn versions_in_use(&self) -> impl Iterator<Item = &RegistryVersion> {
        let in_use = self.held.range(self.oldest_counted()..);
        in_use.map(|(_, (_, version))| version)
    }

    /// The held version that was in force at `oldest_in_use`; an older one when that number is
    /// missing.
    fn oldest_counted(&self) -> u64 {
        let newest = self.newest_number();
        let oldest = self
            .oldest_in_use
            .map_or(newest, |oldest| oldest.min(newest));
        self.held
            .range(..=oldest)
            .next_back()
            .map_or(0, |(number, _)| *number)
    }

    fn prune(&mut self) {
        if self.oldest_in_use.is_some() {
            self.held = self.held.split_off(&self.oldest_counted());
        }
        while self.held.len() > self.config.versions_max.max(1) {
            self.held.pop_first();
            self.dropped_in_use += u64::from(self.oldest_in_use.is_some());
        }
    }
}

#[cfg(test)]
mod tests;
