//! A slice of a chunk: what the transport queues for sending.
//!
//! Cost: `as_ref` is two loads from the slice itself; it does not touch the chunk's header.
//!
//! Invariants:
//!
//! 1. `ptr .. ptr + len` lies within the chunk's frozen length.
//! 2. `chunk` keeps those bytes alive and read only.

use std::fmt;
use std::ops::{Deref, Range};
use std::ptr::NonNull;

use super::pool::Chunk;

/// A part of a chunk, refcounted with it.
#[derive(Clone)]
pub struct ChunkSlice {
    ptr: NonNull<u8>,
    len: u32,
    chunk: Chunk,
}

const _: () = assert!(size_of::<ChunkSlice>() == 24);

// SAFETY: all access is reading bytes that `chunk` keeps alive and unwritten.
unsafe impl Send for ChunkSlice {}
// SAFETY: as above.
unsafe impl Sync for ChunkSlice {}

impl ChunkSlice {
    /// The given bytes of a chunk.
    ///
    /// # Panics
    /// When the range exceeds the chunk.
    #[must_use]
    pub fn new(chunk: Chunk, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= chunk.len(),
            "slice outside its chunk"
        );
        // SAFETY: start lies within the chunk, as just checked.
        let ptr = unsafe { chunk.data().add(range.start) };
        Self {
            ptr,
            len: (range.end - range.start) as u32,
            chunk,
        }
    }

    /// A part of this slice.
    ///
    /// # Panics
    /// When the range exceeds the slice.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let mut part = self.clone();
        part.narrow(range);
        part
    }

    /// Asks the processor for the bytes from `at` on, at most `bytes` of them, ahead of their use;
    /// does nothing beyond the slice's end.
    #[inline]
    pub fn prefetch(&self, at: usize, bytes: usize) {
        const LINE_BYTES: usize = 64;
        let end = self.len().min(at.saturating_add(bytes));
        let mut line = at;
        while line < end {
            // SAFETY: `line` is within the slice.
            let address = unsafe { self.ptr.as_ptr().add(line) };
            prefetch_line(address);
            line += LINE_BYTES;
        }
    }

    /// Splits in two: `self` keeps the first `at` bytes, the rest is returned.
    ///
    /// # Panics
    /// When `at` exceeds the slice.
    #[must_use]
    pub fn split_at(&mut self, at: usize) -> Self {
        let rest = self.slice(at..self.len());
        self.narrow(0..at);
        rest
    }

    /// The chunk the slice is a part of.
    #[must_use]
    pub fn chunk(&self) -> &Chunk {
        &self.chunk
    }

    fn narrow(&mut self, range: Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.len(),
            "slice outside its slice"
        );
        // SAFETY: start lies within the slice, as just checked.
        self.ptr = unsafe { self.ptr.add(range.start) };
        self.len = (range.end - range.start) as u32;
    }
}

impl From<Chunk> for ChunkSlice {
    fn from(chunk: Chunk) -> Self {
        let len = chunk.len();
        Self::new(chunk, 0..len)
    }
}

impl Deref for ChunkSlice {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: invariants 1 and 2.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len as usize) }
    }
}

impl AsRef<[u8]> for ChunkSlice {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for ChunkSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkSlice")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
fn prefetch_line(address: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch is a hint: it neither faults nor changes what the program sees.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
#[inline]
fn prefetch_line(_address: *const u8) {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::ChunkPool;
    use crate::memory::HugePages;

    fn chunk(bytes: &[u8]) -> Chunk {
        let pool = ChunkPool::new(1 << 20, HugePages::Never).unwrap();
        let mut chunk = pool.take().unwrap();
        chunk[..bytes.len()].copy_from_slice(bytes);
        chunk.freeze(bytes.len())
    }

    /// Splitting follows the rule of the sender: the first part stays.
    #[test]
    fn split_keeps_the_first_part() {
        let mut slice = ChunkSlice::from(chunk(b"hello world"));
        let rest = slice.split_at(5);
        assert_eq!(slice.as_ref(), b"hello");
        assert_eq!(rest.as_ref(), b" world");
        assert_eq!(rest.slice(1..3).as_ref(), b"wo");
        let mut rest = rest;
        assert_eq!(rest.split_at(6).as_ref(), b"");
    }

    /// A range outside the slice is a bug of the caller and must not read foreign bytes.
    #[test]
    #[should_panic(expected = "slice outside its slice")]
    fn no_slice_beyond_the_end() {
        let slice = ChunkSlice::new(chunk(b"hello"), 0..4);
        let _ = slice.slice(0..5);
    }
}
