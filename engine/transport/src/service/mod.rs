//! The service interface: what the code above the transport is written against.
//!
//! | module | job |
//! |---|---|
//! | `message` | requests, answers, one-way messages, and the handler that a shard calls |
//! | `messenger` | the trait for requests and messages to peers, on sockets and in memory |
//! | `shard_messenger` | its implementation on one shard |
//! | `handle` | one established connection as this code sees it |
//! | `remote` | a request from a thread outside the shards |

pub(crate) mod handle;
pub(crate) mod message;
pub(crate) mod messenger;
pub(crate) mod remote;
pub(crate) mod shard_messenger;
