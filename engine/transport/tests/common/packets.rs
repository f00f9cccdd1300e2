//! 1-RTT packets made by hand: as many STREAM frames in one as fit, in any order. quiche writes one
//! frame in a packet, in order.
//!
//! The keys are those of a connection that quiche has established (RFC 9001, 5). It must not send
//! anything after the first packet that is made here: its numbers are used up.
#![allow(dead_code, clippy::unwrap_used)]

use ring::aead::quic::{self, HeaderProtectionKey};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk};

use super::raw::Raw;

/// Payload of a packet: together with header, number and tag less than 1,452 bytes.
const PAYLOAD_BYTES_MAX: usize = 1_380;
/// Far above what quiche used in the handshake.
const FIRST_NUMBER: u32 = 1_000_000;
/// Sample for header protection (RFC 9001, 5.4.2): behind the longest packet number.
const SAMPLE_BYTES: usize = 16;
const SHA256_BYTES: usize = 32;
/// Short header, and a packet number of four bytes (RFC 9000, 17.3.1).
const FIRST_BYTE: u8 = 0x43;
/// A STREAM frame with offset and length (RFC 9000, 19.8).
const STREAM_FRAME: u8 = 0x0e;
/// Its type, stream, offset and length.
const STREAM_HEADER_BYTES_MAX: usize = 1 + 3 * 4;

pub(crate) struct Sealer {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    header_key: HeaderProtectionKey,
    peer_id: Vec<u8>,
    next: u32,
}

/// How many bytes HKDF is to give.
struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

fn bytes_of_hex(text: &str) -> Vec<u8> {
    let places = (0..text.len()).step_by(2);
    let bytes = places.map(|at| u8::from_str_radix(&text[at..at + 2], 16));
    bytes.map(Result::unwrap).collect()
}

/// HKDF-Expand-Label without a context (RFC 8446, 7.1).
fn expand<const N: usize>(secret: &Prk, label: &str) -> [u8; N] {
    let label = format!("tls13 {label}");
    let mut info = (N as u16).to_be_bytes().to_vec();
    info.push(label.len() as u8);
    info.extend(label.as_bytes());
    info.push(0);
    let mut bytes = [0; N];
    let info = [&info[..]];
    let expanded = secret.expand(&info, Length(N)).unwrap();
    expanded.fill(&mut bytes).unwrap();
    bytes
}

impl Sealer {
    /// For the client's side of an established connection.
    pub(crate) fn of(raw: &Raw) -> Self {
        let lines = raw.secrets.lines();
        let mut found = lines.lines().filter_map(|line| {
            let words = line.strip_prefix("CLIENT_TRAFFIC_SECRET_0 ")?;
            words.split(' ').nth(1)
        });
        let secret = found.next().expect("the secret of a connection that is up");
        let secret = bytes_of_hex(secret);
        // BoringSSL takes AES-128-GCM where the processor has AES.
        assert_eq!(secret.len(), SHA256_BYTES);
        let secret = Prk::new_less_safe(HKDF_SHA256, &secret);
        let key: [u8; 16] = expand(&secret, "quic key");
        let header_key: [u8; 16] = expand(&secret, "quic hp");
        Self {
            key: LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key).unwrap()),
            iv: expand(&secret, "quic iv"),
            header_key: HeaderProtectionKey::new(&quic::AES_128, &header_key).unwrap(),
            peer_id: raw.quic.destination_id().to_vec(),
            next: FIRST_NUMBER,
        }
    }

    fn seal(&mut self, mut payload: Vec<u8>) -> Vec<u8> {
        let number = self.next;
        self.next += 1;
        let mut nonce = self.iv;
        for (byte, of_number) in nonce[8..].iter_mut().zip(number.to_be_bytes()) {
            *byte ^= of_number;
        }
        let number = number.to_be_bytes();
        let mut packet = [&[FIRST_BYTE][..], &self.peer_id, &number].concat();
        let nonce = Nonce::assume_unique_for_key(nonce);
        let sealed = self
            .key
            .seal_in_place_append_tag(nonce, Aad::from(&packet), &mut payload);
        sealed.unwrap();
        let mask = self.header_key.new_mask(&payload[..SAMPLE_BYTES]).unwrap();
        packet[0] ^= mask[0] & 0x1f;
        let at = packet.len() - number.len();
        for (byte, of_mask) in packet[at..].iter_mut().zip(&mask[1..]) {
            *byte ^= of_mask;
        }
        packet.extend(payload);
        packet
    }
}

/// Pieces of many streams, each stream's from its second byte on: the first one never comes, so
/// none can be read.
pub(crate) struct Fragments {
    sealer: Sealer,
    streams: u64,
    /// Of each piece.
    bytes: usize,
    in_a_packet: usize,
    stream: u64,
    offset: u64,
    /// Of all pieces.
    pub(crate) sent_bytes: u64,
}

impl Fragments {
    /// `in_a_packet`: pieces at most.
    pub(crate) fn new(raw: &Raw, streams: u64, bytes: usize, in_a_packet: usize) -> Self {
        Self {
            sealer: Sealer::of(raw),
            streams,
            bytes,
            in_a_packet,
            stream: 0,
            offset: 1,
            sent_bytes: 0,
        }
    }

    /// The next ones.
    pub(crate) fn packet(&mut self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(PAYLOAD_BYTES_MAX + SAMPLE_BYTES);
        let bytes_max = PAYLOAD_BYTES_MAX - STREAM_HEADER_BYTES_MAX - self.bytes;
        for _ in 0..self.in_a_packet {
            if payload.len() > bytes_max {
                break;
            }
            payload.push(STREAM_FRAME);
            push_integer(&mut payload, Raw::stream(self.stream));
            push_integer(&mut payload, self.offset);
            push_integer(&mut payload, self.bytes as u64);
            payload.resize(payload.len() + self.bytes, 7);
            self.sent_bytes += self.bytes as u64;
            self.stream += 1;
            if self.stream == self.streams {
                self.stream = 0;
                self.offset += self.bytes as u64;
            }
        }
        self.sealer.seal(payload)
    }
}

/// A variable-length integer of up to four bytes (RFC 9000, 16).
fn push_integer(bytes: &mut Vec<u8>, value: u64) {
    match value {
        0..=0x3f => bytes.push(value as u8),
        0x40..=0x3fff => bytes.extend((value as u16 | 0x4000).to_be_bytes()),
        _ => bytes.extend((value as u32 | 0x8000_0000).to_be_bytes()),
    }
}
