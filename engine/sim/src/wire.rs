//! The network as nodes use it: addresses, and how much a node lets wait for a link.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use crate::memnet::{Endpoint, MemNet};
use crate::quic::packet::Packet;

const PORT: u16 = 4100;
/// The network of all nodes: 10.0.0.0.
const NETWORK: u32 = 0x0a00_0000;
/// Bytes that a node lets wait for a link's capacity, one train: what bulk may delay latency by. It
/// stands for congestion control, which the model does not have.
const TRAIN_BYTES: u64 = 64 << 10;

/// The address of an endpoint.
pub(crate) fn address_of(endpoint: Endpoint) -> SocketAddr {
    (Ipv4Addr::from_bits(NETWORK + endpoint.0), PORT).into()
}

/// The endpoint at an address that [`address_of`] gave.
pub(crate) fn endpoint_of(address: SocketAddr) -> Endpoint {
    match address {
        SocketAddr::V4(v4) => Endpoint(v4.ip().to_bits() - NETWORK),
        SocketAddr::V6(_) => panic!("the simulator gives out no such address"),
    }
}

pub(crate) fn endpoint(node: usize) -> Endpoint {
    Endpoint(node as u32)
}

/// Room on the way from one node to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Bytes that may be sent now.
    pub(crate) bytes: u64,
    /// When a good part of a train fits again.
    pub(crate) again_at: Instant,
}

pub(crate) fn room(net: &MemNet<Packet>, from: Endpoint, to: Endpoint, now: Instant) -> Room {
    let link = net.link(from, to);
    if link.bytes_per_second.is_none() {
        return Room {
            bytes: u64::MAX,
            again_at: now,
        };
    }
    let train_bytes = TRAIN_BYTES.min(link.queue_bytes_max / 2).max(1);
    let waiting_bytes = net.waiting_bytes(from, to, now);
    Room {
        bytes: train_bytes.saturating_sub(waiting_bytes),
        again_at: net.drained_to(from, to, train_bytes / 2, now),
    }
}
