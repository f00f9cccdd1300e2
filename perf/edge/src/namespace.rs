//! Network namespaces of one run: made with unique names, removed whatever happens.
//!
//! The build aborts on panic, so `Drop` alone would leave them behind: every name also stands in a
//! registry, which the panic hook and the signal handler empty. The next run removes what a killed
//! run left, because names carry the process that made them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::Result;

const PREFIX: &str = "bench-edge-";
/// Where `ip netns` keeps its handles.
const FOLDER: &str = "/run/netns";

static MADE: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// One network namespace; removed on drop, with the interfaces in it.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
    handle: File,
}

/// The calling thread is in a namespace until this is dropped.
#[derive(Debug)]
pub(crate) struct Inside {
    outside: File,
}

impl Namespace {
    /// Makes `bench-edge-PID-role`.
    pub(crate) fn make(role: &str) -> Result<Self> {
        let name = format!("{PREFIX}{}-{role}", std::process::id());
        made().push(name.clone());
        run("ip", &["netns", "add", &name])?;
        let handle = File::open(Path::new(FOLDER).join(&name))?;
        Ok(Self { name, handle })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Moves the calling thread into it; processes started meanwhile are in it as well.
    pub(crate) fn enter(&self) -> Result<Inside> {
        let outside = File::open("/proc/thread-self/ns/net")?;
        move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(Inside { outside })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
        made().retain(|name| *name != self.name);
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let network = Some(LinkNameSpaceType::Network);
        if let Err(error) = move_into_link_name_space(self.outside.as_fd(), network) {
            // From here on the thread would act on the wrong network.
            remove_all();
            eprintln!("bench-edge: cannot leave the namespace: {error}");
            std::process::exit(1);
        }
    }
}

/// Makes sure that no end of the process, except SIGKILL, leaves a namespace behind.
pub(crate) fn guard() -> Result<()> {
    remove_stale()?;
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        remove_all();
    }));
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            remove_all();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// Runs a program to its end.
///
/// # Errors
/// If it cannot be started or fails; carries what it wrote to standard error.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    let why = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", arguments.join(" "), why.trim()).into())
}

fn made() -> MutexGuard<'static, Vec<String>> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove_all() {
    for name in made().drain(..) {
        remove(&name);
    }
}

fn remove(name: &str) {
    if let Err(error) = run("ip", &["netns", "delete", name]) {
        eprintln!("bench-edge: {error}");
    }
}

fn remove_stale() -> io::Result<()> {
    let entries = match fs::read_dir(FOLDER) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let process = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            remove(&name);
        }
    }
    Ok(())
}
