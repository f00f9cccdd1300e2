//! Tests that cannot run here. Other crates include this file, so that there is one rule for all.
//!
//! 1. A skip is told past the test harness, which shows nothing of what a test that passes prints.
//! 2. Where the kernel's evidence is wanted, as in continuous integration, a skip is a failure.
#![allow(dead_code, unreachable_pub, reason = "each test takes what it needs")]

use std::fmt::Display;
use std::io::{Write as _, stderr};

/// With the value 1, every test that would be skipped fails.
pub const REQUIRE: &str = "MILLRACE_REQUIRE_KERNEL";

/// Says that a test, or a part of it, does not run here, and what it takes to.
///
/// # Panics
/// With [`REQUIRE`].
pub fn skip(test: &str, needs: impl Display) {
    let said = format!("SKIPPED: {test} needs {needs}");
    let required = std::env::var_os(REQUIRE).is_some_and(|value| value == "1");
    assert!(!required, "{said}, and {REQUIRE} is 1");
    // In one write: tests run side by side.
    let _ = stderr().write_all(format!("{said}\n").as_bytes());
}

/// Whether nothing is missing; skips otherwise.
pub fn has_all<T: std::fmt::Debug>(test: &str, missing: &[T]) -> bool {
    if !missing.is_empty() {
        skip(test, format_args!("{missing:?}"));
    }
    missing.is_empty()
}
