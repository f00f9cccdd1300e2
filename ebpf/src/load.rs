//! Opens the compiled objects, sizes their maps, and loads them into the kernel.
//!
//! Invariants
//!
//! 1. All objects share one set of maps: those of `edge.bpf.o`, which are made first, or reused
//!    from pins.
//! 2. The sizes that programs take for constants are those of the maps, also of reused ones.
//! 3. An error that the verifier caused carries the end of its log.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hasher as _};
use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Once;

use libbpf_rs::{
    Link, MapCore as _, MapHandle, Object, ObjectBuilder, OpenObject, PrintLevel, ProgramHandle,
    ProgramInput, ProgramMut,
};
use millrace_edge_policy::trie::SPARSE_PER_NODE;

use crate::abi::{
    EdgeSizes, GENERATIONS, STAMP_MAGIC, STAMP_PASS_BYTES, STAMP_REJECT, STAMP_REJECT_BYTES,
};
use crate::maps::{MapError, Maps};

const EDGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/edge.bpf.o"));
const STAMP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/stamp.bpf.o"));
const CONN_STATE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/conn_state.bpf.o"));

/// A name for the programs that this binary carries. Other programs have another name.
#[must_use]
pub fn build() -> String {
    // The hasher's keys are fixed. A binary with other keys would only replace programs by the same
    // programs.
    let mut hasher = DefaultHasher::new();
    for object in [EDGE, STAMP, CONN_STATE] {
        hasher.write(object);
    }
    format!("{:016x}", hasher.finish())
}

/// Name of the section that holds [`EdgeSizes`].
const SIZES: &str = ".rodata.sizes";
/// Lines of the verifier's log that an error carries.
const LOG_LINES: usize = 12;
/// The most bytes that a program adds to a frame: a stamp in front, an option behind.
const FRAME_GROWTH: usize = 256;

/// Sizes of the maps. They are fixed once the maps exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOptions {
    /// Dense nodes of the IPv4 tries of one generation. Both generations exist, so each takes 2
    /// KiB, and a quarter more for sparse nodes.
    pub trie_nodes4: u32,
    /// Dense nodes of the IPv6 tries of one generation.
    pub trie_nodes6: u32,
    /// Buckets of one generation of the sketch, rounded up to a power of two: 64 bytes each, in
    /// both generations.
    pub limiter_buckets: u32,
    /// Rules of one generation: 8 bytes each for each CPU, in both generations.
    pub rules_max: u32,
    /// Registry peers whose proofs the kernel can check.
    pub peers_max: u32,
    /// Sources whose connections are counted, for each of QUIC and TCP.
    pub sources_max: u32,
    /// Flows that are remembered with scope `host`.
    pub replies_max: u32,
    /// Maps to reuse: name to pin. They keep their sizes, whatever the fields above say.
    pub reuse: BTreeMap<String, PathBuf>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            trie_nodes4: 4_096,
            trie_nodes6: 8_192,
            limiter_buckets: 1 << 16,
            rules_max: 4_096,
            peers_max: 4_096,
            sources_max: 1 << 16,
            replies_max: 1 << 16,
            reuse: BTreeMap::new(),
        }
    }
}

/// Why the programs could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// An object could not be read: a defect of the build.
    #[error("cannot open the object {object}: {source}")]
    Open {
        /// The object.
        object: &'static str,
        /// libbpf's error.
        source: libbpf_rs::Error,
    },
    /// A map could not be sized or reused.
    #[error("cannot set up map {map} of {object}: {source}")]
    Map {
        /// The object.
        object: &'static str,
        /// The map.
        map: String,
        /// libbpf's error.
        source: libbpf_rs::Error,
    },
    /// The kernel refused maps or programs.
    #[error("the kernel refuses {object}: {source}\n{log}")]
    Refused {
        /// The object.
        object: &'static str,
        /// libbpf's error.
        source: libbpf_rs::Error,
        /// End of libbpf's and the verifier's log.
        log: String,
    },
    /// The maps cannot be used.
    #[error(transparent)]
    Maps(#[from] MapError),
}

/// A program of the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Program {
    /// XDP, the one that is attached.
    Edge,
    /// XDP: returns the decision of `Edge`, and changes nothing.
    EdgeTrace,
    /// XDP: decides as `Edge` does, in an environment that the caller makes up.
    EdgeTest,
    /// tcx ingress: turns stamps into marks.
    Stamp,
    /// tcx egress: learns what this host sends, for scope `host`.
    Learn,
    /// Tracepoint: counts TCP connections.
    ConnState,
    /// Iterator over files: counts TCP connections that are older than their port's declaration.
    ConnWalk,
}

impl Program {
    /// All programs.
    pub const ALL: [Self; 7] = [
        Self::Edge,
        Self::EdgeTrace,
        Self::EdgeTest,
        Self::Stamp,
        Self::Learn,
        Self::ConnState,
        Self::ConnWalk,
    ];

    /// Its name in the kernel.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::EdgeTrace => "edge_trace",
            Self::EdgeTest => "edge_test",
            Self::Stamp => "stamp",
            Self::Learn => "learn",
            Self::ConnState => "conn_state",
            Self::ConnWalk => "conn_walk",
        }
    }
}

/// The result of a program on a frame, in a test run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// `enum xdp_action`.
    pub action: u32,
    /// The stamp in front of the frame, if it has one.
    pub stamp: Option<u32>,
    /// The frame as the program left it.
    pub frame: Vec<u8>,
    /// Time of one run in nanoseconds, as the kernel measured it, without the system call.
    pub nanoseconds: u64,
}

/// The programs in the kernel. Loading attaches nothing; the kernel drops what is neither attached
/// nor pinned together with this.
#[derive(Debug)]
pub struct Loaded {
    edge: Object,
    stamp: Object,
    conn_state: Object,
    maps: Maps,
}

impl Loaded {
    /// Loads every program.
    ///
    /// # Errors
    ///
    /// See [`LoadError`]. The kernel refuses maps and programs without CAP_BPF and CAP_NET_ADMIN
    /// (CAP_PERFMON for the tracepoint), and when it is too old.
    pub fn load(options: &LoadOptions) -> Result<Self, LoadError> {
        let edge = load_edge(options)?;
        let stamp = load_companion("stamp", STAMP, &edge, &BTreeMap::new())?;
        let conn_state = load_companion("conn_state", CONN_STATE, &edge, &options.reuse)?;
        let maps = Maps::open(|name| match handle_of(&edge, name)? {
            Some(handle) => Ok(handle),
            None => handle_of(&conn_state, name)?.ok_or_else(not_there),
        })?;
        Ok(Self {
            edge,
            stamp,
            conn_state,
            maps,
        })
    }

    /// The maps.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// A descriptor of a program, for attaching and pinning.
    ///
    /// # Errors
    ///
    /// The kernel's error when no descriptor is left.
    pub fn program(&self, program: Program) -> Result<ProgramHandle, libbpf_rs::Error> {
        ProgramHandle::try_from(&self.find(program)?)
    }

    /// Counts TCP connections as long as the returned link lives.
    ///
    /// # Errors
    ///
    /// The kernel's error for attaching to the tracepoint.
    pub fn count_connections(&self) -> Result<Link, libbpf_rs::Error> {
        self.find(Program::ConnState)?.attach()
    }

    /// Runs an XDP program on a frame, `repeat` times on the same memory, without an interface
    /// (`BPF_PROG_TEST_RUN`).
    ///
    /// # Errors
    ///
    /// The kernel's error. A frame has at least 14 bytes.
    pub fn run(
        &self,
        program: Program,
        frame: &[u8],
        repeat: u32,
    ) -> Result<Run, libbpf_rs::Error> {
        let input = ProgramInput {
            repeat,
            ..ProgramInput::default()
        };
        self.run_on(program, frame, input)
    }

    /// Runs an XDP program once on a frame of which at most `linear` bytes are contiguous; the rest
    /// is in fragments. Drivers with small buffers hand over long frames so.
    ///
    /// # Errors
    ///
    /// The kernel's error. It takes Linux 6.18, and at least 14 linear bytes.
    pub fn run_split(
        &self,
        program: Program,
        frame: &[u8],
        linear: usize,
    ) -> Result<Run, libbpf_rs::Error> {
        // `struct xdp_md`; only its `data_end` counts here.
        let linear = u32::try_from(linear.min(frame.len())).unwrap_or(u32::MAX);
        let mut context: Vec<u8> = [0, linear, 0, 0, 0, 0]
            .iter()
            .flat_map(|field: &u32| field.to_ne_bytes())
            .collect();
        let input = ProgramInput {
            context_in: Some(&mut context),
            repeat: 1,
            ..ProgramInput::default()
        };
        self.run_on(program, frame, input)
    }

    fn run_on(
        &self,
        program: Program,
        frame: &[u8],
        input: ProgramInput<'_>,
    ) -> Result<Run, libbpf_rs::Error> {
        let mut left = vec![0; frame.len() + FRAME_GROWTH];
        let input = ProgramInput {
            data_in: Some(frame),
            data_out: Some(&mut left),
            ..input
        };
        let output = self.find(program)?.test_run(input)?;
        let bytes = output.data.map_or(0, |data| data.len());
        let action = output.return_value;
        let nanoseconds = u64::try_from(output.duration.as_nanos()).unwrap_or(u64::MAX);
        left.truncate(bytes);
        let stamp = take_stamp(&mut left);
        Ok(Run {
            action,
            stamp,
            frame: left,
            nanoseconds,
        })
    }

    fn find(&self, program: Program) -> Result<ProgramMut<'_>, libbpf_rs::Error> {
        let object = match program {
            Program::Edge | Program::EdgeTrace | Program::EdgeTest => &self.edge,
            Program::Stamp | Program::Learn => &self.stamp,
            Program::ConnState | Program::ConnWalk => &self.conn_state,
        };
        let found = object
            .progs_mut()
            .find(|found| found.name() == program.name());
        found.ok_or_else(not_there)
    }
}

pub(crate) fn not_there() -> libbpf_rs::Error {
    io::Error::from(io::ErrorKind::NotFound).into()
}

/// The stamp is metadata: the kernel returns it in front of the frame.
fn take_stamp(left: &mut Vec<u8>) -> Option<u32> {
    let (magic, kind) = left.get(..STAMP_PASS_BYTES)?.split_at(4);
    if magic != STAMP_MAGIC.to_ne_bytes() {
        return None;
    }
    let kind = u32::from_ne_bytes(kind.try_into().ok()?);
    left.drain(
        ..if kind == STAMP_REJECT {
            STAMP_REJECT_BYTES
        } else {
            STAMP_PASS_BYTES
        },
    );
    Some(kind)
}

#[cfg(test)]
thread_local! {
    /// The object that this thread loads as the edge. Tests set one with a defect.
    pub(crate) static EDGE_HERE: std::cell::Cell<&'static [u8]> = const { std::cell::Cell::new(EDGE) };
}

#[cfg(test)]
fn edge_object() -> &'static [u8] {
    EDGE_HERE.get()
}

#[cfg(not(test))]
fn edge_object() -> &'static [u8] {
    EDGE
}

fn load_edge(options: &LoadOptions) -> Result<Object, LoadError> {
    const OBJECT: &str = "edge";
    let mut object = open(OBJECT, edge_object())?;
    let generations = |each: u32| each.saturating_mul(GENERATIONS as u32);
    let sparse = |nodes: u32| nodes.saturating_mul(SPARSE_PER_NODE as u32);
    let buckets = options
        .limiter_buckets
        .max(1)
        .checked_next_power_of_two()
        .unwrap_or(1 << 24);
    let entries = [
        ("trie4", generations(options.trie_nodes4)),
        ("trie6", generations(options.trie_nodes6)),
        ("sparse4", generations(sparse(options.trie_nodes4))),
        ("sparse6", generations(sparse(options.trie_nodes6))),
        ("limiter", generations(buckets)),
        ("hits", generations(options.rules_max)),
        ("peers", options.peers_max),
        ("quic_sources", options.sources_max),
        ("tcp_sources", options.sources_max),
        ("replies", options.replies_max),
    ];
    for (map, entries) in entries {
        size_map(OBJECT, &mut object, map, entries)?;
    }
    take_over(OBJECT, &mut object, &options.reuse)?;
    let sizes = EdgeSizes {
        limiter_buckets: entries_of(&object, "limiter") / GENERATIONS as u32,
        rules_max: entries_of(&object, "hits") / GENERATIONS as u32,
        ..EdgeSizes::default()
    };
    set_sizes(OBJECT, &mut object, &sizes)?;
    finish(OBJECT, object)
}

/// Loads an object that uses the maps of `edge`.
fn load_companion(
    name: &'static str,
    bytes: &[u8],
    edge: &Object,
    reuse: &BTreeMap<String, PathBuf>,
) -> Result<Object, LoadError> {
    let mut object = open(name, bytes)?;
    let shared = object
        .maps_mut()
        .filter_map(|map| Some((map.name().to_str()?.to_owned(), map)));
    for (map, mut found) in shared.filter(|(map, _)| Maps::NAMES.contains(&map.as_str())) {
        let reused = match (handle_of(edge, &map), reuse.get(&map)) {
            (Err(source), _) => Err(source),
            (Ok(Some(theirs)), _) => found.reuse_fd(theirs.as_fd()),
            (Ok(None), Some(pin)) => found.reuse_pinned_map(pin),
            (Ok(None), None) => Ok(()),
        };
        reused.map_err(|source| LoadError::Map {
            object: name,
            map,
            source,
        })?;
    }
    let buckets = handle_of(edge, "limiter").and_then(|found| found.ok_or_else(not_there));
    let buckets = buckets
        .map_err(|source| LoadError::Open {
            object: name,
            source,
        })?
        .max_entries();
    let sizes = EdgeSizes {
        limiter_buckets: buckets / GENERATIONS as u32,
        ..EdgeSizes::default()
    };
    set_sizes(name, &mut object, &sizes)?;
    finish(name, object)
}

pub(crate) fn open(object: &'static str, bytes: &[u8]) -> Result<OpenObject, LoadError> {
    hear_libbpf();
    let opened = ObjectBuilder::default()
        .name(object)
        .and_then(|builder| builder.open_memory(bytes));
    opened.map_err(|source| LoadError::Open { object, source })
}

pub(crate) fn finish(name: &'static str, object: OpenObject) -> Result<Object, LoadError> {
    LOG.take();
    object.load().map_err(|source| {
        let lines: Vec<String> = LOG.take().into();
        LoadError::Refused {
            object: name,
            source,
            log: lines.concat(),
        }
    })
}

pub(crate) fn size_map(
    name: &'static str,
    object: &mut OpenObject,
    map: &str,
    entries: u32,
) -> Result<(), LoadError> {
    let mut found = object.maps_mut().find(|found| found.name() == map);
    let sized = found.as_mut().map_or_else(
        || Err(not_there()),
        |found| found.set_max_entries(entries.max(1)),
    );
    sized.map_err(|source| LoadError::Map {
        object: name,
        map: map.to_owned(),
        source,
    })
}

fn take_over(
    name: &'static str,
    object: &mut OpenObject,
    reuse: &BTreeMap<String, PathBuf>,
) -> Result<(), LoadError> {
    for mut map in object.maps_mut() {
        let Some(pin) = map.name().to_str().and_then(|map| reuse.get(map)) else {
            continue;
        };
        map.reuse_pinned_map(pin).map_err(|source| {
            let map = map.name().to_string_lossy().into_owned();
            LoadError::Map {
                object: name,
                map,
                source,
            }
        })?;
    }
    Ok(())
}

fn entries_of(object: &OpenObject, map: &str) -> u32 {
    object
        .maps()
        .find(|found| found.name() == map)
        .map_or(0, |found| found.max_entries())
}

/// Sets the sizes that the programs take for constants. An object that uses none has no such
/// section.
pub(crate) fn set_sizes(
    name: &'static str,
    object: &mut OpenObject,
    sizes: &EdgeSizes,
) -> Result<(), LoadError> {
    let Some(mut section) = object.maps_mut().find(|map| map.name() == SIZES) else {
        return Ok(());
    };
    let words = [
        sizes.limiter_buckets,
        sizes.rules_max,
        sizes.shards,
        sizes.pad,
    ];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let set = section.set_initial_value(&bytes);
    set.map_err(|source| LoadError::Map {
        object: name,
        map: SIZES.to_owned(),
        source,
    })
}

pub(crate) fn handle_of(object: &Object, map: &str) -> Result<Option<MapHandle>, libbpf_rs::Error> {
    let found = object.maps().find(|found| found.name() == map);
    found.map(|found| MapHandle::try_from(&found)).transpose()
}

thread_local! {
    /// What libbpf printed on this thread since the last load began.
    static LOG: RefCell<VecDeque<String>> = const { RefCell::new(VecDeque::new()) };
}

/// Takes libbpf's messages. It has one print callback for the whole process.
fn hear_libbpf() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        libbpf_rs::set_print(Some((PrintLevel::Warn, |_level, message| {
            tracing::debug!(target: "libbpf", "{}", message.trim_end());
            LOG.with_borrow_mut(|log| keep_tail(log, &message));
        })));
    });
}

/// Keeps the last lines. The verifier's log comes as one message of many lines, of which the last
/// say why.
fn keep_tail(log: &mut VecDeque<String>, message: &str) {
    for line in message.split_inclusive('\n') {
        if log.len() == LOG_LINES {
            log.pop_front();
        }
        log.push_back(line.to_owned());
    }
}
