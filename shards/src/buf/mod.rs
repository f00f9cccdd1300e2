#![allow(unsafe_code)]
//! Memory: page mappings, the chunk pool, chunks and slices of them.
//!
//! Soundness argument. A [`Mapping`] owns its pages until it is dropped and hands out a raw pointer
//! only. A pool cuts one mapping into chunks that do not overlap; a chunk's index is either in the
//! pool's free list or owned by exactly one [`ChunkMut`] or by one or more [`Chunk`]s, counted in
//! the chunk's header. Only a `ChunkMut` writes, and it is unique; only `Chunk`s and slices of them
//! share, and they only read. Every chunk that is out holds one strong count of its pool, so that
//! mapping and headers outlive it.

mod mapping;
mod pool;
mod slice;

pub(crate) use mapping::Mapping;
pub use mapping::{PageKind, PoolError};
pub use pool::{Chunk, ChunkMut, ChunkPool};
pub use slice::ChunkSlice;
