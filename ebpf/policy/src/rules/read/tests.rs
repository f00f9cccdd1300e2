//! Rules that are refused, and the words of the errors.

#![allow(clippy::unwrap_used, reason = "test code")]

use crate::rules::{RuleSet, RulesError, User};

// Protects the operator: an error says where, what and what to do, and nothing of the set is used.
#[test]
fn invalid_rules_refuse_the_set() {
    let cases = [
        ("scope = 'global'", "action", "(absent)", "is missing"),
        ("action = 'deny'", "scope", "(absent)", "is missing"),
        ("scope = 'galaxy'", "scope", "\"galaxy\"", "\"global\""),
        ("scope = 'node:'", "scope", "\"node:\"", "names nothing"),
        ("scope = 'user:7'", "scope", "\"user:7\"", "is no scope"),
        ("scope = 7", "scope", "7", "is integer, not text"),
        ("action = 'drop'", "action", "\"drop\"", "\"reject\""),
        (
            "prefixes = '10.0.0.0/8'",
            "prefixes",
            "\"10.0.0.0/8\"",
            "not a list",
        ),
        (
            "prefixes = ['10.0.0.0/33']",
            "prefixes",
            "[\"10.0.0.0/33\"]",
            "is no prefix",
        ),
        (
            "prefixes = ['10.0.0.1']",
            "prefixes",
            "[\"10.0.0.1\"]",
            "write \"10.0.0.1/32\"",
        ),
        (
            "prefixes = ['10.0.0.1/8']",
            "prefixes",
            "[\"10.0.0.1/8\"]",
            "write \"10.0.0.0/8\"",
        ),
        (
            "prefixes = ['::ffff:10.0.0.0/104']",
            "prefixes",
            "104\"]",
            "IPv4 prefix",
        ),
        (
            "prefixes = ['here']",
            "prefixes",
            "[\"here\"]",
            "2001:db8::/32",
        ),
        ("ports = []", "ports", "[]", "leave ports out"),
        ("ports = [0]", "ports", "[0]", "1 to 65535"),
        ("ports = [65536]", "ports", "[65536]", "1 to 65535"),
        ("ports = ['0-10']", "ports", "[\"0-10\"]", "1 to 65535"),
        (
            "ports = ['8100-8000']",
            "ports",
            "[\"8100-8000\"]",
            "write \"8000-8100\"",
        ),
        ("ports = ['http']", "ports", "[\"http\"]", "1 to 65535"),
        (
            "protocol = 'icmp'",
            "protocol",
            "\"icmp\"",
            "\"udp\" or \"tcp\"",
        ),
        (
            "direction = 'both'",
            "direction",
            "\"both\"",
            "\"outbound\"",
        ),
        (
            "user = 'root'",
            "user",
            "\"root\"",
            "inbound packet has no user",
        ),
        (
            "direction = 'outbound'\nuser = 'a;b'",
            "user",
            "\"a;b\"",
            "is no name of a user",
        ),
        ("comment = \"two\\nlines\"", "comment", "two", "one line"),
        (
            "prefix = ['10.0.0.0/8']",
            "prefix",
            "10.0.0.0/8",
            "is no key of a rule",
        ),
    ];
    for (changed, bad_field, bad_value, words) in cases {
        let mut table: toml::Table = "scope = 'global'\naction = 'deny'".parse().unwrap();
        let changed: toml::Table = changed.parse().unwrap();
        if bad_value == "(absent)" {
            table = changed;
        } else {
            table.extend(changed);
        }
        let good: toml::Table = "scope = 'global'\naction = 'allow'".parse().unwrap();
        let error = RuleSet::read(12, &[good, table]).unwrap_err();
        let RulesError::Rule {
            version,
            number,
            field,
            value,
            ..
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!((*version, *number, field.as_str()), (12, 2, bad_field));
        let text = error.to_string();
        assert!(value.contains(bad_value), "{text}");
        assert!(
            text.starts_with("registry version 12, firewall rule 2: "),
            "{text}"
        );
        assert!(text.contains(words), "{text}");
        assert_eq!(error.reason(), "rules_invalid");
    }
    let long = format!("scope = 'global'\naction = '{}'", "x".repeat(500));
    let error = RuleSet::read(1, &[long.parse().unwrap()]).unwrap_err();
    assert!(error.to_string().len() < 300, "{error}");
}

#[test]
fn users_are_names_or_numbers() {
    for name in ["root", "1000", "_apt", "systemd-network", "a.b"] {
        assert_eq!(User::try_from(name.to_owned()).unwrap().as_str(), name);
    }
    for name in ["", "-x", "a b", "a\"", "{", &"x".repeat(33)] {
        assert!(User::try_from(name.to_owned()).is_err(), "{name}");
    }
}
