//! The rules of published sets in words, in files beside the state: the kernel knows only their numbers.
//!
//! 1. They are written before the set is published: whoever reads its number from the kernel finds its rules.
//! 2. A set on probation may give way to the one before it, so the last two are kept.
//! 3. Files bear the name of the pins: edges beside each other do not meet.

use std::fs;
use std::path::PathBuf;

use millrace_edge::pins::Pins;
use millrace_edge::state;
use millrace_edge_policy::rules::Compiled;
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};

/// What follows the name of the pins; then the number of the set.
const FILE: &str = "set-";

/// One rule of a set, at its index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RuleText {
    /// What it says.
    pub(crate) rule: String,
    /// Who says it.
    pub(crate) origin: String,
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
    let text = serde_json::to_vec(&texts)
        .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    let path = path(pins, set);
    state::replace(&path, &text).map_err(|error| Failure::io(path.display(), &error))?;
    remove_but(pins, &[path, self::path(pins, in_force)]);
    Ok(())
}

/// The rules of a set; none if nobody wrote them down.
pub(crate) fn read(pins: &Pins, set: u32) -> Option<Vec<RuleText>> {
    let text = fs::read(path(pins, set)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Removes what [`write`] left.
pub(crate) fn remove(pins: &Pins) {
    remove_but(pins, &[]);
}

fn remove_but(pins: &Pins, kept: &[PathBuf]) {
    let state = pins.state_path();
    let (Some(folder), Some(name)) = (state.parent(), state.file_stem()) else {
        return;
    };
    let begin = format!("{}.{FILE}", name.to_string_lossy());
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_set = entry.file_name().to_string_lossy().starts_with(&begin);
        if is_set && !kept.contains(&entry.path()) {
            // A file too many harms nobody.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn path(pins: &Pins, set: u32) -> PathBuf {
    pins.state_path()
        .with_extension(format!("{FILE}{set}.json"))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use millrace_edge_policy::rules::{Bounds, Rule, compile};
    use millrace_edge_policy::settings::Settings;

    use super::*;

    fn allowing(address: &str) -> Compiled {
        let address: IpAddr = address.parse().unwrap();
        let bounds = Bounds {
            rules_max: 1,
            nodes4_max: 100,
            nodes6_max: 100,
        };
        compile(&Settings::default(), &[Rule::members([address])], bounds).unwrap()
    }

    // Protects `rules` and `trace`: two edges on one machine number their sets alike.
    #[test]
    fn edges_beside_each_other_keep_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let [one, two] = ["edge", "edge-2"].map(|name| Pins::at(folder.path().join(name)));
        write(&one, 1, 1, &allowing("192.0.2.1")).unwrap();
        write(&two, 1, 1, &allowing("192.0.2.2")).unwrap();
        assert_ne!(read(&one, 1).unwrap(), read(&two, 1).unwrap());
        write(&one, 2, 1, &allowing("192.0.2.3")).unwrap();
        write(&one, 3, 2, &allowing("192.0.2.4")).unwrap();
        assert_eq!(read(&one, 1), None);
        assert!(read(&one, 2).is_some() && read(&one, 3).is_some());
        remove(&one);
        assert_eq!((read(&one, 2), read(&one, 3)), (None, None));
        assert!(read(&two, 1).is_some());
    }
}
