//! From a registry's table to a rule, with an error that says what to mend.

use super::{Direction, Provenance, Rule, RuleAction, RuleScope, RulesError, Sources, User};
use crate::packet::Protocol;
use ipnet::IpNet;
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use toml::{Table, Value};

const COMMENT_CHARS_MAX: usize = 128;
/// The most characters of a value that an error quotes.
const QUOTED_CHARS_MAX: usize = 80;
const FIELDS: [&str; 8] = [
    "scope",
    "prefixes",
    "ports",
    "protocol",
    "action",
    "direction",
    "user",
    "comment",
];

/// Reads one table.
pub(super) fn rule(
    version: u64,
    number: usize,
    table: &Table,
) -> Result<(RuleScope, Rule), RulesError> {
    let fields = Fields {
        version,
        number,
        table,
    };
    fields.known()?;
    let rule = Rule {
        sources: fields
            .optional("prefixes", sources)?
            .unwrap_or(Sources::Any),
        ports: fields.optional("ports", ports)?,
        protocol: fields.optional("protocol", protocol)?,
        action: fields.required("action", action)?,
        direction: fields.optional("direction", direction)?.unwrap_or_default(),
        user: fields.optional("user", user)?,
        comment: fields.optional("comment", comment)?,
        provenance: Provenance::Registry { version, number },
    };
    if rule.user.is_some() && rule.direction == Direction::Inbound {
        let wrong = Wrong::new(
            "an inbound packet has no user",
            "remove user, or write direction = \"outbound\"",
        );
        return Err(fields.error("user", wrong));
    }
    Ok((fields.required("scope", scope)?, rule))
}

/// A table and its place in the registry version.
struct Fields<'t> {
    version: u64,
    number: usize,
    table: &'t Table,
}

/// What is wrong with a value, and what the author can do.
struct Wrong {
    problem: String,
    remedy: String,
}

impl Wrong {
    fn new(problem: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self {
            problem: problem.to_string(),
            remedy: remedy.to_string(),
        }
    }
}

type Read<T> = Result<T, Wrong>;

impl Fields<'_> {
    /// A misspelt key would silently widen the rule.
    fn known(&self) -> Result<(), RulesError> {
        match self
            .table
            .keys()
            .find(|key| !FIELDS.contains(&key.as_str()))
        {
            None => Ok(()),
            Some(key) => {
                let remedy = format!("keys are {}", FIELDS.join(", "));
                Err(self.error(key, Wrong::new("is no key of a rule", remedy)))
            }
        }
    }

    fn optional<T>(
        &self,
        field: &str,
        read: fn(&Value) -> Read<T>,
    ) -> Result<Option<T>, RulesError> {
        let value = self.table.get(field);
        value
            .map(|value| read(value).map_err(|wrong| self.error(field, wrong)))
            .transpose()
    }

    fn required<T>(&self, field: &str, read: fn(&Value) -> Read<T>) -> Result<T, RulesError> {
        let missing = || Wrong::new("is missing", format!("write a {field}, every rule has one"));
        self.optional(field, read)?
            .ok_or_else(|| self.error(field, missing()))
    }

    fn error(&self, field: &str, wrong: Wrong) -> RulesError {
        RulesError::Rule {
            version: self.version,
            number: self.number,
            field: field.chars().take(QUOTED_CHARS_MAX).collect(),
            value: self
                .table
                .get(field)
                .map_or_else(|| "(absent)".into(), quoted),
            problem: wrong.problem,
            remedy: wrong.remedy,
        }
    }
}

fn quoted(value: &Value) -> String {
    let text = value.to_string();
    let mut quoted: String = text.chars().take(QUOTED_CHARS_MAX).collect();
    if quoted.len() < text.len() {
        quoted.push_str("...");
    }
    quoted
}

fn scope(value: &Value) -> Read<RuleScope> {
    let named = |name: &str, scope: fn(String) -> RuleScope| {
        if name.is_empty() {
            return Err(Wrong::new(
                "names nothing",
                "write the name behind the colon",
            ));
        }
        Ok(scope(name.into()))
    };
    match string(value)?.split_once(':') {
        None if value.as_str() == Some("global") => Ok(RuleScope::Global),
        Some(("node", id)) => named(id, RuleScope::Node),
        Some(("subnet", id)) => named(id, RuleScope::Subnet),
        Some(("role", name)) => named(name, RuleScope::Role),
        _ => Err(Wrong::new(
            "is no scope",
            "write \"node:ID\", \"subnet:ID\", \"role:NAME\" or \"global\"",
        )),
    }
}

fn sources(value: &Value) -> Read<Sources> {
    let prefixes = array(value)?.iter().map(prefix).collect::<Read<Vec<_>>>()?;
    Ok(match prefixes.is_empty() {
        true => Sources::Any,
        false => Sources::Prefixes(prefixes),
    })
}

fn prefix(value: &Value) -> Read<IpNet> {
    let text = string(value)?;
    let Ok(prefix) = text.parse::<IpNet>() else {
        let remedy = match text.parse::<IpAddr>() {
            Ok(address) => format!("write \"{}\"", IpNet::from(address)),
            Err(_) => "write it as \"10.0.0.0/8\" or \"2001:db8::/32\"".into(),
        };
        return Err(Wrong::new(format!("\"{text}\" is no prefix"), remedy));
    };
    if prefix.trunc() != prefix {
        return Err(Wrong::new(
            format!("\"{text}\" has bits behind its length"),
            format!("write \"{}\", or a longer prefix", prefix.trunc()),
        ));
    }
    if let IpNet::V6(v6) = prefix
        && v6.prefix_len() >= 96
        && v6.addr().to_ipv4_mapped().is_some()
    {
        return Err(Wrong::new(
            format!("\"{text}\" is IPv4 in IPv6, which no packet carries"),
            "write it as an IPv4 prefix",
        ));
    }
    Ok(prefix)
}

fn ports(value: &Value) -> Read<Vec<RangeInclusive<u16>>> {
    let ranges = array(value)?.iter().map(range).collect::<Read<Vec<_>>>()?;
    if ranges.is_empty() {
        return Err(Wrong::new(
            "names no port",
            "leave ports out to mean all of them",
        ));
    }
    Ok(ranges)
}

fn range(value: &Value) -> Read<RangeInclusive<u16>> {
    let wrong = || {
        Wrong::new(
            format!("{value} is no port or range of ports (1 to 65535)"),
            "write 4100 or \"8000-8100\"",
        )
    };
    let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
    let bounds = match value {
        Value::Integer(one) => u16::try_from(*one)
            .ok()
            .filter(|port| *port != 0)
            .map(|port| (port, port)),
        Value::String(text) => text
            .split_once('-')
            .and_then(|(first, last)| Some((port(first)?, port(last)?))),
        _ => None,
    };
    let (first, last) = bounds.ok_or_else(wrong)?;
    if first > last {
        return Err(Wrong::new(
            format!("{value} ends before it begins"),
            format!("write \"{last}-{first}\""),
        ));
    }
    Ok(first..=last)
}

fn protocol(value: &Value) -> Read<Protocol> {
    match string(value)? {
        "udp" => Ok(Protocol::Udp),
        "tcp" => Ok(Protocol::Tcp),
        _ => Err(Wrong::new(
            "is no protocol of a rule",
            "write \"udp\" or \"tcp\", or leave it out for both",
        )),
    }
}

fn action(value: &Value) -> Read<RuleAction> {
    match string(value)? {
        "allow" => Ok(RuleAction::Allow),
        "deny" => Ok(RuleAction::Deny),
        "reject" => Ok(RuleAction::Reject),
        _ => Err(Wrong::new(
            "is no action",
            "write \"allow\", \"deny\" or \"reject\"",
        )),
    }
}

fn direction(value: &Value) -> Read<Direction> {
    match string(value)? {
        "inbound" => Ok(Direction::Inbound),
        "outbound" => Ok(Direction::Outbound),
        _ => Err(Wrong::new(
            "is no direction",
            "write \"inbound\" or \"outbound\"",
        )),
    }
}

fn user(value: &Value) -> Read<User> {
    let text = string(value)?.to_owned();
    User::try_from(text)
        .map_err(|problem| Wrong::new(problem, "write a name or number that the node's host knows"))
}

fn comment(value: &Value) -> Read<String> {
    let text = string(value)?;
    if text.chars().count() > COMMENT_CHARS_MAX || text.chars().any(char::is_control) {
        return Err(Wrong::new(
            format!("is longer than {COMMENT_CHARS_MAX} characters, or not one line of text"),
            "shorten it",
        ));
    }
    Ok(text.into())
}

fn string(value: &Value) -> Read<&str> {
    let wrong = || {
        Wrong::new(
            format!("is {}, not text", value.type_str()),
            "put it in quotes",
        )
    };
    value.as_str().ok_or_else(wrong)
}

fn array(value: &Value) -> Read<&Vec<Value>> {
    let wrong = || {
        Wrong::new(
            format!("is {}, not a list", value.type_str()),
            "put it in [ ]",
        )
    };
    value.as_array().ok_or_else(wrong)
}

#[cfg(test)]
mod tests;
