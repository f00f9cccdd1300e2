//! What the edge decides, without a kernel: packet views, firewall rules and their compiler,
//! limits, connection IDs, tokens, and the model of the whole program. `docs/reference/edge.md` is
//! the specification.
//!
//! 1. No I/O, no clock, no `unsafe`; time and randomness are arguments.
//! 2. No packet makes the crate panic or allocate.
//! 3. The kernel's programs and this crate agree bit by bit; `ebpf/tests/model.rs` compares them.
#![forbid(unsafe_code)]

pub mod action;
pub mod admission;
pub mod cid;
pub mod limiter;
pub mod model;
pub mod packet;
pub mod proof;
pub mod reason;
pub mod retry;
pub mod rules;
pub mod settings;
pub mod siphash;
pub mod source;
pub mod stress;
pub mod token;
pub mod trie;
pub mod verdict;
