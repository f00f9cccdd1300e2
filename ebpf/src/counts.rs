//! Who has how many connections: what user space tells the kernel, and what it holds to by itself.
//!
//! 1. [`Counts`] writes the truth of QUIC connections under the number of this run; counts of a run that died hold for nobody.
//! 2. [`TcpCap`] gives out at most the cap's number of guards for a source, whatever the kernel has counted.
//! 3. Sources are counted by IPv4 /32 and IPv6 /64; an IPv4-mapped address is IPv4. Nothing remains of a source without connections.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libbpf_rs::{MapCore as _, MapFlags, MapHandle};
use millrace_edge_policy::source::Source;

/// Connections of sources.
type Table = BTreeMap<Source, u32>;

/// QUIC connections of every source, as the kernel sees them in `quic_sources`.
///
/// Shared by all shards. One lock and one system call for each connection that opens or closes, none for packets.
#[derive(Debug)]
pub struct Counts {
    map: MapHandle,
    run: u32,
    live: Mutex<Table>,
    missed: AtomicU64,
}

impl Counts {
    /// Starts to count under a run's number, which must differ from the one before, and removes what other runs have left.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn new(map: MapHandle, run: u32) -> Result<Self, libbpf_rs::Error> {
        let stale: Vec<Vec<u8>> = map.keys().collect();
        for key in stale {
            map.delete(&key)?;
        }
        Ok(Self {
            map,
            run,
            live: Mutex::default(),
            missed: AtomicU64::new(0),
        })
    }

    /// The number that the counts are written under.
    #[must_use]
    pub fn run(&self) -> u32 {
        self.run
    }

    /// A connection is established.
    pub fn opened(&self, peer: IpAddr) {
        let source = Source::of(peer).cap_key();
        let mut live = locked(&self.live);
        if !live.contains_key(&source) && live.len() >= self.map.max_entries() as usize {
            self.missed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let connections = live.entry(source).or_default();
        *connections += 1;
        self.write(&source, *connections);
    }

    /// A connection that was established has ended.
    pub fn closed(&self, peer: IpAddr) {
        let source = Source::of(peer).cap_key();
        let mut live = locked(&self.live);
        // Absent: it was missed when it opened.
        let Some(connections) = live.get_mut(&source) else {
            return;
        };
        *connections -= 1;
        let left = *connections;
        if left == 0 {
            live.remove(&source);
        }
        self.write(&source, left);
    }

    /// Connections of a source.
    #[must_use]
    pub fn connections(&self, peer: IpAddr) -> u32 {
        locked(&self.live)
            .get(&Source::of(peer).cap_key())
            .copied()
            .unwrap_or(0)
    }

    /// Sources with connections.
    #[must_use]
    pub fn sources(&self) -> usize {
        locked(&self.live).len()
    }

    /// Changes that the kernel does not know of: its map was full, or it refused. The cap in user space holds nevertheless.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    fn write(&self, source: &Source, connections: u32) {
        let key = source.bytes();
        let written = if connections == 0 {
            self.map.delete(key)
        } else {
            // `struct edge_count`.
            let value = u64::from(connections) << 32 | u64::from(self.run);
            self.map.update(key, &value.to_le_bytes(), MapFlags::ANY)
        };
        if written.is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The cap on TCP connections of a source, where connections are accepted: exact.
#[derive(Debug)]
pub struct TcpCap {
    /// 0: any number.
    max: AtomicU32,
    live: Mutex<Table>,
    refused: AtomicU64,
}

/// One connection that is counted; held as long as its socket.
#[derive(Debug)]
pub struct TcpGuard {
    cap: Arc<TcpCap>,
    source: Source,
}

impl TcpCap {
    /// At most `max` connections for a source; 0: any number.
    #[must_use]
    pub fn new(max: u32) -> Arc<Self> {
        Arc::new(Self {
            max: AtomicU32::new(max),
            live: Mutex::default(),
            refused: AtomicU64::new(0),
        })
    }

    /// Changes the cap for connections to come.
    pub fn set_max(&self, max: u32) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Counts an accepted connection; none if its source has as many as it may: close it.
    pub fn admit(self: &Arc<Self>, peer: IpAddr) -> Option<TcpGuard> {
        let source = Source::of(peer).cap_key();
        let max = self.max.load(Ordering::Relaxed);
        let mut live = locked(&self.live);
        let connections = live.get(&source).copied().unwrap_or(0);
        if max != 0 && connections >= max {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        live.insert(source, connections + 1);
        Some(TcpGuard {
            cap: Arc::clone(self),
            source,
        })
    }

    /// Connections of a source.
    #[must_use]
    pub fn connections(&self, peer: IpAddr) -> u32 {
        locked(&self.live)
            .get(&Source::of(peer).cap_key())
            .copied()
            .unwrap_or(0)
    }

    /// Connections that were refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Drop for TcpGuard {
    fn drop(&mut self) {
        let mut live = locked(&self.cap.live);
        match live.get_mut(&self.source) {
            Some(connections) if *connections > 1 => *connections -= 1,
            _ => drop(live.remove(&self.source)),
        }
    }
}

/// A table is whole between any two statements, so a panic elsewhere has not broken it.
fn locked(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    // Protects the promise: the application never holds more than the cap.
    #[test]
    fn guards_are_the_cap() {
        let cap = TcpCap::new(2);
        let first = cap.admit(ip("192.0.2.1")).unwrap();
        let _second = cap.admit(ip("::ffff:192.0.2.1")).unwrap();
        assert!(cap.admit(ip("192.0.2.1")).is_none());
        assert!(cap.admit(ip("192.0.2.2")).is_some());
        drop(first);
        assert_eq!(cap.connections(ip("192.0.2.1")), 1);
        let _third = cap.admit(ip("192.0.2.1")).unwrap();
        assert!(cap.admit(ip("192.0.2.1")).is_none());
        assert_eq!(cap.refused(), 2);

        let _one = cap.admit(ip("2001:db8::1")).unwrap();
        let _two = cap.admit(ip("2001:db8::ffff:2")).unwrap();
        assert!(cap.admit(ip("2001:db8::3")).is_none());
        cap.set_max(0);
        assert!(cap.admit(ip("2001:db8::3")).is_some());
    }

    #[test]
    fn nothing_remains_of_who_left() {
        let cap = TcpCap::new(1);
        for host in 0..=255 {
            drop(cap.admit(IpAddr::from([10, 0, 0, host])).unwrap());
        }
        assert!(locked(&cap.live).is_empty());
    }

    #[test]
    fn many_threads_never_exceed_the_cap() {
        let cap = TcpCap::new(3);
        let peak = AtomicU32::new(0);
        let held = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..5_000 {
                        let guard = cap.admit(ip("192.0.2.1"));
                        if guard.is_some() {
                            peak.fetch_max(
                                held.fetch_add(1, Ordering::SeqCst) + 1,
                                Ordering::SeqCst,
                            );
                            held.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert!(peak.load(Ordering::SeqCst) <= 3);
        assert_eq!(cap.connections(ip("192.0.2.1")), 0);
    }
}
