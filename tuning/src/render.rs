//! The printed forms: the commented default file, the effective values, and the reference page.

use std::fmt::Write;

use crate::config::NodeConfig;
use crate::parse::Parsed;
use crate::problem::Position;
use crate::schema::{self, CORE_NAME, Field, Presence, SHARDS_NAME, Value};

/// Columns of a comment in the default file, and of a paragraph of the reference page.
const COLUMNS: usize = 96;

/// The default config with the documentation of every key above it. Required keys stand with an
/// example behind a `#`.
pub fn default_file() -> String {
    let defaults = NodeConfig::default();
    let mut out = String::from(
        "# Millrace node. Every key is shown with its default; only those marked `required` must be set.\n\
         # Sizes are written with a unit (\"64MiB\"), durations too (\"250ms\").\n",
    );
    for section in schema::sections() {
        out.push('\n');
        comment(&mut out, section.doc);
        let _ = writeln!(out, "[{}]", section.name);
        for field in section.fields {
            comment(&mut out, &documented(field));
            match field.presence {
                Presence::Default => {
                    let _ = writeln!(out, "{} = {}", field.name, field.value(&defaults));
                }
                Presence::Optional | Presence::Required => {
                    let _ = writeln!(out, "# {} = {}", field.name, field.example);
                }
            }
        }
        if section.name == SHARDS_NAME {
            out.push('\n');
            comment(
                &mut out,
                "One core with values of its own; what is not written comes from [shards].",
            );
            let _ = writeln!(
                out,
                "# [[{SHARDS_NAME}.{CORE_NAME}]]\n# cpu = 1\n# spin = \"100us\""
            );
        }
    }
    out
}

/// One effective value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// Dotted name.
    pub key: String,
    /// The value as TOML; empty when absent.
    pub value: Value,
    /// Position of the key; `None` for a default.
    pub origin: Option<Position>,
}

/// All effective values, in the order of the table.
pub fn effective(parsed: &Parsed) -> Vec<Effective> {
    let mut all = Vec::new();
    for section in schema::sections() {
        for field in section.fields {
            let key = format!("{}.{}", section.name, field.name);
            let origin = parsed.origins.of(&key);
            all.push(Effective {
                value: field.value(&parsed.config),
                origin,
                key,
            });
        }
        if section.name == SHARDS_NAME {
            for (index, core) in parsed.config.shards.core.iter().enumerate() {
                for field in schema::core_fields() {
                    let key = format!("{SHARDS_NAME}.{CORE_NAME}.{index}.{}", field.name);
                    // A value that a core does not write comes from [shards], and so does its
                    // origin.
                    let origin = parsed
                        .origins
                        .of(&key)
                        .or_else(|| parsed.origins.of(&format!("{SHARDS_NAME}.{}", field.name)));
                    all.push(Effective {
                        value: field.value(core),
                        origin,
                        key,
                    });
                }
            }
        }
    }
    all
}

/// The text of `docs/reference/config.md`.
pub fn reference_markdown() -> String {
    let defaults = NodeConfig::default();
    let mut out = String::from(
        "# Configuration\n\n\
         Generated from the schema table (`make docs`); do not edit.\n\n\
         A config is one TOML file. Unknown keys are refused. `millrace check --config FILE` reports all\n\
         mistakes at once; `millrace config default` prints a file to start from; `millrace config show\n\
         --config FILE` prints what is in force and where it comes from.\n",
    );
    for section in schema::sections() {
        let _ = writeln!(out, "\n## [{}]\n", section.name);
        paragraph(&mut out, "", section.doc);
        out.push('\n');
        table_head(&mut out);
        for field in section.fields {
            row(&mut out, field, &field.value(&defaults));
        }
        if section.name == SHARDS_NAME {
            let _ = writeln!(
                out,
                "\n## [[{SHARDS_NAME}.{CORE_NAME}]]\n\nOne core with values of its own. What is not written comes from [{SHARDS_NAME}].\n"
            );
            table_head(&mut out);
            for field in schema::core_fields() {
                let value = if field.presence == Presence::Required {
                    Value::Absent
                } else {
                    Value::Text("that of [shards]".into())
                };
                row(&mut out, field, &value);
            }
        }
    }
    out
}

fn table_head(out: &mut String) {
    out.push_str("| key | kind | default | allowed | meaning |\n|---|---|---|---|---|\n");
}

fn row<C>(out: &mut String, field: &Field<C>, default: &Value) {
    let default = match (field.presence, default) {
        (Presence::Required, _) => "required".to_owned(),
        (Presence::Optional, _) => "none".to_owned(),
        (Presence::Default, value) => format!("`{value}`"),
    };
    let bounds = field.kind.bounds();
    let _ = writeln!(
        out,
        "| `{}` | {} | {default} | {bounds} | {} |",
        field.name,
        field.kind.title(),
        field.doc.replace('|', "\\|")
    );
}

fn documented<C>(field: &Field<C>) -> String {
    let bounds = field.kind.bounds();
    let mut text = field.doc.to_owned();
    if !bounds.is_empty() {
        let _ = write!(text, " ({bounds})");
    }
    if field.presence == Presence::Required {
        text.push_str(" Required.");
    }
    text
}

fn comment(out: &mut String, text: &str) {
    paragraph(out, "# ", text);
}

/// `text` in lines of at most [`COLUMNS`], each after `prefix`.
fn paragraph(out: &mut String, prefix: &str, text: &str) {
    let mut line = String::from(prefix);
    for word in text.split_whitespace() {
        if line.len() > prefix.len() {
            if line.len() + 1 + word.len() > COLUMNS {
                let _ = writeln!(out, "{line}");
                line.truncate(prefix.len());
            } else {
                line.push(' ');
            }
        }
        line.push_str(word);
    }
    let _ = writeln!(out, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::parse;
    use crate::problem::ProblemKind;

    /// What `config default` prints is itself a valid config, apart from the required keys, and
    /// equals the defaults.
    #[test]
    fn the_default_file_parses_back_to_the_defaults() {
        let parsed = parse(&default_file());
        assert_eq!(parsed.config, NodeConfig::default());
        let kinds: Vec<_> = parsed
            .problems
            .iter()
            .map(|p| (p.kind, p.key.as_str()))
            .collect();
        assert_eq!(kinds, [(ProblemKind::MissingKey, "registry.public_key")]);
        assert!(default_file().lines().all(|line| line.len() <= COLUMNS));
    }

    #[test]
    fn effective_values_know_where_they_come_from() {
        let parsed = parse(
            "[shards]\nspin = \"50us\"\n[[shards.core]]\ncpu = 1\nring_entries = 128\n[transport]\nlanes = 2\n",
        );
        let all = effective(&parsed);
        let find = |key: &str| all.iter().find(|e| e.key == key).unwrap();
        assert_eq!(find("transport.lanes").value, Value::Integer(2));
        assert_eq!(find("transport.lanes").origin.unwrap().line, 7);
        assert_eq!(find("transport.keep_alive").origin, None);
        assert_eq!(find("shards.core.0.spin").origin.unwrap().line, 2);
        assert_eq!(find("shards.core.0.ring_entries").origin.unwrap().line, 5);
        assert_eq!(find("node.subnet").value, Value::Absent);
    }

    #[test]
    fn the_reference_has_a_row_for_every_key() {
        let page = reference_markdown();
        for section in schema::sections() {
            assert!(page.contains(&format!("## [{}]", section.name)));
            for field in section.fields {
                assert!(
                    page.contains(&format!("| `{}` |", field.name)),
                    "{}",
                    field.name
                );
            }
        }
    }
}
