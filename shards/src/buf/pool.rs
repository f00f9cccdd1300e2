//! The chunk pool: a fixed number of 1 MiB chunks, refcounted across shards.
//!
//! Cost: `take` and the last drop are one push or pop of a lock-free queue each; a clone is one
//! relaxed add.
//!
//! Invariants:
//!
//! 1. An index is in `free` exactly when no handle to its chunk exists.
//! 2. Every `ChunkMut` and every group of `Chunk`s sharing one header owns one strong count of
//!    the pool.
//! 3. `free` has room for every index, so returning a chunk cannot fail.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};

use crossbeam::queue::ArrayQueue;

use super::mapping::{Mapping, PageKind, PoolError};
use crate::memory::{CHUNK_BYTES, HugePages};

/// A pool of chunks: a handle that any thread may hold.
#[derive(Clone)]
pub struct ChunkPool {
    inner: Arc<PoolInner>,
}

struct PoolInner {
    mapping: Mapping,
    headers: Box<[Header]>,
    free: ArrayQueue<u32>,
}

/// What a chunk's handles share. One cache line, so that counting one chunk disturbs no other.
#[repr(align(64))]
struct Header {
    refs: AtomicUsize,
    data: NonNull<u8>,
    len: AtomicU32,
    index: u32,
    pool: AtomicPtr<PoolInner>,
}

const _: () = assert!(size_of::<Header>() == 64);
const _: () = assert!(size_of::<Chunk>() == 8);

// SAFETY: `data` points into the pool's mapping, which is not tied to a thread; who may read or
// write there is governed by the handles (module argument). All else is atomic or constant.
unsafe impl Send for Header {}
// SAFETY: as above; a shared header gives no access to the data by itself.
unsafe impl Sync for Header {}

impl ChunkPool {
    /// Maps and faults in `bytes`, rounded up to whole chunks.
    ///
    /// # Errors
    /// When the system has no such memory, or no huge pages although required.
    pub fn new(bytes: u64, huge: HugePages) -> Result<Self, PoolError> {
        let count = bytes.div_ceil(CHUNK_BYTES as u64);
        let (Ok(chunks), Ok(indices)) = (usize::try_from(count), u32::try_from(count)) else {
            let source = std::io::Error::from_raw_os_error(libc::ENOMEM);
            return Err(PoolError::Map { bytes, source });
        };
        let mapping = Mapping::for_chunks(chunks * CHUNK_BYTES, huge)?;
        let base = mapping.as_ptr();
        let free = ArrayQueue::new(chunks.max(1));
        let headers = (0..indices)
            .map(|index| {
                // SAFETY: index * CHUNK_BYTES lies within the mapping, which has a chunk for each
                // index.
                let data = unsafe { base.add(index as usize * CHUNK_BYTES) };
                Header {
                    refs: AtomicUsize::new(0),
                    data,
                    len: AtomicU32::new(0),
                    index,
                    pool: AtomicPtr::new(std::ptr::null_mut()),
                }
            })
            .collect();
        let inner = Arc::new(PoolInner {
            mapping,
            headers,
            free,
        });
        for header in &inner.headers {
            header
                .pool
                .store(Arc::as_ptr(&inner).cast_mut(), Ordering::Relaxed);
            // Cannot be full: it has room for every index.
            let _ = inner.free.push(header.index);
        }
        Ok(Self { inner })
    }

    /// A free chunk, or `None` when all are out.
    #[must_use]
    pub fn take(&self) -> Option<ChunkMut> {
        let index = self.inner.free.pop()?;
        let header = &self.inner.headers[index as usize];
        header.refs.store(1, Ordering::Relaxed);
        let pool = header.pool.load(Ordering::Relaxed);
        // SAFETY: `pool` is the address of this pool's inner value, which `self` keeps alive.
        unsafe { Arc::increment_strong_count(pool) };
        Some(ChunkMut {
            header: NonNull::from(header),
        })
    }

    /// Chunks that `take` would give now.
    #[must_use]
    pub fn free_chunks(&self) -> usize {
        self.inner.free.len()
    }

    /// Chunks of the pool.
    #[must_use]
    pub fn total_chunks(&self) -> usize {
        self.inner.headers.len()
    }

    /// Where the pool's pages came from.
    #[must_use]
    pub fn page_kind(&self) -> PageKind {
        self.inner.mapping.kind()
    }
}

impl fmt::Debug for ChunkPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkPool")
            .field("free", &self.free_chunks())
            .field("total", &self.total_chunks())
            .field("pages", &self.page_kind())
            .finish()
    }
}

/// A chunk with one owner, who may write all of it. Its memory is always initialised; what an
/// earlier owner left in it is still there.
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
    /// When `len` exceeds [`CHUNK_BYTES`].
    #[must_use]
    pub fn freeze(self, len: usize) -> Chunk {
        assert!(
            len <= CHUNK_BYTES,
            "a chunk holds {CHUNK_BYTES} bytes, not {len}"
        );
        let header = self.header;
        // The count of one moves to the chunk: the handle must not give it back.
        let _ = std::mem::ManuallyDrop::new(self);
        // SAFETY: the header lives as long as the count of one that we hold.
        let shared = unsafe { header.as_ref() };
        shared.len.store(len as u32, Ordering::Relaxed);
        Chunk { header }
    }

    fn data(&self) -> NonNull<u8> {
        // SAFETY: the header lives as long as this handle.
        unsafe { self.header.as_ref() }.data
    }
}

impl Deref for ChunkMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the chunk's CHUNK_BYTES are initialised and written by nobody but through `self`.
        unsafe { std::slice::from_raw_parts(self.data().as_ptr(), CHUNK_BYTES) }
    }
}

impl DerefMut for ChunkMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the handle is unique and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data().as_ptr(), CHUNK_BYTES) }
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
        // SAFETY: len <= CHUNK_BYTES initialised bytes that nobody writes while a Chunk lives.
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

/// Returns a chunk to its pool and drops the pool's count it held.
///
/// # Safety
/// The caller held the last handle to the chunk and uses it no more.
unsafe fn give_back(header: NonNull<Header>) {
    // SAFETY: the handle's count of the pool keeps the header alive until the decrement below.
    let header = unsafe { header.as_ref() };
    let pool = header.pool.load(Ordering::Relaxed);
    let index = header.index;
    // SAFETY: the same count keeps the pool alive.
    let inner = unsafe { &*pool };
    // Cannot be full: it has room for every index, and this one was out.
    let _ = inner.free.push(index);
    // SAFETY: gives back the count that `take` added; nothing of the pool is used after this.
    unsafe { Arc::decrement_strong_count(pool) };
}

#[cfg(test)]
mod tests {
    use super::*;

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
