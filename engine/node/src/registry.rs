//! Follows the registry: the folder, and one connected peer in turn, every poll interval.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use millrace_protocol::identity::PublicKey;
use millrace_protocol::registry::RegistryConfig;
use millrace_protocol::topology::Member;
use millrace_registry::{Follower, KeyError, Versions, VersionsConfig, keys};
use millrace_tuning::NodeConfig;
use millrace_tuning::config::Seed;

use crate::core::Core;
use crate::error::StartError;
use crate::parts::RegistrySource;
use crate::peers::nearest;

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
        Ok(Member {
            public_key: keys::public_from_hex(&seed.public_key)?,
            addresses: vec![seed.address],
        })
    };
    let seeds = config.registry.seeds.iter().map(seed);
    let known = VersionsConfig {
        subnet,
        seeds: seeds.collect::<Result<_, KeyError>>()?,
        listen: vec![config.listen.address],
    };
    let versions = Versions::new(me, known, follower);
    versions.poll_folder();
    Ok(versions)
}

/// A thread that polls; stops when dropped.
#[derive(Debug)]
pub(crate) struct RegistryThread {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl RegistryThread {
    pub(crate) fn start(core: Arc<Core>, interval: Duration) -> Result<Self, StartError> {
        let (stop, stopped) = sync_channel(0);
        let thread = std::thread::Builder::new()
            .name("millrace-registry".into())
            .spawn(move || {
                let mut turn = 0;
                while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                    let is_new = core.versions.poll_folder();
                    let is_newer = ask_a_peer(&core, turn);
                    turn += 1;
                    if is_new || is_newer || core.is_behind.load(Ordering::Relaxed) {
                        core.apply_topology();
                    }
                }
            })
            .map_err(|error| StartError::io("the registry thread", error))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Lets the thread end, without waiting for it.
    pub(crate) fn stop(&mut self) {
        self.stop = None;
    }
}

fn ask_a_peer(core: &Core, turn: usize) -> bool {
    let peers = nearest(&core.transport);
    match peers.get(turn % peers.len().max(1)) {
        Some(peer) => core.ask_for_versions(*peer),
        None => false,
    }
}

impl Drop for RegistryThread {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
    }
}
