//! The newest version that a node has seen, in a file of its state folder: a restart does not bring
//! back a member that was removed, whichever way the node had heard of the removal.
//!
//! 1. A file appears whole or not at all, and is on disk when [`KeptVersion::write`] returns.
//! 2. Its name has the version's number: a file that cannot be read still says how old a version
//!    the node must not go back to.
//! 3. There is one file for each registry key that the node was started with; two while a version
//!    is written. A file is as long as a version may be at most, and longer ones are not read.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use data_encoding::HEXLOWER;
use millrace_protocol::identity::PublicKey;
use millrace_protocol::registry::{RegistryConfig, RegistryVersion, SignedVersion};

use crate::files::read_bytes;
use crate::folder::{VersionError, verify_named};
use crate::wire;

/// How the names of unfinished files begin.
const UNFINISHED: &str = ".millrace-";

/// How the names of files end.
const ENDING: &str = ".version";

/// Bytes of the registry's key in a file's name: enough to tell keys apart.
const KEY_BYTES: usize = 8;

/// Looks at a folder before it counts as one that cannot be read: a node that runs may replace the
/// file between two system calls of a command.
const LOOKS_MAX: u32 = 3;

/// Where the newest version of one registry is kept, and what an earlier run has left there.
#[derive(Debug)]
pub struct KeptVersion {
    dir: PathBuf,
    /// How the names of this registry's files begin.
    prefix: String,
    is_writable: bool,
    pub(crate) written: Option<Written>,
}

/// What an earlier run has written.
#[derive(Debug)]
pub(crate) struct Written {
    /// The version's number, by the file's name.
    pub(crate) number: u64,
    /// When it was written: when the node saw it first.
    pub(crate) seen_at: SystemTime,
    /// The version, or why it cannot be read.
    pub(crate) version: Result<(SignedVersion, RegistryVersion), VersionError>,
}

impl KeptVersion {
    /// For the node that runs in the state folder. Makes `dir`, and removes what an earlier run did
    /// not finish: no other process may write there.
    ///
    /// # Errors
    /// The host's. That the file holds no version that verifies is none: the log says so, and
    /// versions below its number are refused.
    pub fn open(dir: &Path, key: &PublicKey, config: &RegistryConfig) -> io::Result<Self> {
        if !dir.is_dir() {
            std::fs::create_dir(dir)?;
            // Without this a power cut may take the folder with all that is in it.
            let above = dir.parent().filter(|above| !above.as_os_str().is_empty());
            sync_folder(above.unwrap_or_else(|| Path::new(".")))?;
        }
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                std::fs::remove_file(entry.path())?;
            }
        }
        let kept = Self::read_only(dir, key, config)?;
        Ok(Self {
            is_writable: true,
            ..kept
        })
    }

    /// For a command beside the node: what is taken from elsewhere is not written.
    ///
    /// # Errors
    /// As [`Self::open`]; that there is no such folder is none.
    pub fn read_only(dir: &Path, key: &PublicKey, config: &RegistryConfig) -> io::Result<Self> {
        let mut kept = Self {
            dir: dir.to_owned(),
            prefix: format!("{}-", HEXLOWER.encode(&key.as_bytes()[..KEY_BYTES])),
            is_writable: false,
            written: None,
        };
        kept.written = kept.read(key, config)?;
        Ok(kept)
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn read(&self, key: &PublicKey, config: &RegistryConfig) -> io::Result<Option<Written>> {
        for look in 1.. {
            let newest = match self.numbers() {
                // The node has not run yet.
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                numbers => numbers?.into_iter().max(),
            };
            let Some(number) = newest else {
                return Ok(None);
            };
            let path = self.path(number);
            let version = read_version(&path, number, key, config);
            let is_gone = || version.as_ref().is_err_and(VersionError::is_absent);
            if look < LOOKS_MAX && is_gone() {
                continue;
            }
            let written_at = std::fs::metadata(&path).and_then(|file| file.modified());
            return Ok(Some(Written {
                number,
                seen_at: written_at.unwrap_or_else(|_| SystemTime::now()),
                version,
            }));
        }
        Ok(None)
    }

    /// Writes a version, and removes the ones before it. The version is on disk when this returns.
    ///
    /// # Errors
    /// The host's. The version before it is there then, or both are.
    pub(crate) fn write(&self, number: u64, version: &SignedVersion) -> io::Result<()> {
        let mut file = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(&self.dir)?;
        file.write_all(&wire::encode(std::iter::once(version)))?;
        file.as_file().sync_all()?;
        file.persist(self.path(number))
            .map_err(|error| error.error)?;
        sync_folder(&self.dir)?;
        let older = self.numbers().into_iter().flatten();
        for older in older.filter(|older| *older < number) {
            // The next write tries again; until then the highest number counts.
            let _ = std::fs::remove_file(self.path(older));
        }
        Ok(())
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir
            .join(format!("{}{number:012}{ENDING}", self.prefix))
    }

    fn numbers(&self) -> io::Result<Vec<u64>> {
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            numbers.extend(
                entry?
                    .file_name()
                    .to_str()
                    .and_then(|name| self.number(name)),
            );
        }
        Ok(numbers)
    }

    fn number(&self, name: &str) -> Option<u64> {
        let digits = name.strip_prefix(&self.prefix)?.strip_suffix(ENDING)?;
        let is_number = digits.len() == 12 && digits.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| digits.parse().ok()).flatten()
    }
}

fn sync_folder(dir: &Path) -> io::Result<()> {
    let dir = if dir.as_os_str().is_empty() {
        Path::new(".")
    } else {
        dir
    };
    File::open(dir)?.sync_all()
}

fn read_version(
    path: &Path,
    number: u64,
    key: &PublicKey,
    config: &RegistryConfig,
) -> Result<(SignedVersion, RegistryVersion), VersionError> {
    let read = || {
        let bytes = read_bytes(path, wire::ANSWER_BYTES_MAX as u64)?;
        let only = wire::decode(&bytes).and_then(|versions| <[_; 1]>::try_from(versions).ok());
        only.ok_or_else(|| io::Error::other("it holds no version"))
    };
    let [signed] = read().map_err(|error| VersionError::io(path, error))?;
    verify_named(signed, number, key, config)
}

#[cfg(test)]
mod tests {
    use millrace_protocol::identity::SigningKey;

    use super::*;
    use crate::{Draft, keys};

    fn version(number: u64, key: &SigningKey) -> SignedVersion {
        let newest = RegistryVersion {
            number: number - 1,
            ..RegistryVersion::default()
        };
        Draft::after(newest).sign(key).unwrap()
    }

    fn files(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    fn open(dir: &Path, key: &SigningKey) -> KeptVersion {
        KeptVersion::open(dir, &key.public_key(), &RegistryConfig::default()).unwrap()
    }

    /// Protects the disk and the removal of members: the newest version is there after each write,
    /// alone, and an earlier run's rest is removed.
    #[test]
    fn the_newest_version_is_kept_alone() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("kept");
        let key = keys::generate().unwrap();
        let kept = open(&dir, &key);
        assert!(kept.written.is_none());
        for number in [1, 2, 7] {
            let signed = version(number, &key);
            kept.write(number, &signed).unwrap();
            let written = open(&dir, &key).written.unwrap();
            assert_eq!(
                (written.number, written.version.unwrap().0),
                (number, signed)
            );
            assert_eq!(files(&dir).len(), 1);
        }
        // Two files: the node ended between the write and the removal.
        std::fs::copy(kept.path(7), kept.path(6)).unwrap();
        std::fs::write(dir.join(".millrace-x"), "half").unwrap();
        assert_eq!(open(&dir, &key).written.unwrap().number, 7);
        assert!(!files(&dir).iter().any(|name| name.starts_with('.')));
        kept.write(8, &version(8, &key)).unwrap();
        assert_eq!(files(&dir).len(), 1);
    }

    /// Protects the removal of members from a disk that loses bytes, and from who may write to the
    /// folder: the number stays known.
    #[test]
    fn a_file_that_is_no_version_still_has_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let [key, other] = [0, 1].map(|_| keys::generate().unwrap());
        let kept = open(folder.path(), &key);
        kept.write(4, &version(4, &key)).unwrap();
        let good = std::fs::read(kept.path(4)).unwrap();
        let forged = wire::encode(std::iter::once(&version(4, &other)));
        let misnamed = wire::encode(std::iter::once(&version(5, &key)));
        let long = vec![0; wire::ANSWER_BYTES_MAX + 1];
        let cases = [
            (&good[..good.len() - 1], "registry_unreadable"),
            (&[], "registry_unreadable"),
            (&long, "registry_unreadable"),
            (&forged, "registry_bad_signature"),
            (&misnamed, "registry_misnamed"),
        ];
        for (bytes, reason) in cases {
            std::fs::write(kept.path(4), bytes).unwrap();
            let written = open(folder.path(), &key).written.unwrap();
            assert_eq!(written.number, 4);
            assert_eq!(written.version.unwrap_err().reason(), reason);
        }
    }

    /// Protects a node that is given to another registry: each has a series of its own.
    #[test]
    fn each_registry_key_has_a_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let [key, other] = [0, 1].map(|_| keys::generate().unwrap());
        open(folder.path(), &key)
            .write(9, &version(9, &key))
            .unwrap();
        let others = open(folder.path(), &other);
        assert!(others.written.is_none());
        others.write(10, &version(10, &other)).unwrap();
        assert_eq!(open(folder.path(), &key).written.unwrap().number, 9);
        let (absent, config) = (folder.path().join("none"), RegistryConfig::default());
        let absent = KeptVersion::read_only(&absent, &key.public_key(), &config).unwrap();
        assert!(absent.written.is_none());
    }
}
