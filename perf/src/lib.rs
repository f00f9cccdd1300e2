//! Benchmarks and the regression gate.
//!
//! [`pieces`] are the pure hot pieces with fixed inputs. `benches/pieces.rs` times them, and
//! [`gate`] counts their instructions under callgrind and compares with a committed baseline: a
//! count is the same on a busy machine as on a quiet one. Mailboxes and trains, which need threads
//! and the kernel, are only timed, in `benches/shards.rs`.
//!
//! [`report`] is what the benches of the other crates share: targets, their table, their verdict.
//! [`relay`] is the model of a long or lossy link, which `perf/peers` moves packets by.
#![forbid(unsafe_code)]

pub mod gate;
pub mod pieces;
pub mod relay;
pub mod report;
