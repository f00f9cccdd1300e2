use std::net::SocketAddr;

use millrace_protocol::identity::SigningKey;
use millrace_protocol::registry::{RegistryError, SignedVersion};

use super::*;
use crate::{Draft, KeptVersion, Offer, keys, wire};

fn versions(key: &SigningKey, me: &PublicKey) -> Versions {
    let sources = Sources::new(key.public_key(), RegistryConfig::default());
    Versions::new(me, VersionsConfig::default(), sources)
}

/// Protects the removal of this node itself: the transport ignores a topology that is older
/// than the one in force, and the empty one of a removed node must not count as older.
#[test]
fn the_empty_topology_of_a_removed_node_has_the_version_that_removed_it() {
    let key = keys::generate().unwrap();
    let nodes = [0, 1].map(|n| {
        let address: SocketAddr = ([127, 0, 0, 1], 4100 + n).into();
        (keys::generate().unwrap().public_key(), address)
    });
    let versions = versions(&key, &nodes[0].0);
    let first = Draft::with_nodes("test", &nodes).unwrap();
    assert!(versions.offer(first.sign(&key).unwrap()).unwrap());
    let both = versions.topology();
    assert_eq!((both.len(), both.newest_version()), (2, 1));

    let mut second = Draft::after(first.version().clone());
    second.remove_node(versions.node_id()).unwrap();
    assert!(versions.offer(second.sign(&key).unwrap()).unwrap());
    let none = versions.topology();
    assert_eq!((none.len(), none.newest_version()), (0, 2));
}

/// Protects the thread that checks signatures from an answer of many refused versions.
#[test]
fn an_answer_ends_at_its_first_refusal() {
    let [key, other] = [0, 1].map(|_| keys::generate().unwrap());
    let versions = versions(&key, &other.public_key());
    let draft = Draft::first("test").unwrap();
    let [good, bad] = [&key, &other].map(|key| draft.sign(key).unwrap());
    assert!(!take(&versions, &[&bad, &bad, &good]));
    let refused: u64 = versions
        .summary()
        .refused
        .iter()
        .map(|(_, count)| count)
        .sum();
    assert_eq!((versions.newest(), refused), (0, 1));
    assert!(take(&versions, &[&good, &bad]));
    assert_eq!(versions.newest(), 1);
}

/// The versions of a node that keeps the newest in this folder.
fn kept_versions(key: &SigningKey, me: &PublicKey, dir: &std::path::Path) -> Versions {
    let config = RegistryConfig::default();
    let kept = KeptVersion::open(dir, &key.public_key(), &config).unwrap();
    let sources = Sources {
        kept: Some(kept),
        ..Sources::new(key.public_key(), config)
    };
    Versions::new(me, VersionsConfig::default(), sources)
}

/// Takes an answer of a peer with these versions.
fn take(versions: &Versions, answer: &[&SignedVersion]) -> bool {
    let question = versions.questions().ask(versions.node_id()).unwrap();
    let answer = wire::encode(answer.iter().copied());
    versions.take(&Offer::new(question, answer.into()))
}

/// Three versions: a node alone, then with another one, which is removed.
fn series(key: &SigningKey) -> (PublicKey, [SignedVersion; 3]) {
    let [me, other] = [0, 1].map(|n| {
        let address: SocketAddr = ([127, 0, 0, 1], 4100 + n).into();
        (keys::generate().unwrap().public_key(), address)
    });
    let first = Draft::with_nodes("test", &[me]).unwrap();
    let subnet = first.only_subnet().unwrap();
    let mut second = Draft::after(first.version().clone());
    second.set_node(other.0, subnet, [other.1]);
    let mut third = Draft::after(second.version().clone());
    third.remove_node(other.0.node_id()).unwrap();
    let signed = [first, second, third].map(|draft| draft.sign(key).unwrap());
    (me.0, signed)
}

/// Protects the removal of a member from a restart: what came from a peer alone is known to the
/// next run, and an older version is refused, wherever it comes from.
#[test]
fn a_later_run_does_not_go_back_to_an_older_version() {
    let folder = tempfile::tempdir().unwrap();
    let key = keys::generate().unwrap();
    let (me, [first, second, third]) = series(&key);
    let versions = kept_versions(&key, &me, folder.path());
    assert!(versions.offer(second.clone()).unwrap());
    assert_eq!(versions.topology().len(), 2);
    assert!(take(&versions, &[&third]));
    drop(versions);

    let versions = kept_versions(&key, &me, folder.path());
    assert_eq!((versions.newest(), versions.topology().len()), (3, 1));
    assert!(versions.summary().age.is_some());
    for older in [first, second] {
        let refused = versions.offer(older).unwrap_err();
        assert!(matches!(refused, RegistryError::Older { .. }), "{refused}");
    }
    assert!(!versions.offer(third).unwrap(), "it is held");
}

/// Protects the same: nothing is in force that the next run would not know.
#[test]
fn a_version_that_cannot_be_written_is_not_in_force_until_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("kept");
    let key = keys::generate().unwrap();
    let (me, [first, second, third]) = series(&key);
    let versions = kept_versions(&key, &me, &dir);
    assert!(versions.offer(first).unwrap());
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(!versions.offer(second).unwrap());
    assert!(!take(&versions, &[&third]));
    let summary = versions.summary();
    assert_eq!((summary.newest, summary.writes_failed), (1, 1));
    let why = summary.kept_failure.unwrap();
    assert!(why.starts_with("version 2 cannot be written: "), "{why}");
    let given = wire::decode(&versions.newer_than(0)).unwrap();
    assert_eq!(given.len(), 1, "peers get what is in force");

    std::fs::create_dir(&dir).unwrap();
    let at = versions.retry_at().unwrap();
    std::thread::sleep(at.saturating_duration_since(Instant::now()));
    assert!(versions.retry_write());
    let summary = versions.summary();
    assert_eq!((summary.newest, summary.kept_failure), (3, None));
    drop(versions);
    assert_eq!(kept_versions(&key, &me, &dir).newest(), 3);
}

/// Protects the same from a disk that loses bytes: older versions stay refused, peers are asked
/// for the one that was lost, and an operator sees why there is none.
#[test]
fn a_kept_version_that_cannot_be_read_is_not_replaced_by_an_older_one() {
    let folder = tempfile::tempdir().unwrap();
    let key = keys::generate().unwrap();
    let (me, [first, second, third]) = series(&key);
    assert!(
        kept_versions(&key, &me, folder.path())
            .offer(second.clone())
            .unwrap()
    );
    let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap();
    std::fs::write(file.unwrap().path(), "lost").unwrap();

    let versions = kept_versions(&key, &me, folder.path());
    assert_eq!((versions.newest(), versions.known()), (0, 1));
    assert!(
        versions
            .summary()
            .kept_failure
            .unwrap()
            .contains("version 2")
    );
    assert!(versions.offer(first).is_err());
    assert!(take(&versions, &[&second, &third]));
    assert_eq!(versions.summary().kept_failure, None);
    drop(versions);
    assert_eq!(kept_versions(&key, &me, folder.path()).newest(), 3);
}
