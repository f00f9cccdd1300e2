use super::*;

const KEY: &str = "aa11111111111111111111111111111111111111111111111111111111111111";

fn with_key(rest: &str) -> String {
    format!("[registry]\npublic_key = \"{KEY}\"\n{rest}")
}

fn one(text: &str) -> Problem {
    let parsed = parse(&with_key(text));
    assert_eq!(parsed.problems.len(), 1, "{text}: {:#?}", parsed.problems);
    parsed.problems.into_iter().next().unwrap()
}

/// One mistake each: kind, line, and the words an operator needs.
#[test]
fn each_mistake_is_named_with_its_place_and_a_fix() {
    use ProblemKind as K;
    for (text, kind, position, reason, fix) in [
        (
            "[transport]\nkeep_alve = \"1s\"\n",
            K::UnknownKey,
            "4:1",
            "unknown key \"keep_alve\" in [transport]",
            "did you mean \"keep_alive\"?",
        ),
        (
            "[transprot]\n",
            K::UnknownKey,
            "3:2",
            "unknown section \"transprot\"",
            "did you mean \"transport\"?",
        ),
        (
            "[listen]\nlanes = 2\n",
            K::UnknownKey,
            "4:1",
            "unknown key \"lanes\" in [listen]",
            "lanes belongs to [transport]",
        ),
        (
            "[admin]\nzzz = 1\n",
            K::UnknownKey,
            "4:1",
            "unknown key \"zzz\"",
            "use one of socket, connections_max",
        ),
        (
            "[transport]\nlanes = \"two\"\n",
            K::WrongType,
            "4:9",
            "expected a whole number, found text",
            "write `lanes = 4`",
        ),
        (
            "[transport]\nlanes = true\n",
            K::WrongType,
            "4:9",
            "found true or false",
            "write `lanes = 4`",
        ),
        (
            "[transport]\nkeep_alive = 5\n",
            K::BadUnit,
            "4:14",
            "\"5\" has no unit",
            "`keep_alive = \"1s\"`",
        ),
        (
            "[shards]\nchunk_pool_bytes = \"64Mb\"\n",
            K::BadUnit,
            "4:20",
            "\"Mb\" is not a unit",
            "`chunk_pool_bytes = \"768MiB\"`",
        ),
        (
            "[transport]\nlanes = 99\n",
            K::OutOfRange,
            "4:9",
            "lanes = 99 is out of range (1 to 16)",
            "use 16",
        ),
        (
            "[transport]\nlanes = -1\n",
            K::BadValue,
            "4:9",
            "-1 is not a number from 0",
            "not negative",
        ),
        (
            "[transport]\nudp_payload_bytes_max = \"64B\"\n",
            K::OutOfRange,
            "4:25",
            "out of range (1200B to 16383B)",
            "use \"1200B\"",
        ),
        (
            "[transport]\nlan_peers = [\"abc\"]\n",
            K::BadValue,
            "4:13",
            "\"abc\" is no node id",
            "as `millrace status` shows it",
        ),
        (
            "[transport]\npath = \"lann\"\n",
            K::BadValue,
            "4:8",
            "\"lann\" is not one of",
            "did you mean \"lan\"?",
        ),
        (
            "[listen]\naddress = \"localhost:1\"\n",
            K::BadValue,
            "4:11",
            "not an IP address with a port",
            "write \"192.0.2.1:4100\"",
        ),
        (
            "[listen]\naddress = \"[fe80::1%2]:4100\"\n",
            K::BadValue,
            "4:11",
            "has a scope",
            "unique local",
        ),
        (
            "seeds = [\"192.0.2.1:4100\"]\n",
            K::BadValue,
            "3:9",
            "has no \"@\"",
            "@192.0.2.1:4100",
        ),
        (
            "[node]\nstate_dir = \"\"\n",
            K::BadValue,
            "4:13",
            "is empty",
            "write a name",
        ),
        (
            "[shards]\ncores = [0, 0]\n",
            K::BadValue,
            "4:9",
            "core 0 is listed twice",
            "once",
        ),
        (
            "[shards]\ncores = []\n",
            K::BadValue,
            "4:9",
            "the list is empty",
            "at least one",
        ),
        (
            "[shards]\ncores = \"all\"\n",
            K::BadValue,
            "4:9",
            "\"all\" is not \"auto\"",
            "write \"auto\"",
        ),
        (
            "[[shards.core]]\nspin = \"1us\"\n",
            K::MissingKey,
            "3:1",
            "cpu is missing",
            "add `cpu = 1`",
        ),
        (
            "[[shards.core]]\ncpu = 1\nspin = \"1us\"\nspinn = 1\n",
            K::UnknownKey,
            "6:1",
            "in [[shards.core]]",
            "did you mean \"spin\"?",
        ),
        (
            "[[shards.core]]\ncpu = 1\n[[shards.core]]\ncpu = 1\n",
            K::Contradiction,
            "6:1",
            "two [[shards.core]]",
            "one",
        ),
        (
            "[shards]\ncores = [0]\n[[shards.core]]\ncpu = 1\n",
            K::Contradiction,
            "6:1",
            "runs no shard",
            "add 1 to shards.cores",
        ),
        (
            "[transport]\nidle_timeout = \"1500ms\"\n",
            K::Contradiction,
            "4:1",
            "less than two keep_alive",
            "raise idle_timeout",
        ),
        (
            "[transport]\nredial_delay_max = \"10ms\"\n",
            K::Contradiction,
            "4:1",
            "less than redial_delay_min",
            "raise redial_delay_max",
        ),
        (
            "[transport]\nlan_stream_window_bytes = \"32MiB\"\n",
            K::Contradiction,
            "4:1",
            "more than lan_connection_window_bytes",
            "lower it to \"4MiB\"",
        ),
        (
            "[transport]\nreceive_budget_peer_bytes = \"200MiB\"\n",
            K::Contradiction,
            "1:1",
            "store_bytes 256MiB is more than one peer may fill, 200MiB",
            "lower it to at most \"200MiB\"",
        ),
        (
            "[transport]\nreceive_budget_peer_bytes = \"100MiB\"\n[artifacts]\nstore_bytes = \"64MiB\"\n",
            K::Contradiction,
            "3:2",
            "could never be received",
            "at least \"128MiB\"",
        ),
        (
            "[shards]\nchunk_pool_bytes = \"64MiB\"\n",
            K::Contradiction,
            "4:1",
            "chunks that do not exist",
            "at least \"768MiB\"",
        ),
        (
            "[shards]\nrx_slots = 300\n",
            K::Contradiction,
            "4:1",
            "more than rx_slots_max 256",
            "at least 300",
        ),
    ] {
        let problem = one(text);
        assert_eq!(
            (problem.kind, problem.position.to_string().as_str()),
            (kind, position),
            "{text}: {problem:?}"
        );
        assert!(
            problem.reason.contains(reason),
            "{text}: {}",
            problem.reason
        );
        assert!(problem.fix.contains(fix), "{text}: {}", problem.fix);
    }
}

#[test]
fn a_section_that_is_no_table_is_the_wrong_type() {
    let parsed = parse(&format!("admin = 3\n{}", with_key("")));
    assert_eq!(parsed.problems.len(), 1);
    assert_eq!(parsed.problems[0].kind, ProblemKind::WrongType);
    assert!(parsed.problems[0].fix.contains("[admin]"));
}

/// Protects the operator from a node that is tuned by the other of two lists: a peer is in one.
#[test]
fn a_peer_is_near_or_far_and_not_both() {
    let id = NodeId::from_public_key_der(&[1]);
    let lists = |lan: &str, wan: &str| {
        let text = format!("[transport]\nlan_peers = [{lan}]\nwan_peers = [{wan}]\n");
        parse(&with_key(&text)).problems
    };
    let quoted = format!("\"{id}\"");
    assert_eq!(lists(&quoted, "").len() + lists("", &quoted).len(), 0);
    let problems = lists(&quoted, &quoted);
    assert_eq!(problems.len(), 1);
    assert!(problems[0].reason.contains("is in lan_peers too"));
    // Twice in one list.
    assert_eq!(lists(&format!("{quoted}, {quoted}"), "").len(), 1);
}

/// The walk does not stop: five different mistakes are five problems, in the order of the text.
#[test]
fn five_mistakes_are_five_problems() {
    let text = with_key(
        "[transport]\nkeep_alve = \"1s\"\nlanes = \"many\"\nidle_timeout = \"3 parsecs\"\nstreams_max = 3\n\
         lan_stream_window_bytes = \"64MiB\"\n",
    );
    let parsed = parse(&text);
    let kinds: Vec<_> = parsed
        .problems
        .iter()
        .map(|p| (p.position.line, p.kind.reason()))
        .collect();
    assert_eq!(
        kinds,
        [
            (4, "unknown_key"),
            (5, "wrong_type"),
            (6, "bad_unit"),
            (7, "out_of_range"),
            (8, "contradiction")
        ]
    );
    assert!(!parsed.is_usable());
    assert_eq!(
        parsed.problems[0].render("node.toml"),
        "node.toml:4:1: unknown key \"keep_alve\" in [transport]; fix: did you mean \"keep_alive\"?"
    );
}

/// A broken line is reported beside the mistakes of the other lines, and the rest is still read.
#[test]
fn syntax_errors_do_not_hide_other_mistakes() {
    let text =
        with_key("[transport]\nlanes = = 2\nlannes = 2\n[artifacts]\nstore_bytes = \"16MiB\"\n");
    let parsed = parse(&text);
    let kinds: Vec<_> = parsed.problems.iter().map(|p| p.kind).collect();
    assert!(kinds.contains(&ProblemKind::Syntax), "{kinds:?}");
    assert!(kinds.contains(&ProblemKind::UnknownKey), "{kinds:?}");
    assert!(parsed.problems.iter().all(|p| !p.reason.contains('\n')));
    assert_eq!(parsed.config.artifacts.store_bytes, ByteSize::mib(16));
}

#[test]
fn a_missing_required_key_points_at_its_section() {
    let parsed = parse("\n[registry]\nversions_max = 4\n");
    assert_eq!(parsed.problems.len(), 1);
    assert_eq!(parsed.problems[0].position.to_string(), "2:2");
    assert_eq!(parsed.problems[0].kind, ProblemKind::MissingKey);
    // A wrong key is reported once, not as missing as well.
    let parsed = parse("[registry]\npublic_key = \"abc\"\n");
    let kinds: Vec<_> = parsed.problems.iter().map(|p| p.kind).collect();
    assert_eq!(kinds, [ProblemKind::BadValue]);
}

#[test]
fn written_values_arrive_and_cores_start_from_the_defaults() {
    let parsed = parse(&with_key(
        &"seeds = [\"KEY@192.0.2.1:4100\", \"KEY/KEY@[2001:db8::1]:4100\"]\n[[shards.core]]\ncpu = 1\nspin = \"1h\"\n[shards]\nspin = \"50us\"\nring_entries = 0x80\n".replace("KEY", KEY),
    ));
    assert_eq!(parsed.problems, []);
    let config = parsed.config;
    let tls_keys = config
        .registry
        .seeds
        .iter()
        .map(|seed| seed.tls_key.as_deref());
    assert_eq!(tls_keys.collect::<Vec<_>>(), [None, Some(KEY)]);
    assert_eq!(config.registry.public_key, KEY);
    assert_eq!(config.shards.defaults.spin, Period::micros(50));
    assert_eq!(config.shards.profile_of(1).spin, Period::secs(3600));
    assert_eq!(config.shards.profile_of(1).ring_entries, 128);
    assert_eq!(config.shards.profile_of(0).spin, Period::micros(50));
}
