//! Sockets that the standard library does not make: connections from a chosen address, raw ones.
//! A program that another test starts does not keep them.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, socket_with, sockopt};

/// A TCP connection from this address, or why there is none after so long.
///
/// # Errors
///
/// The kernel's.
pub fn connect_from(from: SocketAddr, to: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
    let family = if to.is_ipv6() {
        AddressFamily::INET6
    } else {
        AddressFamily::INET
    };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    if from.port() > 0 {
        // A program that another test starts holds the port until it has called exec.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    // Bounds `connect` too.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(patience))?;
    rustix::net::bind(&socket, &from)?;
    rustix::net::connect(&socket, &to)?;
    Ok(socket.into())
}

/// A socket for whole packets of an IP protocol. It takes `CAP_NET_RAW`.
///
/// # Panics
///
/// Where the kernel gives none.
#[must_use]
pub fn raw_socket(family: AddressFamily, protocol: Protocol) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    socket_with(family, SocketType::RAW, flags, Some(protocol))
        .expect("the rights for a raw socket")
}
