//! Tests that cannot run on this host: one rule for all crates.
//!
//! 1. A skip is printed past the test harness, which hides what a passing test prints.
//! 2. A skip is added to the file that [`REPORT`] names, so that `make test` can list all skips.
//! 3. Where [`REQUIRE`] is set, as in continuous integration and as root, a skip is a failure.

use std::{
    env,
    fmt::{Debug, Display},
    fs::OpenOptions,
    io::{Write as _, stderr},
};

/// Environment variable: with the value 1, every test that would be skipped fails.
pub const REQUIRE: &str = "MILLRACE_REQUIRE_KERNEL";

/// Environment variable: a file to which each skip adds one line, `test needs requirement`.
pub const REPORT: &str = "MILLRACE_SKIPPED_TESTS";

/// Says that a test, or a part of it, does not run on this host, and what it needs.
///
/// # Panics
/// With [`REQUIRE`], and when the file of [`REPORT`] cannot be written.
#[track_caller]
pub fn skip(test: &str, needs: impl Display) {
    let line = format!("{test} needs {needs}");
    let required = env::var_os(REQUIRE).is_some_and(|value| value == "1");
    assert!(!required, "SKIPPED: {line}, and {REQUIRE} is 1");
    // In one write each: tests run side by side.
    let _ = stderr().write_all(format!("SKIPPED: {line}\n").as_bytes());
    if let Some(path) = env::var_os(REPORT) {
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

/// Whether nothing is missing; skips otherwise.
///
/// # Panics
/// As [`skip`] does.
#[track_caller]
pub fn has_all<T: Debug>(test: &str, missing: &[T]) -> bool {
    if !missing.is_empty() {
        skip(test, format_args!("{missing:?}"));
    }
    missing.is_empty()
}
