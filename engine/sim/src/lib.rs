//! Whole nodes in one thread, under a seeded network and a virtual clock.
//!
//! A [`Sim`] holds nodes that are the product's above their QUIC connections: the same `Peers`,
//! timers, lanes, message streams, RPC tables, budgets and handlers. Only the QUIC connection is a
//! model, over [`memnet`], a network with latency, jitter, capacity, loss, duplication and cuts.
//! Code above the transport talks to peers through a [`SimMessenger`], a
//! [`Messenger`](millrace_transport::Messenger) as a shard's is.
//!
//! 1. A run is a function of the seed, of the configuration and of the calls made: no clock, no
//!    threads, no hash order.
//! 2. Time moves only when nothing is left to do at the present.
//! 3. After every step the nodes to which something happened are checked, where there are up to 32:
//!    what `Peers` holds current is what its actions said, what it holds exists, and numbers of
//!    connections rise. More nodes are checked after some of their steps.
#![forbid(unsafe_code)]

pub mod memnet;
mod messenger;
mod node;
mod quic;
mod sim;
mod tasks;
mod wire;

pub use messenger::SimMessenger;
pub use sim::{Sim, SimConfig};
