//! The admin socket: HTTP/1.1 on a Unix socket, served by a control thread of its own.
//!
//! 1. The control thread is no shard: nothing here delays a packet.
//! 2. At most `connections_max` clients are served at once; each makes one request.
//! 3. A client that is silent for longer than its timeout is dropped, in the header and in the
//!    body.
//! 4. A body announces its length, and its chunks are reserved before its first byte is read.

pub mod client;
mod idle_deadline;
mod io;

mod reply;
mod routes;

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::thread::JoinHandle;
use std::time::Duration;

use futures_channel::oneshot;
use glommio::net::{UnixListener, UnixStream};
use glommio::sync::Semaphore;
use glommio::{LocalExecutorBuilder, Placement};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use millrace_tuning::config::AdminSection;

use crate::core::Core;
use crate::error::StartError;
use idle_deadline::IdleDeadline;
use io::HyperStream;

/// Longest header of a request.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// A running admin server; stops when dropped.
#[derive(Debug)]
pub(crate) struct AdminServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    socket: PathBuf,
}

/// Starts the control thread and listens on the socket.
pub(crate) fn serve(
    socket: PathBuf,
    core: Arc<Core>,
    limits: &AdminSection,
) -> Result<AdminServer, StartError> {
    remove_stale(&socket)?;
    let (limits, path) = (limits.clone(), socket.clone());
    let (stop, stopped) = oneshot::channel();
    let (started, ready) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name("millrace-admin".into())
        .spawn(move || run(&path, &core, &limits, stopped, &started))
        .map_err(|error| StartError::io("the admin thread", error))?;
    let server = AdminServer {
        stop: Some(stop),
        thread: Some(thread),
        socket,
    };
    match ready.recv() {
        Ok(Ok(())) => Ok(server),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(StartError::host(
            "the admin thread",
            "it ended at its start",
        )),
    }
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
        // A socket that is gone already is what we want.
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn run(
    socket: &Path,
    core: &Arc<Core>,
    limits: &AdminSection,
    stopped: oneshot::Receiver<()>,
    started: &SyncSender<Result<(), StartError>>,
) {
    // A long preempt timer: with a short one glommio can sleep although tasks are runnable. Little
    // io memory: the default would lock 10 MiB.
    let executor = LocalExecutorBuilder::new(Placement::Unbound)
        .preempt_timer(Duration::from_secs(1))
        .io_memory(256 << 10)
        .name("millrace-admin")
        .make();
    let executor = match executor {
        Ok(executor) => executor,
        Err(error) => {
            let what = "the admin thread cannot make an io_uring";
            let _ = started.send(Err(StartError::host(what, error.to_string())));
            return;
        }
    };
    executor.run(async {
        let listener = match UnixListener::bind(socket) {
            Ok(listener) => listener,
            Err(error) => {
                let failed = StartError::host(socket.display(), error.to_string());
                let _ = started.send(Err(failed));
                return;
            }
        };
        let permits = Rc::new(Semaphore::new(limits.connections_max));
        let accepting = accept(listener, Arc::clone(core), permits, limits.clone());
        let accepting = glommio::spawn_local(accepting).detach();
        let _ = started.send(Ok(()));
        // Dropping the sender is the stop.
        let _ = stopped.await;
        accepting.cancel();
    });
}

async fn accept(
    listener: UnixListener,
    core: Arc<Core>,
    permits: Rc<Semaphore>,
    limits: AdminSection,
) {
    loop {
        // The permit comes first: clients beyond the bound wait in the kernel's backlog.
        let Ok(permit) = permits.acquire_static_permit(1).await else {
            return;
        };
        match listener.accept().await {
            Ok(stream) => {
                let (core, limits) = (Arc::clone(&core), limits.clone());
                glommio::spawn_local(async move {
                    serve_connection(stream, core, &limits).await;
                    drop(permit);
                })
                .detach();
            }
            Err(error) => {
                tracing::warn!(%error, "the admin socket does not accept");
                // Out of descriptors: without a pause this would spin.
                glommio::timer::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_connection(stream: UnixStream, core: Arc<Core>, limits: &AdminSection) {
    let deadline = Rc::new(IdleDeadline::new(
        limits.header_timeout.get(),
        limits.body_timeout.get(),
    ));
    let service = service_fn(|request| {
        deadline.suspend();
        routes::answer(request, Arc::clone(&core), Rc::clone(&deadline))
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .header_read_timeout(None)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(HyperStream::new(stream), service);
    let served = async {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "admin connection ended early");
        }
    };
    let gave_up = async {
        deadline.passed().await;
        tracing::debug!("admin client was silent for too long");
    };
    futures_lite::future::or(served, gave_up).await;
}

/// Removes a socket file that no process listens on; refuses to take one from a running node.
fn remove_stale(socket: &Path) -> Result<(), StartError> {
    let name = socket.display();
    match std::fs::symlink_metadata(socket) {
        Err(_) => return Ok(()),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let what = format!("{name} is not a socket; remove it or choose another");
            return Err(StartError::Taken { what });
        }
        Ok(_) => {}
    }
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        let what = format!("{name}: a node is running with this socket");
        return Err(StartError::Taken { what });
    }
    std::fs::remove_file(socket).map_err(|error| StartError::io(name, error))
}
