//! `millrace status`: prints what a node says of itself.

use millrace_node::ByteSize;
use millrace_node::admin::client;
use millrace_node::status::Status;

use crate::cli::StatusArgs;
use crate::exit::{Exit, Failure};
use crate::load::socket_of;
use crate::output;

/// `millrace status`
pub(crate) fn run(args: &StatusArgs) -> Result<Exit, Failure> {
    let socket = socket_of(&args.admin)?;
    let document = client::get_text(&socket, "/status")?;
    let status: Status = serde_json::from_str(&document)
        .map_err(|error| Failure::new(Exit::Failed, format!("the node's status: {error}")))?;
    if args.json {
        output::json(&status)?;
        return Ok(Exit::Ok);
    }
    print(&status)?;
    Ok(Exit::Ok)
}

/// A time in the largest unit that it has two of.
fn age_text(seconds: f64) -> String {
    let units = [(86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes")];
    let unit = units.into_iter().find(|(unit, _)| seconds >= 2.0 * unit);
    let (unit, name) = unit.unwrap_or((1.0, "s"));
    format!("{:.0} {name}", (seconds / unit).floor())
}

fn print(status: &Status) -> Result<(), Failure> {
    let ready = status.not_ready_because.as_deref().unwrap_or("ready");
    output::data(format_args!("node       {}", status.node_id))?;
    output::data(format_args!("address    {}", status.address))?;
    output::data(format_args!(
        "state      {ready}, up {:.0} s",
        status.uptime_seconds
    ))?;
    output::data(format_args!(
        "registry   version {}, {} members",
        status.registry.newest_version, status.registry.members
    ))?;
    let registry = &status.registry;
    if let Some(age_s) = registry.age_seconds {
        let unsure = if status.peers.is_empty() && registry.members != 1 {
            "; no peer can tell whether there is a newer one"
        } else {
            ""
        };
        let age = age_text(age_s);
        output::data(format_args!("           seen first {age} ago{unsure}"))?;
    }
    if let Some(why) = &registry.kept_failure {
        output::data(format_args!("           {why}"))?;
    }
    if let Some(why) = &registry.folder_failure {
        output::data(format_args!("           the folder cannot be read: {why}"))?;
    }
    if status.registry.members_left_out > 0 {
        output::data(format_args!(
            "           {} members are left out: connections_max is too small; see the log",
            status.registry.members_left_out
        ))?;
    }
    let tls = &status.tls;
    output::data(format_args!(
        "tls key    {}  {}, certificate for {}",
        tls.key,
        tls.standing,
        age_text(tls.certificate_seconds_left as f64)
    ))?;
    if let Some(missing) = &tls.missing {
        output::data(format_args!(
            "           the registry names {missing}, which is not here"
        ))?;
    }
    if let Some(failure) = &tls.failure {
        output::data(format_args!("           {failure}"))?;
    }
    if tls.connections_by_older_key > 0 {
        output::data(format_args!(
            "           {} connections by an older key: do not retire it yet",
            tls.connections_by_older_key
        ))?;
    }
    if status.registry.names > 0 {
        output::data(format_args!(
            "names      {}, {} of them failing, {} left out",
            status.registry.names,
            status.registry.failing_names.len(),
            status.registry.names_left_out
        ))?;
    }
    for name in &status.registry.failing_names {
        let kept: Vec<String> = name.addresses.iter().map(ToString::to_string).collect();
        output::data(format_args!(
            "           {}: {}; kept: {}",
            name.host,
            name.reason,
            if kept.is_empty() {
                "none".into()
            } else {
                kept.join(" ")
            }
        ))?;
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    output::data(format_args!(
        "artifacts  {} held, {:.1} of {:.1} MiB",
        status.artifacts.held,
        mib(status.artifacts.bytes),
        mib(status.artifacts.bytes_max)
    ))?;
    let most = status
        .artifacts
        .dropped_of
        .iter()
        .max_by_key(|(_, count)| **count);
    if let Some((publisher, count)) = most {
        output::data(format_args!(
            "           {} dropped for new ones, {count} of them of {publisher}",
            status.artifacts.dropped
        ))?;
    }
    if let Some(edge) = &status.edge {
        output::data(format_args!(
            "edge       {}, stress {}, rules of registry version {}, steering {}",
            match edge.place.as_str() {
                "kernel" => "in the kernel",
                _ => "user space only: caps and rates, no firewall",
            },
            edge.stress,
            edge.registry_version,
            edge.steering
        ))?;
        if let Some(refused) = &edge.refused {
            output::data(format_args!(
                "           registry version {} is refused: {}",
                refused.registry_version, refused.message
            ))?;
        }
        for (about, why) in &edge.failures {
            output::data(format_args!("           {about}: {why}"))?;
        }
        if !edge.interfaces_gone.is_empty() {
            let gone = edge.interfaces_gone.join(", ");
            output::data(format_args!("           not on {gone}, which is gone"))?;
        }
    }
    for (index, shard) in status.shards.iter().enumerate() {
        output::data(format_args!(
            "shard {index}    connections {}, handshakes {}, QUIC holds {}, chunks free {} of {}",
            shard.connections.saturating_sub(shard.handshakes),
            shard.handshakes,
            ByteSize(shard.quic_heap_bytes),
            shard.chunks_free,
            shard.chunks
        ))?;
        if shard.unread_answer_bytes > 0 {
            output::data(format_args!(
                "           answers that peers have not read hold {}",
                ByteSize(shard.unread_answer_bytes)
            ))?;
        }
        if shard.floods_cut > 0 {
            output::data(format_args!(
                "           closed {} connections whose peers flooded them; see the log",
                shard.floods_cut
            ))?;
        }
    }
    for peer in &status.peers {
        output::data(format_args!(
            "peer       {}  {}  connection {}  {} {} us  sent {:.1} MiB  received {:.1} MiB{}",
            peer.node_id,
            peer.address.as_deref().unwrap_or("-"),
            peer.connection,
            peer.path,
            peer.rtt_us
                .map_or_else(|| "-".to_owned(), |rtt| rtt.to_string()),
            mib(peer.bytes_sent),
            mib(peer.bytes_received),
            match (peer.is_banned, peer.is_asked_last) {
                (true, _) => "  banned: sent other bytes than it was asked for",
                (_, true) => "  asked last: does not serve",
                _ => "",
            },
        ))?;
        if peer.duplicates_refused > 0 {
            output::data(format_args!(
                "           another node has the key of this peer: refused {} times; see the log",
                peer.duplicates_refused
            ))?;
        }
        if peer.frames_held > 0 {
            output::data(format_args!(
                "           this peer sends faster than frames_per_second_max: held back {} times",
                peer.frames_held
            ))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_has_the_unit_that_it_fills() {
        let ages = [
            (0.4, "0 s"),
            (119.9, "119 s"),
            (120.0, "2 minutes"),
            (7_199.0, "119 minutes"),
            (90_000.0, "25 hours"),
            (172_800.0, "2 days"),
        ];
        for (seconds, text) in ages {
            assert_eq!(age_text(seconds), text);
        }
    }
}
