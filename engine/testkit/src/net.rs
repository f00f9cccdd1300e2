//! Addresses on loopback that no other test takes.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

/// Most addresses that one process may take: the last byte of the host counts them.
const CALLS_MAX: u32 = 256;

/// An address of loopback whose UDP port is free, and stays free until the caller binds it.
///
/// The host is made from this process and this call, so another test cannot take the port between
/// the return and the bind. Process ids that agree in their lower 15 bits share hosts; the port
/// that the kernel picks tells those apart.
///
/// # Panics
/// When the kernel gives no port, and at the 257th call of a process.
pub fn free_addr() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let call = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(call < CALLS_MAX, "a test program takes at most {CALLS_MAX}");
    let [_, _, high, low] = process::id().to_be_bytes();
    // Not 127.0, where every program binds that does not choose.
    let host = Ipv4Addr::new(127, high | 1 << 7, low, call as u8);
    UdpSocket::bind((host, 0))
        .and_then(|socket| socket.local_addr())
        .expect("a free port of loopback")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_differ_and_can_be_bound() {
        let addresses = [(); 3].map(|()| free_addr());
        let sockets = addresses.map(|address| UdpSocket::bind(address).map(drop).is_ok());
        assert_eq!(sockets, [true; 3]);
        assert!(addresses[0] != addresses[1] && addresses[1] != addresses[2]);
    }
}
