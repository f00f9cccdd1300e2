//! The nftables table of an edge: what guards the declared ports behind the program, and the outbound rules.
//!
//! 1. Only typed values are formatted: nothing that an operator or the registry wrote reaches `nft` as text.
//! 2. The table is replaced in one transaction, after `nft` has checked it; no other table is touched.
//! 3. A packet for a declared port without the program's stamp is dropped in mode `enforce`: a detached program
//!    does not leave the node open. In mode `count` it is counted.
//! 4. A packet that the program marks *reject* never gets in. Only a program that enforces marks so.
//! 5. `nft` runs in the network namespace of the calling thread.
//! 6. Every folder of pins has a table of its own, [`TableName`]: edges of one network namespace leave each other's alone. Marks are the same for all.
//! 7. A [`Fingerprint`] changes when anybody changes the table, and not by what packets do.
//! 8. `nft` is killed when its time is over, [`Nft::within`]: whoever waits for it has a lock that others wait for.

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
/// Mark of packets that are to be refused with an answer.
pub const MARK_REJECT: u32 = 0x4e00_0000;
/// Bits of the mark that belong to the edge.
pub const MARK_MASK: u32 = 0xff00_0000;

/// What the table says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Whether packets for declared ports are dropped if they carry no stamp.
    pub enforce: bool,
    /// Declared ports of UDP.
    pub udp: BTreeSet<u16>,
    /// Declared ports of TCP.
    pub tcp: BTreeSet<u16>,
    /// Answers to refused packets, per second, at least 1; the program has spent its own budget before.
    pub rejects_per_second: u32,
    /// Rules for what this host sends; the first match wins, no match is allowed.
    pub outbound: Vec<Rule>,
}

impl Table {
    /// The table that goes with a set for the program.
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

/// Why the table could not be replaced or removed. The one before stays in force; where `nft` was killed, it is the one or the other.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NftError {
    /// The program is not there, or may not be run.
    #[error("cannot run {}: {source}; install nftables, or check the path", .program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It was fed, and stopped reading or answering, or did not end in time.
    #[error("cannot talk to nft: {0}")]
    Talk(#[source] io::Error),
    /// It refused the table.
    #[error("{}: nft says: {message}", culprit(*rule))]
    Refused {
        /// The outbound rule that it names, if it names one.
        rule: Option<Provenance>,
        /// Its own words.
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

/// [`NftError::reason`] where a rule of the table is to blame, and not the host.
pub const RULE_REFUSED: &str = "nft_rule_refused";

/// What the table says now, in a number: its counters apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint(u64);

/// Name of a table of the family `inet`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableName(String);

impl TableName {
    /// That of the edge with these pins: `millrace` where pins are by default, `millrace_HASH` elsewhere.
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

/// Never another: every version finds the table of those before it.
const NAMING: Key = Key { k0: 0, k1: 0 };

/// The program `nft`, and what it is used for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nft {
    /// A path, or a name to be found in `PATH`.
    pub program: PathBuf,
    /// The table that it replaces, removes and looks at.
    pub table: TableName,
    /// How long one call of [`Self::apply`] and the others may take before `nft` is killed.
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
    /// For the table of the edge with these pins.
    #[must_use]
    pub fn of(pins: &Pins) -> Self {
        Self {
            table: TableName::of(pins),
            ..Self::default()
        }
    }

    /// Whether [`Self::apply`] would do it.
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
    /// See [`NftError`]; the table in force stays, or `nft` was killed and it is the one or the other.
    pub fn apply(&self, table: &Table) -> Result<(), NftError> {
        let script = Script::replace(&self.table, table);
        let until = self.until();
        self.run(&["-c", "-f", "-"], &script, until)?;
        self.run(&["-f", "-"], &script, until)
    }

    /// Removes the table; nothing happens if there is none.
    ///
    /// # Errors
    ///
    /// See [`NftError`].
    pub fn remove(&self) -> Result<(), NftError> {
        let script = Script::remove(&self.table);
        self.run(&["-f", "-"], &script, self.until())
    }

    /// Of the table in force; none if there is no table.
    ///
    /// # Errors
    ///
    /// See [`NftError`].
    pub fn fingerprint(&self) -> Result<Option<Fingerprint>, NftError> {
        // Stateless: without what the counters say.
        let child = self.spawn(
            &["-s", "list", "table", "inet", &self.table.0],
            Stdio::null(),
            Stdio::piped(),
        )?;
        // Its keys are fixed: the same text has the same number in every process.
        let mut hasher = DefaultHasher::new();
        // As long as the table: hashed as it comes, and never held.
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
            // What it says is read, in one language.
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
            // Before a failure to feed it: it stops reading because it refuses.
            return Err(script.refused(&output));
        }
        fed.map_err(NftError::Talk)
    }
}

/// Feeds it and hears it until it ends, or kills it when its time is over. Also, whether it took all that it was fed.
fn talk(
    mut child: Child,
    text: &[u8],
    until: Instant,
    heard: impl FnMut(&[u8]),
) -> Result<(Output, io::Result<()>), NftError> {
    let ended = exchange(&mut child, text, until, heard);
    if ended.is_err() {
        // The first error is the one to tell.
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
        // Before it is heard: what it said until then is heard to the end.
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
                // Closed, which ends what it reads.
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

/// One read of what is there; whether something was.
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

/// Our end of a pipe; the other is as it was.
fn unblocked<P: AsFd>(pipe: Option<P>) -> io::Result<Option<P>> {
    if let Some(pipe) = &pipe {
        let flags = fcntl_getfl(pipe)?;
        fcntl_setfl(pipe, flags | OFlags::NONBLOCK)?;
    }
    Ok(pipe)
}

/// What `nft` reads, and which line belongs to which rule.
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

    /// The table disappears, whether it was there or not.
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

    /// What the program marks *reject* must not get in, to whatever port: with scope `host` it marks packets for ports that are not
    /// declared, and while a set is on probation the table is still that of the set before.
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

    /// The error in `nft`'s words: `/dev/stdin:LINE:COLUMNS: Error: TEXT`, then the line itself.
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

/// One match for each family that the prefixes have; one that matches all for any destination.
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

/// A name is looked up by `nft`; its letters are those that [`User`] allows.
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

/// Who is to blame, for people.
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

/// What `nft` says of a table that is not there.
const NO_TABLE: &str = "No such file or directory";

/// Read from `nft` at once.
const AT_ONCE_BYTES: usize = 64 << 10;

/// What it complains of is kept up to here.
const SAID_BYTES_MAX: usize = 64 << 10;

/// Below what the node waits for its helper, which then lives on.
pub(crate) const WITHIN: Duration = Duration::from_secs(20);

/// Between two looks at whether it has ended, while it neither reads nor says anything.
const LOOK: Duration = Duration::from_millis(1);

/// Enough for people who try a refused port, and too little to be worth provoking: the default budget of the program.
const REJECTS_PER_SECOND: u32 = 100;
