//! The node's TLS key and its certificate: which key is in use, where the secret halves lie, and
//! the thread that takes up new keys and renews certificates.
//!
//! Invariants
//! 1. The identity key is always held; a TLS key is held while the registry record names it, or it
//!    is in use.
//! 2. Files are read on the thread, and once at the start: nothing else waits for them.
//! 3. A key that cannot be read is told once, is shown in status, and is looked for again.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use millrace_protocol::identity::{PublicKey, SigningKey};
use millrace_protocol::tls_keys::{OwnKey, Standing, TlsKeys, Validity};
use millrace_registry::keys;
use millrace_transport::{Credentials, TlsError, Transport};

/// A new key is used this many times `registry.poll_interval` after the node heard of it: peers
/// look into their folders, and ask each other, once in that time.
const TAKE_UP_POLLS: u32 = 3;

/// What the thread is told, and what it tells.
#[derive(Debug)]
pub(crate) struct TlsBoard {
    /// The keys of the node's record in the newest topology; none: it has no record.
    record: Mutex<Option<TlsKeys>>,
    /// Keys of the embedder, which no file holds.
    given: Mutex<Vec<SigningKey>>,
    state: Mutex<TlsState>,
    stop: AtomicBool,
    wake: SyncSender<()>,
}

/// The key in use, as status shows it.
#[derive(Clone, Debug)]
pub(crate) struct TlsState {
    pub(crate) key: PublicKey,
    pub(crate) standing: Standing,
    /// The newest key of the record, if its secret half is not there.
    pub(crate) missing: Option<PublicKey>,
    /// Why a file that is there cannot be used, or the shards have not got a certificate.
    pub(crate) failure: Option<String>,
    pub(crate) validity: Validity,
    pub(crate) certificates_made: u64,
}

impl TlsBoard {
    /// The node has these TLS keys in its record from now on.
    pub(crate) fn set_record(&self, record: Option<TlsKeys>) {
        *lock(&self.record) = record;
        self.wake();
    }

    /// Holds a key that no file has. The last ones are held, as many as a record names.
    pub(crate) fn give(&self, key: SigningKey) {
        let mut given = lock(&self.given);
        if given.len() == TlsKeys::MAX {
            given.remove(0);
        }
        given.push(key);
        drop(given);
        self.wake();
    }

    pub(crate) fn state(&self) -> TlsState {
        lock(&self.state).clone()
    }

    fn wake(&self) {
        // A full queue wakes the thread as well.
        let _ = self.wake.try_send(());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Seconds since 1970.
pub(crate) fn wall_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// The secret halves that the node has.
#[derive(Debug)]
struct HeldKeys {
    identity: SigningKey,
    /// The file of the identity key: the others lie beside it.
    beside: Option<PathBuf>,
    held: BTreeMap<PublicKey, SigningKey>,
    failure: Option<String>,
}

impl HeldKeys {
    /// Looks for the keys that the record names, and forgets others than `in_use`.
    fn look(&mut self, record: Option<&TlsKeys>, given: &[SigningKey], in_use: &PublicKey) {
        self.failure = None;
        let Some(record) = record else { return };
        self.held
            .retain(|key, _| record.contains(key) || key == in_use);
        for key in record.iter() {
            if self.get(&key).is_some() {
                continue;
            }
            let found = given.iter().find(|given| given.public_key() == key);
            let found = match (found, &self.beside) {
                (Some(given), _) => Ok(Some(given.clone())),
                (None, Some(beside)) => keys::read_tls(beside, &key),
                (None, None) => Ok(None),
            };
            match found {
                Ok(Some(found)) => drop(self.held.insert(key, found)),
                Ok(None) => {}
                Err(error) => self.failure = Some(error.to_string()),
            }
        }
    }

    fn get(&self, key: &PublicKey) -> Option<&SigningKey> {
        if self.identity.public_key() == *key {
            return Some(&self.identity);
        }
        self.held.get(key)
    }

    fn file_of(&self, key: &PublicKey) -> String {
        let beside = self.beside.as_ref();
        let file = beside.map(|beside| keys::tls_key_file(beside, key));
        file.map_or_else(String::new, |file| file.display().to_string())
    }
}

/// What the thread works with, before it runs.
#[derive(Debug)]
pub(crate) struct TlsKeeper {
    board: Arc<TlsBoard>,
    woken: Receiver<()>,
    held: HeldKeys,
    own: OwnKey,
    validity: Validity,
    lifetime: Duration,
    /// How often what is missing is looked for again.
    interval: Duration,
    credentials: Credentials,
    /// The shards have not got them yet.
    is_behind: bool,
    told: Option<(Standing, Option<String>)>,
}

impl TlsKeeper {
    /// Chooses the key of a node that starts, and makes its first certificate. `poll_interval` is
    /// that of the registry.
    pub(crate) fn new(
        identity: SigningKey,
        key_file: Option<PathBuf>,
        record: Option<TlsKeys>,
        lifetime: Duration,
        poll_interval: Duration,
    ) -> Result<Self, TlsError> {
        let id = identity.public_key();
        let mut held = HeldKeys {
            identity,
            beside: key_file,
            held: BTreeMap::new(),
            failure: None,
        };
        held.look(record.as_ref(), &[], &id);
        let holds = |key: &PublicKey| held.get(key).is_some();
        let take_up_after = TAKE_UP_POLLS * poll_interval;
        let own = OwnKey::at_start(id, record.as_ref(), holds, take_up_after);
        let validity = Validity::starting(wall_s(), lifetime);
        let key = held.get(&own.in_use()).unwrap_or(&held.identity);
        let credentials = Credentials::new(key, validity)?;
        let (wake, woken) = sync_channel(1);
        let state = TlsState {
            key: own.in_use(),
            standing: own.status(),
            missing: None,
            failure: None,
            validity,
            certificates_made: 1,
        };
        let board = TlsBoard {
            record: Mutex::new(record),
            given: Mutex::default(),
            state: Mutex::new(state),
            stop: AtomicBool::new(false),
            wake,
        };
        Ok(Self {
            board: Arc::new(board),
            woken,
            held,
            own,
            validity,
            lifetime,
            interval: poll_interval,
            credentials,
            is_behind: false,
            told: None,
        })
    }

    pub(crate) fn board(&self) -> &Arc<TlsBoard> {
        &self.board
    }

    /// For the start of the transport.
    pub(crate) fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// The host's, if it gives no thread.
    pub(crate) fn start(mut self, transport: Transport) -> io::Result<TlsThread> {
        let board = Arc::clone(&self.board);
        let thread = std::thread::Builder::new()
            .name("millrace-keys".into())
            .spawn(move || {
                loop {
                    let wait = self.turn(&transport);
                    let woken = self.woken.recv_timeout(wait);
                    if woken == Err(RecvTimeoutError::Disconnected)
                        || self.board.stop.load(Ordering::Acquire)
                    {
                        return;
                    }
                }
            })?;
        Ok(TlsThread {
            board,
            thread: Some(thread),
        })
    }

    /// Does what is due; how long to wait for the next turn.
    fn turn(&mut self, transport: &Transport) -> Duration {
        let (now, wall_s) = (Instant::now(), wall_s());
        let record = *lock(&self.board.record);
        let given = lock(&self.board.given).clone();
        self.held.look(record.as_ref(), &given, &self.own.in_use());
        let held = &self.held;
        self.own
            .update(record.as_ref(), |key| held.get(key).is_some(), now);
        let is_new_key = self.credentials.public_key() != self.own.in_use();
        if is_new_key || self.validity.is_due(wall_s) {
            self.make(wall_s, is_new_key);
        }
        if self.is_behind {
            match transport.set_credentials(&self.credentials) {
                Ok(told) => self.is_behind = !told,
                Err(error) => self.held.failure = Some(error.to_string()),
            }
        }
        let missing = record.map(|record| record.newest());
        let missing = missing.filter(|key| self.held.get(key).is_none());
        self.tell(missing.as_ref());
        let mut state = lock(&self.board.state);
        state.key = self.own.in_use();
        state.standing = self.own.status();
        state.missing = missing;
        state.failure.clone_from(&self.held.failure);
        state.validity = self.validity;
        drop(state);
        let wait = if missing.is_some() || self.is_behind || self.held.failure.is_some() {
            self.interval
        } else {
            self.validity.next_check(wall_s)
        };
        let next = self.own.poll_timeout();
        next.map_or(wait, |at| wait.min(at.saturating_duration_since(now)))
    }

    /// Makes a certificate for the key in use.
    fn make(&mut self, wall_s: u64, is_new_key: bool) {
        let in_use = self.own.in_use();
        let key = self.held.get(&in_use).unwrap_or(&self.held.identity);
        let validity = Validity::starting(wall_s, self.lifetime);
        match Credentials::new(key, validity) {
            Ok(credentials) => {
                self.credentials = credentials;
                self.validity = validity;
                self.is_behind = true;
                lock(&self.board.state).certificates_made += 1;
                if is_new_key {
                    tracing::info!(key = %in_use, "handshakes use another TLS key from now on");
                }
            }
            // The one before stays in use, and this is tried again after an interval.
            Err(error) => self.held.failure = Some(error.to_string()),
        }
    }

    /// Logs what is not as the registry wants it, once.
    fn tell(&mut self, missing: Option<&PublicKey>) {
        let standing = self.own.status();
        let failure = &self.held.failure;
        let told = self.told.as_ref();
        if told.is_some_and(|told| told.0 == standing && told.1 == *failure) {
            return;
        }
        let file = missing.map(|key| self.held.file_of(key));
        let file = file.unwrap_or_default();
        match standing {
            Standing::Newest | Standing::Older => {}
            Standing::NewestMissing => tracing::warn!(
                file,
                "the registry names a new TLS key for this node, and its file is not here; the \
                 older key stays in use"
            ),
            Standing::Refused => tracing::error!(
                file,
                "the registry names other TLS keys for this node than those that are here; peers \
                 refuse it"
            ),
        }
        if let Some(failure) = failure {
            tracing::error!(%failure, "a TLS key or certificate cannot be used");
        }
        self.told = Some((standing, failure.clone()));
    }
}

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct TlsThread {
    board: Arc<TlsBoard>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for TlsThread {
    fn drop(&mut self) {
        self.board.stop.store(true, Ordering::Release);
        self.board.wake();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            thread.join().ok();
        }
    }
}
