//! Progress bars on a terminal; nothing at all elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar that counts bytes, hidden when stderr is no terminal or JSON was asked for.
pub(crate) fn bytes(what: &'static str, total: u64, json: bool) -> ProgressBar {
    if json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    let template = "{msg:>10} [{bar:32}] {binary_bytes:>10} of {binary_total_bytes} {binary_bytes_per_sec:>14}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what);
    bar
}
