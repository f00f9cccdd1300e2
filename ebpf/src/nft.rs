//! The nftables table of an edge: it guards the declared ports behind the program, and enforces the
//! outbound rules.
//!
//! 1. Only typed values are formatted: no text of an operator or of the registry reaches `nft`.
//! 2. `nft` checks the table, then replaces it in one transaction. No other table is touched.
//! 3. In mode `enforce` the table drops a packet for a declared port without the program's stamp,
//!    so a detached program does not leave the node open. In mode `count` it counts the packet.
//! 4. The table lets no packet in that the program marks *reject*. Only a program that enforces
//!    marks so.
//! 5. `nft` runs in the network namespace of the calling thread.
//! 6. Every folder of pins has its own table, [`TableName`]: edges of one network namespace leave
//!    each other's tables alone. Marks are the same for all.
//! 7. A [`Fingerprint`] changes when anything but the counters of the table changes; packets do not
//!    change it.
//! 8. `nft` is killed after [`Nft::within`]: its caller holds a lock that others wait for.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::hash::{DefaultHasher, Hasher as _};
use std::io::{self, Read, Write as _};
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use millrace_edge_policy::packet::Protocol;
use millrace_edge_policy::rules::{Compiled, Provenance, Rule, RuleAction, Sources, User};
use millrace_edge_policy::settings::Mode;
use millrace_edge_policy::siphash::{Key, siphash24};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde::{Deserialize, Serialize};

use crate::pins::Pins;

/// Mark of packets that the program passed, in the bits of [`MARK_MASK`].
pub const MARK_PASS: u32 = 0x4d00_0000;
/// Mark of packets that the table answers with a refusal.
pub const MARK_REJECT: u32 = 0x4e00_0000;
/// Bits of the mark that belong to the edge.
pub const MARK_MASK: u32 = 0xff00_0000;

/// The contents of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Whether the table drops packets for declared ports that carry no stamp.
    pub enforce: bool,
    /// Declared ports of UDP.
    pub udp: BTreeSet<u16>,
    /// Declared ports of TCP.
    pub tcp: BTreeSet<u16>,
    /// Answers to refused packets, per second, at least 1. The program's own budget comes before
    /// it.
    pub rejects_per_second: u32,
    /// Rules for packets that this host sends. The first match decides; a packet without a match is
    /// allowed.
    pub outbound: Vec<Rule>,
}

impl Table {
    /// The table for a set of the program.
    #[must_use]
    pub fn of(compiled: &Compiled) -> Self {
        let settings = &compiled.settings;
        let ports = |protocol| {
            let services = settings.services.iter();
            let services = services.filter(|service| service.kind.protocol() == protocol);
            services.map(|service| service.port).collect()
        };
        Self {
            enforce: settings.mode == Mode::Enforce,
            udp: ports(Protocol::Udp),
            tcp: ports(Protocol::Tcp),
            rejects_per_second: REJECTS_PER_SECOND,
            outbound: compiled.outbound.clone(),
        }
    }
}

/// Why the table could not be replaced or removed. The table in force stays; where `nft` was
/// killed, it is the old one or the new one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NftError {
    /// `nft` is missing, or the caller may not run it.
    #[error("cannot run {}: {source}; install nftables, or check the path", .program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// `nft` stopped reading or answering, or did not end in time.
    #[error("cannot talk to nft: {0}")]
    Talk(#[source] io::Error),
    /// `nft` refused the table.
    #[error("{}: nft says: {message}", culprit(*rule))]
    Refused {
        /// The outbound rule that it names, if it names one.
        rule: Option<Provenance>,
        /// The message of `nft`.
        message: String,
    },
}

impl NftError {
    /// The error as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Run { .. } => "nft_run",
            Self::Talk(_) => "nft_talk",
            Self::Refused { rule: Some(_), .. } => RULE_REFUSED,
            Self::Refused { rule: None, .. } => "nft_refused",
        }
    }
}

/// [`NftError::reason`] where the cause is a rule of the table, and not the host.
pub const RULE_REFUSED: &str = "nft_rule_refused";

/// What is asked of nftables about the edge's table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NftRequest {
    /// Check whether it could be replaced: [`Nft::check`].
    Check(Table),
    /// Replace it: [`Nft::apply`].
    Apply(Table),
    /// Look at it: [`Nft::fingerprint`].
    Look,
}

/// A hash of the table as it is now, without its counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint(u64);

/// Name of a table of the family `inet`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableName(String);

impl TableName {
    /// The table of the edge with these pins: `millrace` for the default pins, `millrace_HASH` for
    /// others.
    #[must_use]
    pub fn of(pins: &Pins) -> Self {
        let root = pins.canonical_root();
        if root == Pins::default().canonical_root() {
            return Self::default();
        }
        let mut words: Vec<u64> = root.as_os_str().as_bytes().chunks(8).map(word).collect();
        words.push(root.as_os_str().len() as u64);
        Self(format!(
            "{DEFAULT_TABLE}_{:016x}",
            siphash24(NAMING, &words)
        ))
    }
}

impl Default for TableName {
    fn default() -> Self {
        Self(DEFAULT_TABLE.into())
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

const DEFAULT_TABLE: &str = "millrace";

/// Fixed for ever: every version must find the table of the versions before it.
const NAMING: Key = Key { k0: 0, k1: 0 };

/// The program `nft`, and the table that it manages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nft {
    /// A path, or a name to look up in `PATH`.
    pub program: PathBuf,
    /// The table that it replaces, removes and reads.
    pub table: TableName,
    /// How long one call of `nft` may take before it is killed.
    pub within: Duration,
}

impl Default for Nft {
    fn default() -> Self {
        Self {
            program: "nft".into(),
            table: TableName::default(),
            within: WITHIN,
        }
    }
}

impl Nft {
    /// `nft` for the table of the edge with these pins.
    #[must_use]
    pub fn of(pins: &Pins) -> Self {
        Self {
            table: TableName::of(pins),
            ..Self::default()
        }
    }

    /// Does what is asked. After a look: the fingerprint of the table in force, if there is one.
    ///
    /// # Errors
    ///
    /// See [`NftError`].
    pub fn perform(&self, request: &NftRequest) -> Result<Option<Fingerprint>, NftError> {
        match request {
            NftRequest::Check(table) => self.check(table).map(|()| None),
            NftRequest::Apply(table) => self.apply(table).map(|()| None),
            NftRequest::Look => self.fingerprint(),
        }
    }

    /// Checks whether [`Self::apply`] would succeed.
    ///
    /// # Errors
    ///
    /// See [`NftError`].
    pub fn check(&self, table: &Table) -> Result<(), NftError> {
        let script = Script::replace(&self.table, table);
        self.run(&["-c", "-f", "-"], &script, self.until())
    }

    /// Checks the table, then replaces the one in force in one transaction.
    ///
    /// # Errors
    ///
    /// See [`NftError`]. The table in force stays; where `nft` was killed, it is the old one or the
    /// new one.
    pub fn apply(&self, table: &Table) -> Result<(), NftError> {
        let script = Script::replace(&self.table, table);
        let until = self.until();
        self.run(&["-c", "-f", "-"], &script, until)?;
        self.run(&["-f", "-"], &script, until)
    }

    /// Removes the table. Succeeds if there is none.
    ///
    /// # Errors
    ///
    /// See [`NftError`].
    pub fn remove(&self) -> Result<(), NftError> {
        let script = Script::remove(&self.table);
        self.run(&["-f", "-"], &script, self.until())
    }

    /// The fingerprint of the table in force; none if there is no table.
    ///
    /// # Errors
    ///
    /// See [`NftError`].
    pub fn fingerprint(&self) -> Result<Option<Fingerprint>, NftError> {
        // Stateless: without the values of counters.
        let child = self.spawn(
            &["-s", "list", "table", "inet", &self.table.0],
            Stdio::null(),
            Stdio::piped(),
        )?;
        // The hasher's keys are fixed: the same text has the same hash in every process.
        let mut hasher = DefaultHasher::new();
        // The output is as long as the table; it is hashed as it comes, and never kept.
        let (output, _) = talk(child, &[], self.until(), |text| hasher.write(text))?;
        if output.status.success() {
            return Ok(Some(Fingerprint(hasher.finish())));
        }
        let message = String::from_utf8_lossy(&output.stderr);
        if message.contains(NO_TABLE) {
            return Ok(None);
        }
        Err(Script::new().refused(&output))
    }

    fn spawn(&self, arguments: &[&str], stdin: Stdio, stdout: Stdio) -> Result<Child, NftError> {
        Command::new(&self.program)
            .args(arguments)
            // The caller reads its messages, so they must be in one language.
            .env("LC_ALL", "C")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| NftError::Run {
                program: self.program.clone(),
                source,
            })
    }

    fn until(&self) -> Instant {
        Instant::now() + self.within
    }

    fn run(&self, arguments: &[&str], script: &Script, until: Instant) -> Result<(), NftError> {
        let child = self.spawn(arguments, Stdio::piped(), Stdio::null())?;
        let (output, fed) = talk(child, script.text.as_bytes(), until, |_| {})?;
        if !output.status.success() {
            // This comes before an error of writing to it: `nft` stops reading because it refuses.
            return Err(script.refused(&output));
        }
        fed.map_err(NftError::Talk)
    }
}

/// Writes to `nft` and reads from it until it ends, or kills it when its time is over. Also returns
/// whether it read all of the input.
fn talk(
    mut child: Child,
    text: &[u8],
    until: Instant,
    heard: impl FnMut(&[u8]),
) -> Result<(Output, io::Result<()>), NftError> {
    let ended = exchange(&mut child, text, until, heard);
    if ended.is_err() {
        // The caller gets the first error.
        let _ = child.kill().and_then(|()| child.wait());
    }
    ended.map_err(NftError::Talk)
}

fn exchange(
    child: &mut Child,
    mut text: &[u8],
    until: Instant,
    mut heard: impl FnMut(&[u8]),
) -> io::Result<(Output, io::Result<()>)> {
    let mut stdin = unblocked(child.stdin.take())?;
    let mut stdout = unblocked(child.stdout.take())?;
    let mut stderr = unblocked(child.stderr.take())?;
    let (mut fed, mut said) = (Ok(()), Vec::new());
    let mut part = vec![0; AT_ONCE_BYTES];
    loop {
        // The status is taken before the last read, so that everything `nft` wrote until its end is
        // read.
        let status = child.try_wait()?;
        let mut moves = false;
        if let Some(pipe) = &mut stdin {
            match pipe.write(text) {
                Ok(bytes) => {
                    text = &text[bytes..];
                    moves = true;
                }
                Err(error) if is_for_now(&error) => {}
                Err(error) => {
                    fed = Err(error);
                    text = &[];
                }
            }
            if text.is_empty() {
                // Closes the pipe, which is the end of its input.
                stdin = None;
            }
        }
        moves |= hear(&mut stdout, &mut part, &mut heard)?;
        moves |= hear(&mut stderr, &mut part, |text| {
            let room = SAID_BYTES_MAX - said.len();
            said.extend_from_slice(&text[..text.len().min(room)]);
        })?;
        if let Some(status) = status.filter(|_| !moves) {
            let output = Output {
                status,
                stdout: Vec::new(),
                stderr: said,
            };
            return Ok((output, fed));
        }
        if Instant::now() >= until {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "it did not end in time, and was killed",
            ));
        }
        if !moves {
            std::thread::sleep(LOOK);
        }
    }
}

/// Reads once. Returns whether there was something to read.
fn hear(
    pipe: &mut Option<impl Read>,
    part: &mut [u8],
    mut heard: impl FnMut(&[u8]),
) -> io::Result<bool> {
    let Some(open) = pipe else {
        return Ok(false);
    };
    match open.read(part) {
        Ok(0) => *pipe = None,
        Ok(bytes) => {
            heard(&part[..bytes]);
            return Ok(true);
        }
        Err(error) if is_for_now(&error) => {}
        Err(error) => return Err(error),
    }
    Ok(false)
}

fn is_for_now(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted];
    kinds.contains(&error.kind())
}

/// Makes our end of a pipe non-blocking; the other end stays as it is.
fn unblocked<P: AsFd>(pipe: Option<P>) -> io::Result<Option<P>> {
    if let Some(pipe) = &pipe {
        let flags = fcntl_getfl(pipe)?;
        fcntl_setfl(pipe, flags | OFlags::NONBLOCK)?;
    }
    Ok(pipe)
}

/// The input of `nft`, and the rule of each of its lines.
struct Script {
    text: String,
    rule_of_line: Vec<Option<Provenance>>,
}

impl Script {
    fn new() -> Self {
        Self {
            text: String::new(),
            rule_of_line: Vec::new(),
        }
    }

    fn line(&mut self, text: fmt::Arguments<'_>) {
        self.line_of(None, text);
    }

    fn line_of(&mut self, rule: Option<Provenance>, text: fmt::Arguments<'_>) {
        // Writing into a `String` cannot fail.
        let _ = writeln!(self.text, "{text}");
        self.rule_of_line.push(rule);
    }

    /// The commands that remove the table, whether or not it is there.
    fn remove(name: &TableName) -> Self {
        let mut script = Self::new();
        script.line(format_args!("add table inet {name}"));
        script.line(format_args!("delete table inet {name}"));
        script
    }

    fn replace(name: &TableName, table: &Table) -> Self {
        let mut script = Self::remove(name);
        script.line(format_args!("table inet {name} {{"));
        script.input(table);
        if !table.outbound.is_empty() {
            script.output(&table.outbound);
        }
        script.line(format_args!("}}"));
        script
    }

    fn input(&mut self, table: &Table) {
        self.line(format_args!("chain input {{"));
        self.line(format_args!(
            "type filter hook input priority filter - 10; policy accept;"
        ));
        self.line(format_args!("iif \"lo\" accept"));
        self.line(format_args!(
            "meta mark & {MARK_MASK:#x} == {MARK_PASS:#x} accept"
        ));
        self.refusals(table.rejects_per_second.max(1));
        let ports = [("tcp", &table.tcp), ("udp", &table.udp)];
        let declared = ports.into_iter().filter(|(_, ports)| !ports.is_empty());
        let verdict = if table.enforce { " drop" } else { "" };
        for (protocol, ports) in declared {
            let ports = set(ports.iter());
            self.line(format_args!(
                "{protocol} dport {ports} counter{verdict} comment \"unstamped\""
            ));
        }
        self.line(format_args!("}}"));
    }

    /// Chains that keep out what the program marks *reject*, to any port: with scope `host` the
    /// program marks packets for undeclared ports too, and while a set awaits confirmation the
    /// table is still that of the set before.
    fn refusals(&mut self, rate: u32) {
        let marked = format!("meta mark & {MARK_MASK:#x} == {MARK_REJECT:#x}");
        for (protocol, answer) in [("tcp", "tcp reset"), ("udp", "icmpx port-unreachable")] {
            self.line(format_args!(
                "{marked} meta l4proto {protocol} limit rate {rate}/second burst {rate} packets \
                 counter reject with {answer} comment \"refused\""
            ));
        }
        self.line(format_args!(
            "{marked} counter drop comment \"refused in silence\""
        ));
    }

    fn output(&mut self, rules: &[Rule]) {
        self.line(format_args!("chain output {{"));
        self.line(format_args!(
            "type filter hook output priority filter - 10; policy accept;"
        ));
        for rule in rules {
            let sender = owner(rule.user.as_ref());
            let transport = transport(rule.protocol, rule.ports.as_deref());
            let verdict = match (rule.action, rule.protocol) {
                (RuleAction::Allow, _) => "accept",
                (RuleAction::Deny, _) => "drop",
                (RuleAction::Reject, Some(Protocol::Tcp)) => "reject with tcp reset",
                (RuleAction::Reject, _) => "reject with icmpx admin-prohibited",
            };
            let comment = comment(rule.provenance);
            for destination in destinations(&rule.sources) {
                self.line_of(
                    Some(rule.provenance),
                    format_args!("{destination}{sender}{transport}counter {verdict} {comment}"),
                );
            }
        }
        self.line(format_args!("}}"));
    }

    /// The error in the message of `nft`: `/dev/stdin:LINE:COLUMNS: Error: TEXT`, then the line
    /// itself.
    fn refused(&self, output: &Output) -> NftError {
        let message = String::from_utf8_lossy(&output.stderr);
        let line = message
            .split(':')
            .nth(1)
            .and_then(|line| line.parse::<usize>().ok());
        let rule = line.and_then(|line| *self.rule_of_line.get(line.checked_sub(1)?)?);
        let message = match message.split_once("Error: ") {
            Some((_, error)) => error.lines().next().unwrap_or_default().to_owned(),
            None => format!("{}, {}", output.status, message.trim()),
        };
        NftError::Refused { rule, message }
    }
}

/// One match for each address family of the prefixes; one that matches every destination if there
/// are no prefixes.
fn destinations(to: &Sources) -> Vec<String> {
    let prefixes = match to {
        Sources::Any => return vec![String::new()],
        Sources::Prefixes(prefixes) => prefixes,
    };
    // An interval set refuses overlaps, so nested prefixes are merged first.
    let v4: Vec<Ipv4Net> = prefixes
        .iter()
        .filter_map(|prefix| match prefix {
            IpNet::V4(prefix) => Some(prefix.trunc()),
            IpNet::V6(_) => None,
        })
        .collect();
    let v6: Vec<Ipv6Net> = prefixes
        .iter()
        .filter_map(|prefix| match prefix {
            IpNet::V4(_) => None,
            IpNet::V6(prefix) => Some(prefix.trunc()),
        })
        .collect();
    let mut matches = Vec::with_capacity(2);
    if !v4.is_empty() {
        matches.push(format!("ip daddr {} ", set(Ipv4Net::aggregate(&v4))));
    }
    if !v6.is_empty() {
        matches.push(format!("ip6 daddr {} ", set(Ipv6Net::aggregate(&v6))));
    }
    matches
}

/// `nft` looks the name up. It has only letters that [`User`] allows.
fn owner(user: Option<&User>) -> String {
    match user.map(User::as_str) {
        None => String::new(),
        Some(number) if number.bytes().all(|byte| byte.is_ascii_digit()) => {
            format!("meta skuid {number} ")
        }
        Some(name) => format!("meta skuid \"{name}\" "),
    }
}

fn transport(protocol: Option<Protocol>, ports: Option<&[RangeInclusive<u16>]>) -> String {
    let name = match protocol {
        None if ports.is_none() => return String::new(),
        None => "meta l4proto { tcp, udp } th",
        Some(Protocol::Udp) => "udp",
        Some(Protocol::Tcp) => "tcp",
    };
    let Some(ports) = ports else {
        return format!("meta l4proto {name} ");
    };
    let ranges = merged(ports);
    let ranges = ranges
        .iter()
        .map(|range| format!("{}-{}", range.start(), range.end()));
    format!("{name} dport {} ", set(ranges))
}

fn comment(provenance: Provenance) -> String {
    match provenance {
        Provenance::Registry { number, .. } => format!("comment \"rule {number}\""),
        Provenance::Temporary { .. } | Provenance::Members => String::new(),
    }
}

/// The cause of a refusal, for people.
fn culprit(rule: Option<Provenance>) -> String {
    match rule {
        Some(rule) => rule.to_string(),
        None => "the table of the edge".to_owned(),
    }
}

/// The same ports, in ranges that neither overlap nor touch: an interval set refuses overlaps.
fn merged(ranges: &[RangeInclusive<u16>]) -> Vec<RangeInclusive<u16>> {
    let mut sorted = ranges.to_vec();
    sorted.sort_by_key(|range| *range.start());
    let mut merged: Vec<RangeInclusive<u16>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if u32::from(*range.start()) <= u32::from(*last.end()) + 1 => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => merged.push(range),
        }
    }
    merged
}

fn set(elements: impl IntoIterator<Item = impl fmt::Display>) -> String {
    let elements: Vec<String> = elements
        .into_iter()
        .map(|element| element.to_string())
        .collect();
    format!("{{ {} }}", elements.join(", "))
}

/// The message of `nft` for a table that is not there.
const NO_TABLE: &str = "No such file or directory";

/// The most bytes of one read from `nft`.
const AT_ONCE_BYTES: usize = 64 << 10;

/// The most bytes of an error message that are kept.
const SAID_BYTES_MAX: usize = 64 << 10;

/// Below the time that the node waits for its helper, so that the helper lives on.
pub(crate) const WITHIN: Duration = Duration::from_secs(20);

/// Time between two looks at whether `nft` has ended, while it neither reads nor writes.
const LOOK: Duration = Duration::from_millis(1);

/// Enough for people who try a refused port, and too few to be worth provoking: the default budget
/// of the program.
const REJECTS_PER_SECOND: u32 = 100;
