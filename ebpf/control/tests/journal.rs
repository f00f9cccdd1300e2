//! What outlives a process: sets, what they were made from, temporary rules.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use millrace_edge::pins::Pins;
use millrace_edge_control::journal::SetRecord;
use millrace_edge_control::plan::SetInputs;
use millrace_edge_control::policy::EdgePolicy;
use millrace_edge_control::{Firewall, Record};
use millrace_edge_policy::rules::{Bounds, Locality, Rule, RuleAction, Temporary, compile};
use millrace_edge_policy::settings::Settings;
use millrace_tuning::NodeConfig;

fn allowing(number: u32, address: &str, tables: Vec<toml::Table>) -> SetRecord {
    let address: IpAddr = address.parse().unwrap();
    let bounds = Bounds {
        rules_max: 1,
        nodes4_max: 100,
        nodes6_max: 100,
    };
    let set = compile(&Settings::default(), &[Rule::members([address])], bounds).unwrap();
    let inputs = SetInputs {
        registry: "ab".into(),
        firewall: Firewall {
            version: 7,
            tables,
            members: vec![address],
            locality: Locality {
                subnet: Some("blue".into()),
                ..Locality::default()
            },
        },
        port: 4100,
        policy: EdgePolicy::of(&NodeConfig::default().edge),
        temporary: vec![Temporary {
            prefix: "192.0.2.0/24".parse().unwrap(),
            action: RuleAction::Deny,
            until_unix_seconds: 1_900_000_000,
        }],
    };
    SetRecord::new(number, &set, inputs)
}

fn pins() -> (tempfile::TempDir, Pins) {
    let folder = tempfile::tempdir().unwrap();
    let pins = Pins::at(folder.path().join("edge"));
    (folder, pins)
}

// Protects the last good set: its rules come back as the registry said them.
#[test]
fn what_a_set_was_made_from_is_read_again() {
    let (_folder, pins) = pins();
    let document = "[[firewall]]\nscope = \"global\"\nports = [80, \"90-99\"]\naction = \"deny\"\n\
                    [[firewall]]\nscope = \"role:gate\"\naction = \"allow\"\n";
    let document = document.parse::<toml::Table>().unwrap();
    let tables = document["firewall"].as_array().unwrap().iter();
    let tables: Vec<_> = tables.map(|t| t.as_table().unwrap().clone()).collect();
    let set = allowing(1, "192.0.2.1", tables.clone());
    Record::update(&pins, &pins.lock().unwrap(), |record| {
        record.keep(set.clone(), 0);
    })
    .unwrap();
    let read = Record::read(&pins).unwrap();
    assert_eq!(read.set(1), Some(&set));
    assert_eq!(read.set(2), None);
    let again = &read.inputs(1).unwrap().firewall;
    assert_eq!((&again.tables, again.version), (&tables, 7));
    assert_eq!(again.locality.subnet.as_deref(), Some("blue"));
}

// Protects `rules`, `trace` and a rollback: the set in force and the newest are kept, whatever
// their numbers.
#[test]
fn sets_that_may_be_in_force_are_kept() {
    let mut record = Record::default();
    for (set, in_force) in [(1, 0), (2, 1), (3, 2), (3, 2)] {
        record.keep(allowing(set, "192.0.2.3", Vec::new()), in_force);
    }
    let numbers =
        |record: &Record| -> Vec<_> { record.sets.iter().map(|set| set.number).collect() };
    assert_eq!(numbers(&record), [2, 3]);
    // Another process has published sets that the journal does not know.
    record.set = 3;
    record.keep(allowing(9, "192.0.2.3", Vec::new()), 8);
    assert_eq!(numbers(&record), [3, 9]);
}

#[test]
fn temporary_rules_end_when_their_time_is_over() {
    let rule = |until_unix_seconds| Temporary {
        prefix: "192.0.2.0/24".parse().unwrap(),
        action: RuleAction::Allow,
        until_unix_seconds,
    };
    let record = Record {
        temporary: vec![rule(100), rule(160)],
        ..Record::default()
    };
    let live =
        |seconds| record.live_temporary(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    assert_eq!(live(99), record.temporary);
    assert_eq!(live(100), [rule(160)]);
    assert_eq!(live(200), []);
}
