//! The registry as a config names it.

use std::path::PathBuf;
use std::time::Duration;

use millrace_protocol::identity::PublicKey;
use millrace_protocol::names::NamesConfig;
use millrace_protocol::registry::RegistryConfig;
use millrace_protocol::tls_keys::TlsKeys;
use millrace_registry::{
    KeptVersion, KeyError, KnownNode, Sources, Versions, VersionsConfig, keys,
};
use millrace_tuning::NodeConfig;
use millrace_tuning::config::Seed;

use crate::error::StartError;

/// How long the registry folder may take to be read at the start of a node.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// Where a node gets registry versions from, besides its peers.
#[derive(Debug, Clone)]
pub struct RegistrySource {
    /// The key that signs the versions.
    pub public_key: PublicKey,
    /// A folder that is read every `registry.poll_interval`; none: the embedder offers versions.
    pub folder: Option<PathBuf>,
    /// Where the newest version is kept, so that a restart goes back to no older one.
    pub kept: Kept,
}

/// Where the newest version that a node has seen is kept.
#[derive(Debug, Clone)]
pub enum Kept {
    /// Nowhere: the next run knows what its folder, its peers and its embedder give it.
    Nowhere,
    /// In this folder, for the node that holds the lock of the state folder.
    In(PathBuf),
    /// In this folder, for a command beside the node: it is read only.
    ReadOnly(PathBuf),
}

/// The versions that a node with the key `me` holds before it starts: the one that is kept, and
/// what the folder has. The folder is read once.
///
/// # Errors
/// [`StartError::Config`] for a subnet that is none, [`StartError::Key`] for a seed's key that is
/// none; [`StartError::NotPermitted`] or [`StartError::Host`] if the folder of the kept version
/// cannot be read or made.
pub fn versions(
    me: &PublicKey,
    config: &NodeConfig,
    source: RegistrySource,
) -> Result<Versions, StartError> {
    let limits = RegistryConfig {
        versions_max: usize::try_from(config.registry.versions_max).unwrap_or(usize::MAX),
        ..RegistryConfig::default()
    };
    let key = source.public_key;
    let kept = match &source.kept {
        Kept::Nowhere => None,
        Kept::In(dir) => Some((dir, KeptVersion::open(dir, &key, &limits))),
        Kept::ReadOnly(dir) => Some((dir, KeptVersion::read_only(dir, &key, &limits))),
    };
    let kept = kept.map(|(dir, kept)| kept.map_err(|error| StartError::io(dir.display(), error)));
    let sources = Sources {
        key,
        config: limits,
        folder: source.folder,
        kept: kept.transpose()?,
    };
    let subnet = match &config.node.subnet {
        Some(text) => Some(text.parse().map_err(|error| StartError::Config {
            key: format!("node.subnet = \"{text}\""),
            reason: format!("{error}"),
        })?),
        None => None,
    };
    let seed = |seed: &Seed| {
        let public_key = keys::public_from_hex(&seed.public_key)?;
        let tls_key = seed.tls_key.as_deref().map(keys::public_from_hex);
        Ok(KnownNode {
            public_key,
            tls_keys: TlsKeys::one(tls_key.transpose()?.unwrap_or(public_key)),
            addresses: vec![seed.address.clone()],
        })
    };
    let seeds = config.registry.seeds.iter().map(seed);
    let known = VersionsConfig {
        subnet,
        seeds: seeds.collect::<Result<_, KeyError>>()?,
        listen: vec![config.listen.address],
        names: NamesConfig {
            interval: config.registry.resolve_interval.get(),
            ..NamesConfig::default()
        },
    };
    let folder = sources.folder.clone().unwrap_or_default();
    let versions = Versions::new(me, known, sources);
    versions
        .poll_folder_within(READ_WITHIN)
        .map_err(|error| StartError::io(folder.display(), error))?;
    Ok(versions)
}
