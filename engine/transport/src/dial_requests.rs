//! The MAC of dial requests, under the keys that pairs of nodes share.

use millrace_edge_policy::siphash::siphash24;
use millrace_protocol::dial_request::{DialRequest, Sealed};

pub use millrace_edge_policy::siphash::Key;

/// The datagram of a dial request, under the key of its pair.
pub fn seal(request: &DialRequest, key: Key) -> Sealed {
    request.seal(|words| siphash24(key, words))
}

/// What a dial request says, if its MAC is right. `key_of` gives the key of the pair that it
/// claims; none for a pair that this node is not of.
pub fn open(
    sealed: &Sealed,
    key_of: impl FnOnce(&DialRequest) -> Option<Key>,
) -> Option<DialRequest> {
    sealed.open(|claimed, words| Some(siphash24(key_of(claimed)?, words)))
}
