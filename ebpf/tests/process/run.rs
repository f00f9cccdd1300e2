//! The program that tests of this crate start as processes of their own. The first argument is the
//! job; a job that fails panics, which its exit status shows.
#![allow(clippy::unwrap_used, reason = "test code")]

#[path = "../common/sets.rs"]
mod sets;
mod unprivileged;

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _};

use millrace_edge::edge::{Edge, EdgeError};
use millrace_edge::helper::serve_stdin;
use millrace_edge::interface::AttachMode;
use millrace_edge::lease::charge_validated;
use millrace_edge::pins::{PinError, Pins};
use millrace_edge_policy::rules::RuleAction;
use millrace_edge_policy::settings::Mode;
use millrace_edge_policy::source::Source;
use sets::{BURST, REMOTE4, limited, options, set};

fn main() {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<&str> = arguments
        .iter()
        .map(|word| word.to_str().unwrap())
        .collect();
    match words[..] {
        ["attach-and-wait", root] => attach_and_wait(root, |edge| {
            edge.publish(&set(Mode::Enforce, RuleAction::Deny), 7, None)
                .unwrap();
        }),
        ["limit-and-wait", root] => attach_and_wait(root, |edge| {
            edge.publish(&limited(), 7, None).unwrap();
            // As the node charges handshakes of QUIC that complete; the kernel charges those of
            // TCP.
            for _ in 0..BURST {
                let limit = limited().settings.limits.source_quic;
                charge_validated(edge.maps(), Source::of(REMOTE4), limit);
            }
        }),
        ["out-of-sight", root] => out_of_sight(&Pins::at(root)),
        ["unprivileged-node", root] => unprivileged::node(Pins::at(root)),
        ["helper"] => serve_stdin().unwrap(),
        _ => panic!("no such job: {words:?}"),
    }
}

/// Attaches an edge, puts a set in force, and keeps it until standard input ends.
fn attach_and_wait(root: &str, put_in_force: impl FnOnce(&Edge)) {
    let edge = Edge::attach(&Pins::at(root), &options(AttachMode::Native)).unwrap();
    put_in_force(&edge);
    println!("attached and published");
    let _ = io::stdin().read_line(&mut String::new());
}

/// Looks for an edge before and after another process attaches it where this process's mounts do
/// not show its pins.
fn out_of_sight(pins: &Pins) {
    // Nothing is there yet.
    assert_eq!(Edge::may_detach(pins).unwrap(), None);
    fs::write(pins.root().with_file_name("ready"), "").unwrap();
    // Until the edge is attached.
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
    let error = Edge::attach(pins, &options(AttachMode::Auto)).unwrap_err();
    let is_private = matches!(error, EdgeError::Pins(PinError::Private { .. }));
    assert!(is_private, "{error}");
    let error = Edge::may_detach(pins).unwrap_err();
    assert!(matches!(error, EdgeError::OutOfSight { .. }), "{error}");
}
