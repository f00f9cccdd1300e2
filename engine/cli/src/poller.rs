//! Follows the registry: the folder, and one connected peer in turn, every poll interval.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::exit::Failure;
use crate::running::Running;

/// A thread that polls; stops when dropped.
pub(crate) struct Poller {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Poller {
    pub(crate) fn start(node: Arc<Running>, interval: Duration) -> Result<Self, Failure> {
        let (stop, stopped) = sync_channel(0);
        let thread = std::thread::Builder::new()
            .name("millrace-registry".into())
            .spawn(move || {
                let mut turn = 0;
                let mut pending = false;
                while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                    pending |= node.versions.poll_folder();
                    pending |= ask_a_peer(&node, turn);
                    turn += 1;
                    if pending {
                        // A full mailbox leaves it pending for the next turn.
                        pending = !node.apply_topology();
                        tracing::info!(
                            version = node.versions.newest(),
                            members = node
                                .topology
                                .members
                                .load(std::sync::atomic::Ordering::Relaxed),
                            "registry changed"
                        );
                    }
                }
            })
            .map_err(|error| Failure::io("the registry thread", &error))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

fn ask_a_peer(node: &Running, turn: usize) -> bool {
    let peers = node.peers();
    match peers.get(turn % peers.len().max(1)) {
        Some(peer) => node.ask_for_versions(*peer),
        None => false,
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
    }
}
