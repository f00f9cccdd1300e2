#![allow(unsafe_code)]
//! Memory: page mappings, the chunk pool, chunks and slices of them.
//!
//! Soundness argument. A [`Mapping`] owns its pages until it is dropped and hands out a raw pointer
//! only. A pool cuts one mapping into units that do not overlap; a unit is either free in the
//! pool's [`units::UnitMap`], or belongs to the run of exactly one [`ChunkMut`] or of one or more
//! [`Chunk`]s, counted in the header of the run's first unit. Only a `ChunkMut` writes, and it is
//! unique; only `Chunk`s and slices of them share, and they only read. Every chunk that is out
//! holds one strong count of its pool, so that mapping and headers outlive it, and one of the
//! [`Account`] that it is charged to.

mod account;
mod growth;
mod mapping;
mod pool;
mod slice;
mod units;

pub use account::{Account, Charge};
pub(crate) use mapping::Mapping;
pub use mapping::{PageKind, PoolError};
pub use pool::{Chunk, ChunkMut, ChunkPool};
pub use slice::ChunkSlice;
