//! What the tests of this crate start as a process of its own: one change of an edge or of its
//! journal, ended by SIGKILL at the step that `MILLRACE_TEST_KILL_AT` counts to.
//!
//! `edge-control-test-process KIND PINS VERSION`: the version is that of the registry, and makes
//! every change another.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use millrace_edge::edge::Edge;
use millrace_edge::interface::{AttachMode, Interface};
use millrace_edge::journal::{Journal, Step, observe_steps};
use millrace_edge::nft::Nft;
use millrace_edge::pins::{EdgeLock, Pins};
use millrace_edge::publish::Publisher;
use millrace_edge_control::journal::{Pending, Refused};
use millrace_edge_control::{
    ApplyOptions, ApplyRequest, ControlError, Firewall, LockedEdge, Record, attach, detach,
};
use millrace_edge_policy::rules::{RuleAction, Temporary};
use millrace_edge_policy::settings::Mode;
use millrace_tuning::NodeConfig;
use rustix::process::{Signal, getpid, kill_process};

/// Steps until the end; 0: it never comes.
static LEFT: AtomicU32 = AtomicU32::new(0);

fn end_at_its_step(_step: Step) {
    if LEFT.fetch_sub(1, Ordering::Relaxed) == 1 {
        let _ = kill_process(getpid(), Signal::KILL);
        // The signal is on its way to every thread of this process.
        loop {
            std::thread::park();
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (kind, pins) = (arguments.next().unwrap(), arguments.next().unwrap());
    let version: u16 = arguments.next().unwrap().parse().unwrap();
    if let Ok(steps) = std::env::var("MILLRACE_TEST_KILL_AT") {
        LEFT.store(steps.parse().unwrap(), Ordering::Relaxed);
        observe_steps(end_at_its_step);
    }
    let pins = Pins::at(pins);
    let lock = pins.lock_waiting().unwrap();
    let done = match kind.strip_prefix("journal-") {
        Some(kind) => of_journal(kind, &pins, &lock, u32::from(version)),
        None => of_edge(&kind, &pins, &lock, version),
    };
    if let Err(error) = done {
        eprintln!("{kind}: {error}");
        std::process::exit(1);
    }
}

/// Changes of the file alone: each is one write.
fn of_journal(kind: &str, pins: &Pins, lock: &EdgeLock, version: u32) -> Result<(), ControlError> {
    let refused = Some(Refused {
        registry_version: u64::from(version),
        message: "rule 1".into(),
    });
    if kind == "interface" {
        // As the helper does it: the control loop's part stays as it is.
        let mut journal = <Journal>::read(pins)?;
        journal.interfaces.push(Interface {
            name: format!("eth{version}"),
            index: version,
            mode: AttachMode::Generic,
        });
        return Ok(journal.write(pins, lock)?);
    }
    Record::update(pins, lock, |record| match kind {
        "temporary" => {
            let prefix = "192.0.2.0/24".parse().unwrap();
            let rule = Temporary::new(prefix, RuleAction::Deny, u64::from(version));
            record.temporary.push(rule);
        }
        "pending" => {
            record.pending = Some(Pending {
                set: version,
                to_confirm: true,
                anew: true,
                refused,
            });
        }
        "committed" => {
            record.set = version;
            record.pending = None;
        }
        "refused" => record.refused = refused,
        kind => panic!("{kind} is no change"),
    })
}

/// Changes of an edge on the interface `mr0`: several writes each, with the kernel and nftables
/// between them.
fn of_edge(kind: &str, pins: &Pins, lock: &EdgeLock, version: u16) -> Result<(), ControlError> {
    let mut options = ApplyOptions::committed(Mode::Enforce);
    if kind == "try" {
        options.confirm_within = Some(Duration::from_secs(600));
    }
    let mut config = NodeConfig::default();
    config.edge.rules_max = 64;
    config.edge.trie_nodes_max = 256;
    config.edge.limiter_buckets = 1024;
    config.edge.sources_max = 1024;
    config.edge.peers_max = 16;
    // The table of nftables shows which version it is from.
    config.edge.tcp_ports = vec![u64::from(version)];
    let firewall = Firewall {
        version: u64::from(version),
        ..Firewall::default()
    };
    let request = ApplyRequest::new(&config, 4100, firewall, options);
    match kind {
        "attach" if Edge::adopt(pins).is_err() => {
            return attach(pins, lock, &["mr0".into()], &request).map(drop);
        }
        "detach" => return detach(pins, lock),
        _ => {}
    }
    let edge = Edge::adopt(pins)?;
    let nft = Nft::of(pins);
    let locked = LockedEdge::new(&edge, lock, &nft);
    match kind {
        // As `millrace xdp attach` does with what a dead process left: the interface, then a set.
        "attach" => {
            edge.attach_under("mr0", AttachMode::Auto, lock)?;
            match Publisher::new(edge.maps()).config().set {
                0 => locked.apply(&request).map(drop),
                _ => locked.finish().map(drop),
            }
        }
        "apply" | "try" => locked.apply(&request).map(drop),
        "confirm" => locked.confirm().map(drop),
        "revert" => locked.revert().map(drop),
        "deny" => {
            let prefix = format!("192.0.2.{}/32", version % 256).parse().unwrap();
            let rule = Temporary::new(prefix, RuleAction::Deny, u64::from(u32::MAX));
            locked.add_temporary(rule, request).map(drop)
        }
        "finish" => locked.finish().map(drop),
        kind => panic!("{kind} is no change"),
    }
}
