//! The service interface: what the code above the transport is written against.
//!
//! | module | job |
//! |---|---|
//! | `router` | services, and the methods that they own |
//! | `message`, `responder` | requests, one-way messages, answers now and later |
//! | `body` | bodies that a service takes chunk by chunk |
//! | `messenger` | the trait for requests and messages to peers, on sockets and in the simulator |
//! | `shard_messenger`, `routes`, `command` | its implementation on a shard; the way to other shards |
//! | `handle`, `send`, `early_cancels` | a connection as this code sees it; what is sent on it |
//! | `pending`, `remote`, `completion` | answers that are waited for, on the shard and elsewhere |

pub(crate) mod body;
pub(crate) mod command;
pub(crate) mod completion;
mod early_cancels;
pub(crate) mod handle;
pub(crate) mod message;
pub(crate) mod messenger;
pub(crate) mod pending;
pub(crate) mod remote;
pub(crate) mod responder;
pub(crate) mod router;
pub(crate) mod routes;
mod send;
pub(crate) mod shard_messenger;
