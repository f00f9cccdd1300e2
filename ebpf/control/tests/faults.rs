//! Whose fault an error is, and when to try again.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use millrace_edge::edge::EdgeError;
use millrace_edge::helper::HelperError;
use millrace_edge::journal::JournalError;
use millrace_edge::netns::NetworkNamespace;
use millrace_edge::nft::RULE_REFUSED;
use millrace_edge::pins::PinError;
use millrace_edge::privileges::drop_capabilities;
use millrace_edge::publish::PublishError;
use millrace_edge_control::{ControlError, Fault, Retry};
use millrace_edge_policy::rules::{RuleSet, RulesError};

fn path() -> PathBuf {
    "/run/millrace/edge".into()
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

const EPERM: i32 = 1;
const EACCES: i32 = 13;
const EBUSY: i32 = 16;
const ENOSPC: i32 = 28;

fn too_large() -> PublishError {
    PublishError::TooLarge {
        what: "rules",
        needed: 9,
        available: 8,
        key: "rules_max",
    }
}

fn refused_by_helper(reason: &str) -> HelperError {
    HelperError::Refused {
        reason: reason.into(),
        message: "no".into(),
    }
}

fn attach(number: i32) -> EdgeError {
    EdgeError::Attach {
        program: "edge",
        place: "eth0".into(),
        source: errno(number),
    }
}

fn lock(number: i32) -> PinError {
    PinError::Lock {
        path: path(),
        source: errno(number),
    }
}

fn read(number: i32) -> JournalError {
    JournalError::Read {
        path: path(),
        source: errno(number),
    }
}

fn rule() -> RulesError {
    let table = toml::from_str("action = \"perhaps\"\nscope = \"global\"").unwrap();
    RuleSet::read(1, &[table]).unwrap_err()
}

/// Errors, whose fault each is, and when it is tried again.
fn table() -> Vec<(ControlError, Fault, Retry)> {
    let elsewhere = EdgeError::Elsewhere {
        root: path(),
        namespace: NetworkNamespace {
            cookie: 1,
            inode: 1,
        },
    };
    let set_waits = PublishError::AwaitingConfirm {
        set: 1,
        left: Duration::from_secs(1),
    };
    let interface = EdgeError::Interface {
        name: "eth9".into(),
        source: io::ErrorKind::NotFound.into(),
    };
    let hits = |number| PublishError::Hits(errno(number).into());
    let (absent, present) = (
        EdgeError::Absent { root: path() },
        EdgeError::Present { root: path() },
    );
    let busy = || PinError::Busy { path: path() };
    let later = |error: ControlError, fault| (error, fault, Retry::Later);
    let after_change = |error: ControlError, fault| (error, fault, Retry::AfterChange);
    vec![
        // The same set does not fit into the same maps.
        after_change(too_large().into(), Fault::Config),
        after_change(EdgeError::Publish(too_large()).into(), Fault::Config),
        after_change(rule().into(), Fault::Registry),
        after_change(refused_by_helper(RULE_REFUSED).into(), Fault::Registry),
        later(refused_by_helper("nft_run").into(), Fault::Host),
        later(set_waits.into(), Fault::Operator),
        later(PublishError::NotAwaitingConfirm.into(), Fault::Operator),
        later(elsewhere.into(), Fault::Operator),
        later(absent.into(), Fault::Absent),
        later(present.into(), Fault::Held),
        later(busy().into(), Fault::Held),
        later(EdgeError::Pins(busy()).into(), Fault::Held),
        later(interface.into(), Fault::Host),
        later(lock(ENOSPC).into(), Fault::Host),
        later(lock(EACCES).into(), Fault::Permission),
        later(read(ENOSPC).into(), Fault::Journal),
        later(read(EACCES).into(), Fault::Permission),
        later(EdgeError::Journal(read(EPERM)).into(), Fault::Permission),
        later(attach(EBUSY).into(), Fault::Kernel),
        later(attach(EPERM).into(), Fault::Permission),
        later(hits(EBUSY).into(), Fault::Kernel),
        later(hits(EPERM).into(), Fault::Permission),
    ]
}

// Protects the operator from a wrong lead, and the host from endless attempts.
#[test]
fn each_error_has_its_fault_and_its_retry() {
    for (error, fault, retry) in table() {
        assert_eq!(
            (error.fault, error.fault.retry()),
            (fault, retry),
            "{error}"
        );
    }
}

// Protects the operator from a wrong lead: what the process lacks is not what stands in the way.
#[test]
fn a_process_without_capabilities_has_the_same_faults() {
    // Capabilities belong to a thread, so the others keep theirs.
    let faults = std::thread::spawn(|| {
        drop_capabilities(&[]).unwrap();
        table()
    });
    for (error, fault, _) in faults.join().unwrap() {
        assert_eq!(error.fault, fault, "{error}");
    }
}

// Protects the operator from a symptom in place of the cause.
#[test]
fn the_first_error_stays_and_the_second_is_mentioned() {
    let first = ControlError::from(too_large());
    assert_eq!(first.clone().after(Ok(())), first);
    let both = first.clone().after(Err(read(ENOSPC).into()));
    assert_eq!(both.fault, Fault::Config);
    let (one, two) = (first.to_string(), read(ENOSPC).to_string());
    let text = both.to_string();
    assert!(text.starts_with(&one) && text.ends_with(&two), "{text}");
}
