//! The commands of `millrace xdp` that change something.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millrace_edge::edge::{Edge, EdgeError};
use millrace_edge::nft::Nft;
use millrace_edge::pins::{EdgeLock, Pins};
use millrace_edge::publish::Publisher;
use millrace_edge_control::{
    ApplyOptions, ApplyReport, ApplyRequest, ControlError, Firewall, LockedEdge, Record,
};
use millrace_edge_policy::rules::{RuleAction, Temporary};
use millrace_edge_policy::settings::Mode;
use millrace_node::edge::{self, mode};
use millrace_node::{Paths, keys};
use millrace_registry::HostResolver;
use millrace_tuning::{NodeConfig, Period};
use serde::Serialize;

use super::args::{XdpApplyArgs, XdpAttachArgs, XdpPinsArgs, XdpTemporaryArgs};
use super::unapplied::unapplied_keys;
use super::{adopt, pins, warn_of_offloads};
use crate::exit::{Exit, Failure};
use crate::load::Loaded;
use crate::{output, versions};

pub(super) fn attach(args: &XdpAttachArgs) -> Result<Exit, Failure> {
    let (config, paths) = Loaded::read(&args.config)?.usable()?;
    let interfaces = match args.interface.as_slice() {
        [] => &config.edge.interfaces,
        named => named,
    };
    if interfaces.is_empty() {
        let message = "no interface: name one in [edge] interfaces, or with --interface";
        return Err(Failure::new(Exit::Usage, message));
    }
    let pins = Pins::at(&config.edge.pins);
    let request = request(&config, &paths, ApplyOptions::committed(Mode::Count))?;
    let lock = wait(&pins)?;
    match Edge::adopt(&pins) {
        Ok(edge) => {
            edge.check_here().map_err(ControlError::from)?;
            renew(edge, &lock, interfaces, &request, args.json)
        }
        Err(EdgeError::Absent { .. } | EdgeError::Incomplete { .. } | EdgeError::Maps(_)) => {
            let attached = millrace_edge_control::attach(&pins, &lock, interfaces, &request);
            let (edge, report) = attached?;
            warn_of_offloads(&edge);
            say(&edge, &report, args.json)
        }
        Err(error) => Err(ControlError::from(error).into()),
    }
}

/// Gives an edge that is there what it lacks: interfaces, the programs of this binary, a set if the
/// process that attached it died before. What is in force stays.
fn renew(
    mut edge: Edge,
    lock: &EdgeLock,
    interfaces: &[String],
    request: &ApplyRequest,
    json: bool,
) -> Result<Exit, Failure> {
    let mode = request.program.attach_mode();
    let made = edge.renew(interfaces, mode, lock);
    warn_of_offloads(&edge);
    let mut not_added = made.not_added.into_iter();
    if let Some((_, error)) = not_added.next() {
        // The command fails, and what it did all the same is in force.
        for name in &made.added {
            output::message(format_args!("attached to {name}"));
        }
        if matches!(made.reloaded, Some(Ok(()))) {
            output::message("the programs are those of this binary now");
        }
        for (name, error) in not_added {
            output::message(format_args!("not attached to {name}: {error}"));
        }
        return Err(ControlError::from(error).into());
    }
    let reloaded = made.reloaded.transpose().map_err(ControlError::from)?;
    let config = Publisher::new(edge.maps()).config();
    if config.set == 0 {
        let nft = Nft::of(edge.pins());
        let report = LockedEdge::new(&edge, lock, &nft).apply(request)?;
        return say(&edge, &report, json);
    }
    let interfaces = edge.interfaces().map_err(ControlError::from)?;
    let renewed = Renewed {
        set: config.set,
        mode: Publisher::new(edge.maps()).mode().word(),
        interfaces: interfaces.into_iter().map(|known| known.name).collect(),
        added: made.added,
        reloaded: reloaded.is_some(),
    };
    if json {
        output::json(&renewed)?;
        return Ok(Exit::Ok);
    }
    let added = match renewed.added.as_slice() {
        [] => "no interface added".to_owned(),
        added => format!("now on {} as well", added.join(", ")),
    };
    let programs = if renewed.reloaded {
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

pub(super) fn apply(args: &XdpApplyArgs) -> Result<Exit, Failure> {
    let (config, paths) = Loaded::read(&args.config)?.usable()?;
    let pins = Pins::at(&config.edge.pins);
    if let Some(period) = args.confirm {
        at_least_a_second("--confirm", period)?;
    }
    let options = ApplyOptions {
        confirm_within: args.confirm.map(Period::get),
        or_last_good: args.last_good,
        ..ApplyOptions::committed(mode(args.mode.unwrap_or(config.edge.mode)))
    };
    let lock = wait(&pins)?;
    let edge = adopt(&pins)?;
    let request = request(&config, &paths, options)?;
    let report = LockedEdge::new(&edge, &lock, &Nft::of(&pins)).apply(&request)?;
    let interfaces = edge.interfaces().map_err(ControlError::from)?;
    let mut keys = Vec::new();
    for (key, how) in unapplied_keys(&config.edge, &Record::read(&pins)?, &interfaces) {
        output::message(format_args!(
            "warning: [edge] {key} differs from what runs, and `apply` does not change it; {how}"
        ));
        keys.push(key);
    }
    if let Some(period) = args.confirm {
        output::message(format_args!(
            "to be confirmed: `millrace xdp confirm` within {period} keeps it, else the kernel goes back"
        ));
    }
    say_applied(&edge, &report, args.confirm, keys, args.json)
}

/// What config and registry folder say now.
fn request(
    config: &NodeConfig,
    paths: &Paths,
    options: ApplyOptions,
) -> Result<ApplyRequest, Failure> {
    let port = config.listen.address.port();
    Ok(ApplyRequest::new(
        config,
        port,
        firewall(config, paths)?,
        options,
    ))
}

/// What the registry folder says to this node.
fn firewall(config: &NodeConfig, paths: &Paths) -> Result<Firewall, Failure> {
    let identity = keys::read(&paths.key_file)?;
    let versions = versions::of_config(&identity.public_key(), config, paths)?;
    // A node that runs keeps the rules of names fresh.
    versions.resolve_all(&HostResolver);
    Ok(edge::firewall(&versions, &config.edge.roles))
}

/// The lock, once the process that has it is done.
fn wait(pins: &Pins) -> Result<EdgeLock, Failure> {
    Ok(pins.lock_waiting().map_err(ControlError::from)?)
}

/// Shorter, it would be over before an operator could look.
fn at_least_a_second(option: &str, period: Period) -> Result<(), Failure> {
    if period.get() < Duration::from_secs(1) {
        let message = format!("{option} {period}: at least 1s");
        return Err(Failure::new(Exit::Usage, message));
    }
    Ok(())
}

/// What a command that applies prints as JSON.
#[derive(Serialize)]
struct Applied<'r> {
    #[serde(flatten)]
    report: &'r ApplyReport,
    interfaces: Vec<String>,
    /// How long the kernel waits for a confirmation.
    confirm_within_seconds: Option<f64>,
    /// Keys of `[edge]` that differ from what runs, and that `apply` does not change.
    unapplied_keys: Vec<&'static str>,
}

fn say(edge: &Edge, report: &ApplyReport, json: bool) -> Result<Exit, Failure> {
    say_applied(edge, report, None, Vec::new(), json)
}

fn say_applied(
    edge: &Edge,
    report: &ApplyReport,
    confirm: Option<Period>,
    unapplied_keys: Vec<&'static str>,
    json: bool,
) -> Result<Exit, Failure> {
    let interfaces = edge.interfaces().map_err(ControlError::from)?;
    let interfaces: Vec<_> = interfaces.into_iter().map(|known| known.name).collect();
    if let Some(refused) = &report.refused {
        output::message(format_args!(
            "warning: registry version {} is refused, the rules of version {} stay: {}",
            refused.registry_version, report.registry_version, refused.message
        ));
    }
    if json {
        output::json(&Applied {
            report,
            interfaces,
            confirm_within_seconds: confirm.map(|period| period.get().as_secs_f64()),
            unapplied_keys,
        })?;
    } else {
        output::data(format_args!(
            "set {} in force: mode {}, registry version {}, {} inbound rules, on {}",
            report.set,
            report.mode,
            report.registry_version,
            report.rules,
            interfaces.join(", ")
        ))?;
    }
    Ok(Exit::Ok)
}

pub(super) fn confirm(args: &XdpPinsArgs) -> Result<Exit, Failure> {
    let pins = pins(&args.at)?;
    let lock = wait(&pins)?;
    let edge = adopt(&pins)?;
    let set = LockedEdge::new(&edge, &lock, &Nft::of(&pins)).confirm()?;
    plain(args.json, "confirmed", set)
}

pub(super) fn revert(args: &XdpPinsArgs) -> Result<Exit, Failure> {
    let pins = pins(&args.at)?;
    let lock = wait(&pins)?;
    let edge = Edge::adopt(&pins).map_err(ControlError::from)?;
    let set = LockedEdge::new(&edge, &lock, &Nft::of(&pins)).revert()?;
    plain(args.json, "reverted", set)
}

pub(super) fn detach(args: &XdpPinsArgs) -> Result<Exit, Failure> {
    let pins = pins(&args.at)?;
    let lock = wait(&pins)?;
    let present = pins.is_present();
    let elsewhere = Edge::may_detach(&pins).map_err(ControlError::from)?;
    millrace_edge_control::detach(&pins, &lock)?;
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

pub(super) fn temporary(args: &XdpTemporaryArgs, action: RuleAction) -> Result<Exit, Failure> {
    at_least_a_second("--for", args.period)?;
    let (config, paths) = Loaded::read(&args.config)?.usable()?;
    let pins = Pins::at(&config.edge.pins);
    let lock = wait(&pins)?;
    let edge = adopt(&pins)?;
    let options = ApplyOptions::committed(Publisher::new(edge.maps()).mode());
    let request = request(&config, &paths, options)?;
    let nft = Nft::of(&pins);
    let locked = LockedEdge::new(&edge, &lock, &nft);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let until = now.saturating_add(args.period.get()).as_secs();
    let rule = Temporary::new(args.prefix, action, until);
    let report = locked.add_temporary(rule, request)?;
    let lease_until_ns = edge.maps().control.load(0).lease_until_ns;
    if lease_until_ns <= millrace_edge::clock::now_ns() {
        output::message(format_args!(
            "no node runs: the rule holds past its time, until a node runs again or `millrace xdp apply` is called"
        ));
    }
    say(&edge, &report, args.json)
}

fn plain(json: bool, what: &'static str, set: u32) -> Result<Exit, Failure> {
    if json {
        output::json(&serde_json::json!({ "done": what, "set": set }))?;
    } else {
        output::data(what)?;
    }
    Ok(Exit::Ok)
}
