//! What the edge shows on `/status` and `/metrics`: what the program counted, and what keeps it.

use std::sync::atomic::Ordering;

use millrace_edge::metrics::{Counters, hits};
use millrace_edge::publish::Publisher;
use millrace_edge_policy::reason::Reason;
use millrace_node::edge::{EdgeReport, EdgeSample};
use millrace_node::status::EdgeStatus;

use crate::edge::keeper::{EdgeView, held};
use crate::edge::sets;
use crate::edge::start::Kernel;

impl EdgeReport for EdgeView {
    fn status(&self) -> EdgeStatus {
        EdgeStatus {
            place: self.place().to_owned(),
            steering: self.steering.to_owned(),
            stress: self.stress.load(Ordering::Relaxed),
            registry_version: self.registry_version.load(Ordering::Relaxed),
            refused: held(&self.refused_now).clone(),
            interfaces_gone: held(&self.gone).clone(),
        }
    }

    fn samples(&self) -> Vec<EdgeSample> {
        let stress = u64::from(self.stress.load(Ordering::Relaxed));
        let version = self.registry_version.load(Ordering::Relaxed);
        let mut samples = vec![
            plain("millrace_edge_in_kernel", u64::from(self.is_in_kernel())),
            plain("millrace_edge_stress", stress),
            // The reference's name for the same.
            plain("firewall_registry_version", version),
        ];
        samples.extend(
            held(&self.refused)
                .iter()
                .map(|(reason, count)| labelled("millrace_edge_rules_refused", reason, *count)),
        );
        samples.extend([
            plain(
                "millrace_edge_tables_restored",
                self.tables_restored.load(Ordering::Relaxed),
            ),
            plain(
                "millrace_edge_interfaces_reattached",
                self.reattached.load(Ordering::Relaxed),
            ),
            plain(
                "millrace_edge_attach_failures",
                self.attach_failures.load(Ordering::Relaxed),
            ),
            plain(
                "millrace_edge_interfaces_gone",
                held(&self.gone).len() as u64,
            ),
        ]);
        if let Some(kernel) = &self.kernel {
            of_kernel(kernel, &mut samples);
        }
        samples
    }
}

fn of_kernel(kernel: &Kernel, samples: &mut Vec<EdgeSample>) {
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
    let publisher = Publisher::new(maps);
    let config = publisher.config();
    samples.extend([
        plain("millrace_edge_enforcing", u64::from(config.mode)),
        plain("millrace_edge_set", u64::from(config.set)),
        plain("millrace_edge_quic_sources", kernel.counts.sources() as u64),
        plain("millrace_edge_counts_missed", kernel.counts.missed()),
    ]);
    let rules = sets::read(kernel.edge.pins(), config.set).map_or(0, |rules| rules.len());
    let hits = hits(maps.hits(), publisher.in_force() as u32, rules as u32).unwrap_or_default();
    let hits = hits.into_iter().enumerate();
    samples.extend(
        hits.map(|(rule, hits)| labelled("millrace_edge_rule_hits", &rule.to_string(), hits)),
    );
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
