//! The sockets of a relay.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use quinn_udp::UdpSocketState;

use crate::{Result, socket};

/// Receive and send buffer of each socket: 200 ms of 300 Mbit/s.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;

/// Two sockets over a link, and whom they face; `None` until one speaks.
#[derive(Clone, Copy, Debug)]
pub(in crate::wan) struct Path {
    /// Index of the link.
    pub(in crate::wan) link: usize,
    pub(in crate::wan) ends: [Option<SocketAddr>; 2],
}

pub(super) struct Side {
    pub(super) socket: UdpSocket,
    pub(super) state: UdpSocketState,
    pub(super) end: Option<SocketAddr>,
}

pub(super) struct PathState {
    pub(super) link: usize,
    pub(super) sides: [Side; 2],
}

impl PathState {
    pub(super) fn new(path: &Path) -> Result<Self> {
        let side = |end| -> Result<Side> {
            let socket = socket::bind_loopback(SOCKET_BUFFER_BYTES)?;
            let state = UdpSocketState::new((&socket).into())?;
            Ok(Side { socket, state, end })
        };
        Ok(Self {
            link: path.link,
            sides: [side(path.ends[0])?, side(path.ends[1])?],
        })
    }

    pub(super) fn addresses(&self) -> io::Result<[SocketAddr; 2]> {
        let [one, two] = &self.sides;
        Ok([one.socket.local_addr()?, two.socket.local_addr()?])
    }
}
