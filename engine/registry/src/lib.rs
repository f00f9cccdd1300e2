//! The registry as a node sees it: keys, the folder of signed versions, what is held of them, and
//! their exchange with peers.
//!
//! | file | job |
//! |---|---|
//! | `keys.rs` | keys and key files |
//! | `folder.rs` | the folder of signed versions |
//! | `versions.rs` | what a node holds, and the members that follow from it |
//! | `wire.rs` | how versions travel between peers |
//! | `exchange.rs` | the service that asks and answers peers |
//! | `long_answers.rs` | copies of long answers, shared by peers that ask the same |
//! | `questions.rs` | questions to peers: under way, answered, failed |
//! | `lookups.rs` | hosts' names: a thread for each lookup |
//! | `follow.rs` | the thread that reads the folder, checks what peers sent, and keeps names fresh |
//! | `draft.rs` | the next version, before it is signed |

pub mod draft;
pub mod exchange;
pub mod folder;
pub mod follow;
pub mod keys;
mod long_answers;
pub mod lookups;
mod questions;
pub mod versions;
pub mod wire;

pub use draft::{Draft, DraftError};
pub use exchange::Exchange;
pub use folder::{Follower, VersionError};
pub use follow::{Events, Follow, FollowThread};
pub use keys::KeyError;
pub use lookups::{HostResolver, Resolver};
pub use questions::Offer;
pub use versions::{FirewallRecords, KnownNode, Summary, Versions, VersionsConfig};
