//! A flood of first packets, QUIC Initials and SYNs by halves, from made-up sources all over IPv4.

use std::fmt::{self, Debug};
use std::net::Ipv4Addr;

use etherparse::PacketBuilder;
use libbpf_rs::{Link, Map, MapCore as _, MapFlags, Object, ObjectBuilder, ProgramInput};
use millrace_edge::interface::index_of;

use super::{NODE, Pair, REMOTE};

const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/flood.bpf.o"));
/// `BPF_F_TEST_XDP_LIVE_FRAMES`: the kernel carries out the program's verdict, instead of returning
/// it.
const LIVE_FRAMES: u32 = 1 << 1;
/// What the program writes anew in each packet.
const HEADER: usize = 64;
const IP: usize = 14;
const TRANSPORT: usize = 34;
const INITIAL_BYTES: usize = 1_200;
const NODE_MAC: [u8; 6] = [2, 0x77, 0, 0, 0, 1];
const WORLD_MAC: [u8; 6] = [2, 0x77, 0, 0, 0, 2];
/// Any seed but zero.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// The remote end of a pair's wire: a native XDP program, without which the node's transmitted
/// answers do not arrive, and a generator.
pub struct FarEnd {
    object: Object,
    /// What packets are cut from.
    template: Vec<u8>,
    _link: Link,
}

impl FarEnd {
    /// For floods of QUIC and TCP to these ports.
    pub fn attach(pair: &Pair, quic_port: u16, tcp_port: u16) -> Self {
        pair.node
            .ip(&format!("link set mr0 address {}", mac(NODE_MAC)));
        pair.remote
            .ip(&format!("link set mr1 address {}", mac(WORLD_MAC)));
        let (initial, syn) = (initial(quic_port), syn(tcp_port));
        pair.remote.enter(|| {
            let interface = index_of("mr1").unwrap();
            let mut setup = Vec::new();
            // The generator takes its shape by the top bit of a random number.
            for (frame, tcp) in [(&initial, false), (&syn, true)] {
                setup.extend(&frame[..HEADER]);
                setup.extend(sum(&frame[IP..TRANSPORT]).to_ne_bytes());
                let tcp_sum = if tcp { tcp_sum(frame) } else { 0 };
                setup.extend(tcp_sum.to_ne_bytes());
                setup.extend((frame.len() as u32).to_ne_bytes());
            }
            setup.extend(interface.to_ne_bytes());
            setup.extend(REMOTE.parse::<Ipv4Addr>().unwrap().octets());
            let object = load(&setup);
            let program = object
                .progs_mut()
                .find(|program| program.name() == "far_end");
            let link = program
                .unwrap()
                .attach_xdp(interface.cast_signed())
                .unwrap();
            Self {
                object,
                template: [initial.as_slice(), &[0]].concat(),
                _link: link,
            }
        })
    }

    /// Sends so many packets, as fast as possible, from the calling thread and its CPU; the thread
    /// must be in the remote namespace.
    pub fn send(&self, packets: u32) {
        let program = self
            .object
            .progs_mut()
            .find(|program| program.name() == "generate");
        let input = ProgramInput {
            data_in: Some(&self.template),
            flags: LIVE_FRAMES,
            repeat: packets,
            ..ProgramInput::default()
        };
        program.unwrap().test_run(input).unwrap();
    }

    /// Packets that were sent.
    pub fn sent(&self) -> u64 {
        self.state()[1]
    }

    /// Answers to sources that were made up.
    pub fn answers(&self) -> u64 {
        self.state()[2]
    }

    /// Random, sent, answers.
    fn state(&self) -> [u64; 3] {
        let is_state = |map: &Map<'_>| map.name().to_string_lossy().ends_with(".bss");
        let map = self.object.maps().find(is_state).unwrap();
        let state = map.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY);
        let state = state.unwrap().unwrap();
        let word = |at: usize| u64::from_ne_bytes(state[at * 8..][..8].try_into().unwrap());
        [0, 1, 2].map(word)
    }
}

impl Debug for FarEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FarEnd")
            .field("sent", &self.sent())
            .finish_non_exhaustive()
    }
}

fn load(setup: &[u8]) -> Object {
    let mut open = ObjectBuilder::default().open_memory(OBJECT).unwrap();
    for mut map in open.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if name.ends_with(".rodata") {
            map.set_initial_value(setup).unwrap();
        } else if name.ends_with(".bss") {
            let state = map.initial_value_mut().unwrap();
            state[..8].copy_from_slice(&SEED.to_ne_bytes());
        }
    }
    open.load().unwrap()
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

fn ip() -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    let node: Ipv4Addr = NODE.parse().unwrap();
    PacketBuilder::ethernet2(WORLD_MAC, NODE_MAC).ipv4([0; 4], node.octets(), 64)
}

/// A client's first packet: version 1, an ID of 8 bytes, no source ID, no token. The program reads
/// only what is in [`HEADER`].
fn initial(port: u16) -> Vec<u8> {
    let mut payload = vec![0xc3, 0, 0, 0, 1];
    payload.extend([8; 9]);
    payload.extend([0; 2]);
    payload.resize(INITIAL_BYTES, 0x5a);
    let mut frame = Vec::new();
    ip().udp(0, port).write(&mut frame, &payload).unwrap();
    frame[IP + 10..IP + 12].fill(0);
    frame[TRANSPORT + 6..TRANSPORT + 8].fill(0);
    frame
}

fn syn(port: u16) -> Vec<u8> {
    let mut frame = Vec::new();
    let tcp = ip().tcp(0, port, 1, 64_240).syn();
    tcp.write(&mut frame, &[]).unwrap();
    frame[IP + 10..IP + 12].fill(0);
    frame[TRANSPORT + 16..TRANSPORT + 18].fill(0);
    frame.resize(HEADER, 0);
    frame
}

fn tcp_sum(frame: &[u8]) -> u32 {
    const TCP: usize = 20;
    let mut summed = NODE.parse::<Ipv4Addr>().unwrap().octets().to_vec();
    summed.extend([0, 6, 0, TCP as u8]);
    summed.extend(&frame[TRANSPORT..TRANSPORT + TCP]);
    sum(&summed)
}

/// One's complement sum, in the order of memory.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks_exact(2);
    let words = words.map(|word| u32::from(u16::from_ne_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    (sum & 0xffff) + (sum >> 16)
}
