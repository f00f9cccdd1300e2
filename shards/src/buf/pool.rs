//! The chunk pool: 1 MiB chunks up to a fixed number, refcounted across shards.
//!
//! A chunk that is not to be full takes only the units of 64 KiB that it needs: several share the
//! 1 MiB of one whole chunk. How many bytes a body keeps from others is therefore its length,
//! rounded up to [`UNIT_BYTES`].
//!
//! The pool has the address space of all its chunks, and the pages of those that were needed so far
//! ([`Growth`]). It gives none back to the system.
//!
//! Cost: `take` and the last drop are a push or pop of a lock-free queue for a whole chunk, a short
//! scan and a compare-and-swap for a smaller one (`units`); a clone is one relaxed add.
//!
//! Invariants:
//!
//! 1. The units of a chunk that is present are free in `units` exactly when no handle to it exists.
//! 2. Every `ChunkMut` and every group of `Chunk`s sharing one header owns one strong count of
//!    the pool, and one of its account if it is charged to one.
//! 3. A chunk that is charged is credited after its units are free again, or when its owner says
//!    so.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};

use super::account::Account;
use super::growth::Growth;
use super::mapping::{Mapping, PageKind, PoolError};
use super::units::{Run, UNITS_PER_CHUNK, UnitMap};
use crate::memory::{CHUNK_BYTES, HugePages, UNIT_BYTES};

/// A pool of chunks: a handle that any thread may hold.
#[derive(Clone)]
pub struct ChunkPool {
    inner: Arc<PoolInner>,
}

struct PoolInner {
    mapping: Mapping,
    /// One for each unit; a chunk uses that of its first unit.
    headers: Box<[Header]>,
    units: UnitMap,
    growth: Growth,
}

/// What a chunk's handles share. One cache line, so that counting one chunk disturbs no other.
#[repr(align(64))]
struct Header {
    refs: AtomicUsize,
    data: NonNull<u8>,
    /// Bytes that are frozen.
    len: AtomicU32,
    /// Units that the chunk has.
    units: AtomicU32,
    /// Index of the first unit.
    index: u32,
    pool: AtomicPtr<PoolInner>,
    /// A strong count of who is charged for the chunk, or null.
    account: AtomicPtr<Account>,
}

const _: () = assert!(size_of::<Header>() == 64);
const _: () = assert!(size_of::<Chunk>() == 8);

// SAFETY: `data` points into the pool's mapping, which is not tied to a thread; who may read or
// write there is governed by the handles (module argument). All else is atomic or constant.
unsafe impl Send for Header {}
// SAFETY: as above; a shared header gives no access to the data by itself.
unsafe impl Sync for Header {}

impl ChunkPool {
    /// A pool of `bytes`, rounded up to whole chunks, that has all its pages at once.
    ///
    /// # Errors
    /// When the system has no such memory, or no huge pages although required.
    pub fn new(bytes: u64, huge: HugePages) -> Result<Self, PoolError> {
        Self::growing(bytes, bytes, huge)
    }

    /// A pool of at most `bytes_max`, rounded up to whole chunks. It keeps up to `ahead_bytes` of
    /// free pages from the start on, and asks the system for more when less are left. With reserved
    /// huge pages it has all at once.
    ///
    /// # Errors
    /// When the system has no such memory, or no huge pages although required.
    pub fn growing(ahead_bytes: u64, bytes_max: u64, huge: HugePages) -> Result<Self, PoolError> {
        let bytes = bytes_max;
        let count = bytes.div_ceil(CHUNK_BYTES as u64);
        let chunks = u32::try_from(count).ok();
        let Some((chunks, units)) = chunks.and_then(|chunks| {
            let units = chunks.checked_mul(UNITS_PER_CHUNK)?;
            Some((chunks, units))
        }) else {
            let source = std::io::Error::from_raw_os_error(libc::ENOMEM);
            return Err(PoolError::Map { bytes, source });
        };
        let mapping = Mapping::for_chunks(chunks as usize * CHUNK_BYTES, huge)?;
        let base = mapping.as_ptr();
        let headers = (0..units)
            .map(|index| {
                // SAFETY: index * UNIT_BYTES lies within the mapping, which has a unit for each
                // index.
                let data = unsafe { base.add(index as usize * UNIT_BYTES) };
                Header {
                    refs: AtomicUsize::new(0),
                    data,
                    len: AtomicU32::new(0),
                    units: AtomicU32::new(0),
                    index,
                    pool: AtomicPtr::new(std::ptr::null_mut()),
                    account: AtomicPtr::new(std::ptr::null_mut()),
                }
            })
            .collect();
        let ahead = match mapping.kind() {
            PageKind::Huge => chunks,
            PageKind::Transparent | PageKind::Ordinary => {
                u32::try_from(ahead_bytes.div_ceil(CHUNK_BYTES as u64)).unwrap_or(chunks)
            }
        };
        let inner = Arc::new(PoolInner {
            mapping,
            headers,
            units: UnitMap::new(chunks),
            growth: Growth::new(chunks, ahead),
        });
        inner.growth.fill(&inner.mapping, &inner.units);
        for header in &inner.headers {
            let pool = Arc::as_ptr(&inner).cast_mut();
            header.pool.store(pool, Ordering::Relaxed);
        }
        Ok(Self { inner })
    }

    /// A free chunk of [`CHUNK_BYTES`], or `None` when no whole one is left.
    #[must_use]
    pub fn take(&self) -> Option<ChunkMut> {
        self.take_units(UNITS_PER_CHUNK)
    }

    /// A chunk of at least `bytes`, rounded up to [`UNIT_BYTES`]; `None` when the pool has no such
    /// space in one piece, or when `bytes` exceeds [`CHUNK_BYTES`].
    #[must_use]
    pub fn take_bytes(&self, bytes: usize) -> Option<ChunkMut> {
        if bytes > CHUNK_BYTES {
            return None;
        }
        self.take_units(bytes.div_ceil(UNIT_BYTES).max(1) as u32)
    }

    fn take_units(&self, units: u32) -> Option<ChunkMut> {
        let run = self.inner.take(units)?;
        if self.inner.growth.begin_ahead(&self.inner.units) {
            PoolInner::grow_ahead(&self.inner);
        }
        let header = &self.inner.headers[run.first as usize];
        header.refs.store(1, Ordering::Relaxed);
        header.units.store(run.units, Ordering::Relaxed);
        let pool = header.pool.load(Ordering::Relaxed);
        // SAFETY: `pool` is the address of this pool's inner value, which `self` keeps alive.
        unsafe { Arc::increment_strong_count(pool) };
        Some(ChunkMut {
            header: NonNull::from(header),
        })
    }

    /// Whole chunks that `take` would give now. Space in chunks that smaller ones share is not
    /// among them: see [`Self::free_bytes`].
    #[must_use]
    pub fn free_chunks(&self) -> usize {
        self.inner.units.whole_chunks() + self.inner.growth.absent_chunks() as usize
    }

    /// Chunks of the pool at most.
    #[must_use]
    pub fn total_chunks(&self) -> usize {
        self.inner.units.chunks_max()
    }

    /// Bytes that the pool has pages for by now: those that were needed, and some ahead.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        u64::from(self.inner.growth.present_chunks()) * CHUNK_BYTES as u64
    }

    /// Bytes that are not taken, in whole chunks and beside smaller ones. Looks at every chunk.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        let absent_bytes = u64::from(self.inner.growth.absent_chunks()) * CHUNK_BYTES as u64;
        (self.inner.units.free_units() * UNIT_BYTES) as u64 + absent_bytes
    }

    /// Bytes of the pool at most.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        (self.total_chunks() * CHUNK_BYTES) as u64
    }

    /// Where the pool's pages came from.
    #[must_use]
    pub fn page_kind(&self) -> PageKind {
        self.inner.mapping.kind()
    }
}

impl PoolInner {
    fn take(&self, units: u32) -> Option<Run> {
        loop {
            let run = self.units.take(units);
            // What another thread took meanwhile is another reason to grow.
            if run.is_some() || !self.growth.step(&self.units) {
                return run;
            }
        }
    }

    /// Lets a thread make pages present.
    fn grow_ahead(pool: &Arc<Self>) {
        let shared = Arc::clone(pool);
        let thread = std::thread::Builder::new().name("millrace-pool".into());
        let started = thread.spawn(move || {
            shared.growth.leave_core();
            loop {
                shared.growth.fill(&shared.mapping, &shared.units);
                shared.growth.end_ahead();
                // What was taken since the last look started no thread.
                if !shared.growth.begin_ahead(&shared.units) {
                    break;
                }
            }
        });
        if started.is_err() {
            // A shard gets the pages at its first write to each.
            pool.growth.end_ahead();
        }
    }
}

impl fmt::Debug for ChunkPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkPool")
            .field("free_chunks", &self.free_chunks())
            .field("total_chunks", &self.total_chunks())
            .field("pages", &self.page_kind())
            .finish()
    }
}

/// A chunk with one owner, who may write all of it: [`CHUNK_BYTES`], or the units that it was taken
/// with. Its memory is always initialised; what an earlier owner left in it is still there.
pub struct ChunkMut {
    header: NonNull<Header>,
}

// SAFETY: the handle is unique and the memory is not tied to a thread.
unsafe impl Send for ChunkMut {}
// SAFETY: a shared reference only reads.
unsafe impl Sync for ChunkMut {}

impl ChunkMut {
    /// Ends writing: the first `len` bytes become a shared chunk.
    ///
    /// # Panics
    /// When `len` exceeds the chunk.
    #[must_use]
    pub fn freeze(self, len: usize) -> Chunk {
        assert!(
            len <= self.len(),
            "the chunk holds {} bytes, not {len}",
            self.len()
        );
        let header = self.header;
        // The count of one moves to the chunk: the handle must not give it back.
        let _ = std::mem::ManuallyDrop::new(self);
        // SAFETY: the header lives as long as the count of one that we hold.
        let shared = unsafe { header.as_ref() };
        shared.len.store(len as u32, Ordering::Relaxed);
        Chunk { header }
    }

    /// Charges what the chunk takes from the pool to `account`, which is credited when the last
    /// handle to the chunk is gone. A chunk is charged to one account: an earlier one is credited
    /// now.
    pub fn charge(&mut self, account: &Arc<Account>) {
        let account = Arc::into_raw(Arc::clone(account)).cast_mut();
        let earlier = self.header().account.swap(account, Ordering::Relaxed);
        // SAFETY: the pointer was in the header, and is not any more.
        unsafe { credit(earlier, self.len()) };
    }

    fn header(&self) -> &Header {
        // SAFETY: the header lives as long as this handle.
        unsafe { self.header.as_ref() }
    }

    fn bytes(&self) -> (NonNull<u8>, usize) {
        let header = self.header();
        let units = header.units.load(Ordering::Relaxed) as usize;
        (header.data, units * UNIT_BYTES)
    }
}

impl Deref for ChunkMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let (data, len) = self.bytes();
        // SAFETY: the chunk's units are initialised and written only through `self`.
        unsafe { std::slice::from_raw_parts(data.as_ptr(), len) }
    }
}

impl DerefMut for ChunkMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        let (data, len) = self.bytes();
        // SAFETY: as in `deref`; the handle is unique and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(data.as_ptr(), len) }
    }
}

impl Drop for ChunkMut {
    fn drop(&mut self) {
        // SAFETY: the handle was the only one and is gone after this.
        unsafe { give_back(self.header) };
    }
}

impl fmt::Debug for ChunkMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkMut").finish_non_exhaustive()
    }
}

/// A chunk that is read only, by any number of owners on any shard.
pub struct Chunk {
    header: NonNull<Header>,
}

// SAFETY: all access through a chunk is reading; the count is atomic.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    /// Credits the account that is charged for the chunk now, although handles live on: the caller
    /// knows that they have another bound. Nothing happens when no account is charged.
    pub fn uncharge(&self) {
        let header = self.header();
        let account = header.account.swap(std::ptr::null_mut(), Ordering::Relaxed);
        let units = header.units.load(Ordering::Relaxed) as usize;
        // SAFETY: the pointer was in the header, and is not any more.
        unsafe { credit(account, units * UNIT_BYTES) };
    }

    /// Whether an account is charged for the chunk.
    #[must_use]
    pub fn is_charged(&self) -> bool {
        !self.header().account.load(Ordering::Relaxed).is_null()
    }

    fn header(&self) -> &Header {
        // SAFETY: the header lives as long as this handle's count.
        unsafe { self.header.as_ref() }
    }

    /// The address of the first byte; valid for `len()` bytes while a handle lives.
    pub(super) fn data(&self) -> NonNull<u8> {
        self.header().data
    }
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let header = self.header();
        let len = header.len.load(Ordering::Relaxed) as usize;
        // SAFETY: len <= the chunk's initialised bytes, which are not written while a Chunk lives.
        unsafe { std::slice::from_raw_parts(header.data.as_ptr(), len) }
    }
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Clone for Chunk {
    fn clone(&self) -> Self {
        let before = self.header().refs.fetch_add(1, Ordering::Relaxed);
        // As in `Arc`: a count that wraps would free memory in use.
        if before > isize::MAX as usize {
            std::process::abort();
        }
        Self {
            header: self.header,
        }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        if self.header().refs.fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        // Pairs with the release above: all reads through other handles are before the reuse.
        fence(Ordering::Acquire);
        // SAFETY: the count just went to zero, so this was the last handle.
        unsafe { give_back(self.header) };
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

/// Returns a chunk to its pool, credits its account and drops the pool's count it held.
///
/// # Safety
/// The caller held the last handle to the chunk and uses it no more.
unsafe fn give_back(header: NonNull<Header>) {
    // SAFETY: the handle's count of the pool keeps the header alive until the decrement below.
    let header = unsafe { header.as_ref() };
    let pool = header.pool.load(Ordering::Relaxed);
    let units = header.units.load(Ordering::Relaxed);
    // Read before the units are free: from then on the header is another chunk's.
    let account = header.account.swap(std::ptr::null_mut(), Ordering::Relaxed);
    let run = Run {
        first: header.index,
        units,
    };
    // SAFETY: the same count keeps the pool alive.
    let inner = unsafe { &*pool };
    inner.units.give_back(run);
    // SAFETY: the pointer was in the header, and is not any more.
    unsafe { credit(account, units as usize * UNIT_BYTES) };
    // SAFETY: gives back the count that `take` added; nothing of the pool is used after this.
    unsafe { Arc::decrement_strong_count(pool) };
}

/// Credits `bytes` to what a header had for an account.
///
/// # Safety
/// The pointer is null, or was taken out of a header's `account`, whose strong count it brings.
unsafe fn credit(account: *mut Account, bytes: usize) {
    if !account.is_null() {
        // SAFETY: `ChunkMut::charge` made the pointer by `Arc::into_raw`; each is taken out once.
        let account = unsafe { Arc::from_raw(account.cast_const()) };
        account.credit(bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use millrace_testkit::until;

    use super::*;
    use crate::buf::ChunkSlice;

    fn pool(chunks: u64) -> ChunkPool {
        ChunkPool::new(chunks << 20, HugePages::Auto).unwrap()
    }

    /// The last drop, and only the last, returns a chunk.
    #[test]
    fn last_drop_returns() {
        let pool = pool(2);
        let mut chunk = pool.take().unwrap();
        chunk[..3].copy_from_slice(b"abc");
        assert_eq!(pool.free_chunks(), 1);
        let first = chunk.freeze(3);
        let second = first.clone();
        drop(first);
        assert_eq!(pool.free_chunks(), 1);
        assert_eq!(&*second, b"abc");
        drop(second);
        assert_eq!(pool.free_chunks(), 2);
    }

    /// An empty pool says so, and gives again after a return.
    #[test]
    fn exhaustion() {
        let pool = pool(2);
        let held: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(held.len(), 2);
        assert!(pool.take().is_none());
        drop(held);
        assert!(pool.take().is_some());
        let none = ChunkPool::new(0, HugePages::Auto).unwrap();
        assert!(none.take().is_none());
    }

    /// A pool begins with the pages it is told to keep ahead, asks for more before they are gone,
    /// and ends at its bound; what it has not asked for counts as free.
    #[test]
    fn a_pool_grows_ahead_of_need_up_to_its_bound() {
        const MIB: u64 = 1 << 20;
        let pool = ChunkPool::growing(4 * MIB, 11 * MIB, HugePages::Never).unwrap();
        let free = || (pool.free_chunks(), pool.free_bytes());
        assert_eq!((pool.present_bytes(), free()), (4 * MIB, (11, 11 * MIB)));
        let mut held: Vec<_> = (0..2).map(|_| pool.take().unwrap()).collect();
        assert_eq!(pool.present_bytes(), 4 * MIB);
        // Less than half of the chunks that are kept ahead is left.
        held.push(pool.take().unwrap());
        until("pages are there ahead", || {
            pool.present_bytes() >= 7 * MIB && pool.free_chunks() == 8
        });
        // One is missed while the thread publishes it.
        until("all chunks are taken", || {
            held.extend(std::iter::from_fn(|| pool.take()));
            held.len() == 11
        });
        assert_eq!(free(), (0, 0));
        assert!(pool.take_bytes(1).is_none());
        drop(held);
        assert_eq!((pool.present_bytes(), free()), (11 * MIB, (11, 11 * MIB)));
    }

    /// Shards that take at once, faster than pages come ahead, get every chunk once.
    #[test]
    fn threads_that_outrun_the_growth_get_every_chunk_once() {
        const CHUNKS: u64 = if cfg!(miri) { 6 } else { 40 };
        let pool = ChunkPool::growing(1 << 20, CHUNKS << 20, HugePages::Never).unwrap();
        let takers = std::thread::scope(|scope| {
            let take_all = || std::iter::from_fn(|| pool.take()).collect::<Vec<_>>();
            let takers = [(); 3].map(|()| scope.spawn(take_all));
            takers.map(|taker| taker.join().unwrap())
        });
        let mut held: Vec<_> = takers.into_iter().flatten().collect();
        // A thread gives up while another publishes the last chunks.
        until("all chunks are taken", || {
            held.extend(std::iter::from_fn(|| pool.take()));
            held.len() as u64 == CHUNKS
        });
        let addresses: BTreeSet<_> = held.iter().map(|chunk| chunk.as_ptr()).collect();
        assert_eq!(addresses.len() as u64, CHUNKS);
        drop(held);
        assert_eq!(pool.free_chunks() as u64, CHUNKS);
    }

    /// A chunk takes what it needs, rounded up to units, and neighbours in one chunk do not see
    /// each other's bytes.
    #[test]
    fn small_chunks_share_a_whole_one() {
        let pool = pool(2);
        assert!(pool.take_bytes(CHUNK_BYTES + 1).is_none());
        let lens = [0, 1, UNIT_BYTES, UNIT_BYTES + 1, 3 * UNIT_BYTES];
        let chunks: Vec<_> = (1u8..)
            .zip(lens)
            .map(|(n, len)| {
                let mut chunk = pool.take_bytes(len).unwrap();
                assert_eq!(chunk.len(), len.max(1).next_multiple_of(UNIT_BYTES));
                chunk.fill(n);
                chunk.freeze(len)
            })
            .collect();
        assert_eq!(pool.free_chunks(), 1);
        assert_eq!(pool.free_bytes(), (32 - 8) * UNIT_BYTES as u64);
        for ((n, len), chunk) in (1u8..).zip(lens).zip(&chunks) {
            assert!(chunk.len() == len && chunk.iter().all(|byte| *byte == n));
        }
        drop(chunks);
        assert_eq!(
            (pool.free_chunks(), pool.free_bytes()),
            (2, pool.total_bytes())
        );
    }

    /// An account hears of a chunk at its last drop, be that of a clone or of a slice, on any
    /// thread, after the pool and the account's other handles are gone.
    #[test]
    fn a_charge_ends_with_the_last_handle() {
        let pool = pool(2);
        let account = Account::new();
        let mut chunk = pool.take_bytes(100_000).unwrap();
        chunk.charge(&account);
        let bytes = chunk.len() as u64;
        let chunk = chunk.freeze(100_000);
        let slice = ChunkSlice::new(chunk.clone(), 5..10);
        drop(chunk);
        assert_eq!(account.settle(), 0);
        drop(pool);
        std::thread::scope(|scope| scope.spawn(move || drop(slice)).join()).unwrap();
        assert_eq!(account.settle(), bytes);
        assert_eq!(Arc::strong_count(&account), 1);
    }

    /// A chunk is charged to one account at a time, and never written chunks count too.
    #[test]
    fn a_charge_moves() {
        let pool = pool(1);
        let (first, second) = (Account::new(), Account::new());
        let mut chunk = pool.take().unwrap();
        chunk.charge(&first);
        chunk.charge(&second);
        assert_eq!((first.settle(), second.settle()), (CHUNK_BYTES as u64, 0));
        drop(chunk);
        assert_eq!((first.settle(), second.settle()), (0, CHUNK_BYTES as u64));
        // The next owner of the same memory is charged to no account.
        drop(pool.take());
        assert_eq!((first.settle(), second.settle()), (0, 0));
    }

    /// Protects a budget from a charge that comes back twice, and who is charged next from one that
    /// ends early.
    #[test]
    fn a_charge_that_is_ended_early_comes_back_once() {
        let pool = pool(1);
        let account = Account::new();
        let mut chunk = pool.take_bytes(100_000).unwrap();
        chunk.charge(&account);
        let bytes = chunk.len() as u64;
        let chunk = chunk.freeze(100_000);
        let other = chunk.clone();
        std::thread::scope(|scope| {
            for chunk in [&chunk, &other] {
                scope.spawn(|| chunk.uncharge());
            }
        });
        assert_eq!(account.settle(), bytes);
        assert_eq!(pool.free_bytes(), CHUNK_BYTES as u64 - bytes, "it is held");
        drop((chunk, other));
        assert_eq!(account.settle(), 0);
        assert_eq!(pool.free_bytes(), CHUNK_BYTES as u64);
    }

    /// Chunks outlive every handle of their pool.
    #[test]
    fn chunk_outlives_the_pool() {
        let pool = pool(1);
        let mut chunk = pool.take().unwrap();
        drop(pool);
        chunk[0] = 7;
        assert_eq!(chunk.freeze(1)[0], 7);
    }

    /// Clones dropped on other threads at once return the chunk exactly once.
    #[test]
    fn cross_thread_drops() {
        let pool = pool(2);
        let rounds = if cfg!(miri) { 5 } else { 500 };
        for round in 0..rounds {
            let mut chunk = pool.take().unwrap();
            chunk[0] = round as u8;
            let chunk = chunk.freeze(1);
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    let clone = chunk.clone();
                    scope.spawn(move || assert_eq!(clone[0], round as u8));
                }
                drop(chunk);
            });
            assert_eq!(pool.free_chunks(), 2);
        }
    }
}
