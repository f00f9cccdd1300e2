#![allow(unsafe_code)]
//! Counts the heap bytes that each thread takes and gives back.
//!
//! A library such as quiche says nothing of the memory that its peers make it hold. A shard is one
//! thread, so the difference of this count before and after a call is what the call took: exact,
//! and without a change of the library. It works where the program's allocator is a
//! [`CountingAllocator`]; [`is_counted`] says so.
//!
//! Invariants
//! 1. The count adds up the sizes asked for; the allocator may round each up.
//! 2. A block that one thread takes and another gives back is counted by both: counts mean
//!    something as differences alone.
//!
//! Soundness argument. Every method passes its arguments on to the inner allocator and returns what
//! that returned, so the contract of [`GlobalAlloc`] holds if it holds for the inner one. The count
//! is a thread-local cell of an integer, which is built at compile time and has no destructor: to
//! read and write it allocates nothing and cannot fail, also while a thread ends.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static TAKEN_BYTES: Cell<i64> = const { Cell::new(0) };
}

/// An allocator that counts for [`taken_bytes`], and leaves the work to another one.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountingAllocator<A = System>(A);

impl<A> CountingAllocator<A> {
    /// For a `#[global_allocator]`.
    pub const fn new(inner: A) -> Self {
        Self(inner)
    }
}

#[inline]
fn count(bytes: i64) {
    TAKEN_BYTES.with(|taken| taken.set(taken.get().wrapping_add(bytes)));
}

// SAFETY: see the argument of the module.
unsafe impl<A: GlobalAlloc> GlobalAlloc for CountingAllocator<A> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`.
        let block = unsafe { self.0.alloc(layout) };
        if !block.is_null() {
            count(layout.size() as i64);
        }
        block
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        let block = unsafe { self.0.alloc_zeroed(layout) };
        if !block.is_null() {
            count(layout.size() as i64);
        }
        block
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { self.0.dealloc(block, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `realloc`.
        let moved = unsafe { self.0.realloc(block, layout, size) };
        if !moved.is_null() {
            count(size as i64 - layout.size() as i64);
        }
        moved
    }
}

/// Bytes that this thread has taken from the heap and not given back. Negative when it gives back
/// what other threads took.
#[inline]
pub fn taken_bytes() -> i64 {
    TAKEN_BYTES.with(Cell::get)
}

/// Does something whose heap bytes are not counted.
#[inline]
pub fn uncounted<T>(work: impl FnOnce() -> T) -> T {
    let before = taken_bytes();
    let done = work();
    TAKEN_BYTES.with(|taken| taken.set(before));
    done
}

/// Whether the program's allocator counts.
pub fn is_counted() -> bool {
    let before = taken_bytes();
    let block = std::hint::black_box(Box::new([0_u8; 64]));
    let after = taken_bytes();
    drop(block);
    after > before
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: CountingAllocator<System> = CountingAllocator::new(System);

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, 8).unwrap()
    }

    // Protects the account of a peer's memory: each way to take and to give back counts.
    #[test]
    fn what_is_taken_and_given_back_is_counted_on_its_thread() {
        let start = taken_bytes();
        // SAFETY: the layout has a size.
        let one = unsafe { BYTES.alloc(layout(100)) };
        // SAFETY: as above.
        let two = unsafe { BYTES.alloc_zeroed(layout(50)) };
        assert_eq!(taken_bytes() - start, 150);
        // SAFETY: the block came from this allocator, with this layout.
        let one = unsafe { BYTES.realloc(one, layout(100), 300) };
        assert_eq!(taken_bytes() - start, 350);
        uncounted(|| {
            // SAFETY: as above.
            unsafe { BYTES.dealloc(two, layout(50)) }
        });
        assert_eq!(taken_bytes() - start, 350);
        let other = std::thread::spawn(taken_bytes).join().unwrap();
        assert_eq!(other, 0);
        // SAFETY: as above.
        unsafe { BYTES.dealloc(one, layout(300)) }
        assert_eq!(taken_bytes() - start, 50);
    }

    // The tests of this crate run on std's allocator.
    #[test]
    fn an_allocator_that_does_not_count_is_noticed() {
        assert!(!is_counted());
    }
}
