//! Calls of BPF that libbpf-rs does not offer, on descriptors instead of objects.
//!
//! Invariant: no function here keeps a pointer past its call. It borrows every descriptor for the
//! call, or the result owns it.
#![allow(unsafe_code, reason = "calls libbpf")]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use libbpf_rs::libbpf_sys;

/// The place where a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    /// XDP, in the driver or in the kernel's generic code.
    Xdp {
        /// `XDP_FLAGS_*`; 0 takes the driver's mode where there is one.
        flags: u32,
    },
    /// tcx, before the stack gets the packet.
    TcxIngress,
    /// tcx, behind the stack.
    TcxEgress,
    /// The tracepoint that the program was loaded for; no interface.
    Tracepoint,
    /// The objects that the program was loaded to walk over; no interface. See [`walk`].
    Iterator,
}

/// Flag of [`Hook::Xdp`]: in the driver, or not at all.
pub(crate) const NATIVE: u32 = libbpf_sys::XDP_FLAGS_DRV_MODE;
/// Flag of [`Hook::Xdp`]: in the kernel's generic code.
pub(crate) const GENERIC: u32 = libbpf_sys::XDP_FLAGS_SKB_MODE;

/// Attaches a program to an interface of the calling thread's network namespace.
///
/// # Errors
///
/// The kernel's error.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    ifindex: u32,
    hook: Hook,
) -> io::Result<OwnedFd> {
    let mut options = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    let attach_type = match hook {
        Hook::Xdp { flags } => {
            options.flags = flags;
            libbpf_sys::BPF_XDP
        }
        Hook::TcxIngress => libbpf_sys::BPF_TCX_INGRESS,
        Hook::TcxEgress => libbpf_sys::BPF_TCX_EGRESS,
        Hook::Tracepoint => libbpf_sys::BPF_TRACE_RAW_TP,
        Hook::Iterator => libbpf_sys::BPF_TRACE_ITER,
    };
    // SAFETY: the options live through the call and state their own size.
    let fd = unsafe {
        libbpf_sys::bpf_link_create(
            program.as_raw_fd(),
            ifindex.cast_signed(),
            attach_type,
            &raw const options,
        )
    };
    let fd = checked(fd)?;
    // SAFETY: a fresh descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Replaces the program of a link: every packet meets the old one or the new one.
///
/// # Errors
///
/// The kernel's error. The old program stays.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both descriptors are open; no options is allowed.
    let code = unsafe {
        libbpf_sys::bpf_link_update(link.as_raw_fd(), program.as_raw_fd(), std::ptr::null())
    };
    checked(code).map(drop)
}

/// Detaches what a link attached, however many descriptors hold the link.
///
/// # Errors
///
/// The kernel's error.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    checked(unsafe { libbpf_sys::bpf_link_detach(link.as_raw_fd()) }).map(drop)
}

/// Runs an iterator program that prints nothing over all its objects.
///
/// # Errors
///
/// The kernel's error. The program may have run over some objects.
pub(crate) fn walk(program: BorrowedFd<'_>) -> io::Result<()> {
    let link = link_create(program, 0, Hook::Iterator)?;
    // SAFETY: the descriptor is open.
    let fd = checked(unsafe { libbpf_sys::bpf_iter_create(link.as_raw_fd()) })?;
    // SAFETY: a fresh descriptor that nothing else owns.
    let mut steps = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    loop {
        match steps.read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // The kernel pauses after a million objects without output.
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Gives a map, program or link a name in a bpffs, which keeps it alive.
///
/// # Errors
///
/// The kernel's error.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: the path ends in a zero and lives through the call.
    checked(unsafe { libbpf_sys::bpf_obj_pin(object.as_raw_fd(), path.as_ptr()) }).map(drop)
}

/// Opens the object behind a name in a bpffs.
///
/// # Errors
///
/// The kernel's error.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    // SAFETY: the path ends in a zero and lives through the call.
    let fd = checked(unsafe { libbpf_sys::bpf_obj_get(path.as_ptr()) })?;
    // SAFETY: a fresh descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Runs a program once on a frame, in the network namespace of the calling thread. Gives what it
/// returned, and the frame as it left it.
///
/// # Errors
///
/// The kernel's error. It refuses frames below 14 bytes.
pub(crate) fn test_run(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<(u32, Vec<u8>)> {
    let mut out = vec![0; frame.len() + ROOM];
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: u32::try_from(frame.len()).map_err(io::Error::other)?,
        data_out: out.as_mut_ptr().cast(),
        data_size_out: u32::try_from(out.len()).map_err(io::Error::other)?,
        repeat: 1,
        ..Default::default()
    };
    // SAFETY: both buffers live through the call and have the sizes that the options state.
    let code = unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &raw mut options) };
    checked(code)?;
    out.truncate(options.data_size_out as usize);
    Ok((options.retval, out))
}

/// The cookie of a socket's network namespace. The kernel never gives it to another namespace.
///
/// # Errors
///
/// The kernel's error.
pub(crate) fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is the size of the destination.
    let code = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if code < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(cookie)
    }
}

/// Flag of [`ethtool_flags`]: `ETH_FLAG_RXVLAN`.
pub(crate) const RX_VLAN_OFFLOAD: u32 = 1 << 8;

/// `ETHTOOL_GFLAGS` of an interface in the socket's network namespace.
///
/// # Errors
///
/// The kernel's error. A name that is too long is refused.
pub(crate) fn ethtool_flags(socket: BorrowedFd<'_>, interface: &str) -> io::Result<u32> {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    const GFLAGS: u32 = 0x25;
    // `struct ethtool_value`.
    let mut value = [GFLAGS, 0];
    let mut name = [0; libc::IFNAMSIZ];
    // The last byte stays zero.
    if interface.len() >= name.len() {
        return Err(ErrorKind::InvalidInput.into());
    }
    for (to, from) in name.iter_mut().zip(interface.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let mut request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_data: value.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the request points to a value of the two words that this command reads and writes;
    // both live through the call.
    let code = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value[1])
}

/// The most bytes that a program adds to a frame: a Retry is at most this much longer than the
/// packet that it answers.
const ROOM: usize = 256;

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// libbpf's calls return a descriptor, 0, or a negative error number.
fn checked(code: i32) -> io::Result<i32> {
    if code < 0 {
        Err(io::Error::from_raw_os_error(-code))
    } else {
        Ok(code)
    }
}
