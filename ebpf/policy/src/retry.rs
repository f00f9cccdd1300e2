//! A Retry packet and the frame that carries it, as the kernel's program makes them (RFC 9000
//! section 17.2.5, RFC 9001 section 5.8).
//!
//! The integrity tag is AES-128-GCM over associated data alone, with a key and a nonce that the RFC
//! prints. So the block cipher has only two inputs, both constant, and this file holds its outputs.
//! What remains is GHASH, computed bit by bit: right, and too slow for anything but the model. The
//! kernel or the QUIC library makes the answers that are sent.
//!
//! 1. A Retry proves nothing and hides nothing; the tag tells an answer from an accident.
//! 2. A frame answers the packet that it is made from: it swaps addresses and ports, and keeps no
//!    more of the packet.

use crate::packet::Packet;
use crate::token::Minted;
use std::net::IpAddr;

/// Bytes of the integrity tag.
pub const TAG_BYTES: usize = 16;

/// The hash key: AES-128 of a block of zeros under the RFC's key.
const H: u128 = 0x7295_6a45_4ffa_ff54_85a1_3a12_44d0_1d47;
/// AES-128 of the RFC's nonce and the counter 1 under the RFC's key.
const PAD: u128 = 0x555e_4b74_9355_6eea_af75_d35b_d7fb_a5d8;
/// x^128 + x^7 + x^2 + x + 1, in GCM's reflected order.
const REDUCTION: u128 = 0xe1 << 120;

const FIRST_BYTE: u8 = 0xf0;
const VERSION_1: [u8; 4] = [0, 0, 0, 1];
const UDP_BYTES: usize = 8;
const IPV4_BYTES: u16 = 20;
const HOP_LIMIT: u8 = 64;
const UDP: u8 = 17;

/// The Retry for a client whose first packet had the source ID `client_id` and the destination ID
/// `original_id`; both have at most 20 bytes.
pub fn packet(client_id: &[u8], original_id: &[u8], minted: &Minted) -> Vec<u8> {
    let mut packet = vec![FIRST_BYTE];
    packet.extend(VERSION_1);
    put_id(&mut packet, client_id);
    put_id(&mut packet, &minted.retry_id);
    packet.extend(minted.token);
    let tag = integrity_tag(original_id, &packet);
    packet.extend(tag);
    packet
}

/// The integrity tag of a Retry `packet` that has no tag yet (RFC 9001 section 5.8).
pub fn integrity_tag(original_id: &[u8], packet: &[u8]) -> [u8; TAG_BYTES] {
    let mut signed = Vec::new();
    put_id(&mut signed, original_id);
    signed.extend(packet);
    (ghash(&signed) ^ PAD).to_be_bytes()
}

/// The frame that takes a UDP payload back to the sender of `packet`.
pub fn frame(packet: &Packet<'_>, payload: &[u8]) -> Vec<u8> {
    let mut frame = packet.link.to_vec();
    frame[..6].copy_from_slice(&packet.link[6..12]);
    frame[6..12].copy_from_slice(&packet.link[..6]);
    let datagram = datagram(packet, payload);
    let bytes = (datagram.len() as u16).to_be_bytes();
    match (packet.destination, packet.source) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = (datagram.len() as u16 + IPV4_BYTES).to_be_bytes();
            let mut header = [0; IPV4_BYTES as usize];
            header[0] = 0x45;
            header[2..4].copy_from_slice(&total);
            header[6] = 0x40;
            header[8] = HOP_LIMIT;
            header[9] = UDP;
            header[12..16].copy_from_slice(&from.octets());
            header[16..].copy_from_slice(&to.octets());
            let checksum = !ones_complement_sum(&header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            frame.extend(header);
        }
        (from, to) => {
            frame.extend([0x60, 0, 0, 0]);
            frame.extend(bytes);
            frame.extend([UDP, HOP_LIMIT]);
            put_address(&mut frame, from);
            put_address(&mut frame, to);
        }
    }
    frame.extend(datagram);
    frame
}

/// The UDP datagram, its checksum included.
fn datagram(packet: &Packet<'_>, payload: &[u8]) -> Vec<u8> {
    let bytes = (payload.len() + UDP_BYTES) as u16;
    let mut datagram = Vec::with_capacity(usize::from(bytes));
    datagram.extend(packet.destination_port.to_be_bytes());
    datagram.extend(packet.source_port.to_be_bytes());
    datagram.extend(bytes.to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);

    let mut summed = Vec::new();
    put_address(&mut summed, packet.destination);
    put_address(&mut summed, packet.source);
    summed.extend(bytes.to_be_bytes());
    summed.extend([0, UDP]);
    summed.extend(&datagram);
    // A checksum of zero would mean that there is none (RFC 768).
    let checksum = match !ones_complement_sum(&summed) {
        0 => 0xffff,
        checksum => checksum,
    };
    datagram[6..8].copy_from_slice(&checksum.to_be_bytes());
    datagram
}

fn put_id(bytes: &mut Vec<u8>, id: &[u8]) {
    bytes.push(id.len() as u8);
    bytes.extend(id);
}

fn put_address(bytes: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => bytes.extend(v4.octets()),
        IpAddr::V6(v6) => bytes.extend(v6.octets()),
    }
}

/// RFC 1071.
fn ones_complement_sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// GHASH of associated data without a text.
fn ghash(data: &[u8]) -> u128 {
    let mut hash = 0;
    for block in data.chunks(16) {
        let mut bytes = [0; 16];
        bytes[..block.len()].copy_from_slice(block);
        hash = multiply_by_h(hash ^ u128::from_be_bytes(bytes));
    }
    let bits = (data.len() as u128) * 8;
    multiply_by_h(hash ^ bits << 64)
}

fn multiply_by_h(factor: u128) -> u128 {
    let (mut product, mut shifted) = (0, H);
    for bit in (0..128).rev() {
        if factor >> bit & 1 == 1 {
            product ^= shifted;
        }
        let carry = shifted & 1;
        shifted = (shifted >> 1) ^ (carry * REDUCTION);
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cid::Keys;
    use crate::siphash::Key;
    use crate::token;
    use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};

    // RFC 9001, A.4: the Retry in answer to the client's Initial.
    #[test]
    fn tag_of_the_rfc() {
        let original = [0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08];
        let retry = [
            0xff, 0x00, 0x00, 0x00, 0x01, 0x00, 0x08, 0xf0, 0x67, 0xa5, 0x50, 0x2a, 0x42, 0x62,
            0xb5, 0x74, 0x6f, 0x6b, 0x65, 0x6e,
        ];
        let tag = [
            0x04, 0xa2, 0x65, 0xba, 0x2e, 0xff, 0x4d, 0x82, 0x90, 0x58, 0xfb, 0x3f, 0x0f, 0x24,
            0x96, 0xba,
        ];
        assert_eq!(integrity_tag(&original, &retry), tag);
    }

    #[test]
    fn packet_has_the_fields_of_the_rfc() {
        let keys = Keys {
            keys: [Key::from_bytes([3; 16]); 4],
            active: 2,
        };
        let client = "192.0.2.7:40000".parse().unwrap();
        let minted = token::mint(&[9; 20], client, &keys, 1).unwrap();
        let packet = packet(&[5; 20], &[9; 20], &minted);
        assert_eq!(packet.len(), 71 + 20);
        assert_eq!(packet[..7], [0xf0, 0, 0, 0, 1, 20, 5]);
        assert_eq!(packet[26], 16);
        assert_eq!(packet[27..43], minted.retry_id);
        assert_eq!(packet[43..75], minted.token);
        assert_eq!(packet[75..], integrity_tag(&[9; 20], &packet[..75]));
    }

    // Protects clients: a frame with a wrong length or checksum never reaches them. Another library
    // checks both.
    #[test]
    fn frames_are_answers() {
        for payload in [&b"odd"[..], b"even", &[0xff; 71]] {
            let v4 = PacketBuilder::ethernet2([1; 6], [2; 6])
                .ipv4([192, 0, 2, 7], [198, 51, 100, 1], 9)
                .udp(40_000, 4_100);
            let v6 = PacketBuilder::ethernet2([1; 6], [2; 6])
                .ipv6([0x20; 16], [0xfd; 16], 9)
                .udp(40_000, 4_100);
            for builder in [v4, v6] {
                let mut asked = Vec::new();
                builder.write(&mut asked, &[7; 100]).unwrap();
                let packet = Packet::parse(&asked).unwrap();
                let frame = frame(&packet, payload);
                assert_eq!(frame[..6], [1; 6]);
                assert_eq!(frame[6..12], [2; 6]);

                let answer = Packet::parse(&frame).unwrap();
                assert_eq!(answer.source, packet.destination);
                assert_eq!(answer.destination, packet.source);
                assert_eq!(
                    (answer.source_port, answer.destination_port),
                    (4_100, 40_000)
                );

                let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
                let Some(TransportSlice::Udp(udp)) = sliced.transport else {
                    panic!("no UDP");
                };
                assert_eq!(udp.payload(), payload);
                let header = udp.to_header();
                let checksum = match sliced.net.unwrap() {
                    etherparse::NetSlice::Ipv4(ip) => {
                        let ip = ip.header().to_header();
                        assert_eq!(ip.calc_header_checksum(), ip.header_checksum);
                        assert!(ip.dont_fragment);
                        assert_eq!((ip.time_to_live, ip.identification), (64, 0));
                        header.calc_checksum_ipv4(&ip, payload).unwrap()
                    }
                    etherparse::NetSlice::Ipv6(ip) => {
                        assert_eq!(ip.header().hop_limit(), 64);
                        header
                            .calc_checksum_ipv6(&ip.header().to_header(), payload)
                            .unwrap()
                    }
                    other => panic!("{other:?}"),
                };
                assert_eq!(header.checksum, checksum);
            }
        }
    }

    #[test]
    fn a_checksum_of_zero_is_sent_as_ones() {
        let mut asked = Vec::new();
        PacketBuilder::ethernet2([1; 6], [2; 6])
            .ipv4([192, 0, 2, 7], [198, 51, 100, 1], 9)
            .udp(40_000, 4_100)
            .write(&mut asked, &[])
            .unwrap();
        let packet = Packet::parse(&asked).unwrap();
        let odd_one = datagram(&packet, &[0, 0]);
        let checksum = [odd_one[6], odd_one[7]];
        assert_eq!(datagram(&packet, &checksum)[6..8], [0xff, 0xff]);
    }
}
