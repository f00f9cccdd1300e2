//! Packets of all shapes, most of them nearly right: a packet with many faults ends at the first
//! check.

use millrace_edge_policy::cid::{HANDSHAKE_EPOCH_SHIFT, LocalCid, Place, ROAMING_EPOCH_SHIFT};
use millrace_edge_policy::model::{Cookie, Flow, Model};
use millrace_edge_policy::packet::Packet;
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::{proof, token};
use proptest::prelude::{Rng as _, RngExt as _};
use proptest::test_runner::{RngAlgorithm, TestRng};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::frames::{self, Body, Frame, Long};

/// Ports that sets declare, or not.
pub(crate) const PORTS: [u16; 5] = [4_100, 4_101, 8_080, 8_081, 9_000];

/// Registry peers that may be known.
pub(crate) const NODES: [u32; 3] = [0x0403_0201, 7, u32::MAX];

/// Frames that may come again.
const REMEMBERED: usize = 32;

pub(crate) struct Generator {
    rng: TestRng,
    remembered: Vec<Vec<u8>>,
}

impl Generator {
    pub(crate) fn new(seed: u64) -> Self {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..].copy_from_slice(&(!seed).to_le_bytes());
        Self {
            rng: TestRng::from_seed(RngAlgorithm::XorShift, &bytes),
            remembered: Vec::new(),
        }
    }

    /// May return this frame again: budgets are for replays too.
    pub(crate) fn remember(&mut self, frame: Vec<u8>) {
        if self.remembered.len() < REMEMBERED {
            self.remembered.push(frame);
        } else {
            let at = self.below(REMEMBERED as u64) as usize;
            self.remembered[at] = frame;
        }
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.rng.random_range(0..end)
    }

    pub(crate) fn word(&mut self) -> u64 {
        self.rng.random()
    }

    /// True once in so many times.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.rng.fill_bytes(&mut bytes);
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.rng.fill_bytes(&mut bytes);
        bytes
    }

    pub(crate) fn key(&mut self) -> Key {
        Key::from_bytes(self.array())
    }

    /// A step around a bound: mostly none.
    fn error(&mut self) -> i32 {
        match self.below(200) {
            0 => -1,
            1 => 1,
            2 => self.below(64) as i32 - 32,
            3 => -20_000,
            4 => 20_000,
            _ => 0,
        }
    }

    /// Few sources in few prefixes, so that they meet their limits; now and then any source.
    pub(crate) fn address(&mut self) -> IpAddr {
        let low = self.below(4) as u8;
        let next = self.below(3) as u8;
        match self.below(20) {
            0..=8 => IpAddr::V4(Ipv4Addr::new(10, 0, next, low)),
            9 => IpAddr::V4(Ipv4Addr::from_octets(self.array())),
            10 => IpAddr::V6(Ipv6Addr::from_octets(self.array())),
            11 if self.once_in(4) => IpAddr::V6(Ipv4Addr::new(10, 0, next, low).to_ipv6_mapped()),
            12 => IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, self.below(2) as u16, 1, 1)),
            _ => {
                let (wide, narrow) = (u16::from(next) << 7, u16::from(low & 1));
                IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, wide, 0, 0, 0, narrow))
            }
        }
    }

    pub(crate) fn source(&mut self) -> SocketAddr {
        SocketAddr::new(self.address(), 40_000 + self.below(4) as u16)
    }

    pub(crate) fn port(&mut self) -> u16 {
        match self.below(24) {
            0 => self.word() as u16,
            1 => self.one_of(&PORTS),
            2..=16 => PORTS[0],
            17..=20 => PORTS[1],
            _ => PORTS[4],
        }
    }

    /// What the kernel says to a SYN.
    pub(crate) fn cookie(&mut self) -> Cookie {
        match self.below(4) {
            0 => Cookie::None,
            1 => Cookie::Room,
            _ => Cookie::Given(self.word() as u32 | 1),
        }
    }

    /// A whole frame, of any shape.
    pub(crate) fn frame(&mut self, model: &Model, now_ns: u64) -> Vec<u8> {
        if !self.remembered.is_empty() && self.once_in(4) {
            return self.again();
        }
        let mut source = self.source();
        if self.once_in(120) {
            source.set_ip(self.martian(source.ip()));
        }
        let body = match self.below(60) {
            0..=43 => self.udp(model, source, now_ns),
            44..=57 => self.tcp(),
            58 => {
                let count = self.below(64) as usize;
                Body::Raw(self.bytes(count))
            }
            _ => return self.noise(),
        };
        let mut frame = Frame::new(source, body);
        if self.once_in(120) {
            frame.destination = Some(self.martian(source.ip()));
        }
        self.spoil_link(&mut frame);
        self.spoil_network(&mut frame);
        let mut bytes = frame.bytes();
        self.spoil_bytes(&mut bytes);
        bytes
    }

    /// The flow that a remembered frame answers; none if no frame is remembered.
    pub(crate) fn answered(&mut self) -> Option<Flow> {
        if self.remembered.is_empty() {
            return None;
        }
        let frame = self.again();
        let packet = Packet::parse(&frame).ok()?;
        Some(Flow::answered_by(&packet))
    }

    fn again(&mut self) -> Vec<u8> {
        let at = self.below(self.remembered.len() as u64) as usize;
        self.remembered[at].clone()
    }

    fn noise(&mut self) -> Vec<u8> {
        let count = 14 + self.below(100) as usize;
        let mut bytes = self.bytes(count);
        let ethertype = self.one_of(&[[8, 0], [0x86, 0xdd], [0x81, 0], [8, 6]]);
        bytes[12..14].copy_from_slice(&ethertype);
        bytes
    }

    /// An address of the family of `like`, at the bounds of martians, on either side.
    fn martian(&mut self, like: IpAddr) -> IpAddr {
        let text = match like {
            IpAddr::V4(_) => self.one_of(&[
                "0.0.0.0",
                "0.255.255.255",
                "1.0.0.0",
                "126.255.255.255",
                "127.0.0.1",
                "128.0.0.0",
                "223.255.255.255",
                "224.0.0.1",
                "239.255.255.255",
                "240.0.0.0",
                "255.255.255.254",
                "255.255.255.255",
                "192.0.2.1",
            ]),
            IpAddr::V6(_) => self.one_of(&[
                "::",
                "::1",
                "::2",
                "100::",
                "::100",
                "feff::1",
                "ff00::",
                "ff02::1",
                "2001:db8:ffff::1",
            ]),
        };
        text.parse().unwrap_or(like)
    }

    fn spoil_link(&mut self, frame: &mut Frame) {
        if self.once_in(200) {
            let end = self.below(2) as usize;
            frame.macs[end] = self.one_of(&[[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0xfe; 6]]);
        }
        let tags = match self.below(12) {
            0 => 1,
            1 => 2,
            2 => 3,
            _ => 0,
        };
        frame.tags = (0..tags).map(|_| self.one_of(&[0x8100, 0x88a8])).collect();
        if self.once_in(60) {
            frame.ethertype = Some(self.one_of(&[0x0800, 0x86dd, 0x0806, 0x9100, 0x8100, 0]));
        }
        if self.once_in(8) {
            frame.trailer = self.below(48) as usize;
        }
    }

    fn spoil_network(&mut self, frame: &mut Frame) {
        frame.length_error = self.error();
        if self.once_in(80) {
            frame.first = Some(self.word() as u8);
        }
        if self.once_in(100) {
            frame.protocol = Some(self.one_of(&[
                frames::UDP,
                frames::TCP,
                frames::ICMP,
                frames::HOP_BY_HOP,
                frames::ROUTING,
                frames::FRAGMENT,
                frames::DESTINATION,
                50,
                58,
                59,
            ]));
        }
        if self.once_in(60) {
            let words = self.below(11) as usize;
            frame.options = self.bytes(4 * words);
        }
        if self.once_in(60) {
            let offset = self.one_of(&[0, 0, 1, 185, 0x1fff]);
            frame.fragment = self.one_of(&[0, frames::MORE, frames::WHOLE, 0x8000]) | offset;
        }
        if self.once_in(10) {
            let count = self.one_of(&[1, 1, 1, 2, 3, 5, 6, 7, 8]);
            frame.extensions = (0..count).map(|_| self.extension()).collect();
        }
    }

    fn extension(&mut self) -> (u8, Vec<u8>) {
        let kind = self.one_of(&[
            frames::HOP_BY_HOP,
            frames::DESTINATION,
            frames::DESTINATION,
            frames::ROUTING,
            frames::FRAGMENT,
        ]);
        let mut rest = match kind {
            frames::ROUTING => frames::routing(self.one_of(&[0, 2, 2, 4])),
            frames::FRAGMENT => {
                let more = self.once_in(2);
                frames::fragment(self.one_of(&[0, 0, 0, 1, 0x1fff]), more)
            }
            _ => {
                let words = self.one_of(&[1, 1, 1, 2, 3, 25, 42, 127, 128, 129, 255]);
                frames::padding(words)
            }
        };
        if self.once_in(20) {
            rest[0] = self.word() as u8;
        }
        (kind, rest)
    }

    /// Cuts, flips, or both, or mostly nothing.
    fn spoil_bytes(&mut self, bytes: &mut Vec<u8>) {
        if self.once_in(24) {
            // Headers are near the front.
            let end = if self.once_in(2) { bytes.len() } else { 140 };
            let kept = 14 + self.below(end as u64) as usize;
            bytes.truncate(kept);
        }
        if self.once_in(16) {
            for _ in 0..=self.below(3) {
                let end = bytes.len().min(140) as u64;
                let at = self.below(end) as usize;
                bytes[at] ^= 1 << self.below(8);
            }
        }
    }

    fn udp(&mut self, model: &Model, source: SocketAddr, now_ns: u64) -> Body {
        let port = self.port();
        let mut payload = if port != PORTS[4] || self.once_in(4) {
            self.quic(model, source, now_ns)
        } else {
            let count = self.below(40) as usize;
            self.bytes(count)
        };
        // Cut short with right lengths: only the QUIC reader meets the end.
        if self.once_in(12) {
            let end = self.one_of(&[payload.len(), 80]) as u64;
            payload.truncate(self.below(end + 1) as usize);
        }
        Body::Udp {
            port,
            payload,
            length_error: self.error(),
        }
    }

    fn tcp(&mut self) -> Body {
        use frames::{ACK, FIN, PSH, RST, SYN};
        let flags = match self.below(8) {
            0 => self.word() as u8,
            1..=4 => SYN,
            _ => self.one_of(&[
                ACK,
                ACK | PSH,
                SYN | ACK,
                FIN | ACK,
                RST,
                RST | ACK,
                FIN,
                0,
                SYN | FIN,
                SYN | RST,
            ]),
        };
        let words = self.one_of(&[0, 0, 0, 1, 5, 10]);
        let options = vec![1; 4 * words];
        let count = self.one_of(&[0, 0, 0, 1, 100]);
        Body::Tcp {
            port: self.one_of(&[PORTS[2], PORTS[2], PORTS[3], PORTS[0], 22]),
            flags,
            words: self.once_in(20).then(|| self.word() as u8 & 0x0f),
            options,
            payload: self.bytes(count),
        }
    }

    fn quic(&mut self, model: &Model, source: SocketAddr, now_ns: u64) -> Vec<u8> {
        match self.below(24) {
            0 => {
                let mut dial_request = frames::dial_request();
                if self.once_in(3) {
                    let at = self.below(6) as usize;
                    dial_request[at] ^= 1;
                }
                if self.once_in(3) {
                    dial_request.resize(self.one_of(&[1, 2, 5, 6, 7, 79, 81]), 0);
                }
                dial_request
            }
            1..=6 => {
                let mut packet = frames::short(&self.own_id(model, source, now_ns));
                packet[0] = self.one_of(&[0x40, 0x40, 0x40, 0x5d, 0x7f, 0x00, 0x0c]);
                packet
            }
            _ => self.long(model, source, now_ns),
        }
    }

    fn long(&mut self, model: &Model, source: SocketAddr, now_ns: u64) -> Vec<u8> {
        let mut long = Long::initial(&[]);
        match self.below(10) {
            0 | 1 => long.id = self.own_id(model, source, now_ns),
            2 | 3 => long.id = self.proof(model, source, now_ns),
            4 | 5 => self.put_token(&mut long, model, source, now_ns),
            _ => {
                let count = self.one_of(&[0, 1, 7, 8, 8, 9, 15, 16, 17, 19, 20]);
                long.id = self.bytes(count);
            }
        }
        if self.once_in(4) {
            let count = self.below(21) as usize;
            long.source_id = self.bytes(count);
        }
        if self.once_in(40) {
            long.id_bytes = Some(self.one_of(&[0, 8, 16, 20, 21, 255]));
        }
        if self.once_in(40) {
            long.source_id_bytes = Some(self.one_of(&[0, 8, 20, 21, 255]));
        }
        if self.once_in(5) {
            long.first = 0x80 | self.word() as u8;
        }
        if self.once_in(8) {
            long.version = self.one_of(&[0, 2, 0x6b33_43cf, 0xff00_001d, 0x0a1a_2a3a, 0x0100_0000]);
        }
        if self.once_in(10) {
            let count = self.one_of(&[1, 31, 32, 33, 63]);
            long.token = self.bytes(count);
        }
        long.varint = self.one_of(&[1, 1, 1, 2, 4, 8]);
        if self.once_in(30) {
            let huge = [63, 64, 16_384, 1 << 30, u64::MAX];
            long.token_bytes = Some(self.one_of(&huge));
        }
        let header = long.header().len();
        long.datagram_bytes = match self.below(24) {
            0 => 1_199,
            1 => header,
            2 => header - 1,
            3 => header + 1,
            4 => 1_201,
            5 => 1_452,
            6 => self.below(1_300) as usize,
            _ => 1_200,
        };
        if self.once_in(50) {
            // The token ends where the datagram does, or just behind it.
            long.varint = 8;
            let left = 1_200 - (header - 1 + 7 - long.token.len()) as u64;
            long.token_bytes = Some(left + self.below(2));
        }
        long.bytes()
    }

    /// An ID of this node: valid, of another address, expired, of the future, forged; or of another
    /// length.
    fn own_id(&mut self, model: &Model, source: SocketAddr, now_ns: u64) -> Vec<u8> {
        let place = Place {
            shard: self.below(4) as u8,
            generation: self.word() as u8,
            // Few, so that IDs meet their budget.
            slot: self.below(2) as u32,
        };
        let nonce = self.below(2) as u16;
        let mut keys = model.keys;
        keys.active = self.below(4) as u8;
        let holder = if self.once_in(8) {
            self.source()
        } else {
            source
        };
        let mut id = if self.once_in(2) {
            let issued_ns = self.around(now_ns, HANDSHAKE_EPOCH_SHIFT);
            LocalCid::issue_handshake(place, nonce, holder, &keys, issued_ns).to_vec()
        } else {
            let issued_ns = self.around(now_ns, ROAMING_EPOCH_SHIFT);
            LocalCid::issue_roaming(place, nonce, &keys, issued_ns).to_vec()
        };
        if self.once_in(10) {
            let at = self.below(16) as usize;
            id[at] ^= 1 << self.below(8);
        }
        if self.once_in(20) {
            id.resize(self.one_of(&[0, 8, 15, 17, 20]), 0x55);
        }
        id
    }

    /// A time that is mostly in this epoch, else in one nearby, or in one with the same low bits.
    fn around(&mut self, now_ns: u64, shift: u32) -> u64 {
        let epochs = self.one_of(&[0, 0, 0, 0, 0, 1, 1, 2, 3, 31, 32, 33, 64, 255, 256, 257]);
        let step = epochs << shift;
        if self.once_in(8) {
            now_ns.wrapping_add(step)
        } else {
            now_ns.wrapping_sub(step)
        }
    }

    fn proof(&mut self, model: &Model, source: SocketAddr, now_ns: u64) -> Vec<u8> {
        let node = self.one_of(&NODES);
        let non_member = self.key();
        let key = model.peers.get(&node).copied().unwrap_or(non_member);
        // Few, so that proofs are repeated.
        let nonce = [self.below(3) as u8; 6];
        let wall_ns = now_ns.wrapping_add(model.wall_offset_ns);
        let made_ns = self.around(wall_ns, proof::EPOCH_SHIFT);
        let holder = if self.once_in(8) {
            self.address()
        } else {
            source.ip()
        };
        let mut id = proof::make(1, node, nonce, holder, made_ns, key).to_vec();
        if self.once_in(8) {
            let at = self.below(20) as usize;
            id[at] ^= 1 << self.below(8);
        }
        id
    }

    /// A token, and the destination ID that goes with it.
    fn put_token(&mut self, long: &mut Long, model: &Model, source: SocketAddr, now_ns: u64) {
        let count = self.one_of(&[8, 8, 9, 15, 16, 17, 20]);
        let original = self.bytes(count);
        let mut keys = model.keys;
        if self.once_in(4) {
            keys.active = self.below(4) as u8;
        }
        let holder = if self.once_in(8) {
            self.source()
        } else {
            source
        };
        let minted_ns = self.around(now_ns, HANDSHAKE_EPOCH_SHIFT);
        let Some(minted) = token::mint(&original, holder, &keys, minted_ns) else {
            return;
        };
        long.token = minted.token.to_vec();
        long.id = minted.retry_id.to_vec();
        match self.below(30) {
            0 => long.id = original,
            1 => long.id[0] ^= 1,
            2 => long.id.resize(self.one_of(&[8, 15, 17, 20]), 0),
            3 => long.token[0] ^= 1,
            4 => long.token[2] = self.one_of(&[0, 7, 21, 255]),
            5 => long.token[22] ^= 1,
            6 => long.token[23] ^= 1,
            7 => {
                let at = self.below(32) as usize;
                long.token[at] ^= 1 << self.below(8);
            }
            8 => long.token.resize(self.one_of(&[31, 33]), 0),
            _ => {}
        }
    }
}
