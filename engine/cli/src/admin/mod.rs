//! The admin socket: HTTP/1.1 on a Unix socket, served by a control thread of its own.
//!
//! Invariants
//! 1. The control thread is no shard: nothing here delays a packet.
//! 2. At most `connections_max` clients are served at once; each makes one request.
//! 3. A client that is silent for longer than its timeout is dropped, in the header and in the body.
//! 4. A body announces its length, and its chunks are reserved before its first byte is read.

pub(crate) mod client;
mod io;
mod patience;
mod reply;
mod routes;

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use futures_channel::oneshot;
use glommio::net::{UnixListener, UnixStream};
use glommio::sync::Semaphore;
use glommio::{LocalExecutorBuilder, Placement};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use millrace_tuning::config::AdminSection;

use crate::exit::{Exit, Failure};
use crate::running::Running;
use io::HyperStream;
use patience::Patience;

/// Longest header of a request.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// One node's socket.
pub(crate) struct Site {
    pub(crate) socket: PathBuf,
    pub(crate) node: Arc<Running>,
}

/// A running admin server; stops when dropped.
pub(crate) struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    sockets: Vec<PathBuf>,
}

/// Starts the control thread and listens on every site's socket.
pub(crate) fn serve(sites: Vec<Site>, limits: &AdminSection) -> Result<Server, Failure> {
    let sockets: Vec<PathBuf> = sites.iter().map(|site| site.socket.clone()).collect();
    for socket in &sockets {
        remove_stale(socket)?;
    }
    let limits = limits.clone();
    let (stop, stopped) = oneshot::channel();
    let (started, ready) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name("millrace-admin".into())
        .spawn(move || run(sites, &limits, stopped, &started))
        .map_err(|error| Failure::io("the admin thread", &error))?;
    let server = Server {
        stop: Some(stop),
        thread: Some(thread),
        sockets,
    };
    match ready.recv() {
        Ok(Ok(())) => Ok(server),
        Ok(Err(failure)) => Err(failure),
        Err(_) => Err(Failure::new(
            Exit::Failed,
            "the admin thread ended at its start",
        )),
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was reported there.
            let _ = thread.join();
        }
        for socket in &self.sockets {
            // A socket that is gone already is what we want.
            let _ = std::fs::remove_file(socket);
        }
    }
}

fn run(
    sites: Vec<Site>,
    limits: &AdminSection,
    stopped: oneshot::Receiver<()>,
    started: &std::sync::mpsc::SyncSender<Result<(), Failure>>,
) {
    // A long preempt timer: with a short one glommio can sleep although tasks are runnable. Little io memory: the
    // default would lock 10 MiB.
    let executor = LocalExecutorBuilder::new(Placement::Unbound)
        .preempt_timer(Duration::from_secs(1))
        .io_memory(256 << 10)
        .name("millrace-admin")
        .make();
    let executor = match executor {
        Ok(executor) => executor,
        Err(error) => {
            let message = format!("the admin thread cannot make an io_uring: {error}");
            let _ = started.send(Err(Failure::new(Exit::Failed, message)));
            return;
        }
    };
    executor.run(async {
        let permits = Rc::new(Semaphore::new(limits.connections_max));
        let mut accepting = Vec::new();
        for site in sites {
            match UnixListener::bind(&site.socket) {
                Ok(listener) => accepting.push(
                    glommio::spawn_local(accept(
                        listener,
                        site.node,
                        Rc::clone(&permits),
                        limits.clone(),
                    ))
                    .detach(),
                ),
                Err(error) => {
                    let message = format!("{}: {error}", site.socket.display());
                    let _ = started.send(Err(Failure::new(Exit::Failed, message)));
                    return;
                }
            }
        }
        let _ = started.send(Ok(()));
        // Dropping the sender is the stop.
        let _ = stopped.await;
        for task in accepting {
            task.cancel();
        }
    });
}

async fn accept(
    listener: UnixListener,
    node: Arc<Running>,
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
                let (node, limits) = (Arc::clone(&node), limits.clone());
                glommio::spawn_local(async move {
                    serve_connection(stream, node, &limits).await;
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

async fn serve_connection(stream: UnixStream, node: Arc<Running>, limits: &AdminSection) {
    let patience = Rc::new(Patience::new(
        limits.header_timeout.get(),
        limits.body_timeout.get(),
    ));
    let service = service_fn(|request| {
        patience.node_works();
        routes::answer(request, Arc::clone(&node), Rc::clone(&patience))
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
        patience.run_out().await;
        tracing::debug!("admin client was silent for too long");
    };
    futures_lite::future::or(served, gave_up).await;
}

/// Removes a socket file that nobody listens on any more; refuses to take one from a running node.
fn remove_stale(socket: &Path) -> Result<(), Failure> {
    match std::fs::symlink_metadata(socket) {
        Err(_) => return Ok(()),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let message = format!(
                "{} is not a socket; remove it or choose another",
                socket.display()
            );
            return Err(Failure::new(Exit::Failed, message));
        }
        Ok(_) => {}
    }
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        let message = format!("{}: a node is running with this socket", socket.display());
        return Err(Failure::new(Exit::Failed, message));
    }
    std::fs::remove_file(socket).map_err(|error| Failure::io(socket.display(), &error))
}
