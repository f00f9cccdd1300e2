//! The memory transport: nodes in one thread, over virtual time and a network with latency, capacity, loss and cuts.
//!
//! A [`MemoryNetwork`] calls the same [`crate::Service`]s as a shard does, and code talks to peers
//! through a [`MemoryLocal`], a [`crate::Messenger`] as the shard's own handle is. Links, calls,
//! lanes, deadlines, budgets and failures are the transport's code; below them, instead of QUIC, lie
//! packets of [`millrace_sim::memnet`].
//!
//! What differs from QUIC, on purpose: a packet of lane frames (small messages) that the network
//! drops stays lost, so that code above meets loss that a QUIC stream would only show as delay. Large
//! messages are repeated piece by piece until they are whole, as a stream is.
//!
//! Invariants
//! 1. A run is a function of the seed, of the configuration and of the calls made.
//! 2. What arrives was sent, and a message arrives at most once, whatever the network duplicates.
//! 3. A body is written once, from the sender's chunks into the receiver's: pieces under way are
//!    slices.

mod carrier;
mod connection;
mod inbox;
mod local;
mod network;
mod node;
mod packet;
mod tasks;

pub(crate) use carrier::MemoryCarrier;
pub use local::MemoryLocal;
pub use millrace_sim::memnet::{LinkConfig, NetCounters};
pub use network::{MemoryConfig, MemoryNetwork};
pub(crate) use packet::MemoryLink;
