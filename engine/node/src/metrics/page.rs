//! `docs/reference/metrics.md`, from the tables that `/metrics` is written from.

use std::fmt::Write;

use millrace_edge_policy::reason::Reason;
use millrace_protocol::flood::Flood;
use millrace_protocol::peers::Refusal;
use millrace_shards::stats::ShardStats;
use millrace_transport::HandshakeRefusal;
use millrace_transport::counters::{COUNTERS, Family};

use super::reference::{ABSENT, Read, TABLE};
use super::{Kind, OWN, shard_help};
use millrace_testkit::page::is_fresh;

const HEAD: &str = "# Metrics

Generated from the tables of the code by `make docs`; do not edit. `GET /metrics` on the admin
socket gives OpenMetrics text; a counter's sample has `_total` after the name. A family of reasons
appears with its first event.

## Millrace

| name | type | label | what |
|---|---|---|---|
";

const REFERENCE: &str = "
## Names of the reference

For dashboards that exist: the same values under the names of the reference implementation.

| name | type | computed from |
|---|---|---|
";

const LEFT_OUT: &str = "
Left out, because Millrace counts nothing of the kind:

| name, after `quic_transport_` | instead |
|---|---|
";

const REFUSED: &str = "
## Reasons of a refused connection

Labels of `millrace_transport_connections_refused`. Each of these reasons is a line of the log too,
with the address: one in 10 s on each shard, which says how many were left out. A first packet that
is refused before its handshake has a reason of the edge (the next section), or the name of a full
table ([edge.md](edge.md), section 7), and no line.

| reason | when | what |
|---|---|---|
";

const FLOODS: &str = "
## Reasons of floods

Reasons of `millrace_transport_connections_closed` for work that a peer makes without need;
[hostile-members.md](../operating/hostile-members.md) says how much is borne. Its next connections
are refused for a while: `millrace_transport_connections_refused{reason=\"flooded_before\"}`.

| reason | what came too often |
|---|---|
";

const EDGE: &str = "
## Reasons of the edge

Every packet that the program sees adds one to exactly one of them; [edge.md](edge.md) says when.

| reason | in mode `enforce` | what |
|---|---|---|
";

#[test]
fn the_metrics_reference_is_fresh() {
    let mut page = String::from(HEAD);
    let mut row = |name: &str, kind: &str, label: &str, help: &str| {
        let help = help.trim().trim_end_matches('.');
        let _ = writeln!(page, "| `{name}` | {kind} | {label} | {help} |");
    };
    for same_name in COUNTERS.chunk_by(|a, b| a.name == b.name) {
        let values: Vec<_> = same_name
            .iter()
            .filter_map(|info| info.label.map(|(_, value)| value))
            .collect();
        let label = same_name[0].label.map_or(String::new(), |(key, _)| {
            format!("`{key}`: {}", values.join(", "))
        });
        let help: Vec<_> = same_name
            .iter()
            .map(|info| info.help.trim().trim_end_matches('.'))
            .collect();
        row(same_name[0].name, "counter", &label, &help.join("; "));
    }
    for family in [
        Family::Refused,
        Family::Closed,
        Family::Rejected,
        Family::Failed,
    ] {
        row(family.name(), "counter", "`reason`", family.help());
    }
    for own in OWN {
        let label = own.label.map_or(String::new(), |key| format!("`{key}`"));
        let kind = match own.kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
        };
        row(own.name, kind, &label, own.help);
    }
    for (name, _) in ShardStats::default().snapshot().iter() {
        row(
            &format!("millrace_shard_{name}"),
            "counter",
            "`shard`",
            &shard_help(name),
        );
    }
    page.push_str(REFERENCE);
    for row in TABLE {
        let kind = match row.read {
            Read::Gauge(_) | Read::Path(_) => "gauge",
            Read::Counter(_) | Read::Counters(_) => "counter",
        };
        let _ = writeln!(
            page,
            "| `quic_transport_{}` | {kind} | {} |",
            row.name, row.from
        );
    }
    page.push_str(LEFT_OUT);
    for (names, instead) in ABSENT {
        let _ = writeln!(page, "| {names} | {instead} |");
    }
    page.push_str(REFUSED);
    for refusal in HandshakeRefusal::ALL {
        let (reason, what) = (refusal.reason(), refusal.describe());
        let _ = writeln!(page, "| `{reason}` | during the handshake | {what} |");
    }
    for refusal in Refusal::ALL {
        let what = refusal.describe();
        let _ = writeln!(
            page,
            "| `{}` | after the handshake | {what} |",
            refusal.reason()
        );
    }
    page.push_str(FLOODS);
    for flood in Flood::ALL {
        let _ = writeln!(page, "| `{}` | {} |", flood.reason(), flood.describe());
    }
    page.push_str(EDGE);
    for reason in Reason::ALL {
        let _ = writeln!(
            page,
            "| `{}` | {} | {} |",
            reason.label(),
            reason.action().as_str(),
            reason.describe()
        );
    }
    is_fresh("docs/reference/metrics.md", &page);
}
