//! `millrace xdp`: the edge as an operator attaches, changes and looks at it. What it does is the
//! job of `millrace-edge-control`; arguments, words and tables are here.
//!
//! All commands work on the pins and need no running node: a node that runs sees what they did,
//! because it reads the same journal.

pub(crate) mod args;
mod change;
mod inspect;
mod unapplied;

use millrace_edge::edge::Edge;
use millrace_edge::pins::Pins;
use millrace_edge_control::ControlError;
use millrace_edge_policy::rules::RuleAction;

use crate::exit::{Exit, Failure};
use crate::load::Loaded;
use crate::output;
use args::{XdpCommand, XdpPins};

pub(crate) fn run(command: XdpCommand) -> Result<Exit, Failure> {
    match command {
        XdpCommand::Attach(args) => change::attach(&args),
        XdpCommand::Apply(args) => change::apply(&args),
        XdpCommand::Confirm(args) => change::confirm(&args),
        XdpCommand::Revert(args) => change::revert(&args),
        XdpCommand::Allow(args) => change::temporary(&args, RuleAction::Allow),
        XdpCommand::Deny(args) => change::temporary(&args, RuleAction::Deny),
        XdpCommand::Detach(args) => change::detach(&args),
        XdpCommand::Status(args) => inspect::status(&args),
        XdpCommand::Rules(args) => inspect::rules(&args),
        XdpCommand::Trace(args) => inspect::trace(&args),
        XdpCommand::Events(args) => inspect::events(&args),
    }
}

/// Where the pins are: as the config says, or the command line.
fn pins(at: &XdpPins) -> Result<Pins, Failure> {
    match &at.config {
        None => Ok(Pins::at(&at.pins)),
        Some(file) => {
            let (config, _) = Loaded::read(file)?.usable()?;
            Ok(Pins::at(&config.edge.pins))
        }
    }
}

/// Takes over what is pinned, for a look.
fn look(at: &XdpPins) -> Result<Edge, Failure> {
    Ok(Edge::adopt(&pins(at)?).map_err(ControlError::from)?)
}

/// Takes over what is pinned, for a change: in the edge's own network namespace.
fn adopt(pins: &Pins) -> Result<Edge, ControlError> {
    let edge = Edge::adopt(pins)?;
    edge.check_here()?;
    Ok(edge)
}

/// Says what answers of an edge would go astray.
fn warn_of_offloads(edge: &Edge) {
    for interface in edge.interfaces().unwrap_or_default() {
        if let Some(warning) = millrace_edge::offload::untagged_warning(&interface) {
            output::message(warning);
        }
    }
}
