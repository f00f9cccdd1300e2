//! Frames as tests want them: each field may be wrong, and a field that a test does not set is
//! right.
#![allow(dead_code, unreachable_pub, reason = "each test takes what it needs")]

use std::net::{IpAddr, SocketAddr};

pub const UDP: u8 = 17;
pub const TCP: u8 = 6;
pub const ICMP: u8 = 1;

/// Extension headers of IPv6.
pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const DESTINATION: u8 = 60;

/// *More fragments*, of IPv4.
pub const MORE: u16 = 0x2000;
/// *Don't fragment*, of IPv4.
pub const WHOLE: u16 = 0x4000;

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;

pub const LOCAL4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
pub const LOCAL6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(
    0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1,
));

/// A frame to this node.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Link addresses: of the receiver, of the sender.
    pub macs: [[u8; 6]; 2],
    /// Types of the VLAN tags, the outermost first.
    pub tags: Vec<u16>,
    /// Type behind them; none: that of the family.
    pub ethertype: Option<u16>,
    /// Address and port of the sender.
    pub source: SocketAddr,
    /// Receiver, of the sender's family; none: this node.
    pub destination: Option<IpAddr>,
    /// Byte 0 of the IP header; none: the right one.
    pub first: Option<u8>,
    /// IPv4 options: a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv4 flags and offset.
    pub fragment: u16,
    /// IPv6 extension headers: type, and all but the first byte.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Last *next header* or protocol; none: that of the body.
    pub protocol: Option<u8>,
    /// IPv4 total length or IPv6 payload length: the difference from the right value.
    pub length_error: i32,
    /// What the IP packet holds.
    pub body: Body,
    /// Behind the IP packet.
    pub trailer: usize,
}

/// Transport header and payload.
#[derive(Clone, Debug)]
pub enum Body {
    Udp {
        port: u16,
        payload: Vec<u8>,
        /// How much more the UDP length is than it should be.
        length_error: i32,
    },
    Tcp {
        port: u16,
        flags: u8,
        /// Words of the header; none: as many as there are.
        words: Option<u8>,
        options: Vec<u8>,
        payload: Vec<u8>,
    },
    Raw(Vec<u8>),
}

pub fn client(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

impl Frame {
    pub fn new(source: SocketAddr, body: Body) -> Self {
        Self {
            macs: [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]],
            tags: Vec::new(),
            ethertype: None,
            source,
            destination: None,
            first: None,
            options: Vec::new(),
            fragment: WHOLE,
            extensions: Vec::new(),
            protocol: None,
            length_error: 0,
            body,
            trailer: 0,
        }
    }

    pub fn udp(source: SocketAddr, port: u16, payload: &[u8]) -> Self {
        let body = Body::Udp {
            port,
            payload: payload.to_vec(),
            length_error: 0,
        };
        Self::new(source, body)
    }

    pub fn tcp(source: SocketAddr, port: u16, flags: u8) -> Self {
        let body = Body::Tcp {
            port,
            flags,
            words: None,
            options: Vec::new(),
            payload: Vec::new(),
        };
        Self::new(source, body)
    }

    /// Neither UDP nor TCP: `body` stands where the transport header would.
    pub fn raw(source: SocketAddr, protocol: u8, body: &[u8]) -> Self {
        let mut frame = Self::new(source, Body::Raw(body.to_vec()));
        frame.protocol = Some(protocol);
        frame
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let (body, protocol) = self.body.bytes(self.source.port());
        let protocol = self.protocol.unwrap_or(protocol);
        let mut frame = self.macs.concat();
        for (number, tag) in (100_u16..).zip(&self.tags) {
            frame.extend(tag.to_be_bytes());
            frame.extend(number.to_be_bytes());
        }
        let family = if self.source.is_ipv4() {
            0x0800
        } else {
            0x86dd
        };
        frame.extend(self.ethertype.unwrap_or(family).to_be_bytes());
        match self.source.ip() {
            IpAddr::V4(source) => self.put_ipv4(&mut frame, source.octets(), protocol, &body),
            IpAddr::V6(source) => self.put_ipv6(&mut frame, source.octets(), protocol, &body),
        }
        frame.resize(frame.len() + self.trailer, 0);
        frame
    }

    fn put_ipv4(&self, frame: &mut Vec<u8>, source: [u8; 4], protocol: u8, body: &[u8]) {
        let header_bytes = 20 + self.options.len();
        let words = (header_bytes / 4) as u8;
        frame.extend([self.first.unwrap_or(0x40 | words), 0]);
        frame.extend(self.length(header_bytes + body.len()));
        frame.extend([0x12, 0x34]);
        frame.extend(self.fragment.to_be_bytes());
        frame.extend([57, protocol, 0, 0]);
        frame.extend(source);
        put_address(frame, self.destination.unwrap_or(LOCAL4));
        frame.extend(&self.options);
        frame.extend(body);
    }

    fn put_ipv6(&self, frame: &mut Vec<u8>, source: [u8; 16], protocol: u8, body: &[u8]) {
        let types = self.extensions.iter().map(|(kind, _)| *kind);
        let mut types = types.chain([protocol]);
        let mut payload = Vec::with_capacity(body.len());
        let first = types.next().unwrap_or(protocol);
        for ((_, rest), next) in self.extensions.iter().zip(types) {
            payload.push(next);
            payload.extend(rest);
        }
        payload.extend(body);
        frame.extend([self.first.unwrap_or(0x60), 0, 0, 0]);
        frame.extend(self.length(payload.len()));
        frame.extend([first, 57]);
        frame.extend(source);
        put_address(frame, self.destination.unwrap_or(LOCAL6));
        frame.extend(payload);
    }

    fn length(&self, right: usize) -> [u8; 2] {
        ((right as i32 + self.length_error).clamp(0, 0xffff) as u16).to_be_bytes()
    }
}

impl Body {
    fn bytes(&self, source_port: u16) -> (Vec<u8>, u8) {
        match self {
            Self::Udp {
                port,
                payload,
                length_error,
            } => {
                let length = (payload.len() as i32 + 8 + length_error).clamp(0, 0xffff) as u16;
                let mut body = Vec::with_capacity(payload.len() + 8);
                for field in [source_port, *port, length, 0] {
                    body.extend(field.to_be_bytes());
                }
                body.extend(payload);
                (body, UDP)
            }
            Self::Tcp {
                port,
                flags,
                words,
                options,
                payload,
            } => {
                let words = words.unwrap_or(5 + (options.len() / 4) as u8);
                let mut body = Vec::new();
                body.extend(source_port.to_be_bytes());
                body.extend(port.to_be_bytes());
                body.extend(SEQUENCE.to_be_bytes());
                body.extend([0; 4]);
                body.extend([words << 4, *flags, 0xfa, 0, 0, 0, 0, 0]);
                body.extend(options);
                body.extend(payload);
                (body, TCP)
            }
            Self::Raw(bytes) => (bytes.clone(), 0),
        }
    }
}

/// Sequence number of every TCP segment: its successor carries into the upper half.
pub const SEQUENCE: u32 = 0x0001_ffff;

fn put_address(frame: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => frame.extend(v4.octets()),
        IpAddr::V6(v6) => frame.extend(v6.octets()),
    }
}

/// An extension header of `words` times eight bytes, filled with padding that hosts skip.
pub fn padding(words: u8) -> Vec<u8> {
    let mut rest = vec![words - 1, 1, words.saturating_mul(8).saturating_sub(4)];
    rest.resize(usize::from(words) * 8 - 1, 0);
    rest
}

/// A routing header of this type, one word long.
pub fn routing(kind: u8) -> Vec<u8> {
    vec![0, kind, 1, 0, 0, 0, 0]
}

/// A fragment header.
pub fn fragment(offset: u16, more: bool) -> Vec<u8> {
    let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
    vec![0, high, low, 0, 0, 0, 1]
}

/// A QUIC packet with a long header.
#[derive(Clone, Debug)]
pub struct Long {
    pub first: u8,
    pub version: u32,
    pub id: Vec<u8>,
    /// None: that of the ID.
    pub id_bytes: Option<u8>,
    pub source_id: Vec<u8>,
    pub source_id_bytes: Option<u8>,
    pub token: Vec<u8>,
    /// Bytes in which the token's length is written: 1, 2, 4, 8.
    pub varint: usize,
    /// What is written for the token's length; none: the right one.
    pub token_bytes: Option<u64>,
    /// Of the whole datagram; headers are cut, or followed by filling.
    pub datagram_bytes: usize,
}

impl Long {
    /// An Initial without a token, as a client's first packet is.
    pub fn initial(id: &[u8]) -> Self {
        Self {
            first: 0xc0,
            version: 1,
            id: id.to_vec(),
            id_bytes: None,
            source_id: vec![0x55; 5],
            source_id_bytes: None,
            token: Vec::new(),
            varint: 1,
            token_bytes: None,
            datagram_bytes: 1_200,
        }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Up to the token's end.
    pub fn header(&self) -> Vec<u8> {
        let mut bytes = vec![self.first];
        bytes.extend(self.version.to_be_bytes());
        bytes.push(self.id_bytes.unwrap_or(self.id.len() as u8));
        bytes.extend(&self.id);
        bytes.push(self.source_id_bytes.unwrap_or(self.source_id.len() as u8));
        bytes.extend(&self.source_id);
        let token_bytes = self.token_bytes.unwrap_or(self.token.len() as u64);
        bytes.extend(varint(token_bytes, self.varint));
        bytes.extend(&self.token);
        bytes
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.resize(self.datagram_bytes, 0xaa);
        bytes
    }
}

/// A QUIC packet with a short header.
pub fn short(id: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x40];
    bytes.extend(id);
    bytes.resize(bytes.len() + 24, 0xee);
    bytes
}

pub fn dial_request() -> Vec<u8> {
    let mut dial_request = vec![0x0d; 80];
    dial_request[2..6].copy_from_slice(b"dial");
    dial_request
}

/// A number in 1, 2, 4 or 8 bytes (RFC 9000, section 16); higher bits are cut off.
pub fn varint(value: u64, bytes: usize) -> Vec<u8> {
    let (prefix, kept) = match bytes {
        1 => (0, 0x3f),
        2 => (1, 0x3fff),
        4 => (2, 0x3fff_ffff),
        _ => (3, 0x3fff_ffff_ffff_ffff),
    };
    let word = prefix << (bytes * 8 - 2) | (value & kept);
    word.to_be_bytes()[8 - bytes..].to_vec()
}

/// Bytes as hexadecimal digits, to be pasted into a fixture.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    let pairs = digits.chunks_exact(2);
    assert!(pairs.remainder().is_empty(), "an odd number of digits");
    pairs
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}
