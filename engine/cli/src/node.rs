//! `millrace node`: a node from its config, until it is told to stop.

use std::process::Command;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use millrace_node::edge::{self, EdgeHost};
use millrace_node::{Node, NodeParts, NotReady, Paths, address, budget, host, mapping};
use millrace_tuning::NodeConfig;
use signal_hook::consts::TERM_SIGNALS;
use signal_hook::iterator::Signals;

use crate::cli::NodeArgs;
use crate::exit::{Exit, Failure};
use crate::load::Loaded;
use crate::{log, output};

/// The subcommand that is the edge's helper.
const HELPER: &str = "edge-helper";

/// How often the node is asked whether its shards live.
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);

pub(crate) fn run(args: &NodeArgs) -> Result<Exit, Failure> {
    let (config, paths) = Loaded::read(&args.config)?.usable()?;
    // Before anything starts: a signal from here on stops the node in good order.
    let signals =
        Signals::new(TERM_SIGNALS).map_err(|error| Failure::io("signal handlers", &error))?;
    let node = start(&config, &paths)?;
    output::message(format_args!(
        "node {} listens on {}, admin socket {}",
        node.id(),
        node.address(),
        paths.admin_socket.display()
    ));
    let end = wait_for_end(&hear(signals)?, HEALTH_INTERVAL, || node.health());
    if let Ok(signal) = end {
        output::message(format_args!("signal {signal}: shutting down"));
    }
    node.shutdown();
    end.map(|_| Exit::Ok)
        .map_err(|error| Failure::new(Exit::Failed, error.to_string()))
}

/// Sends the first signal.
fn hear(mut signals: Signals) -> Result<Receiver<i32>, Failure> {
    let (sender, receiver) = sync_channel(1);
    std::thread::Builder::new()
        .name("millrace-signal".into())
        .spawn(move || {
            for signal in signals.forever().take(1) {
                // Main does not listen when it ends by itself.
                let _ = sender.send(signal);
            }
        })
        .map_err(|error| Failure::io("the thread of the signals", &error))?;
    Ok(receiver)
}

/// Waits for a signal, and looks at the node's health once an `interval`: a service manager
/// restarts what ends with a failure, and not what runs without a shard.
fn wait_for_end(
    signals: &Receiver<i32>,
    interval: Duration,
    health: impl Fn() -> Result<(), NotReady>,
) -> Result<i32, NotReady> {
    loop {
        if let Ok(signal) = signals.recv_timeout(interval) {
            return Ok(signal);
        }
        health()?;
    }
}

fn start(config: &NodeConfig, paths: &Paths) -> Result<Node, Failure> {
    // The lock of the state folder, then the address, then the sockets: a second process of this
    // node ends before the first could notice it.
    let mut parts = NodeParts::of_files(config, paths)?;
    // Before the edge changes anything in the kernel.
    parts.obstacles(config)?;
    let cpus = host::usable_cpus();
    output::message(format_args!(
        "memory budget {:.0} MiB; `millrace check` lists its parts",
        budget::of(config, &cpus).total().0 as f64 / f64::from(1 << 20)
    ));
    address::wait_until_free(config.listen.address)?;
    let shards = mapping::shards(config, &cpus).len();
    let host = EdgeHost {
        helper: helper(),
        notify: &mut |line| output::message(line),
    };
    parts.edge = Some(edge::prepare(config, shards, &parts.versions, host)?);
    // The capabilities are dropped now, and no shard runs yet.
    log::start_writer().map_err(|error| Failure::io("the thread of the log", &error))?;
    Ok(Node::start(config, parts)?)
}

/// This binary as the edge's helper.
pub(crate) fn helper() -> Option<Command> {
    let program = std::env::current_exe()
        .inspect_err(|error| {
            tracing::warn!(%error, "no helper: nftables and programs stay as they are");
        })
        .ok()?;
    let mut command = Command::new(program);
    command.arg(HELPER);
    Some(command)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const INTERVAL: Duration = Duration::from_millis(1);

    // Protects operators who count on a restart: a node without one of its shards does not run on.
    #[test]
    fn a_node_whose_shard_ended_ends_without_a_signal() {
        let (_open, signals) = sync_channel(1);
        let asked = Cell::new(0);
        let ended = NotReady::ShardEnded { shard: 1 };
        let health = || {
            asked.set(asked.get() + 1);
            if asked.get() < 3 { Ok(()) } else { Err(ended) }
        };
        assert_eq!(wait_for_end(&signals, INTERVAL, health), Err(ended));
        assert_eq!(asked.get(), 3);
    }

    #[test]
    fn a_signal_ends_a_node_that_is_well() {
        let (sender, signals) = sync_channel(1);
        sender.send(15).unwrap();
        assert_eq!(wait_for_end(&signals, INTERVAL, || Ok(())), Ok(15));
    }
}
