//! Counts of connections by source: the ones that user space tells the kernel, and the ones it
//! enforces by itself.
//!
//! 1. [`Counts`] writes the number of QUIC connections under the number of this run. The programs
//!    ignore counts of another run.
//! 2. [`TcpCap`] gives out at most as many guards for a source as the cap allows, whatever the
//!    kernel has counted.
//! 3. Sources are counted by IPv4 /32 and IPv6 /64; an IPv4-mapped address is IPv4. A source
//!    without connections takes no memory.

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
/// All shards share it. It takes one lock and one system call for each connection that opens or
/// closes, and none for packets.
#[derive(Debug)]
pub struct Counts {
    map: MapHandle,
    run: u32,
    live: Mutex<Table>,
    missed: AtomicU64,
}

impl Counts {
    /// Starts to count under the number of a run, which must differ from the one before. Removes
    /// the counts of other runs.
    ///
    /// # Errors
    ///
    /// The kernel's error for an access to the map.
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

    /// The run under which it counts.
    #[must_use]
    pub fn run(&self) -> u32 {
        self.run
    }

    /// Counts a connection that is established.
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

    /// Ends a connection that was established.
    pub fn closed(&self, peer: IpAddr) {
        let source = Source::of(peer).cap_key();
        let mut live = locked(&self.live);
        // Absent: the map was full when it opened.
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

    /// Number of connections of a source.
    #[must_use]
    pub fn connections(&self, peer: IpAddr) -> u32 {
        locked(&self.live)
            .get(&Source::of(peer).cap_key())
            .copied()
            .unwrap_or(0)
    }

    /// Number of sources with connections.
    #[must_use]
    pub fn sources(&self) -> usize {
        locked(&self.live).len()
    }

    /// Number of changes that the kernel did not take: its map was full, or it refused. User space
    /// enforces the cap nevertheless.
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

/// The cap on TCP connections of a source, exact, enforced where connections are accepted.
#[derive(Debug)]
pub struct TcpCap {
    /// 0: any number.
    max: AtomicU32,
    live: Mutex<Table>,
    refused: AtomicU64,
}

/// One counted connection; the caller keeps it as long as the socket.
#[derive(Debug)]
pub struct TcpGuard {
    cap: Arc<TcpCap>,
    source: Source,
}

impl TcpCap {
    /// A cap of `max` connections for a source; 0: no cap.
    #[must_use]
    pub fn new(max: u32) -> Arc<Self> {
        Arc::new(Self {
            max: AtomicU32::new(max),
            live: Mutex::default(),
            refused: AtomicU64::new(0),
        })
    }

    /// Changes the cap for new connections.
    pub fn set_max(&self, max: u32) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Counts an accepted connection. None if its source has reached the cap: the caller closes it.
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

    /// Number of connections of a source.
    #[must_use]
    pub fn connections(&self, peer: IpAddr) -> u32 {
        locked(&self.live)
            .get(&Source::of(peer).cap_key())
            .copied()
            .unwrap_or(0)
    }

    /// Number of connections that were refused.
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

/// The table is whole between any two statements, so a poisoned lock holds valid counts.
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
