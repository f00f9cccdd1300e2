//! Shards start without privileges and without huge pages, and say why when they cannot.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use common::{Nothing, config, socket};
use millrace_shards::{
    ChunkPool, HugePages, SHARDS_MAX, SOCKETS_MAX, ShardConfig, UdpGroupConfig, bind_group,
    bind_unsteered, spawn,
};
use millrace_testkit::skip;

/// Sixteen shards of a group, with chunks, start and stop with the test's own rights. If each
/// locked much memory, they would exceed a small limit.
#[test]
fn starts() {
    let group = UdpGroupConfig {
        local: "127.0.0.1:0".parse().unwrap(),
        shards: 16,
        ..UdpGroupConfig::default()
    };
    let handles: Vec<_> = bind_group(&group)
        .unwrap()
        .into_iter()
        .enumerate()
        .map(|(index, socket)| {
            assert!(socket.recv_buffer_bytes() > 0);
            let config = ShardConfig {
                chunk_pool_bytes: 4 << 20,
                ..ShardConfig::default()
            };
            spawn(config, index, 16, Some(socket), |context| {
                assert_eq!(context.pool.free_chunks(), 4);
                Nothing
            })
            .unwrap()
        })
        .collect();
    for handle in handles {
        handle.stop();
        handle.join().unwrap();
    }
}

/// The same without root. Run as root, the test runs `starts` again as the user `nobody`; otherwise
/// `starts` has shown it.
#[test]
fn starts_without_root() {
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        return starts();
    }
    // A copy that the user `nobody` may read: the build's folder may not be open to it.
    let copy = std::env::temp_dir().join(format!("millrace-start-{}", std::process::id()));
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(&copy)
        .args(["--exact", "starts", "--nocapture"])
        .current_dir("/")
        .gid(65534)
        .uid(65534)
        .output();
    std::fs::remove_file(&copy).unwrap();
    let output = match output {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            return skip::skip("starts_without_root", "the right to become another user");
        }
        output => output.unwrap(),
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

/// A thread that starts shards may wait for anything else afterwards. The kernel interrupts the
/// waits of a thread whose ring it takes down, so the starting thread must have made none.
#[test]
fn who_starts_shards_is_not_interrupted() {
    const MORE: usize = 20;
    let start_and_stop = || {
        let config = ShardConfig {
            chunk_pool_bytes: 0,
            ..ShardConfig::default()
        };
        let handle = spawn(config, 0, 1, None, |_| Nothing).unwrap();
        handle.stop();
        handle.join().unwrap();
    };
    let waits = UdpSocket::bind("127.0.0.1:0").unwrap();
    // With a limit the kernel does not go on by itself after an interruption.
    waits
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let to = waits.local_addr().unwrap();
    start_and_stop();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Takes longer than the kernel needs for what the first one left.
            (0..MORE).for_each(|_| start_and_stop());
            let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
            sender.send_to(b"done", to).unwrap();
        });
        assert_eq!(waits.recv(&mut [0; 8]).unwrap(), 4);
    });
}

/// More shards than a connection ID's byte counts, and more sockets than a shard owns, are refused
/// before anything starts.
#[test]
fn bounds_are_checked_at_the_start() {
    let group = |shards| {
        let local = "127.0.0.1:0".parse().unwrap();
        bind_unsteered(&UdpGroupConfig {
            local,
            shards,
            ..UdpGroupConfig::default()
        })
    };
    for shards in [0, SHARDS_MAX + 1] {
        let error = group(shards).unwrap_err();
        assert_eq!(error.reason(), "shards");
        assert!(error.to_string().contains("1 to 255"), "{error}");
    }
    assert_eq!(group(SHARDS_MAX).unwrap().len(), SHARDS_MAX);

    let start = |index, shards, sockets: Vec<_>| {
        spawn(config(), index, shards, sockets, |_| Nothing).map(|handle| {
            handle.stop();
            handle.join().unwrap();
        })
    };
    let too_many = start(0, SHARDS_MAX + 1, Vec::new()).unwrap_err();
    assert!(
        too_many.to_string().contains("shard 0 of 256"),
        "{too_many}"
    );
    start(SHARDS_MAX - 1, SHARDS_MAX, Vec::new()).unwrap();
    let sockets = |count| (0..count).map(|_| socket("127.0.0.1:0")).collect();
    start(0, 1, sockets(SOCKETS_MAX)).unwrap();
    let too_many = start(0, 1, sockets(SOCKETS_MAX + 1)).unwrap_err();
    assert_eq!(too_many.reason(), "sockets");
    assert!(too_many.to_string().contains("at most 16"), "{too_many}");
}

/// Huge pages that are required and missing are an error that says what to set.
#[test]
fn required_huge_pages() {
    // More than any machine reserves.
    let error = ChunkPool::new(1 << 42, HugePages::Require).unwrap_err();
    assert_eq!(error.reason(), "no_huge_pages");
    assert!(
        error.to_string().contains("vm.nr_hugepages=2097152"),
        "{error}"
    );
}
