//! UDP sockets of a reuseport group, one per shard, steered by connection ID.
//!
//! Invariants:
//!
//! 1. Sockets are bound in the order of their shards on the calling thread: the order of binding is
//!    the index the steering program returns.
//! 2. The program is attached once per group: to replace one that is in use can crash old kernels.
//!    Until then the kernel spreads datagrams by a hash of their addresses.
//! 3. With the classic program, a datagram too short to hold a connection ID goes to shard 0.
//! 4. No other process joins a group, and no group joins that of another process: it would get a
//!    part of the other's datagrams. The first socket is bound without `SO_REUSEPORT`, which the
//!    kernel refuses while any socket has the address; the option that lets the others join it is
//!    set afterwards.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::config::SHARDS_MAX;
use crate::sys;

/// The most UDP sockets of one shard: what a mask of 16 bits names.
pub const SOCKETS_MAX: usize = 16;

/// A UDP socket of a shard, by its place among the sockets that `spawn` was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketId(u8);

impl SocketId {
    /// The first socket; the only one of most shards.
    pub const FIRST: Self = Self(0);

    /// The socket at `index`, from 0. That a shard owns it is not checked here.
    #[must_use]
    pub const fn new(index: u8) -> Self {
        Self(index)
    }

    /// Its place, from 0.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Whether its bit is set in a mask of sockets.
    pub(crate) fn is_in(self, mask: u16) -> bool {
        mask.checked_shr(u32::from(self.0)).unwrap_or(0) & 1 == 1
    }
}

/// What a reuseport group of UDP sockets is made of.
#[derive(Debug, Clone)]
pub struct UdpGroupConfig {
    /// The address all sockets bind; port zero takes a free one.
    pub local: SocketAddr,
    /// Sockets to bind, one per shard: 1 to [`SHARDS_MAX`].
    pub shards: usize,
    /// Receive buffer asked for per socket.
    pub recv_buffer_bytes: usize,
    /// Send buffer asked for per socket.
    pub send_buffer_bytes: usize,
    /// Whether the kernel may hand over several datagrams as one message.
    pub gro: bool,
}

impl Default for UdpGroupConfig {
    fn default() -> Self {
        Self {
            local: sys::NO_ADDR,
            shards: 1,
            recv_buffer_bytes: 16 << 20,
            send_buffer_bytes: 4 << 20,
            gro: true,
        }
    }
}

/// Why a group could not be bound.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// A group of no sockets, or of more than [`SHARDS_MAX`].
    #[error("a group has 1 to {SHARDS_MAX} sockets, one for each shard, not {shards}")]
    Shards {
        /// Shards asked for.
        shards: usize,
    },
    /// No socket could be made.
    #[error("cannot make a UDP socket: {source}; raise the limit of open files (ulimit -n)")]
    Create {
        /// What the kernel said.
        source: io::Error,
    },
    /// The address could not be bound.
    #[error("cannot bind {addr}: {source}; is another process using it, or is it not local?")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// A socket option was refused.
    #[error("cannot set {option} on the socket: {source}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl SocketError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Shards { .. } => "shards",
            Self::Create { .. } => "create",
            Self::Bind { .. } => "bind",
            Self::Option { .. } => "option",
        }
    }
}

/// A bound socket for one shard.
#[derive(Debug)]
pub struct ShardSocket {
    fd: OwnedFd,
    local: SocketAddr,
    recv_buffer_bytes: usize,
    send_buffer_bytes: usize,
    gro: bool,
}

impl ShardSocket {
    /// The address the socket is bound to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The receive buffer that the kernel gave: twice what was asked for, because it counts its own
    /// bookkeeping (socket(7), `SO_RCVBUF`).
    #[must_use]
    pub fn recv_buffer_bytes(&self) -> usize {
        self.recv_buffer_bytes
    }

    /// The send buffer that the kernel gave: as [`Self::recv_buffer_bytes`].
    #[must_use]
    pub fn send_buffer_bytes(&self) -> usize {
        self.send_buffer_bytes
    }

    /// Whether the kernel hands over several datagrams as one message.
    #[must_use]
    pub fn gro(&self) -> bool {
        self.gro
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl AsFd for ShardSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Binds one socket per shard to one address, steered by the classic program: see
/// [`attach_classic_steering`].
///
/// # Errors
/// As [`bind_unsteered`] and [`attach_classic_steering`].
pub fn bind_group(config: &UdpGroupConfig) -> Result<Vec<ShardSocket>, SocketError> {
    let sockets = bind_unsteered(config)?;
    attach_classic_steering(&sockets)?;
    Ok(sockets)
}

/// Binds one socket per shard to one address, for a caller that then attaches a program: see
/// [`attach_steering`] and [`attach_classic_steering`].
///
/// The sockets of a group of several share the address by `SO_REUSEPORT` (socket(7)), and with no
/// socket of another group; none fragments (`IP_PMTUDISC_PROBE`, ip(7)), and where the kernel can,
/// it hands over several datagrams as one message (`UDP_GRO`, udp(7), Linux 5.0). At an open
/// address (`0.0.0.0`, `[::]`) the kernel says to which of the host's addresses each datagram came
/// (`IP_PKTINFO`, ip(7); `IPV6_PKTINFO`, RFC 3542, 6).
///
/// # Errors
/// [`SocketError::Shards`] for a group of none or of more than [`SHARDS_MAX`];
/// [`SocketError::Create`] without descriptors left; [`SocketError::Bind`] when the address is
/// taken or not local; [`SocketError::Option`] when the kernel refuses an option that the datapath
/// relies on.
pub fn bind_unsteered(config: &UdpGroupConfig) -> Result<Vec<ShardSocket>, SocketError> {
    if config.shards == 0 || config.shards > SHARDS_MAX {
        return Err(SocketError::Shards {
            shards: config.shards,
        });
    }
    let mut addr = config.local;
    let mut sockets = Vec::with_capacity(config.shards);
    for index in 0..config.shards {
        let socket = bind_one(config, addr, index == 0)?;
        // The first socket fixes a port left open.
        addr = socket.local;
        sockets.push(socket);
    }
    Ok(sockets)
}

/// Steers a group by the first byte of the connection ID, modulo the number of sockets. Needs no
/// privilege; a group of one needs no program.
///
/// Linux 4.5 (socket(7), `SO_ATTACH_REUSEPORT_CBPF`).
///
/// # Errors
/// [`SocketError::Option`] when the kernel refuses the program.
pub fn attach_classic_steering(sockets: &[ShardSocket]) -> Result<(), SocketError> {
    let [first, _, ..] = sockets else {
        return Ok(());
    };
    let program = steering_program(sockets.len() as u32);
    sys::attach_reuseport_cbpf(&first.fd, &program).map_err(|source| SocketError::Option {
        option: "SO_ATTACH_REUSEPORT_CBPF",
        source,
    })
}

/// Steers a group by an eBPF program of type `sk_reuseport`, which then picks among the sockets
/// that its caller put into the program's map. A group of one needs no program.
///
/// Linux 4.19 (bpf(2), `BPF_PROG_TYPE_SK_REUSEPORT`; socket(7), `SO_ATTACH_REUSEPORT_EBPF`).
///
/// # Errors
/// [`SocketError::Option`] when the kernel refuses the program.
pub fn attach_steering(
    sockets: &[ShardSocket],
    program: BorrowedFd<'_>,
) -> Result<(), SocketError> {
    let [first, _, ..] = sockets else {
        return Ok(());
    };
    sys::attach_reuseport_ebpf(&first.fd, program).map_err(|source| SocketError::Option {
        option: "SO_ATTACH_REUSEPORT_EBPF",
        source,
    })
}

/// The address that the kernel would send from, from a socket bound to `local`, to `to`. Three
/// short system calls; nothing is sent.
///
/// # Errors
/// The kernel's, when there is no route (`ENETUNREACH`) or no descriptor left to ask with.
pub fn source_address(local: IpAddr, to: SocketAddr) -> io::Result<IpAddr> {
    if !local.is_unspecified() {
        return Ok(local.to_canonical());
    }
    let any: IpAddr = if to.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip().to_canonical())
}

fn bind_one(
    config: &UdpGroupConfig,
    addr: SocketAddr,
    is_first: bool,
) -> Result<ShardSocket, SocketError> {
    let fd = sys::udp_socket(addr).map_err(|source| SocketError::Create { source })?;
    let set = |option: &'static str, level, name, value| {
        sys::set_option(&fd, level, name, value)
            .map_err(|source| SocketError::Option { option, source })
    };
    let share = || set("SO_REUSEPORT", libc::SOL_SOCKET, libc::SO_REUSEPORT, 1);
    if !is_first {
        share()?;
    }
    // QUIC forbids fragments and finds the path's MTU itself (RFC 8899). `PROBE` sets DF like `DO`,
    // and the device's MTU still bounds packets (`EMSGSIZE`). Unlike `DO` it does not heed the MTU
    // that the kernel keeps for 10 minutes after an ICMP message: anyone may forge one, which then
    // forbids even the least packets of QUIC; and a path that recovers could not be probed. An IPv6
    // socket needs both options: to an IPv4 peer it sends IPv4, by the option of that.
    let option = libc::IP_MTU_DISCOVER;
    set(
        "IP_MTU_DISCOVER",
        libc::IPPROTO_IP,
        option,
        libc::IP_PMTUDISC_PROBE,
    )?;
    if addr.is_ipv6() {
        let option = libc::IPV6_MTU_DISCOVER;
        let probe = libc::IPV6_PMTUDISC_PROBE;
        set("IPV6_MTU_DISCOVER", libc::IPPROTO_IPV6, option, probe)?;
    }
    // An open address is several: the kernel says to which of them a datagram came. An IPv6 socket
    // hears it of IPv4 too.
    if addr.ip().is_unspecified() && addr.is_ipv4() {
        set("IP_PKTINFO", libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
    } else if addr.ip().is_unspecified() {
        let option = libc::IPV6_RECVPKTINFO;
        set("IPV6_RECVPKTINFO", libc::IPPROTO_IPV6, option, 1)?;
    }
    let recv_buffer_bytes = grow_buffer(
        &fd,
        libc::SO_RCVBUFFORCE,
        libc::SO_RCVBUF,
        config.recv_buffer_bytes,
    );
    let send_buffer_bytes = grow_buffer(
        &fd,
        libc::SO_SNDBUFFORCE,
        libc::SO_SNDBUF,
        config.send_buffer_bytes,
    );
    // A kernel without GRO delivers each datagram alone: slower, not wrong.
    let gro = config.gro && sys::set_option(&fd, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok();
    sys::bind(&fd, addr).map_err(|source| SocketError::Bind { addr, source })?;
    if is_first && config.shards > 1 {
        share()?;
    }
    let local = sys::local_addr(&fd).map_err(|source| SocketError::Bind { addr, source })?;
    Ok(ShardSocket {
        fd,
        local,
        recv_buffer_bytes,
        send_buffer_bytes,
        gro,
    })
}

/// Asks for a buffer past the system's limit, which needs a capability, then up to the limit; says
/// what the kernel gave.
fn grow_buffer(fd: &OwnedFd, force: i32, plain: i32, bytes: usize) -> usize {
    let wanted = i32::try_from(bytes).unwrap_or(i32::MAX);
    if sys::set_option(fd, libc::SOL_SOCKET, force, wanted).is_err() {
        // Never refused: the kernel cuts it to net.core.rmem_max or wmem_max.
        let _ = sys::set_option(fd, libc::SOL_SOCKET, plain, wanted);
    }
    let given = sys::option(fd, libc::SOL_SOCKET, plain).unwrap_or(0);
    usize::try_from(given).unwrap_or(0)
}

/// The shard of a datagram: the first byte of its destination connection ID, modulo the shards.
///
/// The ID starts at byte 1 behind a short header and at byte 6 behind a long one, whose byte 5 is
/// the ID's length. A load past the datagram's end makes the program return 0.
fn steering_program(shards: u32) -> [libc::sock_filter; 10] {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    const MODULO: u32 = libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K;
    const RETURN_A: u32 = libc::BPF_RET | libc::BPF_A;
    let op = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    [
        op(LOAD, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 3, 0, 0x80),
        op(LOAD, 0, 0, 1),
        op(MODULO, 0, 0, shards),
        op(RETURN_A, 0, 0, 0),
        op(LOAD, 0, 0, 5),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 2, 0, 0),
        op(LOAD, 0, 0, 6),
        op(MODULO, 0, 0, shards),
        op(RETURN_A, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bound address is the source; an open one is what the route says.
    #[test]
    fn the_source_is_what_the_kernel_says() {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let here: SocketAddr = "127.0.0.1:9".parse().unwrap();
        assert_eq!(source_address(any, here).unwrap(), here.ip());
        let bound = "192.0.2.1".parse().unwrap();
        assert_eq!(source_address(bound, here).unwrap(), bound);
        let mapped = "::ffff:192.0.2.1".parse().unwrap();
        assert_eq!(source_address(mapped, here).unwrap(), bound);
    }

    /// Protects a node that runs: a second one at its address would get a part of its datagrams,
    /// and its connections would die.
    #[test]
    fn a_group_shares_its_address_with_no_other_group() {
        let group = |local: SocketAddr| {
            bind_group(&UdpGroupConfig {
                local,
                shards: 2,
                ..UdpGroupConfig::default()
            })
        };
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let first = group(local.parse().unwrap()).unwrap();
            let address = first[0].local_addr();
            assert_eq!(first[1].local_addr(), address);
            let any = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port());
            let tried = [address, any];
            for address in &tried[..1 + usize::from(address.is_ipv4())] {
                let error = group(*address).unwrap_err();
                assert!(matches!(error, SocketError::Bind { .. }), "{error}");
            }
            drop(first);
            group(address).unwrap();
        }
    }
}
