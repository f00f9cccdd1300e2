//! Hostile frames: the shapes, and the data that the generator needs to vary them.

use std::net::Ipv6Addr;

use etherparse::PacketBuilder;
use serde::Serialize;

use crate::Result;
use crate::testbed::{CLIENT_MAC, NODE, NODE_MAC};

/// The port of the node that is open in every row, as the reference's transport has it.
pub(crate) const OPEN_PORT: u16 = 4100;
/// The node's TCP port.
pub(crate) const TCP_PORT: u16 = 8080;
/// Payload of a first packet; RFC 9000 section 14.1 demands 1,200 bytes.
const INITIAL_BYTES: usize = 1200;

const ETHERNET: usize = 14;
const IP: usize = 20;
const IP6: usize = 40;
const UDP: usize = 8;
/// The numbers of bytes that the generator can rewrite; it takes the least that suffices.
const REWRITTEN: [usize; 2] = [64, 128];

/// The shape of a hostile packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Shape {
    /// A first packet without token: 1,242 bytes, a new destination ID each.
    Initial,
    /// The same over IPv6, for test runs alone: without the UDP checksum that the stack would
    /// demand.
    Initial6,
    /// The first shape, to a port that the node does not declare.
    InitialElsewhere,
    /// A short header with a connection ID that no node issued.
    ShortHeader,
    /// A connection attempt.
    Syn,
}

/// A frame whose source address, source port and checksums are 0, and the data to fill them in.
#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) bytes: Vec<u8>,
    /// Bytes that are written for each packet.
    pub(crate) written: usize,
    /// Offset of the source port.
    pub(crate) port_at: usize,
    /// Sum of the IP header's words, folded to 16 bits, in the order of memory.
    pub(crate) ip_sum: u32,
    /// The same of TCP's header and pseudo header; 0 for UDP, which goes without.
    pub(crate) tcp_sum: u32,
    /// Offset of 8 bytes that differ from packet to packet; 0: none.
    pub(crate) random_at: usize,
}

impl Shape {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Initial => "initial",
            Self::Initial6 => "initial, IPv6",
            Self::InitialElsewhere => "initial-elsewhere",
            Self::ShortHeader => "short-header",
            Self::Syn => "syn",
        }
    }

    /// # Errors
    /// If the frame cannot be built: a defect.
    pub(crate) fn template(self) -> Result<Template> {
        let payload = ETHERNET + IP + UDP;
        let (mut bytes, random_at) = match self {
            Self::Initial => (udp(OPEN_PORT, &initial())?, payload + 6),
            Self::Initial6 => (udp6(OPEN_PORT, &initial())?, ETHERNET + IP6 + UDP + 6),
            Self::InitialElsewhere => (udp(OPEN_PORT + 1, &initial())?, payload + 6),
            Self::ShortHeader => (udp(OPEN_PORT, &[0x40; 64])?, payload + 1),
            Self::Syn => (syn()?, 0),
        };
        let length = bytes.len().max(REWRITTEN[0]);
        bytes.resize(length, 0);
        let tcp_sum = match self {
            Self::Syn => tcp_sum(&bytes),
            _ => 0,
        };
        let written = if length < REWRITTEN[1] {
            REWRITTEN[0]
        } else {
            REWRITTEN[1]
        };
        let port_at = match self {
            Self::Initial6 => ETHERNET + IP6,
            _ => ETHERNET + IP,
        };
        let ip_sum = sum(&bytes[ETHERNET..ETHERNET + IP]);
        Ok(Template {
            bytes,
            written,
            port_at,
            ip_sum,
            tcp_sum,
            random_at,
        })
    }
}

/// Client's first packet: version 1, IDs of 8 bytes, no token.
fn initial() -> Vec<u8> {
    let mut payload = vec![0xc3];
    payload.extend(1u32.to_be_bytes());
    payload.extend([8; 9]);
    payload.extend([8; 9]);
    payload.push(0);
    let rest = INITIAL_BYTES - payload.len() - 2;
    // A varint of two bytes.
    payload.extend((0x4000 | u16::try_from(rest).unwrap_or(u16::MAX)).to_be_bytes());
    payload.resize(INITIAL_BYTES, 0x5a);
    payload
}

fn udp(port: u16, payload: &[u8]) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(CLIENT_MAC, NODE_MAC)
        .ipv4([0; 4], NODE.octets(), 64)
        .udp(0, port);
    let mut bytes = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut bytes, payload)?;
    blank(&mut bytes, ETHERNET + IP + 6);
    Ok(bytes)
}

fn udp6(port: u16, payload: &[u8]) -> Result<Vec<u8>> {
    let (from, to) = (in_ipv6(0), in_ipv6(NODE.to_bits()));
    let builder = PacketBuilder::ethernet2(CLIENT_MAC, NODE_MAC)
        .ipv6(from.octets(), to.octets(), 64)
        .udp(0, port);
    let mut bytes = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut bytes, payload)?;
    let checksum = ETHERNET + IP6 + 6;
    bytes[checksum..checksum + 2].fill(0);
    Ok(bytes)
}

/// The source of IPv6 packets for a number: each has its own /64. The generator writes its bytes
/// 4..8, which stand in the frame where the whole of an IPv4 source does.
pub(crate) fn in_ipv6(number: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(0x2a00_0001 << 96 | u128::from(number) << 64 | 1)
}

fn syn() -> Result<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(CLIENT_MAC, NODE_MAC)
        .ipv4([0; 4], NODE.octets(), 64)
        .tcp(0, TCP_PORT, 0, 64_240)
        .syn();
    let mut bytes = Vec::with_capacity(builder.size(0));
    builder.write(&mut bytes, &[])?;
    blank(&mut bytes, ETHERNET + IP + 16);
    Ok(bytes)
}

/// Clears the IP checksum and the one at `transport`.
fn blank(bytes: &mut [u8], transport: usize) {
    for at in [ETHERNET + 10, transport] {
        bytes[at..at + 2].fill(0);
    }
}

fn tcp_sum(bytes: &[u8]) -> u32 {
    const TCP: usize = 20;
    let mut summed = NODE.octets().to_vec();
    summed.extend([0, 6]);
    summed.extend(u16::try_from(TCP).unwrap_or(u16::MAX).to_be_bytes());
    summed.extend(&bytes[ETHERNET + IP..ETHERNET + IP + TCP]);
    sum(&summed)
}

/// One's complement sum: independent of byte order, as long as it is written back in the same.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes
        .chunks_exact(2)
        .map(|word| u32::from(u16::from_ne_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    (sum & 0xffff) + (sum >> 16)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    #[test]
    fn templates_parse_and_are_of_the_sizes_that_the_rows_name() {
        for (shape, length) in [
            (Shape::Initial, 1242),
            (Shape::Initial6, 1262),
            (Shape::InitialElsewhere, 1242),
            (Shape::ShortHeader, 106),
            (Shape::Syn, 64),
        ] {
            let template = shape.template().unwrap();
            assert_eq!(template.bytes.len(), length, "{shape:?}");
            let packet = SlicedPacket::from_ethernet(&template.bytes).unwrap();
            match (shape, packet.net.unwrap()) {
                (Shape::Initial6, NetSlice::Ipv6(ip)) => {
                    assert_eq!(ip.header().source(), in_ipv6(0).octets());
                }
                (_, net) => assert!(matches!(net, NetSlice::Ipv4(_)), "{shape:?}"),
            }
            match packet.transport.unwrap() {
                TransportSlice::Udp(udp) => assert_eq!(udp.source_port(), 0),
                TransportSlice::Tcp(tcp) => assert!(tcp.syn() && !tcp.ack()),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_generator_writes_the_source_where_it_stands() {
        for shape in [Shape::Initial, Shape::Initial6] {
            let mut template = shape.template().unwrap();
            let number = 0x1234_5678_u32;
            template.bytes[26..30].copy_from_slice(&number.to_be_bytes());
            let port = template.port_at;
            template.bytes[port..port + 2].copy_from_slice(&9u16.to_be_bytes());
            let packet = SlicedPacket::from_ethernet(&template.bytes).unwrap();
            match packet.net.unwrap() {
                NetSlice::Ipv4(ip) => assert_eq!(ip.header().source(), number.to_be_bytes()),
                NetSlice::Ipv6(ip) => {
                    assert_eq!(ip.header().source(), in_ipv6(number).octets());
                }
                other => panic!("{other:?}"),
            }
            match packet.transport.unwrap() {
                TransportSlice::Udp(udp) => assert_eq!(udp.source_port(), 9),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn sums_are_those_of_a_checksum() {
        let bytes = PacketBuilder::ipv4([0; 4], NODE.octets(), 64)
            .tcp(0, TCP_PORT, 0, 64_240)
            .syn();
        let mut whole = Vec::new();
        bytes.write(&mut whole, &[]).unwrap();
        let template = Shape::Syn.template().unwrap();
        let checksum = |sum: u32| !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        assert_eq!(checksum(template.ip_sum).to_ne_bytes(), whole[10..12]);
        assert_eq!(checksum(template.tcp_sum).to_ne_bytes(), whole[36..38]);
    }
}
