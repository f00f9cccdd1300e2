//! The thread that follows the registry: it takes what peers sent, has names looked up, and tells
//! the node when something changed. Beside it, another one reads the folder (`folder_thread.rs`).

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use millrace_protocol::address::HostName;
use millrace_protocol::id::NodeId;
use millrace_protocol::names::Found;

use crate::alone::Alone;
use crate::folder_thread::FolderThread;
use crate::lookups::{self, Resolver};
use crate::questions::Offer;
use crate::versions::{Versions, tell};

/// Answers of peers that may wait to be checked, one of each peer. Those of up to 64 KiB take
/// memory beside the pools; the chunks of longer ones are charged to their peers.
pub const ANSWERS_MAX: usize = 16;

#[derive(Debug)]
enum Event {
    /// A peer sent versions.
    Offer(Offer),
    /// A lookup has ended.
    LookedUp(HostName, Result<Found, String>),
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
            Event::LookedUp(..) | Event::Wake => None,
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

/// The threads; they end when this is dropped.
#[derive(Debug)]
pub struct FollowThread {
    events: SyncSender<Event>,
    flags: Arc<Flags>,
    folder: Option<FolderThread>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread asks, and whom.
#[derive(Debug, Clone)]
pub struct Follow {
    /// How often the folder is read.
    pub interval: Duration,
    /// Says what names stand for.
    pub resolver: Arc<dyn Resolver>,
}

impl FollowThread {
    /// Starts them. `apply` is called when a newer version is held, or a name stands for other
    /// addresses; while it returns false, it is called again every `interval`. `connected` says
    /// which nodes are: names of the others are looked up more often.
    ///
    /// # Errors
    /// The host's, if it gives no thread.
    pub fn start(
        versions: Arc<Versions>,
        events: Events,
        follow: Follow,
        connected: impl Fn() -> BTreeSet<NodeId> + Send + 'static,
        mut apply: impl FnMut() -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let Events { sender, receiver } = events;
        let flags = Arc::new(Flags::default());
        let asked = Arc::clone(&flags);
        let lookups = Lookups {
            versions: Arc::clone(&versions),
            resolver: follow.resolver,
            events: sender.clone(),
        };
        let interval = follow.interval;
        let polled = Arc::clone(&versions);
        let run = move || {
            let mut is_behind = false;
            let mut alone = Alone::default();
            let mut look_at = Instant::now() + interval;
            loop {
                let times = [lookups.start_due(&connected), versions.retry_at()];
                let wake_at = times.into_iter().flatten().fold(look_at, Instant::min);
                let left = wake_at.saturating_duration_since(Instant::now());
                let event = receiver.recv_timeout(left);
                if asked.stop.load(Ordering::Acquire) {
                    return;
                }
                let is_written = versions.retry_write();
                let is_new = match event {
                    Ok(Event::Offer(offer)) => versions.take(&offer),
                    Ok(Event::LookedUp(host, found)) => versions.looked_up(&host, found),
                    Ok(Event::Wake) => false,
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) if Instant::now() < look_at => false,
                    Err(RecvTimeoutError::Timeout) => {
                        look_at = Instant::now() + interval;
                        if let Some(folder) = versions.folder() {
                            folder.tell();
                        }
                        if alone.tell(!connected().is_empty(), Instant::now()) {
                            versions.tell_alone();
                        }
                        is_behind
                    }
                };
                if is_new | is_written | asked.apply.swap(false, Ordering::AcqRel) {
                    is_behind = !apply();
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("millrace-registry".into())
            .spawn(run)?;
        let mut threads = Self {
            events: sender,
            flags,
            folder: None,
            thread: Some(thread),
        };
        if polled.folder().is_some() {
            let wake = threads.wake();
            threads.folder = Some(FolderThread::start(polled, interval, wake)?);
        }
        Ok(threads)
    }

    /// Has `apply` called again, on the thread. Does not wait.
    pub fn apply_again(&self) {
        self.wake()();
    }

    fn wake(&self) -> impl Fn() + Send + use<> {
        let (flags, events) = (Arc::clone(&self.flags), self.events.clone());
        move || set(&flags.apply, &events)
    }
}

fn set(flag: &AtomicBool, events: &SyncSender<Event>) {
    flag.store(true, Ordering::Release);
    // A full queue wakes the thread as well, and an error of the other kind means that it has
    // ended.
    let _ = events.try_send(Event::Wake);
}

/// Has names looked up for the thread.
#[derive(Debug)]
struct Lookups {
    versions: Arc<Versions>,
    resolver: Arc<dyn Resolver>,
    events: SyncSender<Event>,
}

impl Lookups {
    /// Starts the lookups that are due; when to come again.
    fn start_due(&self, connected: &impl Fn() -> BTreeSet<NodeId>) -> Option<Instant> {
        let now = Instant::now();
        self.versions.names().poll_timeout()?;
        let connected = connected();
        let me = self.versions.node_id();
        let is_away = |id: &NodeId| *id != me && !connected.contains(id);
        let away = self.versions.hosts_of(is_away);
        let mut names = self.versions.names();
        names.set_urgent(|host| away.contains(host));
        for (host, change) in names.handle_timeout(now) {
            tell(&host, &change);
        }
        while let Some(host) = names.next_lookup(now) {
            let events = self.events.clone();
            // It waits for room in the queue, or finds that the thread has ended.
            let report = move |host, found| drop(events.send(Event::LookedUp(host, found)));
            if let Err(error) = lookups::start(&self.resolver, host.clone(), report) {
                let ended = names.ended(&host, Err(format!("no thread: {error}")), now);
                if let Some(change) = ended.change {
                    tell(&host, &change);
                }
            }
        }
        names.poll_timeout()
    }
}

impl Drop for FollowThread {
    fn drop(&mut self) {
        // Waits for one answer to be checked at most, not for all that are in the queue.
        set(&self.flags.stop, &self.events);
        drop(self.folder.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    use millrace_protocol::address::NodeAddress;
    use millrace_protocol::identity::SigningKey;
    use millrace_protocol::registry::{RegistryConfig, SignedVersion};

    use super::*;
    use crate::{Draft, HostResolver, Sources, VersionsConfig, keys, wire};

    const SOON: Duration = Duration::from_millis(1);
    const NEVER: Duration = Duration::from_secs(3_600);
    const PATIENCE: Duration = Duration::from_secs(30);

    fn versions(key: &SigningKey) -> Arc<Versions> {
        let sources = Sources::new(key.public_key(), RegistryConfig::default());
        let me = keys::generate().unwrap().public_key();
        Arc::new(Versions::new(&me, VersionsConfig::default(), sources))
    }

    fn start(
        versions: &Arc<Versions>,
        events: Events,
        interval: Duration,
        apply: impl FnMut() -> bool + Send + 'static,
    ) -> io::Result<FollowThread> {
        let follow = Follow {
            interval,
            resolver: Arc::new(HostResolver),
        };
        FollowThread::start(Arc::clone(versions), events, follow, BTreeSet::new, apply)
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
        let thread = start(&versions, events, SOON, apply).unwrap();
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
        let thread = start(&versions, events, NEVER, || true).unwrap();
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
        let thread = start(&versions, events, NEVER, apply).unwrap();
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

    /// A resolver that the test answers for.
    #[derive(Debug)]
    struct Scripted {
        asked: SyncSender<HostName>,
        answers: Mutex<Receiver<Result<Found, String>>>,
    }

    impl Resolver for Scripted {
        fn lookup(&self, host: &HostName) -> Result<Found, String> {
            self.asked.send(host.clone()).unwrap();
            let answers = self.answers.lock().unwrap();
            answers
                .recv()
                .unwrap_or_else(|_| Err("the test has ended".into()))
        }
    }

    /// Protects a registry of names: what the resolver says is applied, and the end of the node
    /// waits for no resolver.
    #[test]
    fn names_are_looked_up_and_applied() {
        let key = keys::generate().unwrap();
        let [me, peer] = [0, 1].map(|_| keys::generate().unwrap().public_key());
        let sources = Sources::new(key.public_key(), RegistryConfig::default());
        let versions = Arc::new(Versions::new(&me, VersionsConfig::default(), sources));
        let mut draft = Draft::with_nodes("test", &[(me, ([127, 0, 0, 1], 1).into())]).unwrap();
        let subnet = draft.only_subnet().unwrap();
        let name = |draft: &mut Draft, name: &str| {
            let address: NodeAddress = name.parse().unwrap();
            draft.set_node(peer, subnet, [address]);
            assert!(versions.offer(draft.sign(&key).unwrap()).unwrap());
        };
        name(&mut draft, "peer.example:4100");
        let peers_addresses = || {
            let topology = versions.topology();
            topology.member(&peer.node_id()).unwrap().addresses.clone()
        };
        assert_eq!(peers_addresses(), []);

        let ((asked, asks), (answer, answers)) = (sync_channel(8), sync_channel(8));
        let resolver = Arc::new(Scripted {
            asked,
            answers: Mutex::new(answers),
        });
        let (told, tells) = channel();
        let apply = move || told.send(()).is_ok();
        let events = Events::default();
        let follow = Follow {
            interval: NEVER,
            resolver,
        };
        let followed = Arc::clone(&versions);
        let thread = FollowThread::start(followed, events, follow, BTreeSet::new, apply).unwrap();
        assert_eq!(
            asks.recv_timeout(PATIENCE).unwrap().as_str(),
            "peer.example"
        );
        let found = Found {
            addresses: vec![[192, 0, 2, 7].into()],
            ttl: None,
        };
        answer.send(Ok(found)).unwrap();
        tells.recv_timeout(PATIENCE).unwrap();
        assert_eq!(peers_addresses(), [([192, 0, 2, 7], 4100).into()]);
        let firewall = versions.firewall().members;
        assert_eq!(
            firewall,
            [[127, 0, 0, 1].into(), [192, 0, 2, 7].into()] as [IpAddr; 2]
        );

        draft = Draft::after(draft.version().clone());
        name(&mut draft, "other.example:4100");
        thread.apply_again();
        assert_eq!(
            asks.recv_timeout(PATIENCE).unwrap().as_str(),
            "other.example"
        );
        drop(thread);
        drop(answer);
    }
}
