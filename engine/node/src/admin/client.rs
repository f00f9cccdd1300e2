//! The other end of the admin socket, for programs that look at a running node.
//!
//! Each call blocks its thread, on an executor and a connection of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use glommio::net::UnixStream;
use glommio::{LocalExecutorBuilder, Placement};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};

use super::io::HyperStream;

/// Bytes read from a file at once.
const READ_BYTES: usize = 256 << 10;

/// An answer that is held in memory: status, refusals, reports.
const TEXT_BYTES_MAX: usize = 16 << 20;

/// Why a node's admin socket gave no answer, by whose fault it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No node: nothing listens there.
    #[error("no node answers at {}: {reason}", .socket.display())]
    NotRunning {
        /// The admin socket.
        socket: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The system's rules: they do not permit to connect.
    #[error("no node answers at {}: {reason}", .socket.display())]
    NotPermitted {
        /// The admin socket.
        socket: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The node's: it refused.
    #[error("the node says {status}: {reason}")]
    Refused {
        /// Status line of its answer.
        status: StatusCode,
        /// Its own words.
        reason: String,
    },
    /// The node's: it went away, or answered what makes no sense.
    #[error("{what}: {reason}")]
    Lost {
        /// What was lost.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// The host's: it has no io_uring.
    #[error("cannot make an io_uring: {reason}")]
    Host {
        /// What the system said.
        reason: String,
    },
    /// The caller's: the path is none.
    #[error("{path}: {reason}")]
    Path {
        /// The path.
        path: String,
        /// Why.
        reason: String,
    },
    /// The caller's: what the answer is written to.
    #[error("output: {0}")]
    Output(std::io::Error),
}

/// What a transfer reports while it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The whole is so many bytes long.
    Total(u64),
    /// So many bytes more have gone.
    Moved(u64),
}

/// Fetches a text of at most 16 MiB.
///
/// # Errors
/// [`ClientError`]; an answer other than 200 is [`ClientError::Refused`].
pub fn get_text(socket: &Path, path: &str) -> Result<String, ClientError> {
    talk(
        socket,
        request(Method::GET, path, Upload::None)?,
        async |answer| {
            let answer = accepted(answer).await?;
            collect(answer).await
        },
    )
}

/// Sends `length` bytes of a file; gives the node's report.
///
/// # Errors
/// [`ClientError`]; an answer other than 200 is [`ClientError::Refused`].
pub fn post_file(
    socket: &Path,
    path: &str,
    file: File,
    length: u64,
    progress: impl Fn(Progress) + 'static,
) -> Result<String, ClientError> {
    let upload = Upload::File {
        file,
        left: length,
        progress: Box::new(progress),
    };
    talk(
        socket,
        request(Method::POST, path, upload)?,
        async |answer| {
            let answer = accepted(answer).await?;
            collect(answer).await
        },
    )
}

/// Writes the body of an answer; gives its length in bytes.
///
/// # Errors
/// [`ClientError`]; an answer other than 200 is [`ClientError::Refused`].
pub fn get_to(
    socket: &Path,
    path: &str,
    out: &mut impl Write,
    progress: impl Fn(Progress),
) -> Result<u64, ClientError> {
    talk(
        socket,
        request(Method::GET, path, Upload::None)?,
        async |answer| {
            let mut incoming = accepted(answer).await?.into_body();
            progress(Progress::Total(incoming.size_hint().exact().unwrap_or(0)));
            let mut written = 0;
            while let Some(frame) = incoming.frame().await {
                let frame = frame.map_err(|error| lost(&error))?;
                if let Ok(data) = frame.into_data() {
                    out.write_all(&data).map_err(ClientError::Output)?;
                    written += data.len() as u64;
                    progress(Progress::Moved(data.len() as u64));
                }
            }
            Ok(written)
        },
    )
}

/// One request on a connection and an executor of its own.
fn talk<T: 'static>(
    socket: &Path,
    request: Request<Upload>,
    take: impl AsyncFnOnce(Response<Incoming>) -> Result<T, ClientError>,
) -> Result<T, ClientError> {
    let executor = LocalExecutorBuilder::new(Placement::Unbound)
        .preempt_timer(Duration::from_secs(1))
        .io_memory(256 << 10)
        .make()
        .map_err(|error| ClientError::Host {
            reason: error.to_string(),
        })?;
    executor.run(async {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|error| not_running(socket, &error))?;
        let (mut sender, connection) = http1::handshake(HyperStream::new(stream))
            .await
            .map_err(|error| lost(&error))?;
        let driver = glommio::spawn_local(async move {
            // Its error reaches us as the request's.
            let _ = connection.await;
        })
        .detach();
        let answer = sender
            .send_request(request)
            .await
            .map_err(|error| lost(&error))?;
        let taken = take(answer).await;
        driver.cancel();
        taken
    })
}

fn request(method: Method, path: &str, upload: Upload) -> Result<Request<Upload>, ClientError> {
    let mut builder = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "millrace");
    if let Upload::File { left, .. } = &upload {
        // hyper leaves the header out for an empty body, and the node wants every length announced.
        builder = builder.header("content-length", *left);
    }
    builder.body(upload).map_err(|error| ClientError::Path {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

async fn accepted(answer: Response<Incoming>) -> Result<Response<Incoming>, ClientError> {
    if answer.status() == StatusCode::OK {
        return Ok(answer);
    }
    let status = answer.status();
    let why = collect(answer).await?;
    Err(ClientError::Refused {
        status,
        reason: why.trim_end().to_owned(),
    })
}

async fn collect(answer: Response<Incoming>) -> Result<String, ClientError> {
    let body = http_body_util::Limited::new(answer.into_body(), TEXT_BYTES_MAX);
    let bytes = body
        .collect()
        .await
        .map_err(|error| broken("the answer was cut", &*error))?
        .to_bytes();
    String::from_utf8(bytes.into()).map_err(|error| broken("the answer is not text", &error))
}

fn not_running(socket: &Path, error: &glommio::GlommioError<()>) -> ClientError {
    let denied = matches!(error, glommio::GlommioError::IoError(error)
        if error.kind() == std::io::ErrorKind::PermissionDenied);
    let (socket, reason) = (socket.to_owned(), error.to_string());
    if denied {
        ClientError::NotPermitted { socket, reason }
    } else {
        ClientError::NotRunning { socket, reason }
    }
}

fn lost(error: &hyper::Error) -> ClientError {
    broken("the connection to the node ended", error)
}

fn broken(what: &'static str, error: &dyn std::error::Error) -> ClientError {
    ClientError::Lost {
        what,
        reason: error.to_string(),
    }
}

/// The body of a request.
enum Upload {
    None,
    File {
        file: File,
        left: u64,
        progress: Box<dyn Fn(Progress)>,
    },
}

impl Body for Upload {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<std::io::Result<Frame<Bytes>>>> {
        let Self::File {
            file,
            left,
            progress,
        } = &mut *self
        else {
            return Poll::Ready(None);
        };
        if *left == 0 {
            return Poll::Ready(None);
        }
        // The thread has nothing else to do while the disk reads.
        let mut part = Vec::with_capacity(READ_BYTES);
        let read = file
            .take((*left).min(READ_BYTES as u64))
            .read_to_end(&mut part);
        Poll::Ready(match read {
            Ok(0) => Some(Err(std::io::Error::other(
                "the file became shorter while it was read",
            ))),
            Ok(bytes) => {
                *left -= bytes as u64;
                progress(Progress::Moved(bytes as u64));
                Some(Ok(Frame::data(part.into())))
            }
            Err(error) => Some(Err(error)),
        })
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::None => SizeHint::with_exact(0),
            Self::File { left, .. } => SizeHint::with_exact(*left),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::None | Self::File { left: 0, .. })
    }
}
