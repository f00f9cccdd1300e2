//! `millrace registry`: keeps a folder of signed versions.

use std::path::Path;

use millrace_protocol::id::{NodeId, SubnetId};
use millrace_protocol::identity::{PublicKey, SigningKey};
use millrace_protocol::registry::{
    NodeRecord, RegistryConfig, RegistryError, RegistryVersion, SignedVersion, SubnetRecord,
};
use serde::Serialize;

use crate::cli::{
    RegistryAddArgs, RegistryCommand, RegistryInitArgs, RegistryRemoveArgs, RegistryShowArgs,
    RegistrySignArgs,
};
use crate::exit::{Exit, Failure};
use crate::registry_dir::{self, VersionError};
use crate::{keys, output};

pub(crate) fn run(command: RegistryCommand) -> Result<Exit, Failure> {
    match command {
        RegistryCommand::Init(args) => init(&args),
        RegistryCommand::AddNode(args) => add_node(&args),
        RegistryCommand::RemoveNode(args) => remove_node(&args),
        RegistryCommand::Show(args) => show(&args),
        RegistryCommand::Sign(args) => sign(&args),
    }
}

/// A subnet's id is made from a public key; whoever holds its secret could sign for the subnet. Here nobody does.
pub(crate) fn fresh_subnet_id() -> Result<SubnetId, Failure> {
    let key = keys::ephemeral()?.public_key();
    Ok(SubnetId::from_public_key_der(&key.to_spki_der()))
}

/// Signs a version and adds it to the folder.
pub(crate) fn publish(
    dir: &Path,
    key: &SigningKey,
    version: &RegistryVersion,
) -> Result<(), Failure> {
    let signed = SignedVersion::sign(version.to_document(), key);
    write(dir, version.number, &signed)
}

fn init(args: &RegistryInitArgs) -> Result<Exit, Failure> {
    std::fs::create_dir_all(&args.dir).map_err(|e| Failure::io(args.dir.display(), &e))?;
    if !numbers(&args.dir)?.is_empty() {
        let message = format!("{} holds versions already", args.dir.display());
        return Err(Failure::new(Exit::Failed, message));
    }
    let key = if args.key.exists() {
        keys::read(&args.key)?
    } else {
        keys::create(&args.key)?
    };
    let subnet = fresh_subnet_id()?;
    let version = RegistryVersion {
        number: 1,
        subnets: vec![SubnetRecord {
            id: subnet,
            name: Some(args.subnet_name.clone()),
            settings: Default::default(),
        }],
        ..RegistryVersion::default()
    };
    publish(&args.dir, &key, &version)?;
    report(&key, &version, args.json)?;
    if !args.json {
        output::message(format_args!(
            "put `public_key = \"{}\"` below [registry] in every node's config",
            keys::public_hex(&key.public_key())
        ));
    }
    Ok(Exit::Ok)
}

fn add_node(args: &RegistryAddArgs) -> Result<Exit, Failure> {
    let key = keys::read(&args.key)?;
    let mut version = next(&args.dir, &key)?;
    let subnet = subnet_of(&version, args.subnet.as_deref())?;
    let public_key = keys::public_from_hex(&args.public_key)?;
    let record = NodeRecord {
        id: public_key.node_id(),
        public_key,
        subnet,
        addresses: args.address.clone(),
    };
    version.nodes.retain(|node| node.id != record.id);
    version.nodes.push(record);
    publish_checked(&args.dir, &key, &version)?;
    report(&key, &version, args.json)?;
    Ok(Exit::Ok)
}

fn remove_node(args: &RegistryRemoveArgs) -> Result<Exit, Failure> {
    let key = keys::read(&args.key)?;
    let mut version = next(&args.dir, &key)?;
    let id: NodeId = args
        .node
        .parse()
        .map_err(|error| usage(&format!("\"{}\": {error}", args.node)))?;
    let before = version.nodes.len();
    version.nodes.retain(|node| node.id != id);
    if version.nodes.len() == before {
        let message = format!("no node {id} in version {}", version.number - 1);
        return Err(Failure::new(Exit::Failed, message));
    }
    publish_checked(&args.dir, &key, &version)?;
    report(&key, &version, args.json)?;
    Ok(Exit::Ok)
}

fn sign(args: &RegistrySignArgs) -> Result<Exit, Failure> {
    let key = keys::read(&args.key)?;
    let name = args.document.display();
    let document =
        std::fs::read_to_string(&args.document).map_err(|error| Failure::io(&name, &error))?;
    let signed = SignedVersion::sign(document, &key);
    let version = acceptable(&signed, &key)?;
    let newest = numbers(&args.dir)?.last().copied().unwrap_or(0);
    if version.number != newest + 1 {
        return Err(Failure::new(
            Exit::Failed,
            format!(
                "{name} has number {}, the next one is {}",
                version.number,
                newest + 1
            ),
        ));
    }
    write(&args.dir, version.number, &signed)?;
    report(&key, &version, args.json)?;
    Ok(Exit::Ok)
}

fn show(args: &RegistryShowArgs) -> Result<Exit, Failure> {
    let key = keys::public_from_hex(&args.public_key)?;
    let config = RegistryConfig::default();
    let mut newest = None;
    let mut refused = Vec::new();
    for number in numbers(&args.dir)? {
        match verified(&args.dir, number, &key, &config) {
            Ok(version) => newest = Some(version),
            Err(error) => refused.push(Refused {
                number,
                reason: error.reason(),
                detail: error.to_string(),
            }),
        }
    }
    for one in &refused {
        output::message(format_args!(
            "version {}: {} ({})",
            one.number, one.detail, one.reason
        ));
    }
    let Some(version) = newest else {
        let message = format!("{} holds no version signed by that key", args.dir.display());
        return Err(Failure::new(Exit::Problems, message));
    };
    let exit = if refused.is_empty() {
        Exit::Ok
    } else {
        Exit::Problems
    };
    print(&Shown::of(&key, &version, refused), args.json)?;
    Ok(exit)
}

fn verified(
    dir: &Path,
    number: u64,
    key: &PublicKey,
    config: &RegistryConfig,
) -> Result<RegistryVersion, VersionError> {
    let version = registry_dir::read(dir, number, config)?.verify(key, config)?;
    if version.number != number {
        return Err(VersionError::Misnamed {
            number: version.number,
            name: number,
        });
    }
    Ok(version)
}

/// The newest version with the next number.
fn next(dir: &Path, key: &SigningKey) -> Result<RegistryVersion, Failure> {
    let newest = numbers(dir)?.last().copied().ok_or_else(|| {
        let message = format!(
            "{} holds no version; run `millrace registry init`",
            dir.display()
        );
        Failure::new(Exit::Failed, message)
    })?;
    let version = verified(dir, newest, &key.public_key(), &RegistryConfig::default())
        .map_err(|error| Failure::new(Exit::Failed, format!("version {newest}: {error}")))?;
    for skipped in &version.skipped {
        output::message(format_args!(
            "{}[{}] cannot be used and is left out: {}",
            skipped.table, skipped.index, skipped.detail
        ));
    }
    Ok(RegistryVersion {
        number: newest + 1,
        ..version
    })
}

fn subnet_of(version: &RegistryVersion, wanted: Option<&str>) -> Result<SubnetId, Failure> {
    let Some(wanted) = wanted else {
        return match version.subnets.as_slice() {
            [only] => Ok(only.id),
            subnets => Err(usage(&format!(
                "the registry has {} subnets: name one with --subnet",
                subnets.len()
            ))),
        };
    };
    let by_name = |subnet: &&SubnetRecord| {
        subnet.id.to_string() == wanted || subnet.name.as_deref() == Some(wanted)
    };
    let found = version.subnets.iter().find(by_name);
    found.map(|subnet| subnet.id).ok_or_else(|| {
        usage(&format!(
            "no subnet \"{wanted}\" in version {}",
            version.number - 1
        ))
    })
}

/// Refuses to publish what nodes would skip: an unusable address, too many of them.
fn publish_checked(dir: &Path, key: &SigningKey, version: &RegistryVersion) -> Result<(), Failure> {
    let signed = SignedVersion::sign(version.to_document(), key);
    acceptable(&signed, key)?;
    write(dir, version.number, &signed)
}

fn acceptable(signed: &SignedVersion, key: &SigningKey) -> Result<RegistryVersion, Failure> {
    let refused = |error: &RegistryError| Failure::new(Exit::Failed, error.to_string());
    let version = signed
        .verify(&key.public_key(), &RegistryConfig::default())
        .map_err(|error| refused(&error))?;
    match version.skipped.first() {
        None => Ok(version),
        Some(skipped) => Err(Failure::new(
            Exit::Failed,
            format!(
                "nodes would skip {}[{}]: {} ({})",
                skipped.table, skipped.index, skipped.detail, skipped.reason
            ),
        )),
    }
}

fn write(dir: &Path, number: u64, signed: &SignedVersion) -> Result<(), Failure> {
    registry_dir::write(dir, number, signed).map_err(|error| {
        Failure::io(
            format_args!("version {number} in {}", dir.display()),
            &error,
        )
    })
}

fn numbers(dir: &Path) -> Result<Vec<u64>, Failure> {
    registry_dir::list(dir).map_err(|error| Failure::io(dir.display(), &error))
}

fn usage(message: &str) -> Failure {
    Failure::new(Exit::Usage, message)
}

fn report(key: &SigningKey, version: &RegistryVersion, json: bool) -> Result<(), Failure> {
    print(&Shown::of(&key.public_key(), version, Vec::new()), json)
}

fn print(shown: &Shown, json: bool) -> Result<(), Failure> {
    if json {
        return output::json(shown);
    }
    output::data(format_args!("version     {}", shown.version))?;
    output::data(format_args!("public key  {}", shown.public_key))?;
    for subnet in &shown.subnets {
        output::data(format_args!("subnet      {}  {}", subnet.id, subnet.name))?;
        for node in shown.nodes.iter().filter(|node| node.subnet == subnet.id) {
            output::data(format_args!(
                "  node      {}  {}",
                node.id,
                node.addresses.join(" ")
            ))?;
        }
    }
    for skipped in &shown.skipped {
        output::message(format_args!("skipped: {skipped}"));
    }
    Ok(())
}

#[derive(Serialize)]
struct Shown {
    version: u64,
    public_key: String,
    subnets: Vec<ShownSubnet>,
    nodes: Vec<ShownNode>,
    skipped: Vec<String>,
    refused: Vec<Refused>,
}

#[derive(Serialize)]
struct ShownSubnet {
    id: String,
    name: String,
}

#[derive(Serialize)]
struct ShownNode {
    id: String,
    public_key: String,
    subnet: String,
    addresses: Vec<String>,
}

#[derive(Serialize)]
struct Refused {
    number: u64,
    reason: &'static str,
    detail: String,
}

impl Shown {
    fn of(key: &PublicKey, version: &RegistryVersion, refused: Vec<Refused>) -> Self {
        Self {
            version: version.number,
            public_key: keys::public_hex(key),
            subnets: version
                .subnets
                .iter()
                .map(|subnet| ShownSubnet {
                    id: subnet.id.to_string(),
                    name: subnet.name.clone().unwrap_or_default(),
                })
                .collect(),
            nodes: version
                .nodes
                .iter()
                .map(|node| ShownNode {
                    id: node.id.to_string(),
                    public_key: keys::public_hex(&node.public_key),
                    subnet: node.subnet.to_string(),
                    addresses: node.addresses.iter().map(ToString::to_string).collect(),
                })
                .collect(),
            skipped: version
                .skipped
                .iter()
                .map(|one| format!("{}[{}]: {}", one.table, one.index, one.detail))
                .collect(),
            refused,
        }
    }
}
