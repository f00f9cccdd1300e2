//! Notifications of nftables: some process changed something in the ruleset.
//!
//! 1. It is opened with CAP_NET_ADMIN, and read without it.
//! 2. It reports that something has changed, never what. Many changes at once, and missed ones, are
//!    reported as one.
//! 3. It reports changes in the network namespace of the thread that opened it.

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
    /// Subscribes to changes from now on.
    ///
    /// # Errors
    ///
    /// The kernel's error, for example without CAP_NET_ADMIN or without nftables.
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

    /// Whether something has changed since the last call. It does not wait.
    #[must_use]
    pub fn has_changed(&self) -> bool {
        let mut changed = false;
        for _ in 0..TAKEN_AT_ONCE_MAX {
            // The message is cut short: only its arrival counts.
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

/// The most messages of one call; the rest waits for the next.
const TAKEN_AT_ONCE_MAX: usize = 1_024;
