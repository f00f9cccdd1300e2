//! The corpus of a target: a folder of inputs, which are also the seeds of mutation.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "code of tests: an error is a panic"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;

use crate::mutant::mutant;

/// Environment variable: encoders write their seeds anew, as `docs/reference` is.
const BLESS: &str = "MILLRACE_BLESS";

/// Bytes of a failed input that are printed; all of it is in the file.
const PRINTED_BYTES_MAX: usize = 96;

/// An input that an encoder wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    /// Name of its file in the corpus.
    pub name: &'static str,
    /// As on the wire.
    pub bytes: Vec<u8>,
    /// Whether its decoder accepts it.
    pub is_accepted: bool,
}

impl Seed {
    /// A seed of this name, which its decoder accepts.
    pub fn new(name: &'static str, bytes: impl Into<Vec<u8>>) -> Self {
        Self {
            name,
            bytes: bytes.into(),
            is_accepted: true,
        }
    }

    /// A seed of this name, which its decoder refuses, though an encoder may write it.
    pub fn refused(name: &'static str, bytes: impl Into<Vec<u8>>) -> Self {
        Self {
            is_accepted: false,
            ..Self::new(name, bytes)
        }
    }
}

/// The inputs that a target begins with. When its test fails, it leaves the bytes that failed in a
/// file below `target/tmp`, and prints where.
#[derive(Debug)]
pub struct Corpus {
    target: &'static str,
    /// In the order of their files' names.
    inputs: Vec<Vec<u8>>,
    failed: Mutex<Option<Vec<u8>>>,
}

impl Corpus {
    /// The corpus `folder/target/corpus`, which has `seeds` and may have more: inputs that once
    /// failed.
    ///
    /// # Panics
    /// When the folder lacks a seed or has it with other bytes: the wire has changed, or a seed.
    /// With `MILLRACE_BLESS=1` it is written instead.
    pub fn open(folder: &Path, target: &'static str, seeds: &[Seed]) -> Self {
        let folder = folder.join(target).join("corpus");
        assert!(!seeds.is_empty(), "{target} has no seed");
        if std::env::var_os(BLESS).is_some() {
            fs::create_dir_all(&folder).expect("the folder can be made");
        }
        for Seed { name, bytes, .. } in seeds {
            let file = folder.join(name);
            if std::env::var_os(BLESS).is_some() {
                fs::write(&file, bytes).expect("the seed can be written");
            }
            let held = fs::read(&file).unwrap_or_default();
            assert!(
                file.exists() && held == *bytes,
                "{} is stale, so the bytes on the wire have changed; to write the seeds anew, run \
                 {BLESS}=1 cargo test -p millrace-fuzz",
                file.display()
            );
        }
        let mut files: Vec<PathBuf> = fs::read_dir(&folder)
            .expect("the corpus can be read")
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        Self {
            target,
            inputs: files.iter().map(|file| fs::read(file).unwrap()).collect(),
            failed: Mutex::default(),
        }
    }

    /// Runs `check` on the seeds.
    ///
    /// # Panics
    /// When `check` does, and when a seed is not taken as it says.
    pub fn run_seeds(&self, seeds: &[Seed], check: impl Fn(&[u8]) -> bool) {
        for seed in seeds {
            let is_accepted = self.watch(&seed.bytes, &check);
            assert_eq!(is_accepted, seed.is_accepted, "seed {}", seed.name);
        }
    }

    /// Runs `check` on an input, and on the mutant that the input describes.
    ///
    /// # Panics
    /// When `check` does.
    pub fn run(&self, input: &[u8], check: impl Fn(&[u8]) -> bool) {
        self.watch(input, &check);
        if let Some(mutant) = mutant(&self.inputs, input) {
            self.watch(&mutant, &check);
        }
    }

    fn watch(&self, bytes: &[u8], check: impl Fn(&[u8]) -> bool) -> bool {
        let _watched = Watched {
            bytes,
            failed: &self.failed,
        };
        check(bytes)
    }
}

/// Keeps the bytes of a check that panics. bolero repeats a failure with simpler inputs; the last
/// one that fails is the simplest.
struct Watched<'a> {
    bytes: &'a [u8],
    failed: &'a Mutex<Option<Vec<u8>>>,
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        if thread::panicking()
            && let Ok(mut failed) = self.failed.lock()
        {
            *failed = Some(self.bytes.to_vec());
        }
    }
}

impl Drop for Corpus {
    fn drop(&mut self) {
        let failed = self.failed.get_mut().ok().and_then(Option::take);
        let Some(bytes) = failed.filter(|_| thread::panicking()) else {
            return;
        };
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
        let folder = root
            .expect("engine/fuzz is two folders below")
            .join("target/tmp");
        let file = folder.join(format!("fuzz-{}.bin", self.target));
        let written = fs::create_dir_all(&folder).and_then(|()| fs::write(&file, &bytes));
        let printed: String = bytes
            .iter()
            .take(PRINTED_BYTES_MAX)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        eprintln!(
            "{} failed on {} bytes, which begin with {printed}",
            self.target,
            bytes.len()
        );
        match written {
            Ok(()) => eprintln!(
                "they are in {}; keep them as __fuzz__/{}/corpus/fault-NAME",
                file.display(),
                self.target
            ),
            Err(error) => eprintln!("{} could not be written: {error}", file.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    fn open(folder: &Path, bytes: &[u8]) -> Option<Corpus> {
        catch_unwind(|| Corpus::open(folder, "some", &[Seed::new("seed", bytes)])).ok()
    }

    /// Protects the corpus from seeds of a wire that is no more, and keeps what once failed.
    #[test]
    fn a_corpus_is_what_encoders_write_and_what_failed() {
        let folder = tempfile::tempdir().unwrap();
        let corpus = folder.path().join("some/corpus");
        fs::create_dir_all(&corpus).unwrap();
        assert!(open(folder.path(), b"now").is_none(), "no file");
        fs::write(corpus.join("seed"), "now").unwrap();
        fs::write(corpus.join("fault-of-old"), "old").unwrap();
        assert!(open(folder.path(), b"later").is_none(), "another seed");
        let opened = open(folder.path(), b"now").unwrap();
        assert_eq!(opened.inputs, [b"old", b"now"]);
    }

    /// Protects the reader of a failure: what is kept is what was checked, not the script.
    #[test]
    fn the_bytes_that_failed_are_kept() {
        let corpus = Corpus {
            target: "some",
            inputs: vec![b"seed".to_vec()],
            failed: Mutex::default(),
        };
        let fails = |bad: &'static [u8]| {
            let check = move |bytes: &[u8]| {
                assert_ne!(bytes, bad);
                true
            };
            catch_unwind(AssertUnwindSafe(|| corpus.run(&[0, 1, 0, b'f'], check))).is_err()
        };
        assert!(!fails(b"weed"));
        assert_eq!(*corpus.failed.lock().unwrap(), None);
        assert!(fails(b"feed"));
        assert_eq!(corpus.failed.lock().unwrap().as_deref(), Some(&b"feed"[..]));
        assert!(fails(&[0, 1, 0, b'f']));
    }

    /// Protects the targets from seeds that never get behind the first check of their decoder.
    #[test]
    fn a_seed_is_taken_as_it_says() {
        let corpus = Corpus {
            target: "some",
            inputs: Vec::new(),
            failed: Mutex::default(),
        };
        let taken = |seed: Seed| {
            let check = |bytes: &[u8]| bytes == b"good";
            catch_unwind(AssertUnwindSafe(|| corpus.run_seeds(&[seed], check))).is_ok()
        };
        assert!(taken(Seed::new("seed", "good")) && taken(Seed::refused("seed", "bad")));
        assert!(!taken(Seed::new("seed", "bad")) && !taken(Seed::refused("seed", "good")));
    }
}
