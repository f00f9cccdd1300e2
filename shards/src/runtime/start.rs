//! What must hold before a shard runs, and what to tell a person when it does not.

use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::{Arc, mpsc};

use glommio::{Latency, LocalExecutorBuilder, Placement, Shares, executor};

use super::turn::Shard;
use super::{BoundSocket, ShardContext};
use crate::buf::PoolError;
use crate::chunk::{ChunkPool, PageKind};
use crate::config::{GLOMMIO_IO_BYTES, HugePages, SHARDS_MAX, ShardConfig};
use crate::datapath::Datapath;
use crate::local::{Local, Queues, Spawner};
use crate::mailbox::MailReceiver;
use crate::ring::{self, Ring};
use crate::socket::{SOCKETS_MAX, ShardSocket, SocketId};
use crate::stats::ShardStats;
use crate::watchdog::{self, Watch};
use crate::{park, sys};

/// Locked memory that glommio's rings need.
const MEMLOCK_BYTES: u64 = 512 * 1024;

/// Why a shard could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No such shard can be, or more than a connection ID's byte can count.
    #[error("a node has 1 to {SHARDS_MAX} shards: shard {index} of {shards} is not one of them")]
    Shards {
        /// The shard's index, from 0.
        index: usize,
        /// Shards of the node.
        shards: usize,
    },
    /// More UDP sockets than a shard can own.
    #[error("a shard owns at most {SOCKETS_MAX} UDP sockets")]
    Sockets,
    /// The system forbids io_uring by sysctl.
    #[error(
        "io_uring is switched off (kernel.io_uring_disabled={value}): set it to 0 with \
         `sysctl kernel.io_uring_disabled=0`"
    )]
    IoUringDisabled {
        /// The sysctl's value.
        value: u32,
    },
    /// Something refuses the system call although the sysctl does not.
    #[error(
        "io_uring is refused ({source}): a seccomp filter (container runtime, systemd \
         SystemCallFilter) must allow io_uring_setup, io_uring_enter and io_uring_register"
    )]
    IoUringRefused {
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel is too old for the ring's modes.
    #[error("this kernel's io_uring is too old ({source}): Linux 6.1 or newer is needed")]
    KernelTooOld {
        /// What the kernel said.
        source: io::Error,
    },
    /// Too little locked memory is allowed.
    #[error(
        "only {limit_bytes} bytes of locked memory are allowed, {needed_bytes} are needed: raise \
         it (ulimit -l, LimitMEMLOCK= in the unit)"
    )]
    Memlock {
        /// The limit.
        limit_bytes: u64,
        /// What is needed.
        needed_bytes: u64,
    },
    /// The process may not run on the configured core.
    #[error(
        "core {cpu} is not among those this process may use ({allowed:?}): change the config, \
             or the cpuset or taskset it was started with"
    )]
    CpuNotAllowed {
        /// The configured core.
        cpu: usize,
        /// The cores allowed.
        allowed: Vec<usize>,
    },
    /// No chunk memory.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// No descriptors left.
    #[error("cannot open a pipe or eventfd: {source}; raise the limit of open files (ulimit -n)")]
    Files {
        /// What the kernel said.
        source: io::Error,
    },
    /// The thread could not be made.
    #[error("cannot start a thread: {source}; raise the limit of processes (ulimit -u)")]
    Thread {
        /// What the system said.
        source: io::Error,
    },
    /// The ring could not be made or registered with.
    #[error("cannot set the shard's ring up: {source}")]
    Ring {
        /// What the kernel said.
        source: io::Error,
    },
    /// glommio could not start.
    #[error("cannot start the shard's executor: {reason}")]
    Executor {
        /// What glommio said.
        reason: String,
    },
    /// The thread ended before it reported.
    #[error("the shard's thread ended before it started")]
    Ended,
}

impl StartError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Shards { .. } => "shards",
            Self::Sockets => "sockets",
            Self::IoUringDisabled { .. } => "io_uring_disabled",
            Self::IoUringRefused { .. } => "io_uring_refused",
            Self::KernelTooOld { .. } => "kernel_too_old",
            Self::Memlock { .. } => "memlock",
            Self::CpuNotAllowed { .. } => "cpu_not_allowed",
            Self::Pool(error) => error.reason(),
            Self::Files { .. } => "files",
            Self::Thread { .. } => "thread",
            Self::Ring { .. } => "ring",
            Self::Executor { .. } => "executor",
            Self::Ended => "ended",
        }
    }
}

/// Checks that the shard is one of a node's.
pub(super) fn check_index(index: usize, shards: usize) -> Result<(), StartError> {
    if shards > SHARDS_MAX || index >= shards {
        return Err(StartError::Shards { index, shards });
    }
    Ok(())
}

/// The shard's sockets, when there are not too many.
pub(super) fn collect(
    sockets: impl IntoIterator<Item = ShardSocket>,
) -> Result<Vec<ShardSocket>, StartError> {
    let sockets: Vec<_> = sockets.into_iter().take(SOCKETS_MAX + 1).collect();
    if sockets.len() > SOCKETS_MAX {
        return Err(StartError::Sockets);
    }
    Ok(sockets)
}

/// Checks what would otherwise fail as a riddle, or as a panic inside glommio.
pub(super) fn check(config: &ShardConfig) -> Result<(), StartError> {
    if let Some(cpu) = config.cpu {
        let allowed = sys::allowed_cpus();
        if !allowed.contains(&cpu) {
            return Err(StartError::CpuNotAllowed { cpu, allowed });
        }
    }
    let limit_bytes = sys::memlock_bytes();
    if limit_bytes < MEMLOCK_BYTES {
        return Err(StartError::Memlock {
            limit_bytes,
            needed_bytes: MEMLOCK_BYTES,
        });
    }
    // Some time after a ring is closed, the kernel interrupts a wait of the thread that made it. So
    // that it is no wait of the caller's, a thread of its own makes the ring.
    let probe = std::thread::Builder::new()
        .name("millrace-probe".into())
        .spawn(ring::probe)
        .map_err(|source| StartError::Thread { source })?;
    let probed = probe.join().map_err(|_| StartError::Ended)?;
    probed.map_err(|source| diagnose(source, sysctl_io_uring_disabled(), limit_bytes))
}

/// The likely cause of a ring that cannot be made.
fn diagnose(source: io::Error, sysctl: u32, limit_bytes: u64) -> StartError {
    match source.raw_os_error() {
        Some(libc::EPERM) if sysctl > 0 => StartError::IoUringDisabled { value: sysctl },
        Some(libc::EPERM | libc::ENOSYS | libc::EACCES) => StartError::IoUringRefused { source },
        Some(libc::EINVAL) => StartError::KernelTooOld { source },
        Some(libc::ENOMEM) => StartError::Memlock {
            limit_bytes,
            needed_bytes: limit_bytes.max(MEMLOCK_BYTES) * 2,
        },
        Some(libc::EMFILE | libc::ENFILE) => StartError::Files { source },
        _ => StartError::Ring { source },
    }
}

fn sysctl_io_uring_disabled() -> u32 {
    // Absent before 6.6: then nothing is switched off.
    let value = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    value
        .ok()
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}

/// What the shard's thread is given.
pub(super) struct Parts<M: Send> {
    pub(super) config: ShardConfig,
    pub(super) index: usize,
    pub(super) shards: usize,
    pub(super) sockets: Vec<ShardSocket>,
    pub(super) receiver: MailReceiver<M>,
    pub(super) pool: ChunkPool,
    pub(super) stats: Arc<ShardStats>,
}

type Started = mpsc::SyncSender<Result<(), StartError>>;

/// The shard's thread, from start to end. Reports once.
pub(super) fn run<D, F>(parts: Parts<D::Message>, init: F, started: &Started)
where
    D: Datapath,
    F: FnOnce(&ShardContext) -> D + 'static,
{
    let report = |error| {
        // The spawner waits for this; if it is gone, no thread wants to know.
        let _ = started.send(Err(error));
    };
    let parker = parts.receiver.parker();
    let placement = parts
        .config
        .cpu
        .map_or(Placement::Unbound, Placement::Fixed);
    let executor = LocalExecutorBuilder::new(placement)
        .name(&format!("millrace-{}", parts.index))
        .preempt_timer(parts.config.preempt_timer)
        .io_memory(GLOMMIO_IO_BYTES)
        .make();
    let executor = match executor {
        Ok(executor) => executor,
        Err(error) => {
            return report(StartError::Executor {
                reason: error.to_string(),
            });
        }
    };
    let watch = executor.run(async {
        match set_up(parts, init) {
            Ok((shard, queues, watch)) => {
                // The spawner waits for this; if it is gone, the shard still runs.
                let _ = started.send(Ok(()));
                match glommio::spawn_local_into(shard.run(), queues.latency) {
                    Ok(task) => task.await,
                    Err(error) => panic!("the queue was just made: {error}"),
                }
                // Not before: up to here the executor could fall asleep and need the watchdog.
                parker.set_executor(None);
                watch
            }
            Err(error) => {
                report(error);
                None
            }
        }
    });
    drop(watch);
    park::set_drives_a_ring(false);
    Local::leave();
}

/// Makes everything of a shard that must be made on its thread.
fn set_up<D, F>(
    parts: Parts<D::Message>,
    init: F,
) -> Result<(Shard<D>, Queues, Option<Watch>), StartError>
where
    D: Datapath,
    F: FnOnce(&ShardContext) -> D,
{
    let Parts {
        config,
        index,
        shards,
        sockets,
        receiver,
        pool,
        stats,
    } = parts;
    let bound: Vec<_> = (0u8..)
        .zip(&sockets)
        .map(|(index, socket)| BoundSocket {
            id: SocketId::new(index),
            local_addr: socket.local_addr(),
        })
        .collect();
    note_pages(&config, index, &pool);
    let parker = receiver.parker();
    parker.set_thread();
    let eventfd = sys::eventfd().map_err(|source| StartError::Files { source })?;
    // Latency::Matters would shorten the preempt timer to its value, which must stay long.
    let queue = |shares, name| {
        executor().create_task_queue(Shares::Static(shares), Latency::NotImportant, name)
    };
    let queues = Queues {
        latency: queue(1000, "latency"),
        bulk: queue(100, "bulk"),
        background: queue(10, "background"),
    };
    let signal = eventfd
        .try_clone()
        .map_err(|source| StartError::Files { source })?;
    let ring = Ring::new(
        &config,
        sockets,
        Arc::clone(&parker),
        Arc::clone(&stats),
        eventfd.as_fd(),
    )
    .map_err(|source| diagnose(source, sysctl_io_uring_disabled(), sys::memlock_bytes()))?;
    let local = Local::new(Arc::clone(&parker), Arc::clone(&stats), queues, signal);
    local.enter();
    park::set_drives_a_ring(true);
    let context = ShardContext {
        index,
        shards,
        pool,
        local_addr: bound
            .first()
            .map_or(sys::NO_ADDR, |socket| socket.local_addr),
        sockets: bound,
        stats: Arc::clone(&stats),
        spawner: Spawner::new(Rc::clone(&local)),
    };
    let datapath = init(&context);
    let is_watched = !config.watchdog.is_zero();
    let watch = is_watched.then(|| watchdog::watch(&parker, &stats, config.watchdog));
    let eventfd = sys::eventfd_file(eventfd);
    let mailbox = receiver;
    let shard = Shard {
        config,
        datapath,
        ring,
        mailbox,
        local,
        parker,
        stats,
        eventfd,
    };
    Ok((shard, queues, watch.flatten()))
}

fn note_pages(config: &ShardConfig, index: usize, pool: &ChunkPool) {
    if config.huge_pages == HugePages::Auto && pool.page_kind() != PageKind::Huge {
        tracing::info!(
            shard = index,
            pages = ?pool.page_kind(),
            "no reserved huge pages for chunks: running without them"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(errno: i32, sysctl: u32) -> &'static str {
        diagnose(io::Error::from_raw_os_error(errno), sysctl, 1 << 20).reason()
    }

    /// Each refusal of the kernel is told as its likely cause.
    #[test]
    fn causes() {
        assert_eq!(from(libc::EPERM, 2), "io_uring_disabled");
        assert_eq!(from(libc::EPERM, 0), "io_uring_refused");
        assert_eq!(from(libc::ENOSYS, 0), "io_uring_refused");
        assert_eq!(from(libc::EINVAL, 0), "kernel_too_old");
        assert_eq!(from(libc::ENOMEM, 0), "memlock");
        assert_eq!(from(libc::EMFILE, 0), "files");
        assert_eq!(from(libc::EIO, 0), "ring");
    }

    /// More shards than a byte counts, and a shard beyond its node's, are refused with the bound.
    #[test]
    fn shards_fit_a_byte() {
        assert!(check_index(0, 1).is_ok());
        assert!(check_index(SHARDS_MAX - 1, SHARDS_MAX).is_ok());
        for (index, shards) in [(0, 0), (1, 1), (0, SHARDS_MAX + 1), (SHARDS_MAX, 256)] {
            let error = check_index(index, shards).unwrap_err();
            assert_eq!(error.reason(), "shards");
            assert!(error.to_string().contains("1 to 255"), "{error}");
        }
    }

    /// A core that no machine has is refused with the cores there are.
    #[test]
    fn core_outside_the_mask() {
        let config = ShardConfig {
            cpu: Some(100_000),
            ..ShardConfig::default()
        };
        let error = check(&config).unwrap_err();
        assert_eq!(error.reason(), "cpu_not_allowed");
        assert!(error.to_string().contains("core 100000"));
    }
}
