//! `millrace node`: a node from its config, until it is told to stop.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_registry::keys;
use millrace_shards::socket::UdpGroupConfig;
use millrace_tuning::NodeConfig;
use signal_hook::consts::TERM_SIGNALS;
use signal_hook::iterator::Signals;

use crate::admin::{self, Site};
use crate::cli::NodeArgs;
use crate::edge::keeper::{EdgeView, Keeper};
use crate::edge::start::{self, Kept};
use crate::exit::{Exit, Failure};
use crate::load::{Loaded, Paths};
use crate::poller::Poller;
use crate::running::{Running, Start};
use crate::{budget, host_facts, mapping, output, versions};

const ADDRESS_PATIENCE: Duration = Duration::from_secs(3);
const ADDRESS_RETRY: Duration = Duration::from_millis(5);

pub(crate) fn run(args: &NodeArgs) -> Result<Exit, Failure> {
    let (config, paths) = Loaded::read(&args.config)?.usable()?;
    // Before anything starts: a signal from here on stops the node in good order.
    let mut signals =
        Signals::new(TERM_SIGNALS).map_err(|error| Failure::io("signal handlers", &error))?;
    let (node, kept, view) = start(&config, &paths)?;
    let keeper = Keeper::start(Arc::clone(&node), config.clone(), kept, view)?;
    let poller = Poller::start(Arc::clone(&node), config.registry.poll_interval.get())?;
    let site = Site {
        socket: paths.admin_socket.clone(),
        node: Arc::clone(&node),
    };
    let admin = admin::serve(vec![site], &config.admin)?;
    output::message(format_args!(
        "node {} listens on {}, admin socket {}",
        node.node_id(),
        node.address(),
        paths.admin_socket.display()
    ));
    if let Some(signal) = signals.forever().next() {
        output::message(format_args!("signal {signal}: shutting down"));
    }
    drop(admin);
    drop(poller);
    drop(keeper);
    node.transport.shutdown();
    Ok(Exit::Ok)
}

type Started = (Arc<Running>, Kept, Arc<EdgeView>);

fn start(config: &NodeConfig, paths: &Paths) -> Result<Started, Failure> {
    std::fs::create_dir_all(&paths.state_dir)
        .map_err(|error| Failure::io(paths.state_dir.display(), &error))?;
    let identity = keys::read(&paths.key_file)?;
    let versions = versions::of_config(&identity.public_key(), config, &paths.registry_dir)?;
    let versions = Arc::new(versions);
    let cpus = host_facts::usable_cpus();
    output::message(format_args!(
        "memory budget {:.0} MiB; `millrace check` lists its parts",
        budget::of(config, &cpus).total().0 as f64 / f64::from(1 << 20)
    ));
    wait_for_address(config.listen.address);
    let shards = mapping::shards(config, &cpus);
    let udp = UdpGroupConfig {
        local: config.listen.address,
        shards: shards.len(),
        recv_buffer_bytes: to_usize(config.listen.receive_buffer_bytes.bytes()),
        send_buffer_bytes: to_usize(config.listen.send_buffer_bytes.bytes()),
        ..UdpGroupConfig::default()
    };
    let prepared = start::prepare(
        config,
        &udp,
        &versions::firewall(&versions, &config.edge.roles),
    )?;
    let (edge, kept) = prepared.split();
    let view = Arc::new(EdgeView::of(&kept));
    let node = Running::start(Start {
        identity,
        transport: mapping::transport(config),
        shards,
        udp,
        store_bytes: config.artifacts.store_bytes.bytes(),
        body_bytes_max: config.transport.body_bytes_max.bytes(),
        versions,
        edge,
        view: Some(Arc::clone(&view)),
    })?;
    Ok((node, kept, view))
}

/// The kernel tears an io_uring down after its process has ended, and its socket with it: a node that is started
/// right after a `kill -9` finds its address in use for some milliseconds. Whatever stays is reported by the start.
fn wait_for_address(address: SocketAddr) {
    let until = Instant::now() + ADDRESS_PATIENCE;
    while Instant::now() < until {
        match UdpSocket::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => std::thread::sleep(ADDRESS_RETRY),
            _ => return,
        }
    }
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
