//! A test that is skipped is seen and reported, and fails where it must run.
#![allow(clippy::unwrap_used, reason = "test code")]

use millrace_testkit::{
    has_all,
    skip::{REPORT, REQUIRE},
};
use std::process::{Command, Output};

const INNER: &str = "skips_because_a_kernel_is_missing";

/// Runs the ignored test below as any test is run: without `--nocapture`.
fn run(configure: impl FnOnce(&mut Command)) -> (Output, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", INNER, "--ignored"])
        .env_remove(REQUIRE)
        .env_remove(REPORT);
    configure(&mut command);
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    (output, stderr)
}

// Protects the reader of "ok": what did not run is printed, although the harness hides what tests
// print.
#[test]
fn a_skip_is_seen() {
    for require in [None, Some(""), Some("0")] {
        let (output, stderr) = run(|command| {
            command.envs(require.map(|value| (REQUIRE, value)));
        });
        assert!(output.status.success());
        assert_eq!(stderr, "SKIPPED: inner needs [\"a kernel\"]\n");
    }
}

// Protects continuous integration from being green without the kernel's evidence.
#[test]
fn a_skip_fails_where_the_kernel_is_required() {
    let (output, _) = run(|command| {
        command.env(REQUIRE, "1");
    });
    assert!(!output.status.success());
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("SKIPPED: inner needs"), "{stdout}");
    assert!(stdout.contains(REQUIRE), "{stdout}");
}

// Protects the list at the end of `make test`: each skip adds a line and removes none.
#[test]
fn skips_are_reported_in_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("skipped");
    for times in 1..=2 {
        let (output, _) = run(|command| {
            command.env(REPORT, &file);
        });
        assert!(output.status.success());
        let report = std::fs::read_to_string(&file).unwrap();
        assert_eq!(report, "inner needs [\"a kernel\"]\n".repeat(times));
    }
}

#[test]
#[ignore = "the tests above run it: only a test harness can show that a skip passes through one"]
fn skips_because_a_kernel_is_missing() {
    assert!(has_all::<&str>("inner", &[]));
    assert!(!has_all("inner", &["a kernel"]));
}
