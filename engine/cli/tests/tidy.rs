//! Comments and pages keep the house style: at most 100 columns, and no word that makes a sentence
//! vague.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::fs;
use std::path::{Path, PathBuf};

/// Columns of a comment, and of a line of a page; a tab counts as eight.
const COLUMNS: usize = 100;

/// Words and phrases that hide the actor of a sentence, or stand before its subject.
const VAGUE: &[&str] = &["whoever", "somebody", "nobody", "of what", "by what"];

/// Folders with sources and pages; the root's own pages are read besides.
const FOLDERS: &[&str] = &["docs", "ebpf", "engine", "perf", "shards", "tuning"];

/// One line of a comment or a page.
struct Line<'t> {
    text: &'t str,
    /// May be as long as it must be: a row of a table, a line of a program.
    unbroken: bool,
}

/// The comment lines of a source, or the lines of a page.
fn lines<'t>(path: &Path, text: &'t str) -> Vec<(usize, Line<'t>)> {
    let is_page = path.extension().is_some_and(|extension| extension == "md");
    let mut fenced = false;
    let mut found = Vec::new();
    for (index, text) in text.lines().enumerate() {
        let trimmed = text.trim_start();
        let is_comment = ["//", "/*", "* "]
            .iter()
            .any(|start| trimmed.starts_with(start));
        if !is_page && !is_comment {
            continue;
        }
        let prose = trimmed.trim_start_matches(['/', '!', ' ']);
        let fence = prose.starts_with("```");
        fenced ^= fence;
        let unbroken = prose.starts_with('|') || (is_page && (fenced || fence));
        found.push((index + 1, Line { text, unbroken }));
    }
    found
}

fn columns(line: &str) -> usize {
    line.chars().map(|c| if c == '\t' { 8 } else { 1 }).sum()
}

/// The vague word that a line has, as a word of its own; code in backticks has none.
fn vague(line: &str) -> Option<&'static str> {
    let prose: Vec<&str> = line.split('`').step_by(2).collect();
    let line = prose.join("`").to_lowercase();
    let is_word = |at: usize, word: &str| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        [before, after]
            .iter()
            .all(|c| c.is_none_or(|c| !c.is_alphanumeric() && c != '_'))
    };
    VAGUE.iter().copied().find(|word| {
        let mut places = line.match_indices(word);
        places.any(|(at, _)| is_word(at, word))
    })
}

/// What is wrong in a file, one finding for each line.
fn findings(path: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in lines(path, text) {
        let place = format!("{}:{number}", path.display());
        if !line.unbroken && columns(line.text) > COLUMNS {
            found.push(format!("{place}: {} columns", columns(line.text)));
        }
        if let Some(word) = vague(line.text) {
            found.push(format!("{place}: \"{word}\": {}", line.text.trim()));
        }
    }
    found
}

fn files(folder: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            // Neither what is built nor what a bench writes.
            if !name.starts_with('.') && name != "target" && name != "out" {
                files(&path, all);
            }
        } else if path
            .extension()
            .is_some_and(|extension| ["rs", "c", "h", "md"].iter().any(|kind| extension == *kind))
        {
            all.push(path);
        }
    }
}

#[test]
fn comments_and_pages_keep_the_house_style() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut all = Vec::new();
    for folder in FOLDERS {
        files(&root.join(folder), &mut all);
    }
    for entry in fs::read_dir(&root).unwrap() {
        let path = entry.unwrap().path();
        all.extend(path.extension().is_some_and(|e| e == "md").then_some(path));
    }
    // This file names the words.
    all.retain(|path| !path.ends_with("cli/tests/tidy.rs"));
    assert!(all.len() > 300, "the walk found {} files", all.len());
    let mut found = Vec::new();
    for path in &all {
        let text = fs::read_to_string(path).unwrap();
        found.extend(findings(path.strip_prefix(&root).unwrap(), &text));
    }
    assert!(
        found.is_empty(),
        "{} lines:\n{}",
        found.len(),
        found.join("\n")
    );
}

// Protects the test above from a walk that sees nothing wrong.
#[test]
fn what_is_wrong_is_found() {
    let long = format!("    // {}", "x".repeat(100));
    let cases = [
        ("a.rs", "// Whoever dials.", 1),
        ("a.rs", "let whoever = 1;", 0),
        ("a.rs", "// The nobodyness of it.", 0),
        ("a.c", "\t * The sum of what came, by what road.", 1),
        ("a.c", &format!("\t\t/* {}", "x".repeat(82)), 1),
        ("a.rs", "// The user `nobody` and nobody else.", 1),
        ("a.rs", "// The user `nobody`.", 0),
        ("a.rs", &long, 1),
        ("a.rs", &long.replacen("//", "  ", 1), 0),
        ("a.md", &"word ".repeat(21), 1),
        ("a.md", &format!("| {} |", "x".repeat(120)), 0),
        ("a.md", &format!("```sh\n{}\n```\n", "x".repeat(120)), 0),
        ("a.md", "Nobody knows.", 1),
    ];
    for (path, text, wrong) in cases {
        let found = findings(Path::new(path), text);
        assert_eq!(found.len(), wrong, "{path}: {text}: {found:?}");
    }
}
