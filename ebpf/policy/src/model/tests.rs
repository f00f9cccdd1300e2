//! A table of decisions in which every reason occurs, and properties that hold for any frame.

#![allow(clippy::unwrap_used, reason = "test code")]

mod frames;
mod state;
mod table;

use super::{Cookie, Environment, Model};
use crate::reason::Reason;
use crate::settings::{Mode, Scope};
use crate::verdict::{Action, Stamp};
use frames::{NOW_NS, model};
use std::collections::BTreeSet;
use table::cases;

/// A frame, what happened before it, and the reason that it must end with.
struct Case {
    name: &'static str,
    scope: Scope,
    change: fn(&mut Model),
    before: Vec<Vec<u8>>,
    frame: Vec<u8>,
    cookie: Cookie,
    reason: Reason,
    rule: Option<u16>,
}

fn case(name: &'static str, frame: Vec<u8>, reason: Reason) -> Case {
    Case {
        name,
        scope: Scope::Ports,
        change: |_| {},
        before: Vec::new(),
        frame,
        cookie: Cookie::None,
        reason,
        rule: None,
    }
}

impl Case {
    fn after(self, before: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let before = before.into_iter().collect();
        Self { before, ..self }
    }

    fn when(self, change: fn(&mut Model)) -> Self {
        Self { change, ..self }
    }

    fn by_rule(self, rule: u16) -> Self {
        let rule = Some(rule);
        Self { rule, ..self }
    }

    fn of_host(self) -> Self {
        let scope = Scope::Host;
        Self { scope, ..self }
    }

    fn with_cookie(self) -> Self {
        let cookie = Cookie::Given(0x1234_5678);
        Self { cookie, ..self }
    }

    fn with_room(self) -> Self {
        let cookie = Cookie::Room;
        Self { cookie, ..self }
    }
}

#[test]
fn decisions() {
    for mode in [Mode::Enforce, Mode::Count] {
        for case in cases() {
            check(mode, &case);
        }
    }
}

fn check(mode: Mode, case: &Case) {
    let mut model = model(mode, case.scope);
    let environment = Environment {
        now_ns: NOW_NS,
        cookie: case.cookie,
        ..Environment::default()
    };
    (case.change)(&mut model);
    for frame in &case.before {
        model.decide(frame, environment);
    }
    let counted_before = model.counters;
    let decision = model.decide(&case.frame, environment);

    let name = format!("{} in mode {mode:?}", case.name);
    assert_eq!(decision.reason, case.reason, "{name}");
    assert_eq!(decision.rule, case.rule, "{name}");
    let enforce = mode == Mode::Enforce;
    let harmless = case.reason.action() == Action::Pass && case.reason != Reason::PassReject;
    assert_eq!(decision.counted, !enforce && !harmless, "{name}");
    let action = if enforce {
        case.reason.action()
    } else {
        Action::Pass
    };
    assert_eq!(decision.action, action, "{name}");
    let retried = enforce && case.reason == Reason::TxRetry;
    assert_eq!(decision.frame.is_some(), retried, "{name}");
    if decision.action != Action::Pass {
        assert_eq!(decision.stamp, None, "{name}");
    } else if enforce && case.reason == Reason::PassReject {
        assert_eq!(decision.stamp, Some(Stamp::Reject), "{name}");
    } else if decision.service.is_some() {
        assert_eq!(decision.stamp, Some(Stamp::Pass), "{name}");
    }

    let mut expected = counted_before;
    expected[case.reason.index() as usize][usize::from(decision.counted)] += 1;
    assert_eq!(model.counters, expected, "{name}");
}

// Protects the table: a reason that no case ends with would not be tested.
#[test]
fn every_reason_occurs() {
    let found: BTreeSet<_> = cases().iter().map(|case| case.reason).collect();
    let missing: Vec<_> = Reason::ALL
        .iter()
        .filter(|reason| !found.contains(reason))
        .collect();
    // Defects of a kernel: a map that is not there, a frame that cannot be resized.
    assert_eq!(missing, [&Reason::QuicRetryFailed, &Reason::Internal]);
}
