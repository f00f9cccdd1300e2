//! The maps: a descriptor of each, and the memory of those that user space can map.
//!
//! Invariants
//!
//! 1. Only this module touches mapped memory. The kernel's programs, other threads and other
//!    processes write to it at any time. So this module reads and writes it only by atomics, word
//!    by word, and no reference to a plain value in it exists.
//! 2. A word of 8 bytes is never torn; a larger value may be. What must change at once is one word
//!    (`active` in `control`).
//! 3. Stores release and loads acquire: a reader of a new `active` sees everything that was written
//!    before it.
//! 4. A mapping lives as long as its table, and outlives the descriptor.
#![allow(unsafe_code, reason = "maps memory that the kernel shares")]

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::AsFd as _;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use libbpf_rs::{MapCore as _, MapHandle};
use millrace_edge_policy::limiter::Buckets;
use rustix::mm::{MapFlags, ProtFlags};

use crate::abi::{
    EdgeBucket, EdgeConfig, EdgeControl, EdgeCounters, EdgeDecision, EdgeKey, EdgeLimit, EdgeMock,
    EdgeNode, EdgePorts, EdgeSampling, EdgeService, EdgeSparse, GENERATIONS, PORTS,
};

/// A type that the memory of a map can be read as and written from.
///
/// # Safety
///
/// `repr(C)`, aligned to at most 8 bytes, without padding; every bit pattern is a value.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($type:ty),* $(,)?) => {
        $(
            // SAFETY: integers, arrays of them, or `repr(C)` structures of both whose padding is a
            // field.
            unsafe impl Plain for $type {}
        )*
    };
}

plain!(
    u8,
    u16,
    u32,
    u64,
    EdgeKey,
    EdgeLimit,
    EdgeService,
    EdgeConfig,
    EdgeControl,
    EdgeCounters
);
plain!(
    EdgeDecision,
    EdgeMock,
    EdgeBucket,
    EdgeNode,
    EdgeSparse,
    EdgePorts,
    EdgeSampling
);

/// Why a map cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// It could not be opened.
    #[error("map {name}: {source}")]
    Open {
        /// Name of the map.
        name: String,
        /// The kernel's error.
        source: libbpf_rs::Error,
    },
    /// Its values have another size than this binary expects.
    #[error(
        "map {name} has values of {found} bytes, not of {expected}: it belongs to another version of millrace; \
         detach (millrace xdp detach) and attach again"
    )]
    Layout {
        /// Name of the map.
        name: String,
        /// Size of its values, in bytes.
        found: usize,
        /// Size that this binary expects, in bytes.
        expected: usize,
    },
    /// The kernel refuses to map its memory.
    #[error("cannot map the memory of {name}: {source}")]
    Memory {
        /// Name of the map.
        name: String,
        /// The kernel's error.
        source: std::io::Error,
    },
}

/// Memory that a map shares with this process.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: all access is by atomics.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `mmap` returned this region, and no borrow of it is left.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// The values of an array map, mapped into this process.
#[derive(Debug)]
pub struct Table<T> {
    memory: Memory,
    len: usize,
    values: PhantomData<T>,
}

/// Values of an array map start at multiples of 8 bytes.
const fn stride<T>() -> usize {
    size_of::<T>().next_multiple_of(8)
}

impl<T: Plain> Table<T> {
    /// Maps an array map.
    ///
    /// # Errors
    ///
    /// [`MapError::Layout`] if its values have another size than `T`, [`MapError::Memory`] if the
    /// kernel refuses to map it.
    pub fn map(handle: &MapHandle) -> Result<Self, MapError> {
        let name = || handle.name().to_string_lossy().into_owned();
        let found = handle.value_size() as usize;
        if found != size_of::<T>() {
            return Err(MapError::Layout {
                name: name(),
                found,
                expected: size_of::<T>(),
            });
        }
        let len = handle.max_entries() as usize;
        let bytes = len * stride::<T>();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                access,
                flags,
                handle.as_fd(),
                0,
            )
        };
        let start = start.map_err(|source| MapError::Memory {
            name: name(),
            source: source.into(),
        })?;
        let start = NonNull::new(start.cast()).ok_or_else(|| MapError::Memory {
            name: name(),
            source: std::io::ErrorKind::OutOfMemory.into(),
        })?;
        Ok(Self {
            memory: Memory { start, bytes },
            len,
            values: PhantomData,
        })
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the map has no values. No array map is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads one value, word by word.
    ///
    /// # Panics
    ///
    /// If `index` is not below [`Self::len`].
    #[must_use]
    pub fn load(&self, index: usize) -> T {
        self.load_part(index, 0)
    }

    /// Writes one value, word by word.
    ///
    /// # Panics
    ///
    /// If `index` is not below [`Self::len`].
    pub fn store(&self, index: usize, value: &T) {
        self.store_part(index, 0, value);
    }

    /// Reads a field at its offset (`std::mem::offset_of`).
    ///
    /// # Panics
    ///
    /// If the field reaches past the end of the value.
    #[must_use]
    pub fn load_part<F: Plain>(&self, index: usize, offset: usize) -> F {
        let from = self.place::<F>(index, offset);
        let mut value = MaybeUninit::<F>::uninit();
        let to = value.as_mut_ptr().cast::<u8>();
        for (at, width) in Words::of(from.as_ptr() as usize, size_of::<F>()) {
            // SAFETY: in bounds of both, aligned in the map; `to` is written as bytes.
            unsafe { load_word(from.as_ptr().wrapping_add(at), to.wrapping_add(at), width) };
        }
        // SAFETY: all bytes are written, and any are a value.
        unsafe { value.assume_init() }
    }

    /// Writes a field at its offset.
    ///
    /// # Panics
    ///
    /// If the field reaches past the end of the value.
    pub fn store_part<F: Plain>(&self, index: usize, offset: usize, value: &F) {
        let to = self.place::<F>(index, offset);
        let from = std::ptr::from_ref(value).cast::<u8>();
        for (at, width) in Words::of(to.as_ptr() as usize, size_of::<F>()) {
            // SAFETY: in bounds of both, aligned in the map; `from` has no padding.
            unsafe { store_word(to.as_ptr().wrapping_add(at), from.wrapping_add(at), width) };
        }
    }

    fn place<F>(&self, index: usize, offset: usize) -> NonNull<u8> {
        assert!(index < self.len, "value {index} of {}", self.len);
        assert!(
            offset + size_of::<F>() <= size_of::<T>(),
            "offset {offset} in {} bytes",
            size_of::<T>()
        );
        // SAFETY: both bounds are checked, and the mapping holds `len` strides.
        unsafe { self.memory.start.add(index * stride::<T>() + offset) }
    }
}

/// Cuts a range of bytes into the largest aligned words that fit: offset and width of each.
struct Words {
    address: usize,
    at: usize,
    bytes: usize,
}

impl Words {
    fn of(address: usize, bytes: usize) -> Self {
        Self {
            address,
            at: 0,
            bytes,
        }
    }
}

impl Iterator for Words {
    type Item = (usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        let left = self.bytes - self.at;
        let fits = |width: usize| left >= width && (self.address + self.at).is_multiple_of(width);
        let width = [8, 4, 1].into_iter().find(|width| fits(*width))?;
        let at = self.at;
        self.at += width;
        Some((at, width))
    }
}

/// # Safety
///
/// `from` is mapped for `width` bytes, and aligned to them; `to` may be written as many.
unsafe fn load_word(from: *mut u8, to: *mut u8, width: usize) {
    match width {
        8 => {
            // SAFETY: mapped and aligned.
            let word = unsafe { AtomicU64::from_ptr(from.cast()) }.load(Ordering::Acquire);
            // SAFETY: may be written.
            unsafe { to.cast::<u64>().write_unaligned(word) };
        }
        4 => {
            // SAFETY: mapped and aligned.
            let word = unsafe { AtomicU32::from_ptr(from.cast()) }.load(Ordering::Acquire);
            // SAFETY: may be written.
            unsafe { to.cast::<u32>().write_unaligned(word) };
        }
        _ => {
            // SAFETY: mapped.
            let byte = unsafe { AtomicU8::from_ptr(from) }.load(Ordering::Acquire);
            // SAFETY: may be written.
            unsafe { to.write(byte) };
        }
    }
}

/// # Safety
///
/// `to` is mapped for `width` bytes, and aligned to them; `from` may be read as many.
unsafe fn store_word(to: *mut u8, from: *const u8, width: usize) {
    match width {
        8 => {
            // SAFETY: may be read.
            let word = unsafe { from.cast::<u64>().read_unaligned() };
            // SAFETY: mapped and aligned.
            unsafe { AtomicU64::from_ptr(to.cast()) }.store(word, Ordering::Release);
        }
        4 => {
            // SAFETY: may be read.
            let word = unsafe { from.cast::<u32>().read_unaligned() };
            // SAFETY: mapped and aligned.
            unsafe { AtomicU32::from_ptr(to.cast()) }.store(word, Ordering::Release);
        }
        _ => {
            // SAFETY: may be read.
            let byte = unsafe { from.read() };
            // SAFETY: mapped.
            unsafe { AtomicU8::from_ptr(to) }.store(byte, Ordering::Release);
        }
    }
}

impl Buckets for Table<EdgeBucket> {
    fn count(&self) -> usize {
        self.len
    }

    fn bucket(&self, index: usize) -> &[AtomicU64; 8] {
        let place = self.place::<EdgeBucket>(index, 0);
        // SAFETY: in bounds, aligned to 8, and only ever used by atomics; it lives as long as
        // `self`.
        unsafe { place.cast().as_ref() }
    }
}

/// All maps of the edge. Dropping it closes this process's descriptors and mappings only.
#[derive(Debug)]
pub struct Maps {
    handles: BTreeMap<&'static str, MapHandle>,
    /// State that user space sets: one value.
    pub control: Table<EdgeControl>,
    /// The service of each port: one value.
    pub ports: Table<EdgePorts>,
    /// Dense nodes of the IPv4 tries, of both generations.
    pub trie4: Table<EdgeNode>,
    /// Dense nodes of the IPv6 tries, of both generations.
    pub trie6: Table<EdgeNode>,
    /// Sparse nodes of the IPv4 tries, of both generations.
    pub sparse4: Table<EdgeSparse>,
    /// Sparse nodes of the IPv6 tries, of both generations.
    pub sparse6: Table<EdgeSparse>,
    /// Buckets of the sketch, of both generations.
    pub limiter: Table<EdgeBucket>,
    /// Global budgets, one bucket each. Only the first word of a bucket is used.
    pub budgets: Table<EdgeBucket>,
    /// How many of the drops become events: one value.
    pub sampling: Table<EdgeSampling>,
    /// The last decision of `edge_trace` or `edge_test`: one value.
    pub decision: Table<EdgeDecision>,
    /// The environment of `edge_test`: one value.
    pub mock: Table<EdgeMock>,
}

impl Maps {
    /// Maps that outlive a program: they are pinned, and the next program reuses them.
    pub const NAMES: [&'static str; 19] = [
        "control",
        "ports",
        "trie4",
        "trie6",
        "sparse4",
        "sparse6",
        "limiter",
        "budgets",
        "peers",
        "quic_sources",
        "tcp_sources",
        "connections",
        "replies",
        "counters",
        "hits",
        "sampling",
        "events",
        "decision",
        "mock",
    ];

    /// Opens every map by name, and maps those that can be mapped.
    ///
    /// # Errors
    ///
    /// [`MapError`] if one cannot be opened or mapped, or has another layout than this binary.
    pub fn open(
        mut open: impl FnMut(&'static str) -> Result<MapHandle, libbpf_rs::Error>,
    ) -> Result<Self, MapError> {
        let mut handles = BTreeMap::new();
        for name in Self::NAMES {
            let handle = open(name).map_err(|source| MapError::Open {
                name: name.to_owned(),
                source,
            })?;
            handles.insert(name, handle);
        }
        Ok(Self {
            control: Table::map(&handles["control"])?,
            ports: Table::map(&handles["ports"])?,
            trie4: Table::map(&handles["trie4"])?,
            trie6: Table::map(&handles["trie6"])?,
            sparse4: Table::map(&handles["sparse4"])?,
            sparse6: Table::map(&handles["sparse6"])?,
            limiter: Table::map(&handles["limiter"])?,
            budgets: Table::map(&handles["budgets"])?,
            sampling: Table::map(&handles["sampling"])?,
            decision: Table::map(&handles["decision"])?,
            mock: Table::map(&handles["mock"])?,
            handles,
        })
    }

    /// The descriptor of a map.
    ///
    /// # Panics
    ///
    /// If `name` is not in [`Self::NAMES`].
    #[must_use]
    pub fn handle(&self, name: &str) -> &MapHandle {
        &self.handles[name]
    }

    /// Keys of registry peers, by node tag.
    #[must_use]
    pub fn peers(&self) -> &MapHandle {
        self.handle("peers")
    }

    /// QUIC connections by source.
    #[must_use]
    pub fn quic_sources(&self) -> &MapHandle {
        self.handle("quic_sources")
    }

    /// TCP connections by source.
    #[must_use]
    pub fn tcp_sources(&self) -> &MapHandle {
        self.handle("tcp_sources")
    }

    /// Packets by reason, for each CPU.
    #[must_use]
    pub fn counters(&self) -> &MapHandle {
        self.handle("counters")
    }

    /// Packets by rule, for each CPU: index `generation * rules_max + rule`.
    #[must_use]
    pub fn hits(&self) -> &MapHandle {
        self.handle("hits")
    }

    /// Sampled drops: a ring buffer of `EdgeEvent`.
    #[must_use]
    pub fn events(&self) -> &MapHandle {
        self.handle("events")
    }

    /// Number of rules that one generation has room for.
    #[must_use]
    pub fn rules_max(&self) -> usize {
        self.hits().max_entries() as usize / GENERATIONS
    }

    /// Sets the service of a port: its index, or none. It is one store.
    ///
    /// # Panics
    ///
    /// For a generation or an index that does not exist.
    pub fn set_port(&self, generation: usize, tcp: bool, port: u16, service: Option<u8>) {
        let entry = service.map_or(0, |index| index + 1);
        self.ports
            .store_part(0, port_offset(generation, tcp, port), &entry);
    }

    /// The index of the service of a port; none if it has none.
    #[must_use]
    pub fn port(&self, generation: usize, tcp: bool, port: u16) -> Option<u8> {
        self.ports
            .load_part::<u8>(0, port_offset(generation, tcp, port))
            .checked_sub(1)
    }

    /// Writes one generation of the settings. `control.active` puts it in force, not this.
    pub fn store_config(&self, generation: usize, config: &EdgeConfig) {
        self.control
            .store_part(0, config_offset(generation), config);
    }

    /// One generation of the settings.
    #[must_use]
    pub fn load_config(&self, generation: usize) -> EdgeConfig {
        self.control.load_part(0, config_offset(generation))
    }
}

fn config_offset(generation: usize) -> usize {
    assert!(generation < GENERATIONS, "generation {generation}");
    offset_of!(EdgeControl, config) + generation * size_of::<EdgeConfig>()
}

fn port_offset(generation: usize, tcp: bool, port: u16) -> usize {
    assert!(generation < GENERATIONS, "generation {generation}");
    (generation * 2 + usize::from(tcp)) * PORTS + usize::from(port)
}
