//! Thread-per-core shard runtime: io_uring ring, buffers, sockets, mailboxes, chunk pool.
//!
//! A shard is one pinned thread with one glommio executor, one ring of its own, its UDP sockets
//! (each of a reuseport group), one mailbox and one chunk pool. A protocol plugs into its loop by
//! implementing [`Datapath`]; this crate knows no protocol. See [`runtime`] for the loop,
//! [`datapath`] for what the loop calls and when, [`chunk`] for the memory that bodies live in.
//!
//! Invariants of the crate:
//!
//! 1. Nothing is shared between shards but bounded queues, chunks and counters.
//! 2. A busy shard allocates nothing, takes no lock and logs nothing per packet, and enters the
//!    kernel once per turn.
//! 3. `unsafe` lives in `buf`, `heap`, `ring` and `sys`, each of which opens with its argument.

mod buf;
pub mod chunk;
pub mod config;
pub mod datapath;
pub mod heap;
mod local;
pub mod mailbox;
mod memory;
mod park;
mod ring;
pub mod runtime;
pub mod socket;
pub mod stats;
mod sync;
mod sys;
mod watchdog;

pub use chunk::{
    Account, Body, BodyMut, CHUNK_BYTES, Charge, Chunk, ChunkMut, ChunkPool, ChunkSlice, PageKind,
    UNIT_BYTES,
};
pub use config::{HugePages, SHARDS_MAX, ShardConfig};
pub use datapath::{Datagrams, Datapath, Refused, Slot, Train, TrainBuffer, Trains, Transmit};
pub use heap::CountingAllocator;
pub use local::{Queue, Spawner, in_executor, sleep, yield_now};
pub use mailbox::{MailError, MailReceiver, MailSender, mailbox};
pub use runtime::{BoundSocket, ShardContext, ShardHandle, StartError, spawn, spawn_with_mailbox};
pub use socket::{
    SOCKETS_MAX, ShardSocket, SocketError, SocketId, UdpGroupConfig, attach_classic_steering,
    attach_steering, bind_group, bind_unsteered, source_address,
};
pub use stats::{ShardStats, ShardStatsSnapshot};
