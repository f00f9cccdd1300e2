//! Which version is written down next, and when a write that failed is tried again.
//!
//! 1. At most one version waits for its write: the newest, which says everything.

use std::io;
use std::time::{Duration, Instant};

use millrace_protocol::backoff::{Backoff, BackoffConfig};
use millrace_protocol::rng::Rng;

use crate::kept::KeptVersion;
use crate::reader::Verified;

/// Steps between two writes: a full disk is looked at now and then, and not with each answer of a
/// peer.
const RETRY: BackoffConfig = BackoffConfig {
    base: Duration::from_millis(500),
    cap: Duration::from_secs(30),
};

/// What became of a version that is to be written down.
#[derive(Debug)]
pub(crate) enum Write {
    /// It is on disk, or the node keeps none.
    Done,
    /// It waits for the next attempt.
    Waits,
    /// It was tried, and waits for the next attempt.
    Failed(io::Error),
}

/// Writes versions down before they are in force.
#[derive(Debug)]
pub(crate) struct Intake {
    kept: Option<KeptVersion>,
    /// Number of the version on disk; 0 if there is none that can be read.
    written: u64,
    waiting: Option<Verified>,
    retry_at: Option<Instant>,
    backoff: Backoff,
    rng: Rng,
}

impl Intake {
    /// An intake whose file has the version `written`.
    pub(crate) fn new(kept: Option<KeptVersion>, written: u64) -> Self {
        Self {
            kept: kept.filter(KeptVersion::is_writable),
            written,
            waiting: None,
            retry_at: None,
            backoff: Backoff::new(RETRY),
            // The jitter is of no use here: a disk has one node.
            rng: Rng::new(0),
        }
    }

    /// Has a version written down, if it is newer than the one that is.
    pub(crate) fn write(&mut self, newest: &Verified, now: Instant) -> Write {
        let number = newest.1.number;
        let Some(kept) = &self.kept else {
            return Write::Done;
        };
        if number <= self.written {
            return Write::Done;
        }
        if self.retry_at.is_some_and(|at| now < at) {
            self.wait(newest);
            return Write::Waits;
        }
        if let Err(error) = kept.write(number, &newest.0) {
            self.wait(newest);
            self.retry_at = Some(now + self.backoff.next(&mut self.rng));
            return Write::Failed(error);
        }
        self.written = number;
        self.backoff.reset();
        self.waiting.take_if(|waiting| waiting.1.number <= number);
        // A newer one than this may wait.
        self.retry_at = self.waiting.is_some().then_some(now);
        Write::Done
    }

    /// When to take what waits.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// What waits, when its time has come.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<Verified> {
        self.retry_at.take_if(|at| *at <= now)?;
        self.waiting.take()
    }

    fn wait(&mut self, version: &Verified) {
        let waiting = self.waiting.as_ref();
        if waiting.is_none_or(|waiting| waiting.1.number < version.1.number) {
            self.waiting = Some(version.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::registry::RegistryConfig;

    use super::*;
    use crate::folder::tests::{key, version};

    fn verified(number: u64) -> Verified {
        let signed = version(number, &key());
        let config = RegistryConfig::default();
        let read = signed.verify(&key().public_key(), &config).unwrap();
        (signed, read)
    }

    /// Protects the removal of a member: what could not be written is tried again, in longer and
    /// longer steps, and always the newest version that came meanwhile.
    #[test]
    fn a_write_that_fails_is_tried_again_with_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("kept");
        let open = || {
            let config = RegistryConfig::default();
            KeptVersion::open(&dir, &key().public_key(), &config).unwrap()
        };
        let mut intake = Intake::new(Some(open()), 0);
        let mut now = Instant::now();
        assert!(matches!(intake.write(&verified(1), now), Write::Done));

        std::fs::remove_dir_all(&dir).unwrap();
        let first = intake.write(&verified(2), now);
        assert!(matches!(first, Write::Failed(_)), "{first:?}");
        for number in [4, 3] {
            let early = intake.write(&verified(number), now);
            assert!(matches!(early, Write::Waits), "{early:?}");
        }
        assert!(intake.take_due(now).is_none());
        let mut steps = Vec::new();
        for _ in 0..3 {
            let at = intake.retry_at().unwrap();
            steps.push(at - now);
            now = at;
            let due = intake.take_due(now).unwrap();
            assert_eq!(due.1.number, 4);
            assert!(matches!(intake.write(&due, now), Write::Failed(_)));
        }
        assert!(
            steps[0] < RETRY.base + RETRY.base && steps[2] > steps[0],
            "{steps:?}"
        );

        std::fs::create_dir(&dir).unwrap();
        now = intake.retry_at().unwrap();
        // An older one comes first: the newer one stays.
        assert!(matches!(intake.write(&verified(3), now), Write::Done));
        let due = intake.take_due(now).unwrap();
        assert!(matches!(intake.write(&due, now), Write::Done));
        assert_eq!(open().written.unwrap().number, 4);
        assert_eq!(intake.retry_at(), None);
    }
}
