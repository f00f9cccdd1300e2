//! Key files: a 32-byte Ed25519 seed in hexadecimal, readable by its owner only.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use millrace_protocol::identity::{PublicKey, SigningKey};
use ring::rand::{SecureRandom, SystemRandom};
use serde::Serialize;

use crate::cli::KeygenArgs;
use crate::exit::{Exit, Failure};
use crate::output;

/// 64 digits, and white space around them.
const KEY_FILE_BYTES_MAX: u64 = 256;

#[derive(Serialize)]
struct Made {
    node_id: String,
    public_key: String,
    key_file: String,
}

/// `millrace keygen`
pub(crate) fn run(args: &KeygenArgs) -> Result<Exit, Failure> {
    let key = create(&args.file)?;
    let made = Made {
        node_id: key.node_id().to_string(),
        public_key: public_hex(&key.public_key()),
        key_file: args.file.display().to_string(),
    };
    if args.json {
        output::json(&made)?;
    } else {
        output::data(format_args!("node id     {}", made.node_id))?;
        output::data(format_args!("public key  {}", made.public_key))?;
        output::message(format_args!("wrote {}", made.key_file));
    }
    Ok(Exit::Ok)
}

/// Makes a key file; an existing file is never touched.
pub(crate) fn create(file: &Path) -> Result<SigningKey, Failure> {
    let seed = random()?;
    let mut out = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => Failure::new(
                Exit::Failed,
                format!("{} exists; a key is never overwritten", file.display()),
            ),
            _ => Failure::io(file.display(), &error),
        })?;
    let text = format!("{}\n", HEXLOWER.encode(&seed));
    out.write_all(text.as_bytes())
        .and_then(|()| out.sync_all())
        .map_err(|error| Failure::io(file.display(), &error))?;
    Ok(SigningKey::from_seed(seed))
}

/// A key that lives in memory only.
pub(crate) fn ephemeral() -> Result<SigningKey, Failure> {
    Ok(SigningKey::from_seed(random()?))
}

/// Reads a key file; one that others can read is refused.
pub(crate) fn read(file: &Path) -> Result<SigningKey, Failure> {
    let name = file.display();
    let open = File::open(file).map_err(|error| Failure::io(&name, &error))?;
    let metadata = open
        .metadata()
        .map_err(|error| Failure::io(&name, &error))?;
    if metadata.mode() & 0o077 != 0 {
        return Err(Failure::new(
            Exit::NotPermitted,
            format!(
                "{name} has mode {:04o}, others can read it; run `chmod 600 {name}`",
                metadata.mode() & 0o7777
            ),
        ));
    }
    let mut text = String::new();
    open.take(KEY_FILE_BYTES_MAX)
        .read_to_string(&mut text)
        .map_err(|error| Failure::io(&name, &error))?;
    let seed = hex32(&text).ok_or_else(|| {
        Failure::new(
            Exit::Failed,
            format!("{name} is not a key file: expected 64 hexadecimal digits"),
        )
    })?;
    Ok(SigningKey::from_seed(seed))
}

/// A public key as it stands in configs.
pub(crate) fn public_from_hex(text: &str) -> Result<PublicKey, Failure> {
    hex32(text).map(PublicKey::from_bytes).ok_or_else(|| {
        Failure::new(
            Exit::Usage,
            format!("\"{text}\" is not a public key: expected 64 hexadecimal digits"),
        )
    })
}

pub(crate) fn public_hex(key: &PublicKey) -> String {
    HEXLOWER.encode(key.as_bytes())
}

/// 32 random bytes of the system.
pub(crate) fn random() -> Result<[u8; 32], Failure> {
    let mut bytes = [0; 32];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| Failure::new(Exit::Failed, "the system gives no random numbers"))?;
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
        assert_eq!(create(&file).unwrap_err().exit, Exit::Failed);
        assert_eq!(std::fs::read(&file).unwrap(), before);

        std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(read(&file).unwrap_err().exit, Exit::NotPermitted);
    }

    #[test]
    fn a_file_that_is_no_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("empty", ""), ("short", "abcd\n"), ("words", "not a key")] {
            let file = dir.path().join(name);
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
            assert!(
                read(&file).unwrap_err().message.contains("not a key file"),
                "{name}"
            );
        }
    }
}
