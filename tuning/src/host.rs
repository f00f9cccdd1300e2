//! Whether this host can run the config. The facts are probed by the caller; the judgement is here.

use crate::budget::MemoryBudget;
use crate::config::{Cores, HugePages, NodeConfig, SHARDS_MAX};
use crate::parse::Parsed;
use crate::problem::{Problem, ProblemKind, Severity};
use crate::units::ByteSize;

/// Facts about the host, probed by the caller. `None` means that the probe failed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// Cores the process may run on.
    pub cpus: Vec<u64>,
    /// Bytes of memory that are available without swapping (`MemAvailable`).
    pub memory_available: Option<ByteSize>,
    /// Limit of locked memory in bytes (`RLIMIT_MEMLOCK`); `Some(u64::MAX)` is unlimited.
    pub memlock_bytes: Option<ByteSize>,
    /// `kernel.io_uring_disabled`: 0 allows all processes, 1 only a group, 2 none.
    pub io_uring_disabled: Option<u64>,
    /// Why an io_uring cannot be made although the sysctl allows it.
    pub io_uring_error: Option<String>,
    /// Number of free huge pages of 2 MiB.
    pub huge_pages_free: Option<u64>,
    /// Why the listen address cannot be bound.
    pub listen_error: Option<String>,
    /// Why the key file cannot be used.
    pub key_file_error: Option<String>,
    /// Why the node has none of the TLS keys that the registry names for it.
    pub tls_key_error: Option<String>,
    /// Why the registry folder cannot be used.
    pub registry_dir_error: Option<String>,
    /// The members that the registry folder names.
    pub members: Option<Members>,
    /// `net.core.rmem_max` in bytes, when the process may not exceed it.
    pub receive_buffer_max: Option<ByteSize>,
    /// `net.core.wmem_max` in bytes, when the process may not exceed it.
    pub send_buffer_max: Option<ByteSize>,
}

/// The members of the node's subnet, and what they need of its shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Members {
    /// All, this node included.
    pub count: u64,
    /// Those that this node keeps no connection to, for want of room on their shards.
    pub left_out: u64,
    /// What `transport.connections_max` must be at least to leave none out.
    pub connections_min: u64,
}

impl Members {
    /// Why a node whose shards hold `connections_max` connections each does not connect to all; and
    /// what the operator may do.
    pub fn obstacle(&self, connections_max: u64) -> Option<(String, String)> {
        let Self {
            count,
            left_out,
            connections_min,
        } = *self;
        (left_out > 0).then(|| {
            (
                format!(
                    "connections_max {connections_max} is too small for {count} members: a shard keeps room for the connection to a peer, its replacement and one that drains, and this node would have none to {left_out} of them"
                ),
                format!("write connections_max = {connections_min}, or give the node more shards"),
            )
        })
    }
}

/// Bytes of locked memory per shard below which glommio refuses to start (its own check).
const MEMLOCK_MIN: ByteSize = ByteSize::kib(512);

/// The obstacles on this host to a node with this config.
pub fn check(parsed: &Parsed, facts: &HostFacts, budget: &MemoryBudget) -> Vec<Problem> {
    let mut found = Found {
        parsed,
        problems: Vec::new(),
    };
    cores(&parsed.config, facts, &mut found);
    memory(&parsed.config, facts, budget, &mut found);
    kernel(facts, &mut found);
    if let Some(error) = &facts.listen_error {
        found.error(
            "listen.address",
            format!("cannot listen on {}: {error}", parsed.config.listen.address),
            "stop what uses the port (`ss -ulpn`), or choose an address of this host and a free port".into(),
        );
    }
    if let Some(error) = &facts.key_file_error {
        found.error(
            "node.key_file",
            format!("key file {}: {error}", parsed.config.node.key_file),
            "make one with `millrace keygen FILE`, or point key_file at it; its mode must be 0600"
                .into(),
        );
    }
    if let Some(error) = &facts.tls_key_error {
        found.error(
            "node.key_file",
            format!("peers would refuse this node: {error}"),
            "put the file of the TLS key beside the node's key, as `millrace keygen --tls` made it"
                .into(),
        );
    }
    // A seed gives the node its first version: the folder may be missing then.
    if let Some(error) = &facts.registry_dir_error
        && parsed.config.registry.seeds.is_empty()
    {
        found.error(
            "registry.dir",
            format!("registry folder {}: {error}", parsed.config.registry.dir),
            "copy the folder made by `millrace registry init` here, or correct registry.dir".into(),
        );
    }
    let connections_max = parsed.config.transport.connections_max;
    let obstacle = facts.members.and_then(|all| all.obstacle(connections_max));
    if let Some((reason, fix)) = obstacle {
        found.error("transport.connections_max", reason, fix);
    }
    found.problems.sort_by_key(|problem| problem.position);
    found.problems
}

fn cores(config: &NodeConfig, facts: &HostFacts, found: &mut Found<'_>) {
    let shards = config.shards.cpus(&facts.cpus).len();
    if shards > SHARDS_MAX {
        found.error(
            "shards.cores",
            format!(
                "{shards} cores would run a shard each; a node has at most {SHARDS_MAX} shards"
            ),
            format!("list at most {SHARDS_MAX} cores in shards.cores"),
        );
    }
    if facts.cpus.is_empty() {
        return;
    }
    let usable: Vec<String> = facts.cpus.iter().map(u64::to_string).collect();
    let usable = usable.join(", ");
    if let Cores::List(list) = &config.shards.cores {
        for cpu in list.iter().filter(|cpu| !facts.cpus.contains(cpu)) {
            found.error(
                "shards.cores",
                format!("core {cpu} does not exist here or is not open to this process (usable: {usable})"),
                "list usable cores only, write \"auto\", or widen the process's CPU set".into(),
            );
        }
    }
    for (index, core) in config.shards.core.iter().enumerate() {
        if !facts.cpus.contains(&core.cpu) {
            found.error(
                &format!("shards.core.{index}.cpu"),
                format!(
                    "core {} does not exist here or is not open to this process (usable: {usable})",
                    core.cpu
                ),
                "name a usable core, or remove this [[shards.core]]".into(),
            );
        }
    }
}

fn memory(config: &NodeConfig, facts: &HostFacts, budget: &MemoryBudget, found: &mut Found<'_>) {
    if let Some(available) = facts.memory_available
        && budget.total() > available
    {
        found.error(
            "shards.chunk_pool_bytes",
            format!(
                "the node may use {:.1} MiB but the host has {:.1} MiB available",
                in_mib(budget.total()),
                in_mib(available)
            ),
            "lower shards.chunk_pool_bytes, transport.connections_max or the number of shards"
                .into(),
        );
    }
    if let Some(free) = facts.huge_pages_free
        && config.shards.defaults.huge_pages == HugePages::Require
    {
        let shards = config.shards.cpus(&facts.cpus).len() as u64;
        let needed = config.shards.defaults.chunk_pool_bytes.0.div_ceil(2 << 20) * shards;
        if free < needed {
            found.error(
                "shards.huge_pages",
                format!("huge_pages = \"require\" needs {needed} pages of 2 MiB, {free} are free"),
                format!("run `sysctl vm.nr_hugepages={needed}`, or write huge_pages = \"auto\""),
            );
        }
    }
    for (key, wanted, most, sysctl) in [
        (
            "listen.receive_buffer_bytes",
            config.listen.receive_buffer_bytes,
            facts.receive_buffer_max,
            "rmem_max",
        ),
        (
            "listen.send_buffer_bytes",
            config.listen.send_buffer_bytes,
            facts.send_buffer_max,
            "wmem_max",
        ),
    ] {
        if let Some(most) = most
            && wanted > most
        {
            found.warning(
                key,
                format!("{wanted} is more than net.core.{sysctl} ({most}): the kernel gives less, and bursts may be lost"),
                format!("run `sysctl net.core.{sysctl}={}`, or grant CAP_NET_ADMIN", wanted.0),
            );
        }
    }
}

fn kernel(facts: &HostFacts, found: &mut Found<'_>) {
    if let Some(level @ 1..) = facts.io_uring_disabled
        && facts.io_uring_error.is_some()
    {
        found.error(
            "shards",
            format!("io_uring is disabled by kernel.io_uring_disabled = {level}"),
            "run `sysctl kernel.io_uring_disabled=0`, or add the process to kernel.io_uring_group when it is 1".into(),
        );
    } else if let Some(error) = &facts.io_uring_error {
        found.error(
            "shards",
            format!("an io_uring cannot be made: {error}"),
            "if this is a container, allow the io_uring system calls in its seccomp profile; Linux 6.1 or newer is needed".into(),
        );
    }
    if let Some(limit) = facts.memlock_bytes
        && limit < MEMLOCK_MIN
    {
        found.error(
            "shards",
            format!("the limit of locked memory is {limit}, {MEMLOCK_MIN} are needed"),
            "run `ulimit -l 65536`, or set LimitMEMLOCK=64M in the service".into(),
        );
    }
}

fn in_mib(size: ByteSize) -> f64 {
    size.0 as f64 / f64::from(1 << 20)
}

struct Found<'a> {
    parsed: &'a Parsed,
    problems: Vec<Problem>,
}

impl Found<'_> {
    fn error(&mut self, key: &str, reason: String, fix: String) {
        self.push(key, Severity::Error, reason, fix);
    }

    fn warning(&mut self, key: &str, reason: String, fix: String) {
        self.push(key, Severity::Warning, reason, fix);
    }

    fn push(&mut self, key: &str, severity: Severity, reason: String, fix: String) {
        self.problems.push(Problem {
            position: self.parsed.origins.nearest(key),
            key: key.to_owned(),
            kind: ProblemKind::Environment,
            severity,
            reason,
            fix,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::parse;

    const KEY: &str = "[registry]\npublic_key = \"aa00000000000000000000000000000000000000000000000000000000000000\"\n";

    fn roomy() -> HostFacts {
        HostFacts {
            cpus: vec![0, 1],
            memory_available: Some(ByteSize::gib(64)),
            memlock_bytes: Some(ByteSize::mib(8)),
            io_uring_disabled: Some(0),
            huge_pages_free: Some(0),
            ..HostFacts::default()
        }
    }

    /// A node has as many shards as a byte counts: more cores are an error, listed or found.
    #[test]
    fn more_cores_than_shards_are_an_error() {
        let cores = |count: u64| (0..count).collect::<Vec<_>>();
        let found = |text: &str, count| {
            let facts = HostFacts {
                cpus: cores(count),
                ..roomy()
            };
            check(&parse(text), &facts, &MemoryBudget::default())
        };
        let listed = |count| format!("{KEY}[shards]\ncores = {:?}\n", cores(count));
        assert_eq!(found(KEY, 255), []);
        assert_eq!(found(&listed(255), 300), []);
        for problems in [found(KEY, 256), found(&listed(256), 300)] {
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert_eq!(problems[0].key, "shards.cores");
            assert!(problems[0].reason.contains("256"), "{problems:?}");
        }
    }

    /// A host that allows everything finds nothing; each obstacle is found with its key and a fix.
    #[test]
    fn every_obstacle_of_the_host_is_named() {
        let text = format!("{KEY}[shards]\ncores = [0, 9]\n");
        let parsed = parse(&text);
        assert_eq!(parsed.problems, []);
        let mut budget = MemoryBudget::default();
        budget.add("pool", ByteSize::gib(1), 2);

        let good = parse(KEY);
        assert_eq!(check(&good, &roomy(), &budget), []);

        let bad = HostFacts {
            memory_available: Some(ByteSize::gib(1)),
            memlock_bytes: Some(ByteSize::kib(64)),
            io_uring_disabled: Some(2),
            io_uring_error: Some("operation not permitted".into()),
            listen_error: Some("address in use".into()),
            key_file_error: Some("no such file".into()),
            tls_key_error: Some("no such key".into()),
            registry_dir_error: Some("no such folder".into()),
            members: Some(Members {
                count: 60,
                left_out: 22,
                connections_min: 193,
            }),
            receive_buffer_max: Some(ByteSize::kib(208)),
            ..roomy()
        };
        let problems = check(&parsed, &bad, &budget);
        let keys: Vec<(&str, Severity)> = problems
            .iter()
            .map(|p| (p.key.as_str(), p.severity))
            .collect();
        for expected in [
            ("shards.cores", Severity::Error),
            ("shards.chunk_pool_bytes", Severity::Error),
            ("shards", Severity::Error),
            ("listen.address", Severity::Error),
            ("node.key_file", Severity::Error),
            ("registry.dir", Severity::Error),
            ("transport.connections_max", Severity::Error),
            ("listen.receive_buffer_bytes", Severity::Warning),
        ] {
            assert!(keys.contains(&expected), "{expected:?} not in {keys:?}");
        }
        assert!(problems.iter().all(|p| !p.fix.is_empty()));
        let of_key_file = problems.iter().filter(|p| p.key == "node.key_file");
        assert_eq!(of_key_file.count(), 2, "{problems:?}");
        let cores = problems.iter().find(|p| p.key == "shards.cores").unwrap();
        assert_eq!(cores.position.line, 4);
    }

    /// Protects a subnet from falling apart without a word: the operator hears who is left out, and
    /// the number to set.
    #[test]
    fn members_without_room_are_an_error_with_the_number_to_set() {
        let parsed = parse(&format!(
            "{KEY}[transport]\nconnections_max = 128\nhandshakes_max = 64\n"
        ));
        assert_eq!(parsed.problems, []);
        let found = |left_out| {
            let members = Members {
                count: 60,
                left_out,
                connections_min: 193,
            };
            let facts = HostFacts {
                members: Some(members),
                ..roomy()
            };
            check(&parsed, &facts, &MemoryBudget::default())
        };
        assert_eq!(found(0), []);
        let problems = found(22);
        assert_eq!(problems.len(), 1, "{problems:?}");
        let Problem { reason, fix, .. } = &problems[0];
        assert_eq!(problems[0].position.line, 4);
        assert!(
            ["128", "60 members", "22 of them"]
                .iter()
                .all(|part| reason.contains(part)),
            "{reason}"
        );
        assert!(fix.starts_with("write connections_max = 193"), "{fix}");
    }

    /// Protects a node that joins by a seed: it starts without a registry folder.
    #[test]
    fn a_node_with_a_seed_needs_no_registry_folder() {
        let facts = HostFacts {
            registry_dir_error: Some("no such folder".into()),
            ..roomy()
        };
        let found = |text: &str| {
            let parsed = parse(text);
            assert_eq!(parsed.problems, []);
            check(&parsed, &facts, &MemoryBudget::default()).len()
        };
        let seeds = format!("{}seeds = [\"{}@192.0.2.1:4100\"]\n", KEY, "22".repeat(32));
        assert_eq!([found(KEY), found(&seeds)], [1, 0]);
    }
}
