//! SIGKILL at every step of every write of the journal: the next process finds the old state or the
//! new one, never a third.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus};

use millrace_edge::edge::Edge;
use millrace_edge::nft::Nft;
use millrace_edge::pins::Pins;
use millrace_edge::publish::Publisher;
use millrace_edge_control::Record;
use millrace_testkit::skip;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Steps of one write.
const STEPS: u32 = 6;
const SIGKILL: i32 = 9;

/// Runs one change, killed at a step or not.
fn run(kind: &str, pins: &Pins, version: u16, kill_at: Option<u32>) -> ExitStatus {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-control-test-process"));
    command.arg(kind).arg(pins.root()).arg(version.to_string());
    if let Some(step) = kill_at {
        command.env("MILLRACE_TEST_KILL_AT", step.to_string());
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let was_killed = output.status.signal() == Some(SIGKILL);
    assert!(
        output.status.success() || (kill_at.is_some() && was_killed),
        "{kind} {version}, killed at {kill_at:?}: {}: {said}",
        output.status
    );
    output.status
}

fn done(kind: &str, pins: &Pins, version: u16) {
    run(kind, pins, version, None);
}

// Protects what a dead process leaves: the journal's text before its write, or the text after it.
#[test]
fn a_journal_is_old_or_new_after_a_kill_at_each_step() {
    let folder = tempfile::tempdir().unwrap();
    let pins = Pins::at(folder.path().join("edge"));
    let (path, new) = (pins.journal_path(), folder.path().join("edge.json.new"));
    let kinds = ["interface", "temporary", "pending", "refused", "committed"];
    for (version, kind) in (1..).zip(kinds) {
        let kind = format!("journal-{kind}");
        let before = fs::read(&path).unwrap_or_default();
        done(&kind, &pins, version);
        let after = fs::read(&path).unwrap();
        assert_ne!(before, after, "{kind} changes something");
        for step in 1..=STEPS {
            restore(&path, &before);
            run(&kind, &pins, version, Some(step));
            let found = fs::read(&path).unwrap_or_default();
            // The fifth step is the rename.
            let expected = if step < 5 { &before } else { &after };
            assert_eq!(&found, expected, "{kind}, step {step}");
            Record::read(&pins).unwrap();
            // The files that this process left do not stop the next one.
            restore(&path, &before);
            done(&kind, &pins, version);
            assert_eq!(fs::read(&path).unwrap(), after, "{kind}, after step {step}");
            assert!(!new.exists());
        }
        let status = run(&kind, &pins, version, Some(STEPS + 1));
        assert!(status.success(), "{kind} has {STEPS} steps");
    }
}

fn restore(path: &Path, text: &[u8]) {
    match text {
        [] if !path.exists() => {}
        [] => fs::remove_file(path).unwrap(),
        text => fs::write(path, text).unwrap(),
    }
}

/// An edge in a network namespace that the calling thread moves into, and the processes that it
/// starts with it.
struct Testbed {
    namespace: String,
    pins: Pins,
    version: u16,
    _folder: tempfile::TempDir,
}

impl Testbed {
    /// None where this process may not make one: then the test is skipped.
    fn new(test: &str) -> Option<Self> {
        if !skip::has_all(test, &millrace_edge::privileges::missing()) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let thread = rustix::thread::gettid().as_raw_nonzero();
        let namespace = format!("mr-kill-{thread}");
        let bed = Self {
            pins: Pins::at(folder.path().join("edge")),
            version: 1,
            _folder: folder,
            namespace,
        };
        tool("ip", &["netns", "add", &bed.namespace]);
        let file = fs::File::open(format!("/run/netns/{}", bed.namespace)).unwrap();
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        let veth = ["link", "add", "mr0", "type", "veth", "peer", "name", "mr1"];
        tool("ip", &veth);
        tool("ip", &["link", "set", "mr0", "up"]);
        Some(bed)
    }

    /// Another version than all before.
    fn next(&mut self) -> u16 {
        self.version += 1;
        self.version
    }

    fn set_in_force(&self) -> u32 {
        let edge = Edge::adopt(&self.pins).unwrap();
        Publisher::new(edge.maps()).config().set
    }

    /// The version whose rules the kernel has, as the journal says.
    fn version_in_force(&self) -> u64 {
        let record = Record::read(&self.pins).unwrap();
        let set = self.set_in_force();
        let written = record.set(set);
        let written = written.unwrap_or_else(|| panic!("set {set} is not in {record:?}"));
        assert_eq!(
            written.inputs.policy.tcp_ports,
            [written.inputs.firewall.version],
            "policy and rules are of one set"
        );
        written.inputs.firewall.version
    }

    /// After the next process did what was left: kernel, journal and nftables say the same.
    fn assert_committed(&self, what: &str) {
        let record = Record::read(&self.pins).unwrap();
        assert_eq!(record.set, self.set_in_force(), "{what}");
        assert!(record.fingerprint.is_some(), "{what}");
        let nft = Nft::of(&self.pins);
        assert_eq!(nft.fingerprint().unwrap(), record.fingerprint, "{what}");
        let table = tool("nft", &["list", "table", "inet", &nft.table.to_string()]);
        let port = self.version_in_force().to_string();
        assert!(table.contains(&port), "{what}: no {port} in {table}");
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        let _ = Edge::detach(&self.pins);
        let _ = Command::new("ip")
            .args(["netns", "del", &self.namespace])
            .output();
    }
}

/// The output of a program that must succeed.
fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

// Protects an edge from a process that dies in the middle of a change: kernel, journal and nftables
// are those of the set before or of the one after, and the next process finishes what is half done.
#[test]
fn an_edge_is_old_or_new_after_a_kill_at_each_step() {
    let Some(mut bed) = Testbed::new("an_edge_is_old_or_new_after_a_kill_at_each_step") else {
        return;
    };
    done("attach", &bed.pins, 1);
    for kind in ["apply", "deny", "try", "confirm", "revert"] {
        let mut steps = 0;
        loop {
            steps += 1;
            let what = format!("{kind}, killed at step {steps}");
            let (set, old) = (bed.set_in_force(), bed.version_in_force());
            let version = bed.next();
            let new = u64::from(version);
            let is_tried = matches!(kind, "confirm" | "revert");
            if is_tried {
                done("try", &bed.pins, version);
            }
            let status = run(kind, &bed.pins, version, Some(steps));
            let found = bed.version_in_force();
            let is_set_new = bed.set_in_force() != set;
            match kind {
                // A temporary rule goes on top of the version in force.
                "deny" => assert_eq!(found, old, "{what}"),
                "confirm" => assert_eq!(found, new, "{what}"),
                "revert" => assert_eq!(found, old, "{what}"),
                _ => assert_eq!(found, if is_set_new { new } else { old }, "{what}"),
            }
            let awaits = {
                let edge = Edge::adopt(&bed.pins).unwrap();
                Publisher::new(edge.maps()).awaits_confirm()
            };
            if awaits {
                // The next process can still decide, and what it keeps is whole.
                assert_eq!(kind, "try", "{what}");
                done("confirm", &bed.pins, version);
                assert_eq!(bed.version_in_force(), new, "{what}");
            }
            done("finish", &bed.pins, version);
            bed.assert_committed(&what);
            if status.success() {
                break;
            }
        }
        assert!(steps > STEPS, "{kind} writes more than once");
        // The next change writes down a set that was not confirmed, if the kernel had it.
        done("deny", &bed.pins, bed.version);
        let record = Record::read(&bed.pins).unwrap();
        assert_eq!(record.pending, None, "{kind}");
        assert_eq!(record.rolled_back.is_some(), kind == "revert", "{kind}");
    }
    done("detach", &bed.pins, 1);
    assert!(!bed.pins.journal_path().exists());
}

// Protects an operator from a process that dies while it attaches, before and after each link, and
// at each step of each write: the next `attach` needs no `detach` before it.
#[test]
fn an_attach_that_was_killed_is_made_again() {
    let Some(bed) = Testbed::new("an_attach_that_was_killed_is_made_again") else {
        return;
    };
    for step in 1.. {
        let what = format!("attach, killed at step {step}");
        let status = run("attach", &bed.pins, 1, Some(step));
        done("attach", &bed.pins, 1);
        let edge = Edge::adopt(&bed.pins).unwrap();
        let interfaces = edge.interfaces().unwrap();
        let names: Vec<_> = interfaces.iter().map(|known| &*known.name).collect();
        assert_eq!(names, ["mr0"], "{what}");
        assert!(edge.is_live(&interfaces[0]), "{what}");
        bed.assert_committed(&what);
        done("detach", &bed.pins, 1);
        if status.success() {
            assert!(step > 2 * STEPS, "it links, and writes more than once");
            break;
        }
    }
}
