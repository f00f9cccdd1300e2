//! The edge on `/metrics`: what the program counted, and what keeps it.

use std::fmt;
use std::sync::atomic::Ordering;

use millrace_edge::metrics::{Counters, hits};
use millrace_edge::publish::Publisher;
use millrace_edge_policy::reason::Reason;

use super::{Out, help_of};
use crate::edge::keeper::{EdgeView, held};
use crate::edge::sets;
use crate::edge::start::Kernel;

pub(super) fn write(view: &EdgeView, out: &mut Out<'_>) -> fmt::Result {
    out.gauge("millrace_edge_in_kernel", u64::from(view.is_in_kernel()))?;
    out.gauge(
        "millrace_edge_stress",
        u64::from(view.stress.load(Ordering::Relaxed)),
    )?;
    // The reference's name for the same.
    out.gauge(
        "firewall_registry_version",
        view.registry_version.load(Ordering::Relaxed),
    )?;
    let refused = held(&view.refused);
    let refused = refused
        .iter()
        .map(|(reason, count)| (Some(("reason", (*reason).to_owned())), *count));
    out.counters(
        "millrace_edge_rules_refused",
        help_of("millrace_edge_rules_refused"),
        refused,
    )?;
    out.counter(
        "millrace_edge_tables_restored",
        view.tables_restored.load(Ordering::Relaxed),
    )?;
    out.counter(
        "millrace_edge_interfaces_reattached",
        view.reattached.load(Ordering::Relaxed),
    )?;
    out.counter(
        "millrace_edge_attach_failures",
        view.attach_failures.load(Ordering::Relaxed),
    )?;
    let gone = held(&view.gone).len();
    out.gauge("millrace_edge_interfaces_gone", gone as u64)?;
    match &view.kernel {
        Some(kernel) => kernel_counters(kernel, out),
        None => Ok(()),
    }
}

fn kernel_counters(kernel: &Kernel, out: &mut Out<'_>) -> fmt::Result {
    let maps = kernel.edge.maps();
    // A scrape that cannot read the map shows the rest.
    let Ok(counters) = Counters::read(maps.counters()) else {
        return Ok(());
    };
    let column = |value: fn(&Counters, Reason) -> u64| {
        let all = Reason::ALL.iter().map(|reason| {
            (
                Some(("reason", reason.label().to_owned())),
                value(&counters, *reason),
            )
        });
        all.collect::<Vec<_>>()
    };
    out.counters(
        "millrace_edge_packets",
        help_of("millrace_edge_packets"),
        column(Counters::acted_on),
    )?;
    out.counters(
        "millrace_edge_packets_counted",
        help_of("millrace_edge_packets_counted"),
        column(Counters::counted_as),
    )?;
    let publisher = Publisher::new(maps);
    let config = publisher.config();
    out.gauge("millrace_edge_enforcing", u64::from(config.mode))?;
    out.gauge("millrace_edge_set", u64::from(config.set))?;
    out.gauge("millrace_edge_quic_sources", kernel.counts.sources() as u64)?;
    out.counter("millrace_edge_counts_missed", kernel.counts.missed())?;
    let rules = sets::read(kernel.edge.pins(), config.set).map_or(0, |rules| rules.len());
    let hits = hits(maps.hits(), publisher.in_force() as u32, rules as u32).unwrap_or_default();
    let hits = hits
        .into_iter()
        .enumerate()
        .map(|(rule, hits)| (Some(("rule", rule.to_string())), hits));
    out.counters(
        "millrace_edge_rule_hits",
        help_of("millrace_edge_rule_hits"),
        hits,
    )
}
