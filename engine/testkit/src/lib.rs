//! What the tests of several crates share. A dev-dependency only; no crate ships it.
//!
//! - [`wait`]: waits for a condition, with a bound.
//! - [`skip`]: says that a test cannot run on this host, and fails where it must run.
//! - [`net`]: addresses that no other test takes.
//! - [`sockets`]: connections from a chosen address, raw sockets.
//! - [`netns`]: network namespaces.
//! - [`cgroup`]: control groups, for a bound on memory and a quota of the CPU.
//! - [`cpu_share`]: a share of a core for a thread.
//! - [`ids`]: keys and node ids made from small numbers.
//! - [`page`]: pages that are generated from the code.
//! - [`mod@threads`]: the threads of a test's own process.
//! - [`seeds`]: how many seeds a simulation runs, and which one failed.

pub mod cgroup;
pub mod cpu_share;
pub mod ids;
pub mod net;
pub mod netns;
pub mod page;
pub mod seeds;
pub mod skip;
pub mod sockets;
pub mod threads;
pub mod wait;

pub use cgroup::Cgroup;
pub use net::free_addr;
pub use netns::Namespace;
pub use seeds::for_seeds;
pub use skip::has_all;
pub use threads::{threads, threads_with};
pub use wait::{PATIENCE, eventually, until, within};
