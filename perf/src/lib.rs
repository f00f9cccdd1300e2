//! Benchmarks and the regression gate.
//!
//! [`pieces`] are the pure hot pieces with fixed inputs. `benches/pieces.rs` times them, and
//! [`gate`] counts their instructions under callgrind and compares with a committed baseline: a
//! count says the same on a busy machine as on a quiet one. What needs threads or the kernel
//! (mailboxes, trains) is only timed, in `benches/shards.rs`.
#![forbid(unsafe_code)]

pub mod gate;
pub mod pieces;
