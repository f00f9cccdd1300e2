//! What published sets were made from, and their rules in words, in files beside the state: the kernel knows only numbers.
//!
//! 1. They are written before the set is published: whoever reads its number from the kernel finds its rules.
//! 2. A set on probation may give way to the one before it, so the last two are kept.
//! 3. So the rules of the set in force are at hand, whatever the registry says now: see [`Origin`].
//! 4. Files bear the name of the pins: edges beside each other do not meet.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use millrace_edge::pins::Pins;
use millrace_edge::state;
use millrace_edge_policy::rules::{Compiled, Locality, Temporary};
use millrace_tuning::NodeConfig;
use serde::{Deserialize, Serialize};

use super::applied::Applied;
use super::plan::Firewall;
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

/// What a set was made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// Public key of the registry: versions of another one are not to be compared.
    pub(crate) registry: String,
    /// 0: there was none.
    pub(crate) version: u64,
    /// Text of the node's ID.
    node: String,
    subnet: Option<String>,
    members: Vec<IpAddr>,
    pub(crate) applied: Applied,
    temporary: Vec<Temporary>,
    /// The version's `[[firewall]]` tables.
    pub(crate) tables: Vec<toml::Table>,
}

impl Origin {
    /// With the temporary rules that have not ended.
    pub(crate) fn of(
        firewall: &Firewall,
        config: &NodeConfig,
        port: u16,
        temporary: &[Temporary],
    ) -> Self {
        Self {
            registry: config.registry.public_key.clone(),
            version: firewall.version,
            node: firewall.locality.node.clone(),
            subnet: firewall.locality.subnet.clone(),
            members: firewall.members.clone(),
            applied: Applied::of(config, port),
            temporary: temporary.to_vec(),
            tables: firewall.tables.clone(),
        }
    }

    /// Its temporary rules.
    pub(crate) fn temporary(&self) -> Vec<Temporary> {
        self.temporary.clone()
    }

    /// The same again, for this node.
    pub(crate) fn firewall(&self, node: &Firewall) -> Firewall {
        Firewall {
            version: self.version,
            tables: self.tables.clone(),
            members: self.members.clone(),
            locality: Locality {
                subnet: self.subnet.clone(),
                ..node.locality.clone()
            },
        }
    }
}

/// A file.
#[derive(Serialize, Deserialize)]
struct Written {
    /// [`Origin`] in TOML, whose values are not all JSON's.
    origin: String,
    rules: Vec<RuleText>,
}

/// Keeps a set, and the set in force; forgets the others.
pub(crate) fn write(
    pins: &Pins,
    set: u32,
    in_force: u32,
    compiled: &Compiled,
    origin: &Origin,
) -> Result<(), Failure> {
    let failed = |error: String| Failure::new(Exit::Failed, error);
    let texts: Vec<_> = compiled
        .rules
        .iter()
        .map(|line| RuleText {
            rule: line.rule.to_string(),
            origin: line.rule.provenance.to_string(),
        })
        .collect();
    let written = Written {
        origin: toml::to_string(origin).map_err(|error| failed(error.to_string()))?,
        rules: texts,
    };
    let text = serde_json::to_vec(&written).map_err(|error| failed(error.to_string()))?;
    let path = path(pins, set);
    state::replace(&path, &text).map_err(|error| Failure::io(path.display(), &error))?;
    remove_but(pins, &[path, self::path(pins, in_force)]);
    Ok(())
}

/// The rules of a set; none if nobody wrote them down.
pub(crate) fn read(pins: &Pins, set: u32) -> Option<Vec<RuleText>> {
    Some(written(pins, set)?.rules)
}

/// What a set was made from; none if nobody wrote it down.
pub(crate) fn origin(pins: &Pins, set: u32) -> Option<Origin> {
    toml::from_str(&written(pins, set)?.origin).ok()
}

fn written(pins: &Pins, set: u32) -> Option<Written> {
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
    use millrace_edge_policy::rules::{Bounds, Rule, RuleAction, compile};
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

    fn none() -> Origin {
        Origin::of(&Firewall::default(), &NodeConfig::default(), 4100, &[])
    }

    // Protects the last good set: its rules come back as the registry said them.
    #[test]
    fn what_a_set_was_made_from_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let pins = Pins::at(folder.path().join("edge"));
        let document = "[[firewall]]\nscope = \"global\"\nports = [80, \"90-99\"]\naction = \"deny\"\n\
                        [[firewall]]\nscope = \"role:gate\"\naction = \"allow\"\n";
        let tables = document.parse::<toml::Table>().unwrap();
        let tables = tables["firewall"].as_array().unwrap().iter();
        let firewall = Firewall {
            version: 7,
            tables: tables.map(|t| t.as_table().unwrap().clone()).collect(),
            members: vec!["192.0.2.1".parse().unwrap()],
            locality: Locality {
                subnet: Some("blue".into()),
                ..Locality::default()
            },
        };
        let temporary = Temporary {
            prefix: "192.0.2.0/24".parse().unwrap(),
            action: RuleAction::Deny,
            until_unix_seconds: 1_900_000_000,
        };
        let written = Origin::of(&firewall, &NodeConfig::default(), 4100, &[temporary]);
        write(&pins, 1, 1, &allowing("192.0.2.1"), &written).unwrap();
        assert_eq!(origin(&pins, 1), Some(written.clone()));
        assert_eq!(origin(&pins, 2), None);
        let again = written.firewall(&Firewall::default());
        assert_eq!(
            (again.tables, again.members, again.locality),
            (firewall.tables, firewall.members, firewall.locality)
        );
    }

    // Protects `rules` and `trace`: two edges on one machine number their sets alike.
    #[test]
    fn edges_beside_each_other_keep_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let [one, two] = ["edge", "edge-2"].map(|name| Pins::at(folder.path().join(name)));
        write(&one, 1, 1, &allowing("192.0.2.1"), &none()).unwrap();
        write(&two, 1, 1, &allowing("192.0.2.2"), &none()).unwrap();
        assert_ne!(read(&one, 1).unwrap(), read(&two, 1).unwrap());
        write(&one, 2, 1, &allowing("192.0.2.3"), &none()).unwrap();
        write(&one, 3, 2, &allowing("192.0.2.4"), &none()).unwrap();
        assert_eq!(read(&one, 1), None);
        assert!(read(&one, 2).is_some() && read(&one, 3).is_some());
        remove(&one);
        assert_eq!((read(&one, 2), read(&one, 3)), (None, None));
        assert!(read(&two, 1).is_some());
    }
}
