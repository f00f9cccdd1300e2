//! The registry as a node sees it: keys, the folder of signed versions, what is held of them, and
//! their exchange with peers.
//!
//! | file | job |
//! |---|---|
//! | `keys.rs` | keys and key files |
//! | `folder.rs`, `reader.rs` | the folder of signed versions, and what is new in it |
//! | `files.rs` | reads files within bounds |
//! | `kept.rs`, `intake.rs` | the newest version on disk, before it is in force |
//! | `versions.rs`, `held.rs`, `sources.rs` | what a node holds, the members that follow from it, and where versions come from |
//! | `wire.rs` | how versions travel between peers |
//! | `exchange.rs` | the service that asks and answers peers |
//! | `long_answers.rs` | copies of long answers, shared by peers that ask the same |
//! | `questions.rs` | questions to peers: under way, answered, failed |
//! | `lookups.rs` | hosts' names: a thread for each lookup |
//! | `follow.rs`, `folder_thread.rs` | the threads: one checks what peers sent and keeps names fresh, one reads the folder |
//! | `alone.rs` | when to tell that no peer is there to ask |
//! | `draft.rs` | the next version, before it is signed |

mod alone;
pub mod draft;
pub mod exchange;
mod files;
pub mod folder;
mod folder_thread;
pub mod follow;
mod held;
mod intake;
mod kept;
pub mod keys;
mod long_answers;
pub mod lookups;
mod questions;
mod reader;
mod sources;
pub mod versions;
pub mod wire;

pub use draft::{Draft, DraftError};
pub use exchange::Exchange;
pub use folder::VersionError;
pub use follow::{Events, Follow, FollowThread};
pub use kept::KeptVersion;
pub use keys::KeyError;
pub use lookups::{HostResolver, Resolver};
pub use questions::Offer;
pub use sources::Sources;
pub use versions::{FirewallRecords, KnownNode, Summary, Versions, VersionsConfig};
