//! `millrace config`: the default file and the values in force.

use std::collections::BTreeMap;

use millrace_tuning::render;
use serde::Serialize;

use crate::cli::{ConfigCommand, ConfigShowArgs};
use crate::exit::{Exit, Failure};
use crate::load::{Loaded, print_problems};
use crate::output;

pub(crate) fn run(command: ConfigCommand) -> Result<Exit, Failure> {
    match command {
        ConfigCommand::Default(args) if args.json => {
            let defaults = render::effective(&millrace_tuning::parse(""));
            let values: BTreeMap<&str, String> = defaults
                .iter()
                .map(|value| (value.key.as_str(), plain(&value.value.to_string())))
                .collect();
            output::json(&values)?;
            Ok(Exit::Ok)
        }
        ConfigCommand::Default(_) => {
            output::text(&render::default_file())?;
            Ok(Exit::Ok)
        }
        ConfigCommand::Show(args) => show(&args),
    }
}

#[derive(Serialize)]
struct Shown {
    key: String,
    value: String,
    origin: String,
}

fn show(args: &ConfigShowArgs) -> Result<Exit, Failure> {
    let loaded = Loaded::read(&args.config)?;
    let file = loaded.file.display().to_string();
    let shown: Vec<Shown> = render::effective(&loaded.parsed)
        .into_iter()
        .map(|value| Shown {
            origin: match value.origin {
                Some(position) => format!("{file}:{}", position.line),
                None => "default".into(),
            },
            value: value.value.to_string(),
            key: value.key,
        })
        .collect();
    if args.json {
        let shown: Vec<Shown> = shown
            .into_iter()
            .map(|value| Shown {
                value: plain(&value.value),
                ..value
            })
            .collect();
        output::json(&shown)?;
    } else {
        let width = shown.iter().map(|value| value.key.len()).max().unwrap_or(0);
        let values = shown
            .iter()
            .map(|value| value.value.len())
            .max()
            .unwrap_or(0)
            .min(40);
        for value in &shown {
            output::data(format_args!(
                "{:width$} = {:values$}  # {}",
                value.key, value.value, value.origin
            ))?;
        }
    }
    print_problems(&loaded.file, &loaded.parsed.problems);
    Ok(if loaded.parsed.is_usable() {
        Exit::Ok
    } else {
        Exit::BadConfig
    })
}

/// A TOML value without the quotes around it.
fn plain(value: &str) -> String {
    let inner = value
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'));
    inner.unwrap_or(value).to_owned()
}
