//! The thread that follows the registry: it reads the folder every poll interval, takes what peers
//! sent, and tells the node when something changed.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use millrace_protocol::id::NodeId;

use crate::versions::Versions;

/// Answers of peers that may wait to be checked; each is at most 4 MiB.
const EVENTS_MAX: usize = 16;

/// What the thread hears.
#[derive(Debug)]
pub enum Event {
    /// A peer sent versions.
    Offer(Offer),
    /// The shards lag behind what is held.
    Apply,
    /// The node ends.
    Stop,
}

/// Versions that a peer sent, as they came.
#[derive(Debug)]
pub struct Offer {
    /// The peer.
    pub peer: NodeId,
    /// What it sent; see [`wire`](crate::wire).
    pub versions: Vec<u8>,
}

/// Where the thread hears from the shards.
#[derive(Debug)]
pub struct Events {
    sender: SyncSender<Event>,
    receiver: Receiver<Event>,
}

impl Default for Events {
    fn default() -> Self {
        let (sender, receiver) = sync_channel(EVENTS_MAX);
        Self { sender, receiver }
    }
}

impl Events {
    /// For the [`Exchange`](crate::Exchange) of each shard.
    pub fn sender(&self) -> SyncSender<Event> {
        self.sender.clone()
    }
}

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct FollowThread {
    events: SyncSender<Event>,
    thread: Option<JoinHandle<()>>,
}

impl FollowThread {
    /// Starts it. `apply` is called when a newer version is held; while it returns false, it is
    /// called again every `interval`.
    ///
    /// # Errors
    /// The host's, if it gives no thread.
    pub fn start(
        versions: Arc<Versions>,
        events: Events,
        interval: Duration,
        mut apply: impl FnMut() -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let Events { sender, receiver } = events;
        let run = move || {
            let mut is_behind = false;
            let mut poll_at = Instant::now() + interval;
            loop {
                let left = poll_at.saturating_duration_since(Instant::now());
                let is_new = match receiver.recv_timeout(left) {
                    Ok(Event::Offer(offer)) => versions.offer_encoded(&offer.peer, &offer.versions),
                    Ok(Event::Apply) => true,
                    Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {
                        poll_at = Instant::now() + interval;
                        versions.poll_folder() || is_behind
                    }
                };
                if is_new {
                    is_behind = !apply();
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("millrace-registry".into())
            .spawn(run)?;
        Ok(Self {
            events: sender,
            thread: Some(thread),
        })
    }

    /// Has `apply` called again, on the thread.
    pub fn apply_again(&self) {
        // Waits for a place at most as long as one answer takes to be checked. An error means that
        // the thread has ended.
        let _ = self.events.send(Event::Apply);
    }
}

impl Drop for FollowThread {
    fn drop(&mut self) {
        // As in `apply_again`.
        let _ = self.events.send(Event::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use millrace_protocol::identity::SigningKey;
    use millrace_protocol::registry::RegistryConfig;

    use super::*;
    use crate::{Draft, Follower, VersionsConfig, keys, wire};

    const SOON: Duration = Duration::from_millis(1);
    const NEVER: Duration = Duration::from_secs(3_600);
    const PATIENCE: Duration = Duration::from_secs(30);

    fn versions(key: &SigningKey) -> Arc<Versions> {
        let follower = Follower::new(None, key.public_key(), RegistryConfig::default());
        let me = keys::generate().unwrap().public_key();
        Arc::new(Versions::new(&me, VersionsConfig::default(), follower))
    }

    #[test]
    fn what_a_peer_sends_is_applied_until_it_is() {
        let key = keys::generate().unwrap();
        let versions = versions(&key);
        let events = Events::default();
        let shard = events.sender();
        let (told, tells) = channel();
        let mut refusals = 2;
        let apply = move || {
            told.send(()).unwrap();
            let is_done = refusals == 0;
            refusals = usize::saturating_sub(refusals, 1);
            is_done
        };
        let thread = FollowThread::start(Arc::clone(&versions), events, SOON, apply).unwrap();
        let signed = Draft::first("test").unwrap().sign(&key).unwrap();
        let offer = Offer {
            peer: versions.node_id(),
            versions: wire::encode([&signed].into_iter()),
        };
        shard.send(Event::Offer(offer)).unwrap();
        for _ in 0..3 {
            tells.recv_timeout(PATIENCE).unwrap();
        }
        assert_eq!(versions.newest(), 1);
        drop(thread);
        assert!(tells.try_recv().is_err(), "applied once more than needed");
    }

    /// Protects the end of a node: shards may still hold a sender, and the interval may be long.
    #[test]
    fn the_thread_ends_while_shards_hold_it() {
        let key = keys::generate().unwrap();
        let events = Events::default();
        let shard = events.sender();
        let thread = FollowThread::start(versions(&key), events, NEVER, || true).unwrap();
        drop(thread);
        assert!(
            shard.send(Event::Stop).is_err(),
            "the thread is still there"
        );
    }
}
