//! Tables of frames, each a byte away from another reason; and no input panics.

#![allow(clippy::unwrap_used, reason = "test code")]

use super::quic::tests::long;
use super::{Packet, Protocol, Quic, TcpFlags, Transport};
use crate::reason::Reason;
use etherparse::{IpFragOffset, IpNumber, PacketBuilder};
use proptest::prelude::*;

const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

fn udp4(payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(MACS.0, MACS.1)
        .ipv4([192, 0, 2, 7], [198, 51, 100, 1], 9)
        .udp(40_000, 4_100);
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).unwrap();
    frame
}

fn udp6(payload: &[u8]) -> Vec<u8> {
    let source = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
    let builder = PacketBuilder::ethernet2(MACS.0, MACS.1)
        .ipv6(source, [0xfd; 16], 9)
        .udp(40_000, 4_100);
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).unwrap();
    frame
}

fn tcp4(flags: u8) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(MACS.0, MACS.1)
        .ipv4([192, 0, 2, 7], [198, 51, 100, 1], 9)
        .tcp(40_000, 8_080, 1, 1_024);
    let mut frame = Vec::new();
    builder.write(&mut frame, &[]).unwrap();
    frame[47] = flags;
    frame
}

/// The frame with other bytes from `at` on.
pub(super) fn with(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

/// The frame with VLAN tags of these types.
fn tagged(frame: &[u8], types: &[u16]) -> Vec<u8> {
    let mut tags = Vec::new();
    for tag in types {
        tags.extend(tag.to_be_bytes());
        tags.extend([0, 5]);
    }
    [&frame[..12], &tags, &frame[12..]].concat()
}

/// An IPv6 frame with these extension headers (number and bytes) in front of UDP.
fn extended(headers: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut frame = udp6(b"payload");
    let mut next = 17;
    for (number, header) in headers.iter().rev() {
        let mut header = header.clone();
        header[0] = next;
        frame.splice(54..54, header);
        next = *number;
    }
    frame[20] = next;
    let payload = (frame.len() - 54) as u16;
    with(frame, 18, &payload.to_be_bytes())
}

fn extension(bytes: usize) -> Vec<u8> {
    let mut header = vec![0; bytes];
    header[1] = (bytes / 8 - 1) as u8;
    header[2] = 4;
    header
}

/// A reason that the packet ends with before its payload is read; none if it goes on.
fn refused(frame: &[u8]) -> Option<Reason> {
    let read = || {
        let packet = Packet::parse(frame)?;
        packet.refuse_fragments_and_options()?;
        packet.transport()
    };
    read().err()
}

#[test]
fn addresses_ports_and_payload_are_found() {
    let frame = tagged(&udp4(b"payload"), &[0x88a8, 0x8100]);
    let padded = [frame.as_slice(), &[0xee; 11]].concat();
    let packet = Packet::parse(&padded).unwrap();
    assert_eq!(packet.link, &frame[..22]);
    assert_eq!(packet.source.to_string(), "192.0.2.7");
    assert_eq!(packet.destination.to_string(), "198.51.100.1");
    assert_eq!(packet.protocol, Protocol::Udp);
    assert_eq!(
        (packet.source_port, packet.destination_port),
        (40_000, 4_100)
    );
    assert_eq!(packet.transport(), Ok(Transport::Udp(b"payload")));

    let frame = extended(&[(0, extension(8)), (43, extension(24)), (60, extension(16))]);
    let packet = Packet::parse(&frame).unwrap();
    assert_eq!(packet.source.to_string(), "2001:db8::7");
    assert_eq!(packet.transport(), Ok(Transport::Udp(b"payload")));
    assert!(!packet.options && !packet.fragment);
}

#[test]
fn ethernet_ends_at_what_it_does_not_know() {
    let frame = udp4(b"");
    let cases = [
        ("empty", vec![], Some(Reason::PassOther)),
        ("13 bytes", frame[..13].to_vec(), Some(Reason::PassOther)),
        (
            "ARP",
            with(frame.clone(), 12, &[8, 6]),
            Some(Reason::PassOther),
        ),
        ("one tag", tagged(&frame, &[0x8100]), None),
        ("two tags", tagged(&frame, &[0x88a8, 0x88a8]), None),
        (
            "three tags",
            tagged(&frame, &[0x8100; 3]),
            Some(Reason::PassOther),
        ),
        (
            "tag cut short",
            tagged(&frame, &[0x8100])[..17].to_vec(),
            Some(Reason::PassOther),
        ),
        (
            "nothing behind a tag",
            tagged(&frame, &[0x8100])[..18].to_vec(),
            Some(Reason::MalformedIp),
        ),
    ];
    for (name, frame, reason) in cases {
        assert_eq!(refused(&frame), reason, "{name}");
    }
}

#[test]
fn ipv4_lengths_fragments_and_options() {
    let frame = udp4(b"payload");
    let options = {
        let mut frame = frame.clone();
        frame.splice(34..34, [1; 4]);
        with(with(frame, 14, &[0x46]), 16, &39_u16.to_be_bytes())
    };
    let cases = [
        ("whole", frame.clone(), None),
        ("19 bytes", frame[..33].to_vec(), Some(Reason::MalformedIp)),
        (
            "version 5",
            with(frame.clone(), 14, &[0x55]),
            Some(Reason::MalformedIp),
        ),
        (
            "IHL 4",
            with(frame.clone(), 14, &[0x44]),
            Some(Reason::MalformedIp),
        ),
        (
            "total below header",
            with(frame.clone(), 16, &[0, 19]),
            Some(Reason::MalformedIp),
        ),
        (
            "total past end",
            with(frame.clone(), 16, &[0, 36]),
            Some(Reason::MalformedIp),
        ),
        (
            "cut by one",
            frame[..frame.len() - 1].to_vec(),
            Some(Reason::MalformedIp),
        ),
        (
            "header past end",
            with(frame.clone(), 14, &[0x4f]),
            Some(Reason::MalformedIp),
        ),
        (
            "ICMP",
            with(frame.clone(), 23, &[1]),
            Some(Reason::PassOther),
        ),
        (
            "later fragment",
            with(frame.clone(), 20, &[0x20, 1]),
            Some(Reason::PassOther),
        ),
        (
            "first fragment",
            with(frame.clone(), 20, &[0x20, 0]),
            Some(Reason::Fragment),
        ),
        (
            "not to be fragmented",
            with(frame.clone(), 20, &[0x40, 0]),
            None,
        ),
        ("options", options, Some(Reason::Options)),
        (
            "three bytes of UDP",
            with(frame.clone(), 16, &[0, 23]),
            Some(Reason::MalformedL4),
        ),
        (
            "three bytes of a first fragment",
            with(with(frame.clone(), 16, &[0, 23]), 20, &[0x20, 0]),
            Some(Reason::Fragment),
        ),
    ];
    for (name, frame, reason) in cases {
        assert_eq!(refused(&frame), reason, "{name}");
    }
}

#[test]
fn ipv6_lengths_and_extensions() {
    let frame = udp6(b"payload");
    let fragment = |offset_and_more: u16| {
        let mut header = vec![0; 8];
        header[2..4].copy_from_slice(&offset_and_more.to_be_bytes());
        (44, header)
    };
    let type_0 = {
        let mut header = extension(8);
        header[2] = 0;
        (43, header)
    };
    let other = extension(8);
    let cases = [
        ("whole", frame.clone(), None),
        ("39 bytes", frame[..53].to_vec(), Some(Reason::MalformedIp)),
        (
            "version 4",
            with(frame.clone(), 14, &[0x40]),
            Some(Reason::MalformedIp),
        ),
        (
            "IPv4 in IPv6",
            with(
                frame.clone(),
                22,
                &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff],
            ),
            Some(Reason::MalformedIp),
        ),
        (
            "payload past end",
            with(frame.clone(), 18, &[0, 16]),
            Some(Reason::MalformedIp),
        ),
        (
            "no payload",
            with(frame.clone(), 18, &[0, 0]),
            Some(Reason::PassOther),
        ),
        (
            "ICMPv6",
            with(frame.clone(), 20, &[58]),
            Some(Reason::PassOther),
        ),
        (
            "ESP",
            extended(&[(0, other.clone()), (50, other.clone())]),
            Some(Reason::PassOther),
        ),
        (
            "six extensions",
            extended(&vec![(60, other.clone()); 6]),
            None,
        ),
        (
            "seven extensions",
            extended(&vec![(60, other.clone()); 7]),
            Some(Reason::PassOther),
        ),
        ("routing type 0", extended(&[type_0]), Some(Reason::Options)),
        (
            "1,024 bytes",
            extended(&[(0, extension(512)), (60, extension(512))]),
            None,
        ),
        (
            "1,032 bytes",
            extended(&[(0, extension(512)), (60, extension(520))]),
            Some(Reason::Options),
        ),
        ("atomic fragment", extended(&[fragment(0)]), None),
        (
            "first fragment",
            extended(&[fragment(1)]),
            Some(Reason::Fragment),
        ),
        (
            "later fragment",
            extended(&[fragment(8)]),
            Some(Reason::PassOther),
        ),
        (
            "extension cut short",
            with(extended(&[(0, other.clone())]), 55, &[9]),
            Some(Reason::MalformedIp),
        ),
        (
            "seven bytes of an extension",
            with(extended(&[(0, other)]), 18, &[0, 7]),
            Some(Reason::MalformedIp),
        ),
    ];
    for (name, frame, reason) in cases {
        assert_eq!(refused(&frame), reason, "{name}");
    }
}

#[test]
fn udp_lengths() {
    let frame = udp4(b"payload");
    for (bytes, reason) in [
        (15, None),
        (8, None),
        (7, Some(Reason::MalformedL4)),
        (0, Some(Reason::MalformedL4)),
        (16, Some(Reason::MalformedL4)),
    ] {
        let frame = with(frame.clone(), 38, &[0, bytes]);
        assert_eq!(refused(&frame), reason, "UDP length {bytes}");
    }
    let short = with(frame, 16, &[0, 27]);
    assert_eq!(refused(&short), Some(Reason::MalformedL4));
}

#[test]
fn tcp_lengths_and_flags() {
    for (offset, reason) in [
        (0x40, Some(Reason::MalformedL4)),
        (0x60, Some(Reason::MalformedL4)),
        (0x50, None),
    ] {
        let frame = with(tcp4(2), 46, &[offset]);
        assert_eq!(refused(&frame), reason, "data offset {offset:#x}");
    }
    let (fin, syn, rst, ack, urg) = (1, 2, 4, 0x10, 0x20);
    for sane in [
        syn,
        syn | ack,
        ack,
        fin | ack,
        rst,
        rst | ack,
        syn | urg,
        syn | 0xc0,
    ] {
        assert_eq!(refused(&tcp4(sane)), None, "flags {sane:#x}");
    }
    for odd in [
        0,
        fin,
        urg,
        fin | urg,
        syn | fin,
        syn | rst,
        fin | rst,
        syn | fin | rst | ack,
    ] {
        assert_eq!(
            refused(&tcp4(odd)),
            Some(Reason::TcpFlags),
            "flags {odd:#x}"
        );
    }
    assert!(TcpFlags(syn | urg).opens());
    assert!(!TcpFlags(syn | ack).opens() && !TcpFlags(ack).opens());
}

#[test]
fn fragments_of_a_library_are_read() {
    let mut frame = Vec::new();
    let mut ip =
        etherparse::Ipv4Header::new(8, 64, IpNumber::UDP, [192, 0, 2, 7], [198, 51, 100, 1])
            .unwrap();
    ip.more_fragments = true;
    ip.fragment_offset = IpFragOffset::ZERO;
    let ethernet = etherparse::Ethernet2Header {
        source: MACS.0,
        destination: MACS.1,
        ether_type: etherparse::EtherType::IPV4,
    };
    ethernet.write(&mut frame).unwrap();
    ip.write(&mut frame).unwrap();
    frame.extend([0x9c, 0x40, 0x10, 0x04, 0, 8, 0, 0]);
    let packet = Packet::parse(&frame).unwrap();
    assert_eq!(packet.destination_port, 4_100);
    assert!(packet.fragment);
}

proptest! {
    // Protects the node: whatever a frame holds, it has one answer.
    #[test]
    fn nothing_panics(
        base in 0..6_usize,
        changes in proptest::collection::vec((0..120_usize, any::<u8>()), 0..6),
        cut in 0..1_400_usize,
        noise in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        let payload = long(0xc0, 1, 8, 8, &[0; 1_200]);
        let mut frame = match base {
            0 => udp4(&payload),
            1 => udp6(&payload),
            2 => tcp4(2),
            3 => tagged(&udp4(&payload), &[0x8100]),
            4 => extended(&[(0, extension(8)), (44, vec![0; 8])]),
            _ => noise,
        };
        for (at, byte) in changes {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        frame.truncate(cut);
        if let Ok(packet) = Packet::parse(&frame)
            && let Ok(Transport::Udp(payload)) = packet.transport()
            && let Ok(Quic::Initial(initial)) = Quic::parse(payload)
        {
            prop_assert!(initial.destination_id.len() <= 20 && initial.source_id.len() <= 20);
            prop_assert!(initial.token().map_or(0, <[u8]>::len) < payload.len());
        }
    }
}
