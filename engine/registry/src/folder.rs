//! The folder of signed registry versions. Nodes read it; `millrace registry` writes it.
//!
//! 1. A version's signature is on disk before its document has its name, and a document's name
//!    appears whole or not at all: a reader never sees a version without its signature.
//! 2. No file is ever replaced: the series is append-only.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use millrace_protocol::identity::PublicKey;
use millrace_protocol::registry::{
    RegistryConfig, RegistryError, RegistryVersion, SignedVersion, document_file_name,
    number_of_document_file, signature_file_name,
};

use crate::files::read_bytes;

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
    pub(crate) fn io(file: &Path, error: io::Error) -> Self {
        Self::Io {
            file: file.display().to_string(),
            error,
        }
    }

    /// There is no such file.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, Self::Io { error, .. } if error.kind() == ErrorKind::NotFound)
    }

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
    let mut numbers = numbers(dir)?.collect::<io::Result<Vec<_>>>()?;
    numbers.sort_unstable();
    Ok(numbers)
}

/// The numbers of the versions in a folder, one by one, in the order of the host.
pub(crate) fn numbers(dir: &Path) -> io::Result<impl Iterator<Item = io::Result<u64>>> {
    let number = |name: OsString| name.to_str().and_then(number_of_document_file);
    let entries = std::fs::read_dir(dir)?;
    Ok(entries.filter_map(move |entry| entry.map(|entry| number(entry.file_name())).transpose()))
}

/// Reads a version without verifying it. Lengths are checked first, and only regular files are
/// read.
///
/// # Errors
/// [`VersionError::Io`] if a file cannot be read, [`VersionError::Refused`] if the document is too
/// long or the signature file holds no signature.
pub fn read(
    dir: &Path,
    number: u64,
    config: &RegistryConfig,
) -> Result<SignedVersion, VersionError> {
    let document = dir.join(document_file_name(number));
    let max_bytes = config.document_bytes_max;
    let document = match read_text(&document, max_bytes as u64) {
        Err(VersionError::Io { error, .. }) if error.kind() == ErrorKind::FileTooLarge => {
            let bytes =
                std::fs::metadata(&document).map_or(max_bytes + 1, |file| file.len() as usize);
            return Err(RegistryError::TooLong { bytes, max_bytes }.into());
        }
        document => document?,
    };
    let signature = dir.join(signature_file_name(number));
    let signature = read_text(&signature, SIGNATURE_FILE_BYTES_MAX)?;
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
    verify_named(read(dir, number, config)?, number, key, config)
}

/// Verifies a version whose file is named by `number`.
pub(crate) fn verify_named(
    signed: SignedVersion,
    number: u64,
    key: &PublicKey,
    config: &RegistryConfig,
) -> Result<(SignedVersion, RegistryVersion), VersionError> {
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

fn read_text(path: &Path, bytes_max: u64) -> Result<String, VersionError> {
    let text = read_bytes(path, bytes_max).and_then(|bytes| {
        String::from_utf8(bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
    });
    text.map_err(|error| VersionError::io(path, error))
}

#[cfg(test)]
pub(crate) mod tests {
    use millrace_protocol::identity::SigningKey;

    use super::*;

    pub(crate) fn key() -> SigningKey {
        SigningKey::from_seed([7; 32])
    }

    pub(crate) fn version(number: u64, key: &SigningKey) -> SignedVersion {
        let version = RegistryVersion {
            number,
            ..RegistryVersion::default()
        };
        SignedVersion::sign(version.to_document(), key)
    }

    #[test]
    fn what_was_written_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, &version(1, &key())).unwrap();
        let again = write(dir.path(), 1, &version(1, &SigningKey::from_seed([8; 32])));
        assert_eq!(again.unwrap_err().kind(), ErrorKind::AlreadyExists);
        let config = RegistryConfig::default();
        read_verified(dir.path(), 1, &key().public_key(), &config).unwrap();
    }

    /// Protects the memory of a node: the length of a file is looked at before it is read.
    #[test]
    fn a_document_that_is_too_long_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, &version(1, &key())).unwrap();
        let config = RegistryConfig {
            document_bytes_max: 4,
            ..RegistryConfig::default()
        };
        let error = read(dir.path(), 1, &config).unwrap_err();
        assert_eq!(error.reason(), "registry_too_long");
        let signature = dir.path().join(signature_file_name(1));
        std::fs::write(signature, [b'0'; 257]).unwrap();
        let error = read(dir.path(), 1, &RegistryConfig::default()).unwrap_err();
        assert_eq!(error.reason(), "registry_unreadable");
    }
}
