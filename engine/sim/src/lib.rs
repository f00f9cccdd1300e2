//! Seeded simulator and in-memory network for the protocol machines.
//!
//! [`memnet`] is a message network with latency, capacity, loss, duplication and cuts; the memory
//! transport stands on it too. [`Sim`] runs nodes of the real connection machines over it, with a
//! small model of QUIC between.
//!
//! 1. A run is a function of its seed and of the calls made: no clock, no threads, no hash order.
#![forbid(unsafe_code)]

mod conn;
pub mod memnet;
mod node;
mod sim;

pub use sim::{Sim, SimConfig};
