//! Keys: made from the system's randomness, and kept in files that only their owner can read.
//!
//! A key file holds a 32-byte Ed25519 seed as 64 hexadecimal digits, with mode 0600.
//!
//! A node's TLS keys lie beside its identity key, each in a file of its own that is named by the
//! public key: so a node finds the secret half of a key that its registry record names.
//!
//! 1. A key file is never overwritten.
//! 2. A key file that others can read is refused.
//! 3. What a running node reads is a regular file: nothing that stands there makes it wait.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use millrace_protocol::identity::{PublicKey, SigningKey};
use ring::rand::{SecureRandom, SystemRandom};

use crate::files;

/// 64 digits, and white space around them.
const KEY_FILE_BYTES_MAX: u64 = 256;

/// Why a key could not be made or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The caller named a file that exists.
    #[error("{} exists; a key is never overwritten", .file.display())]
    Exists {
        /// The file.
        file: PathBuf,
    },
    /// The operator left the file readable for others.
    #[error("{file} has mode {mode:04o}, others can read it; run `chmod 600 {file}`", file = .file.display())]
    Exposed {
        /// The file.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file holds something else.
    #[error("{} is not a key file: expected 64 hexadecimal digits", .file.display())]
    NotAKey {
        /// The file.
        file: PathBuf,
    },
    /// The file's name is that of another key.
    #[error("{} holds another key than its name says", .file.display())]
    Other {
        /// The file.
        file: PathBuf,
    },
    /// The text is no public key.
    #[error("\"{text}\" is not a public key: expected 64 hexadecimal digits")]
    NotAPublicKey {
        /// What was given.
        text: String,
    },
    /// The host could not read or write the file.
    #[error("{}: {error}", .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The host's random generator failed.
    #[error("the system gives no random numbers")]
    NoRandom,
}

/// Makes a key that lives in memory only.
///
/// # Errors
/// [`KeyError::NoRandom`].
pub fn generate() -> Result<SigningKey, KeyError> {
    Ok(SigningKey::from_seed(random()?))
}

/// Makes a key and writes it to `file`, with mode 0600.
///
/// # Errors
/// [`KeyError::Exists`] if the file exists, [`KeyError::Io`] if it cannot be written,
/// [`KeyError::NoRandom`].
pub fn create(file: &Path) -> Result<SigningKey, KeyError> {
    write_new(file, generate()?)
}

/// Makes a TLS key for the node whose identity key is `identity_file`, and writes it beside that:
/// the key and its file.
///
/// # Errors
/// As [`create`].
pub fn create_tls(identity_file: &Path) -> Result<(SigningKey, PathBuf), KeyError> {
    let key = generate()?;
    let file = tls_key_file(identity_file, &key.public_key());
    Ok((write_new(&file, key)?, file))
}

/// The file of a TLS key of the node whose identity key is `identity_file`. Its name has the first
/// 16 digits of the public key.
pub fn tls_key_file(identity_file: &Path, key: &PublicKey) -> PathBuf {
    const DIGITS: usize = 16;
    let digits = &public_hex(key)[..DIGITS];
    identity_file.with_file_name(format!("tls-{digits}.key"))
}

/// Reads the secret half of a node's TLS key; none: there is no file for it.
///
/// # Errors
/// As [`read`]; [`KeyError::Other`] if the file holds another key.
pub fn read_tls(identity_file: &Path, key: &PublicKey) -> Result<Option<SigningKey>, KeyError> {
    let file = tls_key_file(identity_file, key);
    let open = match files::open(&file) {
        Ok(open) => open,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(KeyError::Io { file, error }),
    };
    let found = read_opened(&file, open)?;
    if found.public_key() != *key {
        return Err(KeyError::Other { file });
    }
    Ok(Some(found))
}

fn write_new(file: &Path, key: SigningKey) -> Result<SigningKey, KeyError> {
    let failed = |error| KeyError::Io {
        file: file.to_owned(),
        error,
    };
    let mut out = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => KeyError::Exists {
                file: file.to_owned(),
            },
            _ => failed(error),
        })?;
    let text = format!("{}\n", HEXLOWER.encode(key.seed()));
    out.write_all(text.as_bytes())
        .and_then(|()| out.sync_all())
        .map_err(failed)?;
    Ok(key)
}

/// Reads a key file.
///
/// # Errors
/// [`KeyError::Exposed`] if others can read the file, [`KeyError::NotAKey`] if it holds something
/// else, [`KeyError::Io`] if it cannot be read.
pub fn read(file: &Path) -> Result<SigningKey, KeyError> {
    let failed = |error| KeyError::Io {
        file: file.to_owned(),
        error,
    };
    read_opened(file, File::open(file).map_err(failed)?)
}

fn read_opened(file: &Path, open: File) -> Result<SigningKey, KeyError> {
    let failed = |error| KeyError::Io {
        file: file.to_owned(),
        error,
    };
    let mode = open.metadata().map_err(failed)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Exposed {
            file: file.to_owned(),
            mode,
        });
    }
    let mut text = String::new();
    open.take(KEY_FILE_BYTES_MAX)
        .read_to_string(&mut text)
        .map_err(failed)?;
    let seed = hex32(&text).ok_or_else(|| KeyError::NotAKey {
        file: file.to_owned(),
    })?;
    Ok(SigningKey::from_seed(seed))
}

/// Reads a public key as it stands in configs: 64 hexadecimal digits.
///
/// # Errors
/// [`KeyError::NotAPublicKey`].
pub fn public_from_hex(text: &str) -> Result<PublicKey, KeyError> {
    hex32(text)
        .map(PublicKey::from_bytes)
        .ok_or_else(|| KeyError::NotAPublicKey {
            text: text.to_owned(),
        })
}

/// Writes a public key as it stands in configs: 64 hexadecimal digits.
pub fn public_hex(key: &PublicKey) -> String {
    HEXLOWER.encode(key.as_bytes())
}

/// 32 random bytes of the system.
///
/// # Errors
/// [`KeyError::NoRandom`].
pub fn random() -> Result<[u8; 32], KeyError> {
    let mut bytes = [0; 32];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| KeyError::NoRandom)?;
    Ok(bytes)
}

fn hex32(text: &str) -> Option<[u8; 32]> {
    HEXLOWER_PERMISSIVE
        .decode(text.trim().as_bytes())
        .ok()?
        .try_into()
        .ok()
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_file_is_private_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("node.key");
        let key = create(&file).unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(read(&file).unwrap().public_key(), key.public_key());

        let before = std::fs::read(&file).unwrap();
        assert!(matches!(create(&file), Err(KeyError::Exists { .. })));
        assert_eq!(std::fs::read(&file).unwrap(), before);

        std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            read(&file),
            Err(KeyError::Exposed { mode: 0o644, .. })
        ));
    }

    /// Protects a rotation: the node finds the key that its record names, and no other one.
    #[test]
    fn a_tls_key_is_found_by_its_public_half() {
        let dir = tempfile::tempdir().unwrap();
        let identity = dir.path().join("node.key");
        let (key, file) = create_tls(&identity).unwrap();
        assert_eq!(file.parent(), identity.parent());
        let found = read_tls(&identity, &key.public_key()).unwrap().unwrap();
        assert_eq!(found.public_key(), key.public_key());

        let other = generate().unwrap().public_key();
        assert!(read_tls(&identity, &other).unwrap().is_none());
        std::fs::copy(&file, tls_key_file(&identity, &other)).unwrap();
        let wrong = read_tls(&identity, &other);
        assert!(matches!(wrong, Err(KeyError::Other { .. })));
    }

    #[test]
    fn a_file_that_is_no_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("empty", ""), ("short", "abcd\n"), ("words", "not a key")] {
            let file = dir.path().join(name);
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
            assert!(
                matches!(read(&file), Err(KeyError::NotAKey { .. })),
                "{name}"
            );
        }
    }
}
