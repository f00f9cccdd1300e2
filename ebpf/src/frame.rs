//! Frames made from descriptions: for an operator who traces a packet without a capture, and for
//! the self-test.
//!
//! Frames are whole, with valid lengths and checksums; the description chooses nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::{Ethernet2Header, PacketBuilder, PacketBuilderStep};
use serde::{Deserialize, Serialize};

/// A description of a packet to this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The sender.
    pub from: SocketAddr,
    /// The destination port.
    pub to_port: u16,
    /// The kind of packet.
    pub shape: Shape,
    /// Bytes behind the UDP or TCP header, cut at 9,000. None: the least that such a packet has.
    pub payload_bytes: Option<u16>,
}

/// A kind of packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// The first packet of a QUIC client: version 1, without a token, with an ID that the client
    /// chose.
    QuicInitial,
    /// A packet of an established QUIC connection, with an ID that this node did not issue.
    QuicShort,
    /// The first packet of a TCP connection.
    TcpSyn,
    /// A packet of an established TCP connection.
    TcpAck,
    /// UDP with a payload of zeros.
    Udp,
}

impl Description {
    /// The frame, from the Ethernet header on.
    #[must_use]
    pub fn frame(&self) -> Vec<u8> {
        let payload = self.payload();
        let (from, to) = (self.from.port(), self.to_port);
        let ip = addressed(self.from.ip());
        let mut frame = Vec::with_capacity(HEADERS_MAX + payload.len());
        let written = match self.shape {
            Shape::QuicInitial | Shape::QuicShort | Shape::Udp => {
                ip.udp(from, to).write_to_vec(&mut frame, &payload)
            }
            Shape::TcpSyn => ip
                .tcp(from, to, 1, WINDOW)
                .syn()
                .write_to_vec(&mut frame, &payload),
            Shape::TcpAck => ip
                .tcp(from, to, 1, WINDOW)
                .ack(1)
                .write_to_vec(&mut frame, &payload),
        };
        debug_assert!(
            written.is_ok(),
            "lengths are below those of IP: {written:?}"
        );
        frame
    }

    fn payload(&self) -> Vec<u8> {
        let (begin, least) = match self.shape {
            Shape::QuicInitial => (INITIAL.as_slice(), 1_200),
            Shape::QuicShort => ([0x40].as_slice(), 40),
            Shape::TcpSyn | Shape::TcpAck | Shape::Udp => ([].as_slice(), 0),
        };
        let length = self.payload_bytes.unwrap_or(least).min(PAYLOAD_MAX);
        let mut payload = vec![0; usize::from(length)];
        let shared = begin.len().min(payload.len());
        payload[..shared].copy_from_slice(&begin[..shared]);
        payload
    }
}

/// The first of two addresses, or the second if the first is the sender's.
fn other_than<A: PartialEq>([first, second]: [A; 2], from: A) -> A {
    if first == from { second } else { first }
}

/// Headers down to IP. The program does not compare the destination with the node's addresses, so
/// any address but the sender's will do.
fn addressed(from: IpAddr) -> PacketBuilderStep<etherparse::IpHeaders> {
    let link: PacketBuilderStep<Ethernet2Header> =
        PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    match from.to_canonical() {
        IpAddr::V4(from) => link.ipv4(from.octets(), other_than(NODE4, from).octets(), 64),
        IpAddr::V6(from) => link.ipv6(from.octets(), other_than(NODE6, from).octets(), 64),
    }
}

/// Long header, version 1, IDs of 8 bytes, no token, and the length of the rest of 1,200 bytes.
const INITIAL: [u8; 26] = [
    0xc0, 0, 0, 0, 1, 8, b'm', b'i', b'l', b'l', b'r', b'a', b'c', b'e', 8, 1, 2, 3, 4, 5, 6, 7, 8,
    0, 0x44, 0x96,
];
const PAYLOAD_MAX: u16 = 9_000;
const HEADERS_MAX: usize = 14 + 40 + 20;
const WINDOW: u16 = 64_000;
/// Addresses for documentation.
const NODE4: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
const NODE6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2),
];

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_edge_policy::packet::{Packet, Protocol, Quic, Transport};

    fn description(from: &str, shape: Shape) -> Description {
        Description {
            from: from.parse().unwrap(),
            to_port: 4100,
            shape,
            payload_bytes: None,
        }
    }

    // Protects `trace`: the program sees the packet that the operator describes.
    #[test]
    fn frames_are_what_was_described() {
        for from in ["198.51.100.7:40000", "[2001:db8::7]:40000"] {
            for shape in [Shape::QuicInitial, Shape::QuicShort, Shape::Udp] {
                let frame = description(from, shape).frame();
                let packet = Packet::parse(&frame).unwrap();
                assert_eq!(packet.source, from.parse::<SocketAddr>().unwrap().ip());
                assert_eq!(packet.protocol, Protocol::Udp);
                assert_eq!(
                    (packet.source_port, packet.destination_port),
                    (40_000, 4_100)
                );
                let Transport::Udp(payload) = packet.transport().unwrap() else {
                    panic!()
                };
                match shape {
                    Shape::QuicInitial => {
                        assert!(matches!(Quic::parse(payload).unwrap(), Quic::Initial(_)));
                        assert_eq!(payload.len(), 1_200);
                    }
                    Shape::QuicShort => {
                        assert!(matches!(Quic::parse(payload).unwrap(), Quic::Known(_)));
                    }
                    _ => assert!(payload.is_empty()),
                }
            }
        }
    }

    #[test]
    fn payloads_are_as_long_as_asked() {
        for bytes in [0, 5, 9_000, u16::MAX] {
            let described = Description {
                payload_bytes: Some(bytes),
                ..description("198.51.100.7:40000", Shape::QuicInitial)
            };
            let length = usize::from(bytes.min(9_000));
            assert_eq!(described.frame().len(), 14 + 20 + 8 + length);
        }
    }
}
