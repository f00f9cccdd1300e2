//! `millrace registry`: keeps a folder of signed versions.

use std::path::Path;

use millrace_protocol::id::{NodeId, SubnetId};
use millrace_protocol::identity::{PublicKey, SigningKey};
use millrace_protocol::registry::{RegistryConfig, RegistryVersion, SignedVersion, SubnetRecord};
use millrace_protocol::tls_keys::TlsKeys;
use millrace_registry::draft::sign_document;
use millrace_registry::{Draft, DraftError, folder, keys};
use serde::Serialize;

use crate::cli::{
    RegistryAddArgs, RegistryCommand, RegistryInitArgs, RegistryRemoveArgs, RegistryRotateArgs,
    RegistryShowArgs, RegistrySignArgs,
};
use crate::exit::{Exit, Failure};
use crate::output;

pub(crate) fn run(command: RegistryCommand) -> Result<Exit, Failure> {
    match command {
        RegistryCommand::Init(args) => init(&args),
        RegistryCommand::AddNode(args) => add_node(&args),
        RegistryCommand::RemoveNode(args) => remove_node(&args),
        RegistryCommand::Rotate(args) => rotate(&args),
        RegistryCommand::Show(args) => show(&args),
        RegistryCommand::Sign(args) => sign(&args),
    }
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
    let draft = Draft::first(&args.subnet_name)?;
    publish(&args.dir, &key, &draft)?;
    let version = draft.version();
    report(&key, version, args.json)?;
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
    let mut draft = next(&args.dir, &key)?;
    let subnet = subnet_of(&draft, args.subnet.as_deref())?;
    let public_key = keys::public_from_hex(&args.public_key)?;
    draft.set_node(public_key, subnet, args.address.iter().cloned());
    publish(&args.dir, &key, &draft)?;
    report(&key, draft.version(), args.json)?;
    Ok(Exit::Ok)
}

fn remove_node(args: &RegistryRemoveArgs) -> Result<Exit, Failure> {
    let key = keys::read(&args.key)?;
    let mut draft = next(&args.dir, &key)?;
    draft.remove_node(node_id(&args.node)?)?;
    publish(&args.dir, &key, &draft)?;
    report(&key, draft.version(), args.json)?;
    Ok(Exit::Ok)
}

fn rotate(args: &RegistryRotateArgs) -> Result<Exit, Failure> {
    let key = keys::read(&args.key)?;
    let mut draft = next(&args.dir, &key)?;
    let node = node_id(&args.node)?;
    let step = &args.step;
    match &step.tls_key {
        Some(text) => {
            let new = keys::public_from_hex(text)?;
            draft.rotate(node, |keys| keys.begin(new))?;
        }
        None if step.finish => draft.rotate(node, TlsKeys::finish)?,
        None => draft.rotate(node, TlsKeys::abandon)?,
    }
    publish(&args.dir, &key, &draft)?;
    report(&key, draft.version(), args.json)?;
    if step.tls_key.is_some() && !args.json {
        output::message(
            "when `millrace status` of the node shows the key as newest, and no connection by an \
             older one, run this with --finish",
        );
    }
    Ok(Exit::Ok)
}

fn node_id(text: &str) -> Result<NodeId, Failure> {
    text.parse()
        .map_err(|error| usage(&format!("\"{text}\": {error}")))
}

fn sign(args: &RegistrySignArgs) -> Result<Exit, Failure> {
    let key = keys::read(&args.key)?;
    let name = args.document.display();
    let document =
        std::fs::read_to_string(&args.document).map_err(|error| Failure::io(&name, &error))?;
    let (signed, version) = sign_document(document, &key)?;
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
        match folder::read_verified(&args.dir, number, &key, &config) {
            Ok((_, version)) => newest = Some(version),
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

/// The newest version with the next number.
fn next(dir: &Path, key: &SigningKey) -> Result<Draft, Failure> {
    let newest = numbers(dir)?.last().copied().ok_or_else(|| {
        let message = format!(
            "{} holds no version; run `millrace registry init`",
            dir.display()
        );
        Failure::new(Exit::Failed, message)
    })?;
    let config = RegistryConfig::default();
    let (_, version) = folder::read_verified(dir, newest, &key.public_key(), &config)
        .map_err(|error| Failure::new(Exit::Failed, format!("version {newest}: {error}")))?;
    for skipped in &version.skipped {
        output::message(format_args!(
            "{}[{}] cannot be used and is left out: {}",
            skipped.table, skipped.index, skipped.detail
        ));
    }
    Ok(Draft::after(version))
}

fn subnet_of(draft: &Draft, wanted: Option<&str>) -> Result<SubnetId, Failure> {
    let version = draft.version();
    let Some(wanted) = wanted else {
        return draft.only_subnet().map_err(|error| match error {
            DraftError::SubnetNeeded { .. } => usage(&format!("{error} with --subnet")),
            error => error.into(),
        });
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

/// Signs a draft and adds it to the folder.
fn publish(dir: &Path, key: &SigningKey, draft: &Draft) -> Result<(), Failure> {
    write(dir, draft.version().number, &draft.sign(key)?)
}

fn write(dir: &Path, number: u64, signed: &SignedVersion) -> Result<(), Failure> {
    folder::write(dir, number, signed).map_err(|error| {
        Failure::io(
            format_args!("version {number} in {}", dir.display()),
            &error,
        )
    })
}

fn numbers(dir: &Path) -> Result<Vec<u64>, Failure> {
    folder::list(dir).map_err(|error| Failure::io(dir.display(), &error))
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
            if node.tls_keys != [node.public_key.as_str()] {
                let keys = node.tls_keys.join(" ");
                output::data(format_args!("    tls keys  {keys}"))?;
            }
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
    /// The older one first.
    tls_keys: Vec<String>,
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
                    tls_keys: node
                        .tls_keys
                        .iter()
                        .map(|key| keys::public_hex(&key))
                        .collect(),
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
