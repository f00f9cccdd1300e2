//! The program that chooses the socket of a reuseport group by connection ID, where the kernel
//! accepts it. Otherwise the group has the classic program of `shards`, which chooses alike.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use libbpf_rs::{MapCore as _, MapFlags, MapHandle, Object, ProgramHandle};

use crate::abi::EdgeSizes;
use crate::load::{LoadError, finish, handle_of, not_there, open, set_sizes, size_map};

const STEER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/steer.bpf.o"));

/// The steering of one reuseport group: a program and its table of sockets.
#[derive(Debug)]
pub struct Steering {
    object: Object,
    sockets: MapHandle,
}

impl Steering {
    /// Loads the program for a group of `shards` sockets.
    ///
    /// # Errors
    ///
    /// [`LoadError`] when the kernel refuses the map or the program.
    pub fn load(shards: u32) -> Result<Self, LoadError> {
        let mut object = open("steer", STEER)?;
        set_sizes(
            "steer",
            &mut object,
            &EdgeSizes {
                shards,
                ..EdgeSizes::default()
            },
        )?;
        size_map("steer", &mut object, "sockets", shards)?;
        let object = finish("steer", object)?;
        let sockets = handle_of(&object, "sockets").and_then(|found| found.ok_or_else(not_there));
        let sockets = sockets.map_err(|source| LoadError::Open {
            object: "steer",
            source,
        })?;
        Ok(Self { object, sockets })
    }

    /// A descriptor of the program, for `SO_ATTACH_REUSEPORT_EBPF` on a socket of the group.
    ///
    /// # Errors
    ///
    /// The kernel's error when no descriptor is left.
    pub fn program(&self) -> Result<ProgramHandle, libbpf_rs::Error> {
        let program = self.object.progs_mut().next().ok_or_else(not_there)?;
        ProgramHandle::try_from(&program)
    }

    /// Puts the socket of a shard into the table. The socket must be bound with `SO_REUSEPORT`.
    /// Closing it removes it.
    ///
    /// # Errors
    ///
    /// The kernel's error for the entry.
    pub fn set_socket(&self, shard: u32, socket: BorrowedFd<'_>) -> Result<(), libbpf_rs::Error> {
        let descriptor = u64::from(socket.as_raw_fd().cast_unsigned());
        self.sockets.update(
            &shard.to_ne_bytes(),
            &descriptor.to_ne_bytes(),
            MapFlags::ANY,
        )
    }
}
