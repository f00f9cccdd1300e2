//! The example of docs/embedding.md: it runs, and the page shows it whole.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn read(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::fs::read_to_string(root.join(path)).unwrap()
}

/// The blocks of the page that begin with ```` ```LANGUAGE ````, without their fences.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    let after = page.split(&fence).skip(1);
    after
        .map(|rest| rest.split("```").next().unwrap().to_owned())
        .collect()
}

/// The example, built from the sources of now. With the features of `make test`, which has built
/// all that it depends on already.
fn two_nodes() -> PathBuf {
    let build = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--example", "two_nodes"])
        .args(["--workspace", "--exclude", "millrace-peers"])
        .args(["--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(build.status.success());
    let messages = String::from_utf8(build.stdout).unwrap();
    let mut executables = messages.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).unwrap();
        Some(PathBuf::from(message["executable"].as_str()?))
    });
    executables.next_back().unwrap()
}

#[test]
fn the_page_shows_the_example_whole_and_in_its_order() {
    let example = read("engine/node/examples/two_nodes.rs");
    assert!(example.lines().count() <= 60);
    let shown = blocks(&read("docs/embedding.md"), "rust").join("\n");
    assert_eq!(shown, example, "docs/embedding.md, engine/node/examples");
}

#[test]
fn the_example_prints_the_answer_and_the_hash_and_ends() {
    let hash = ring::digest::digest(&ring::digest::SHA256, &vec![7; 8 << 20]);
    let hash: String = hash.as_ref().iter().map(|b| format!("{b:02x}")).collect();
    let expected = format!("answer: hello, alice\nhash: {hash}\n");
    let output = Command::new(two_nodes())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    let page = read("docs/embedding.md");
    assert_eq!(blocks(&page, "text"), [expected], "docs/embedding.md");
}
