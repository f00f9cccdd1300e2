//! The helper: a child process that keeps the privileges that the node gives up, and acts for it.
//!
//! 1. The node starts it before it drops its capabilities, and tells it once where the pins are and
//!    which `nft` to run. The node cannot point it elsewhere later.
//! 2. It takes typed requests of a bounded size from one socket, its standard input, and from
//!    nothing else. No request removes a program, an interface or the table. Any other message ends
//!    the conversation.
//! 3. It ends when the other end of the socket closes, as it does when the node dies.
//! 4. It answers requests one by one, in order. After an answer that came too late the node takes
//!    no other: it could belong to the request before.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use caps::Capability;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::edge::Edge;
use crate::interface::AttachMode;
use crate::nft::{self, Fingerprint, Nft, NftRequest};
use crate::pins::{EdgeLock, Pins};
use crate::privileges::drop_capabilities;

/// Longest message, in bytes: 65,534 outbound rules of a few prefixes each.
pub const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// How long a request may take before the node counts the helper as dead. Loading a program takes a
/// second or two.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

// When `nft` takes too long, the helper still answers in time, and lives on.
const _: () = assert!(nft::WITHIN.as_secs() < ANSWER_WITHIN.as_secs());

/// How long the helper may take to end after the node has closed the socket, and the time between
/// two looks at it. The end of a node is promised within a second.
const END_WITHIN: Duration = Duration::from_millis(300);
const END_LOOK: Duration = Duration::from_millis(2);

/// Capabilities that the helper keeps: for loading and attaching, and for `nft`.
const KEPT: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
];

/// What the node tells the helper at its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Where the pins are.
    pub pins: Pins,
    /// How to reach nftables.
    pub nft: Nft,
}

/// A request of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Ask nftables.
    Nft(NftRequest),
    /// Attach to one more interface, or again to one that was made anew.
    Attach {
        /// Its name.
        interface: String,
        /// The mode of XDP.
        mode: AttachMode,
    },
}

/// An answer of the helper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The request is done. After a look: the fingerprint of the edge's table, if there is one.
    Done(Option<Fingerprint>),
    /// The request failed, and nothing has changed.
    Failed {
        /// The error as a metric label.
        reason: String,
        /// The error for people.
        message: String,
    },
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HelperError {
    /// The helper could not be started.
    #[error("cannot start the helper: {0}")]
    Start(#[source] io::Error),
    /// The helper is gone, or did not answer in time.
    #[error("the helper is gone; restart the node to change programs or nftables again")]
    Gone(#[source] io::Error),
    /// The node ends: see [`HangUp`].
    #[error("the node ends, and waits for its helper no longer")]
    HungUp,
    /// The request does not fit into a message.
    #[error("a message of {bytes} bytes is above {MESSAGE_BYTES_MAX}")]
    TooLong {
        /// Its size.
        bytes: usize,
    },
    /// The helper tried, and nothing has changed.
    #[error("{message}")]
    Refused {
        /// The error as a metric label.
        reason: String,
        /// The error for people.
        message: String,
    },
}

impl HelperError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &str {
        match self {
            Self::Start(_) => "helper_start",
            Self::Gone(_) => "helper_gone",
            Self::HungUp => "helper_hung_up",
            Self::TooLong { .. } => "helper_too_long",
            Self::Refused { reason, .. } => reason,
        }
    }
}

/// The node's end of the conversation. On drop it closes the conversation, and waits up to 300 ms
/// until the helper ends; then it kills it with all that it started, for example an `nft` that
/// hangs.
#[derive(Debug)]
pub struct Helper {
    child: Child,
    socket: Mutex<UnixStream>,
    line: Arc<Line>,
}

/// The way to end the conversation while a thread waits for an answer.
#[derive(Debug)]
struct Line {
    /// The same socket as the helper's, for which a thread may hold the lock.
    socket: UnixStream,
    is_hung_up: AtomicBool,
}

impl Line {
    fn hang_up(&self) {
        self.is_hung_up.store(true, Ordering::Release);
        // It fails where the other end has closed already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Ends the conversation when it is dropped: a request that waits, and each one after it, fails at
/// once with [`HelperError::HungUp`].
#[derive(Debug)]
pub struct HangUp(Arc<Line>);

impl Drop for HangUp {
    fn drop(&mut self) {
        self.0.hang_up();
    }
}

impl Helper {
    /// Starts the helper. `command` is this binary with the subcommand that calls [`serve_stdin`].
    ///
    /// # Errors
    ///
    /// [`HelperError::Start`] if the process does not start, [`HelperError::Gone`] if it does not
    /// answer.
    pub fn start(mut command: Command, setup: &Setup) -> Result<Self, HelperError> {
        let (ours, theirs) = UnixStream::pair().map_err(HelperError::Start)?;
        ours.set_read_timeout(Some(ANSWER_WITHIN))
            .map_err(HelperError::Start)?;
        ours.set_write_timeout(Some(ANSWER_WITHIN))
            .map_err(HelperError::Start)?;
        let line = Line {
            socket: ours.try_clone().map_err(HelperError::Start)?,
            is_hung_up: AtomicBool::new(false),
        };
        // The helper gets a process group of its own, so that a Ctrl-C meant for the node lets it
        // end in order.
        let child = command
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .map_err(HelperError::Start)?;
        // The command holds a copy of the other end, which must be the helper's alone.
        drop(command);
        let helper = Self {
            child,
            socket: Mutex::new(ours),
            line: Arc::new(line),
        };
        helper.exchange(setup)?;
        Ok(helper)
    }

    /// What ends the conversation from another thread.
    #[must_use]
    pub fn hang_up_on_drop(&self) -> HangUp {
        HangUp(Arc::clone(&self.line))
    }

    /// Sends a request, and waits up to 60 seconds until it is done.
    ///
    /// # Errors
    ///
    /// See [`HelperError`].
    pub fn request(&self, request: &Request) -> Result<(), HelperError> {
        self.exchange(request).map(drop)
    }

    /// Does what [`Nft::perform`] does, as [`Self::request`].
    ///
    /// # Errors
    ///
    /// See [`HelperError`].
    pub fn nft(&self, request: &NftRequest) -> Result<Option<Fingerprint>, HelperError> {
        self.exchange(&Request::Nft(request.clone()))
    }

    /// Sends a message and returns what was done. A failure becomes an error.
    fn exchange(&self, message: &impl Serialize) -> Result<Option<Fingerprint>, HelperError> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = serde_json::to_vec(message).map_err(|error| HelperError::Gone(error.into()))?;
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(HelperError::TooLong { bytes: bytes.len() });
        }
        let answer = send(&mut *socket, &bytes).and_then(|()| receive(&mut *socket));
        let answer =
            answer.and_then(|answer| answer.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()));
        match answer {
            Ok(Answer::Failed { reason, message }) => Err(HelperError::Refused { reason, message }),
            Ok(Answer::Done(fingerprint)) => Ok(fingerprint),
            Err(_) if self.line.is_hung_up.load(Ordering::Acquire) => Err(HelperError::HungUp),
            Err(error) => {
                tracing::debug!(%error, "the helper does not answer");
                // A late answer would be taken for that of the next request.
                let _ = socket.shutdown(Shutdown::Both);
                Err(HelperError::Gone(error))
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // The helper ends when it looks for the next request.
        self.line.hang_up();
        let until = Instant::now() + END_WITHIN;
        let ended = loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < until => std::thread::sleep(END_LOOK),
                // The helper may wait for something, for example `nft`, which must not change the
                // table under the next node. Its process group is its own.
                Ok(None) => {
                    let group = Pid::from_child(&self.child);
                    let killed = kill_process_group(group, Signal::KILL).map_err(io::Error::from);
                    break killed.and_then(|()| self.child.wait()).map(drop);
                }
                ended => break ended.map(drop),
            }
        };
        if let Err(error) = ended {
            tracing::warn!(%error, "cannot wait for the helper");
        }
    }
}

/// The main function of the helper: serves the socket that is its standard input until the other
/// end closes.
///
/// # Errors
///
/// The error that broke the conversation. A closed socket is no error.
pub fn serve_stdin() -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    serve(socket)
}

/// Serves one socket until its other end closes. It first gives up the capabilities that it does
/// not need.
///
/// # Errors
///
/// The error that broke the conversation. A closed socket is no error.
pub fn serve(mut socket: UnixStream) -> io::Result<()> {
    drop_capabilities(&KEPT).map_err(io::Error::other)?;
    let Some(setup) = receive::<Setup>(&mut socket)? else {
        return Ok(());
    };
    answer(&mut socket, &Answer::Done(None))?;
    while let Some(request) = receive(&mut socket)? {
        let done = perform(&setup, &request);
        if let Answer::Failed { message, .. } = &done {
            // The node logs the error, once.
            tracing::debug!(message, "the helper could not serve the request");
        }
        answer(&mut socket, &done)?;
    }
    Ok(())
}

fn perform(setup: &Setup, request: &Request) -> Answer {
    let done = match request {
        Request::Nft(request) => setup
            .nft
            .perform(request)
            .map_err(|error| (error.reason(), error.to_string())),
        Request::Attach { interface, mode } => Edge::adopt(&setup.pins)
            // The node that asks holds the lock until it has the answer.
            .and_then(|edge| edge.attach_under(interface, *mode, &EdgeLock::of_requester()))
            .map(|()| None)
            .map_err(|error| (error.reason(), error.to_string())),
    };
    match done {
        Ok(fingerprint) => Answer::Done(fingerprint),
        Err((reason, message)) => Answer::Failed {
            reason: reason.to_owned(),
            message,
        },
    }
}

fn answer(socket: &mut impl Write, answer: &Answer) -> io::Result<()> {
    send(socket, &serde_json::to_vec(answer)?)
}

/// A message is its length in four bytes, little-endian, then that many bytes of JSON.
fn send(socket: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    socket.write_all(&length.to_le_bytes())?;
    socket.write_all(bytes)
}

/// None if the other end has closed between two messages.
fn receive<T: DeserializeOwned>(socket: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    let read = loop {
        match socket.read(&mut length) {
            // A signal interrupts the read, and so does the end of an io_uring that this thread
            // had.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => break read?,
        }
    };
    match read {
        0 => return Ok(None),
        read => socket.read_exact(&mut length[read..])?,
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MESSAGE_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {length} bytes is above {MESSAGE_BYTES_MAX}"),
        ));
    }
    let mut bytes = vec![0; length];
    socket.read_exact(&mut bytes)?;
    Ok(Some(serde_json::from_slice(&bytes)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded_and_whole() {
        let mut wire = Vec::new();
        send(
            &mut wire,
            &serde_json::to_vec(&Request::Nft(NftRequest::Look)).unwrap(),
        )
        .unwrap();
        let request: Option<Request> = receive(&mut wire.as_slice()).unwrap();
        assert_eq!(request, Some(Request::Nft(NftRequest::Look)));
        assert_eq!(receive::<Request>(&mut [].as_slice()).unwrap(), None);

        let cut = &wire[..wire.len() - 1];
        let error = receive::<Request>(&mut { cut }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);

        let long = u32::MAX.to_le_bytes();
        let error = receive::<Request>(&mut long.as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    /// Interrupted before each read.
    struct Interrupted<R>(R, bool);

    impl<R: Read> Read for Interrupted<R> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            self.0.read(buffer)
        }
    }

    #[test]
    fn an_interruption_ends_no_conversation() {
        let mut wire = Vec::new();
        send(
            &mut wire,
            &serde_json::to_vec(&Request::Nft(NftRequest::Look)).unwrap(),
        )
        .unwrap();
        let mut wire = Interrupted(wire.as_slice(), false);
        let request: Option<Request> = receive(&mut wire).unwrap();
        assert_eq!(request, Some(Request::Nft(NftRequest::Look)));
        assert_eq!(receive::<Request>(&mut wire).unwrap(), None);
    }

    #[test]
    fn what_it_does_not_know_is_refused() {
        let mut wire = Vec::new();
        send(&mut wire, br#"{"run": "/bin/sh"}"#).unwrap();
        assert!(receive::<Request>(&mut wire.as_slice()).is_err());
    }
}
