//! A node whose stderr takes nothing: it works on, whether the reader is gone or stands still.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::fs::OpenOptions;
use std::io::{BufRead, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use common::{TestNode, TestRegistry, eventually, own_addresses, text};
use rustix::fs::OFlags;
use tempfile::TempDir;

/// More lines than the pipe and the node's queue hold together.
const LINES: u64 = 1600;

/// What the config of a node takes at most: it looks at so many files of the folder at once.
const VERSIONS_MAX: u64 = 32;

/// A node that refuses registry versions, with a line in its log for each.
struct Talker {
    folder: TempDir,
    registry: TestRegistry,
    node: TestNode,
    refused: u64,
}

impl Talker {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let registry = TestRegistry::init(folder.path());
        let state = folder.path().join("node");
        let dir = format!("dir = {:?}\nversions_max = {VERSIONS_MAX}\n", registry.dir);
        let ip = own_addresses() + "1";
        let node = TestNode::new(&state, &registry, &ip, &dir);
        registry.add(&node, &format!("{ip}:4100"));
        Self {
            folder,
            registry,
            node,
            refused: 0,
        }
    }

    /// Waits until the node has said at least `lines` lines more.
    fn talk(&mut self, lines: u64) {
        let until = self.refused + lines;
        while self.refused < until {
            // Files of another length are looked at again.
            let text = "x".repeat(1 + usize::try_from(self.refused / VERSIONS_MAX).unwrap());
            for number in 100..100 + VERSIONS_MAX {
                let file = self.registry.dir.join(format!("{number:012}.toml"));
                std::fs::write(file, &text).unwrap();
            }
            let before = self.refused;
            self.refused = eventually("the versions are refused", || {
                let status = self.node.status();
                let refused = status["registry"]["refused_versions"].as_object().unwrap();
                let refused = refused.values().map(|count| count.as_u64().unwrap()).sum();
                (refused >= before + VERSIONS_MAX).then_some(refused)
            });
        }
    }

    fn assert_works(&self) {
        assert_eq!(self.node.get("/readyz").0, 200);
        assert_eq!(self.node.status()["ready"], true);
        let file = self.folder.path().join("artifact");
        std::fs::write(&file, b"bytes").unwrap();
        common::ok(&["put", text(&file), "--socket", text(&self.node.socket)]);
    }
}

fn millrace() -> Command {
    Command::new(env!("CARGO_BIN_EXE_millrace"))
}

// Protects a node whose supervisor, or `| tee`, has ended: no line of the log ends a thread.
#[test]
fn a_node_outlives_the_reader_of_its_stderr() {
    let mut talker = Talker::new();
    drop(talker.node.start_unread(millrace()));
    talker.talk(VERSIONS_MAX);
    talker.assert_works();
    assert_eq!(talker.node.stop(), Some(0));
}

// Protects a node whose supervisor stands still: no thread waits for the reader, nor does the end
// of the process. The log has a gap then, and says so.
#[test]
fn a_node_does_not_wait_for_the_reader_of_its_stderr() {
    let mut talker = Talker::new();
    let reader = talker.node.start_unread(millrace());
    fill_stderr(talker.node.pid());
    talker.talk(LINES);
    talker.assert_works();

    let mut lines = reader.lines().map_while(Result::ok);
    let told = lines.find_map(|line| Some(line.split_once("log lost here: ")?.1.to_owned()));
    let lost: u64 = told.unwrap().parse().unwrap();
    assert!((1..LINES).contains(&lost), "{lost}");
    talker.talk(1);
    assert!(lines.next().unwrap().contains("registry version refused"));

    fill_stderr(talker.node.pid());
    talker.talk(1);
    assert_eq!(talker.node.stop(), Some(0));
}

/// Writes into the pipe that is a process's stderr until it takes nothing.
fn fill_stderr(process: u32) {
    // A description of its own: that of the process goes on to block.
    let nonblocking = OFlags::NONBLOCK.bits().try_into().unwrap();
    let mut pipe = OpenOptions::new()
        .write(true)
        .custom_flags(nonblocking)
        .open(format!("/proc/{process}/fd/2"))
        .unwrap();
    loop {
        match pipe.write(b"\n") {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("{error}"),
        }
    }
}
