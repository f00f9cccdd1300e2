//! Hostile traffic from one core: a BPF program, run over live frames, writes every packet anew and
//! sends it into the veth.
//!
//! The kernel runs the filter of the other end on the same core before the call returns. So the
//! cost of a call is the cost of its packets, generator included.

use std::mem::MaybeUninit;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, OpenObject, ProgramInput};
use serde::Serialize;

use crate::Result;
use crate::frames::Shape;

#[allow(
    unsafe_code,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::wildcard_imports,
    clippy::use_self,
    clippy::semicolon_if_nothing_returned,
    clippy::or_fun_call,
    clippy::manual_let_else,
    clippy::unwrap_used,
    clippy::mem_forget,
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    elided_lifetimes_in_paths,
    missing_debug_implementations,
    reason = "generated"
)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/generator.skel.rs"));
}

use skeleton::{GeneratorSkel, GeneratorSkelBuilder};

/// `BPF_F_TEST_XDP_LIVE_FRAMES`: the kernel carries out the program's verdict, instead of returning
/// it.
const LIVE_FRAMES: u32 = 1 << 1;
const NANOSECONDS: u32 = 1_000_000_000;
/// First of the made-up sources.
const SOURCE_BASE: u32 = 0x1000_0000;

/// The number of addresses that send the packets of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub(crate) struct Sources(u64);

impl Sources {
    pub(crate) const ONE: Self = Self(1);
    pub(crate) const SIXTEEN_THOUSAND: Self = Self(1 << 14);
    pub(crate) const MILLION: Self = Self(1 << 20);
    /// Any unicast address.
    pub(crate) const ALL: Self = Self(1 << 32);

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::ONE => "1",
            Self::SIXTEEN_THOUSAND => "16 k",
            Self::MILLION => "1 M",
            _ => "2^32",
        }
    }

    fn base(self) -> u32 {
        if self == Self::ALL { 0 } else { SOURCE_BASE }
    }

    fn mask(self) -> u32 {
        u32::try_from(self.0 - 1).unwrap_or(u32::MAX)
    }

    /// Whether these sources fill the reference's set of rates before a measurement begins, so that
    /// it limits no later source.
    pub(crate) fn fill_reference(self) -> bool {
        self >= Self::MILLION
    }

    /// The number of sources.
    ///
    /// # Errors
    ///
    /// For [`Sources::ALL`]: no filter keeps state for each of so many.
    pub(crate) fn count(self) -> Result<u32> {
        Ok(u32::try_from(self.0)?)
    }

    /// Every address, in host order; for [`Sources::ALL`] that is too many to walk.
    pub(crate) fn addresses(self) -> impl Iterator<Item = u32> {
        (0..=self.mask()).map(move |offset| self.base().wrapping_add(offset))
    }
}

/// What a generator sends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traffic {
    pub(crate) shape: Shape,
    pub(crate) sources: Sources,
    /// Index of the attacker's end of the veth; 0 for test runs alone.
    pub(crate) interface: u32,
    /// The rate; none: at full speed.
    pub(crate) packets_per_second: Option<NonZeroU32>,
    /// The receiver sends frames back with another length: each must get its own again, which costs
    /// a little.
    pub(crate) is_answered: bool,
}

/// A loaded generator for one shape and one range of sources.
pub(crate) struct Generator<'o> {
    skeleton: GeneratorSkel<'o>,
    frame: Vec<u8>,
}

impl<'o> Generator<'o> {
    /// Loads one for `traffic`.
    pub(crate) fn load(object: &'o mut MaybeUninit<OpenObject>, traffic: Traffic) -> Result<Self> {
        let Traffic {
            shape,
            sources,
            interface,
            packets_per_second,
            is_answered,
        } = traffic;
        let mut template = shape.template()?;
        let mut open = GeneratorSkelBuilder::default().open(object)?;
        let constants = open.maps.rodata_data.as_deref_mut().ok_or("no constants")?;
        constants.header[..template.written].copy_from_slice(&template.bytes[..template.written]);
        constants.frame_bytes = u32::try_from(template.bytes.len())?;
        constants.written = u32::try_from(template.written)?;
        constants.source_base = sources.base();
        constants.port_at = u32::try_from(template.port_at)?;
        constants.source_mask = sources.mask();
        constants.ip_sum = template.ip_sum;
        constants.tcp_sum = template.tcp_sum;
        constants.random_at = u32::try_from(template.random_at)?;
        constants.interface = interface;
        constants.interval_ns = packets_per_second.map_or(0, |rate| NANOSECONDS / rate);
        if is_answered {
            constants.spare_bytes = 1;
            template.bytes.push(0);
        }
        let state = open.maps.bss_data.as_deref_mut().ok_or("no state")?;
        // Any seed but zero. It is fixed, so that rows are alike from run to run.
        state.state.random = 0x9e37_79b9_7f4a_7c15;
        Ok(Self {
            skeleton: open.load()?,
            frame: template.bytes,
        })
    }

    /// Sends `packets` from the calling thread, which must be in the attacker's namespace.
    pub(crate) fn send(&self, packets: u32) -> Result<()> {
        self.skeleton.progs.generate.test_run(ProgramInput {
            data_in: Some(&self.frame),
            flags: LIVE_FRAMES,
            repeat: packets,
            ..ProgramInput::default()
        })?;
        Ok(())
    }

    /// Number of packets that were handed to the veth.
    pub(crate) fn sent(&self) -> Result<u64> {
        let [_random, sent, ..] = self.state()?;
        Ok(sent)
    }

    /// Packets per second that a paced generator achieved, from the first packet to the last.
    #[cfg(feature = "goodput")]
    pub(crate) fn rate(&self) -> Result<f64> {
        let [_random, sent, next_ns, first_ns] = self.state()?;
        Ok(sent as f64 * f64::from(NANOSECONDS) / (next_ns - first_ns) as f64)
    }

    fn state(&self) -> Result<[u64; 4]> {
        let zero = 0u32.to_ne_bytes();
        let state = self
            .skeleton
            .maps
            .bss
            .lookup(&zero, MapFlags::ANY)?
            .unwrap_or_default();
        let mut words = state.chunks_exact(8).map(|word| word.iter().rev());
        let mut word = || {
            words
                .next()
                .map(|bytes| bytes.fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
        };
        let mut state = [0; 4];
        for place in &mut state {
            *place = word().ok_or("the generator's state is short")?;
        }
        Ok(state)
    }

    /// Mean cost of a packet when `program` runs over `packets` generated ones, with the loop and
    /// the rewriting.
    pub(crate) fn cost(&self, program: &impl AsFd, packets: u32) -> Result<Duration> {
        let descriptor = program.as_fd().as_raw_fd().to_ne_bytes();
        self.skeleton
            .maps
            .next
            .update(&0u32.to_ne_bytes(), &descriptor, MapFlags::ANY)?;
        let mut frame_out = vec![0; self.frame.len() + 256];
        let output = self.skeleton.progs.repeat.test_run(ProgramInput {
            data_in: Some(&self.frame),
            data_out: Some(&mut frame_out),
            repeat: packets,
            ..ProgramInput::default()
        })?;
        Ok(output.duration)
    }
}

impl std::fmt::Debug for Generator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator")
            .field("frame_bytes", &self.frame.len())
            .finish_non_exhaustive()
    }
}
