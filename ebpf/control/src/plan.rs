//! From policy and registry to a compiled set.
//!
//! 1. The rules are those of the newest registry version that is held; members are those of all
//!    held versions, so that a node that follows slowly is not locked out.
//! 2. The same policy, registry and temporary rules give the same set.

use std::net::IpAddr;

use millrace_edge_policy::rules::{Bounds, Compiled, Locality, RuleSet, RulesError, Temporary};
use millrace_edge_policy::rules::{compile, in_order};
use millrace_edge_policy::settings::Mode;
use serde::{Deserialize, Serialize};

use crate::policy::EdgePolicy;

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

/// What a set was made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetInputs {
    /// Public key of the registry: versions of another one are not comparable.
    pub registry: String,
    /// What the registry said.
    pub firewall: Firewall,
    /// The transport's port.
    pub port: u16,
    /// What the config said.
    pub policy: EdgePolicy,
    /// Temporary rules that had not ended.
    pub temporary: Vec<Temporary>,
}

impl SetInputs {
    /// Its rules, for the members of now.
    pub(crate) fn rules_for(&self, now: Firewall) -> Firewall {
        Firewall {
            version: self.firewall.version,
            tables: self.firewall.tables.clone(),
            ..now
        }
    }

    /// What the registry said then, for a node and its roles of now.
    pub(crate) fn firewall_for(&self, now: &Firewall) -> Firewall {
        let mut then = self.firewall.clone();
        then.locality = Locality {
            subnet: then.locality.subnet,
            ..now.locality.clone()
        };
        then
    }
}

/// Compiles what is to be in force; its temporary rules have not ended.
pub(crate) fn compiled(
    inputs: &SetInputs,
    mode: Mode,
    bounds: Bounds,
) -> Result<Compiled, RulesError> {
    let firewall = &inputs.firewall;
    let set = RuleSet::read(firewall.version, &firewall.tables)?;
    let members = firewall.members.iter().copied();
    // No temporary rule has ended at 0.
    let rules = in_order(&inputs.temporary, members, &set, &firewall.locality, 0);
    compile(&inputs.policy.settings(inputs.port, mode), &rules, bounds)
}

#[cfg(test)]
mod tests {
    use millrace_tuning::NodeConfig;

    use super::*;
    use crate::policy::ProgramPolicy;

    #[test]
    fn members_are_allowed_and_a_bad_rule_refuses_the_set() {
        let edge = NodeConfig::default().edge;
        let mut inputs = SetInputs {
            registry: "ab".into(),
            firewall: Firewall {
                version: 3,
                members: vec!["192.0.2.1".parse().unwrap()],
                ..Firewall::default()
            },
            port: 4100,
            policy: EdgePolicy::of(&edge),
            temporary: Vec::new(),
        };
        let bounds = ProgramPolicy::of(&edge).bounds();
        let set = |inputs: &SetInputs| compiled(inputs, Mode::Enforce, bounds);
        assert_eq!(set(&inputs).unwrap().rules.len(), 1);
        let bad = toml::from_str("action = \"perhaps\"\nscope = \"global\"").unwrap();
        inputs.firewall.tables = vec![bad];
        let error = set(&inputs).unwrap_err().to_string();
        assert!(
            error.contains("registry version 3, firewall rule 1"),
            "{error}"
        );
    }
}
