//! Reads a config file and finds the files that it names.

use std::path::{Path, PathBuf};

use millrace_node::Paths;
use millrace_tuning::{NodeConfig, Parsed, Problem, Severity, parse};

use crate::cli::SocketArgs;
use crate::exit::{Exit, Failure};
use crate::output;

/// More than a thousand times the default file: what is larger is not a config.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// A config file that was read; it may still have problems.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// As given on the command line.
    pub(crate) file: PathBuf,
    pub(crate) parsed: Parsed,
}

impl Loaded {
    pub(crate) fn read(file: &Path) -> Result<Self, Failure> {
        let failed = |error: &std::io::Error| {
            let failure = Failure::io(file.display(), error);
            let exit = match failure.exit {
                Exit::NotPermitted => Exit::NotPermitted,
                _ => Exit::BadConfig,
            };
            Failure::new(
                exit,
                format!("{}; `millrace config default` prints one", failure.message),
            )
        };
        let length = std::fs::metadata(file)
            .map_err(|error| failed(&error))?
            .len();
        if length > CONFIG_BYTES_MAX {
            let message = format!(
                "{}: {length} bytes are too many for a config",
                file.display()
            );
            return Err(Failure::new(Exit::BadConfig, message));
        }
        let text = std::fs::read_to_string(file).map_err(|error| failed(&error))?;
        Ok(Self {
            file: file.to_owned(),
            parsed: parse(&text),
        })
    }

    /// The config if a node can start from it; otherwise its problems are printed.
    pub(crate) fn usable(self) -> Result<(NodeConfig, Paths), Failure> {
        print_problems(&self.file, &self.parsed.problems);
        if !self.parsed.is_usable() {
            return Err(Failure::new(Exit::BadConfig, ""));
        }
        let paths = self.paths();
        Ok((self.parsed.config, paths))
    }

    pub(crate) fn paths(&self) -> Paths {
        let folder = self.file.parent().unwrap_or_else(|| Path::new(""));
        Paths::of(&self.parsed.config, folder)
    }
}

/// The admin socket that the arguments name.
pub(crate) fn socket_of(args: &SocketArgs) -> Result<PathBuf, Failure> {
    if let Some(socket) = &args.socket {
        return Ok(socket.clone());
    }
    match &args.config {
        Some(config) => {
            let (_, paths) = Loaded::read(config)?.usable()?;
            Ok(paths.admin_socket)
        }
        None => Err(Failure::new(Exit::Usage, "give --socket or --config")),
    }
}

/// One line per problem, on stderr.
pub(crate) fn print_problems(file: &Path, problems: &[Problem]) {
    for problem in problems {
        output::message(problem.render(&file.display().to_string()));
    }
}

/// How many of each severity.
pub(crate) fn count(problems: &[Problem], severity: Severity) -> usize {
    problems
        .iter()
        .filter(|problem| problem.severity == severity)
        .count()
}
