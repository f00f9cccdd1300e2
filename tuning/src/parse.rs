//! From text to a [`NodeConfig`], with every mistake found in one walk.
//!
//! Invariants
//! 1. The walk goes over all sections and keys, whatever was wrong before.
//! 2. A key with a mistake keeps its default and has no origin.
//! 3. Problems come out in the order of the text.

use std::ops::Range;

use millrace_protocol::address::{AddressError, listen_address};
use millrace_protocol::id::NodeId;
use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue};

use crate::config::{CoreProfile, Cores, NodeConfig, Seed};
use crate::problem::{Origins, Position, Problem, ProblemKind, Severity};
use crate::schema::{self, CORE_NAME, Field, Kind, Presence, SHARDS_NAME, Section, Value};
use crate::semantics;
use crate::units::{ByteSize, Period, UnitError};

/// What a config text says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// The values, defaults included.
    pub config: NodeConfig,
    /// Where each written key stands, by dotted name (`transport.keep_alive`,
    /// `shards.core.1.spin`).
    pub origins: Origins,
    /// Every mistake, in the order of the text.
    pub problems: Vec<Problem>,
}

impl Parsed {
    /// Whether a node can start from it.
    pub fn is_usable(&self) -> bool {
        self.problems
            .iter()
            .all(|problem| problem.severity == Severity::Warning)
    }
}

/// Reads a config: syntax, keys, types, units, bounds, and contradictions between keys.
pub fn parse(text: &str) -> Parsed {
    let (document, errors) = DeTable::parse_recoverable(text);
    let mut walk = Walk {
        text,
        config: NodeConfig::default(),
        origins: Origins::default(),
        problems: Vec::new(),
    };
    for error in &errors {
        walk.syntax(error);
    }
    walk.document(document.get_ref());
    if errors.is_empty() {
        // After a syntax error a key may be missing only because its line could not be read.
        walk.missing();
    }
    let mut problems = walk.problems;
    problems.extend(semantics::check(&walk.config, &walk.origins));
    problems.sort_by_key(|problem| problem.position);
    Parsed {
        config: walk.config,
        origins: walk.origins,
        problems,
    }
}

struct Walk<'t> {
    text: &'t str,
    config: NodeConfig,
    origins: Origins,
    problems: Vec<Problem>,
}

impl Walk<'_> {
    fn syntax(&mut self, error: &toml::de::Error) {
        let at = error.span().map_or(0, |span| span.start);
        // Several lines of the parser's message would break the one-line form.
        let reason = error.message().lines().collect::<Vec<_>>().join(", ");
        self.problem(
            at,
            "",
            ProblemKind::Syntax,
            reason,
            "write `key = value` as TOML 1.0 has it".into(),
        );
    }

    fn document(&mut self, table: &DeTable<'_>) {
        for (name, value) in table {
            let Some(section) = schema::section(name.get_ref()) else {
                self.unknown_section(name);
                continue;
            };
            self.origin(section.name, name.span().start);
            match value.get_ref() {
                DeValue::Table(table) => self.section(section, table),
                other => self.wrong_type(
                    &name.span(),
                    section.name,
                    "a table",
                    other,
                    format!(
                        "write [{}] on a line of its own and the keys below it",
                        section.name
                    ),
                ),
            }
        }
    }

    fn section(&mut self, section: &'static Section, table: &DeTable<'_>) {
        for (name, value) in table {
            if section.name == SHARDS_NAME && name.get_ref() == CORE_NAME {
                continue;
            }
            let key = format!("{}.{}", section.name, name.get_ref());
            match section.field(name.get_ref()) {
                Some(field) => {
                    if let Some(value) = self.value(&key, field.kind, default_text(field), value) {
                        self.origin(&key, name.span().start);
                        store(field, &mut self.config, value);
                    }
                }
                None => {
                    let known: Vec<&str> = section.fields.iter().map(|field| field.name).collect();
                    self.unknown_key(name, &key, &format!("[{}]", section.name), &known);
                }
            }
        }
        // After the defaults of [shards], which every core starts from.
        if section.name == SHARDS_NAME
            && let Some(cores) = table.get(CORE_NAME)
        {
            self.cores(cores);
        }
    }

    fn cores(&mut self, value: &Spanned<DeValue<'_>>) {
        let fix = || "write [[shards.core]] on a line of its own, once per core".to_owned();
        let DeValue::Array(list) = value.get_ref() else {
            self.wrong_type(
                &value.span(),
                "shards.core",
                "a list of tables",
                value.get_ref(),
                fix(),
            );
            return;
        };
        for (index, item) in list.iter().enumerate() {
            let prefix = format!("shards.core.{index}");
            self.origin(&prefix, item.span().start);
            match item.get_ref() {
                DeValue::Table(table) => self.core(&prefix, item.span().start, table),
                other => self.wrong_type(&item.span(), &prefix, "a table", other, fix()),
            }
        }
    }

    fn core(&mut self, prefix: &str, at: usize, table: &DeTable<'_>) {
        let mut core = CoreProfile {
            cpu: 0,
            profile: self.config.shards.defaults.clone(),
        };
        for (name, value) in table {
            let key = format!("{prefix}.{}", name.get_ref());
            let field = schema::core_fields()
                .iter()
                .find(|field| field.name == name.get_ref());
            match field {
                Some(field) => {
                    if let Some(value) = self.value(&key, field.kind, default_text(field), value) {
                        self.origin(&key, name.span().start);
                        store(field, &mut core, value);
                    }
                }
                None => {
                    let known: Vec<&str> = schema::core_fields().iter().map(|f| f.name).collect();
                    self.unknown_key(name, &key, "[[shards.core]]", &known);
                }
            }
        }
        if table.get("cpu").is_none() {
            self.problem(
                at,
                prefix,
                ProblemKind::MissingKey,
                "cpu is missing in [[shards.core]]".into(),
                "add `cpu = 1`, the core these values are for".into(),
            );
        } else if self.origins.of(&format!("{prefix}.cpu")).is_some() {
            self.config.shards.core.push(core);
        }
    }

    fn missing(&mut self) {
        for section in schema::sections() {
            for field in section
                .fields
                .iter()
                .filter(|f| f.presence == Presence::Required)
            {
                let key = format!("{}.{}", section.name, field.name);
                let written = self.origins.of(&key).is_some()
                    || self.problems.iter().any(|problem| problem.key == key);
                if !written {
                    let position = self.origins.nearest(&key);
                    self.problems.push(Problem {
                        position,
                        kind: ProblemKind::MissingKey,
                        severity: Severity::Error,
                        reason: format!("{} is missing in [{}]", field.name, section.name),
                        fix: format!(
                            "add `{} = {}` to [{}]",
                            field.name, field.example, section.name
                        ),
                        key,
                    });
                }
            }
        }
    }

    fn unknown_section(&mut self, name: &Spanned<DeString<'_>>) {
        let known: Vec<&str> = schema::sections()
            .iter()
            .map(|section| section.name)
            .collect();
        let fix = match owner_of(name.get_ref()) {
            Some(section) => format!("{} belongs below [{section}]", name.get_ref()),
            None => hint(name.get_ref(), &known),
        };
        let reason = format!("unknown section \"{}\"", name.get_ref());
        self.problem(
            name.span().start,
            name.get_ref(),
            ProblemKind::UnknownKey,
            reason,
            fix,
        );
    }

    fn unknown_key(
        &mut self,
        name: &Spanned<DeString<'_>>,
        key: &str,
        place: &str,
        known: &[&str],
    ) {
        let fix = match owner_of(name.get_ref()) {
            Some(section) => format!("{} belongs to [{section}]", name.get_ref()),
            None => hint(name.get_ref(), known),
        };
        let reason = format!("unknown key \"{}\" in {place}", name.get_ref());
        self.problem(name.span().start, key, ProblemKind::UnknownKey, reason, fix);
    }

    /// The value if it is one of `kind`; otherwise a problem is noted.
    fn value(
        &mut self,
        key: &str,
        kind: Kind,
        example: String,
        value: &Spanned<DeValue<'_>>,
    ) -> Option<Value> {
        let name = key.rsplit('.').next().unwrap_or(key);
        let at = value.span().start;
        match read(kind, value.get_ref()) {
            Ok(value) => match out_of_range(kind, &value) {
                None => Some(value),
                Some(limit) => {
                    let reason = format!("{name} = {value} is out of range ({})", kind.bounds());
                    let fix = format!("use {limit}, or another value in {}", kind.bounds());
                    self.problem(at, key, ProblemKind::OutOfRange, reason, fix);
                    None
                }
            },
            Err(Refusal::Type) => {
                let fix = format!("write `{name} = {example}`");
                self.wrong_type(&value.span(), key, &kind.expected(), value.get_ref(), fix);
                None
            }
            Err(Refusal::Unit(error)) => {
                let fix = format!(
                    "write {}, for example `{name} = {example}`",
                    kind.expected()
                );
                self.problem(
                    at,
                    key,
                    ProblemKind::BadUnit,
                    format!("{name}: {error}"),
                    fix,
                );
                None
            }
            Err(Refusal::Value { reason, fix }) => {
                self.problem(
                    at,
                    key,
                    ProblemKind::BadValue,
                    format!("{name}: {reason}"),
                    fix,
                );
                None
            }
        }
    }

    fn wrong_type(
        &mut self,
        at: &Range<usize>,
        key: &str,
        expected: &str,
        found: &DeValue<'_>,
        fix: String,
    ) {
        let name = key.rsplit('.').next().unwrap_or(key);
        let reason = format!(
            "{name} has the wrong type: expected {expected}, found {}",
            type_of(found)
        );
        self.problem(at.start, key, ProblemKind::WrongType, reason, fix);
    }

    fn problem(&mut self, at: usize, key: &str, kind: ProblemKind, reason: String, fix: String) {
        self.problems.push(Problem {
            position: Position::of(self.text, at),
            key: key.to_owned(),
            kind,
            severity: Severity::Error,
            reason,
            fix,
        });
    }

    fn origin(&mut self, key: &str, at: usize) {
        self.origins
            .insert(key.to_owned(), Position::of(self.text, at));
    }
}

/// Puts a value that was read by the field's own kind into its place.
fn store<C>(field: &Field<C>, config: &mut C, value: Value) {
    let stored = (field.set)(config, value);
    // The table's test walks every kind; a mismatch is a mistake in the table, not in the config.
    assert!(
        stored.is_ok(),
        "{} takes another kind than its row says",
        field.name
    );
}

/// What the key would be by default, or an example: used in the fix.
fn default_text<C: Default>(field: &Field<C>) -> String {
    match field.presence {
        Presence::Default => field.value(&C::default()).to_string(),
        Presence::Optional | Presence::Required => field.example.to_owned(),
    }
}

enum Refusal {
    Type,
    Unit(UnitError),
    Value { reason: String, fix: String },
}

fn read(kind: Kind, value: &DeValue<'_>) -> Result<Value, Refusal> {
    match (kind, value) {
        (Kind::Integer { .. }, value) => integer(value).map(Value::Integer),
        (Kind::Bytes { .. }, DeValue::String(text)) => text
            .parse::<ByteSize>()
            .map(Value::Bytes)
            .map_err(Refusal::Unit),
        (Kind::Duration { .. }, DeValue::String(text)) => text
            .parse::<Period>()
            .map(Value::Duration)
            .map_err(Refusal::Unit),
        // A bare number is the commonest mistake with units: name it as such.
        (Kind::Bytes { .. } | Kind::Duration { .. }, DeValue::Integer(number)) => {
            let text = number.as_str();
            match kind {
                Kind::Bytes { .. } => text.parse().map(Value::Bytes).map_err(Refusal::Unit),
                _ => text.parse().map(Value::Duration).map_err(Refusal::Unit),
            }
        }
        (Kind::Path | Kind::Name, DeValue::String(text)) => {
            if text.is_empty() || text.contains('\0') {
                let reason = "is empty or holds a NUL".to_owned();
                return Err(Refusal::Value {
                    reason,
                    fix: "write a name, or remove the key".into(),
                });
            }
            Ok(Value::Text(text.to_string()))
        }
        (Kind::PublicKey, DeValue::String(text)) => public_key(text).map(Value::Text),
        (Kind::Address, DeValue::String(text)) => listen_address(text)
            .map(Value::Address)
            .map_err(|error| address(text, error)),
        (Kind::Seeds, DeValue::Array(list)) => seeds(list),
        (Kind::Choice(words), DeValue::String(text)) => {
            if let Some(word) = words.iter().find(|word| **word == text.as_ref()) {
                return Ok(Value::Word(word));
            }
            let reason = format!("\"{text}\" is not {}", kind.expected());
            Err(Refusal::Value {
                reason,
                fix: hint(text, words),
            })
        }
        (Kind::Names, DeValue::Array(list)) => names(list),
        (Kind::Nodes, DeValue::Array(list)) => nodes(list),
        (Kind::Ports, DeValue::Array(list)) => ports(list),
        (Kind::Cores, DeValue::String(text)) if text == "auto" => Ok(Value::Cores(Cores::Auto)),
        (Kind::Cores, DeValue::Array(list)) => cores(list),
        (Kind::Cores, DeValue::String(text)) => Err(Refusal::Value {
            reason: format!("\"{text}\" is not {}", kind.expected()),
            fix: "write \"auto\" or a list such as [0, 1]".into(),
        }),
        _ => Err(Refusal::Type),
    }
}

/// Longest list of names or ports: an interface, a role and a service each cost something in the
/// kernel.
const LIST_MAX: usize = 15;

fn names(list: &[Spanned<DeValue<'_>>]) -> Result<Value, Refusal> {
    let mut names: Vec<String> = Vec::new();
    for item in list {
        let DeValue::String(name) = item.get_ref() else {
            return Err(Refusal::Type);
        };
        // What an interface may be called; roles are no stricter.
        let fits = (1..=15).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
            && name != "."
            && name != "..";
        if !fits {
            return Err(Refusal::Value {
                reason: format!(
                    "{name:?} is no name of 1 to 15 visible characters without a slash"
                ),
                fix: "write it as `ip link` shows it".into(),
            });
        }
        if names.iter().any(|known| known.as_str() == name.as_ref()) {
            return Err(twice(name));
        }
        names.push(name.to_string());
    }
    bounded(names.len()).map(|()| Value::Names(names))
}

/// Longest list of nodes: more than the largest subnets have.
const NODES_MAX: usize = 128;

fn nodes(list: &[Spanned<DeValue<'_>>]) -> Result<Value, Refusal> {
    let mut nodes: Vec<String> = Vec::new();
    for item in list {
        let DeValue::String(node) = item.get_ref() else {
            return Err(Refusal::Type);
        };
        if let Err(error) = node.parse::<NodeId>() {
            return Err(Refusal::Value {
                reason: format!("{node:?} is no node id: {error}"),
                fix: "write it as `millrace status` shows it".into(),
            });
        }
        if nodes.iter().any(|known| known.as_str() == node.as_ref()) {
            return Err(twice(node));
        }
        nodes.push(node.to_string());
    }
    if nodes.len() > NODES_MAX {
        return Err(Refusal::Value {
            reason: format!("the list has {} nodes, more than {NODES_MAX}", nodes.len()),
            fix: "set path to what most peers want, and list the others".into(),
        });
    }
    Ok(Value::Names(nodes))
}

fn ports(list: &[Spanned<DeValue<'_>>]) -> Result<Value, Refusal> {
    let mut ports = Vec::new();
    for item in list {
        let port = integer(item.get_ref())?;
        if !(1..=65_535).contains(&port) {
            return Err(Refusal::Value {
                reason: format!("{port} is no port (1 to 65535)"),
                fix: "write the number that the service listens on".into(),
            });
        }
        if ports.contains(&port) {
            return Err(twice(port));
        }
        ports.push(port);
    }
    bounded(ports.len()).map(|()| Value::Ports(ports))
}

fn twice(what: impl std::fmt::Display) -> Refusal {
    Refusal::Value {
        reason: format!("{what} is there twice"),
        fix: "remove one of them".into(),
    }
}

fn bounded(items: usize) -> Result<(), Refusal> {
    if items <= LIST_MAX {
        return Ok(());
    }
    Err(Refusal::Value {
        reason: format!("{items} entries, at most {LIST_MAX} are taken"),
        fix: "remove some".into(),
    })
}

fn integer(value: &DeValue<'_>) -> Result<u64, Refusal> {
    let DeValue::Integer(number) = value else {
        return Err(Refusal::Type);
    };
    u64::from_str_radix(number.as_str(), number.radix()).map_err(|_| Refusal::Value {
        reason: format!("{} is not a number from 0 to {}", number.as_str(), u64::MAX),
        fix: "write a whole number that is not negative".into(),
    })
}

fn public_key(text: &str) -> Result<String, Refusal> {
    if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(text.to_ascii_lowercase());
    }
    Err(Refusal::Value {
        reason: format!(
            "not a public key: expected 64 hexadecimal digits, found {} characters",
            text.chars().count()
        ),
        fix: "copy the line that `millrace registry init` or `millrace registry show` prints"
            .into(),
    })
}

fn address(text: &str, error: AddressError) -> Refusal {
    Refusal::Value {
        reason: format!("\"{text}\" {error}"),
        fix: error.fix().into(),
    }
}

fn seeds(list: &DeArray<'_>) -> Result<Value, Refusal> {
    let mut seeds = Vec::new();
    for item in list.iter() {
        let DeValue::String(text) = item.get_ref() else {
            return Err(Refusal::Type);
        };
        let (key, at) = text.split_once('@').ok_or_else(|| Refusal::Value {
            reason: format!("\"{text}\" has no \"@\" between public key and address"),
            fix: "write \"<64 hexadecimal digits>@192.0.2.1:4100\"".into(),
        })?;
        let (key, tls_key) = match key.split_once('/') {
            Some((key, tls_key)) => (key, Some(tls_key)),
            None => (key, None),
        };
        seeds.push(Seed {
            public_key: public_key(key)?,
            tls_key: tls_key.map(public_key).transpose()?,
            address: at.parse().map_err(|error| address(at, error))?,
        });
    }
    Ok(Value::Seeds(seeds))
}

fn cores(list: &DeArray<'_>) -> Result<Value, Refusal> {
    let mut cores = Vec::new();
    for item in list.iter() {
        let cpu = integer(item.get_ref())?;
        if cores.contains(&cpu) {
            return Err(Refusal::Value {
                reason: format!("core {cpu} is listed twice"),
                fix: "list every core once; a core runs one shard".into(),
            });
        }
        cores.push(cpu);
    }
    if cores.is_empty() {
        return Err(Refusal::Value {
            reason: "the list is empty".into(),
            fix: "list at least one core, or write \"auto\"".into(),
        });
    }
    Ok(Value::Cores(Cores::List(cores)))
}

/// The nearest allowed value when outside the bounds.
fn out_of_range(kind: Kind, value: &Value) -> Option<String> {
    fn clamp<T: Ord>(value: T, min: T, max: T) -> Option<T> {
        if value < min {
            return Some(min);
        }
        (value > max).then_some(max)
    }
    match (kind, value) {
        (Kind::Integer { min, max }, Value::Integer(v)) => {
            clamp(*v, min, max).map(|v| v.to_string())
        }
        (Kind::Bytes { min, max }, Value::Bytes(v)) => {
            clamp(*v, min, max).map(|v| format!("\"{v}\""))
        }
        (Kind::Duration { min, max }, Value::Duration(v)) => {
            clamp(*v, min, max).map(|v| format!("\"{v}\""))
        }
        _ => None,
    }
}

/// The section that has a key of this name, when exactly one has.
fn owner_of(name: &str) -> Option<&'static str> {
    let mut owners = schema::sections()
        .iter()
        .filter(|section| section.field(name).is_some());
    let first = owners.next()?;
    owners.next().is_none().then_some(first.name)
}

/// The nearest known word, or all of them when none is near.
fn hint(word: &str, known: &[&str]) -> String {
    let nearest = known
        .iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), *candidate))
        .min();
    match nearest {
        Some((distance, candidate)) if distance <= 2.max(candidate.len() / 3) => {
            format!("did you mean \"{candidate}\"?")
        }
        _ => format!("use one of {}", known.join(", ")),
    }
}

fn type_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

#[cfg(test)]
mod tests;
