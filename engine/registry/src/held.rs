//! What is in force of the registry, and what became of the rest: refusals, and writes that failed.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use millrace_protocol::registry::{Registry, RegistryError};

use crate::intake::Write;
use crate::sources::Sources;

/// What is in force, and what became of the rest.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) registry: Registry,
    /// How many versions were refused, by reason.
    pub(crate) refused: BTreeMap<&'static str, u64>,
    /// When the node saw the newest version first, in whichever run.
    pub(crate) seen_at: Option<SystemTime>,
    pub(crate) writes_failed: u64,
    /// Why the newest version is not kept as it should be.
    pub(crate) kept_failure: Option<String>,
}

impl Held {
    /// What an earlier run has left.
    pub(crate) fn of_earlier_run(sources: &mut Sources) -> Self {
        let mut held = Self {
            registry: Registry::new(sources.key, sources.config),
            refused: BTreeMap::new(),
            seen_at: None,
            writes_failed: 0,
            kept_failure: None,
        };
        let kept = sources.kept.as_mut();
        let Some(written) = kept.and_then(|kept| kept.written.take()) else {
            return held;
        };
        let number = written.number;
        held.registry.set_number_min(number);
        let taken = written
            .version
            .and_then(|(signed, version)| Ok(held.registry.offer_verified(signed, version)?));
        match taken {
            Ok(_) => {
                held.seen_at = Some(written.seen_at);
                let age_s = held.age().map_or(0, |age| age.as_secs());
                tracing::info!(
                    number,
                    age_s,
                    "the newest registry version of an earlier run; folder and peers may have a \
                     newer one"
                );
            }
            Err(error) => {
                let reason = error.reason();
                tracing::error!(
                    number, reason, %error,
                    "the newest registry version of an earlier run cannot be read; older ones are \
                     refused"
                );
                held.kept_failure = Some(format!("version {number} of an earlier run: {error}"));
            }
        }
        held
    }

    /// Counts and tells what became of a write; whether the version is on disk.
    pub(crate) fn is_written(&mut self, number: u64, write: Write) -> bool {
        match write {
            Write::Done => {
                if self.kept_failure.take().is_some() {
                    tracing::info!(number, "the newest registry version is kept again");
                }
                true
            }
            Write::Waits => false,
            Write::Failed(error) => {
                self.writes_failed += 1;
                let text = format!("version {number} cannot be written: {error}");
                if self.kept_failure.as_ref() != Some(&text) {
                    tracing::error!(
                        number, %error,
                        "a registry version cannot be written down; it is not in force, and is \
                         tried again"
                    );
                }
                self.kept_failure = Some(text);
                false
            }
        }
    }

    pub(crate) fn age(&self) -> Option<Duration> {
        // A clock that was set back says nothing of the age.
        self.seen_at.map(|at| at.elapsed().unwrap_or_default())
    }

    pub(crate) fn refuse(&mut self, error: &RegistryError) {
        *self.refused.entry(error.reason()).or_default() += 1;
    }
}
