//! The rules of published sets in words, in files beside the state: the kernel knows only their numbers.
//!
//! A set on probation may give way to the one before it, so the last two are kept.

use std::fs;

use millrace_edge::pins::Pins;
use millrace_edge_policy::rules::Compiled;
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};

/// One rule of a set, at its index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RuleText {
    /// What it says.
    pub(crate) rule: String,
    /// Who says it.
    pub(crate) origin: String,
}

fn name(set: u32) -> String {
    format!("set-{set}.json")
}

/// Keeps the rules of a set, and those of the set in force; forgets the others.
pub(crate) fn write(
    pins: &Pins,
    set: u32,
    in_force: u32,
    compiled: &Compiled,
) -> Result<(), Failure> {
    let texts: Vec<_> = compiled
        .rules
        .iter()
        .map(|line| RuleText {
            rule: line.rule.to_string(),
            origin: line.rule.provenance.to_string(),
        })
        .collect();
    let folder = folder(pins);
    let text = serde_json::to_vec(&texts)
        .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    let path = folder.join(name(set));
    fs::write(&path, text).map_err(|error| Failure::io(path.display(), &error))?;
    let kept = [name(set), name(in_force)];
    for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        if file.starts_with("set-") && file.ends_with(".json") && !kept.contains(&file) {
            // A file too many harms nobody.
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// The rules of a set; none if nobody wrote them down.
pub(crate) fn read(pins: &Pins, set: u32) -> Option<Vec<RuleText>> {
    let text = fs::read(folder(pins).join(name(set))).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Removes what [`write`] left.
pub(crate) fn remove(pins: &Pins) {
    for entry in fs::read_dir(folder(pins)).into_iter().flatten().flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        if file.starts_with("set-") && file.ends_with(".json") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn folder(pins: &Pins) -> std::path::PathBuf {
    pins.state_path()
        .parent()
        .map_or_else(|| pins.root().to_owned(), std::path::Path::to_owned)
}
