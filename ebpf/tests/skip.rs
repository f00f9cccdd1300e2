//! A test that is skipped is seen, and fails where it must run.
#![allow(clippy::unwrap_used, reason = "test code")]

#[path = "common/skip.rs"]
mod skip;

use std::process::{Command, Output};

use skip::{REQUIRE, has_all};

const CHILD: &str = "MILLRACE_TEST_SKIPS";

/// Runs [`child_is_skipped`] as anybody runs a test: without `--nocapture`.
fn run(require: Option<&str>) -> (Output, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child_is_skipped"])
        .env_remove(REQUIRE)
        .env(CHILD, "1");
    if let Some(value) = require {
        command.env(REQUIRE, value);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    (output, said)
}

// Protects whoever reads "ok": what did not run was said, although the harness keeps what tests print.
#[test]
fn a_skip_is_seen() {
    for require in [None, Some(""), Some("0")] {
        let (output, said) = run(require);
        assert!(output.status.success());
        assert_eq!(said, "SKIPPED: child needs [\"a kernel\"]\n");
    }
}

// Protects continuous integration from being green without the kernel's evidence.
#[test]
fn a_skip_fails_where_the_kernel_is_required() {
    let (output, _) = run(Some("1"));
    assert!(!output.status.success());
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("SKIPPED: child needs"), "{told}");
    assert!(told.contains(REQUIRE), "{told}");
}

/// No test: what [`run`] starts.
#[test]
fn child_is_skipped() {
    if std::env::var_os(CHILD).is_some() {
        assert!(has_all::<&str>("child", &[]));
        assert!(!has_all("child", &["a kernel"]));
    }
}
