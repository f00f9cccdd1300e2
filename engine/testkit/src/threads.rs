//! The threads of a test's own process.

/// Names of the threads of this process: of each the first 15 bytes.
///
/// A new thread gives itself its name, a moment after its start; one that was joined is listed for
/// a moment more. Wait for a count with [`until`](crate::until).
///
/// # Panics
/// Without `/proc`.
pub fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc lists the threads");
    let names = tasks.filter_map(|task| {
        // A thread may end meanwhile.
        let name = std::fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
        Some(name.trim_end().to_owned())
    });
    names.collect()
}

/// How many threads of this process have a name that this holds for.
pub fn threads_with(mut is_meant: impl FnMut(&str) -> bool) -> usize {
    threads().iter().filter(|name| is_meant(name)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_listed_by_its_name() {
        let (goes, may_go) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("testkit-named".into());
        let thread = thread.spawn(move || may_go.recv()).unwrap();
        crate::until("it is listed", || {
            threads_with(|name| name == "testkit-named") == 1
        });
        drop(goes);
        assert!(thread.join().unwrap().is_err());
        crate::until("it is gone", || {
            threads_with(|name| name == "testkit-named") == 0
        });
    }
}
