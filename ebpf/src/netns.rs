//! Namespaces of a process: its network namespace, and whether its mounts outlive it.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

use crate::interface::any_socket;
use crate::sys;

/// A network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetworkNamespace {
    /// Cookie. The kernel never gives it to another namespace.
    pub cookie: u64,
    /// Inode, by which tools name the namespace. The kernel may reuse that of a namespace that is
    /// gone.
    pub inode: u64,
}

impl NetworkNamespace {
    /// The namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The kernel's error. It takes Linux 5.14 (`SO_NETNS_COOKIE`) and `/proc`.
    pub fn current() -> io::Result<Self> {
        let any = any_socket()?;
        Ok(Self {
            cookie: sys::netns_cookie(any.as_fd())?,
            inode: fs::metadata("/proc/thread-self/ns/net")?.ino(),
        })
    }

    /// The name of a folder for it.
    pub(crate) fn label(self) -> String {
        format!("{}-{}", self.cookie, self.inode)
    }

    pub(crate) fn of_label(label: &str) -> Option<Self> {
        let (cookie, inode) = label.split_once('-')?;
        Some(Self {
            cookie: cookie.parse().ok()?,
            inode: inode.parse().ok()?,
        })
    }

    /// Its name under `/run/netns`, if it has one.
    fn name(self) -> Option<String> {
        let mut names = fs::read_dir("/run/netns").ok()?.flatten();
        let is_this = |entry: &fs::DirEntry| {
            fs::metadata(entry.path()).is_ok_and(|found| found.ino() == self.inode)
        };
        let found = names.find(is_this)?;
        found.file_name().into_string().ok()
    }
}

/// The namespace, and how to enter it without another `/sys` and other mounts.
impl fmt::Display for NetworkNamespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inode = self.inode;
        match self.name() {
            Some(name) => write!(
                f,
                "net:[{inode}] (enter it: nsenter --net=/run/netns/{name})"
            ),
            None => write!(
                f,
                "net:[{inode}] (`lsns -t net` names a process PID of it; enter it: nsenter --target PID --net)"
            ),
        }
    }
}

/// Whether process 1 has the file system of this path mounted too. Otherwise it ends with the last
/// process of the caller's mount namespace. True if that is not known.
pub(crate) fn lasts(path: &Path) -> bool {
    let Ok(device) = device(path) else {
        return true;
    };
    mounts("/proc/1/mountinfo").is_none_or(|mounts| mounts.iter().any(|m| m.device == device))
}

/// Whether process 1 has a bpffs at this path, or above it, that the caller does not have. False if
/// that is not known.
pub(crate) fn is_hidden(path: &Path) -> bool {
    let (Some(first), Some(own)) = (
        mounts("/proc/1/mountinfo"),
        mounts("/proc/thread-self/mountinfo"),
    ) else {
        return false;
    };
    let is_seen = |device: &str| own.iter().any(|mount| mount.device == device);
    first
        .iter()
        .any(|mount| path.starts_with(&mount.point) && !is_seen(&mount.device))
}

/// Whether the file system of this path was mounted under this name.
pub(crate) fn is_mounted_as(path: &Path, source: &str) -> bool {
    let (Ok(device), Some(mounts)) = (device(path), mounts("/proc/thread-self/mountinfo")) else {
        return false;
    };
    mounts
        .iter()
        .any(|mount| mount.device == device && mount.source == source)
}

/// The device of a path, as `mountinfo` writes it.
fn device(path: &Path) -> io::Result<String> {
    let device = fs::metadata(path)?.dev();
    Ok(format!("{}:{}", major(device), minor(device)))
}

/// A mount of a bpffs.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    device: String,
    point: PathBuf,
    source: String,
}

fn mounts(file: &str) -> Option<Vec<Mount>> {
    let lines = BufReader::new(File::open(file).ok()?).lines();
    lines
        .filter_map(|line| line.map(|line| bpffs(&line)).transpose())
        .collect::<io::Result<_>>()
        .ok()
}

/// Reads a line of `mountinfo`: `36 35 98:0 /root /mount/point options [more ...] - type source
/// options`.
fn bpffs(line: &str) -> Option<Mount> {
    let (mount, what) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(2);
    let device = mount.next()?;
    let point = mount.nth(1)?;
    let mut what = what.split(' ');
    (what.next()? == "bpf").then_some(())?;
    Some(Mount {
        device: device.to_owned(),
        point: unescaped(point),
        source: what.next()?.to_owned(),
    })
}

/// The kernel writes white space and backslashes as `\` and three octal digits.
fn unescaped(point: &str) -> PathBuf {
    let mut parts = point.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let octal = part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend(part.bytes().skip(3));
            }
            None => bytes.extend([b"\\", part.as_bytes()].concat()),
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_says_what_it_was_made_of() {
        let here = NetworkNamespace::current().unwrap();
        assert_eq!(NetworkNamespace::of_label(&here.label()), Some(here));
        assert_eq!(NetworkNamespace::of_label("7"), None);
        assert_eq!(NetworkNamespace::of_label("7-x"), None);
    }

    #[test]
    fn lines_of_a_bpffs_are_read() {
        let line =
            "49 27 0:41 / /run/millrace/edge rw,relatime shared:7 - bpf millrace rw,mode=700";
        let found = bpffs(line).unwrap();
        assert_eq!(
            (found.device.as_str(), found.source.as_str()),
            ("0:41", "millrace")
        );
        assert_eq!(found.point, Path::new("/run/millrace/edge"));
        let escaped = bpffs(&line.replace("/edge", r"/an\040edge\134x\9")).unwrap();
        assert_eq!(escaped.point, Path::new(r"/run/millrace/an edge\x\9"));
        for other in ["22 27 0:21 / /proc rw,relatime - proc proc rw", "", "22 27"] {
            assert_eq!(bpffs(other), None);
        }
    }

    // Protects hosts without a bpffs of another mount namespace: process 1 sees all mounts that are
    // here, or that is not known.
    #[test]
    fn what_everybody_mounts_lasts() {
        assert!(!is_mounted_as(Path::new("/"), "millrace"));
        assert!(lasts(Path::new("/no/such/folder")));
    }
}
