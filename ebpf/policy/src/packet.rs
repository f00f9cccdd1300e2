//! A frame as the edge reads it: Ethernet, IP, UDP or TCP, and the part of QUIC that needs no key.
//!
//! The kernel's program takes these steps for each packet; the model calls this module. Views
//! borrow the frame.
//!
//! 1. No input panics, and nothing is allocated.
//! 2. The order of the checks is part of the specification: it decides which reason is counted.
//! 3. Padding behind the IP packet is never read.

use crate::reason::Reason;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

mod quic;
#[cfg(test)]
mod tests;

pub use quic::{ID_BYTES_MAX, INITIAL_BYTES_MIN, Initial, OUR_ID_BYTES, Quic};

/// The transport protocols that services have; the value is the IP protocol number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Protocol {
    /// UDP.
    Udp = 17,
    /// TCP.
    Tcp = 6,
}

impl Protocol {
    /// The protocol with this number; none for protocols that no service has.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            17 => Some(Self::Udp),
            6 => Some(Self::Tcp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        })
    }
}

/// A packet, read up to its ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'f> {
    /// Ethernet header and VLAN tags.
    pub link: &'f [u8],
    /// Sender.
    pub source: IpAddr,
    /// Receiver.
    pub destination: IpAddr,
    /// UDP or TCP.
    pub protocol: Protocol,
    /// Port of the sender.
    pub source_port: u16,
    /// Port of the receiver; it selects the service.
    pub destination_port: u16,
    /// The IP payload from the transport header on; it holds at least the ports.
    pub segment: &'f [u8],
    /// The first fragment of several.
    pub fragment: bool,
    /// IPv4 options, an IPv6 routing header of type 0, or extension headers above 1,024 bytes.
    pub options: bool,
}

/// The transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport<'f> {
    /// UDP, with the payload that its length names.
    Udp(&'f [u8]),
    /// TCP, with a combination of flags that a TCP may send.
    Tcp(TcpFlags),
}

/// Flags of a TCP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpFlags(u8);

impl TcpFlags {
    const FIN: u8 = 0x01;
    const SYN: u8 = 0x02;
    const RST: u8 = 0x04;
    const ACK: u8 = 0x10;

    /// Asks for a connection.
    pub fn opens(self) -> bool {
        self.0 & (Self::SYN | Self::ACK) == Self::SYN
    }

    /// Belongs to a connection, or completes the handshake of one.
    pub fn goes_on(self) -> bool {
        self.0 & (Self::SYN | Self::RST | Self::ACK) == Self::ACK
    }

    /// Whether a TCP may send this combination.
    fn are_sane(self) -> bool {
        let has = |flags: u8| self.0 & flags == flags;
        let contradict =
            has(Self::SYN | Self::FIN) || has(Self::SYN | Self::RST) || has(Self::FIN | Self::RST);
        !contradict && self.0 & (Self::SYN | Self::ACK | Self::RST) != 0
    }
}

const ETHERNET_BYTES: usize = 14;
/// Offset of the sender's address in a link header.
const SOURCE_MAC: usize = 6;
const VLAN_TAG_BYTES: usize = 4;
const VLAN_TAGS_MAX: usize = 2;
const IPV4_BYTES_MIN: usize = 20;
const IPV6_BYTES: usize = 40;
/// Extension headers that are walked (`EDGE_EXTENSIONS_MAX`).
const EXTENSIONS_MAX: usize = 6;
/// Bytes of extension headers that do not yet count as options (`EDGE_EXTENSION_BYTES_MAX`).
const EXTENSION_BYTES_MAX: usize = 1_024;
const PORTS_BYTES: usize = 4;
const UDP_BYTES: usize = 8;
const TCP_BYTES_MIN: usize = 20;

impl<'f> Packet<'f> {
    /// Reads a frame up to the ports.
    ///
    /// # Errors
    ///
    /// The [`Reason`] of a frame that can have no service: not IPv4 or IPv6 with UDP or TCP, a
    /// later fragment, or malformed headers (section 1 of the specification).
    pub fn parse(frame: &'f [u8]) -> Result<Self, Reason> {
        let (link, ethertype, packet) = ethernet(frame).ok_or(Reason::PassOther)?;
        let ip = match ethertype {
            0x0800 => ipv4(packet)?,
            0x86dd => ipv6(packet)?,
            _ => return Err(Reason::PassOther),
        };
        let Some((ports, _)) = ip.segment.split_first_chunk::<PORTS_BYTES>() else {
            // RFC 7112: the first fragment must hold the whole chain of headers.
            return Err(if ip.fragment {
                Reason::Fragment
            } else {
                Reason::MalformedL4
            });
        };
        Ok(Self {
            link,
            source: ip.source,
            destination: ip.destination,
            protocol: ip.protocol,
            source_port: be16(ports, 0),
            destination_port: be16(ports, 2),
            segment: ip.segment,
            fragment: ip.fragment,
            options: ip.options,
        })
    }

    /// Refuses a packet that must get no answer: an answer swaps the addresses, of link and
    /// network.
    ///
    /// # Errors
    ///
    /// [`Reason::Martian`] if one of the addresses belongs to no single host, or both are the same.
    pub fn refuse_martians(&self) -> Result<(), Reason> {
        let group = |mac: usize| self.link.get(mac).is_none_or(|first| first & 1 != 0);
        let addresses = [self.source, self.destination];
        if group(0)
            || group(SOURCE_MAC)
            || addresses.into_iter().any(is_martian)
            || self.source == self.destination
        {
            return Err(Reason::Martian);
        }
        Ok(())
    }

    /// Refuses a packet that no declared port takes, whatever its service is.
    ///
    /// # Errors
    ///
    /// [`Reason::Fragment`] for the first fragment of several, [`Reason::Options`] for options.
    pub fn refuse_fragments_and_options(&self) -> Result<(), Reason> {
        if self.fragment {
            return Err(Reason::Fragment);
        }
        if self.options {
            return Err(Reason::Options);
        }
        Ok(())
    }

    /// Reads the transport header.
    ///
    /// # Errors
    ///
    /// [`Reason::MalformedL4`] for a header or lengths that are wrong, [`Reason::TcpFlags`] for
    /// flags that no TCP sends together.
    pub fn transport(&self) -> Result<Transport<'f>, Reason> {
        match self.protocol {
            Protocol::Udp => udp(self.segment).map(Transport::Udp),
            Protocol::Tcp => tcp(self.segment).map(Transport::Tcp),
        }
    }
}

/// Whether no unicast packet of another host has this address.
fn is_martian(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            matches!(v4.octets()[0], 0 | 127) || v4.is_multicast() || v4.is_broadcast()
        }
        IpAddr::V6(v6) => v6.is_multicast() || v6.is_unspecified() || v6.is_loopback(),
    }
}

/// The IP header and its extensions.
struct Ip<'f> {
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    segment: &'f [u8],
    fragment: bool,
    options: bool,
}

/// Link header, type and packet; none if the frame ends before its type.
fn ethernet(frame: &[u8]) -> Option<(&[u8], u16, &[u8])> {
    let mut end = ETHERNET_BYTES;
    for _ in 0..=VLAN_TAGS_MAX {
        let (link, packet) = frame.split_at_checked(end)?;
        let ethertype = be16(link, end - 2);
        // A third tag is returned as the type, which no protocol has.
        let tags = (end - ETHERNET_BYTES) / VLAN_TAG_BYTES;
        if !matches!(ethertype, 0x8100 | 0x88a8) || tags == VLAN_TAGS_MAX {
            return Some((link, ethertype, packet));
        }
        end += VLAN_TAG_BYTES;
    }
    None
}

fn ipv4(packet: &[u8]) -> Result<Ip<'_>, Reason> {
    let Some((fixed, _)) = packet.split_first_chunk::<IPV4_BYTES_MIN>() else {
        return Err(Reason::MalformedIp);
    };
    let header_bytes = usize::from(fixed[0] & 0x0f) * 4;
    let total_bytes = usize::from(be16(fixed, 2));
    if fixed[0] >> 4 != 4
        || header_bytes < IPV4_BYTES_MIN
        || header_bytes > total_bytes
        || total_bytes > packet.len()
    {
        return Err(Reason::MalformedIp);
    }
    let fragment = be16(fixed, 6);
    if fragment & 0x1fff != 0 {
        return Err(Reason::PassOther);
    }
    let address = |from: usize| {
        let [a, b, c, d] = chunk(fixed, from);
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    Ok(Ip {
        source: address(12),
        destination: address(16),
        protocol: Protocol::from_number(fixed[9]).ok_or(Reason::PassOther)?,
        segment: &packet[header_bytes..total_bytes],
        fragment: fragment & 0x2000 != 0,
        options: header_bytes > IPV4_BYTES_MIN,
    })
}

fn ipv6(packet: &[u8]) -> Result<Ip<'_>, Reason> {
    let Some((fixed, payload)) = packet.split_first_chunk::<IPV6_BYTES>() else {
        return Err(Reason::MalformedIp);
    };
    let payload_bytes = usize::from(be16(fixed, 4));
    let address = |from: usize| Ipv6Addr::from(chunk::<16>(fixed, from));
    let source = address(8);
    // The host drops IPv4 in IPv6 too. Here it would be counted in one family and looked up in the
    // other.
    if fixed[0] >> 4 != 6 || source.to_ipv4_mapped().is_some() {
        return Err(Reason::MalformedIp);
    }
    let payload = payload.get(..payload_bytes).ok_or(Reason::MalformedIp)?;
    if payload.is_empty() {
        return Err(Reason::PassOther);
    }
    let chain = Extensions::walk(fixed[6], payload)?;
    Ok(Ip {
        source: IpAddr::V6(source),
        destination: IpAddr::V6(address(24)),
        protocol: Protocol::from_number(chain.next).ok_or(Reason::PassOther)?,
        segment: chain.rest,
        fragment: chain.fragment,
        options: chain.options || payload.len() - chain.rest.len() > EXTENSION_BYTES_MAX,
    })
}

/// The state behind the extension headers.
struct Extensions<'f> {
    next: u8,
    rest: &'f [u8],
    fragment: bool,
    options: bool,
}

impl<'f> Extensions<'f> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;

    fn walk(next: u8, payload: &'f [u8]) -> Result<Self, Reason> {
        let mut chain = Self {
            next,
            rest: payload,
            fragment: false,
            options: false,
        };
        for _ in 0..EXTENSIONS_MAX {
            if !chain.skip_one()? {
                break;
            }
        }
        // A seventh extension stays as `next`, which is neither UDP nor TCP.
        Ok(chain)
    }

    /// Skips one extension header; false once an upper protocol is reached.
    fn skip_one(&mut self) -> Result<bool, Reason> {
        let known = [
            Self::HOP_BY_HOP,
            Self::ROUTING,
            Self::FRAGMENT,
            Self::DESTINATION,
        ];
        if !known.contains(&self.next) {
            return Ok(false);
        }
        let head: [u8; 8] = match self.rest.first_chunk() {
            Some(head) => *head,
            None => return Err(Reason::MalformedIp),
        };
        let bytes = match self.next {
            Self::FRAGMENT => 8,
            _ => (usize::from(head[1]) + 1) * 8,
        };
        let rest = self.rest.get(bytes..).ok_or(Reason::MalformedIp)?;
        match self.next {
            Self::ROUTING if head[2] == 0 => self.options = true,
            Self::FRAGMENT => {
                let offset_and_more = be16(&head, 2);
                if offset_and_more & 0xfff8 != 0 {
                    return Err(Reason::PassOther);
                }
                self.fragment |= offset_and_more & 1 != 0;
            }
            _ => {}
        }
        self.next = head[0];
        self.rest = rest;
        Ok(true)
    }
}

fn udp(segment: &[u8]) -> Result<&[u8], Reason> {
    let Some((header, _)) = segment.split_first_chunk::<UDP_BYTES>() else {
        return Err(Reason::MalformedL4);
    };
    let datagram_bytes = usize::from(be16(header, 4));
    segment
        .get(UDP_BYTES..datagram_bytes)
        .ok_or(Reason::MalformedL4)
}

fn tcp(segment: &[u8]) -> Result<TcpFlags, Reason> {
    let Some((header, _)) = segment.split_first_chunk::<TCP_BYTES_MIN>() else {
        return Err(Reason::MalformedL4);
    };
    let header_bytes = usize::from(header[12] >> 4) * 4;
    if header_bytes < TCP_BYTES_MIN || header_bytes > segment.len() {
        return Err(Reason::MalformedL4);
    }
    let flags = TcpFlags(header[13]);
    if flags.are_sane() {
        Ok(flags)
    } else {
        Err(Reason::TcpFlags)
    }
}

/// Two bytes in network order; the caller has checked that they are there.
fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(chunk(bytes, at))
}

/// Bytes of a header whose length is checked.
fn chunk<const N: usize>(bytes: &[u8], from: usize) -> [u8; N] {
    let mut chunk = [0; N];
    chunk.copy_from_slice(&bytes[from..from + N]);
    chunk
}
