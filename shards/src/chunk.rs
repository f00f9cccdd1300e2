//! Bodies in chunks: what an artifact or a file in flight is made of.
//!
//! A body takes from its pool what its length is, rounded up to units of 64 KiB. It may be charged
//! to an [`Account`]: each chunk gives its part of the charge back when its last handle is dropped,
//! be that the body, a clone of it, the chunk alone or a slice of it, on whatever thread; or when
//! its owner ends the charge ([`Body::uncharge`]).
//!
//! Invariants:
//!
//! 1. Every chunk of a body but the last is full, so that a byte's chunk is a division.
//! 2. A body being received owns the chunks of all bytes that are still to arrive.
//! 3. A length from a peer is checked against the pool before anything is allocated for it.

use std::fmt;
use std::io;
use std::sync::Arc;

pub use crate::buf::{
    Account, Charge, Chunk, ChunkMut, ChunkPool, ChunkSlice, PageKind, PoolError,
};
pub use crate::memory::{CHUNK_BYTES, UNIT_BYTES};

/// What a body of `len` bytes takes from its pool: whole chunks, and units for the rest.
///
/// A peer may announce any length: where the multiple is above the largest number, the largest
/// number stands for it, which no pool has.
#[must_use]
pub fn taken_bytes(len: u64) -> u64 {
    let multiple = len.checked_next_multiple_of(UNIT_BYTES as u64);
    multiple.unwrap_or(u64::MAX)
}

/// A body that is complete: a list of chunks, cheap to clone.
#[derive(Clone)]
pub struct Body {
    chunks: Arc<[Chunk]>,
    len: usize,
}

impl Body {
    /// A body of these chunks, or `None` when one before the last is not full.
    #[must_use]
    pub fn from_chunks(chunks: Vec<Chunk>) -> Option<Self> {
        let Some((last, full)) = chunks.split_last() else {
            return Some(Self {
                chunks: Arc::from([]),
                len: 0,
            });
        };
        if full.iter().any(|chunk| chunk.len() != CHUNK_BYTES) {
            return None;
        }
        let len = full.len() * CHUNK_BYTES + last.len();
        Some(Self {
            chunks: Arc::from(chunks),
            len,
        })
    }

    /// A copy of `bytes` in chunks of `pool`, or `None` when it has too few.
    #[must_use]
    pub fn copy_from_slice(pool: &ChunkPool, bytes: &[u8]) -> Option<Self> {
        let mut body = BodyMut::with_len(pool, bytes.len())?;
        let mut rest = bytes;
        while !body.is_full() {
            let spare = body.spare();
            let (now, later) = rest.split_at(spare.len());
            spare.copy_from_slice(now);
            body.advance(now.len());
            rest = later;
        }
        Some(body.freeze())
    }

    /// Bytes of the body.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the body has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The chunks, in order.
    #[must_use]
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Whether an account is charged for any of it.
    #[must_use]
    pub fn is_charged(&self) -> bool {
        self.chunks.iter().any(Chunk::is_charged)
    }

    /// Ends its charge, although others hold some of it: see [`Chunk::uncharge`].
    pub fn uncharge(&self) {
        self.chunks.iter().for_each(Chunk::uncharge);
    }

    /// The body as slices of at most `max_bytes`, none across a chunk's end.
    ///
    /// # Panics
    /// When `max_bytes` is zero.
    #[must_use]
    pub fn slices(&self, max_bytes: usize) -> BodySlices {
        assert!(max_bytes > 0, "slices of no bytes would never end");
        BodySlices {
            body: self.clone(),
            offset: 0,
            max_bytes,
        }
    }

    /// The slice at `offset`: at most `max_bytes`, up to the chunk's end; empty at the body's end.
    #[must_use]
    pub fn slice_at(&self, offset: usize, max_bytes: usize) -> Option<ChunkSlice> {
        let chunk = self.chunks.get(offset / CHUNK_BYTES)?;
        let start = offset % CHUNK_BYTES;
        if start >= chunk.len() {
            return None;
        }
        let end = chunk.len().min(start.saturating_add(max_bytes));
        Some(ChunkSlice::new(chunk.clone(), start..end))
    }

    /// Reads the body from its start.
    #[must_use]
    pub fn reader(&self) -> BodyReader {
        BodyReader {
            body: self.clone(),
            offset: 0,
        }
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body")
            .field("len", &self.len)
            .field("chunks", &self.chunks.len())
            .finish()
    }
}

/// The slices of a body, in order.
#[derive(Debug)]
pub struct BodySlices {
    body: Body,
    offset: usize,
    max_bytes: usize,
}

impl Iterator for BodySlices {
    type Item = ChunkSlice;

    fn next(&mut self) -> Option<ChunkSlice> {
        let slice = self.body.slice_at(self.offset, self.max_bytes)?;
        self.offset += slice.len();
        Some(slice)
    }
}

/// Reads a body; see [`Body::reader`].
#[derive(Debug)]
pub struct BodyReader {
    body: Body,
    offset: usize,
}

impl io::Read for BodyReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let part = io::BufRead::fill_buf(self)?;
        let len = part.len().min(buf.len());
        buf[..len].copy_from_slice(&part[..len]);
        self.offset += len;
        Ok(len)
    }
}

impl io::BufRead for BodyReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let chunk = self.body.chunks.get(self.offset / CHUNK_BYTES);
        Ok(chunk.map_or(&[], |chunk| {
            chunk.get(self.offset % CHUNK_BYTES..).unwrap_or(&[])
        }))
    }

    fn consume(&mut self, amount: usize) {
        self.offset += amount;
    }
}

/// A body being received: the chunks of all bytes to come are reserved, the bytes arrive.
///
/// The owner keeps it until it is whole and freezes it, or takes chunk by chunk from its front as
/// they fill up.
#[derive(Debug)]
pub struct BodyMut {
    /// None where a chunk was taken: the first `gone`.
    chunks: Vec<Option<ChunkMut>>,
    /// Chunks that were taken, all of them filled.
    gone: usize,
    len: usize,
    filled: usize,
}

/// Bytes were written past the announced length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at {offset} exceed the announced length {len}")]
pub struct OutOfBody {
    /// Where the bytes were to go.
    pub offset: usize,
    /// How many there were.
    pub bytes: usize,
    /// The announced length.
    pub len: usize,
}

impl OutOfBody {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        "out_of_body"
    }
}

impl BodyMut {
    /// Reserves the chunks for `len` bytes, all or none.
    #[must_use]
    pub fn with_len(pool: &ChunkPool, len: usize) -> Option<Self> {
        let (full, rest) = (len / CHUNK_BYTES, len % CHUNK_BYTES);
        // Checked before the list is allocated: the length comes from a peer.
        if full > pool.free_chunks() {
            return None;
        }
        let mut chunks = Vec::with_capacity(full + 1);
        for _ in 0..full {
            chunks.push(Some(pool.take()?));
        }
        if rest > 0 {
            chunks.push(Some(pool.take_bytes(rest)?));
        }
        Some(Self {
            chunks,
            gone: 0,
            len,
            filled: 0,
        })
    }

    /// Charges what the body takes, [`taken_bytes`] of its length, to `account`.
    pub fn charge(&mut self, account: &Arc<Account>) {
        for chunk in self.chunks.iter_mut().flatten() {
            chunk.charge(account);
        }
    }

    /// The contiguous free space behind the bytes so far, up to the chunk's end; empty when full.
    #[inline]
    pub fn spare(&mut self) -> &mut [u8] {
        self.space_at(self.filled)
    }

    /// Takes the first `bytes` of [`Self::spare`] as received.
    ///
    /// # Panics
    /// When the spare space was shorter.
    #[inline]
    pub fn advance(&mut self, bytes: usize) {
        // The length of `spare`, without a look at the chunk: this runs for each packet.
        let to_chunk_end = CHUNK_BYTES - self.filled % CHUNK_BYTES;
        let spare_bytes = to_chunk_end.min(self.len - self.filled);
        assert!(bytes <= spare_bytes, "advanced past the spare space");
        self.filled += bytes;
    }

    /// Takes the first chunk that is still here, and where its bytes begin, when it is filled: up
    /// to its end, or to the end of the body.
    pub fn take_filled(&mut self) -> Option<(usize, Chunk)> {
        let offset = self.gone * CHUNK_BYTES;
        let end = self.len.min(offset + CHUNK_BYTES);
        if self.filled < end {
            return None;
        }
        let chunk = self.chunks.get_mut(self.gone)?.take()?;
        self.gone += 1;
        Some((offset, chunk.freeze(end - offset)))
    }

    /// Writes at an offset, for a carrier that tracks ranges itself; does not move `filled`.
    ///
    /// # Errors
    /// When the bytes exceed the announced length, or lie in a chunk that was taken; nothing is
    /// written then.
    pub fn write_at(&mut self, offset: usize, bytes: &[u8]) -> Result<(), OutOfBody> {
        let fits = offset
            .checked_add(bytes.len())
            .is_some_and(|end| end <= self.len && offset >= self.gone * CHUNK_BYTES);
        if !fits {
            return Err(OutOfBody {
                offset,
                bytes: bytes.len(),
                len: self.len,
            });
        }
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let space = self.space_at(at);
            let (now, later) = rest.split_at(rest.len().min(space.len()));
            space[..now.len()].copy_from_slice(now);
            at += now.len();
            rest = later;
        }
        Ok(())
    }

    /// The free space from `offset` to its chunk's end or the body's, for a carrier that opens
    /// packets straight into place; empty past the end, and in a chunk that was taken.
    #[inline]
    pub fn space_at(&mut self, offset: usize) -> &mut [u8] {
        let start = offset % CHUNK_BYTES;
        let left = self.len.saturating_sub(offset);
        match self.chunks.get_mut(offset / CHUNK_BYTES) {
            Some(Some(chunk)) => {
                // Past the end, a last chunk of few units may end before `start`.
                let space = chunk.get_mut(start..).unwrap_or_default();
                let bytes = left.min(space.len());
                &mut space[..bytes]
            }
            _ => &mut [],
        }
    }

    /// The announced length.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no bytes were announced.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes taken by [`Self::advance`].
    #[must_use]
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// Whether all announced bytes were taken.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.filled == self.len
    }

    /// Ends receiving. The body has the announced length: the caller checked that all of it came.
    ///
    /// # Panics
    /// When a chunk was taken.
    #[must_use]
    pub fn freeze(self) -> Body {
        assert_eq!(self.gone, 0, "the body's first chunks were taken");
        let mut left = self.len;
        let chunks: Arc<[Chunk]> = self
            .chunks
            .into_iter()
            .flatten()
            .map(|chunk| {
                let len = left.min(CHUNK_BYTES);
                left -= len;
                chunk.freeze(len)
            })
            .collect();
        Body {
            chunks,
            len: self.len,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::memory::HugePages;

    fn pool(chunks: u64) -> ChunkPool {
        ChunkPool::new(chunks << 20, HugePages::Never).unwrap()
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i % 251) as u8).collect()
    }

    /// Bytes come back as they went in, across chunk ends, by reader and by slices.
    #[test]
    fn round_trip() {
        let pool = pool(3);
        for len in [
            0,
            1,
            CHUNK_BYTES - 1,
            CHUNK_BYTES,
            CHUNK_BYTES + 1,
            3 * CHUNK_BYTES,
        ] {
            let bytes = pattern(len);
            let body = Body::copy_from_slice(&pool, &bytes).unwrap();
            assert_eq!(body.len(), len);
            let mut read = Vec::new();
            body.reader().read_to_end(&mut read).unwrap();
            assert!(read == bytes);
            let joined: Vec<u8> = body
                .slices(65_537)
                .flat_map(|slice| slice.as_ref().to_vec())
                .collect();
            assert!(joined == bytes);
            assert!(
                body.slices(1000)
                    .all(|slice| !slice.is_empty() && slice.len() <= 1000)
            );
        }
        assert_eq!(pool.free_chunks(), 3);
    }

    /// A body that does not fit takes nothing from the pool.
    #[test]
    fn reserve_all_or_none() {
        let pool = pool(2);
        assert!(BodyMut::with_len(&pool, 2 * CHUNK_BYTES + 1).is_none());
        assert!(BodyMut::with_len(&pool, usize::MAX).is_none());
        assert_eq!(pool.free_chunks(), 2);
    }

    /// Writing by offset crosses chunk ends and never leaves the body.
    #[test]
    fn write_at_stays_inside() {
        let pool = pool(2);
        let mut body = BodyMut::with_len(&pool, CHUNK_BYTES + 10).unwrap();
        body.write_at(CHUNK_BYTES - 2, b"abcd").unwrap();
        assert!(body.write_at(CHUNK_BYTES + 8, b"abc").is_err());
        assert!(body.write_at(usize::MAX, b"a").is_err());
        assert_eq!(body.space_at(CHUNK_BYTES + 4).len(), 6);
        for past in [CHUNK_BYTES + 10, CHUNK_BYTES + 100_000, 9 * CHUNK_BYTES] {
            assert_eq!(body.space_at(past).len(), 0);
        }
        let body = body.freeze();
        assert_eq!(&body.chunks()[0][CHUNK_BYTES - 2..], b"ab");
        assert_eq!(&body.chunks()[1][..2], b"cd");
    }

    /// A body takes what its length is in units, and an account hears of each chunk that is gone.
    #[test]
    fn a_body_is_charged_for_what_it_takes() {
        let pool = pool(3);
        let account = Account::new();
        for len in [1, UNIT_BYTES, UNIT_BYTES + 1, CHUNK_BYTES, CHUNK_BYTES + 1] {
            let free_bytes = pool.free_bytes();
            let mut body = BodyMut::with_len(&pool, len).unwrap();
            body.charge(&account);
            assert_eq!(free_bytes - pool.free_bytes(), taken_bytes(len as u64));
            let chunks = body.freeze().chunks().to_vec();
            assert_eq!(account.settle(), 0);
            let credited = chunks.into_iter().map(|chunk| {
                drop(chunk);
                account.settle()
            });
            assert_eq!(credited.sum::<u64>(), taken_bytes(len as u64));
            assert_eq!(pool.free_bytes(), free_bytes);
        }
    }

    /// A length is a peer's word: none overflows.
    #[test]
    fn what_a_body_takes_is_known_for_every_length() {
        const UNIT: u64 = UNIT_BYTES as u64;
        let largest_multiple = u64::MAX - (UNIT - 1);
        for (len, taken) in [
            (0, 0),
            (1, UNIT),
            (UNIT, UNIT),
            (UNIT + 1, 2 * UNIT),
            (largest_multiple, largest_multiple),
            (largest_multiple + 1, u64::MAX),
            (u64::MAX, u64::MAX),
        ] {
            assert_eq!(taken_bytes(len), taken, "{len}");
        }
    }

    /// Chunks leave a body in order, each when it is full, the last with what the body has left;
    /// what was taken cannot be written any more.
    #[test]
    fn filled_chunks_can_be_taken_one_by_one() {
        let pool = pool(3);
        let bytes = pattern(2 * CHUNK_BYTES + 10);
        let mut body = BodyMut::with_len(&pool, bytes.len()).unwrap();
        let mut taken = Vec::new();
        while !body.is_full() {
            let (at, spare) = (body.filled(), body.spare());
            let now = spare.len().min(300_000);
            spare[..now].copy_from_slice(&bytes[at..at + now]);
            assert_eq!(body.take_filled().map(|(offset, _)| offset), None);
            body.advance(now);
            if let Some((offset, chunk)) = body.take_filled() {
                assert_eq!(offset, taken.len());
                assert!(offset + chunk.len() == body.filled());
                assert!(body.write_at(offset, b"a").is_err());
                taken.extend_from_slice(&chunk);
            }
        }
        assert!(taken == bytes && body.take_filled().is_none());
        assert_eq!(pool.free_chunks(), 3);
    }

    /// A list with a short chunk in the middle is not a body.
    #[test]
    fn short_chunk_only_at_the_end() {
        let pool = pool(2);
        let short = || pool.take().unwrap().freeze(5);
        assert!(Body::from_chunks(vec![short(), short()]).is_none());
        assert_eq!(Body::from_chunks(vec![short()]).unwrap().len(), 5);
    }
}
