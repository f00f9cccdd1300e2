//! What the edge shows on `/status` and `/metrics`: what the program counted, and what keeps it.

use std::collections::BTreeMap;
use std::sync::Arc;

use millrace_edge::metrics::{Counters, hits};
use millrace_edge::publish::Publisher;
use millrace_edge_control::journal::Refused;
use millrace_edge_control::{AttachedEdge, EdgeView};
use millrace_edge_policy::reason::Reason;
use serde::{Deserialize, Serialize};

/// Who refuses at the node's edge; `millrace xdp status` says more.
#[derive(Debug, Serialize, Deserialize)]
pub struct EdgeStatus {
    /// `kernel`, or `user_space`: caps and rates alone, behind the socket.
    pub place: String,
    /// How packets find their shard: `ebpf`, `classic`, `none`.
    pub steering: String,
    /// 0 normal, 1 addresses are validated first, 2 registry peers only.
    pub stress: u32,
    /// Version of the rules in force.
    pub registry_version: u64,
    /// A newer version whose rules are refused, and why.
    pub refused: Option<Refused>,
    /// What does not follow now, and why: `lock`, `journal`, `rules`, `publish`, `table`, `config`,
    /// `registry`, `interface NAME`.
    #[serde(default)]
    pub failures: BTreeMap<String, String>,
    /// Interfaces that were removed; the program is put on them again when they are back.
    pub interfaces_gone: Vec<String>,
}

/// A value of a metric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EdgeSample {
    pub(crate) name: &'static str,
    /// The label's value, for a metric with a label.
    pub(crate) label: Option<String>,
    pub(crate) value: u64,
}

/// Shows what the edge's threads write down.
#[derive(Debug)]
pub(crate) struct Report {
    pub(super) view: Arc<EdgeView>,
    pub(super) kernel: Option<Arc<AttachedEdge>>,
    /// How packets find their shard: `ebpf`, `classic`, `none`.
    pub(super) steering: &'static str,
}

impl Report {
    pub(crate) fn status(&self) -> EdgeStatus {
        let status = self.view.status();
        let place = if status.is_in_kernel {
            "kernel"
        } else {
            "user_space"
        };
        EdgeStatus {
            place: place.to_owned(),
            steering: self.steering.to_owned(),
            stress: status.stress,
            registry_version: status.registry_version,
            refused: status.refused.clone(),
            failures: status.failures.clone(),
            interfaces_gone: status.interfaces_gone.clone(),
        }
    }

    pub(crate) fn samples(&self) -> Vec<EdgeSample> {
        let status = self.view.status().clone();
        let gone = status.interfaces_gone.len() as u64;
        let mut samples = vec![
            plain("millrace_edge_in_kernel", u64::from(status.is_in_kernel)),
            plain("millrace_edge_stress", u64::from(status.stress)),
            // The reference's name for the same.
            plain("firewall_registry_version", status.registry_version),
            plain("millrace_edge_tables_restored", status.tables_restored),
            plain("millrace_edge_interfaces_reattached", status.reattached),
            plain("millrace_edge_attach_failures", status.attach_failures),
            plain("millrace_edge_interfaces_gone", gone),
        ];
        let refusals = status.refusals.iter();
        samples.extend(
            refusals.map(|(reason, count)| labelled("millrace_edge_rules_refused", reason, *count)),
        );
        if let Some(kernel) = &self.kernel {
            of_kernel(kernel, &mut samples);
            let hits = rule_hits(kernel, status.rules).into_iter().enumerate();
            samples.extend(
                hits.map(|(rule, hits)| {
                    labelled("millrace_edge_rule_hits", &rule.to_string(), hits)
                }),
            );
        }
        samples
    }
}

fn of_kernel(kernel: &AttachedEdge, samples: &mut Vec<EdgeSample>) {
    let maps = kernel.edge.maps();
    // A scrape that cannot read the map shows the rest.
    let Ok(counters) = Counters::read(maps.counters()) else {
        return;
    };
    let mut column = |name, value: fn(&Counters, Reason) -> u64| {
        let all = Reason::ALL.iter();
        samples.extend(all.map(|reason| labelled(name, reason.label(), value(&counters, *reason))));
    };
    column("millrace_edge_packets", Counters::acted_on);
    column("millrace_edge_packets_counted", Counters::counted_as);
    let config = Publisher::new(maps).config();
    samples.extend([
        plain("millrace_edge_enforcing", u64::from(config.mode)),
        plain("millrace_edge_set", u64::from(config.set)),
        plain("millrace_edge_quic_sources", kernel.counts.sources() as u64),
        plain("millrace_edge_counts_missed", kernel.counts.missed()),
    ]);
}

/// How often each rule decided; none if another set is in force than the one that was seen last.
fn rule_hits(kernel: &AttachedEdge, (set, rules): (u32, usize)) -> Vec<u64> {
    let maps = kernel.edge.maps();
    let publisher = Publisher::new(maps);
    if publisher.config().set != set {
        return Vec::new();
    }
    hits(maps.hits(), publisher.in_force() as u32, rules as u32).unwrap_or_default()
}

fn plain(name: &'static str, value: u64) -> EdgeSample {
    EdgeSample {
        name,
        label: None,
        value,
    }
}

fn labelled(name: &'static str, label: &str, value: u64) -> EdgeSample {
    EdgeSample {
        name,
        label: Some(label.to_owned()),
        value,
    }
}
