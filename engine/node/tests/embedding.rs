//! The examples of docs/embedding.md and docs/services.md: they run, and the pages show them whole.
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

/// A page and the example that it is built around.
struct Shown {
    page: &'static str,
    example: &'static str,
    lines_max: usize,
}

const TWO_NODES: Shown = Shown {
    page: "docs/embedding.md",
    example: "two_nodes",
    lines_max: 60,
};
const OWN_SERVICE: Shown = Shown {
    page: "docs/services.md",
    example: "own_service",
    lines_max: 120,
};

/// An example, built from the sources of now. With the features of `make test`, which has built all
/// that it depends on already.
fn build(example: &str) -> PathBuf {
    let build = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--example", example])
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

/// Runs an example to its end; what it prints is what its page says.
fn prints(shown: &Shown, expected: &str) {
    let output = Command::new(build(shown.example))
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    let page = read(shown.page);
    assert_eq!(blocks(&page, "text"), [expected], "{}", shown.page);
}

#[test]
fn each_page_shows_its_example_whole_and_in_its_order() {
    for shown in [TWO_NODES, OWN_SERVICE] {
        let path = format!("engine/node/examples/{}.rs", shown.example);
        let example = read(&path);
        assert!(example.lines().count() <= shown.lines_max, "{path}");
        let blocks = blocks(&read(shown.page), "rust").join("\n");
        assert_eq!(blocks, example, "{}, {path}", shown.page);
    }
}

#[test]
fn two_nodes_prints_the_answer_and_the_hash_and_ends() {
    let hash = ring::digest::digest(&ring::digest::SHA256, &vec![7; 8 << 20]);
    let hash: String = hash.as_ref().iter().map(|b| format!("{b:02x}")).collect();
    prints(&TWO_NODES, &format!("answer: hello, alice\nhash: {hash}\n"));
}

#[test]
fn own_service_prints_the_sum_and_hears_the_cancellation_and_ends() {
    prints(
        &OWN_SERVICE,
        "sum: 3145728 in 3 chunks\nrequest: asked\nrequest: taken back\n",
    );
}
