//! Starting, running and stopping shards.
//!
//! [`spawn`] makes a pinned thread with a glommio executor, and on it the ring and the loop (see
//! `turn`). The loop parks in its own ring when glommio has nothing outstanding, which costs one
//! system call instead of eight; otherwise in glommio, on the ring's eventfd.
//!
//! glommio 0.9.0 has one trap: if its preempt timer fires between being armed and the first test of
//! it, the executor sleeps with runnable tasks and no timer. So the timer is long (1 s), the loop
//! gives glommio its turns itself, and a watchdog stands behind both. (Not behind the executor's
//! first moments, before the loop exists: a timer of 20 us hangs one start in fifteen there.)
//!
//! Invariants:
//!
//! 1. `spawn` returns after `init` ran on the shard's thread, or with the reason why it did not.
//! 2. Everything `!Send` is made, used and dropped on that thread.

mod start;
mod turn;

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use crate::chunk::ChunkPool;
use crate::config::ShardConfig;
use crate::datapath::Datapath;
use crate::local::{Queue, Spawner};
use crate::mailbox::{MailReceiver, MailSender, mailbox};
use crate::park::Parker;
use crate::socket::{ShardSocket, SocketId};
use crate::stats::ShardStats;

pub use start::StartError;

/// What a datapath learns of its shard when it is made.
#[derive(Debug, Clone)]
pub struct ShardContext {
    /// The shard's index, which its connection IDs carry.
    pub index: usize,
    /// Shards of the node.
    pub shards: usize,
    /// The shard's chunks.
    pub pool: ChunkPool,
    /// The address of the shard's first UDP socket; `0.0.0.0:0` without one.
    pub local_addr: SocketAddr,
    /// The shard's UDP sockets, in the order in which `spawn` was given them.
    pub sockets: Vec<BoundSocket>,
    /// The shard's counters.
    pub stats: Arc<ShardStats>,
    /// Starts local tasks.
    pub spawner: Spawner,
}

/// A UDP socket of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoundSocket {
    /// What [`Datagrams::socket`](crate::Datagrams::socket) and
    /// [`Trains::select`](crate::Trains::select) call it.
    pub id: SocketId,
    /// The address it is bound to.
    pub local_addr: SocketAddr,
}

impl ShardContext {
    /// Starts a local task; see [`Spawner::spawn_local`].
    pub fn spawn_local(&self, queue: Queue, future: impl Future<Output = ()> + 'static) {
        self.spawner.spawn_local(queue, future);
    }
}

/// A running shard, seen from outside.
#[derive(Debug)]
pub struct ShardHandle<M> {
    sender: MailSender<M>,
    parker: Arc<Parker>,
    stats: Arc<ShardStats>,
    pool: ChunkPool,
    thread: JoinHandle<()>,
}

/// The shard's thread panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the shard's thread panicked")]
pub struct JoinError;

impl<M: Send> ShardHandle<M> {
    /// A sender to the shard's mailbox.
    #[must_use]
    pub fn sender(&self) -> MailSender<M> {
        self.sender.clone()
    }

    /// Asks the shard to stop. Its thread ends when its datapath says that it has stopped:
    /// [`Datapath::on_stop`], [`Datapath::is_stopped`].
    pub fn stop(&self) {
        self.parker.request_stop();
    }

    /// Waits until the shard has stopped.
    ///
    /// # Errors
    /// [`JoinError`] when its thread panicked.
    ///
    /// It waits for ever when no stop was asked for: see [`Self::stop`].
    pub fn join(self) -> Result<(), JoinError> {
        self.thread.join().map_err(|_| JoinError)
    }

    /// Whether the shard's thread has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// The shard's counters.
    #[must_use]
    pub fn stats(&self) -> Arc<ShardStats> {
        Arc::clone(&self.stats)
    }

    /// The shard's chunks.
    #[must_use]
    pub fn pool(&self) -> ChunkPool {
        self.pool.clone()
    }
}

/// Starts a shard with a mailbox of its own; see [`spawn_with_mailbox`].
///
/// # Errors
/// As [`spawn_with_mailbox`], and [`StartError::Files`] when the mailbox's pipe cannot be made.
pub fn spawn<D, F>(
    config: ShardConfig,
    index: usize,
    shards: usize,
    sockets: impl IntoIterator<Item = ShardSocket>,
    init: F,
) -> Result<ShardHandle<D::Message>, StartError>
where
    D: Datapath,
    F: FnOnce(&ShardContext) -> D + Send + 'static,
{
    let (_, receiver) =
        mailbox(config.mailbox_capacity).map_err(|source| StartError::Files { source })?;
    spawn_with_mailbox(config, index, shards, sockets, receiver, init)
}

/// Starts the shard at `index`, from 0, of `shards`, on a mailbox made before, so that shards can
/// know each other's senders. Returns after `init` ran on the shard's thread.
///
/// `sockets` are the shard's UDP sockets, at most [`SOCKETS_MAX`](crate::SOCKETS_MAX): `None`,
/// `Some(socket)` or several; their order gives their [`SocketId`]s.
///
/// # Errors
/// [`StartError::Shards`] when `shards` exceeds [`SHARDS_MAX`](crate::SHARDS_MAX) or `index` is not
/// below it, [`StartError::Sockets`] when there are too many; else when this system cannot run a
/// shard of this config: the error names the likely cause.
pub fn spawn_with_mailbox<D, F>(
    config: ShardConfig,
    index: usize,
    shards: usize,
    sockets: impl IntoIterator<Item = ShardSocket>,
    receiver: MailReceiver<D::Message>,
    init: F,
) -> Result<ShardHandle<D::Message>, StartError>
where
    D: Datapath,
    F: FnOnce(&ShardContext) -> D + Send + 'static,
{
    start::check_index(index, shards)?;
    let sockets = start::collect(sockets)?;
    start::check(&config)?;
    let (ahead, most) = (config.chunk_pool_ahead_bytes, config.chunk_pool_bytes);
    let pool = ChunkPool::growing(ahead, most, config.huge_pages)?;
    let stats = Arc::new(ShardStats::default());
    let sender = receiver.sender();
    let parker = receiver.parker();
    let parts = start::Parts {
        config,
        index,
        shards,
        sockets,
        receiver,
        pool: pool.clone(),
        stats: Arc::clone(&stats),
    };
    let (started, outcome) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("millrace-{index}"))
        .spawn(move || start::run(parts, init, &started))
        .map_err(|source| StartError::Thread { source })?;
    match outcome.recv() {
        Ok(Ok(())) => Ok(ShardHandle {
            sender,
            parker,
            stats,
            pool,
            thread,
        }),
        Ok(Err(error)) => {
            // The thread ends right after it reported.
            let _ = thread.join();
            Err(error)
        }
        Err(mpsc::RecvError) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => Err(StartError::Ended),
        },
    }
}
