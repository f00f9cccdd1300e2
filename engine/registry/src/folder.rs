//! The folder of signed registry versions. Nodes read it; `millrace registry` writes it.
//!
//! 1. A version's signature is on disk before its document has its name, and a document's name
//!    appears whole or not at all: a reader never sees a version without its signature.
//! 2. No file is ever replaced: the series is append-only.
//! 3. A version that was refused is counted once, and again only when its files change.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use millrace_protocol::identity::PublicKey;
use millrace_protocol::registry::{
    Offered, Registry, RegistryConfig, RegistryError, RegistryVersion, SignedVersion,
    document_file_name, number_of_document_file, signature_file_name,
};

/// More than the hexadecimal digits of a signature.
const SIGNATURE_FILE_BYTES_MAX: u64 = 256;

/// Why a version of the folder could not be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VersionError {
    /// A file is missing or cannot be read.
    #[error("{file}: {error}")]
    Io {
        /// The file.
        file: String,
        /// Why.
        error: io::Error,
    },
    /// The document or its signature is not acceptable.
    #[error(transparent)]
    Refused(#[from] RegistryError),
    /// The file's name promises another number.
    #[error("the document has number {number}, its name says {name}")]
    Misnamed {
        /// In the document.
        number: u64,
        /// In the file's name.
        name: u64,
    },
}

impl VersionError {
    /// The reason as a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Io { .. } => "registry_unreadable",
            Self::Refused(error) => error.reason(),
            Self::Misnamed { .. } => "registry_misnamed",
        }
    }
}

/// The numbers of the versions in a folder, ascending.
///
/// # Errors
/// The host's, if the folder cannot be read.
pub fn list(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        numbers.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(number_of_document_file),
        );
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads a version without verifying it: at most one byte more than a document may have.
///
/// # Errors
/// [`VersionError::Io`] if a file cannot be read, [`VersionError::Refused`] if the signature file
/// holds no signature.
pub fn read(
    dir: &Path,
    number: u64,
    config: &RegistryConfig,
) -> Result<SignedVersion, VersionError> {
    // One byte more than allowed is enough to be refused for its length.
    let document = read_file(
        &dir.join(document_file_name(number)),
        config.document_bytes_max as u64 + 1,
    )?;
    let signature = read_file(
        &dir.join(signature_file_name(number)),
        SIGNATURE_FILE_BYTES_MAX,
    )?;
    Ok(SignedVersion::from_files(document, &signature)?)
}

/// Reads a version, and verifies its signature and its number.
///
/// # Errors
/// As [`read`]; [`VersionError::Refused`] if `key` did not sign the document or the document does
/// not parse, [`VersionError::Misnamed`] if it has another number than its file.
pub fn read_verified(
    dir: &Path,
    number: u64,
    key: &PublicKey,
    config: &RegistryConfig,
) -> Result<(SignedVersion, RegistryVersion), VersionError> {
    let signed = read(dir, number, config)?;
    let version = signed.verify(key, config)?;
    if version.number != number {
        return Err(VersionError::Misnamed {
            number: version.number,
            name: number,
        });
    }
    Ok((signed, version))
}

/// Adds a version to the folder. Both files are on disk when it returns.
///
/// # Errors
/// `AlreadyExists` if the folder has a version with this number; otherwise the host's.
pub fn write(dir: &Path, number: u64, version: &SignedVersion) -> io::Result<()> {
    let signature = format!("{}\n", version.signature_hex());
    persist(dir, &signature_file_name(number), signature.as_bytes())?;
    persist(
        dir,
        &document_file_name(number),
        version.document.as_bytes(),
    )?;
    File::open(dir)?.sync_all()
}

fn persist(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = tempfile::Builder::new()
        .prefix(".millrace-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist_noclobber(dir.join(name))
        .map_err(|error| error.error)?;
    Ok(())
}

fn read_file(path: &Path, bytes_max: u64) -> Result<String, VersionError> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(bytes_max).read_to_string(&mut text))
        .map_err(|error| VersionError::Io {
            file: path.display().to_string(),
            error,
        })?;
    Ok(text)
}

/// What one poll brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Polled {
    /// A newer version was taken.
    pub changed: bool,
    /// Versions that were refused now for the first time.
    pub refused: u64,
}

/// Fills a [`Registry`] from a folder and from peers.
#[derive(Debug)]
pub struct Follower {
    /// None: versions come from peers and from the embedder alone.
    dir: Option<PathBuf>,
    key: PublicKey,
    config: RegistryConfig,
    registry: Registry,
    /// Versions that were refused, with the state of their files then.
    refused_files: BTreeMap<u64, FileState>,
    refused: BTreeMap<&'static str, u64>,
}

/// Length and time of a version's two files.
type FileState = [Option<(u64, SystemTime)>; 2];

impl Follower {
    /// A follower that trusts `key` and holds nothing yet.
    pub fn new(dir: Option<PathBuf>, key: PublicKey, config: RegistryConfig) -> Self {
        Self {
            dir,
            key,
            config,
            registry: Registry::new(key, config),
            refused_files: BTreeMap::new(),
            refused: BTreeMap::new(),
        }
    }

    /// What is held.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// How many versions were refused, by reason.
    pub fn refused(&self) -> &BTreeMap<&'static str, u64> {
        &self.refused
    }

    /// Takes a version that does not come from the folder. A refused one is counted.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn offer(&mut self, signed: SignedVersion) -> Result<Offered, RegistryError> {
        let offered = self.registry.offer(signed);
        if let Err(error) = &offered {
            *self.refused.entry(error.reason()).or_default() += 1;
        }
        offered
    }

    /// Takes what is new in the folder.
    pub fn poll(&mut self) -> Polled {
        let mut polled = Polled::default();
        let Some(dir) = self.dir.clone() else {
            return polled;
        };
        let numbers = match list(&dir) {
            Ok(numbers) => numbers,
            Err(error) => {
                // Peers may still bring versions; the next poll finds a folder that comes later.
                tracing::debug!(dir = %dir.display(), %error, "registry folder cannot be read");
                return polled;
            }
        };
        let newest = self.registry.newest_number();
        // A long series: only what would be held is worth a signature check.
        let skip = numbers.len().saturating_sub(self.config.versions_max);
        for number in numbers
            .into_iter()
            .skip(skip)
            .filter(|number| *number > newest)
        {
            let state = file_state(&dir, number);
            if self.refused_files.get(&number) == Some(&state) {
                continue;
            }
            match self.take(&dir, number) {
                Ok(Offered::Newest { .. }) => {
                    polled.changed = true;
                    self.refused_files.remove(&number);
                }
                Ok(Offered::Known { .. }) => {}
                Err(error) => {
                    let reason = error.reason();
                    tracing::warn!(number, reason, %error, "registry version refused");
                    *self.refused.entry(error.reason()).or_default() += 1;
                    polled.refused += 1;
                    self.remember_refused(number, state);
                }
            }
        }
        polled
    }

    fn take(&mut self, dir: &Path, number: u64) -> Result<Offered, VersionError> {
        let (signed, _) = read_verified(dir, number, &self.key, &self.config)?;
        Ok(self.registry.offer(signed)?)
    }

    /// The map is bounded: a user who can write to the folder must not make it grow without end.
    fn remember_refused(&mut self, number: u64, state: FileState) {
        self.refused_files.insert(number, state);
        while self.refused_files.len() > self.config.versions_max {
            self.refused_files.pop_first();
        }
    }
}

fn file_state(dir: &Path, number: u64) -> FileState {
    [document_file_name(number), signature_file_name(number)].map(|name| {
        let metadata = std::fs::metadata(dir.join(name)).ok()?;
        Some((metadata.len(), metadata.modified().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use millrace_protocol::identity::SigningKey;
    use millrace_protocol::registry::RegistryVersion;

    use super::*;

    fn key() -> SigningKey {
        SigningKey::from_seed([7; 32])
    }

    fn version(number: u64, key: &SigningKey) -> SignedVersion {
        let version = RegistryVersion {
            number,
            ..RegistryVersion::default()
        };
        SignedVersion::sign(version.to_document(), key)
    }

    fn follower(dir: &Path) -> Follower {
        Follower::new(
            Some(dir.to_owned()),
            key().public_key(),
            RegistryConfig::default(),
        )
    }

    #[test]
    fn versions_are_taken_as_they_appear() {
        let dir = tempfile::tempdir().unwrap();
        let mut follower = follower(dir.path());
        assert_eq!(follower.poll(), Polled::default());
        for number in [1, 2] {
            write(dir.path(), number, &version(number, &key())).unwrap();
            assert_eq!(
                follower.poll(),
                Polled {
                    changed: true,
                    refused: 0
                }
            );
            assert_eq!(follower.registry.newest_number(), number);
            assert_eq!(follower.poll(), Polled::default());
        }
    }

    #[test]
    fn what_was_written_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, &version(1, &key())).unwrap();
        let again = write(dir.path(), 1, &version(1, &SigningKey::from_seed([8; 32])));
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(follower(dir.path()).poll().changed);
    }

    /// A forged, an unsigned and a misnamed version are each refused with a reason, counted once,
    /// and do not hide the good one behind them.
    #[test]
    fn refused_versions_are_counted_once_and_do_not_hide_good_ones() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, &version(1, &SigningKey::from_seed([8; 32]))).unwrap();
        std::fs::write(dir.path().join(document_file_name(2)), "number = 2\n").unwrap();
        write(dir.path(), 3, &version(30, &key())).unwrap();
        write(dir.path(), 4, &version(4, &key())).unwrap();
        std::fs::write(dir.path().join("notes.txt"), "not a version").unwrap();

        let mut follower = follower(dir.path());
        assert_eq!(
            follower.poll(),
            Polled {
                changed: true,
                refused: 3
            }
        );
        assert_eq!(follower.registry.newest_number(), 4);
        assert_eq!(follower.poll(), Polled::default());
        let refused: Vec<_> = follower
            .refused()
            .iter()
            .map(|(reason, n)| (*reason, *n))
            .collect();
        assert_eq!(
            refused,
            [
                ("registry_bad_signature", 1),
                ("registry_misnamed", 1),
                ("registry_unreadable", 1)
            ]
        );
    }

    /// A copy in progress: refused while half there, taken when its signature arrives.
    #[test]
    fn a_version_is_tried_again_when_its_files_change() {
        let dir = tempfile::tempdir().unwrap();
        let signed = version(1, &key());
        std::fs::write(dir.path().join(document_file_name(1)), &signed.document).unwrap();
        let mut follower = follower(dir.path());
        assert_eq!(
            follower.poll(),
            Polled {
                changed: false,
                refused: 1
            }
        );
        std::fs::write(
            dir.path().join(signature_file_name(1)),
            signed.signature_hex(),
        )
        .unwrap();
        assert_eq!(
            follower.poll(),
            Polled {
                changed: true,
                refused: 0
            }
        );
    }
}
