//! No import circle between the modules of a crate.
//!
//! The graph is that of files: each file of a crate is a module, and has an edge to every module
//! that it names by `crate::`, `super::`, `self::`, a module of its own, or a name that one of
//! these imports again. A module and its ancestors belong together, as the files of a split `impl`
//! do: edges between them do not count. Test code does not count.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names that an import may pass through before it ends in a module.
const REEXPORTS_MAX: usize = 8;

/// A module by its path; the crate's root is empty.
type ModulePath = Vec<String>;

/// A file of a crate.
struct Module {
    file: PathBuf,
    tokens: Vec<Token>,
}

#[derive(Clone, Debug)]
struct Token {
    text: String,
    line: usize,
}

/// A path as a file names it.
#[derive(Clone, Debug)]
struct Named {
    segments: Vec<String>,
    /// What the file calls it, if it is imported.
    alias: Option<String>,
    line: usize,
    /// Modules with a body in this file that surround it.
    inline: usize,
}

/// The modules of a crate.
struct Crate {
    modules: BTreeMap<ModulePath, Module>,
    /// What each file names.
    named: BTreeMap<ModulePath, Vec<Named>>,
}

/// Which line of which file leads to which module.
type Edges = BTreeMap<ModulePath, BTreeMap<ModulePath, usize>>;

#[test]
fn no_crate_has_a_circle_of_modules() {
    let mut circles = String::new();
    for (name, folder) in crates() {
        for circle in Crate::read(&folder.join("src")).circles() {
            circles.push_str(&format!("\n{name}:\n{circle}"));
        }
    }
    assert!(circles.is_empty(), "modules import each other:{circles}");
}

/// Protects the test above from a parser that sees nothing.
#[test]
fn a_circle_is_found_through_every_kind_of_path() {
    let found = |files: &[(&str, &str)]| {
        let folder = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Crate::read(folder.path()).circles().len()
    };
    let root = ("lib.rs", "mod a;\nmod b;\npub use b::Thing;\n");
    let b = ("b.rs", "use crate::a::Other;\npub struct Thing(Other);");
    for (what, a) in [
        ("an import", "use crate::b::Thing;"),
        ("a tree", "use crate::{b::{self, Thing}};"),
        ("super", "use super::b::Thing;"),
        ("a path", "fn f(_: &crate::b::Thing) {}"),
        ("a name that the root imports", "use crate::Thing;"),
        (
            "an inline module",
            "mod inner { use super::super::b::Thing; }",
        ),
    ] {
        assert_eq!(found(&[root, b, ("a.rs", a)]), 1, "{what}");
    }
    for (what, a) in [
        ("a comment", "// use crate::b::Thing;\n/* crate::b */"),
        ("a string", "const A: &str = \"crate::b::Thing\";"),
        ("tests", "#[cfg(test)]\nmod tests { use crate::b::Thing; }"),
        ("one of another crate", "use b2::b::Thing;"),
    ] {
        assert_eq!(found(&[root, b, ("a.rs", a)]), 0, "{what}");
    }
    let parent = ("a.rs", "mod child;\nuse child::C;");
    let child = ("a/child.rs", "use super::A;\nuse crate::a::B;");
    assert_eq!(found(&[root, ("b.rs", ""), parent, child]), 0, "a child");
}

/// Name and folder of every crate of the workspace.
fn crates() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root)
        .output()
        .unwrap();
    assert!(output.status.success());
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| {
            let manifest = Path::new(package["manifest_path"].as_str().unwrap());
            let name = package["name"].as_str().unwrap();
            (name.to_owned(), manifest.parent().unwrap().to_owned())
        })
        .collect()
}

impl Crate {
    fn read(src: &Path) -> Self {
        let mut modules = BTreeMap::new();
        read_folder(src, &mut Vec::new(), &mut modules);
        // A module that its parent has for tests only, and all below it.
        let tests: Vec<ModulePath> = modules
            .iter()
            .flat_map(|(path, module)| {
                let names = test_modules(&module.tokens).into_iter();
                names.map(move |name| joined(path, &name))
            })
            .collect();
        modules.retain(|path, _| !tests.iter().any(|test| path.starts_with(test)));
        let named = modules
            .iter()
            .map(|(path, module)| (path.clone(), named_in(&module.tokens)))
            .collect();
        Self { modules, named }
    }

    /// Each circle: its edges, with the lines that make them.
    fn circles(&self) -> Vec<String> {
        let edges = self.edges();
        let mut done: BTreeSet<&ModulePath> = BTreeSet::new();
        let mut circles = Vec::new();
        let reach: BTreeMap<&ModulePath, BTreeSet<&ModulePath>> = self
            .modules
            .keys()
            .map(|m| (m, reached(m, &edges)))
            .collect();
        for module in self.modules.keys() {
            let members: BTreeSet<&ModulePath> = reach[module]
                .iter()
                .copied()
                .filter(|other| reach[other].contains(module))
                .collect();
            if members.is_empty() || done.contains(module) {
                continue;
            }
            done.extend(&members);
            let mut text = String::new();
            for from in &members {
                for (to, line) in &edges[*from] {
                    if members.contains(to) {
                        let file = self.modules[*from].file.display();
                        text.push_str(&format!("  {file}:{line} -> {}\n", to.join("::")));
                    }
                }
            }
            circles.push(text);
        }
        circles
    }

    fn edges(&self) -> Edges {
        let mut edges = Edges::new();
        for (from, named) in &self.named {
            let out = edges.entry(from.clone()).or_default();
            for one in named {
                let Some(to) = self.resolve(from, one, REEXPORTS_MAX) else {
                    continue;
                };
                let related = to.starts_with(from) || from.starts_with(&to);
                if !related {
                    out.entry(to).or_insert(one.line);
                }
            }
        }
        edges
    }

    /// The module that a path ends in; none if it is of another crate.
    fn resolve(&self, from: &ModulePath, named: &Named, depth: usize) -> Option<ModulePath> {
        let mut segments = named.segments.iter().peekable();
        let mut at = from.clone();
        let mut inline = named.inline;
        match segments.peek()?.as_str() {
            "crate" => {
                segments.next();
                at.clear();
            }
            "self" | "super" => {
                while let Some(word) = segments.next_if(|s| *s == "self" || *s == "super") {
                    match (word.as_str(), inline) {
                        ("self", _) => {}
                        (_, 0) => drop(at.pop()),
                        _ => inline -= 1,
                    }
                }
            }
            first => {
                if !self.modules.contains_key(&joined(&at, first)) {
                    return None;
                }
            }
        }
        while let Some(next) = segments.peek() {
            let below = joined(&at, next);
            if self.modules.contains_key(&below) {
                at = below;
                segments.next();
                continue;
            }
            // Not a module: what it is imported from there, if it is.
            let again = |one: &&Named| one.alias.as_ref() == Some(*next);
            let import = self.named.get(&at).and_then(|all| all.iter().find(again));
            if let Some(import) = import.filter(|_| depth > 0) {
                let mut through = import.clone();
                segments.next();
                through.segments.extend(segments.cloned());
                return self.resolve(&at, &through, depth - 1).or(Some(at));
            }
            break;
        }
        self.modules.contains_key(&at).then_some(at)
    }
}

fn joined(path: &[String], name: &str) -> ModulePath {
    let mut joined = path.to_vec();
    joined.push(name.to_owned());
    joined
}

fn reached<'e>(from: &ModulePath, edges: &'e Edges) -> BTreeSet<&'e ModulePath> {
    let mut reached = BTreeSet::new();
    let mut todo: Vec<&ModulePath> = edges
        .get(from)
        .into_iter()
        .flat_map(|to| to.keys())
        .collect();
    while let Some(next) = todo.pop() {
        if reached.insert(next) {
            todo.extend(edges.get(next).into_iter().flat_map(|to| to.keys()));
        }
    }
    reached
}

fn read_folder(folder: &Path, at: &mut ModulePath, modules: &mut BTreeMap<ModulePath, Module>) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries {
        let file = entry.unwrap().path();
        let stem = file.file_stem().unwrap().to_str().unwrap().to_owned();
        if file.is_dir() {
            // Each program in `bin` is a crate of its own.
            if !(at.is_empty() && stem == "bin") {
                at.push(stem);
                read_folder(&file, at, modules);
                at.pop();
            }
        } else if file.extension().is_some_and(|extension| extension == "rs") {
            let is_root = at.is_empty() && (stem == "lib" || stem == "main");
            let path = match stem.as_str() {
                _ if is_root => Vec::new(),
                "mod" => at.clone(),
                stem => joined(at, stem),
            };
            let tokens = tokens(&std::fs::read_to_string(&file).unwrap());
            // A crate with a library and a program: the program's own paths begin anew.
            modules.entry(path).or_insert(Module { file, tokens });
        }
    }
}

/// Words and signs, without comments, strings and characters.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let mut tokens: Vec<Token> = Vec::new();
    let (mut at, mut line) = (0, 1);
    let peek = |at: usize| chars.get(at).copied().unwrap_or('\0');
    while at < chars.len() {
        let start = at;
        match chars[at] {
            '/' if peek(at + 1) == '/' => {
                while at < chars.len() && chars[at] != '\n' {
                    at += 1;
                }
            }
            '/' if peek(at + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (peek(at), peek(at + 1)) {
                        ('/', '*') => (depth, at) = (depth + 1, at + 2),
                        ('*', '/') => (depth, at) = (depth - 1, at + 2),
                        _ => at += 1,
                    }
                    if depth == 0 || at >= chars.len() {
                        break;
                    }
                }
            }
            'r' if is_raw_string(&chars, at) => {
                let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
                at += hashes + 2;
                let ends =
                    |at: usize| peek(at) == '"' && (1..=hashes).all(|hash| peek(at + hash) == '#');
                while at < chars.len() && !ends(at) {
                    at += 1;
                }
                at += hashes + 1;
            }
            '"' => {
                at += 1;
                while at < chars.len() && chars[at] != '"' {
                    at += if chars[at] == '\\' { 2 } else { 1 };
                }
                at += 1;
            }
            // A character, not a lifetime.
            '\'' if peek(at + 1) == '\\' || peek(at + 2) == '\'' => {
                at += if peek(at + 1) == '\\' { 3 } else { 2 };
                while at < chars.len() && chars[at] != '\'' {
                    at += 1;
                }
                at += 1;
            }
            ':' if peek(at + 1) == ':' => {
                tokens.push(token("::", line));
                at += 2;
            }
            c if c.is_alphanumeric() || c == '_' => {
                while peek(at).is_alphanumeric() || peek(at) == '_' {
                    at += 1;
                }
                let word: String = chars[start..at].iter().collect();
                tokens.push(token(&word, line));
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push(token(&c.to_string(), line));
                }
                at += 1;
            }
        }
        let end = at.min(chars.len());
        line += chars[start..end].iter().filter(|c| **c == '\n').count();
    }
    without_tests(tokens)
}

fn is_raw_string(chars: &[char], at: usize) -> bool {
    let in_word = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    let in_word = in_word && chars[at - 1] != 'b';
    let after = chars[at + 1..].iter().find(|c| **c != '#');
    !in_word && after == Some(&'"')
}

fn token(text: &str, line: usize) -> Token {
    Token {
        text: text.to_owned(),
        line,
    }
}

const CFG_TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];

/// Without the bodies of modules, functions and imports that are for tests only. A module without a
/// body stays: its file is left out by its name.
fn without_tests(tokens: Vec<Token>) -> Vec<Token> {
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !matches(&tokens[at..], &CFG_TEST) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        let item = at + CFG_TEST.len();
        let end = end_of_item(&tokens, item);
        let is_file =
            tokens[item..end].iter().any(|t| t.text == "mod") && tokens[end - 1].text == ";";
        if is_file {
            kept.extend_from_slice(&tokens[at..end]);
        }
        at = end;
    }
    kept
}

/// Behind the semicolon or the braces that end an item.
fn end_of_item(tokens: &[Token], start: usize) -> usize {
    let is_import = tokens[start..]
        .iter()
        .take_while(|t| t.text != ";" && t.text != "{")
        .any(|t| t.text == "use");
    let mut depth = 0;
    for (index, token) in tokens.iter().enumerate().skip(start) {
        match token.text.as_str() {
            "{" | "[" | "(" => depth += 1,
            "}" | "]" | ")" => {
                depth -= 1;
                if depth == 0 && token.text == "}" && !is_import {
                    return index + 1;
                }
            }
            ";" | "," if depth == 0 => return index + 1,
            _ => {}
        }
    }
    tokens.len()
}

fn matches(tokens: &[Token], words: &[&str]) -> bool {
    let texts = tokens.iter().map(|token| token.text.as_str());
    tokens.len() >= words.len() && texts.zip(words).all(|(text, word)| text == *word)
}

/// Names of the modules whose files are for tests only.
fn test_modules(tokens: &[Token]) -> Vec<String> {
    let starts = (0..tokens.len()).filter(|at| matches(&tokens[*at..], &CFG_TEST));
    starts
        .filter_map(|at| {
            let end = end_of_item(tokens, at + CFG_TEST.len());
            let item = &tokens[at..end];
            let module = item.iter().position(|token| token.text == "mod")?;
            Some(item.get(module + 1)?.text.clone())
        })
        .collect()
}

/// All paths that a file names.
fn named_in(tokens: &[Token]) -> Vec<Named> {
    let mut named = Vec::new();
    // At which depth of braces each module with a body began.
    let (mut depth, mut inline) = (0usize, Vec::new());
    let mut at = 0;
    while at < tokens.len() {
        let text = tokens[at].text.as_str();
        let next = tokens.get(at + 1).map_or("", |token| token.text.as_str());
        let after_path = at > 0 && tokens[at - 1].text == "::";
        match text {
            "{" => depth += 1,
            "}" => {
                depth = depth.saturating_sub(1);
                inline.pop_if(|began: &mut usize| *began == depth);
            }
            "mod" if tokens.get(at + 2).is_some_and(|token| token.text == "{") => {
                inline.push(depth);
            }
            "use" => {
                let mut tree = Tree {
                    tokens,
                    at: at + 1,
                    inline: inline.len(),
                    named: &mut named,
                };
                tree.read(&[]);
                at = tree.at;
                continue;
            }
            _ if next == "::" && !after_path && is_word(text) => {
                let line = tokens[at].line;
                let mut segments = vec![text.to_owned()];
                while matches(&tokens[at + 1..], &["::"])
                    && tokens.get(at + 2).is_some_and(|token| is_word(&token.text))
                {
                    segments.push(tokens[at + 2].text.clone());
                    at += 2;
                }
                named.push(Named {
                    segments,
                    alias: None,
                    line,
                    inline: inline.len(),
                });
            }
            _ => {}
        }
        at += 1;
    }
    named
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Reads what follows `use`.
struct Tree<'t> {
    tokens: &'t [Token],
    at: usize,
    inline: usize,
    named: &'t mut Vec<Named>,
}

impl Tree<'_> {
    fn text(&self) -> &str {
        self.tokens.get(self.at).map_or(";", |token| &token.text)
    }

    fn read(&mut self, above: &[String]) {
        let mut path = above.to_vec();
        let line = self.tokens.get(self.at).map_or(0, |token| token.line);
        loop {
            match self.text() {
                "::" => self.at += 1,
                "{" => {
                    self.at += 1;
                    while self.text() != "}" && self.text() != ";" {
                        self.read(&path);
                        if self.text() == "," {
                            self.at += 1;
                        }
                    }
                    self.at += 1;
                    return;
                }
                "*" => {
                    self.at += 1;
                    return self.add(path, None, line);
                }
                word if is_word(word) => {
                    // `self` at the end of a tree is what stands before it.
                    if word != "self" || path.is_empty() {
                        path.push(word.to_owned());
                    }
                    self.at += 1;
                    if self.text() == "as" {
                        let alias = self.tokens[self.at + 1].text.clone();
                        self.at += 2;
                        return self.add(path, Some(alias), line);
                    }
                    if self.text() != "::" {
                        let alias = path.last().cloned();
                        return self.add(path, alias, line);
                    }
                }
                _ => {
                    self.at += 1;
                    return;
                }
            }
        }
    }

    fn add(&mut self, segments: Vec<String>, alias: Option<String>, line: usize) {
        self.named.push(Named {
            segments,
            alias,
            line,
            inline: self.inline,
        });
    }
}
