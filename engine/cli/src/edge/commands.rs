//! The commands of `millrace xdp` that change something.
//!
//! All of them work on the pins and need no running node: a node that runs sees what they did, because it reads the same state.

use std::time::{Duration, SystemTime};

use ipnet::{IpNet, Ipv4Net};
use millrace_edge::edge::{AttachOptions, Edge, EdgeError};
use millrace_edge::load::LoadOptions;
use millrace_edge::nft::Nft;
use millrace_edge::pins::Pins;
use millrace_edge::publish::{PublishError, Publisher};
use millrace_edge::state::AttachMode;
use millrace_edge_policy::rules::{RuleAction, Temporary};
use millrace_edge_policy::settings::Mode;
use millrace_node::{Paths, keys};
use millrace_tuning::config::XdpMode;
use millrace_tuning::{NodeConfig, Period};
use serde::Serialize;

use super::force::{self, Done, Order, Turn};
use super::plan::Firewall;
use super::{applied, plan, sets, show};
use crate::cli::{
    XdpApplyArgs, XdpAttachArgs, XdpCommand, XdpPlace, XdpPlaceArgs, XdpTemporaryArgs,
};
use crate::exit::{Exit, Failure};
use crate::load::Loaded;
use crate::{output, versions};

pub(crate) fn run(command: XdpCommand) -> Result<Exit, Failure> {
    match command {
        XdpCommand::Attach(args) => attach(&args),
        XdpCommand::Apply(args) => apply(&args),
        XdpCommand::Confirm(args) => confirm(&args),
        XdpCommand::Revert(args) => revert(&args),
        XdpCommand::Allow(args) => temporary(&args, RuleAction::Allow),
        XdpCommand::Deny(args) => temporary(&args, RuleAction::Deny),
        XdpCommand::Detach(args) => detach(&args),
        XdpCommand::Status(args) => show::status(&args),
        XdpCommand::Rules(args) => show::rules(&args),
        XdpCommand::Trace(args) => show::trace(&args),
        XdpCommand::Events(args) => show::events(&args),
    }
}

fn attach(args: &XdpAttachArgs) -> Result<Exit, Failure> {
    let (config, paths) = Loaded::read(&args.config)?.usable()?;
    let mut options = attach_options(&config);
    if !args.interface.is_empty() {
        options.interfaces.clone_from(&args.interface);
    }
    if options.interfaces.is_empty() {
        let message = "no interface: name one in [edge] interfaces, or with --interface";
        return Err(Failure::new(Exit::Usage, message));
    }
    let pins = Pins::at(&config.edge.pins);
    let turn = Turn::wait(&pins)?;
    let edge = match Edge::attach(&pins, &options) {
        Err(EdgeError::Present { .. }) => {
            return renew(&pins, &turn, &options, &config, &paths, args.json);
        }
        attached => attached.map_err(|error| of_edge(&error))?,
    };
    let attached = put(&edge, &turn, &config, &paths, How::good(Mode::Count));
    if attached.is_err() {
        // Half an edge would be worse than none. The first error is the one to tell.
        let _ = force::take_away(&pins, &turn);
    }
    let done = attached?;
    show::warn_of_offloads(&edge);
    say(&done, args.json)
}

/// Gives an edge that is there what it lacks: interfaces, the programs of this binary, a set if whoever attached it died before. What is in
/// force stays.
fn renew(
    pins: &Pins,
    turn: &Turn,
    options: &AttachOptions,
    config: &NodeConfig,
    paths: &Paths,
    json: bool,
) -> Result<Exit, Failure> {
    let mut edge = adopt(pins)?;
    let interfaces = edge.interfaces().map_err(|error| of_edge(&error))?;
    let is_live = |name: &str| {
        let mut known = interfaces.iter().filter(|known| known.name == name);
        known.any(|known| edge.is_live(known))
    };
    let mut added = options.interfaces.clone();
    added.retain(|name| !is_live(name));
    for name in &added {
        edge.attach_interface(name, options.mode)
            .map_err(|error| of_edge(&error))?;
    }
    show::warn_of_offloads(&edge);
    let reloaded = !edge.is_current();
    if reloaded {
        edge.reload().map_err(|error| of_edge(&error))?;
    }
    if Publisher::new(edge.maps()).config().set == 0 {
        let done = put(&edge, turn, config, paths, How::good(Mode::Count))?;
        return say(&done, json);
    }
    let interfaces = edge.interfaces().map_err(|error| of_edge(&error))?;
    let config = Publisher::new(edge.maps()).config();
    let renewed = Renewed {
        set: config.set,
        mode: show::mode_of(config.mode),
        interfaces: interfaces.into_iter().map(|known| known.name).collect(),
        added,
        reloaded,
    };
    if json {
        output::json(&renewed)?;
        return Ok(Exit::Ok);
    }
    let added = match renewed.added.as_slice() {
        [] => "no interface added".to_owned(),
        added => format!("now on {} as well", added.join(", ")),
    };
    let programs = if reloaded {
        "programs replaced by those of this version"
    } else {
        "programs are those of this version"
    };
    output::data(format_args!(
        "attached already: {added}; {programs}; set {} stays in force, mode {}, on {}",
        renewed.set,
        renewed.mode,
        renewed.interfaces.join(", ")
    ))?;
    Ok(Exit::Ok)
}

/// What `attach` made of an edge that was there.
#[derive(Debug, Serialize)]
struct Renewed {
    set: u32,
    mode: &'static str,
    interfaces: Vec<String>,
    added: Vec<String>,
    reloaded: bool,
}

/// Takes over what is pinned, for a command that changes more than the pins: in the edge's own network namespace.
fn adopt(pins: &Pins) -> Result<Edge, Failure> {
    Edge::adopt(pins)
        .and_then(|edge| edge.check_here().map(|()| edge))
        .map_err(|error| of_edge(&error))
}

fn apply(args: &XdpApplyArgs) -> Result<Exit, Failure> {
    let (config, paths) = Loaded::read(&args.config)?.usable()?;
    let pins = Pins::at(&config.edge.pins);
    if let Some(period) = args.confirm {
        at_least_a_second("--confirm", period)?;
    }
    let turn = Turn::wait(&pins)?;
    let edge = adopt(&pins)?;
    let how = How {
        mode: plan::mode(args.mode.unwrap_or(config.edge.mode)),
        probation: args.confirm.map(Period::get),
        or_last_good: args.last_good,
    };
    let mut done = put(&edge, &turn, &config, &paths, how)?;
    for (key, how) in applied::left_alone(&config, &force::read_state(&pins)?) {
        output::message(format_args!(
            "warning: [edge] {key} differs from what runs, and `apply` does not change it; {how}"
        ));
        done.left_alone.push(key);
    }
    if let Some(period) = how.probation {
        output::message(format_args!(
            "on probation: `millrace xdp confirm` within {period:?} keeps it, else the kernel goes back"
        ));
    }
    say(&done, args.json)
}

/// How a command puts a set in force.
#[derive(Debug, Clone, Copy)]
struct How {
    mode: Mode,
    probation: Option<Duration>,
    or_last_good: bool,
}

impl How {
    /// For good, and only with good rules.
    fn good(mode: Mode) -> Self {
        Self {
            mode,
            probation: None,
            or_last_good: false,
        }
    }
}

/// Puts in force what config and registry folder say now.
fn put(
    edge: &Edge,
    turn: &Turn,
    config: &NodeConfig,
    paths: &Paths,
    how: How,
) -> Result<Done, Failure> {
    let order = Order {
        config,
        port: config.listen.address.port(),
        firewall: &firewall(config, paths)?,
        mode: how.mode,
        probation: how.probation,
        or_last_good: how.or_last_good,
        anew: true,
    };
    let nft = Nft::of(edge.pins());
    let planned = force::plan(edge, turn, &order, &nft)?;
    force::put(edge, turn, &order, planned, &nft)
}

/// What the registry folder says to this node.
fn firewall(config: &NodeConfig, paths: &Paths) -> Result<Firewall, Failure> {
    let identity = keys::read(&paths.key_file)?;
    let versions = versions::of_config(&identity.public_key(), config, &paths.registry_dir)?;
    Ok(versions::firewall(&versions, &config.edge.roles))
}

/// Puts in force what is so already, with the temporary rules of now: neither what the registry nor what the config says since.
fn put_again(
    edge: &Edge,
    turn: &Turn,
    config: &NodeConfig,
    paths: &Paths,
) -> Result<Done, Failure> {
    let publisher = Publisher::new(edge.maps());
    let set = publisher.config().set;
    let origin = sets::origin(edge.pins(), set);
    let as_applied = origin.and_then(|origin| Some((origin.applied.onto(config)?, origin)));
    let Some((config, origin)) = as_applied else {
        let message =
            format!("nobody wrote down what set {set} was made from; `millrace xdp apply` does");
        return Err(Failure::new(Exit::Failed, message));
    };
    let order = Order {
        config: &config,
        port: origin.applied.port,
        firewall: &origin.firewall(&firewall(&config, paths)?),
        mode: publisher.mode(),
        probation: None,
        or_last_good: false,
        anew: false,
    };
    let nft = Nft::of(edge.pins());
    let planned = force::plan(edge, turn, &order, &nft)?;
    force::put(edge, turn, &order, planned, &nft)
}

/// Shorter, it would be over before anybody could look.
fn at_least_a_second(option: &str, period: Period) -> Result<(), Failure> {
    if period.get() < Duration::from_secs(1) {
        let message = format!("{option} {period}: at least 1s");
        return Err(Failure::new(Exit::Usage, message));
    }
    Ok(())
}

/// The IPv4 prefix that an IPv6 one stands for: packets of IPv4 have no other.
fn unmapped(prefix: IpNet) -> IpNet {
    const MAPPED_BITS: u8 = 96;
    let IpNet::V6(v6) = prefix else {
        return prefix;
    };
    let bits = v6.prefix_len().checked_sub(MAPPED_BITS);
    let v4 = v6.network().to_ipv4_mapped().zip(bits);
    v4.and_then(|(network, bits)| Ipv4Net::new(network, bits).ok())
        .map_or(prefix, IpNet::V4)
}

fn say(done: &Done, json: bool) -> Result<Exit, Failure> {
    if let Some(refused) = &done.refused {
        output::message(format_args!(
            "warning: registry version {} is refused, the rules of version {} stay: {}",
            refused.registry_version, done.registry_version, refused.message
        ));
    }
    if json {
        output::json(done)?;
    } else {
        output::data(format_args!(
            "set {} in force: mode {}, registry version {}, {} inbound rules, on {}",
            done.set,
            done.mode,
            done.registry_version,
            done.rules,
            done.interfaces.join(", ")
        ))?;
    }
    Ok(Exit::Ok)
}

fn confirm(args: &XdpPlaceArgs) -> Result<Exit, Failure> {
    let pins = pins(&args.place)?;
    let turn = Turn::wait(&pins)?;
    let edge = adopt(&pins)?;
    let set = force::confirm(&edge, &turn, &Nft::of(&pins))?;
    plain(args.json, "confirmed", set)
}

fn revert(args: &XdpPlaceArgs) -> Result<Exit, Failure> {
    let pins = pins(&args.place)?;
    let turn = Turn::wait(&pins)?;
    let edge = Edge::adopt(&pins).map_err(|error| of_edge(&error))?;
    let set = force::revert(&edge, &turn)?;
    plain(args.json, "reverted", set)
}

fn detach(args: &XdpPlaceArgs) -> Result<Exit, Failure> {
    let pins = pins(&args.place)?;
    let turn = Turn::wait(&pins)?;
    let present = pins.is_present();
    let elsewhere = Edge::may_detach(&pins).map_err(|error| of_edge(&error))?;
    force::take_away(&pins, &turn)?;
    if let Some(namespace) = elsewhere {
        output::message(format_args!(
            "it was attached in another network namespace, {namespace}; if that is still there, its ports are closed until \
             `nft delete table inet {}` there",
            Nft::of(&pins).table
        ));
    }
    if !present {
        output::message(format_args!(
            "nothing of this version was pinned at {}",
            pins.root().display()
        ));
    }
    plain(args.json, "detached", 0)
}

fn temporary(args: &XdpTemporaryArgs, action: RuleAction) -> Result<Exit, Failure> {
    at_least_a_second("--for", args.period)?;
    let (config, paths) = Loaded::read(&args.config)?.usable()?;
    let pins = Pins::at(&config.edge.pins);
    let turn = Turn::wait(&pins)?;
    let edge = adopt(&pins)?;
    // What waits for its table is in force in the kernel: this goes on from there.
    force::finish(&edge, &turn, &Nft::of(&pins))?;
    let mut state = force::read_state(edge.pins())?;
    let before = state.temporary.clone();
    let now = SystemTime::now();
    state.expire(now);
    let until = plan::unix_seconds(now).saturating_add(args.period.get().as_secs());
    let prefix = unmapped(args.prefix).trunc();
    state.temporary.retain(|rule| rule.prefix != prefix);
    state.temporary.push(Temporary {
        prefix,
        action,
        until_unix_seconds: until,
    });
    force::write_state(edge.pins(), &state)?;
    let before_set = Publisher::new(edge.maps()).config().set;
    let done = put_again(&edge, &turn, &config, &paths);
    if done.is_err() && Publisher::new(edge.maps()).config().set == before_set {
        // Or it would come with the next set. The first error is the one to tell.
        let _ = force::read_state(edge.pins()).and_then(|mut state| {
            state.temporary = before;
            force::write_state(edge.pins(), &state)
        });
    }
    let done = done?;
    let lease_until_ns = edge.maps().control.load(0).lease_until_ns;
    if lease_until_ns <= millrace_edge::clock::now_ns() {
        output::message(format_args!(
            "no node runs: the rule holds past its time, until a node runs again or `millrace xdp apply` is called"
        ));
    }
    say(&done, args.json)
}

fn plain(json: bool, what: &'static str, set: u32) -> Result<Exit, Failure> {
    if json {
        output::json(&serde_json::json!({ "done": what, "set": set }))?;
    } else {
        output::data(what)?;
    }
    Ok(Exit::Ok)
}

/// Where the pins are: as the config says, or the command line.
pub(crate) fn pins(place: &XdpPlace) -> Result<Pins, Failure> {
    match &place.config {
        None => Ok(Pins::at(&place.pins)),
        Some(file) => {
            let (config, _) = Loaded::read(file)?.usable()?;
            Ok(Pins::at(&config.edge.pins))
        }
    }
}

/// How to attach what a config asks for.
pub(crate) fn attach_options(config: &NodeConfig) -> AttachOptions {
    let edge = &config.edge;
    AttachOptions {
        interfaces: edge.interfaces.clone(),
        mode: match edge.xdp {
            XdpMode::Auto => AttachMode::Auto,
            XdpMode::Native => AttachMode::Native,
            XdpMode::Generic => AttachMode::Generic,
        },
        sizes: LoadOptions {
            trie_nodes4: plan::to_u32(edge.trie_nodes_max),
            trie_nodes6: plan::to_u32(edge.trie_nodes_max),
            limiter_buckets: plan::to_u32(edge.limiter_buckets),
            rules_max: plan::to_u32(edge.rules_max),
            peers_max: plan::to_u32(edge.peers_max),
            sources_max: plan::to_u32(edge.sources_max),
            ..LoadOptions::default()
        },
    }
}

/// An error of the edge, with the exit code that fits it.
pub(crate) fn of_edge(error: &EdgeError) -> Failure {
    let not_permitted = !millrace_edge::privileges::missing().is_empty();
    let exit = match error {
        EdgeError::Absent { .. } => Exit::NotRunning,
        EdgeError::Publish(PublishError::Probation { .. } | PublishError::NoProbation) => {
            Exit::Failed
        }
        _ if not_permitted => Exit::NotPermitted,
        _ => Exit::Failed,
    };
    Failure::new(exit, error.to_string())
}
