//! The machine of a measurement: figures without it mean nothing.

use std::fmt;
use std::fs;
use std::thread;

use serde::Serialize;

use crate::Result;

/// The properties that figures depend on most.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Host {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) kernel: String,
}

impl Host {
    /// The machine that this process runs on.
    pub(crate) fn read() -> Result<Self> {
        Ok(Self {
            cpu: model_of(&fs::read_to_string("/proc/cpuinfo")?).to_owned(),
            cores: thread::available_parallelism()?.get(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
        })
    }
}

/// The model of the first core. Architectures without model names have other lines.
fn model_of(cpuinfo: &str) -> &str {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find_map(|(key, value)| (key.trim() == "model name").then_some(value.trim()))
        .unwrap_or("unknown")
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cores, kernel } = self;
        write!(f, "{cpu}, {cores} cores, Linux {kernel}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_the_first_cores() {
        let text =
            "processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Other\n";
        assert_eq!(model_of(text), "Some CPU @ 2 GHz");
        assert_eq!(model_of("CPU implementer\t: 0x41\n"), "unknown");
    }
}
