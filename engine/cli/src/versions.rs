//! The registry that a config names.

use std::path::Path;

use millrace_edge_policy::rules::Locality;
use millrace_protocol::identity::PublicKey;
use millrace_protocol::registry::RegistryConfig;
use millrace_protocol::topology::Member;
use millrace_registry::{Follower, Versions, VersionsConfig, keys};
use millrace_tuning::NodeConfig;
use millrace_tuning::config::Seed;

use crate::edge::plan::Firewall;
use crate::exit::{Exit, Failure};

/// The versions in the folder of a config, for the node with the key `me`; read once.
pub(crate) fn of_config(
    me: &PublicKey,
    config: &NodeConfig,
    dir: &Path,
) -> Result<Versions, Failure> {
    let key = keys::public_from_hex(&config.registry.public_key)?;
    let limits = RegistryConfig {
        versions_max: usize::try_from(config.registry.versions_max).unwrap_or(usize::MAX),
        ..RegistryConfig::default()
    };
    let follower = Follower::new(Some(dir.to_owned()), key, limits);
    let versions = Versions::new(me, view(config)?, follower);
    versions.poll_folder();
    Ok(versions)
}

/// What a config says of a node's place in the registry.
pub(crate) fn view(config: &NodeConfig) -> Result<VersionsConfig, Failure> {
    let subnet = match &config.node.subnet {
        Some(text) => Some(text.parse().map_err(|error| {
            let message = format!("node.subnet = \"{text}\": {error}");
            Failure::new(Exit::BadConfig, message)
        })?),
        None => None,
    };
    let seed = |seed: &Seed| {
        let public_key = keys::public_from_hex(&seed.public_key)?;
        Ok(Member {
            public_key,
            addresses: vec![seed.address],
        })
    };
    let seeds = config.registry.seeds.iter().map(seed);
    Ok(VersionsConfig {
        subnet,
        seeds: seeds.collect::<Result<_, Failure>>()?,
        listen: vec![config.listen.address],
    })
}

/// What the registry says to the edge of a node that has these roles.
pub(crate) fn firewall(versions: &Versions, roles: &[String]) -> Firewall {
    let records = versions.firewall();
    Firewall {
        version: records.version,
        tables: records.tables,
        members: records.members,
        locality: Locality {
            node: versions.node_id().to_string(),
            subnet: records.subnet.map(|subnet| subnet.to_string()),
            roles: roles.to_vec(),
        },
    }
}
