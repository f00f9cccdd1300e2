#![allow(unsafe_code)]
//! System calls that std has no word for: socket options, pipes, affinity, limits.
//!
//! Soundness argument. Every call passes pointers to live local values with their own sizes, takes
//! ownership of descriptors the kernel just made, or passes no pointer at all.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: only called with a descriptor the kernel just made for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A non-blocking pipe by which threads without a ring wake a shard.
#[derive(Debug)]
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    pub(crate) fn new() -> io::Result<Self> {
        let mut fds = [0; 2];
        // SAFETY: the array has room for the two descriptors.
        check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) })?;
        Ok(Self {
            read: own(fds[0]),
            write: own(fds[1]),
        })
    }

    /// The end that the shard polls.
    pub(crate) fn read_end(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }

    /// Writes a byte; a full pipe has been signalled already.
    pub(crate) fn signal(&self) {
        let byte = 1u8;
        // SAFETY: one readable byte.
        unsafe { libc::write(self.write.as_raw_fd(), (&raw const byte).cast(), 1) };
    }

    /// Reads until the pipe is empty.
    pub(crate) fn drain(&self) {
        let mut bytes = [0u8; 64];
        loop {
            let (at, len) = (bytes.as_mut_ptr(), bytes.len());
            // SAFETY: as many writable bytes as the length says.
            let read = unsafe { libc::read(self.read.as_raw_fd(), at.cast(), len) };
            if read < len as isize {
                return;
            }
        }
    }
}

/// An eventfd with a count of zero.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: passes no pointer.
    Ok(own(check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })?))
}

/// An eventfd as a file of glommio's: awaiting a read of it is awaiting its signal.
pub(crate) fn eventfd_file(fd: OwnedFd) -> glommio::io::BufferedFile {
    // SAFETY: the descriptor is owned and handed over.
    unsafe { glommio::io::BufferedFile::from_raw_fd(fd.into_raw_fd()) }
}

/// Adds one to an eventfd.
pub(crate) fn signal_eventfd(fd: BorrowedFd<'_>) {
    let one = 1u64;
    // SAFETY: eight readable bytes.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
}

/// Sets an option whose value is an int.
pub(crate) fn set_option(fd: &OwnedFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the value lives over the call and its size is passed.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

/// Reads an option whose value is an int.
pub(crate) fn option(fd: &OwnedFd, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0i32;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and length live over the call, and the length is the value's size.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    })?;
    Ok(value)
}

/// A UDP socket of the address's family, not yet bound.
pub(crate) fn udp_socket(addr: SocketAddr) -> io::Result<OwnedFd> {
    let family = if addr.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    // SAFETY: passes no pointer.
    Ok(own(check(unsafe {
        libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)
    })?))
}

/// Binds a socket.
pub(crate) fn bind(fd: &OwnedFd, addr: SocketAddr) -> io::Result<()> {
    let (bytes, len) = encode_addr(addr);
    // SAFETY: len bytes of an address are readable.
    check(unsafe {
        libc::bind(
            fd.as_raw_fd(),
            bytes.as_ptr().cast(),
            len as libc::socklen_t,
        )
    })?;
    Ok(())
}

/// The address a socket is bound to.
pub(crate) fn local_addr(fd: &OwnedFd) -> io::Result<SocketAddr> {
    let mut bytes = AddrBytes::default();
    let mut len = bytes.0.len() as libc::socklen_t;
    // SAFETY: len bytes are writable.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), bytes.0.as_mut_ptr().cast(), &raw mut len) })?;
    decode_addr(&bytes.0).ok_or_else(|| io::Error::other("not an internet address"))
}

/// Attaches the program that picks a socket of a reuseport group.
pub(crate) fn attach_reuseport_cbpf(fd: &OwnedFd, code: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: code.len() as u16,
        filter: code.as_ptr().cast_mut(),
    };
    // SAFETY: the program and its code live over the call; the kernel copies and only reads them.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

/// Attaches an eBPF program that picks a socket of a reuseport group.
pub(crate) fn attach_reuseport_ebpf(fd: &OwnedFd, program: BorrowedFd<'_>) -> io::Result<()> {
    let program = program.as_raw_fd();
    set_option(
        fd,
        libc::SOL_SOCKET,
        libc::SO_ATTACH_REUSEPORT_EBPF,
        program,
    )
}

/// The cores this thread may run on.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    // SAFETY: an all-zero set is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set lives over the call and its size is passed.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) } != 0 {
        return Vec::new();
    }
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: the index is below the set's size.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect()
}

/// Lets the calling thread run on these cores, as far as the kernel allows them.
pub(crate) fn allow_cpus(cpus: &[usize]) {
    // SAFETY: an all-zero set is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus.iter().filter(|&&cpu| cpu < libc::CPU_SETSIZE as usize) {
        // SAFETY: the index is below the set's size.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the set lives over the call and its size is passed.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
}

/// The soft limit of locked memory.
pub(crate) fn memlock_bytes() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the limit lives over the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } != 0 {
        return u64::MAX;
    }
    limit.rlim_cur
}

/// The calling thread's id.
pub(crate) fn thread_id() -> i32 {
    // SAFETY: passes no pointer and cannot fail.
    unsafe { libc::gettid() }
}

/// Room for an IPv4 or IPv6 socket address, aligned as the kernel's types.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(4))]
pub(crate) struct AddrBytes(pub(crate) [u8; 28]);

impl std::ops::Deref for AddrBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// An address as the kernel's `sockaddr_in` or `sockaddr_in6`, and its length.
pub(crate) fn encode_addr(addr: SocketAddr) -> (AddrBytes, usize) {
    let mut bytes = AddrBytes::default();
    let raw = &mut bytes.0;
    raw[2..4].copy_from_slice(&addr.port().to_be_bytes());
    match addr {
        SocketAddr::V4(v4) => {
            raw[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            raw[4..8].copy_from_slice(&v4.ip().octets());
            (bytes, size_of::<libc::sockaddr_in>())
        }
        SocketAddr::V6(v6) => {
            raw[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            raw[4..8].copy_from_slice(&v6.flowinfo().to_ne_bytes());
            raw[8..24].copy_from_slice(&v6.ip().octets());
            raw[24..28].copy_from_slice(&v6.scope_id().to_ne_bytes());
            (bytes, size_of::<libc::sockaddr_in6>())
        }
    }
}

/// The address in a kernel's `sockaddr`, if it is one of the internet's.
pub(crate) fn decode_addr(raw: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(raw.get(..2)?.try_into().ok()?);
    let port = u16::from_be_bytes(raw.get(2..4)?.try_into().ok()?);
    if i32::from(family) == libc::AF_INET {
        let ip: [u8; 4] = raw.get(4..8)?.try_into().ok()?;
        return Some(SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::from(ip), port)));
    }
    if i32::from(family) == libc::AF_INET6 {
        let flow = u32::from_ne_bytes(raw.get(4..8)?.try_into().ok()?);
        let ip: [u8; 16] = raw.get(8..24)?.try_into().ok()?;
        // A dual-stack socket names an IPv4 peer so. Callers know that peer by its IPv4 address,
        // and sending to that works.
        if let Some(v4) = Ipv6Addr::from(ip).to_ipv4_mapped() {
            return Some(SocketAddr::V4(SocketAddrV4::new(v4, port)));
        }
        let scope = u32::from_ne_bytes(raw.get(24..28)?.try_into().ok()?);
        return Some(SocketAddr::V6(SocketAddrV6::new(
            Ipv6Addr::from(ip),
            port,
            flow,
            scope,
        )));
    }
    None
}

/// The local address in a control message of the kernel (`struct in_pktinfo`, ip(7), or `struct
/// in6_pktinfo`, RFC 3542, 6.1). An IPv4 address that an IPv6 socket names so comes as IPv4.
pub(crate) fn decode_pktinfo(level: i32, kind: i32, value: &[u8]) -> Option<IpAddr> {
    if level == libc::IPPROTO_IP && kind == libc::IP_PKTINFO {
        // Behind the interface's index, the local address; the destination is the third field, and
        // no address of this host where the datagram was broadcast.
        let ip: [u8; 4] = value.get(4..8)?.try_into().ok()?;
        return Some(Ipv4Addr::from(ip).into());
    }
    if level == libc::IPPROTO_IPV6 && kind == libc::IPV6_PKTINFO {
        let ip: [u8; 16] = value.get(..16)?.try_into().ok()?;
        return Some(IpAddr::from(Ipv6Addr::from(ip)).to_canonical());
    }
    None
}

/// The control message that makes the kernel send from `source`, by a socket of that family: level,
/// kind, value and the value's length. The kernel chooses the interface.
pub(crate) fn encode_pktinfo(source: IpAddr, by_ipv6: bool) -> (i32, i32, [u8; 20], usize) {
    let mut value = [0; 20];
    if by_ipv6 {
        let ip = match source {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        value[..16].copy_from_slice(&ip.octets());
        return (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, value, 20);
    }
    if let IpAddr::V4(ip) = source.to_canonical() {
        value[4..8].copy_from_slice(&ip.octets());
    }
    (libc::IPPROTO_IP, libc::IP_PKTINFO, value, 12)
}

/// The address that stands for "no socket".
pub(crate) const NO_ADDR: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

#[cfg(test)]
mod tests {
    use super::*;

    /// Addresses go to the kernel's form and back unchanged.
    #[test]
    fn address_round_trip() {
        let cases: [SocketAddr; 3] = [
            "127.0.0.1:4433".parse().unwrap(),
            "[::1]:1".parse().unwrap(),
            SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::LOCALHOST, 9, 7, 3)),
        ];
        for addr in cases {
            let (bytes, len) = encode_addr(addr);
            assert_eq!(len, if addr.is_ipv4() { 16 } else { 28 });
            assert_eq!(decode_addr(&bytes[..len]), Some(addr));
        }
        assert_eq!(decode_addr(&[0; 28]), None);
        assert_eq!(decode_addr(&[2, 0, 1]), None);
    }

    /// What is sent from an address is what a datagram to it says, by sockets of both families.
    #[test]
    fn local_addresses_round_trip() {
        let cases: [(&str, bool); 3] = [
            ("192.0.2.1", false),
            ("192.0.2.1", true),
            ("2001:db8::1", true),
        ];
        for (address, by_ipv6) in cases {
            let address: IpAddr = address.parse().unwrap();
            let (level, kind, value, len) = encode_pktinfo(address, by_ipv6);
            assert_eq!(decode_pktinfo(level, kind, &value[..len]), Some(address));
            assert_eq!(decode_pktinfo(level, kind, &value[..3]), None);
        }
        assert_eq!(decode_pktinfo(libc::SOL_UDP, libc::UDP_GRO, &[0; 20]), None);
    }
}
