//! The programs at the ends of the veth where the edge is not: pass all, drop all, and the
//! attacker's end.

use std::mem::MaybeUninit;

use ipnet::Ipv4Net;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, OpenObject, ProgramMut};

use crate::Result;

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
    include!(concat!(env!("OUT_DIR"), "/receiver.skel.rs"));
}

use skeleton::{ReceiverSkel, ReceiverSkelBuilder};

/// The programs, loaded.
pub(crate) struct Receiver<'o> {
    skeleton: ReceiverSkel<'o>,
}

/// The counters of the programs; the order is that of `enum count` in `receiver.bpf.c`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) dropped: u64,
    /// Retries that came back to the attacker.
    pub(crate) retries: u64,
    /// All other packets that came back to the attacker's made-up addresses.
    pub(crate) answers: u64,
}

impl<'o> Receiver<'o> {
    /// `clients` are the honest clients' addresses at the attacker's end.
    pub(crate) fn load(object: &'o mut MaybeUninit<OpenObject>, clients: Ipv4Net) -> Result<Self> {
        let mut open = ReceiverSkelBuilder::default().open(object)?;
        let constants = open.maps.rodata_data.as_deref_mut().ok_or("no constants")?;
        constants.client_address = u32::from_ne_bytes(clients.network().octets());
        constants.client_mask = u32::from_ne_bytes(clients.netmask().octets());
        Ok(Self {
            skeleton: open.load()?,
        })
    }

    pub(crate) fn pass_all(&self) -> &ProgramMut<'o> {
        &self.skeleton.progs.pass_all
    }

    pub(crate) fn drop_all(&self) -> &ProgramMut<'o> {
        &self.skeleton.progs.drop_all
    }

    /// Drops at once; for test runs.
    pub(crate) fn nothing(&self) -> &ProgramMut<'o> {
        &self.skeleton.progs.nothing
    }

    /// Cuts the frame to the length of a Retry; for test runs.
    pub(crate) fn shorten(&self) -> &ProgramMut<'o> {
        &self.skeleton.progs.shorten
    }

    pub(crate) fn attacker(&self) -> &ProgramMut<'o> {
        &self.skeleton.progs.attacker
    }

    pub(crate) fn counts(&self) -> Result<Counts> {
        let sum = |what: u32| -> Result<u64> {
            let words = self
                .skeleton
                .maps
                .counts
                .lookup_percpu(&what.to_ne_bytes(), MapFlags::ANY)?
                .ok_or("no such counter")?;
            let mut sum = 0;
            for word in words {
                let word = word.first_chunk().ok_or("a counter is short")?;
                sum += u64::from_ne_bytes(*word);
            }
            Ok(sum)
        };
        Ok(Counts {
            passed: sum(0)?,
            dropped: sum(1)?,
            retries: sum(2)?,
            answers: sum(3)?,
        })
    }
}

impl std::fmt::Debug for Receiver<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").finish_non_exhaustive()
    }
}
