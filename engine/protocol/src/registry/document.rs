//! The TOML form of a version.
//!
//! It is read value by value, not into one serde structure, so that a bad record loses only itself.
//! Unknown keys are ignored, so that a later registry may add some.

use super::{NUMBER_MAX, NodeRecord, RegistryError, RegistryVersion, SkippedRecord, SubnetRecord};
use crate::{
    address::{AddressError, NodeAddress},
    id::NodeId,
    identity::PublicKey,
    tls_keys::TlsKeys,
};
use std::collections::{BTreeMap, BTreeSet};
use toml::{Table, Value};

/// Most addresses read of one node; later ones are ignored.
const ADDRESSES_MAX: usize = 8;

type Skip = (&'static str, String);

pub(super) fn parse(document: &str) -> Result<RegistryVersion, RegistryError> {
    let mut table: Table = document
        .parse()
        .map_err(|e: toml::de::Error| RegistryError::Syntax(e.to_string()))?;
    let number = match table.get("number") {
        Some(Value::Integer(number)) => u64::try_from(*number).unwrap_or(0),
        _ => return Err(RegistryError::Syntax("`number` is missing".into())),
    };
    if !(1..=NUMBER_MAX).contains(&number) {
        return Err(RegistryError::Number(number));
    }
    let mut version = RegistryVersion {
        number,
        ..RegistryVersion::default()
    };
    if let Some(Value::Table(settings)) = table.remove("settings") {
        version.settings = settings;
    }
    let mut skipped = Vec::new();
    let mut names = BTreeSet::new();
    version.subnets = records(&mut table, "subnets", &mut skipped, |record| {
        let subnet = subnet(record)?;
        unique(&mut names, subnet.id).map(|()| subnet)
    });
    let mut names = BTreeSet::new();
    version.nodes = records(&mut table, "nodes", &mut skipped, |record| {
        let node = node(&record)?;
        unique(&mut names, node.id).map(|()| node)
    });
    own_keys(&version.nodes)?;
    version.firewall = records(&mut table, "firewall", &mut skipped, Ok);
    version.skipped = skipped;
    Ok(version)
}

fn records<T>(
    table: &mut Table,
    name: &'static str,
    skipped: &mut Vec<SkippedRecord>,
    mut read: impl FnMut(Table) -> Result<T, Skip>,
) -> Vec<T> {
    let values = match table.remove(name) {
        Some(Value::Array(values)) => values,
        Some(_) => {
            let detail = format!("`{name}` is not a list of tables");
            skipped.push(SkippedRecord {
                table: name,
                index: 0,
                reason: "record_form",
                detail,
            });
            return Vec::new();
        }
        None => return Vec::new(),
    };
    let mut out = Vec::with_capacity(values.len());
    for (index, value) in values.into_iter().enumerate() {
        let record = match value {
            Value::Table(record) => read(record),
            _ => Err(("record_form", "not a table".into())),
        };
        match record {
            Ok(record) => out.push(record),
            Err((reason, detail)) => {
                skipped.push(SkippedRecord {
                    table: name,
                    index,
                    reason,
                    detail,
                });
            }
        }
    }
    out
}

fn subnet(mut record: Table) -> Result<SubnetRecord, Skip> {
    let id = field(&record, "id", "record_id")?;
    let name = record.get("name").and_then(Value::as_str).map(String::from);
    let settings = match record.remove("settings") {
        Some(Value::Table(settings)) => settings,
        _ => Table::new(),
    };
    Ok(SubnetRecord { id, name, settings })
}

fn node(record: &Table) -> Result<NodeRecord, Skip> {
    let id: NodeId = field(record, "id", "record_id")?;
    let public_key: PublicKey = field(record, "public_key", "record_public_key")?;
    if public_key.node_id() != id {
        return Err((
            "record_key_of_another",
            format!("`public_key` does not make node {id}"),
        ));
    }
    let subnet = field(record, "subnet", "record_subnet")?;
    let values = record
        .get("addresses")
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    if values.is_empty() || values.len() > ADDRESSES_MAX {
        let detail = format!(
            "{} addresses; 1 to {ADDRESSES_MAX} are allowed",
            values.len()
        );
        return Err(("record_addresses", detail));
    }
    let addresses = values.iter().map(address).collect::<Result<_, _>>()?;
    Ok(NodeRecord {
        tls_keys: tls_keys(record, public_key)?,
        ..NodeRecord::new(public_key, subnet, addresses)
    })
}

/// The TLS keys of a record; without any, the identity key.
fn tls_keys(record: &Table, public_key: PublicKey) -> Result<TlsKeys, Skip> {
    let refused = |detail: String| ("record_tls_keys", format!("`tls_keys`: {detail}"));
    let values = match record.get("tls_keys") {
        None => return Ok(TlsKeys::one(public_key)),
        Some(Value::Array(values)) => values,
        Some(_) => return Err(refused("not a list".into())),
    };
    let read = |value: &Value| {
        let key = value.as_str().unwrap_or_default().parse();
        key.map_err(|error| refused(format!("{value}: {error}")))
    };
    let keys = values.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    TlsKeys::of(&keys).map_err(|error| refused(error.to_string()))
}

/// Checks that no two nodes share a key: a handshake that proves it would prove either.
fn own_keys(nodes: &[NodeRecord]) -> Result<(), RegistryError> {
    let mut owners = BTreeMap::new();
    for node in nodes {
        for key in node.tls_keys.iter().chain([node.public_key]) {
            let owner = owners.insert(key, node.id);
            if let Some(other) = owner.filter(|owner| *owner != node.id) {
                let nodes = [other, node.id];
                return Err(RegistryError::SharedKey { key, nodes });
            }
        }
    }
    Ok(())
}

fn address(value: &Value) -> Result<NodeAddress, Skip> {
    let text = value.as_str().unwrap_or_default();
    text.parse().map_err(|error: AddressError| {
        let fix = error.fix();
        ("record_address", format!("{value} {error}; {fix}"))
    })
}

fn field<T: std::str::FromStr<Err: std::fmt::Display>>(
    record: &Table,
    key: &str,
    reason: &'static str,
) -> Result<T, Skip> {
    let text = record
        .get(key)
        .and_then(Value::as_str)
        .ok_or_else(|| (reason, format!("`{key}` is missing")))?;
    text.parse()
        .map_err(|error| (reason, format!("`{key}`: {error}")))
}

fn unique<T: Ord>(names: &mut BTreeSet<T>, name: T) -> Result<(), Skip> {
    let detail = || "an earlier record has the same `id`".into();
    names
        .insert(name)
        .then_some(())
        .ok_or_else(|| ("record_duplicate", detail()))
}

pub(super) fn write(version: &RegistryVersion) -> String {
    let mut table = Table::new();
    table.insert("number".into(), Value::Integer(version.number as i64));
    let subnets = version.subnets.iter().map(|subnet| {
        let mut record = Table::new();
        record.insert("id".into(), subnet.id.to_string().into());
        if let Some(name) = &subnet.name {
            record.insert("name".into(), name.clone().into());
        }
        if !subnet.settings.is_empty() {
            record.insert("settings".into(), subnet.settings.clone().into());
        }
        Value::Table(record)
    });
    let nodes = version.nodes.iter().map(|node| {
        let addresses = node
            .addresses
            .iter()
            .map(|a| Value::from(a.to_string()))
            .collect();
        let mut record = Table::from_iter([
            ("id".to_string(), node.id.to_string().into()),
            ("public_key".to_string(), node.public_key.to_string().into()),
            ("subnet".to_string(), node.subnet.to_string().into()),
            ("addresses".to_string(), Value::Array(addresses)),
        ]);
        // A node that never rotated has the record that it had before there were TLS keys.
        if node.tls_keys != TlsKeys::one(node.public_key) {
            let keys = node.tls_keys.iter().map(|key| key.to_string().into());
            record.insert("tls_keys".into(), Value::Array(keys.collect()));
        }
        Value::Table(record)
    });
    let firewall = version.firewall.iter().cloned().map(Value::Table);
    let lists: [(&str, Vec<Value>); 3] = [
        ("subnets", subnets.collect()),
        ("nodes", nodes.collect()),
        ("firewall", firewall.collect()),
    ];
    for (name, list) in lists {
        if !list.is_empty() {
            table.insert(name.into(), Value::Array(list));
        }
    }
    if !version.settings.is_empty() {
        table.insert("settings".into(), version.settings.clone().into());
    }
    toml::to_string_pretty(&table).expect("a table of tables and strings has a TOML form")
}
