//! The registry as a config names it.

use std::path::PathBuf;

use millrace_protocol::identity::PublicKey;
use millrace_protocol::names::NamesConfig;
use millrace_protocol::registry::RegistryConfig;
use millrace_registry::{Follower, KeyError, KnownNode, Versions, VersionsConfig, keys};
use millrace_tuning::NodeConfig;
use millrace_tuning::config::Seed;

use crate::error::StartError;

/// Where a node gets registry versions from, besides its peers.
#[derive(Debug, Clone)]
pub struct RegistrySource {
    /// The key that signs the versions.
    pub public_key: PublicKey,
    /// A folder that is read every `registry.poll_interval`; none: the embedder offers versions.
    pub folder: Option<PathBuf>,
}

/// The versions that a node with the key `me` holds before it starts: the folder is read once.
///
/// # Errors
/// [`StartError::Config`] for a subnet that is none, [`StartError::Key`] for a seed's key that is
/// none.
pub fn versions(
    me: &PublicKey,
    config: &NodeConfig,
    source: RegistrySource,
) -> Result<Versions, StartError> {
    let limits = RegistryConfig {
        versions_max: usize::try_from(config.registry.versions_max).unwrap_or(usize::MAX),
        ..RegistryConfig::default()
    };
    let follower = Follower::new(source.folder, source.public_key, limits);
    let subnet = match &config.node.subnet {
        Some(text) => Some(text.parse().map_err(|error| StartError::Config {
            key: format!("node.subnet = \"{text}\""),
            reason: format!("{error}"),
        })?),
        None => None,
    };
    let seed = |seed: &Seed| {
        Ok(KnownNode {
            public_key: keys::public_from_hex(&seed.public_key)?,
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
    let versions = Versions::new(me, known, follower);
    versions.poll_folder();
    Ok(versions)
}
