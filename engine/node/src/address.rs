//! Whether the node's address is free, and which process has it otherwise.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::StartError;

/// How long a node waits for an address that no process has. The kernel tears an io_uring down
/// after its process has ended, and its socket with it: a node that is started right after a
/// `kill -9` finds its address in use for some milliseconds.
const FREE_WITHIN: Duration = Duration::from_secs(3);

/// How long a process that was killed may still have the address.
const ENDING: Duration = Duration::from_millis(250);

/// Time between two looks: while the process may be ending, and later, when each look reads what
/// all processes have open.
const RETRY: Duration = Duration::from_millis(5);
const RETRY_LATER: Duration = Duration::from_millis(50);

/// Waits until no socket has `address`: at most 3 s, and not for a process that lives.
///
/// This is for the message alone. What keeps two nodes apart is the bind: the first socket of a
/// node shares its address with none (see [`millrace_shards::socket`]).
///
/// # Errors
/// [`StartError::Taken`], with the process that has it if this one may see that.
pub fn wait_until_free(address: SocketAddr) -> Result<(), StartError> {
    let start = Instant::now();
    loop {
        match UdpSocket::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            // What else is wrong with it the node's own bind reports.
            _ => return Ok(()),
        }
        let waited = start.elapsed();
        if waited < ENDING {
            std::thread::sleep(RETRY);
            continue;
        }
        let holder = holder(address);
        if holder.is_some() || waited >= FREE_WITHIN {
            let holder = holder.map_or_else(
                || "another socket".to_owned(),
                |pid| format!("process {pid}"),
            );
            return Err(StartError::Taken {
                what: format!(
                    "{holder} has the UDP address {address}; fix: stop it, or choose another \
                     listen.address"
                ),
            });
        }
        std::thread::sleep(RETRY_LATER);
    }
}

/// The process that has a UDP socket at `address`. None if this process may not see it: it is
/// another user's, is in another namespace of processes, or has ended while the kernel still closes
/// its socket.
fn holder(address: SocketAddr) -> Option<u32> {
    // Of this thread: the network namespace of the process's first thread may be another.
    let tables = ["udp", "udp6"].map(|table| Path::new("/proc/thread-self/net").join(table));
    let tables = tables
        .iter()
        .filter_map(|table| std::fs::read_to_string(table).ok());
    let sockets: BTreeSet<PathBuf> = tables
        .flat_map(|table| sockets_at(&table, address))
        .map(|inode| format!("socket:[{inode}]").into())
        .collect();
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let mut processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes.find(|pid: &u32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd"));
        let links = files.into_iter().flatten().flatten();
        let mut links = links.filter_map(|file| std::fs::read_link(file.path()).ok());
        links.any(|link| sockets.contains(&link))
    })
}

/// The inodes of the sockets in a table of `/proc/net` (proc(5)) whose address keeps `address` from
/// being bound.
fn sockets_at(table: &str, address: SocketAddr) -> Vec<u64> {
    let of_line = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let has = socket_address(fields.next()?)?;
        // State, queues and the like: the inode is the tenth field.
        let inode = fields.nth(7)?.parse().ok()?;
        Some((has, inode))
    };
    let (wanted, port) = (address.ip().to_canonical(), address.port());
    let overlaps = |has: SocketAddr| {
        let ip = has.ip().to_canonical();
        has.port() == port && (ip == wanted || ip.is_unspecified() || wanted.is_unspecified())
    };
    let lines = table.lines().filter_map(of_line);
    lines
        .filter(|(has, _)| overlaps(*has))
        .map(|(_, inode)| inode)
        .collect()
}

/// Reads `0100007F:1004`: words of four bytes in the host's order, and the port.
fn socket_address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let word = u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?;
        Some(u32::from_be_bytes(word.to_ne_bytes()))
    };
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from_bits(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?].map(u128::from);
            Ipv6Addr::from_bits(words.iter().fold(0, |all, word| all << 32 | word)).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects the operator who looks for the process: an address is found in whatever form the
    /// kernel lists it, and a broken line is passed over.
    #[test]
    fn the_process_with_an_overlapping_address_is_found() {
        for bound in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
            let socket = UdpSocket::bind(bound).unwrap();
            let address = socket.local_addr().unwrap();
            assert_eq!(holder(address), Some(std::process::id()), "{bound}");
            let error = wait_until_free(address).unwrap_err();
            assert!(matches!(error, StartError::Taken { .. }), "{error:?}");
            let process = format!("process {} ", std::process::id());
            assert!(error.to_string().contains(&process), "{error}");
            drop(socket);
            wait_until_free(address).unwrap();
        }
        assert_eq!(
            socket_address("0100007F:1004"),
            "127.0.0.1:4100".parse().ok()
        );
        for broken in [
            "",
            "0100007F",
            "0100007:1004",
            "0100007F:x",
            "ä100007F:1004",
        ] {
            assert_eq!(socket_address(broken), None, "{broken}");
        }
    }

    /// Protects an operator with two addresses: only a socket that is in the way counts.
    #[test]
    fn an_address_is_kept_by_its_own_sockets_alone() {
        let line = |ip: &str| {
            format!(
                "  1: {ip}:1004 00000000:0000 07 00000000:00000000 00:00000000 00000000 0 0 77 2 0"
            )
        };
        let table = |ip: &str| {
            format!(
                "  sl  local_address rem_address ...\n{}\nbroken 1\n",
                line(ip)
            )
        };
        let cases = [
            ("0100007F", "127.0.0.1:4100", true),
            ("00000000", "127.0.0.1:4100", true),
            ("0100007F", "0.0.0.0:4100", true),
            ("0200007F", "127.0.0.1:4100", false),
            ("0100007F", "127.0.0.1:4101", false),
        ];
        for (has, wanted, is_taken) in cases {
            let found = sockets_at(&table(has), wanted.parse().unwrap());
            assert_eq!(
                found,
                if is_taken { vec![77] } else { vec![] },
                "{has} {wanted}"
            );
        }
    }
}
