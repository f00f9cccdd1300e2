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
mod socket_file;

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
use socket_file::SocketFile;

/// Longest header of a request.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// A running admin server; stops when dropped.
#[derive(Debug)]
pub(crate) struct AdminServer {
    /// None: the socket was not bound.
    file: Option<SocketFile>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the control thread and listens on the socket.
pub(crate) fn serve(
    socket: PathBuf,
    core: Arc<Core>,
    limits: &AdminSection,
) -> Result<AdminServer, StartError> {
    let limits = limits.clone();
    let (stop, stopped) = oneshot::channel();
    let (started, ready) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name("millrace-admin".into())
        .spawn(move || run(&socket, &core, &limits, stopped, &started))
        .map_err(|error| StartError::io("the admin thread", error))?;
    let mut server = AdminServer {
        file: None,
        stop: Some(stop),
        thread: Some(thread),
    };
    match ready.recv() {
        Ok(Ok(file)) => {
            server.file = Some(file);
            Ok(server)
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Err(StartError::host(
            "the admin thread",
            "it ended at its start",
        )),
    }
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        // First: once the thread has stopped, another node may take the path.
        drop(self.file.take());
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
    }
}

fn run(
    socket: &Path,
    core: &Arc<Core>,
    limits: &AdminSection,
    stopped: oneshot::Receiver<()>,
    started: &SyncSender<Result<SocketFile, StartError>>,
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
            let _ = started.send(Err(StartError::io(what, error.into())));
            return;
        }
    };
    executor.run(async {
        let bind = |path: &Path| UnixListener::bind(path).map_err(Into::into);
        let (listener, file) = match SocketFile::bind(socket, bind) {
            Ok(bound) => bound,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let permits = Rc::new(Semaphore::new(limits.connections_max));
        let accepting = accept(listener, Arc::clone(core), permits, limits.clone());
        let accepting = glommio::spawn_local(accepting).detach();
        let _ = started.send(Ok(file));
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
