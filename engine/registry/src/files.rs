//! Reads files that others may have put there.
//!
//! 1. Only regular files are read: a FIFO or a device could block the reader for ever.
//! 2. A file's length is checked before memory is taken for it.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// Reads a file of at most `bytes_max` bytes.
///
/// # Errors
/// [`ErrorKind::FileTooLarge`] for a longer one, [`ErrorKind::InvalidInput`] for what is no regular
/// file; otherwise the host's.
pub(crate) fn read_bytes(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    let length = file.metadata()?.len();
    if length > bytes_max {
        let why = format!("it has {length} bytes, at most {bytes_max} are read");
        return Err(io::Error::new(ErrorKind::FileTooLarge, why));
    }
    let mut bytes = Vec::with_capacity(length as usize);
    // It may have grown since.
    file.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a regular file to read. Does not wait, whatever stands there.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for what is no regular file; otherwise the host's.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    // Without NONBLOCK the call waits until a process opens a FIFO to write (open(2)); a terminal
    // is not to become ours.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        let why = "it is no regular file";
        return Err(io::Error::new(ErrorKind::InvalidInput, why));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects every reader: what is no file, or too long a one, is refused at once.
    #[test]
    fn only_regular_files_of_some_length_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("file"), "12345678").unwrap();
        assert_eq!(read_bytes(&path("file"), 8).unwrap(), b"12345678");
        let kind = |path: &Path| read_bytes(path, 7).unwrap_err().kind();
        assert_eq!(kind(&path("file")), ErrorKind::FileTooLarge);
        assert_eq!(kind(&path("none")), ErrorKind::NotFound);
        assert_eq!(kind(folder.path()), ErrorKind::InvalidInput);
        assert_eq!(kind(Path::new("/dev/zero")), ErrorKind::InvalidInput);
        let mode = Mode::from_raw_mode(0o600);
        let fifo = path("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert_eq!(kind(&fifo), ErrorKind::InvalidInput);
    }
}
