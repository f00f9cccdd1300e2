//! The files of a node.

use std::path::{Path, PathBuf};

use millrace_tuning::NodeConfig;

/// The files that a config names, all relative paths resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Folder of everything that the node writes.
    pub state_dir: PathBuf,
    /// The node's secret key.
    pub key_file: PathBuf,
    /// Folder of signed registry versions.
    pub registry_dir: PathBuf,
    /// Unix socket of status and metrics.
    pub admin_socket: PathBuf,
}

impl Paths {
    /// The files of a config that lies in `folder`: `state_dir` is relative to that, the others are
    /// relative to `state_dir`.
    pub fn of(config: &NodeConfig, folder: &Path) -> Self {
        let state_dir = folder.join(&config.node.state_dir);
        Self {
            key_file: state_dir.join(&config.node.key_file),
            registry_dir: state_dir.join(&config.registry.dir),
            admin_socket: state_dir.join(&config.admin.socket),
            state_dir,
        }
    }

    /// Folder in which the node keeps the newest registry version that it has seen.
    pub fn kept_dir(&self) -> PathBuf {
        self.state_dir.join("registry-kept")
    }
}
