//! The targets: see the table in `src/lib.rs`.
//!
//! A target that fails prints the bytes of the wire, simplified by bolero. They become a file
//! `fault-NAME` of the target's corpus, and a row of a table where the decoder is.

#![allow(clippy::unwrap_used, reason = "test code")]

mod admission;
mod artifacts;
mod dial_request;
mod edge;
mod first_packet;
mod frames;
mod lane;
mod registry;
mod session;

use millrace_edge_policy::siphash::Key;

/// Protects the metrics: a refusal has a reason that can be a label.
fn assert_label(reason: &str) {
    let is_label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    assert!(
        !reason.is_empty() && reason.bytes().all(is_label),
        "{reason:?} is no label"
    );
}

/// A refusal, for a target to return.
fn refused(reason: &str) -> bool {
    assert_label(reason);
    false
}

/// A secret that the peers of the targets share with us.
fn key(number: u8) -> Key {
    Key::from_bytes([number; 16])
}
