//! The other end of the admin socket: what `put`, `get` and `status` use.

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
use indicatif::ProgressBar;

use super::io::HyperStream;
use crate::cli::SocketArgs;
use crate::exit::{Exit, Failure};
use crate::load::Loaded;

/// Bytes read from a file at once.
const READ_BYTES: usize = 256 << 10;

/// An answer that is held in memory: status, refusals, reports.
const TEXT_BYTES_MAX: usize = 16 << 20;

/// The admin socket that the arguments name.
pub(crate) fn socket_of(args: &SocketArgs) -> Result<PathBuf, Failure> {
    if let Some(socket) = &args.socket {
        return Ok(socket.clone());
    }
    match &args.config {
        Some(config) => {
            let (_, paths) = Loaded::read(config)?.usable()?;
            Ok(paths.admin_socket)
        }
        None => Err(Failure::new(Exit::Usage, "give --socket or --config")),
    }
}

/// Fetches a text; an answer other than 200 is a failure with the node's own words.
pub(crate) fn get_text(socket: &Path, path: &str) -> Result<String, Failure> {
    talk(
        socket,
        request(Method::GET, path, Upload::None)?,
        async |answer| {
            let answer = accepted(answer).await?;
            collect(answer).await
        },
    )
}

/// Sends a file; gives the node's report.
pub(crate) fn post_file(
    socket: &Path,
    path: &str,
    file: File,
    length: u64,
    bar: &ProgressBar,
) -> Result<String, Failure> {
    let upload = Upload::File {
        file,
        left: length,
        bar: bar.clone(),
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

/// Writes the body of an answer; gives its length.
pub(crate) fn get_to(
    socket: &Path,
    path: &str,
    out: &mut impl Write,
    bar: &ProgressBar,
) -> Result<u64, Failure> {
    talk(
        socket,
        request(Method::GET, path, Upload::None)?,
        async |answer| {
            let mut incoming = accepted(answer).await?.into_body();
            bar.set_length(incoming.size_hint().exact().unwrap_or(0));
            let mut written = 0;
            while let Some(frame) = incoming.frame().await {
                let frame = frame.map_err(|error| lost(&error))?;
                if let Ok(data) = frame.into_data() {
                    out.write_all(&data)
                        .map_err(|error| Failure::io("output", &error))?;
                    written += data.len() as u64;
                    bar.inc(data.len() as u64);
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
    take: impl AsyncFnOnce(Response<Incoming>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let executor = LocalExecutorBuilder::new(Placement::Unbound)
        .preempt_timer(Duration::from_secs(1))
        .io_memory(256 << 10)
        .make()
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot make an io_uring: {error}")))?;
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

fn request(method: Method, path: &str, upload: Upload) -> Result<Request<Upload>, Failure> {
    let mut builder = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "millrace");
    if let Upload::File { left, .. } = &upload {
        // hyper leaves the header out for an empty body, and the node wants every length announced.
        builder = builder.header("content-length", *left);
    }
    builder
        .body(upload)
        .map_err(|error| Failure::new(Exit::Usage, format!("{path}: {error}")))
}

async fn accepted(answer: Response<Incoming>) -> Result<Response<Incoming>, Failure> {
    if answer.status() == StatusCode::OK {
        return Ok(answer);
    }
    let status = answer.status();
    let why = collect(answer).await?;
    Err(Failure::new(
        Exit::Failed,
        format!("the node says {status}: {}", why.trim_end()),
    ))
}

async fn collect(answer: Response<Incoming>) -> Result<String, Failure> {
    let body = http_body_util::Limited::new(answer.into_body(), TEXT_BYTES_MAX);
    let bytes = body
        .collect()
        .await
        .map_err(|error| Failure::new(Exit::Failed, format!("the answer was cut: {error}")))?
        .to_bytes();
    String::from_utf8(bytes.into())
        .map_err(|_| Failure::new(Exit::Failed, "the answer is not text"))
}

fn not_running(socket: &Path, error: &glommio::GlommioError<()>) -> Failure {
    let denied = matches!(error, glommio::GlommioError::IoError(error)
        if error.kind() == std::io::ErrorKind::PermissionDenied);
    let exit = if denied {
        Exit::NotPermitted
    } else {
        Exit::NotRunning
    };
    Failure::new(
        exit,
        format!("no node answers at {}: {error}", socket.display()),
    )
}

fn lost(error: &hyper::Error) -> Failure {
    Failure::new(
        Exit::Failed,
        format!("the connection to the node ended: {error}"),
    )
}

/// The body of a request.
enum Upload {
    None,
    File {
        file: File,
        left: u64,
        bar: ProgressBar,
    },
}

impl Body for Upload {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<std::io::Result<Frame<Bytes>>>> {
        let Self::File { file, left, bar } = &mut *self else {
            return Poll::Ready(None);
        };
        if *left == 0 {
            return Poll::Ready(None);
        }
        // A command-line client has nothing else to do while the disk reads.
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
                bar.inc(bytes as u64);
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
