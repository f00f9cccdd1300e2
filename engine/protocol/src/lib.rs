//! Pure protocol machines: identity, registry, topology, wire frames, connections, RPC.
//!
//! Everything here decides and nothing here acts: no I/O, no clock (time is an argument), no
//! threads, no environment, no `unsafe`. A shard drives the machines; so does the simulator.
//!
//! Common to all machines:
//! 1. The same inputs in the same order give the same outputs: randomness comes from a seeded
//!    [`rng::Rng`], and no map iterates in an order that a hasher chose.
//! 2. What a peer sends never panics and is measured before anything is allocated for it.
//! 3. Every queue and map has a bound, and the bound is a field of a config struct.
#![forbid(unsafe_code)]

pub mod address;
pub mod backoff;
pub mod body_deadline;
pub mod budget;
pub mod dial_request;
pub mod flood;
pub mod frame;
pub mod health;
pub mod id;
pub mod identity;
pub mod names;
pub mod pair;
pub mod path;
pub mod peers;
pub mod registry;
pub mod rng;
pub mod rpc;
pub mod score;
pub mod time_grid;
pub mod timer;
pub mod tls_keys;
pub mod topology;
pub mod unread;
