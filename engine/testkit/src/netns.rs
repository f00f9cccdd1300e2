//! Network namespaces that tests make and remove. They take root and iproute2.

use std::{
    fs::File,
    os::fd::AsFd as _,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace with a name of its own; removed when dropped.
#[derive(Debug)]
pub struct Namespace {
    /// Its name under `/run/netns`.
    pub name: String,
}

impl Namespace {
    /// Makes a namespace whose name contains `label`, and brings its loopback interface up.
    ///
    /// # Panics
    ///
    /// When `ip` fails.
    #[must_use]
    pub fn new(label: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("mr-{label}-{}-{number}", std::process::id());
        output(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Self { name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `ip` in the namespace, and returns what it prints.
    ///
    /// # Panics
    ///
    /// When `ip` fails.
    pub fn ip(&self, arguments: &str) -> String {
        let words = arguments.split_whitespace();
        output(Command::new("ip").args(["-n", &self.name]).args(words))
    }

    /// Runs `nft` in the namespace, and returns what it prints.
    ///
    /// # Panics
    ///
    /// When `nft` fails.
    pub fn nft(&self, arguments: &str) -> String {
        self.enter(|| output(Command::new("nft").args(arguments.split_whitespace())))
    }

    /// Runs a function on a thread of its own in the namespace. Sockets, threads and processes that
    /// the function makes stay there.
    ///
    /// # Panics
    ///
    /// When the namespace cannot be entered, or the function panics.
    pub fn enter<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.name);
        let file = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                    .unwrap_or_else(|error| panic!("{path}: {error}"));
                act()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .output();
    }
}

/// Runs a command, and returns what it prints.
///
/// # Panics
///
/// When it does not start, fails, or prints what is not UTF-8.
pub fn output(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap_or_else(|error| panic!("{command:?}: {error}"))
}
