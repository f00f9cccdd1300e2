//! From ordered rules to the tables that the kernel walks.
//!
//! 1. The same settings and rules compile to the same tables.
//! 2. Services with the same rules and the same default share one trie.
//! 3. The bounds hold for the whole set, separately for each address family.

use super::{Direction, RULES_MAX, Rule, RuleAction, RulesError, Sources};
use crate::settings::{DefaultAction, Settings};
use crate::trie::{Full, Leaf, NodeKind, RULE_DEFAULT, TrieBuilder, TrieSet};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::{BTreeMap, BTreeSet};

/// The most that a set may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Inbound rules.
    pub rules_max: usize,
    /// Dense trie nodes of 1 KiB for IPv4; [`TrieBuilder::new`] says what other nodes follow from
    /// them.
    pub nodes4_max: usize,
    /// Dense trie nodes of 1 KiB for IPv6.
    pub nodes6_max: usize,
}

/// Where the tries of a service begin: indices of nodes, from the first of their family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roots {
    /// In [`Compiled::trie4`].
    pub root4: u32,
    /// In [`Compiled::trie6`].
    pub root6: u32,
}

/// An inbound rule as operators see it. Its index is its number in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompiledRule {
    /// The rule.
    pub rule: Rule,
    /// Numbers of the services that it covers; with scope `host`, see [`Rule::covers_host`].
    pub services: Vec<u8>,
}

/// A set that can be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The operator's settings.
    pub settings: Settings,
    /// Inbound rules, in order.
    pub rules: Vec<CompiledRule>,
    /// Tries over the four bytes of IPv4 addresses.
    pub trie4: TrieSet,
    /// Tries over the sixteen bytes of IPv6 addresses.
    pub trie6: TrieSet,
    /// Roots of each service, in the order of the settings.
    pub services: Vec<Roots>,
    /// Roots for ports that are not declared, with scope `host`.
    pub host: Roots,
    /// Outbound rules, in order; nftables enforces them.
    pub outbound: Vec<Rule>,
}

/// Compiles rules that are [`in_order`](super::in_order).
///
/// # Errors
///
/// [`RulesError::Settings`] if the settings are wrong, [`RulesError::TooManyRules`] for more rules
/// than `bounds` allow, [`RulesError::TooManyNodes`] if the prefixes do not fit into the nodes.
pub fn compile(
    settings: &Settings,
    rules: &[Rule],
    bounds: Bounds,
) -> Result<Compiled, RulesError> {
    settings.validate()?;
    let (inbound, outbound): (Vec<_>, Vec<_>) = rules
        .iter()
        .cloned()
        .partition(|rule| rule.direction == Direction::Inbound);
    let (rules, rules_max) = (inbound.len(), bounds.rules_max.min(RULES_MAX));
    if rules > rules_max {
        return Err(RulesError::TooManyRules { rules, rules_max });
    }

    let columns: Vec<_> = settings
        .services
        .iter()
        .map(|service| {
            let (protocol, port) = (service.kind.protocol(), service.port);
            Column::of(&inbound, service.default_action, |rule| {
                rule.covers(protocol, port)
            })
        })
        .collect();
    let host = Column::of(&inbound, settings.host_default, Rule::covers_host);

    let distinct = columns.iter().chain([&host]).collect();
    let ipv4 = Family::ipv4(&inbound);
    let ipv6 = Family::ipv6(&inbound);
    let (trie4, roots4) = ipv4.tries(&inbound, &distinct, bounds.nodes4_max)?;
    let (trie6, roots6) = ipv6.tries(&inbound, &distinct, bounds.nodes6_max)?;
    let roots = |column: &Column| Roots {
        root4: roots4[column],
        root6: roots6[column],
    };
    Ok(Compiled {
        settings: settings.clone(),
        services: columns.iter().map(roots).collect(),
        host: roots(&host),
        rules: compiled_rules(inbound, &columns),
        trie4,
        trie6,
        outbound,
    })
}

fn compiled_rules(rules: Vec<Rule>, columns: &[Column]) -> Vec<CompiledRule> {
    let speaks = |number: u16| {
        let services = columns.iter().zip(0..);
        services
            .filter(|(column, _)| column.rules.binary_search(&number).is_ok())
            .map(|(_, service)| service)
            .collect()
    };
    let numbered = rules.into_iter().zip(0..);
    numbered
        .map(|(rule, number)| CompiledRule {
            services: speaks(number),
            rule,
        })
        .collect()
}

/// The input of a trie: numbers of the rules that cover a service, and its default.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Column {
    rules: Vec<u16>,
    default: DefaultAction,
}

impl Column {
    fn of(rules: &[Rule], default: DefaultAction, covers: impl Fn(&Rule) -> bool) -> Self {
        let numbered = rules.iter().zip(0..);
        let covering = numbered.filter(|(rule, _)| covers(rule));
        Self {
            rules: covering.map(|(_, number)| number).collect(),
            default,
        }
    }

    fn default_leaf(&self) -> Leaf {
        Leaf {
            action: match self.default {
                DefaultAction::Allow => RuleAction::Allow,
                DefaultAction::Deny => RuleAction::Deny,
            },
            rule: RULE_DEFAULT,
        }
    }
}

/// The tries of one family of addresses.
struct Family {
    number: u8,
    address_bytes: usize,
    /// The prefixes of each rule. None lies inside another and no two form a third, so one rule
    /// never fills a node.
    prefixes: Vec<Vec<Prefix>>,
}

struct Prefix {
    /// As many bytes as the family has; the rest are 0.
    address: [u8; 16],
    bits: u8,
}

impl Family {
    fn ipv4(rules: &[Rule]) -> Self {
        let of_rule = |rule: &Rule| {
            let nets = match &rule.sources {
                Sources::Any => vec![Ipv4Net::default()],
                Sources::Prefixes(nets) => nets.iter().filter_map(ipv4).collect(),
            };
            let nets = Ipv4Net::aggregate(&nets);
            let prefix = |net: Ipv4Net| Prefix {
                address: first_bytes(&net.network().octets()),
                bits: net.prefix_len(),
            };
            nets.into_iter().map(prefix).collect()
        };
        Self {
            number: 4,
            address_bytes: 4,
            prefixes: rules.iter().map(of_rule).collect(),
        }
    }

    fn ipv6(rules: &[Rule]) -> Self {
        let of_rule = |rule: &Rule| {
            let nets = match &rule.sources {
                Sources::Any => vec![Ipv6Net::default()],
                Sources::Prefixes(nets) => nets.iter().filter_map(ipv6).collect(),
            };
            let nets = Ipv6Net::aggregate(&nets);
            let prefix = |net: Ipv6Net| Prefix {
                address: net.network().octets(),
                bits: net.prefix_len(),
            };
            nets.into_iter().map(prefix).collect()
        };
        Self {
            number: 6,
            address_bytes: 16,
            prefixes: rules.iter().map(of_rule).collect(),
        }
    }

    /// Builds one trie for each column. Returns the set, and the root of each.
    fn tries<'c>(
        &self,
        rules: &[Rule],
        columns: &BTreeSet<&'c Column>,
        nodes_max: usize,
    ) -> Result<(TrieSet, BTreeMap<&'c Column, u32>), RulesError> {
        let mut builder = TrieBuilder::new(nodes_max);
        let mut roots = BTreeMap::new();
        for column in columns {
            let root = self.trie(&mut builder, rules, column);
            let root = root.map_err(|full| self.too_many(full, column))?;
            roots.insert(*column, root);
        }
        let tries = builder.finish().map_err(|full| self.error(full))?;
        Ok((tries, roots))
    }

    /// The error for a trie that does not fit. The builder stops at the first node too many; the
    /// error counts all nodes.
    fn too_many(&self, full: Full, column: &Column) -> RulesError {
        let nodes = match full.kind {
            NodeKind::Building => self.nodes_of(column),
            NodeKind::Dense | NodeKind::Sparse => full.nodes,
        };
        self.error(Full { nodes, ..full })
    }

    fn error(&self, full: Full) -> RulesError {
        RulesError::TooManyNodes {
            family: self.number,
            kind: full.kind,
            nodes: full.nodes,
            nodes_max: full.nodes_max,
        }
    }

    fn trie(
        &self,
        builder: &mut TrieBuilder,
        rules: &[Rule],
        column: &Column,
    ) -> Result<u32, Full> {
        let root = builder.begin_trie()?;
        for &rule in &column.rules {
            let number = usize::from(rule);
            let action = rules[number].action;
            for Prefix { address, bits } in &self.prefixes[number] {
                let address = &address[..self.address_bytes];
                builder.insert(address, *bits, Leaf { action, rule })?;
            }
        }
        let everything = &[0; 16][..self.address_bytes];
        builder.insert(everything, 0, column.default_leaf())?;
        Ok(root)
    }

    /// Nodes of a column's trie if no rule hides a part of another.
    fn nodes_of(&self, column: &Column) -> usize {
        let mut below_root = BTreeSet::new();
        let prefixes = column
            .rules
            .iter()
            .flat_map(|&number| &self.prefixes[usize::from(number)]);
        for Prefix { address, bits } in prefixes {
            // A prefix of 17 bits stands in the node under its first two bytes.
            for depth in 1..usize::from(*bits).div_ceil(8) {
                below_root.insert((depth, first_bytes(&address[..depth])));
            }
        }
        1 + below_root.len()
    }
}

fn first_bytes(bytes: &[u8]) -> [u8; 16] {
    let mut first = [0; 16];
    first[..bytes.len()].copy_from_slice(bytes);
    first
}

fn ipv4(net: &IpNet) -> Option<Ipv4Net> {
    match net {
        IpNet::V4(net) => Some(*net),
        IpNet::V6(_) => None,
    }
}

fn ipv6(net: &IpNet) -> Option<Ipv6Net> {
    match net {
        IpNet::V4(_) => None,
        IpNet::V6(net) => Some(*net),
    }
}
