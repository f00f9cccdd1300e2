//! How versions are taken: from the folder, from peers and from the embedder, one after the other.

use std::io;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant, SystemTime};

use millrace_protocol::registry::{Offered, RegistryError, SignedVersion};

use super::{Versions, lock};
use crate::held::Held;
use crate::questions::Offer;
use crate::reader::{Look, Verified};
use crate::wire;

/// What became of versions that were offered.
#[derive(Debug, Default)]
struct Taken {
    /// A newer one is in force.
    changed: bool,
    /// The first refusal; what came after it was not looked at.
    refused: Option<RegistryError>,
}

impl Versions {
    /// Takes what is new in the folder; whether something changed. Reads and writes files: not for
    /// shards. A file system that hangs holds it up.
    pub fn poll_folder(&self) -> bool {
        self.poll_folder_unless(|| false)
    }

    /// As [`Self::poll_folder`], but nothing is taken when `is_over` after the files were read.
    pub(crate) fn poll_folder_unless(&self, is_over: impl Fn() -> bool) -> bool {
        let Some(folder) = &self.folder else {
            return false;
        };
        self.take_look(folder.read(self.known() + 1), is_over)
    }

    /// As [`Self::poll_folder`], for a start: a file system that hangs does not hold it up for
    /// longer than `limit`.
    ///
    /// # Errors
    /// `TimedOut`, and a thread is left behind that hangs; otherwise the host's, if it gives no
    /// thread.
    pub fn poll_folder_within(&self, limit: Duration) -> io::Result<bool> {
        let Some(folder) = self.folder.clone() else {
            return Ok(false);
        };
        let from = self.known() + 1;
        let (sender, found) = channel();
        let read = move || drop(sender.send(folder.read(from)));
        let thread = std::thread::Builder::new().name("millrace-folder".into());
        let thread = thread.spawn(read)?;
        let found = found.recv_timeout(limit);
        let found = found.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
        // It ends now; a node gives up its capabilities when it has no other thread.
        let _ = thread.join();
        Ok(self.take_look(found, || false))
    }

    fn take_look(&self, look: Look, is_over: impl Fn() -> bool) -> bool {
        let mut held = self.lock();
        for reason in look.refused {
            *held.refused.entry(reason).or_default() += 1;
        }
        // Peers may have brought a newer one meanwhile.
        let min = held.registry.number_min();
        drop(held);
        let newer = look.versions.into_iter();
        let newer: Vec<_> = newer.filter(|(_, version)| version.number >= min).collect();
        !newer.is_empty() && !is_over() && self.take_verified(newer).changed
    }

    /// Takes a version; whether something changed. False also for one that could not be written
    /// down: it is tried again, and [`Summary::kept_failure`](crate::Summary::kept_failure) says
    /// why. Checks a signature and writes a file: not for shards.
    ///
    /// # Errors
    /// Why the version is refused; it is counted.
    pub fn offer(&self, version: SignedVersion) -> Result<bool, RegistryError> {
        let taken = self.take_verified(vec![self.verify(version)?]);
        taken.refused.map_or(Ok(taken.changed), Err)
    }

    /// Takes an answer that a peer sent, up to its first version that is refused; whether something
    /// changed. Checks signatures and writes a file: not for shards.
    pub fn take(&self, offer: &Offer) -> bool {
        let peer = offer.peer();
        let Some(versions) = wire::decode(&wire::contiguous(&offer.versions)) else {
            self.questions.count_failed("unreadable");
            tracing::warn!(%peer, "an answer with registry versions cannot be read");
            return false;
        };
        let mut verified = Vec::with_capacity(versions.len());
        let mut refused = None;
        for version in versions {
            match self.verify(version) {
                Ok(version) => verified.push(version),
                Err(error) => {
                    // An honest peer sends none that is refused. The rest would cost a signature's
                    // check and a line in the log for each 68 bytes.
                    refused = Some(error);
                    break;
                }
            }
        }
        let taken = self.take_verified(verified);
        if let Some(error) = taken.refused.or(refused) {
            tracing::warn!(%peer, reason = error.reason(), "registry version refused");
        }
        taken.changed
    }

    /// Checks a version's signature and reads it, under no lock.
    fn verify(&self, version: SignedVersion) -> Result<Verified, RegistryError> {
        match version.verify(&self.key, &self.config) {
            Ok(read) => Ok((version, read)),
            Err(error) => {
                self.lock().refuse(&error);
                Err(error)
            }
        }
    }

    /// Writes the newest of these down, then puts all in force that are newer than what is.
    fn take_verified(&self, versions: Vec<Verified>) -> Taken {
        let mut taken = Taken::default();
        let mut intake = lock(&self.intake);
        let registry = |held: &Held| (held.registry.newest_number(), held.registry.number_min());
        let (held, min) = registry(&self.lock());
        let newest = versions.iter().max_by_key(|(_, version)| version.number);
        // One that is older, or held, is refused or known without a write.
        let newest = newest.filter(|(_, version)| version.number > held && version.number >= min);
        if let Some(newest) = newest {
            let written = intake.write(newest, Instant::now());
            if !self.lock().is_written(newest.1.number, written) {
                return taken;
            }
        }
        let mut held = self.lock();
        for (signed, version) in versions {
            match held.registry.offer_verified(signed, version) {
                Ok(Offered::Newest { .. }) => taken.changed = true,
                Ok(Offered::Known { .. }) => {}
                Err(error) => {
                    held.refuse(&error);
                    taken.refused = Some(error);
                    break;
                }
            }
        }
        if taken.changed {
            held.seen_at = Some(SystemTime::now());
            self.share(&held);
        }
        taken
    }

    /// When to call [`Self::retry_write`].
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        lock(&self.intake).retry_at()
    }

    /// Takes a version whose write failed, if its time has come; whether something changed.
    pub(crate) fn retry_write(&self) -> bool {
        let due = lock(&self.intake).take_due(Instant::now());
        due.is_some_and(|version| self.take_verified(vec![version]).changed)
    }
}
