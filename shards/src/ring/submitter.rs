//! The one hot system call, io_uring_enter(2), on a ring descriptor registered with the thread.
//!
//! The io-uring crate remembers a registered descriptor only as long as a `Submitter`, which
//! borrows the ring; so the call is made here. It saves the kernel a counted look-up of the file
//! per call, which a process of many threads pays with two locked instructions.
//!
//! Invariants:
//!
//! 1. `fd` names the ring it was made from, by index if `registered`, on the thread that made it.

use std::io;
use std::os::fd::AsRawFd;

use io_uring::{EnterFlags, IoUring, types};

/// `IORING_REGISTER_RING_FDS`.
const REGISTER_RING_FDS: libc::c_uint = 20;

/// `struct io_uring_rsrc_update`.
#[repr(C)]
struct RingUpdate {
    offset: u32,
    reserved: u32,
    data: u64,
}

/// `struct io_uring_getevents_arg`.
#[repr(C)]
struct WaitArgument {
    sigmask: u64,
    sigmask_bytes: u32,
    min_wait_usec: u32,
    timeout: u64,
}

/// Enters one ring.
#[derive(Debug)]
pub(super) struct Submitter {
    fd: i32,
    registered: bool,
}

impl Submitter {
    /// Registers the ring's descriptor with this thread, where the kernel can (5.18).
    pub(super) fn new(uring: &IoUring) -> Self {
        let fd = uring.as_raw_fd();
        let mut update = RingUpdate {
            offset: u32::MAX,
            reserved: 0,
            data: fd as u64,
        };
        // SAFETY: one update lives over the call; the kernel writes the index into it.
        let done = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                fd,
                REGISTER_RING_FDS,
                &raw mut update,
                1 as libc::c_uint,
            )
        };
        match i32::try_from(update.offset) {
            Ok(index) if done == 1 => Self {
                fd: index,
                registered: true,
            },
            _ => Self {
                fd,
                registered: false,
            },
        }
    }

    /// One `io_uring_enter` that also runs deferred work; waits when `want` is above zero.
    pub(super) fn enter(
        &self,
        to_submit: u32,
        want: u32,
        timeout: Option<&types::Timespec>,
    ) -> io::Result<()> {
        let mut flags = EnterFlags::GETEVENTS;
        flags.set(EnterFlags::REGISTERED_RING, self.registered);
        flags.set(EnterFlags::EXT_ARG, timeout.is_some());
        let argument = WaitArgument {
            sigmask: 0,
            sigmask_bytes: 0,
            min_wait_usec: 0,
            timeout: timeout.map_or(0, |timeout| std::ptr::from_ref(timeout) as u64),
        };
        let (argument, bytes) = match timeout {
            Some(_) => (&raw const argument, size_of::<WaitArgument>()),
            None => (std::ptr::null(), 0),
        };
        // SAFETY: the argument and the time it points to live over the call, and its size is
        // passed; the entries submitted are sound (see `Ring::push_entry`).
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.fd,
                to_submit,
                want,
                flags.bits(),
                argument,
                bytes,
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}
