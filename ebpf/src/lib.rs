//! The edge in the kernel: the XDP program and its companions, their maps and pins, and the table
//! of nftables.
//!
//! `docs/reference/edge.md` specifies the decisions, `src/bpf` makes them, `millrace_edge_policy`
//! models them.

pub mod abi;
pub mod clock;
pub mod counts;
pub mod edge;
pub mod error;
pub mod events;
pub mod frame;
pub mod helper;
pub mod interface;
pub mod journal;
pub mod lease;
pub mod load;
pub mod maps;
pub mod metrics;
pub mod netns;
pub mod nft;
pub mod offload;
pub mod pins;
pub mod privileges;
pub mod publish;
pub mod ruleset;
pub mod selftest;
pub mod steer;
mod sys;
pub mod trace;
