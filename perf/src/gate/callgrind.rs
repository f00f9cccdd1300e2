//! Counts the instructions of one piece: this program again, under callgrind.
//!
//! 1. Only what runs inside [`crate::pieces::measured`] is counted: no start-up, no input building,
//!    no first pass.
//! 2. The environment is empty but for what is set here, and the piece runs on a thread of its own,
//!    so that neither the length of a path nor a variable moves its stack.
//! 3. libc's copies are the plain ones of x86-64: which one it would choose, and so the count,
//!    depends on the machine.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use thiserror::Error;

use crate::pieces::Piece;

/// Features by which glibc chooses among its copies; by name, as there is no switch for all.
const PLAIN_LIBC: &str = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-EVEX,-AVX2,-AVX,-SSE4_1,\
                          -SSE4_2,-SSSE3,-ERMS,-FSRM,-AVX_Fast_Unaligned_Load,-Fast_Copy_Backward";

/// Why a piece could not be counted. Never the piece's cost.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CountError {
    /// The file of counts cannot be made or read.
    #[error("cannot access {path}: {source}")]
    LocalFile {
        /// The file or folder.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// valgrind does not start.
    #[error("cannot start valgrind: {source}; `make setup` installs it")]
    LocalValgrind {
        /// The error of the system.
        source: io::Error,
    },
    /// The run failed.
    #[error("{piece} failed under valgrind:\n{stderr}")]
    LocalRun {
        /// The piece.
        piece: &'static str,
        /// The output of valgrind and of the piece.
        stderr: String,
    },
    /// Nothing was counted: the function to collect by was not found.
    #[error("callgrind collected nothing for {0}")]
    LocalEmpty(&'static str),
}

/// Instructions of one pass. `program` must run the piece when called with `--piece NAME`; the
/// profile stays in `folder`, for `callgrind_annotate`.
///
/// # Errors
/// When valgrind is missing, or the run fails, or nothing was collected.
pub fn count(program: &Path, piece: &Piece, folder: &Path) -> Result<u64, CountError> {
    let profile = folder.join(format!("{}.callgrind", piece.name));
    let file = |path: &Path, source| CountError::LocalFile {
        path: path.to_owned(),
        source,
    };
    fs::create_dir_all(folder).map_err(|source| file(folder, source))?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no"])
        .arg("--toggle-collect=*pieces::measured*")
        .arg(format!("--callgrind-out-file={}", profile.display()))
        .arg(program)
        .args(["--piece", piece.name])
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("GLIBC_TUNABLES", PLAIN_LIBC)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| CountError::LocalValgrind { source })?;
    if !output.status.success() {
        return Err(CountError::LocalRun {
            piece: piece.name,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    let text = fs::read_to_string(&profile).map_err(|source| file(&profile, source))?;
    total(&text).ok_or(CountError::LocalEmpty(piece.name))
}

/// The sum at the end of a profile; none when it is missing or zero.
fn total(profile: &str) -> Option<u64> {
    let line = profile
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("totals:"))?;
    let instructions = line.split_whitespace().next()?.parse().ok()?;
    (instructions > 0).then_some(instructions)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A profile without a sum must not pass as one that costs nothing.
    #[test]
    fn reads_the_sum() {
        let profile = "version: 1\nevents: Ir\nsummary: 9\n\nfn=(1) a\n3 9\n\ntotals: 123456\n";
        assert_eq!(total(profile), Some(123_456));
        assert_eq!(total("events: Ir\n\ntotals: 0\n"), None);
        assert_eq!(total("events: Ir\ntotals:\n"), None);
        assert_eq!(total("events: Ir\n"), None);
    }
}
