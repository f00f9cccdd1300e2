//! What the node remembers of the paths to its peers, from one run to the next: RTT and bandwidth.
//!
//! Invariants
//! 1. The file is replaced whole: a node that is killed leaves the old one or the new one.
//! 2. A file that cannot be read is as good as none: connections begin as to unknown peers.
//! 3. A bandwidth is used for a day: after that the path may be another.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millrace_protocol::id::NodeId;
use millrace_transport::{RememberedPath, Transport};
use serde::{Deserialize, Serialize};

/// The file in the state folder.
pub(crate) const FILE_NAME: &str = "paths.json";

/// Longest file that is read: about 8,000 peers.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How often what was measured is written. A node that is killed forgets as much.
const INTERVAL: Duration = Duration::from_secs(5);

/// How long a bandwidth holds.
const BANDWIDTH_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// What is known, by peer.
pub(crate) type Paths = BTreeMap<NodeId, RememberedPath>;

#[derive(Debug, Serialize, Deserialize)]
struct File {
    /// Seconds since 1970.
    saved_at_s: u64,
    paths: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    node: String,
    rtt_us: u64,
    bandwidth_bytes_per_s: Option<u64>,
}

/// What an earlier run left; nothing where there is no file, or none that can be read.
pub(crate) fn read(file: &Path, now: SystemTime) -> Paths {
    let bytes = match std::fs::metadata(file) {
        Ok(metadata) if metadata.len() <= FILE_BYTES_MAX => std::fs::read(file),
        Ok(_) => Err(io::Error::other("it is longer than 1 MiB")),
        Err(error) => Err(error),
    };
    let parsed = bytes.and_then(|bytes| Ok(serde_json::from_slice::<File>(&bytes)?));
    match parsed {
        Ok(held) => paths_of(held, now),
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(
                    file = %file.display(), %error,
                    "the remembered paths cannot be read; all peers count as unknown"
                );
            }
            Paths::new()
        }
    }
}

fn paths_of(file: File, now: SystemTime) -> Paths {
    let saved_at = UNIX_EPOCH.checked_add(Duration::from_secs(file.saved_at_s));
    let age = saved_at.and_then(|at| now.duration_since(at).ok());
    let is_fresh = age.is_some_and(|age| age <= BANDWIDTH_AGE_MAX);
    let entries = file.paths.into_iter().filter_map(|entry| {
        let path = RememberedPath {
            rtt: Duration::from_micros(entry.rtt_us),
            bandwidth_bytes_per_s: entry.bandwidth_bytes_per_s.filter(|_| is_fresh),
        };
        Some((entry.node.parse().ok()?, path))
    });
    entries.collect()
}

fn write(file: &Path, paths: &Paths, now: SystemTime) -> io::Result<()> {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let paths = paths.iter().map(|(node, path)| Entry {
        node: node.to_string(),
        rtt_us: u64::try_from(path.rtt.as_micros()).unwrap_or(u64::MAX),
        bandwidth_bytes_per_s: path.bandwidth_bytes_per_s,
    });
    let held = File {
        saved_at_s: since.as_secs(),
        paths: paths.collect(),
    };
    let new = file.with_extension("json.new");
    std::fs::write(&new, serde_json::to_vec_pretty(&held)?)?;
    std::fs::rename(new, file)
}

/// The thread that writes what the transport measured. It ends, with a last write, when this is
/// dropped; drop it before the transport closes.
#[derive(Debug)]
pub(crate) struct PathThread {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl PathThread {
    /// `known` is what the file held.
    pub(crate) fn start(file: PathBuf, known: Paths, transport: Transport) -> io::Result<Self> {
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new()
            .name("millrace-paths".into())
            .spawn(move || {
                let mut writer = Writer::new(file, known);
                while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    writer.update(&transport);
                }
                writer.update(&transport);
            })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for PathThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic has told of itself.
            thread.join().ok();
        }
    }
}

struct Writer {
    file: PathBuf,
    known: Paths,
    has_failed: bool,
}

impl Writer {
    fn new(file: PathBuf, known: Paths) -> Self {
        Self {
            file,
            known,
            has_failed: false,
        }
    }

    /// Takes up what the connections that are up have measured, and writes it if it is news.
    fn update(&mut self, transport: &Transport) {
        let mut is_news = false;
        for peer in transport.status().peers() {
            if let Some(path) = peer.remembered {
                let old = self.known.insert(peer.node_id, path);
                is_news |= old.is_none_or(|old| differ(&old, &path));
            }
        }
        if !is_news {
            return;
        }
        let written = write(&self.file, &self.known, SystemTime::now());
        if let Err(error) = &written
            && !self.has_failed
        {
            tracing::warn!(
                file = %self.file.display(), %error,
                "the paths to the peers cannot be remembered for the next start"
            );
        }
        self.has_failed = written.is_err();
    }
}

/// Whether a path differs from what was known of it by more than measurements do anyway.
fn differ(old: &RememberedPath, new: &RememberedPath) -> bool {
    let far = |old: u128, new: u128| 10 * old.abs_diff(new) > old;
    let bandwidth = |path: &RememberedPath| u128::from(path.bandwidth_bytes_per_s.unwrap_or(0));
    far(old.rtt.as_micros(), new.rtt.as_micros()) || far(bandwidth(old), bandwidth(new))
}

#[cfg(test)]
mod tests {
    use millrace_registry::keys;

    use super::*;

    fn path(rtt_ms: u64, bandwidth: Option<u64>) -> RememberedPath {
        RememberedPath {
            rtt: Duration::from_millis(rtt_ms),
            bandwidth_bytes_per_s: bandwidth,
        }
    }

    /// Protects the start of the next connections: what was written is read, a bandwidth for a day,
    /// and a file that is broken, too long or absent costs nothing but the memory.
    #[test]
    fn what_is_written_is_read_and_a_broken_file_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE_NAME);
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        assert_eq!(read(&file, now), Paths::new());
        let [one, two] = [0; 2].map(|_| keys::generate().unwrap().node_id());
        let known = Paths::from([(one, path(150, Some(37_500_000))), (two, path(1, None))]);
        write(&file, &known, now).unwrap();
        assert_eq!(read(&file, now + BANDWIDTH_AGE_MAX), known);
        let old = read(&file, now + 2 * BANDWIDTH_AGE_MAX);
        assert_eq!(
            old,
            Paths::from([(one, path(150, None)), (two, path(1, None))])
        );
        // A clock that was set back says nothing of the age.
        assert_eq!(read(&file, UNIX_EPOCH), old);

        let long = format!("{{{}", " ".repeat(1 << 20));
        for broken in ["", "{\"paths\": 3}", &long] {
            std::fs::write(&file, broken).unwrap();
            assert_eq!(read(&file, now), Paths::new());
        }
    }

    /// Protects the disk: measurements that differ by little are not written each time.
    #[test]
    fn a_path_is_news_when_it_differs_by_a_tenth() {
        let known = path(100, Some(1_000));
        for (new, is_news) in [
            (path(110, Some(1_100)), false),
            (path(111, Some(1_000)), true),
            (path(100, Some(899)), true),
            (path(100, None), true),
        ] {
            assert_eq!(differ(&known, &new), is_news, "{new:?}");
        }
        assert!(differ(&path(100, None), &known));
    }
}
