//! From policy and registry to a compiled set.
//!
//! 1. The rules are those of the newest registry version that is held; members are those of all
//!    held versions, so that a node that follows slowly is not locked out.
//! 2. The same policy, registry and temporary rules give the same set.

use std::net::IpAddr;

use millrace_edge_policy::rules::{Bounds, Compiled, Locality, RuleSet, RulesError, Temporary};
use millrace_edge_policy::rules::{compile, in_order};
use millrace_edge_policy::settings::Settings;
use serde::{Deserialize, Serialize};

/// What the registry says to the edge of this node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Firewall {
    /// The newest version; 0: none is held.
    pub version: u64,
    /// Its `[[firewall]]` tables.
    pub tables: Vec<toml::Table>,
    /// Addresses of all nodes of all held versions.
    pub members: Vec<IpAddr>,
    /// What decides which scopes of rules are this node's.
    pub locality: Locality,
}

/// Compiles what is to be in force, with temporary rules that have not ended.
pub(crate) fn compiled(
    settings: &Settings,
    bounds: Bounds,
    firewall: &Firewall,
    temporary: &[Temporary],
) -> Result<Compiled, RulesError> {
    let set = RuleSet::read(firewall.version, &firewall.tables)?;
    let rules = in_order(
        temporary,
        firewall.members.iter().copied(),
        &set,
        &firewall.locality,
        // None of them has ended.
        0,
    );
    compile(settings, &rules, bounds)
}

#[cfg(test)]
mod tests {
    use millrace_edge_policy::settings::Mode;
    use millrace_tuning::NodeConfig;

    use super::*;
    use crate::policy::{EdgePolicy, ProgramPolicy};

    #[test]
    fn members_are_allowed_and_a_bad_rule_refuses_the_set() {
        let edge = NodeConfig::default().edge;
        let settings = EdgePolicy::of(&edge).settings(4100, Mode::Enforce);
        let bounds = ProgramPolicy::of(&edge).bounds();
        let mut firewall = Firewall {
            version: 3,
            members: vec!["192.0.2.1".parse().unwrap()],
            ..Firewall::default()
        };
        let set = |firewall: &Firewall| compiled(&settings, bounds, firewall, &[]);
        assert_eq!(set(&firewall).unwrap().rules.len(), 1);
        firewall.tables = vec![toml::from_str("action = \"perhaps\"\nscope = \"global\"").unwrap()];
        let error = set(&firewall).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("registry version 3, firewall rule 1"),
            "{error}"
        );
    }
}
