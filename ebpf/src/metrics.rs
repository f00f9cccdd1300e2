//! The counters of the program as plain numbers. The node renders them.
//!
//! 1. Every packet is in exactly one counter: of one reason, and either acted on or only counted.
//! 2. Sums over CPUs are taken while the program runs: each counter is right, and two counters may
//!    be a few packets apart.

use libbpf_rs::{MapCore, MapFlags};
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::stress::UnvalidatedPackets;

use crate::abi::REASONS;

/// Packets by reason, since the maps were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Packets passed, answered or dropped for the reason.
    pub acted: [u64; REASONS],
    /// Packets that passed in mode `count` and would not have in mode `enforce`.
    pub counted: [u64; REASONS],
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            acted: [0; REASONS],
            counted: [0; REASONS],
        }
    }
}

impl Counters {
    /// Reads the sums over all CPUs.
    ///
    /// # Errors
    ///
    /// The kernel's error for reading the map.
    pub fn read(map: &impl MapCore) -> Result<Self, libbpf_rs::Error> {
        let mut sums = Self::default();
        for value in of_cpus(map, 0)? {
            let columns = sums.acted.iter_mut().chain(&mut sums.counted);
            for (sum, word) in columns.zip(value) {
                *sum += word;
            }
        }
        Ok(sums)
    }

    /// Packets from addresses that are not validated, of QUIC and of TCP.
    #[must_use]
    pub fn unvalidated(&self) -> [UnvalidatedPackets; 2] {
        let both = |reason| self.acted_on(reason) + self.counted_as(reason);
        let quic = UnvalidatedPackets {
            answered: both(Reason::TxRetry),
            admitted: both(Reason::PassQuicInitial),
            dropped: 0,
        };
        let tcp = UnvalidatedPackets {
            answered: both(Reason::TxSynCookie),
            admitted: both(Reason::PassTcpSyn),
            dropped: both(Reason::TcpSynBudget),
        };
        [quic, tcp]
    }

    /// Number of all packets.
    #[must_use]
    pub fn packets(&self) -> u64 {
        self.acted.iter().chain(&self.counted).sum()
    }

    /// Packets passed, answered or dropped for a reason.
    #[must_use]
    pub fn acted_on(&self, reason: Reason) -> u64 {
        self.acted[reason.index() as usize]
    }

    /// Packets that mode `enforce` would not have passed, for this reason.
    #[must_use]
    pub fn counted_as(&self, reason: Reason) -> u64 {
        self.counted[reason.index() as usize]
    }
}

/// How often each of the first `rules` rules of a generation decided. It makes one system call for
/// each rule.
///
/// # Errors
///
/// The kernel's error for reading the map.
pub fn hits(map: &impl MapCore, generation: u32, rules: u32) -> Result<Vec<u64>, libbpf_rs::Error> {
    let first = generation * (map.max_entries() / 2);
    (first..first + rules)
        .map(|index| Ok(of_cpus(map, index)?.iter().flatten().sum()))
        .collect()
}

/// Number of entries of a hash map. It walks the map: a large one is too slow for every scrape.
#[must_use]
pub fn occupancy(map: &impl MapCore) -> Occupancy {
    Occupancy {
        entries: map.keys().count() as u64,
        entries_max: u64::from(map.max_entries()),
    }
}

/// Fill level of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Occupancy {
    /// Entries.
    pub entries: u64,
    /// Entries that it has room for.
    pub entries_max: u64,
}

/// The value of each CPU, as 64-bit words.
fn of_cpus(map: &impl MapCore, index: u32) -> Result<Vec<Vec<u64>>, libbpf_rs::Error> {
    let values = map
        .lookup_percpu(&index.to_le_bytes(), MapFlags::ANY)?
        .unwrap_or_default();
    let words = |value: Vec<u8>| value.chunks_exact(8).map(word).collect();
    Ok(values.into_iter().map(words).collect())
}

fn word(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
}
