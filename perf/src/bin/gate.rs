//! Counts the pieces and compares them with the baseline.
//!
//! Exit codes: 0 all hold, 1 a piece fails or could not be counted, 2 usage.
#![forbid(unsafe_code)]

use std::error::Error;
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Parser;
use clap::builder::PossibleValuesParser;

use millrace_perf::gate::{Baseline, Comparison, Counts, LIMIT_PERCENT, compare, count, table};
use millrace_perf::pieces::{self, Piece};

/// Counts the instructions of the pieces and compares them with the baseline.
#[derive(Debug, Parser)]
#[command(name = "gate", version)]
struct Cli {
    /// Record the counts of all pieces as the new baseline.
    #[arg(long, conflicts_with = "pieces")]
    update: bool,
    /// Run one piece once: what the gate starts under callgrind.
    #[arg(long, value_name = "PIECE", value_parser = piece_names(), hide = true)]
    piece: Option<String>,
    /// Count these pieces only.
    #[arg(value_name = "PIECE", value_parser = piece_names())]
    pieces: Vec<String>,
}

fn piece_names() -> PossibleValuesParser {
    PossibleValuesParser::new(pieces::ALL.iter().map(|piece| piece.name))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(name) = cli.piece {
        return pieces::by_name(&name).map_or(ExitCode::FAILURE, run_piece);
    }
    let chosen = |name: &str| cli.pieces.is_empty() || cli.pieces.iter().any(|n| n == name);
    match run(cli.update, &chosen) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("gate: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One pass to warm up, one to be counted, on a thread whose stack starts at a page.
fn run_piece(piece: &'static Piece) -> ExitCode {
    let run = std::thread::spawn(|| {
        let mut pass = (piece.prepare)();
        pass();
        pieces::measured(&mut *pass);
    });
    run.join().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}

fn run(update: bool, chosen: &dyn Fn(&str) -> bool) -> Result<ExitCode, Box<dyn Error>> {
    comparable_build()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("gate/baseline.json");
    let now = count_all(&root.join("out/gate"), chosen)?;
    if update {
        let baseline = Baseline {
            compiler: compiler(),
            architecture: std::env::consts::ARCH.to_owned(),
            instructions: now,
        };
        baseline.write(&path)?;
        print!(
            "{}",
            table(&compare(&baseline.instructions, &baseline.instructions))
        );
        println!("written to {}: commit it with the reason", path.display());
        return Ok(ExitCode::SUCCESS);
    }
    let mut baseline = Baseline::read(&path)?;
    if baseline.architecture != std::env::consts::ARCH {
        return Err(format!(
            "the baseline is of {}, not comparable here",
            baseline.architecture
        )
        .into());
    }
    baseline
        .instructions
        .retain(|name, _| chosen(name) || pieces::by_name(name).is_none());
    let compared = compare(&baseline.instructions, &now);
    print!("{}", table(&compared));
    Ok(verdict(&compared, &baseline.compiler))
}

/// Refuses builds whose counts mean something else.
fn comparable_build() -> Result<(), &'static str> {
    if cfg!(debug_assertions) {
        return Err("counts are of optimised code: build with --release");
    }
    if cfg!(all(target_arch = "x86_64", target_feature = "sse3")) {
        return Err("built for one kind of CPU: unset target-cpu and target-feature in RUSTFLAGS");
    }
    Ok(())
}

fn count_all(folder: &Path, chosen: &dyn Fn(&str) -> bool) -> Result<Counts, Box<dyn Error>> {
    let program = std::env::current_exe()?;
    let mut counts = Counts::new();
    for piece in pieces::ALL.iter().filter(|piece| chosen(piece.name)) {
        counts.insert(piece.name.to_owned(), count(&program, piece, folder)?);
    }
    Ok(counts)
}

fn verdict(compared: &[Comparison], baseline_compiler: &str) -> ExitCode {
    if !compared.iter().any(|c| c.verdict.fails()) {
        println!("all pieces within {LIMIT_PERCENT} % of the baseline, or below it");
        return ExitCode::SUCCESS;
    }
    eprintln!(
        "gate: instruction counts rose. Where: callgrind_annotate perf/out/gate/PIECE.callgrind. \
         If it is meant, `make perf-gate UPDATE=1` and commit perf/gate/baseline.json with the reason."
    );
    let compiler = compiler();
    if compiler != baseline_compiler {
        eprintln!(
            "gate: the baseline is of {baseline_compiler}, this is {compiler}: that alone can move \
             counts. Count the parent commit with this compiler first."
        );
    }
    ExitCode::FAILURE
}

/// As cargo finds it; only to be shown.
fn compiler() -> String {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    Command::new(rustc)
        .arg("--version")
        .output()
        .ok()
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .map_or_else(
            || "an unknown compiler".to_owned(),
            |text| text.trim().to_owned(),
        )
}
