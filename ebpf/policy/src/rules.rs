//! Firewall rules, and what they compile to.
//!
//! ```text
//! registry tables -> RuleSet -> rules of one node, in order
//!     -> compile -> tries, inbound rules, outbound rules
//! ```
//!
//! 1. The first rule that matches decides. Order: temporary rules (the newest first), the members
//!    of the registry, then the registry's rules by scope (node, subnet, role, global) and place.
//! 2. An invalid rule refuses the whole set: a firewall with a hole where a rule should be is worse
//!    than yesterday's firewall.
//! 3. A rule without prefixes matches every source; a rule whose list of members is empty matches
//!    none.

use crate::packet::Protocol;
use crate::settings::SettingsError;
use crate::trie::NodeKind;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use thiserror::Error;

mod compile;
mod read;
#[cfg(test)]
mod tests;

pub use crate::action::RuleAction;
pub use compile::{Bounds, Compiled, CompiledRule, Roots, compile};

/// The most rules that the kernel can tell apart (`EDGE_RULE_DEFAULT` is none of them).
pub const RULES_MAX: usize = 65_534;

/// The remote addresses that a rule matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sources {
    /// Every address.
    Any,
    /// Addresses in one of these prefixes: the source of inbound packets, the destination of
    /// outbound ones. An empty list matches none.
    Prefixes(Vec<IpNet>),
}

/// The direction of the packets that a rule matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// To this node: the program in the kernel decides.
    #[default]
    Inbound,
    /// From this node: nftables decides.
    Outbound,
}

/// A user whose packets an outbound rule matches: a name or a number, as `chown` takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct User(String);

/// The origin of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provenance {
    /// An operator on this machine, for a limited time.
    Temporary {
        /// When it lapses, in seconds since 1970.
        until_unix_seconds: u64,
    },
    /// The registry: its members are allowed.
    Members,
    /// A `[[firewall]]` table of the registry.
    Registry {
        /// Version of the registry.
        version: u64,
        /// Place in that version, from 1.
        number: usize,
    },
}

/// A rule that applies to this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Remote addresses that it matches.
    pub sources: Sources,
    /// Ports of this node (outbound: of the remote host) that it matches; none: every declared
    /// port.
    pub ports: Option<Vec<RangeInclusive<u16>>>,
    /// Protocol that it matches; none: UDP and TCP.
    pub protocol: Option<Protocol>,
    /// What it does with the packet.
    pub action: RuleAction,
    /// Direction of the packets.
    pub direction: Direction,
    /// User whose packets it matches; only outbound rules have one.
    pub user: Option<User>,
    /// Text for people.
    pub comment: Option<String>,
    /// Origin of the rule.
    pub provenance: Provenance,
}

/// A rule that an operator adds for a limited time, by `xdp allow` or `xdp deny`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Temporary {
    /// Remote addresses that it matches.
    pub prefix: IpNet,
    /// Allow or deny.
    pub action: RuleAction,
    /// When it lapses, in seconds since 1970.
    pub until_unix_seconds: u64,
}

/// The nodes that a rule is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleScope {
    /// One node, by the text of its ID.
    Node(String),
    /// The nodes of a subnet, by the text of its ID.
    Subnet(String),
    /// The nodes that have this role.
    Role(String),
    /// All nodes.
    Global,
}

/// What decides which scopes include this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Locality {
    /// Text of the node's ID.
    pub node: String,
    /// Text of its subnet's ID.
    pub subnet: Option<String>,
    /// Its roles.
    pub roles: Vec<String>,
}

/// The rules of one registry version, for all nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSet {
    version: u64,
    rules: Vec<(RuleScope, Rule)>,
}

/// Why a set of rules is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RulesError {
    /// A rule is invalid: the registry's fault.
    #[error(
        "registry version {version}, firewall rule {number}: {field} = {value}: {problem}; {remedy}"
    )]
    Rule {
        /// Version of the registry.
        version: u64,
        /// Place in that version, from 1.
        number: usize,
        /// Key of the table.
        field: String,
        /// The value of that key.
        value: String,
        /// What is wrong with it.
        problem: String,
        /// What the author of the rule can do.
        remedy: String,
    },
    /// More rules apply to this node than the kernel keeps apart.
    #[error(
        "{rules} inbound rules apply to this node, the limit is {rules_max}; merge prefixes into one rule, or raise rules_max"
    )]
    TooManyRules {
        /// Number of rules that apply.
        rules: usize,
        /// Number of rules that are allowed.
        rules_max: usize,
    },
    /// The tries do not fit into the node budget.
    #[error(
        "the IPv{family} prefixes take about {nodes} {kind}, {nodes_max} are allowed; name fewer or shorter prefixes, or raise trie_nodes_max"
    )]
    TooManyNodes {
        /// Address family: 4 or 6.
        family: u8,
        /// Kind of node.
        kind: NodeKind,
        /// Nodes that the prefixes take for the services compiled so far. For
        /// [`NodeKind::Building`], those of one service if no prefix hides another.
        nodes: usize,
        /// Nodes that are allowed.
        nodes_max: usize,
    },
    /// The operator's settings are wrong.
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

impl RulesError {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Rule { .. } => "rules_invalid",
            Self::TooManyRules { .. } => "rules_too_many",
            Self::TooManyNodes { .. } => "rules_too_many_nodes",
            Self::Settings(error) => error.reason(),
        }
    }
}

impl RuleSet {
    /// Reads the `[[firewall]]` tables of a registry version.
    ///
    /// It checks every rule, whichever node the rule is for, so that all nodes refuse the same
    /// sets.
    ///
    /// # Errors
    ///
    /// [`RulesError::Rule`] for the first rule with a wrong value.
    pub fn read(version: u64, tables: &[toml::Table]) -> Result<Self, RulesError> {
        let rules = tables
            .iter()
            .enumerate()
            .map(|(index, table)| read::rule(version, index + 1, table))
            .collect::<Result<_, _>>()?;
        Ok(Self { version, rules })
    }

    /// Version of the registry that the rules come from; 0: no version yet.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The rules for one node, in the order in which the edge tries them.
    pub fn for_node(&self, node: &Locality) -> Vec<Rule> {
        let mut rules: Vec<_> = self
            .rules
            .iter()
            .filter_map(|(scope, rule)| Some((scope.priority(node)?, rule.clone())))
            .collect();
        // The sort is stable: inside a scope the order of the document stays.
        rules.sort_by_key(|(priority, _)| *priority);
        rules.into_iter().map(|(_, rule)| rule).collect()
    }
}

impl RuleScope {
    /// The rank of its scope on this node, 0 decides first; none: the rule is not for this node.
    fn priority(&self, node: &Locality) -> Option<u8> {
        match self {
            Self::Node(id) => (*id == node.node).then_some(0),
            Self::Subnet(id) => (Some(id) == node.subnet.as_ref()).then_some(1),
            Self::Role(name) => node.roles.contains(name).then_some(2),
            Self::Global => Some(3),
        }
    }
}

/// All rules of a node in the order in which the edge tries them: temporary rules that have not
/// lapsed, the registry's members, the registry's rules.
///
/// `temporary` is in the order of issue; the newest decides first. `now_unix_seconds` is wall time.
pub fn in_order(
    temporary: &[Temporary],
    members: impl IntoIterator<Item = IpAddr>,
    set: &RuleSet,
    node: &Locality,
    now_unix_seconds: u64,
) -> Vec<Rule> {
    let live = temporary
        .iter()
        .rev()
        .filter(|rule| now_unix_seconds < rule.until_unix_seconds)
        .map(Rule::temporary);
    live.chain([Rule::members(members)])
        .chain(set.for_node(node))
        .collect()
}

impl Temporary {
    /// A rule for a prefix. An IPv6 prefix of mapped IPv4 addresses is that of IPv4: packets of
    /// IPv4 have no other.
    pub fn new(prefix: IpNet, action: RuleAction, until_unix_seconds: u64) -> Self {
        const MAPPED_BITS: u8 = 96;
        let mapped = |v6: Ipv6Net| {
            let bits = v6.prefix_len().checked_sub(MAPPED_BITS)?;
            let v4 = v6.network().to_ipv4_mapped()?;
            Ipv4Net::new(v4, bits).ok().map(IpNet::V4)
        };
        let v4 = match prefix {
            IpNet::V4(_) => None,
            IpNet::V6(v6) => mapped(v6),
        };
        Self {
            prefix: v4.unwrap_or(prefix).trunc(),
            action,
            until_unix_seconds,
        }
    }
}

impl Rule {
    /// The rule that allows members of the registry to reach all ports.
    pub fn members(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let prefixes = addresses
            .into_iter()
            .map(|address| IpNet::from(address.to_canonical()))
            .collect();
        Self::plain(prefixes, RuleAction::Allow, Provenance::Members)
    }

    /// An operator's rule, for all ports.
    pub fn temporary(rule: &Temporary) -> Self {
        let until_unix_seconds = rule.until_unix_seconds;
        let provenance = Provenance::Temporary { until_unix_seconds };
        Self::plain(vec![rule.prefix.trunc()], rule.action, provenance)
    }

    fn plain(prefixes: Vec<IpNet>, action: RuleAction, provenance: Provenance) -> Self {
        Self {
            sources: Sources::Prefixes(prefixes),
            ports: None,
            protocol: None,
            action,
            direction: Direction::Inbound,
            user: None,
            comment: None,
            provenance,
        }
    }

    /// Whether the rule matches packets to this port, provided that their source matches.
    pub fn covers(&self, protocol: Protocol, port: u16) -> bool {
        let listed = |ports: &Vec<RangeInclusive<u16>>| ports.iter().any(|r| r.contains(&port));
        self.protocol.is_none_or(|wanted| wanted == protocol)
            && self.ports.as_ref().is_none_or(listed)
    }

    /// Whether the rule names neither port nor protocol, and so also covers ports that are not
    /// declared.
    pub fn covers_host(&self) -> bool {
        self.protocol.is_none() && self.ports.is_none()
    }
}

impl User {
    /// The name or number. It holds only letters, digits, `_`, `-` and `.`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for User {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if text.is_empty() || text.len() > 32 || text.starts_with('-') || !text.bytes().all(allowed)
        {
            return Err("is no name of a user (1 to 32 letters, digits, '_', '-', '.')");
        }
        Ok(Self(text))
    }
}

impl From<User> for String {
    fn from(user: User) -> Self {
        user.0
    }
}

impl fmt::Display for Provenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Temporary { .. } => f.write_str("temporary"),
            Self::Members => f.write_str("registry members"),
            Self::Registry { version, number } => {
                write!(f, "registry version {version}, rule {number}")
            }
        }
    }
}

/// Number of prefixes that a message prints; a rule may have thousands.
const PREFIXES_SHOWN: usize = 3;

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.action)?;
        if let Some(protocol) = self.protocol {
            write!(f, " {protocol}")?;
        }
        f.write_str(match self.direction {
            Direction::Inbound => " from ",
            Direction::Outbound => " to ",
        })?;
        write!(f, "{}", self.sources)?;
        if let Some(ports) = &self.ports {
            f.write_str(" port ")?;
            list(f, ports, |f, range| match range.start() == range.end() {
                true => write!(f, "{}", range.start()),
                false => write!(f, "{}-{}", range.start(), range.end()),
            })?;
        }
        match &self.user {
            Some(user) => write!(f, " by user {}", user.as_str()),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Prefixes(prefixes) = self else {
            return f.write_str("any");
        };
        if prefixes.is_empty() {
            return f.write_str("no address");
        }
        let shown = prefixes.len().min(PREFIXES_SHOWN);
        list(f, &prefixes[..shown], |f, prefix| prefix.fmt(f))?;
        match prefixes.len() - shown {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

fn list<T>(
    f: &mut fmt::Formatter<'_>,
    items: &[T],
    item: impl Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    for (index, one) in items.iter().enumerate() {
        if index > 0 {
            f.write_str(", ")?;
        }
        item(f, one)?;
    }
    Ok(())
}
