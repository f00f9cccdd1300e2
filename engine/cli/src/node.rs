//! `millrace node`: a node from its config, until it is told to stop.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use millrace_node::edge::{self, EdgeHost};
use millrace_node::{Node, NodeParts, Paths, budget, host, mapping};
use millrace_tuning::NodeConfig;
use signal_hook::consts::TERM_SIGNALS;
use signal_hook::iterator::Signals;

use crate::cli::NodeArgs;
use crate::exit::{Exit, Failure};
use crate::load::Loaded;
use crate::{log, output};

/// The subcommand that is the edge's helper.
const HELPER: &str = "edge-helper";

/// How long a node waits for its address.
const ADDRESS_WAIT: Duration = Duration::from_secs(3);
const ADDRESS_RETRY: Duration = Duration::from_millis(5);

pub(crate) fn run(args: &NodeArgs) -> Result<Exit, Failure> {
    let (config, paths) = Loaded::read(&args.config)?.usable()?;
    // Before anything starts: a signal from here on stops the node in good order.
    let mut signals =
        Signals::new(TERM_SIGNALS).map_err(|error| Failure::io("signal handlers", &error))?;
    let node = start(&config, &paths)?;
    output::message(format_args!(
        "node {} listens on {}, admin socket {}",
        node.id(),
        node.address(),
        paths.admin_socket.display()
    ));
    if let Some(signal) = signals.forever().next() {
        output::message(format_args!("signal {signal}: shutting down"));
    }
    node.shutdown();
    Ok(Exit::Ok)
}

fn start(config: &NodeConfig, paths: &Paths) -> Result<Node, Failure> {
    let mut parts = NodeParts::of_files(config, paths)?;
    let cpus = host::usable_cpus();
    output::message(format_args!(
        "memory budget {:.0} MiB; `millrace check` lists its parts",
        budget::of(config, &cpus).total().0 as f64 / f64::from(1 << 20)
    ));
    wait_for_address(config.listen.address);
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

/// The kernel tears an io_uring down after its process has ended, and its socket with it: a node
/// that is started right after a `kill -9` finds its address in use for some milliseconds. An
/// address that stays in use is reported by the start.
fn wait_for_address(address: SocketAddr) {
    let until = Instant::now() + ADDRESS_WAIT;
    while Instant::now() < until {
        match UdpSocket::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => std::thread::sleep(ADDRESS_RETRY),
            _ => return,
        }
    }
}
