//! The processes of a cell: a serving and a driving one, fresh for each, and the relay between
//! them in this process.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use millrace_perf::relay::LinkConfig;
use serde::de::DeserializeOwned;

use super::child::{Before, Job, MeshOutcome, Outcome, Served};
use super::plan::{Contender, Order, Part};
use super::relay::{Path, Relay};
use super::results::{Cell, MeshCell, Ramp, Shares};
use super::{WanRun, clock, sites};
use crate::Result;
use crate::plan::BULK_BYTES;

/// A handshake may take this long; the worst pair loses most of its first packets.
const CONNECT_WITHIN_S: f64 = 60.0;
/// What a process may take beyond its job before it counts as hung.
const GRACE: Duration = Duration::from_secs(30);
const SATELLITE_BODY_BYTES: usize = 8 << 20;
/// Over three times its target, so that `--check collapse` can tell a slow body from one that
/// never comes.
const SATELLITE_CUT_S: f64 = 100.0;
/// Of the bodies that targets are for: 128 MiB at 18 Mbit/s.
const BODY_CUT_S: f64 = 60.0;
/// Of the others. A rate shows in 20 s, and 60 s for each would not fit into a run.
const CUT_S: f64 = 20.0;
const LINK_LASTS_S: f64 = 2.0;
/// Of the shares: the first sends alone, then both without being measured, then both measured.
const SHARES_ALONE: Duration = Duration::from_secs(5);
const SHARES_SETTLE: Duration = Duration::from_secs(5);
const SHARES_MEASURED: Duration = Duration::from_secs(15);
/// Idleness of the mesh.
const MESH_IDLE: Duration = Duration::from_secs(60);

/// Who runs the processes, and where.
#[derive(Debug)]
pub(super) struct Runner<'a> {
    pub(super) run: &'a WanRun,
}

impl Runner<'_> {
    /// A body, or several on one connection, over a link of their own.
    pub(super) fn body(&self, part: Part, contender: Contender, round: usize) -> Result<Cell> {
        let link = part.link(round);
        let server = Server::start(self, contender, None)?;
        let relay = Relay::start(&[link], &[path_to(server.address)])?;
        let job = self.job(part, contender, &relay, &link);
        let drive = Drive::start(self, contender, &job)?;
        let outcome = drive.finish(&job);
        let relay = relay.stop()?;
        let served = server.finish()?;
        Ok(Cell::new(part, contender, round, outcome, &served, relay))
    }

    fn job(&self, part: Part, contender: Contender, relay: &Relay, link: &LinkConfig) -> Job {
        let has_second_body =
            contender == Contender::Millrace && part.has_rounds(contender) && !self.run.quick;
        let is_satellite = part == Part::Satellite;
        let cut_s = match part {
            _ if contender == Contender::Link => LINK_LASTS_S,
            Part::Satellite => SATELLITE_CUT_S,
            Part::Body(_) if contender.has_targets() && !self.run.quick => BODY_CUT_S,
            _ => CUT_S,
        };
        Job {
            to: relay.addresses[0][0],
            link_bits_per_s: link.bits_per_second,
            connect_within_s: CONNECT_WITHIN_S,
            before: contender.before(),
            body_bytes: if is_satellite {
                SATELLITE_BODY_BYTES
            } else {
                BULK_BYTES
            },
            bodies: if has_second_body { 2 } else { 1 },
            cut_s,
            until_ns: None,
            starts_at_ns: None,
            has_rpcs: !is_satellite,
            remembered_paths: None,
        }
    }

    /// Bodies of two, one after the other each, through one link.
    pub(super) fn shares(&self, part: Part, order: Order, round: usize) -> Result<Shares> {
        let link = part.link(round);
        let contenders = order.contenders();
        let servers = contenders
            .map(|contender| Server::start(self, contender, None))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let paths: Vec<_> = servers
            .iter()
            .map(|server| path_to(server.address))
            .collect();
        let relay = Relay::start(&[link], &paths)?;
        // Time for both handshakes.
        let first_at = clock::now() + Duration::from_secs(6);
        let (second_at, measured_at) = if order == Order::Together {
            (first_at, first_at)
        } else {
            let second_at = first_at + SHARES_ALONE;
            (second_at, second_at + SHARES_SETTLE)
        };
        let over_at = measured_at + SHARES_MEASURED;
        let mut drives = Vec::new();
        for (index, (contender, at)) in contenders
            .into_iter()
            .zip([first_at, second_at])
            .enumerate()
        {
            let job = Job {
                to: relay.addresses[index][0],
                bodies: u32::MAX,
                starts_at_ns: Some(at.as_nanos() as u64),
                until_ns: Some(over_at.as_nanos() as u64),
                // Its window ends it, not its length.
                cut_s: BODY_CUT_S,
                has_rpcs: false,
                ..self.job(part, contender, &relay, &link)
            };
            drives.push((Drive::start(self, contender, &job)?, job));
        }
        let outcomes: Vec<_> = drives
            .into_iter()
            .map(|(drive, job)| drive.finish(&job))
            .collect();
        let relay = relay.stop()?;
        let window = [measured_at, over_at].map(|at| at.as_nanos() as u64);
        let mut mbit_per_s = Vec::new();
        let mut ends = Vec::new();
        let mut faults = Vec::new();
        for (server, outcome) in servers.into_iter().zip(outcomes) {
            let served = server.finish()?;
            mbit_per_s.push(served.mbit_per_s(window));
            match outcome {
                Ok(outcome) => ends.push(outcome.ends()),
                Err(error) => faults.push(error.to_string()),
            }
        }
        Ok(Shares {
            part: part.to_string(),
            first: contenders[0].to_string(),
            first_mbit_per_s: mbit_per_s[0],
            second_mbit_per_s: mbit_per_s[1],
            ends,
            faults,
            relay,
        })
    }

    /// A body, a restart, and a second body: how fast that one begins.
    pub(super) fn resume(&self, part: Part, both: bool) -> Result<Ramp> {
        let folder = Folder::new()?;
        let [sender, receiver] = ["sender", "receiver"].map(|name| folder.0.join(name));
        let link = part.link(0);
        let contender = Contender::Millrace;
        let start_server = || Server::start(self, contender, Some(receiver.clone()));
        let mut server = start_server()?;
        let relay = Relay::start(&[link], &[path_to(server.address)])?;
        let job = Job {
            before: Before::Idle { seconds: 1.0 },
            cut_s: 60.0,
            has_rpcs: false,
            remembered_paths: Some(sender.clone()),
            ..self.job(part, contender, &relay, &link)
        };
        let mut outcomes = Vec::new();
        for is_second in [false, true] {
            if is_second && both {
                server.finish()?;
                server = start_server()?;
                relay.set_end(0, 1, server.address);
            }
            outcomes.push(Drive::start(self, contender, &job)?.finish(&job)?);
        }
        server.finish()?;
        let relay = relay.stop()?;
        Ok(Ramp::new(part, &outcomes, &link, relay))
    }

    /// All nodes of the mesh in one process, each pair over a link of its own.
    pub(super) fn mesh(&self) -> Result<MeshCell> {
        let links = sites::links();
        let configs: Vec<_> = links.iter().map(|(_, link)| *link).collect();
        let paths: Vec<_> = (0..links.len())
            .map(|link| Path {
                link,
                ends: [None; 2],
            })
            .collect();
        let relay = Relay::start(&configs, &paths)?;
        // Where each node finds each other; itself nowhere.
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 9));
        let mut reached_at = vec![vec![nowhere; sites::SITES]; sites::SITES];
        for ((pair, _), facing) in links.iter().zip(&relay.addresses) {
            let [one, two] = *pair;
            reached_at[one][two] = facing[0];
            reached_at[two][one] = facing[1];
        }
        let mut command = Command::new(env::current_exe()?);
        command.args(["wan-mesh", "--idle-s", &MESH_IDLE.as_secs().to_string()]);
        command.args(["--reached-at", &serde_json::to_string(&reached_at)?]);
        let mut process = Process::start(command)?;
        let nodes = process.addresses()?;
        for (path, (pair, _)) in links.iter().enumerate() {
            for (side, &node) in pair.iter().enumerate() {
                relay.set_end(path, side, *nodes.get(node).ok_or("a node is missing")?);
            }
        }
        if let Some(stdin) = &mut process.child.stdin {
            stdin.write_all(b"go\n")?;
        }
        let outcome: MeshOutcome = process.result(MESH_IDLE + Duration::from_secs(120))?;
        let relay = relay.stop()?;
        Ok(MeshCell::new(outcome, links.len(), relay))
    }

    fn child(&self, role: &str, contender: Contender, cpu: usize) -> Result<Command> {
        let mut command = Command::new(env::current_exe()?);
        command.args([role, &contender.to_string(), "--cpu", &cpu.to_string()]);
        for change in &self.run.set {
            command.args(["--set", change]);
        }
        Ok(command)
    }
}

fn path_to(server: SocketAddr) -> Path {
    Path {
        link: 0,
        ends: [None, Some(server)],
    }
}

/// A child process that says where it listens, and at its end what it saw.
#[derive(Debug)]
struct Process {
    child: Child,
    /// Taken by [`Self::result`].
    out: Option<BufReader<ChildStdout>>,
}

impl Process {
    fn start(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let out = child.stdout.take().ok_or("no standard output")?;
        Ok(Self {
            child,
            out: Some(BufReader::new(out)),
        })
    }

    fn addresses(&mut self) -> Result<Vec<SocketAddr>> {
        let mut line = String::new();
        let out = self.out.as_mut().ok_or("no standard output")?;
        out.read_line(&mut line)?;
        let list = line.strip_prefix("ready ").ok_or("a process failed")?;
        let addresses = list.split_whitespace().map(str::parse);
        Ok(addresses.collect::<std::result::Result<_, _>>()?)
    }

    /// What the process prints until its end. One that takes longer is ended.
    fn result<T: DeserializeOwned>(mut self, within: Duration) -> Result<T> {
        let mut out = self.out.take().ok_or("no standard output")?;
        let reader = std::thread::spawn(move || -> std::io::Result<String> {
            let mut text = String::new();
            out.read_to_string(&mut text)?;
            Ok(text)
        });
        let until = clock::now() + within;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if clock::now() > until {
                return Err("a process hung".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = reader.join().map_err(|_| "a reader panicked")??;
        if !status.success() {
            return Err(format!("a process failed: {status}").into());
        }
        Ok(serde_json::from_str(&text)?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _already_waited = self.child.wait();
    }
}

#[derive(Debug)]
struct Server {
    process: Process,
    address: SocketAddr,
}

impl Server {
    fn start(
        runner: &Runner<'_>,
        contender: Contender,
        remembered_paths: Option<PathBuf>,
    ) -> Result<Self> {
        let mut command = runner.child("wan-serve", contender, runner.run.serve_cpu)?;
        if let Some(folder) = remembered_paths {
            command.arg("--remembered-paths").arg(folder);
        }
        let mut process = Process::start(command)?;
        let address = process.addresses()?.first().copied();
        Ok(Self {
            process,
            address: address.ok_or("a process listens nowhere")?,
        })
    }

    /// Ends the process.
    fn finish(mut self) -> Result<Served> {
        drop(self.process.child.stdin.take());
        self.process.result(GRACE)
    }
}

#[derive(Debug)]
struct Drive(Process);

impl Drive {
    fn start(runner: &Runner<'_>, contender: Contender, job: &Job) -> Result<Self> {
        let mut command = runner.child("wan-drive", contender, runner.run.drive_cpu)?;
        command.args(["--job", &serde_json::to_string(job)?]);
        Ok(Self(Process::start(command)?))
    }

    fn finish(self, job: &Job) -> Result<Outcome> {
        let bodies = match job.until_ns {
            Some(at) => clock::until(at),
            None => Duration::from_secs_f64(job.cut_s) * job.bodies,
        };
        let connect = Duration::from_secs_f64(job.connect_within_s);
        self.0.result(connect + job.before.lasts() + bodies + GRACE)
    }
}

/// A folder of its own, removed at the end.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let name = format!("millrace-bench-wan-{}", std::process::id());
        let folder = env::temp_dir().join(name);
        fs::create_dir_all(folder.join("sender"))?;
        fs::create_dir_all(folder.join("receiver"))?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left lies in the folder for temporary files.
        fs::remove_dir_all(&self.0).ok();
    }
}
