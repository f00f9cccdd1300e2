//! Fuzz targets for every decoder of bytes that a peer, a client or a packet's sender chooses.
//!
//! The targets are tests, in `tests/decoders`: `cargo test` runs each for a second, `make verify`
//! for 60. This library is what they share: the corpus, the mutation of its inputs, and the bytes
//! of a failure.
//!
//! | decoder | reads | target |
//! |---|---|---|
//! | `protocol::frame::Header`, `StreamKind`, `FailureCode` | the header of a frame, the first byte of a stream | `frame_header` |
//! | `protocol::frame::Hello` | the first frame of a peer | `hello` |
//! | `protocol::frame::LaneParser` | the frames of a lane | `lane` |
//! | `transport`: hello reader, inbox, datagrams, dispatch | the streams and datagrams of an established connection | `session` |
//! | `protocol::dial_request::Sealed` | a dial request | `dial_request` |
//! | `registry::wire` | a question for registry versions, and the answer | `registry_question`, `registry_answer` |
//! | `protocol::registry::SignedVersion` | the signature of a version | `registry_signature` |
//! | `protocol::registry::RegistryVersion`, `edge_policy::rules::RuleSet` | the document of a version and its firewall rules | `registry_document` |
//! | `protocol::address::NodeAddress` | an address in a document | `node_address` |
//! | `protocol::id`, `protocol::identity::PublicKey` | an id or a key as text | `name` |
//! | `node::reference::wire` | an announcement, the id of an artifact, its length | `announcement`, `artifact_id`, `artifact_length` |
//! | `edge_policy::packet` | a frame of Ethernet, IP, UDP or TCP | `packet` |
//! | `edge_policy::model` | the same, up to the decision and the answer | `edge_decision` |
//! | `edge_policy::packet::Quic`, `edge_policy::cid::dcid_of`, `quiche::Header` | the header of a QUIC packet: the edge and the transport read the same | `quic_header` |
//! | `edge_policy::cid::LocalCid` | a connection ID | `connection_id` |
//! | `edge_policy::token` | the token of a first packet, and its ID | `token` |
//! | `edge_policy::proof` | the proof in the ID of a first packet | `proof` |
//! | `edge_policy::admission` | ID and token of a first packet, up to the decision | `admission` |
//!
//! Not here, because others fuzz them: TLS and certificates (BoringSSL), QUIC packets and frames
//! behind the header (quiche), HTTP of the admin socket (hyper), names (the host's resolver). The
//! program in the kernel reads packets too: `ebpf/tests/model.rs` compares it with the model.
//!
//! Each target asserts that a decoder does not panic, that what it accepts is what an encoder
//! writes, that no size it reports exceeds the input or its bound, and that a refusal has a reason.
//!
//! Invariants
//! 1. An input of a target is the bytes of the wire, in the corpus and for every engine of bolero.
//! 2. Random bytes hardly ever pass a magic number or a MAC, and the engine of `cargo test` keeps
//!    no corpus of its own. So a target runs each input twice: as it is, and as a script that edits
//!    a seed ([`mutant()`]).
//! 3. The corpus holds what the encoders write today, and inputs that once failed. A seed that its
//!    decoder does not take as it should fails the target, so that no target tests refusals alone.

mod corpus;
mod mutant;

use std::time::Duration;

pub use bolero;
pub use corpus::{Corpus, Seed};
pub use mutant::{MUTANT_BYTES_MAX, mutant};

/// How long a target runs, unless bolero's `BOLERO_RANDOM_TEST_TIME_MS` says otherwise.
pub const TEST_TIME: Duration = Duration::from_secs(1);

/// A fuzz target: a test named `$name`, with its seeds (`fn() -> Vec<Seed>`) and its check
/// (`fn(&[u8]) -> bool`), which panics when a promise is broken, and says whether the decoder
/// accepted the bytes.
///
/// Its corpus is `__fuzz__/$name/corpus`, beside the file of the target.
#[macro_export]
macro_rules! target {
    ($(#[$attribute:meta])* $name:ident, $seeds:expr, $check:expr) => {
        $(#[$attribute])*
        #[test]
        fn $name() {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/decoders/__fuzz__/");
            let seeds = $seeds();
            let corpus = $crate::Corpus::open(folder.as_ref(), stringify!($name), &seeds);
            corpus.run_seeds(&seeds, $check);
            $crate::bolero::check!(name = stringify!($name))
                .with_test_time($crate::TEST_TIME)
                .for_each(|input: &[u8]| corpus.run(input, $check));
        }
    };
}
