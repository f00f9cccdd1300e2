//! What the config says otherwise than what runs, though no `apply` changes it.

use millrace_edge::interface::Interface;
use millrace_edge_control::Record;
use millrace_edge_control::policy::{NodePolicy, ProgramPolicy};
use millrace_tuning::config::EdgeSection;

/// Keys of `[edge]`, and what changes them.
pub(super) fn unapplied_keys(
    edge: &EdgeSection,
    record: &Record,
    interfaces: &[Interface],
) -> Vec<(&'static str, &'static str)> {
    let mut attached: Vec<_> = interfaces.iter().map(|known| &known.name).collect();
    let mut wanted: Vec<_> = edge.interfaces.iter().collect();
    attached.sort();
    wanted.sort();
    let program = record.program.as_ref();
    let program = program.map_or_else(Vec::new, |was| was.differing_keys(&ProgramPolicy::of(edge)));
    let node = record.node.as_ref();
    let node = node.map_or_else(Vec::new, |was| was.differing_keys(&NodePolicy::of(edge)));
    let each = |keys: Vec<&'static str>, how| keys.into_iter().map(move |key| (key, how));
    let interfaces = (attached != wanted).then_some("interfaces");
    let attach = "`millrace xdp attach` adds one, `detach` takes all away";
    each(interfaces.into_iter().collect(), attach)
        .chain(each(program, "`millrace xdp detach` and `attach` do"))
        .chain(each(node, "a restart of the node does"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apply_does_not_change_is_named() {
        let edge = |text: &str| {
            let key = "ab".repeat(32);
            let text = format!("[registry]\npublic_key = \"{key}\"\n[edge]\n{text}");
            let parsed = millrace_tuning::parse(&text);
            assert!(parsed.is_usable(), "{:?}", parsed.problems);
            parsed.config.edge
        };
        let attached = edge("interfaces = [\"a0\"]\n");
        let record = Record {
            program: Some(ProgramPolicy::of(&attached)),
            node: Some(NodePolicy::of(&attached)),
            ..Record::default()
        };
        let edited = edge(
            "interfaces = [\"a0\", \"b0\"]\nlimiter_buckets = 2048\nlease = \"5s\"\nquic_burst = 7\n",
        );
        let unapplied = unapplied_keys(&edited, &record, &[]);
        let keys: Vec<_> = unapplied.into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["interfaces", "limiter_buckets", "lease"]);
    }
}
