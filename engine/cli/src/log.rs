//! What the process says on stderr: the log, messages for people, and the text of a panic.
//!
//! A node must not wait for the reader of its stderr, and must not end with it. From
//! [`start_writer`] on, a line goes into a queue of at most [`QUEUE_BYTES_MAX`] bytes, and one
//! thread writes it. Lines that find no room, or cannot be written, are counted; the log says how
//! many they were when stderr takes lines again. Before, and in commands without a node, a line is
//! written in place.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tracing_subscriber::EnvFilter;

/// How many bytes of lines wait for the thread; it holds as many again while it writes them.
const QUEUE_BYTES_MAX: usize = 128 << 10;

/// How long the end of the process, and a panic, wait for what is queued.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// The queue of stderr, once its thread runs.
static STDERR: OnceLock<Arc<Queue>> = OnceLock::new();

/// Starts the log with a filter such as `info` or `millrace_transport=debug`. Dropping the guard
/// waits for what is queued, at most [`FLUSH_MAX`].
pub(crate) fn start(filter: &str) -> Flush {
    let subscriber = tracing_subscriber::fmt()
        .with_writer(|| Stderr)
        // It would report by `eprintln`, which panics when the reader is gone.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal())
        .with_env_filter(EnvFilter::new(filter))
        .finish();
    // Fails only when a log was started before, which nothing here does.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Flush
}

/// Lets a thread of its own write what the process says. For commands that run shards, before they
/// start them; a thread has the capabilities of the one that starts it, so not before those are
/// dropped.
///
/// # Errors
/// Why the system gives no thread.
pub(crate) fn start_writer() -> io::Result<()> {
    let queue = Arc::new(Queue::default());
    let written = Arc::clone(&queue);
    std::thread::Builder::new()
        .name("millrace-log".into())
        .spawn(move || written.write_to(io::stderr()))?;
    // Fails only when it was set before, which nothing here does.
    let _ = STDERR.set(queue);
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let mut text = format!("thread '{}' {panic}\n", thread.name().unwrap_or("unnamed"));
        let trace = Backtrace::capture();
        if trace.status() == BacktraceStatus::Captured {
            // Writing into a string does not fail.
            let _ = writeln!(text, "{trace}");
        }
        say(text.as_bytes());
        // Where a panic aborts, nothing else does.
        flush();
    }));
    Ok(())
}

/// Writes whole lines to stderr, or queues them.
pub(crate) fn say(lines: &[u8]) {
    match STDERR.get() {
        Some(queue) => queue.push(lines),
        // There is no way to report that stderr is closed.
        None => drop(io::stderr().write_all(lines)),
    }
}

fn flush() {
    if let Some(queue) = STDERR.get() {
        queue.flush(FLUSH_MAX);
    }
}

/// Dropped at the end of the process.
#[must_use]
#[derive(Debug)]
pub(crate) struct Flush;

impl Drop for Flush {
    fn drop(&mut self) {
        flush();
    }
}

/// What the log writes to: it gives a whole line at once.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        say(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines on their way to the thread that writes them.
#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Lines that found no room since the thread last looked. They came after `lines`.
    lost: usize,
    /// The thread has taken lines and has not come back.
    is_writing: bool,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.lost == 0
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, lines: &[u8]) {
        let mut waiting = self.lock();
        // What came after a loss must not be written before the loss is told.
        if waiting.lost > 0 || waiting.lines.len() + lines.len() > QUEUE_BYTES_MAX {
            waiting.lost += count(lines);
        } else {
            waiting.lines.extend_from_slice(lines);
        }
        drop(waiting);
        self.changed.notify_all();
    }

    /// Waits until all is written or given up, at most for `limit`.
    fn flush(&self, limit: Duration) {
        let waits = |waiting: &mut Waiting| waiting.is_writing || !waiting.is_empty();
        drop(self.changed.wait_timeout_while(self.lock(), limit, waits));
    }

    /// For ever.
    fn write_to(&self, mut writer: impl Write) {
        let (mut lines, mut lost) = (Vec::new(), 0);
        loop {
            lost += self.take(&mut lines);
            lost += write_lines(&mut writer, &lines);
            lines.clear();
            if lost > 0 {
                let notice = format!("millrace: lines of the log lost here: {lost}\n");
                if writer.write_all(notice.as_bytes()).is_ok() {
                    lost = 0;
                }
            }
        }
    }

    /// Waits for lines and takes them all; how many were lost behind them.
    fn take(&self, lines: &mut Vec<u8>) -> usize {
        let mut waiting = self.lock();
        waiting.is_writing = false;
        self.changed.notify_all();
        let mut waiting = self
            .changed
            .wait_while(waiting, |waiting| waiting.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        waiting.is_writing = true;
        std::mem::swap(lines, &mut waiting.lines);
        std::mem::take(&mut waiting.lost)
    }
}

/// Writes lines one by one; how many could not be written.
fn write_lines(writer: &mut impl Write, lines: &[u8]) -> usize {
    let lines = lines.split_inclusive(|byte| *byte == b'\n');
    lines.filter(|line| writer.write_all(line).is_err()).count()
}

fn count(lines: &[u8]) -> usize {
    lines.split_inclusive(|byte| *byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use millrace_testkit::{PATIENCE, until};

    use super::*;

    /// Takes a line, or fails, when the test says so.
    struct Reader {
        takes: Receiver<bool>,
        lines: Sender<String>,
    }

    impl Write for Reader {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            if self.takes.recv() != Ok(true) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            drop(self.lines.send(String::from_utf8_lossy(line).into_owned()));
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A queue whose reader takes a line for each `true`, and the lines that it took.
    fn queue() -> (Arc<Queue>, Sender<bool>, Receiver<String>) {
        let ((take, takes), (lines, taken)) = (channel(), channel());
        let queue = Arc::new(Queue::default());
        let written = Arc::clone(&queue);
        std::thread::spawn(move || written.write_to(Reader { takes, lines }));
        (queue, take, taken)
    }

    // Protects shards from a reader that stands still: no push waits, the memory has its bound, and
    // the log tells where it has a gap.
    #[test]
    fn lines_without_room_are_counted_and_told_where_they_are_missing() {
        let (queue, take, taken) = queue();
        let line = format!("{}\n", "x".repeat(1023));
        queue.push(b"first\n");
        until("the reader holds it", || queue.lock().is_writing);
        let fitting = QUEUE_BYTES_MAX / line.len();
        for _ in 0..fitting + 3 {
            queue.push(line.as_bytes());
        }
        assert_eq!(queue.lock().lines.len(), QUEUE_BYTES_MAX);
        queue.flush(Duration::from_millis(1));

        let next = || {
            take.send(true).unwrap();
            taken.recv_timeout(PATIENCE).unwrap()
        };
        assert_eq!(next(), "first\n");
        for _ in 0..fitting {
            assert_eq!(next(), line);
        }
        assert_eq!(next(), "millrace: lines of the log lost here: 3\n");
        queue.push(b"later\n");
        assert_eq!(next(), "later\n");
        queue.flush(PATIENCE);
        assert!(!queue.lock().is_writing);
    }

    // Protects operators whose disk was full: the log tells how many lines are missing.
    #[test]
    fn lines_that_cannot_be_written_are_told_once_writing_works() {
        let (queue, take, taken) = queue();
        queue.push(b"one\ntwo\n");
        // Two lines and what tells of their loss.
        for _ in 0..3 {
            take.send(false).unwrap();
        }
        queue.flush(PATIENCE);
        queue.push(b"three\n");
        for expected in ["three\n", "millrace: lines of the log lost here: 2\n"] {
            take.send(true).unwrap();
            assert_eq!(taken.recv_timeout(PATIENCE).unwrap(), expected);
        }
    }
}
