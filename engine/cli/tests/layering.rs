//! Dependencies point down, and pure crates stay pure. Reads `cargo metadata` and the crates'
//! sources.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Helpers for tests: every crate may depend on it, for its tests only.
const TESTKIT: &str = "millrace-testkit";

/// Our crates, and for each the ones of ours that it may depend on.
const EDGES: &[(&str, &[&str])] = &[
    ("millrace-protocol", &[]),
    ("millrace-tuning", &["millrace-protocol"]),
    (TESTKIT, &["millrace-protocol"]),
    (
        "millrace-fuzz",
        &[
            "millrace-edge-policy",
            "millrace-node",
            "millrace-protocol",
            "millrace-registry",
            "millrace-shards",
            "millrace-transport",
        ],
    ),
    (
        "millrace-sim",
        &["millrace-protocol", "millrace-shards", "millrace-transport"],
    ),
    ("millrace-shards", &[]),
    ("millrace-edge-policy", &[]),
    ("millrace-edge", &["millrace-edge-policy"]),
    (
        "millrace-edge-control",
        &[
            "millrace-edge",
            "millrace-edge-policy",
            "millrace-protocol",
            "millrace-tuning",
        ],
    ),
    (
        "millrace-transport",
        &[
            "millrace-edge-policy",
            "millrace-protocol",
            "millrace-shards",
        ],
    ),
    (
        "millrace-registry",
        &["millrace-protocol", "millrace-transport"],
    ),
    (
        "millrace-node",
        &[
            "millrace-edge",
            "millrace-edge-control",
            "millrace-edge-policy",
            "millrace-protocol",
            "millrace-registry",
            "millrace-shards",
            "millrace-transport",
            "millrace-tuning",
        ],
    ),
    (
        "millrace",
        &[
            "millrace-edge",
            "millrace-edge-control",
            "millrace-edge-policy",
            "millrace-node",
            "millrace-protocol",
            "millrace-registry",
            "millrace-shards",
            "millrace-transport",
            "millrace-tuning",
        ],
    ),
    (
        "millrace-perf",
        &[
            "millrace-edge-policy",
            "millrace-protocol",
            "millrace-shards",
            "millrace-transport",
        ],
    ),
    (
        "millrace-bench-edge",
        &[
            "millrace-edge",
            "millrace-edge-policy",
            "millrace-perf",
            "millrace-protocol",
            "millrace-shards",
            "millrace-transport",
        ],
    ),
    (
        "millrace-peers",
        &[
            "millrace-edge-policy",
            "millrace-perf",
            "millrace-protocol",
            "millrace-shards",
            "millrace-transport",
        ],
    ),
];

/// Edges that tests alone may have.
const TEST_EDGES: &[(&str, &str)] = &[
    ("millrace-node", "millrace-sim"),
    ("millrace-sim", "millrace-registry"),
];

/// The one crate that ends the process, prints, and reads the command line.
const CLI: &str = "millrace";

/// What the libraries of a node must not name: an embedder's program does this itself.
const OF_THE_CLI: &[(&str, &str)] = &[
    ("process::exit", "the end of the process"),
    ("ExitCode", "an exit code"),
    ("clap", "the command line"),
    ("println!", "printing"),
    ("eprintln!", "printing"),
    ("stdout()", "printing"),
    ("stderr()", "printing"),
];

/// The libraries of a node.
const LIBRARIES: &[&str] = &[
    "millrace-edge-control",
    "millrace-node",
    "millrace-protocol",
    "millrace-registry",
    "millrace-shards",
    "millrace-transport",
    "millrace-tuning",
];

/// Crates that decide and do not act.
const PURE: &[&str] = &[
    "millrace-protocol",
    "millrace-sim",
    "millrace-tuning",
    "millrace-edge-policy",
];

/// Runtimes and peers that the default members must not pull in.
const FOREIGN: &[&str] = &["tokio", "quinn", "quinn-proto", "s2n-quic", "s2n-quic-core"];

/// Edges to them that are no runtime: hyper's client takes tokio's channels, without `rt` or `net`.
const HARMLESS: &[(&str, &str)] = &[("hyper", "tokio")];

/// What a pure crate must not name, outside its tests.
const IMPURE: &[(&str, &str)] = &[
    ("std::fs", "files"),
    ("std::net::Udp", "sockets"),
    ("std::net::Tcp", "sockets"),
    ("std::os::", "the system"),
    ("std::thread", "threads"),
    ("std::env", "the environment"),
    ("Instant::now", "a clock"),
    ("SystemTime::now", "a clock"),
    ("HashMap", "an order that a hasher chooses"),
    ("HashSet", "an order that a hasher chooses"),
    ("RandomState", "an order that a hasher chooses"),
    ("unsafe {", "unsafe code"),
    ("unsafe fn", "unsafe code"),
    ("unsafe impl", "unsafe code"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn metadata(resolved: bool) -> Value {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["metadata", "--format-version", "1"])
        .current_dir(root());
    if !resolved {
        cargo.arg("--no-deps");
    }
    let output = cargo.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

fn names<'v>(list: &'v Value, key: &str) -> Vec<&'v str> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|item| item[key].as_str().unwrap())
        .collect()
}

/// The map of docs/ARCHITECTURE.md is the map of the manifests, dev-dependencies included.
#[test]
fn dependencies_point_down() {
    let allowed: BTreeMap<_, _> = EDGES.iter().copied().collect();
    let metadata = metadata(false);
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let may = allowed
            .get(name)
            .unwrap_or_else(|| panic!("{name} has no row in EDGES"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let (to, kind) = (dependency["name"].as_str().unwrap(), &dependency["kind"]);
            let for_tests = to == TESTKIT || TEST_EDGES.contains(&(name, to));
            let fine = if for_tests {
                kind == "dev"
            } else {
                !to.starts_with("millrace") || may.contains(&to)
            };
            assert!(fine, "{name} must not depend on {to} (kind {kind})");
        }
    }
}

/// Nothing that ships, and nothing the demo has to wait for, brings tokio or a peer.
#[test]
fn default_members_bring_no_foreign_runtime() {
    let metadata = metadata(true);
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    // Build scripts and tests of others do not count; what is linked does.
    let links: BTreeMap<&str, Vec<&str>> = nodes
        .iter()
        .map(|node| {
            let normal = node["deps"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|dependency| {
                    dependency["dep_kinds"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .any(|kind| kind["kind"].is_null())
                });
            (
                node["id"].as_str().unwrap(),
                normal
                    .map(|dependency| dependency["pkg"].as_str().unwrap())
                    .collect(),
            )
        })
        .collect();
    let name_of: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            (
                package["id"].as_str().unwrap(),
                package["name"].as_str().unwrap(),
            )
        })
        .collect();
    let mut todo: Vec<&str> = metadata["workspace_default_members"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_str().unwrap())
        .collect();
    assert!(!todo.is_empty());
    let mut seen = BTreeSet::new();
    while let Some(id) = todo.pop() {
        if !seen.insert(id) {
            continue;
        }
        for next in &links[id] {
            let edge = (name_of[id], name_of[next]);
            if HARMLESS.contains(&edge) {
                continue;
            }
            assert!(!FOREIGN.contains(&edge.1), "{} brings {}", edge.0, edge.1);
            todo.push(next);
        }
    }
}

/// Every direct dependency has its line in docs/dependencies.md, and no line is left of one that is
/// gone.
#[test]
fn every_dependency_is_accounted_for() {
    let metadata = metadata(false);
    let mut used = BTreeSet::new();
    for package in metadata["packages"].as_array().unwrap() {
        used.extend(names(&package["dependencies"], "name"));
    }
    used.retain(|name| !name.starts_with("millrace"));
    let page = std::fs::read_to_string(root().join("docs/dependencies.md")).unwrap();
    let listed: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split_once(" |"))
        .flat_map(|(names, _)| names.split(", "))
        .filter(|name| *name != "crate")
        .collect();
    assert_eq!(used, listed, "in the manifests, in docs/dependencies.md");
}

/// A pure crate names no file, socket, thread, clock or hasher, and has no unsafe code.
#[test]
fn pure_crates_only_decide() {
    let found = lines_with(|name| PURE.contains(&name), IMPURE);
    assert!(found.is_empty(), "pure crates must not use:\n{found}");
}

/// A library reports errors by whose fault they are; the binary makes exit codes of them.
#[test]
fn only_the_binary_knows_exit_codes() {
    let is_word = |line: &str, at: usize| {
        let is_part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let (before, after) = (&line[..at], &line[at + "Exit".len()..]);
        !is_part(before.chars().next_back()) && !is_part(after.chars().next())
    };
    let mut named = String::new();
    for (file, number, line) in shipped_lines(|name| name != CLI) {
        let mut places = line.match_indices("Exit").map(|(at, _)| at);
        if places.any(|at| is_word(&line, at)) {
            named.push_str(&format!("{}:{number}: {}\n", file.display(), line.trim()));
        }
    }
    assert!(named.is_empty(), "only {CLI} may name Exit:\n{named}");
    let found = lines_with(|name| LIBRARIES.contains(&name), OF_THE_CLI);
    assert!(found.is_empty(), "libraries must not use:\n{found}");
}

/// The shipped lines of some crates that have one of these words in them.
fn lines_with(of: impl Fn(&str) -> bool, words: &[(&str, &str)]) -> String {
    let mut found = String::new();
    for (file, number, line) in shipped_lines(of) {
        for (_, what) in words.iter().filter(|(word, _)| line.contains(word)) {
            let file = file.display();
            found.push_str(&format!("{file}:{number}: {what}: {}\n", line.trim()));
        }
    }
    found
}

/// File, number and text of each shipped line of the crates whose names are of interest.
fn shipped_lines(of: impl Fn(&str) -> bool) -> Vec<(PathBuf, usize, String)> {
    let metadata = metadata(false);
    let packages = metadata["packages"].as_array().unwrap().iter();
    let mut lines = Vec::new();
    for package in packages.filter(|package| of(package["name"].as_str().unwrap())) {
        let manifest = Path::new(package["manifest_path"].as_str().unwrap());
        let mut files = Vec::new();
        sources(&manifest.parent().unwrap().join("src"), &mut files);
        assert!(!files.is_empty(), "{package}");
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            let shipped = shipped(&text);
            lines.extend(shipped.map(|(number, line)| (file.clone(), number, line.to_owned())));
        }
    }
    lines
}

fn sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "tests") {
                sources(&path, files);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && path.file_stem().is_some_and(|stem| stem != "tests")
        {
            files.push(path);
        }
    }
}

/// The numbered lines that are neither comments nor of an item that is for tests only. rustfmt puts
/// such an item's attribute, and the brace that ends its body, at the start of a line.
fn shipped(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_tests = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        if in_tests {
            let is_item_without_body = line.ends_with(';') && !line.starts_with(' ');
            in_tests = !is_item_without_body && line != "}";
            return None;
        }
        in_tests = line.starts_with("#[cfg(test)]");
        let is_comment = line.trim_start().starts_with("//");
        (!in_tests && !is_comment).then_some((index + 1, line))
    })
}

/// Protects the checks above: an item for tests hides itself, and nothing below it.
#[test]
fn what_stands_below_tests_is_shipped() {
    let text = "\
use a;
#[cfg(test)]
mod tests;
#[cfg(test)]
use b::{c, d};
// a comment
use e;
#[cfg(test)]
mod more {
    fn f() {
        g();
    }
}
fn h() {}
";
    let shipped: Vec<_> = shipped(text).collect();
    assert_eq!(shipped, [(1, "use a;"), (7, "use e;"), (14, "fn h() {}")]);
}
