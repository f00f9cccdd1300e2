//! News of nftables: somebody changed something in it, whoever and whatever.
//!
//! 1. Opened with CAP_NET_ADMIN, and read without it.
//! 2. Says that something has changed, never what: many changes at once, and those that were missed, are one.
//! 3. Of the network namespace of the thread that opened it.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

/// A subscription to the changes of nftables.
#[derive(Debug)]
pub struct Watch {
    socket: OwnedFd,
}

impl Watch {
    /// Subscribes: what changes from now on is told.
    ///
    /// # Errors
    ///
    /// What the kernel says, as without CAP_NET_ADMIN or nftables.
    pub fn open() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(NETFILTER),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, NFTABLES))?;
        Ok(Self { socket })
    }

    /// Whether something has changed since the last time. Waits for nothing.
    #[must_use]
    pub fn has_changed(&self) -> bool {
        let mut changed = false;
        for _ in 0..TAKEN_AT_ONCE_MAX {
            // Cut short: only that it came counts.
            match recv(&self.socket, &mut [0_u8; 16][..], RecvFlags::TRUNC) {
                Ok(_) | Err(Errno::NOBUFS) => changed = true,
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        changed
    }
}

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h, the 7th group.
const NFTABLES: u32 = 1 << 6;

/// Messages taken at once; what is left is there the next time.
const TAKEN_AT_ONCE_MAX: usize = 1_024;
