//! The helper: a child process that keeps the privileges which the node gives up, and does a few things for it.
//!
//! 1. It is started before capabilities are dropped, and told then, once, where the pins are and which `nft` to run: the
//!    node cannot point it elsewhere later.
//! 2. It takes typed requests of a bounded size from one socket, its standard input, and nothing from anywhere else. They are those that the
//!    node makes: none takes a program, an interface or the table away, and what is none of them ends the conversation.
//! 3. It ends when the other end closes, which the node's death does.
//! 4. Requests are answered one by one, in order. After an answer that did not come in time there is no other: it could be the one before.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use caps::Capability;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::edge::Edge;
use crate::nft::{self, Fingerprint, Nft, NftError, Table};
use crate::pins::Pins;
use crate::privileges::drop_capabilities;
use crate::state::AttachMode;

/// Longest message, in bytes: 65,534 outbound rules of a few prefixes each.
pub const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// How long a request may take before the helper counts as dead: loading a program takes a second or two.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

// What `nft` does not do in time is answered, and the helper goes on.
const _: () = assert!(nft::WITHIN.as_secs() < ANSWER_WITHIN.as_secs());

/// How long it may take to end when nobody asks any more; and between two looks.
const END_WITHIN: Duration = Duration::from_secs(5);
const END_LOOK: Duration = Duration::from_millis(2);

/// What the helper keeps: loading and attaching, and what `nft` needs.
const KEPT: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
];

/// What the helper is told at its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Where the pins are.
    pub pins: Pins,
    /// How to reach nftables.
    pub nft: Nft,
}

/// What the node may ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Say whether the edge's table could be replaced.
    CheckNft(Table),
    /// Replace it.
    ApplyNft(Table),
    /// Say what it is now.
    LookAtNft,
    /// Attach to one more interface, or again to one that was made anew.
    Attach {
        /// Its name.
        interface: String,
        /// Where in the kernel.
        mode: AttachMode,
    },
}

/// What the helper says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done,
    /// What the edge's table is now; none: there is no such table.
    Nft(Option<Fingerprint>),
    /// Nothing has changed.
    Failed {
        /// The error as a metric label.
        reason: String,
        /// The error for people.
        message: String,
    },
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HelperError {
    /// It could not be started.
    #[error("cannot start the helper: {0}")]
    Start(#[source] io::Error),
    /// It is gone, or does not answer.
    #[error("the helper is gone; restart the node to change programs or nftables again")]
    Gone(#[source] io::Error),
    /// What is asked does not fit into a message.
    #[error("a message of {bytes} bytes is above {MESSAGE_BYTES_MAX}")]
    TooLong {
        /// Its size.
        bytes: usize,
    },
    /// It tried, and nothing has changed.
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
            Self::TooLong { .. } => "helper_too_long",
            Self::Refused { reason, .. } => reason,
        }
    }
}

/// The node's end. Dropped, it closes the socket and waits for the helper's end, or ends it.
#[derive(Debug)]
pub struct Helper {
    child: Child,
    /// None once it is closed.
    socket: Option<Mutex<UnixStream>>,
}

impl Helper {
    /// Starts the helper: `command` is this binary with the subcommand that calls [`serve_stdin`].
    ///
    /// # Errors
    ///
    /// [`HelperError::Start`].
    pub fn start(mut command: Command, setup: &Setup) -> Result<Self, HelperError> {
        let (ours, theirs) = UnixStream::pair().map_err(HelperError::Start)?;
        ours.set_read_timeout(Some(ANSWER_WITHIN))
            .map_err(HelperError::Start)?;
        ours.set_write_timeout(Some(ANSWER_WITHIN))
            .map_err(HelperError::Start)?;
        // In a process group of its own, so that a Ctrl-C meant for the node leaves it to end in order.
        let child = command
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .map_err(HelperError::Start)?;
        // The command holds the other end as well, and its end must be the helper's alone.
        drop(command);
        let helper = Self {
            child,
            socket: Some(Mutex::new(ours)),
        };
        helper.exchange(setup)?;
        Ok(helper)
    }

    /// Asks for something and waits until it is done.
    ///
    /// # Errors
    ///
    /// See [`HelperError`].
    pub fn request(&self, request: &Request) -> Result<(), HelperError> {
        self.exchange(request).map(drop)
    }

    /// What the edge's table is now; none: there is no such table.
    ///
    /// # Errors
    ///
    /// See [`HelperError`].
    pub fn nft_fingerprint(&self) -> Result<Option<Fingerprint>, HelperError> {
        match self.exchange(&Request::LookAtNft)? {
            Answer::Nft(fingerprint) => Ok(fingerprint),
            answer => Err(HelperError::Gone(io::Error::other(format!(
                "it answered {answer:?}"
            )))),
        }
    }

    /// What it answers, a failure apart.
    fn exchange(&self, message: &impl Serialize) -> Result<Answer, HelperError> {
        let Some(socket) = &self.socket else {
            return Err(HelperError::Gone(io::ErrorKind::NotConnected.into()));
        };
        let mut socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = serde_json::to_vec(message).map_err(|error| HelperError::Gone(error.into()))?;
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(HelperError::TooLong { bytes: bytes.len() });
        }
        let answer = send(&mut *socket, &bytes).and_then(|()| receive(&mut *socket));
        let answer =
            answer.and_then(|answer| answer.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()));
        match answer {
            Ok(Answer::Failed { reason, message }) => Err(HelperError::Refused { reason, message }),
            Ok(answer) => Ok(answer),
            Err(error) => {
                tracing::debug!(%error, "the helper does not answer");
                // An answer that is late would be taken for that of the next request.
                let _ = socket.shutdown(Shutdown::Both);
                Err(HelperError::Gone(error))
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // Closes our end, which ends the helper.
        self.socket = None;
        let until = Instant::now() + END_WITHIN;
        let ended = loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < until => std::thread::sleep(END_LOOK),
                // Whatever it waits for, as for `nft`.
                Ok(None) => break self.child.kill().and_then(|()| self.child.wait()).map(drop),
                ended => break ended.map(drop),
            }
        };
        if let Err(error) = ended {
            tracing::warn!(%error, "cannot wait for the helper");
        }
    }
}

/// The helper's main: serves the socket that is its standard input until the other end closes.
///
/// # Errors
///
/// What broke the conversation; a closed socket is no error.
pub fn serve_stdin() -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    serve(socket)
}

/// Serves one socket until its other end closes. Gives up the capabilities that it has no use for.
///
/// # Errors
///
/// What broke the conversation; a closed socket is no error.
pub fn serve(mut socket: UnixStream) -> io::Result<()> {
    drop_capabilities(&KEPT).map_err(io::Error::other)?;
    let Some(setup) = receive::<Setup>(&mut socket)? else {
        return Ok(());
    };
    answer(&mut socket, &Answer::Done)?;
    while let Some(request) = receive(&mut socket)? {
        let done = perform(&setup, &request);
        if let Answer::Failed { message, .. } = &done {
            // Who asked says it, once.
            tracing::debug!(message, "the helper could not do what was asked");
        }
        answer(&mut socket, &done)?;
    }
    Ok(())
}

fn perform(setup: &Setup, request: &Request) -> Answer {
    let of_nft = |error: NftError| (error.reason().to_owned(), error.to_string());
    let nft = |result: Result<(), NftError>| result.map(|()| Answer::Done).map_err(of_nft);
    let result = match request {
        Request::CheckNft(table) => nft(setup.nft.check(table)),
        Request::ApplyNft(table) => nft(setup.nft.apply(table)),
        Request::LookAtNft => setup.nft.fingerprint().map(Answer::Nft).map_err(of_nft),
        Request::Attach { interface, mode } => Edge::adopt(&setup.pins)
            .and_then(|mut edge| edge.attach_interface(interface, *mode))
            .map(|()| Answer::Done)
            .map_err(|error| (error.reason().to_owned(), error.to_string())),
    };
    result.unwrap_or_else(|(reason, message)| Answer::Failed { reason, message })
}

fn answer(socket: &mut impl Write, answer: &Answer) -> io::Result<()> {
    send(socket, &serde_json::to_vec(answer)?)
}

/// A message is its length in four bytes, little-endian, and that much JSON.
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
            // A signal, or the end of an io_uring that this thread had.
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
        send(&mut wire, &serde_json::to_vec(&Request::LookAtNft).unwrap()).unwrap();
        let request: Option<Request> = receive(&mut wire.as_slice()).unwrap();
        assert_eq!(request, Some(Request::LookAtNft));
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
        send(&mut wire, &serde_json::to_vec(&Request::LookAtNft).unwrap()).unwrap();
        let mut wire = Interrupted(wire.as_slice(), false);
        let request: Option<Request> = receive(&mut wire).unwrap();
        assert_eq!(request, Some(Request::LookAtNft));
        assert_eq!(receive::<Request>(&mut wire).unwrap(), None);
    }

    #[test]
    fn what_it_does_not_know_is_refused() {
        let mut wire = Vec::new();
        send(&mut wire, br#"{"run": "/bin/sh"}"#).unwrap();
        assert!(receive::<Request>(&mut wire.as_slice()).is_err());
    }
}
