//! Sizes, offsets and the order of the reasons, against the BTF of the object.

use std::collections::BTreeMap;

use libbpf_rs::btf::types::{Enum, MemberAttr, Struct};
use libbpf_rs::btf::{Btf, HasSize as _};
use millrace_edge_policy::reason::Reason;

use super::*;

static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/edge.bpf.o"));

/// Size of a structure in C, and the offsets of its members, in bytes.
fn in_c(btf: &Btf<'_>, name: &str) -> (usize, BTreeMap<String, usize>) {
    let found: Struct<'_> = btf
        .type_by_name(name)
        .unwrap_or_else(|| panic!("no struct {name}"));
    let members = found.iter().map(|member| {
        let MemberAttr::Normal { offset } = member.attr else {
            panic!("{name} has a bit field");
        };
        let member = member
            .name
            .map_or_else(String::new, |name| name.to_string_lossy().into());
        (member, offset as usize / 8)
    });
    (found.size(), members.collect())
}

macro_rules! same {
    ($btf:expr, $name:literal, $type:ty { $($field:ident),* $(,)? }) => {
        let members = [$((stringify!($field).to_owned(), std::mem::offset_of!($type, $field))),*];
        let here = (size_of::<$type>(), BTreeMap::from(members));
        assert_eq!(here, in_c($btf, $name), $name);
    };
}

#[test]
fn layouts_are_those_of_the_programs() {
    let btf = Btf::from_raw("edge", OBJECT).unwrap().unwrap();
    same!(
        &btf,
        "edge_limit",
        EdgeLimit {
            interval_ns,
            tolerance_ns
        }
    );
    same!(&btf, "edge_key", EdgeKey { k0, k1 });
    same!(
        &btf,
        "edge_service",
        EdgeService {
            port,
            protocol,
            kind,
            root4,
            root6,
            pad
        }
    );
    same!(
        &btf,
        "edge_config",
        EdgeConfig {
            mode,
            scope,
            services,
            set,
            service,
            host,
            budget,
            source_quic,
            source_tcp,
            peer,
            proof,
            id,
            quic_connections_max,
            tcp_connections_max,
        }
    );
    same!(
        &btf,
        "edge_control",
        EdgeControl {
            layout,
            active,
            revert_at_ns,
            lease_until_ns,
            stress,
            run,
            wall_offset_ns,
            seed,
            limiter_active,
            key_active,
            limiter_old_until_ns,
            keys,
            netns_cookie,
            cookies_watched_until_ns,
            config,
        }
    );
    same!(&btf, "edge_count", EdgeCount { run, connections });
    same!(
        &btf,
        "edge_sizes",
        EdgeSizes {
            limiter_buckets,
            rules_max,
            shards,
            pad
        }
    );
    same!(
        &btf,
        "edge_counters",
        EdgeCounters {
            acted,
            counted,
            sampled
        }
    );
    same!(&btf, "edge_sampling", EdgeSampling { every, pad });
    same!(
        &btf,
        "edge_flow",
        EdgeFlow {
            remote,
            remote_port,
            port,
            protocol,
            pad
        }
    );
    same!(
        &btf,
        "edge_decision",
        EdgeDecision {
            reason,
            action,
            rule,
            service,
            stress,
            generation,
            now_ns,
        }
    );
    same!(
        &btf,
        "edge_mock",
        EdgeMock {
            now_ns,
            cookie,
            read_only,
            listener_room,
            meets_listener,
        }
    );
    same!(
        &btf,
        "edge_event",
        EdgeEvent {
            now_ns,
            reason,
            rule,
            source,
            source_port,
            port,
            protocol,
            pad,
            ifindex,
            length,
        }
    );
    same!(&btf, "edge_bucket", EdgeBucket { word });
    same!(&btf, "edge_node", EdgeNode { entry });
    same!(&btf, "edge_sparse", EdgeSparse { entry, start, pad });
    same!(&btf, "edge_ports", EdgePorts { service });
}

#[test]
fn reasons_have_the_order_of_the_counters() {
    let btf = Btf::from_raw("edge", OBJECT).unwrap().unwrap();
    let reasons: Enum<'_> = btf.type_by_name("edge_reason").unwrap();
    let in_c: Vec<String> = reasons
        .iter()
        .filter_map(|value| Some(value.name?.to_str()?.strip_prefix("R_")?.to_lowercase()))
        .collect();
    let here: Vec<&str> = Reason::ALL.iter().map(|reason| reason.label()).collect();
    assert_eq!(here, in_c);
}
