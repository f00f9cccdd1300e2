//! Generated pages must equal what is committed; `MILLRACE_BLESS=1` (`make docs`) writes them
//! instead.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::path::Path;

/// Compares a page of the tree with what it should be.
///
/// # Panics
/// If the page is another one.
pub fn is_fresh(page: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(page);
    if std::env::var_os("MILLRACE_BLESS").is_some() {
        let folder = path.parent().expect("a page lies in a folder");
        std::fs::create_dir_all(folder).expect("the page's folder can be made");
        std::fs::write(&path, expected).expect("the page can be written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "{page} is stale: run `make docs` and commit it"
    );
}
