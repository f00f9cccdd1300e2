//! Pages from the system: anonymous, zeroed, never given back while in use.
//!
//! Invariants:
//!
//! 1. All `len` bytes at `ptr` are mapped, readable, writable and initialised until the drop.
//! 2. Pages asked for as populated were touched, and have no first-touch fault later. Reserved huge
//!    pages all are: no other program can use them meanwhile.

use std::io;
use std::ptr::NonNull;

use crate::memory::HugePages;

/// Where a mapping's pages came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageKind {
    /// Reserved 2 MiB pages (`MAP_HUGETLB`).
    Huge,
    /// Transparent huge pages, where the kernel found them.
    Transparent,
    /// Ordinary 4 KiB pages.
    Ordinary,
}

/// Why chunk memory could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// Reserved huge pages were required and there are too few.
    #[error(
        "no {pages} huge pages of 2 MiB: reserve them (sysctl vm.nr_hugepages={pages}) or set \
         huge_pages to auto"
    )]
    NoHugePages {
        /// Pages the pool needs.
        pages: u64,
    },
    /// The system has not enough memory.
    #[error("cannot map {bytes} bytes for chunks: {source}; lower chunk_pool_bytes")]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

impl PoolError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoHugePages { .. } => "no_huge_pages",
            Self::Map { .. } => "map",
        }
    }
}

pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;
const PAGE_BYTES: usize = 4096;

#[derive(Debug)]
pub(crate) struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
    kind: PageKind,
}

// SAFETY: a mapping is plain memory owned by this value; the pointer is not tied to a thread.
unsafe impl Send for Mapping {}
// SAFETY: through a shared reference only the pointer's value can be read.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps at least `len` bytes for chunks; the caller populates what it uses.
    pub(crate) fn for_chunks(len: usize, huge: HugePages) -> Result<Self, PoolError> {
        let len = len.max(1).next_multiple_of(HUGE_PAGE_BYTES);
        if huge != HugePages::Never {
            match Self::map(len, Backing::Huge) {
                Ok(mapping) => return Ok(mapping),
                Err(_) if huge == HugePages::Require => {
                    return Err(PoolError::NoHugePages {
                        pages: (len / HUGE_PAGE_BYTES) as u64,
                    });
                }
                Err(_) => {}
            }
        }
        let backing = if huge == HugePages::Never {
            Backing::Ordinary
        } else {
            Backing::Transparent
        };
        Self::map(len, backing).map_err(|source| PoolError::Map {
            bytes: len as u64,
            source,
        })
    }

    /// Maps `len` bytes of address space for slots; the caller populates what it uses.
    pub(crate) fn for_slots(len: usize) -> io::Result<Self> {
        Self::map(len.max(1).next_multiple_of(PAGE_BYTES), Backing::Ordinary)
    }

    pub(crate) fn as_ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    pub(crate) fn kind(&self) -> PageKind {
        self.kind
    }
}

enum Backing {
    Huge,
    Transparent,
    Ordinary,
}

#[cfg(not(miri))]
impl Mapping {
    fn map(len: usize, backing: Backing) -> io::Result<Self> {
        let huge = match backing {
            Backing::Huge => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB | libc::MAP_POPULATE,
            Backing::Transparent | Backing::Ordinary => 0,
        };
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no memory
        // of ours.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ptr = NonNull::new(raw.cast::<u8>())
            .ok_or_else(|| io::Error::other("the kernel mapped address zero"))?;
        let kind = match backing {
            Backing::Huge => PageKind::Huge,
            Backing::Ordinary => PageKind::Ordinary,
            Backing::Transparent => {
                // SAFETY: the range is the mapping just made; the advice changes no contents.
                let advised = unsafe { libc::madvise(raw, len, libc::MADV_HUGEPAGE) } == 0;
                if advised {
                    PageKind::Transparent
                } else {
                    PageKind::Ordinary
                }
            }
        };
        Ok(Self { ptr, len, kind })
    }

    /// Faults `len` bytes from `offset` in, also while others use them. Where the kernel refuses,
    /// each page comes at its first touch.
    pub(crate) fn populate(&self, offset: usize, len: usize) {
        let end = (offset + len).min(self.len);
        let start = offset.min(end) / PAGE_BYTES * PAGE_BYTES;
        // SAFETY: start lies within the mapping.
        let at = unsafe { self.ptr.as_ptr().add(start) };
        // SAFETY: the range is mapped by this value; populating changes no contents.
        unsafe { libc::madvise(at.cast(), end - start, libc::MADV_POPULATE_WRITE) };
    }
}

#[cfg(all(test, not(miri)))]
impl Mapping {
    /// Bytes of pages that the system has given.
    pub(super) fn resident_bytes(&self) -> usize {
        let mut pages = vec![0_u8; self.len.div_ceil(PAGE_BYTES)];
        // SAFETY: the range is this mapping's, and there is a byte for each of its pages.
        let done = unsafe { libc::mincore(self.ptr.as_ptr().cast(), self.len, pages.as_mut_ptr()) };
        assert_eq!(done, 0);
        pages.iter().filter(|page| **page & 1 == 1).count() * PAGE_BYTES
    }
}

#[cfg(not(miri))]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ptr and len are those of the mapping; who could still point into it holds the
        // owner of this value (see the module's argument).
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

// Miri knows no huge pages: plain zeroed memory of the same shape.
#[cfg(miri)]
impl Mapping {
    fn layout(len: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(len, PAGE_BYTES).expect("a sane length")
    }

    fn map(len: usize, backing: Backing) -> io::Result<Self> {
        if matches!(backing, Backing::Huge) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        // SAFETY: the layout has a size above zero.
        let raw = unsafe { std::alloc::alloc_zeroed(Self::layout(len)) };
        let ptr = NonNull::new(raw).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self {
            ptr,
            len,
            kind: PageKind::Ordinary,
        })
    }

    pub(crate) fn populate(&self, _offset: usize, _len: usize) {}
}

#[cfg(miri)]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: allocated in `map` with the same layout.
        unsafe { std::alloc::dealloc(self.ptr.as_ptr(), Self::layout(self.len)) };
    }
}
