//! The command line. `docs/reference/cli.md` is generated from it and tested for freshness.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use millrace_protocol::address::{AddressError, NodeAddress};
use millrace_tuning::ByteSize;

use crate::xdp::args::XdpCommand;

/// A networking engine for replicated state machines.
#[derive(Debug, Parser)]
#[command(name = "millrace", version, about, disable_help_subcommand = true)]
#[command(
    after_help = "Exit codes: 0 ok, 1 failed, 2 usage, 3 check found obstacles, 69 not running, \
                        77 not permitted, 78 bad config."
)]
pub(crate) struct Cli {
    /// What to log on stderr, such as `info` or `millrace_transport=debug`.
    #[arg(
        long,
        global = true,
        default_value = "warn",
        env = "MILLRACE_LOG",
        value_name = "FILTER"
    )]
    pub(crate) log: String,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole subnet on this host, without any config.
    Dev(DevArgs),
    /// Run a node.
    Node(NodeArgs),
    /// Find every mistake of a config, and every obstacle of this host.
    Check(CheckArgs),
    /// Make a node's secret key, and print its node id and public key.
    Keygen(KeygenArgs),
    /// Keep a folder of signed registry versions.
    #[command(subcommand)]
    Registry(RegistryCommand),
    /// Publish a file to all peers of a running node.
    Put(PutArgs),
    /// Fetch an artifact by its id from a running node or its peers.
    Get(GetArgs),
    /// Show what a running node is doing.
    Status(StatusArgs),
    /// Attach, change and look at the edge: the program that refuses packets before they reach a
    /// socket.
    #[command(subcommand)]
    Xdp(XdpCommand),
    /// Print configs.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Do what needs privileges for a node that gave its own up; started by it.
    #[command(hide = true)]
    EdgeHelper,
}

/// `millrace dev`
#[derive(Debug, Args)]
pub(crate) struct DevArgs {
    /// Nodes of the subnet, all in this process.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..=64))]
    pub(crate) nodes: u16,
    /// Shards of each node, and as many connections to each peer.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) shards: u8,
    /// Size of the artifact that the first node publishes.
    #[arg(long, default_value = "128MiB", value_name = "SIZE")]
    pub(crate) payload: ByteSize,
    /// Publish one artifact, wait until all nodes have it, and end.
    #[arg(long)]
    pub(crate) once: bool,
    /// Show the edge: the first node behind the program, in network namespaces that are made and
    /// removed, under a flood. Needs root.
    #[arg(long)]
    pub(crate) edge: bool,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    pub(crate) json: bool,
    /// Give up after this long.
    #[arg(long, default_value = "120s", value_name = "DURATION")]
    pub(crate) timeout: millrace_tuning::Period,
}

/// `millrace node`
#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// The config file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
}

/// `millrace check`
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The config file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Look at the config only, not at this host.
    #[arg(long)]
    pub(crate) no_environment: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace keygen`
#[derive(Debug, Args)]
pub(crate) struct KeygenArgs {
    /// The key file to make; it must not exist. With --tls: the node's key file, which exists.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Make a TLS key for the node of FILE, in a file beside it, for `millrace registry rotate`.
    #[arg(long)]
    pub(crate) tls: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace registry`
#[derive(Debug, Subcommand)]
pub(crate) enum RegistryCommand {
    /// Make the folder, its signing key if there is none, and version 1 with one empty subnet.
    Init(RegistryInitArgs),
    /// Sign a next version with one node more, or with a node's new address.
    AddNode(RegistryAddArgs),
    /// Sign a next version without a node.
    RemoveNode(RegistryRemoveArgs),
    /// Sign a next version with another TLS key of a node: first beside the one in use, then alone.
    Rotate(RegistryRotateArgs),
    /// Show the newest version, or check all of them.
    Show(RegistryShowArgs),
    /// Sign a document that was written by hand as the next version.
    Sign(RegistrySignArgs),
}

/// `millrace registry init`
#[derive(Debug, Args)]
pub(crate) struct RegistryInitArgs {
    /// The registry folder.
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// The key that signs versions; made when it does not exist.
    #[arg(long, value_name = "FILE")]
    pub(crate) key: PathBuf,
    /// A name for the subnet, for people.
    #[arg(long, default_value = "main", value_name = "NAME")]
    pub(crate) subnet_name: String,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace registry add-node`
#[derive(Debug, Args)]
pub(crate) struct RegistryAddArgs {
    /// The registry folder.
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// The key that signs versions.
    #[arg(long, value_name = "FILE")]
    pub(crate) key: PathBuf,
    /// The node's public key, as `millrace keygen` printed it.
    #[arg(long, value_name = "HEX")]
    pub(crate) public_key: String,
    /// Where the node listens, by IP address or name; may be given several times, in the order to
    /// try.
    #[arg(long, value_name = "HOST:PORT", required = true, value_parser = node_address)]
    pub(crate) address: Vec<NodeAddress>,
    /// The subnet's id; needed when there are several.
    #[arg(long, value_name = "ID")]
    pub(crate) subnet: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// An address that every node can dial.
fn node_address(text: &str) -> Result<NodeAddress, String> {
    text.parse()
        .map_err(|error: AddressError| format!("it {error}; {}", error.fix()))
}

/// `millrace registry remove-node`
#[derive(Debug, Args)]
pub(crate) struct RegistryRemoveArgs {
    /// The registry folder.
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// The key that signs versions.
    #[arg(long, value_name = "FILE")]
    pub(crate) key: PathBuf,
    /// The node's id.
    #[arg(value_name = "NODE_ID")]
    pub(crate) node: String,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace registry rotate`
#[derive(Debug, Args)]
pub(crate) struct RegistryRotateArgs {
    /// The registry folder.
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// The key that signs versions.
    #[arg(long, value_name = "FILE")]
    pub(crate) key: PathBuf,
    /// The node's id.
    #[arg(value_name = "NODE_ID")]
    pub(crate) node: String,
    #[command(flatten)]
    pub(crate) step: RotateStep,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A step of a rotation.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct RotateStep {
    /// Begin: the new TLS key, as `millrace keygen --tls` printed it. Peers accept both.
    #[arg(long, value_name = "HEX")]
    pub(crate) tls_key: Option<String>,
    /// Finish: the older key is refused, and connections by it end. Before that, `millrace status`
    /// of the node must show the new key, and no connection by an older one.
    #[arg(long)]
    pub(crate) finish: bool,
    /// Go back: the new key is refused, and connections by it end.
    #[arg(long)]
    pub(crate) abandon: bool,
}

/// `millrace registry show`
#[derive(Debug, Args)]
pub(crate) struct RegistryShowArgs {
    /// The registry folder.
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// The registry's public key; every version is checked against it.
    #[arg(long, value_name = "HEX")]
    pub(crate) public_key: String,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace registry sign`
#[derive(Debug, Args)]
pub(crate) struct RegistrySignArgs {
    /// The registry folder.
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// The key that signs versions.
    #[arg(long, value_name = "FILE")]
    pub(crate) key: PathBuf,
    /// The document; its number must be the newest one's plus one.
    #[arg(value_name = "DOCUMENT")]
    pub(crate) document: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How to find the admin socket of a running node.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct SocketArgs {
    /// The node's admin socket.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// The node's config file, which names its admin socket.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

/// `millrace put`
#[derive(Debug, Args)]
pub(crate) struct PutArgs {
    /// The file to publish, at most 128 MiB.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) admin: SocketArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace get`
#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// The artifact: its SHA-256 in hexadecimal.
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// Where to write it.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) admin: SocketArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace status`
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) admin: SocketArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace config`
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print a config with every key, its default and what it does.
    Default(ConfigDefaultArgs),
    /// Print what a config puts in force, and where each value comes from.
    Show(ConfigShowArgs),
}

/// `millrace config default`
#[derive(Debug, Args)]
pub(crate) struct ConfigDefaultArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `millrace config show`
#[derive(Debug, Args)]
pub(crate) struct ConfigShowArgs {
    /// The config file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use clap::CommandFactory;
    use millrace_testkit::page::is_fresh;

    use super::*;

    /// The help of a command and of those below it, as a terminal of 100 columns shows it.
    fn pages(command: &clap::Command, path: &str, out: &mut String) {
        let shown = command
            .clone()
            .term_width(100)
            .bin_name(path)
            .display_name(path);
        let help = shown.clone().render_long_help().to_string();
        let lines: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
        let _ = write!(out, "\n## {path}\n\n```text\n{}\n```\n", lines.join("\n"));
        for sub in command.get_subcommands() {
            pages(sub, &format!("{path} {}", sub.get_name()), out);
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_reference_page_is_fresh() {
        let mut page = String::from(
            "# Command line\n\nGenerated from the binary's own help by `make docs`; do not edit.\n",
        );
        pages(&Cli::command(), "millrace", &mut page);
        is_fresh("docs/reference/cli.md", &page);
    }

    #[test]
    fn the_config_reference_is_fresh() {
        is_fresh(
            "docs/reference/config.md",
            &millrace_tuning::render::reference_markdown(),
        );
    }
}
