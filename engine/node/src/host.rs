//! What this host has for a node. What cannot be found out is left open.

use std::net::UdpSocket;
use std::path::Path;

use millrace_protocol::identity::{PublicKey, SigningKey};
use millrace_protocol::tls_keys::TlsKeys;
use millrace_registry::{folder, keys};
use millrace_tuning::host::Members;
use millrace_tuning::{ByteSize, HostFacts, NodeConfig};

use crate::mapping;
use crate::paths::Paths;
use crate::registry::{self, Kept, RegistrySource};
use crate::room::Room;

/// The bit of CAP_NET_ADMIN, which lifts the limits of socket buffers.
const CAP_NET_ADMIN: u64 = 1 << 12;

/// What a check of the config has to know about this host.
pub fn probe(config: &NodeConfig, paths: &Paths) -> HostFacts {
    let net_admin = capabilities().is_some_and(|bits| bits & CAP_NET_ADMIN != 0);
    let buffer_max = |name: &str| {
        (!net_admin)
            .then(|| number_in(format!("/proc/sys/net/core/{name}")).map(ByteSize))
            .flatten()
    };
    let of_registry = of_registry(config, paths);
    let (members, tls_key_error) =
        of_registry.map_or((None, None), |(members, error)| (Some(members), error));
    HostFacts {
        cpus: usable_cpus(),
        memory_available: memory_line("/proc/meminfo", "MemAvailable:"),
        memlock_bytes: memlock(),
        io_uring_disabled: number_in("/proc/sys/kernel/io_uring_disabled"),
        io_uring_error: io_uring::IoUring::new(8)
            .err()
            .map(|error| error.to_string()),
        huge_pages_free: huge_pages_free(),
        listen_error: UdpSocket::bind(config.listen.address)
            .err()
            .map(|error| error.to_string()),
        key_file_error: keys::read(&paths.key_file)
            .err()
            .map(|error| error.to_string()),
        registry_dir_error: folder::list(&paths.registry_dir)
            .err()
            .map(|e| e.to_string()),
        tls_key_error,
        members,
        receive_buffer_max: buffer_max("rmem_max"),
        send_buffer_max: buffer_max("wmem_max"),
    }
}

/// What the registry folder, and the version that is kept, say of the node of the key file: the
/// members, and why the node has none of its TLS keys.
fn of_registry(config: &NodeConfig, paths: &Paths) -> Option<(Members, Option<String>)> {
    let identity = keys::read(&paths.key_file).ok()?;
    let source = RegistrySource {
        public_key: keys::public_from_hex(&config.registry.public_key).ok()?,
        folder: Some(paths.registry_dir.clone()),
        kept: Kept::ReadOnly(paths.kept_dir()),
    };
    let versions = registry::versions(&identity.public_key(), config, source).ok()?;
    let shards = config.shards.cpus(&usable_cpus()).len();
    let room = Room::of(mapping::transport(config), shards);
    let (me, topology) = (versions.node_id(), versions.topology());
    let record = topology.member(&me).map(|record| record.tls_keys);
    let tls_key_error = record.and_then(|record| tls_key_error(&identity, &record, paths));
    Some((room.members(&me, &topology), tls_key_error))
}

/// Why the newest of the keys cannot be used, if the older one cannot be either.
fn tls_key_error(identity: &SigningKey, record: &TlsKeys, paths: &Paths) -> Option<String> {
    let error_of = |key: PublicKey| {
        if key == identity.public_key() {
            return None;
        }
        match keys::read_tls(&paths.key_file, &key) {
            Ok(Some(_)) => None,
            Ok(None) => {
                let file = keys::tls_key_file(&paths.key_file, &key);
                Some(format!("{} is not there", file.display()))
            }
            Err(error) => Some(error.to_string()),
        }
    };
    let errors = record.iter().map(error_of).collect::<Option<Vec<_>>>()?;
    errors.into_iter().last()
}

/// Cores that this process may run on.
pub fn usable_cpus() -> Vec<u64> {
    let list = field("/proc/self/status", "Cpus_allowed_list:");
    list.as_deref().map(parse_cpu_list).unwrap_or_default()
}

/// The process's largest resident set so far.
pub fn peak_rss() -> Option<ByteSize> {
    memory_line("/proc/self/status", "VmHWM:")
}

/// `0-3,8` as numbers.
fn parse_cpu_list(list: &str) -> Vec<u64> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse(), last.parse::<u64>()) {
            cpus.extend(first..=last);
        }
    }
    cpus
}

fn capabilities() -> Option<u64> {
    u64::from_str_radix(field("/proc/self/status", "CapEff:")?.trim(), 16).ok()
}

fn huge_pages_free() -> Option<u64> {
    number_in("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
}

/// The soft limit of locked memory.
fn memlock() -> Option<ByteSize> {
    let line = field("/proc/self/limits", "Max locked memory")?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(ByteSize(u64::MAX)),
        bytes => bytes.parse().ok().map(ByteSize),
    }
}

/// A line such as `MemAvailable:   123 kB`.
fn memory_line(file: &str, name: &str) -> Option<ByteSize> {
    let line = field(file, name)?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(ByteSize::kib(kib))
}

fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix(name).map(str::to_owned))
}

fn number_in(file: impl AsRef<Path>) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_read() {
        assert_eq!(parse_cpu_list("0-3,8"), [0, 1, 2, 3, 8]);
        assert_eq!(parse_cpu_list("\t5\n"), [5]);
        assert_eq!(parse_cpu_list(""), [] as [u64; 0]);
    }

    #[test]
    fn this_process_has_cores_and_memory() {
        assert!(!usable_cpus().is_empty());
        assert!(peak_rss().is_some_and(|size| size > ByteSize::mib(1)));
        assert!(memlock().is_some());
    }
}
