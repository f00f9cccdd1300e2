//! What the node remembers of the paths to its peers, from one run to the next: RTT and bandwidth.
//!
//! Invariants
//! 1. The file is replaced whole: a node that is killed leaves the old one or the new one.
//! 2. A file that cannot be read is as good as none: connections begin as to unknown peers.
//! 3. A bandwidth is used for a day after it was last measured: then the path may be another.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millrace_protocol::id::NodeId;
use millrace_transport::{PeerStatus, RememberedPath, Transport};
use serde::{Deserialize, Serialize};

/// The file in the state folder.
pub(crate) const FILE_NAME: &str = "paths.json";

/// Longest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Peers that are written: each takes about 180 bytes.
const PATHS_MAX: usize = 4_096;

/// How often what was measured is written. A node that is killed forgets as much.
const INTERVAL: Duration = Duration::from_secs(5);

/// How long a bandwidth holds.
const BANDWIDTH_AGE_MAX_S: u64 = 24 * 60 * 60;

/// How long a peer is remembered that is not met again.
const PATH_AGE_MAX_S: u64 = 30 * 24 * 60 * 60;

/// How old the file's word on a path becomes at most while the path is in use.
const REFRESH_S: u64 = 60 * 60;

/// What is known of a path, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    path: RememberedPath,
    /// Seconds since 1970.
    measured_at_s: u64,
}

/// What is known, by peer.
type Paths = BTreeMap<NodeId, Known>;

#[derive(Debug, Serialize, Deserialize)]
struct File {
    paths: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    node: String,
    measured_at_s: u64,
    rtt_us: u64,
    bandwidth_bytes_per_s: Option<u64>,
}

/// What the file holds, and the file.
#[derive(Debug)]
pub(crate) struct PathFile {
    file: PathBuf,
    written: Paths,
}

impl PathFile {
    /// What an earlier run left; nothing where there is no file, or none that can be read.
    pub(crate) fn read(file: PathBuf) -> Self {
        let written = read(&file, now_s());
        Self { file, written }
    }

    /// What is known of the paths.
    pub(crate) fn paths(&self) -> Vec<(NodeId, RememberedPath)> {
        let paths = self.written.iter();
        paths.map(|(node, known)| (*node, known.path)).collect()
    }
}

/// Seconds since 1970.
fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

fn read(file: &Path, now_s: u64) -> Paths {
    let bytes = match std::fs::metadata(file) {
        Ok(metadata) if metadata.len() <= FILE_BYTES_MAX => std::fs::read(file),
        Ok(_) => Err(io::Error::other("it is longer than 1 MiB")),
        Err(error) => Err(error),
    };
    let parsed = bytes.and_then(|bytes| Ok(serde_json::from_slice::<File>(&bytes)?));
    match parsed {
        Ok(held) => paths_of(held, now_s),
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

fn paths_of(file: File, now_s: u64) -> Paths {
    let entries = file.paths.into_iter().filter_map(|entry| {
        // A clock that was set back says nothing of the age.
        let age_s = now_s.checked_sub(entry.measured_at_s).unwrap_or(u64::MAX);
        let is_fresh = age_s <= BANDWIDTH_AGE_MAX_S;
        let path = RememberedPath {
            rtt: Duration::from_micros(entry.rtt_us),
            bandwidth_bytes_per_s: entry.bandwidth_bytes_per_s.filter(|_| is_fresh),
        };
        let known = Known {
            path,
            measured_at_s: entry.measured_at_s.min(now_s),
        };
        Some((entry.node.parse().ok()?, known))
    });
    entries.collect()
}

fn write(file: &Path, paths: &Paths) -> io::Result<()> {
    let paths = paths.iter().map(|(node, known)| Entry {
        node: node.to_string(),
        measured_at_s: known.measured_at_s,
        rtt_us: u64::try_from(known.path.rtt.as_micros()).unwrap_or(u64::MAX),
        bandwidth_bytes_per_s: known.path.bandwidth_bytes_per_s,
    });
    let held = File {
        paths: paths.take(PATHS_MAX).collect(),
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
    pub(crate) fn start(file: PathFile, transport: Transport) -> io::Result<Self> {
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new()
            .name("millrace-paths".into())
            .spawn(move || {
                let mut writer = Writer::new(file);
                while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    writer.update(&transport.status().peers(), now_s());
                }
                writer.update(&transport.status().peers(), now_s());
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
    held: PathFile,
    has_failed: bool,
}

impl Writer {
    fn new(held: PathFile) -> Self {
        Self {
            held,
            has_failed: false,
        }
    }

    /// Takes up what the connections that are up have measured, and writes it if it is news.
    fn update(&mut self, peers: &[PeerStatus], now_s: u64) {
        let Some(paths) = news(&self.held.written, peers, now_s) else {
            return;
        };
        match write(&self.held.file, &paths) {
            Ok(()) => {
                self.held.written = paths;
                self.has_failed = false;
            }
            Err(error) => {
                if !self.has_failed {
                    tracing::warn!(
                        file = %self.held.file.display(), %error,
                        "the paths to the peers cannot be remembered for the next start"
                    );
                }
                self.has_failed = true;
            }
        }
    }
}

/// What is to be written now, if that differs enough from what was.
fn news(written: &Paths, peers: &[PeerStatus], now_s: u64) -> Option<Paths> {
    let mut paths = written.clone();
    let mut is_news = false;
    for peer in peers {
        let Some(path) = peer.remembered else {
            continue;
        };
        let old = written.get(&peer.node_id);
        let is_old =
            |old: &Known| differ(&old.path, &path) || old.measured_at_s + REFRESH_S < now_s;
        if old.is_none_or(is_old) {
            is_news = true;
            let known = Known {
                path,
                measured_at_s: now_s,
            };
            paths.insert(peer.node_id, known);
        }
    }
    paths.retain(|_, known| known.measured_at_s + PATH_AGE_MAX_S >= now_s);
    is_news.then_some(paths)
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

    const NOW_S: u64 = 1_800_000_000;

    fn known(path: RememberedPath, measured_at_s: u64) -> Known {
        Known {
            path,
            measured_at_s,
        }
    }

    /// Protects the start of the next connections: what was written is read, each bandwidth for a
    /// day after it was measured, and a file that is broken, too long or absent costs nothing but
    /// the memory.
    #[test]
    fn what_is_written_is_read_and_a_broken_file_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE_NAME);
        assert_eq!(read(&file, NOW_S), Paths::new());
        let [one, two] = [0; 2].map(|_| keys::generate().unwrap().node_id());
        let fast = path(150, Some(37_500_000));
        let written = Paths::from([(one, known(fast, NOW_S - 10)), (two, known(fast, NOW_S))]);
        write(&file, &written).unwrap();
        let cases = [
            (NOW_S, [fast, fast]),
            (NOW_S + BANDWIDTH_AGE_MAX_S - 5, [path(150, None), fast]),
            (NOW_S + BANDWIDTH_AGE_MAX_S + 1, [path(150, None); 2]),
            // A clock that was set back says nothing of the age.
            (NOW_S - 5, [fast, path(150, None)]),
        ];
        for (now_s, paths) in cases {
            let read = read(&file, now_s);
            assert_eq!([one, two].map(|node| read[&node].path), paths, "{now_s}");
        }

        let long = format!("{{{}", " ".repeat(1 << 20));
        for broken in ["", "{\"paths\": 3}", &long] {
            std::fs::write(&file, broken).unwrap();
            assert_eq!(read(&file, NOW_S), Paths::new());
        }
    }

    /// Protects the disk: measurements that differ by less than a tenth are not written each time.
    #[test]
    fn a_path_is_news_when_it_differs_by_a_tenth() {
        let old = path(100, Some(1_000));
        for (new, is_news) in [
            (path(110, Some(1_100)), false),
            (path(111, Some(1_000)), true),
            (path(100, Some(899)), true),
            (path(100, None), true),
        ] {
            assert_eq!(differ(&old, &new), is_news, "{new:?}");
        }
        assert!(differ(&path(100, None), &old));
    }
}
