use super::*;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn ip(last: u8) -> IpAddr {
    [192, 0, 2, last].into()
}

fn found(lasts: &[u8]) -> Result<Found, String> {
    let addresses = lasts.iter().map(|last| ip(*last)).collect();
    Ok(Found {
        addresses,
        ttl: None,
    })
}

fn failed() -> Result<Found, String> {
    Err("no such host".into())
}

/// One name whose first lookup is under way.
fn one() -> (Names, HostName, Instant) {
    let (mut names, a, now) = (Names::default(), host("a.example"), Instant::now());
    names.want([&a], now);
    assert_eq!(names.next_lookup(now), Some(a.clone()));
    (names, a, now)
}

// Protects connections: a resolver that fails takes no address away, and is told of once.
#[test]
fn a_failing_lookup_keeps_what_is_known_and_is_told_once() {
    let (mut names, a, mut now) = one();
    let failing = |kept| {
        let reason = "no such host".into();
        Some(Change::Failing { reason, kept })
    };
    // What the lookup ends in; is it new, the change of state, the seconds to the next lookup.
    let table = [
        (failed(), false, failing(0), 5),
        (failed(), false, None, 5),
        (found(&[1, 2]), true, Some(Change::Resolved), 60),
        (found(&[2, 1]), false, None, 60),
        (failed(), false, failing(2), 5),
        (failed(), false, None, 5),
        (found(&[1, 2]), false, Some(Change::Resolved), 60),
        (found(&[3]), true, None, 60),
    ];
    for (step, (end, is_new, change, seconds)) in table.into_iter().enumerate() {
        let ended = names.ended(&a, end, now);
        assert_eq!(ended, Ended { is_new, change }, "step {step}");
        assert_eq!(
            names.poll_timeout(),
            Some(now + seconds * SECOND),
            "step {step}"
        );
        assert_eq!(names.next_lookup(now), None, "step {step}");
        now += seconds * SECOND;
        assert_eq!(names.next_lookup(now), Some(a.clone()), "step {step}");
    }
    let listed = [
        "[2001:db8::1]:7",
        "a.example:8",
        "192.0.2.3:8",
        "b.example:9",
    ];
    let listed = listed.map(|text| text.parse().unwrap());
    let resolved = names.resolve(&listed).into_iter().map(|a| a.to_string());
    assert_eq!(
        resolved.collect::<Vec<_>>(),
        ["[2001:db8::1]:7", "192.0.2.3:8"]
    );
}

#[test]
fn a_time_to_live_and_a_node_that_is_away_bring_the_next_lookup_forward() {
    let (mut names, a, now) = one();
    for (ttl, seconds) in [(None, 60), (Some(0), 5), (Some(20), 20), (Some(3_600), 60)] {
        let addresses = vec![ip(1)];
        let ttl = ttl.map(Duration::from_secs);
        names.ended(&a, Ok(Found { addresses, ttl }), now);
        assert_eq!(
            names.poll_timeout(),
            Some(now + seconds * SECOND),
            "{ttl:?}"
        );
    }
    names.set_urgent(|host| *host == a);
    assert_eq!(names.poll_timeout(), Some(now + 5 * SECOND));
    names.set_urgent(|_| false);
    assert_eq!(names.poll_timeout(), Some(now + 60 * SECOND));
}

#[test]
fn a_lookup_that_hangs_counts_as_failed_and_takes_its_place_until_it_ends() {
    let config = NamesConfig {
        lookups_max: 2,
        ..NamesConfig::default()
    };
    let (mut names, now) = (Names::new(config), Instant::now());
    let hosts = ["a.example", "b.example", "c.example"].map(host);
    names.want(&hosts, now);
    let begun = [names.next_lookup(now), names.next_lookup(now)];
    assert_eq!(begun, [0, 1].map(|n| Some(hosts[n].clone())));
    assert_eq!(names.next_lookup(now), None, "two are under way");
    let late = now + 5 * SECOND;
    assert_eq!(names.poll_timeout(), Some(late));
    let told: Vec<_> = names
        .handle_timeout(late)
        .into_iter()
        .map(|(host, _)| host)
        .collect();
    assert_eq!(told, hosts[..2]);
    assert_eq!(names.handle_timeout(late), []);
    assert_eq!(
        (names.next_lookup(late), names.poll_timeout()),
        (None, None)
    );
    // An answer that comes late is one all the same.
    let ended = names.ended(&hosts[0], found(&[1]), late);
    assert_eq!((ended.is_new, ended.change), (true, Some(Change::Resolved)));
    assert_eq!(names.next_lookup(late), Some(hosts[2].clone()));
}

#[test]
fn names_and_addresses_are_bounded_and_undiallable_ones_left_out() {
    let config = NamesConfig {
        names_max: 2,
        ..NamesConfig::default()
    };
    let (mut names, now) = (Names::new(config), Instant::now());
    let hosts = ["a.example", "b.example", "c.example"].map(host);
    names.want(&hosts, now);
    assert_eq!((names.iter().count(), names.left_out()), (2, 1));
    names.next_lookup(now);
    let mut addresses: Vec<IpAddr> = ["fe80::1", "::", "ff02::1", "0.0.0.0", "::ffff:192.0.2.1"]
        .map(|text| text.parse().unwrap())
        .into();
    addresses.extend((1..=20).map(ip));
    names.ended(
        &hosts[0],
        Ok(Found {
            addresses,
            ttl: None,
        }),
        now,
    );
    let first = names.iter().next().unwrap();
    assert_eq!(first.addresses, (1..=8).map(ip).collect::<Vec<_>>());
    names.next_lookup(now);
    let ended = names.ended(&hosts[1], found(&[]), now);
    assert!(
        matches!(ended.change, Some(Change::Failing { .. })),
        "{ended:?}"
    );
    // A name that no version has any more is forgotten, and its place is free.
    names.want(&hosts[1..], now);
    assert_eq!(names.left_out(), 0);
    let held: Vec<_> = names.iter().map(|name| name.host).collect();
    assert_eq!(held, hosts[1..]);
}

proptest! {
    // Protects the host from its registry: whatever happens, no more lookups are under way than
    // the bound, none of one name twice, and something is to be done while a name is wanted.
    #[test]
    fn lookups_are_bounded(steps in proptest::collection::vec((0u8..6, 0usize..6, 0u64..9), 1..120)) {
        let (mut names, mut now) = (Names::default(), Instant::now());
        let hosts: Vec<HostName> = (0..6).map(|n| host(&format!("h{n}.example"))).collect();
        let mut under_way: Vec<HostName> = Vec::new();
        for (kind, pick, seconds) in steps {
            match kind {
                0 => names.want(&hosts[pick..], now),
                1 | 2 => under_way.extend(names.next_lookup(now)),
                3 if !under_way.is_empty() => {
                    let ended = under_way.remove(pick % under_way.len());
                    let end = if seconds % 2 == 0 { failed() } else { found(&[seconds as u8]) };
                    names.ended(&ended, end, now);
                }
                4 => names.set_urgent(|host| *host == hosts[pick]),
                _ => {
                    now += Duration::from_secs(seconds);
                    names.handle_timeout(now);
                }
            }
            prop_assert!(under_way.len() <= NamesConfig::default().lookups_max);
            let waits = names.poll_timeout().is_some() || !under_way.is_empty();
            prop_assert!(waits || names.iter().next().is_none());
        }
    }
}
