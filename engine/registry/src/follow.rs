//! The thread that follows the registry: it reads the folder every poll interval, takes what peers
//! sent, and tells the node when something changed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::questions::Offer;
use crate::versions::Versions;

/// Answers of peers that may wait to be checked, one of each peer. Those of up to 64 KiB take
/// memory beside the pools; the chunks of longer ones are charged to their peers.
pub const ANSWERS_MAX: usize = 16;

#[derive(Debug)]
enum Event {
    /// A peer sent versions.
    Offer(Offer),
    /// A flag was set.
    Wake,
}

/// What shards hand to the thread: at most 16 answers of peers wait.
#[derive(Debug)]
pub struct Events {
    sender: SyncSender<Event>,
    receiver: Receiver<Event>,
}

impl Default for Events {
    fn default() -> Self {
        let (sender, receiver) = sync_channel(ANSWERS_MAX);
        Self { sender, receiver }
    }
}

impl Events {
    /// For the [`Exchange`](crate::Exchange) of each shard.
    pub fn sender(&self) -> OfferSender {
        OfferSender(self.sender.clone())
    }

    /// The next answer that waits. For an owner that runs no thread.
    pub fn next_offer(&self) -> Option<Offer> {
        self.receiver.try_iter().find_map(|event| match event {
            Event::Offer(offer) => Some(offer),
            Event::Wake => None,
        })
    }
}

/// Where a shard hands in what peers sent.
#[derive(Debug, Clone)]
pub struct OfferSender(SyncSender<Event>);

impl OfferSender {
    /// Hands in an answer; false when too many wait, or the thread has ended.
    pub(crate) fn offer(&self, offer: Offer) -> bool {
        self.0.try_send(Event::Offer(offer)).is_ok()
    }
}

/// What the thread is to do besides its events: no full queue delays it.
#[derive(Debug, Default)]
struct Flags {
    stop: AtomicBool,
    apply: AtomicBool,
}

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct FollowThread {
    events: SyncSender<Event>,
    flags: Arc<Flags>,
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
        let flags = Arc::new(Flags::default());
        let asked = Arc::clone(&flags);
        let run = move || {
            let mut is_behind = false;
            let mut poll_at = Instant::now() + interval;
            loop {
                let left = poll_at.saturating_duration_since(Instant::now());
                let event = receiver.recv_timeout(left);
                if asked.stop.load(Ordering::Acquire) {
                    return;
                }
                let is_new = match event {
                    Ok(Event::Offer(offer)) => versions.take(&offer),
                    Ok(Event::Wake) => false,
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {
                        poll_at = Instant::now() + interval;
                        versions.poll_folder() || is_behind
                    }
                };
                if is_new | asked.apply.swap(false, Ordering::AcqRel) {
                    is_behind = !apply();
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("millrace-registry".into())
            .spawn(run)?;
        Ok(Self {
            events: sender,
            flags,
            thread: Some(thread),
        })
    }

    /// Has `apply` called again, on the thread. Does not wait.
    pub fn apply_again(&self) {
        self.set(&self.flags.apply);
    }

    fn set(&self, flag: &AtomicBool) {
        flag.store(true, Ordering::Release);
        // A full queue wakes the thread as well, and an error of the other kind means that it has
        // ended.
        let _ = self.events.try_send(Event::Wake);
    }
}

impl Drop for FollowThread {
    fn drop(&mut self) {
        // Waits for one answer to be checked at most, not for all that are in the queue.
        self.set(&self.flags.stop);
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use millrace_protocol::id::NodeId;
    use millrace_protocol::identity::SigningKey;
    use millrace_protocol::registry::{RegistryConfig, SignedVersion};

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

    /// An answer of a peer with these versions.
    fn offer(versions: &Versions, peer: u8, signed: &[&SignedVersion]) -> Offer {
        let question = versions.questions().ask(NodeId::from_bytes([peer; 29]));
        let answer = wire::encode(signed.iter().copied());
        Offer::new(question.unwrap(), answer.into())
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
        assert!(shard.offer(offer(&versions, 1, &[&signed])));
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
        let versions = versions(&key);
        let events = Events::default();
        let shard = events.sender();
        let thread = FollowThread::start(Arc::clone(&versions), events, NEVER, || true).unwrap();
        drop(thread);
        let is_there = shard.offer(offer(&versions, 1, &[]));
        assert!(!is_there, "the thread is still there");
    }

    /// Protects the end of a node, and a change that must be applied, from peers that fill the
    /// queue.
    #[test]
    fn a_full_queue_delays_neither_the_end_nor_what_is_to_be_applied() {
        let key = keys::generate().unwrap();
        let versions = versions(&key);
        let events = Events::default();
        let shard = events.sender();
        let ((applies, applied), (goes_on, may_go_on)) = (channel(), channel());
        let apply = move || {
            applies.send(()).unwrap();
            may_go_on.recv().unwrap();
            true
        };
        let thread = FollowThread::start(Arc::clone(&versions), events, NEVER, apply).unwrap();
        thread.apply_again();
        applied.recv_timeout(PATIENCE).unwrap();
        // The thread is in `apply`, and does not take what comes.
        let fill = |from| {
            let unreadable = |peer| {
                let question = versions.questions().ask(NodeId::from_bytes([peer; 29]));
                Offer::new(question.unwrap(), vec![1].into())
            };
            let taken = (from..).take_while(|peer| shard.offer(unreadable(*peer)));
            taken.count()
        };
        assert_eq!(fill(0), ANSWERS_MAX);
        thread.apply_again();
        goes_on.send(()).unwrap();
        applied.recv_timeout(PATIENCE).unwrap();
        assert_eq!(fill(100), 1, "one was taken");
        let flags = Arc::clone(&thread.flags);
        let dropped = std::thread::spawn(move || drop(thread));
        while !flags.stop.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        goes_on.send(()).unwrap();
        dropped.join().unwrap();
        let checked = versions.summary().questions_failed;
        assert_eq!(checked, [("unreadable", 1)], "what waits is not checked");
    }
}
