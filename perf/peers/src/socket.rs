//! Sockets, cores and the life of a child: equal for all engines.

use std::io::{self, Read};
use std::net::{Ipv4Addr, UdpSocket};
use std::thread;

use rustix::net::sockopt;
use rustix::thread::{CpuSet, sched_setaffinity};

/// A loopback socket with both buffers set; beyond the sysctl limits where privileges allow it.
pub(crate) fn bind_loopback(buffer_bytes: usize) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    if sockopt::set_socket_recv_buffer_size_force(&socket, buffer_bytes).is_err() {
        sockopt::set_socket_recv_buffer_size(&socket, buffer_bytes)?;
    }
    if sockopt::set_socket_send_buffer_size_force(&socket, buffer_bytes).is_err() {
        sockopt::set_socket_send_buffer_size(&socket, buffer_bytes)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Keeps the calling thread, and every thread it starts later, on one core.
pub(crate) fn pin_to(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

/// Ends this process when its standard input closes, that is, when its parent lets go of it.
pub(crate) fn exit_with_parent() {
    thread::spawn(|| {
        let mut rest = Vec::new();
        let _closed = io::stdin().read_to_end(&mut rest);
        std::process::exit(0);
    });
}
