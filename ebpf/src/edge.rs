//! The edge as a whole: attached to interfaces, kept by its pins, taken over by whoever comes next.
//!
//! 1. What is in force is what is pinned; a process only looks in. `kill -9` changes nothing, and a handle that is dropped
//!    detaches nothing.
//! 2. A program is replaced link by link, each at once for the next packet; new programs have passed the self-test. If a link
//!    refuses, all have their old program again.
//! 3. Programs of a new version work on the maps that are there: no count, rule or limit is lost.
//! 4. Whatever changes pins holds their lock.
//! 5. It belongs to the network namespace that it was attached in: its table and its interfaces are there, and its pins are seen from everywhere.
//! 6. An interface that is gone is not attached to, whatever was asked for: another one may have its name or its index by now.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use libbpf_rs::query::LinkTypeInfo;
use libbpf_rs::{Link, MapHandle};
use millrace_edge_policy::rules::Compiled;
use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use crate::abi::{EdgeControl, LAYOUT};
pub use crate::error::EdgeError;
use crate::load::{LoadOptions, Loaded, Program, build};
use crate::maps::Maps;
use crate::netns::NetworkNamespace;
use crate::pins::{Kind, Lock, PinError, Pins, remove_link};
use crate::presence::make_secrets;
use crate::publish::Publisher;
use crate::selftest;
use crate::state::{AttachMode, Interface, State};
use crate::sys::{self, Hook};

/// What to attach to.
#[derive(Debug, Clone, Default)]
pub struct AttachOptions {
    /// Interfaces, by name, of the calling thread's network namespace.
    pub interfaces: Vec<String>,
    /// Where in the kernel.
    pub mode: AttachMode,
    /// Sizes of the maps; fixed until everything is detached.
    pub sizes: LoadOptions,
}

/// A look at what is pinned, with everything open that it takes to work without capabilities.
#[derive(Debug)]
pub struct Edge {
    pins: Pins,
    maps: Maps,
    programs: BTreeMap<Program, OwnedFd>,
}

/// Programs that are pinned: not the one for tests, which charges and counts.
const PINNED: [Program; 6] = [
    Program::Edge,
    Program::EdgeTrace,
    Program::ConnState,
    Program::ConnWalk,
    Program::Stamp,
    Program::Learn,
];

/// Programs of an interface, in the order in which they are attached. The stamp's reader is first: without it, the table would drop what
/// the program passes.
const OF_INTERFACE: [Program; 3] = [Program::Stamp, Program::Learn, Program::Edge];

impl Edge {
    /// Loads, tests and pins the programs, and attaches them. Nothing is refused before a set is published. What somebody who died has left
    /// of an attempt is cleared away, unless it can be adopted.
    ///
    /// # Errors
    ///
    /// See [`EdgeError`]; what was there is as before.
    pub fn attach(pins: &Pins, options: &AttachOptions) -> Result<Self, EdgeError> {
        // Waits: whoever starts a process has a copy of every lock of its own until that process executes, also of one that it gave back.
        let lock = pins.lock_waiting()?;
        if let Some(found) = pins.foreign_layouts()?.pop() {
            let root = pins.root().to_owned();
            return Err(EdgeError::Layout { root, found });
        }
        if pins.is_present() {
            clear_unfinished(pins)?;
        }
        selftest::run()?;
        let loaded = Loaded::load(&options.sizes)?;
        // Where this is refused, the pins of an edge that runs may be out of sight: nothing is cleared away then.
        pins.create()?;
        let edge = attach_new(pins, &loaded, options, &lock);
        if edge.is_err() {
            // The first error is the one to tell.
            let _ = pins.remove_own();
        }
        edge
    }

    /// Takes over what is pinned.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Absent`] if nothing is, [`EdgeError::Layout`] if another version of this program has pinned it,
    /// [`EdgeError::Incomplete`] if something is missing.
    pub fn adopt(pins: &Pins) -> Result<Self, EdgeError> {
        if !pins.is_present() {
            let root = pins.root().to_owned();
            return Err(match pins.foreign_layouts()?.pop() {
                Some(found) => EdgeError::Layout { root, found },
                None => EdgeError::Absent { root },
            });
        }
        let mut programs = BTreeMap::new();
        for program in PINNED {
            let path = pins.path(Kind::Program, program.name());
            let opened = sys::open_pin(&path);
            let opened = opened.map_err(|source| EdgeError::Incomplete { path, source })?;
            programs.insert(program, opened);
        }
        // Without it, TCP is charged and never counted.
        let path = tracepoint_path(pins);
        if !path.exists() {
            let source = io::ErrorKind::NotFound.into();
            return Err(EdgeError::Incomplete { path, source });
        }
        let maps = Maps::open(|name| MapHandle::from_pinned_path(pins.path(Kind::Map, name)))?;
        let layout: u32 = maps.control.load_part(0, offset_of!(EdgeControl, layout));
        if layout != LAYOUT {
            let (root, found) = (pins.root().to_owned(), format!("layout {layout}"));
            return Err(EdgeError::Layout { root, found });
        }
        Ok(Self {
            pins: pins.clone(),
            maps,
            programs,
        })
    }

    /// Takes everything away: links, programs, maps, the file beside. Needs no other process, and no layout that it knows.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Pins`]; what could be removed is.
    pub fn detach(pins: &Pins) -> Result<(), EdgeError> {
        let _lock = pins.lock_waiting()?;
        Ok(pins.remove()?)
    }

    /// Whether the calling thread is where what is pinned, of whatever layout, may be detached: where it was attached, or anywhere once it is
    /// on no interface any more. Then the place that is not here, if it is none: a table that it left there stays.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Elsewhere`]; [`EdgeError::OutOfSight`] where a running edge would lose all but its pins.
    pub fn may_detach(pins: &Pins) -> Result<Option<NetworkNamespace>, EdgeError> {
        if pins.are_out_of_sight()?
            && State::read(pins).is_ok_and(|state| !state.interfaces.is_empty())
        {
            let root = pins.root().to_owned();
            return Err(EdgeError::OutOfSight { root });
        }
        let Some(namespace) = pins.namespace() else {
            return Ok(None);
        };
        if namespace.cookie == here()?.cookie {
            return Ok(None);
        }
        if pins.all_links()?.iter().any(|link| on_interface(link)) {
            let root = pins.root().to_owned();
            return Err(EdgeError::Elsewhere { root, namespace });
        }
        Ok(Some(namespace))
    }

    /// That the calling thread is in the network namespace that it was attached in.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Elsewhere`].
    pub fn check_here(&self) -> Result<(), EdgeError> {
        let cookie: u64 = self
            .maps
            .control
            .load_part(0, offset_of!(EdgeControl, netns_cookie));
        if here()?.cookie == cookie {
            return Ok(());
        }
        let written = self.pins.namespace();
        let namespace = written.filter(|written| written.cookie == cookie);
        Err(EdgeError::Elsewhere {
            root: self.pins.root().to_owned(),
            namespace: namespace.unwrap_or(NetworkNamespace { cookie, inode: 0 }),
        })
    }

    /// Where it is pinned.
    #[must_use]
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Its maps.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Publishes a set under a number, holding the pins' lock: see [`Publisher::publish`]. Then counts TCP connections that are open
    /// already: see [`Self::count_open`].
    ///
    /// # Errors
    ///
    /// [`EdgeError::Publish`]; what was in force is.
    pub fn publish(
        &self,
        set: &Compiled,
        number: u32,
        probation: Option<Duration>,
    ) -> Result<(), EdgeError> {
        let lock = self.pins.lock_waiting()?;
        Publisher::new(&self.maps).publish(set, number, probation)?;
        self.count_older(&lock);
        Ok(())
    }

    /// Keeps the set that is on probation.
    ///
    /// # Errors
    ///
    /// [`PublishError::NoProbation`].
    pub fn confirm(&self) -> Result<(), EdgeError> {
        let _lock = self.pins.lock_waiting()?;
        Ok(Publisher::new(&self.maps).confirm()?)
    }

    /// Takes back the set that is on probation, and counts as [`Self::publish`] does: ports that it did not declare may be back.
    ///
    /// # Errors
    ///
    /// [`PublishError::NoProbation`].
    pub fn revert(&self) -> Result<(), EdgeError> {
        let lock = self.pins.lock_waiting()?;
        Publisher::new(&self.maps).revert()?;
        self.count_older(&lock);
        Ok(())
    }

    /// Counts TCP connections that are older than their port's declaration, once each, as far as a process that the caller can see
    /// has accepted them. It takes no capability, and time by the number of files that are open on this host.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Walk`]; some may be counted.
    pub fn count_open(&self) -> Result<(), EdgeError> {
        let lock = self.pins.lock_waiting()?;
        self.walk(&lock)
    }

    /// As [`Self::count_open`], behind what puts ports in force: that is done, and stays so.
    fn count_older(&self, lock: &Lock) {
        if let Err(error) = self.walk(lock) {
            tracing::warn!(%error, "a source may hold more connections than its cap until those it has close");
        }
    }

    fn walk(&self, _lock: &Lock) -> Result<(), EdgeError> {
        let walk = sys::walk(self.program(Program::ConnWalk));
        walk.map_err(|source| EdgeError::Walk { source })
    }

    /// Interfaces that it is attached to.
    ///
    /// # Errors
    ///
    /// [`EdgeError::State`].
    pub fn interfaces(&self) -> Result<Vec<Interface>, EdgeError> {
        Ok(State::read(&self.pins)?.interfaces)
    }

    /// Whether all programs of an interface are on it now. None is once the interface was removed, as by its driver or with its network
    /// namespace, even if there is one of the same name again; and somebody may have detached one of them.
    #[must_use]
    pub fn is_live(&self, interface: &Interface) -> bool {
        OF_INTERFACE.into_iter().all(|program| {
            let link = self.link_path(program, interface.index);
            interface_of(&link) == Some(interface.index)
        })
    }

    /// Attaches to one more interface of the calling thread's network namespace, or again to one that was removed and made anew, or that one
    /// of the programs was detached from.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Interface`] if there is none of this name, [`EdgeError::Attach`] if the kernel refuses, [`EdgeError::Elsewhere`] where the
    /// interfaces are others; nothing has changed then.
    pub fn attach_interface(&mut self, name: &str, mode: AttachMode) -> Result<(), EdgeError> {
        let lock = self.pins.lock_waiting()?;
        self.attach_locked(name, mode, &lock)
    }

    fn attach_locked(&self, name: &str, mode: AttachMode, lock: &Lock) -> Result<(), EdgeError> {
        self.check_here()?;
        let index = index_of(name)?;
        let mut state = State::read(&self.pins)?;
        let known = |interface: &Interface| interface.index == index;
        if state.interfaces.iter().any(|i| known(i) && self.is_live(i)) {
            return Ok(());
        }
        let gone = |interface: &Interface| {
            (known(interface) || interface.name == name) && !self.is_live(interface)
        };
        for interface in state.interfaces.extract_if(.., |i| gone(i)) {
            self.remove_links(interface.index)?;
        }
        let stamp = self.link(Program::Stamp, name, index, Hook::TcxIngress)?;
        let learn = self.link(Program::Learn, name, index, Hook::TcxEgress)?;
        let (edge, mode) = self.link_xdp(name, index, mode)?;
        let pinned = OF_INTERFACE
            .into_iter()
            .zip([stamp, learn, edge])
            .try_for_each(|(program, link)| pin(link.as_fd(), self.link_path(program, index)));
        state.interfaces.push(Interface {
            name: name.to_owned(),
            index,
            mode,
        });
        let kept = pinned.and_then(|()| Ok(state.write(&self.pins, lock)?));
        if kept.is_err() {
            self.remove_links(index)?;
        }
        kept
    }

    /// Detaches from an interface; it need not exist any more.
    ///
    /// # Errors
    ///
    /// [`EdgeError::NotAttached`] if it is not attached to one of this name.
    pub fn detach_interface(&mut self, name: &str) -> Result<(), EdgeError> {
        let lock = self.pins.lock_waiting()?;
        let mut state = State::read(&self.pins)?;
        let Some(place) = state
            .interfaces
            .iter()
            .position(|interface| interface.name == name)
        else {
            return Err(EdgeError::NotAttached {
                name: name.to_owned(),
            });
        };
        let interface = state.interfaces.remove(place);
        self.remove_links(interface.index)?;
        Ok(state.write(&self.pins, &lock)?)
    }

    fn remove_links(&self, index: u32) -> Result<(), EdgeError> {
        for program in OF_INTERFACE.into_iter().rev() {
            let path = self.link_path(program, index);
            if path.exists() {
                remove_link(&path)?;
            }
        }
        Ok(())
    }

    fn link_path(&self, program: Program, index: u32) -> PathBuf {
        self.pins
            .path(Kind::Link, &format!("{}-{index}", program.name()))
    }

    /// One of [`PINNED`].
    pub(crate) fn program(&self, program: Program) -> BorrowedFd<'_> {
        self.programs[&program].as_fd()
    }

    fn link(
        &self,
        program: Program,
        interface: &str,
        index: u32,
        hook: Hook,
    ) -> Result<OwnedFd, EdgeError> {
        sys::link_create(self.program(program), index, hook).map_err(|source| EdgeError::Attach {
            program: program.name(),
            place: interface.to_owned(),
            source,
        })
    }

    /// The link, and the mode that it has.
    fn link_xdp(
        &self,
        interface: &str,
        index: u32,
        mode: AttachMode,
    ) -> Result<(OwnedFd, AttachMode), EdgeError> {
        let link = |flags| self.link(Program::Edge, interface, index, Hook::Xdp { flags });
        let native = || Ok((link(sys::NATIVE)?, AttachMode::Native));
        let generic = || Ok((link(sys::GENERIC)?, AttachMode::Generic));
        match mode {
            AttachMode::Native => native(),
            AttachMode::Generic => generic(),
            AttachMode::Auto => native().or_else(|error: EdgeError| {
                tracing::info!(%error, "no native XDP; generic, which is slower");
                generic()
            }),
        }
    }

    /// Loads the programs of this binary on the maps that are there, tests them, and puts them in the place of those that run.
    ///
    /// # Errors
    ///
    /// See [`EdgeError`]; every link has the program that it had.
    pub fn reload(&mut self) -> Result<(), EdgeError> {
        let loaded = self.load_beside()?;
        self.replace(&loaded)
    }

    /// Loads the programs of this binary on the maps that are there, once they have passed the self-test. They are not in force.
    ///
    /// # Errors
    ///
    /// [`EdgeError::SelfTest`], [`EdgeError::Load`].
    pub fn load_beside(&self) -> Result<Loaded, EdgeError> {
        selftest::run()?;
        let reuse = Maps::NAMES.map(|name| (name.to_owned(), self.pins.path(Kind::Map, name)));
        Ok(Loaded::load(&LoadOptions {
            reuse: reuse.into(),
            ..LoadOptions::default()
        })?)
    }

    /// Puts programs in the place of those that run. No packet is lost, none gets past.
    ///
    /// # Errors
    ///
    /// See [`EdgeError`]; every link has the program that it had.
    pub fn replace(&mut self, loaded: &Loaded) -> Result<(), EdgeError> {
        let _lock = self.pins.lock_waiting()?;
        let new = handles(loaded)?;
        self.update_links(&new)?;
        // The new programs are in force. What is left are the names by which others find them, and the tracepoint: its old program counts
        // until the new one does, and what both see is counted once.
        if let Err(error) = self.rename(&new) {
            self.update_links(&self.programs)?;
            // As far as names were given: it fails where the other did, at the latest.
            if let Err(error) = self.rename(&self.programs) {
                tracing::debug!(%error, "names are those of the old programs up to here");
            }
            return Err(error);
        }
        self.pins.set_build(&build())?;
        *self = Self::adopt(&self.pins)?;
        Ok(())
    }

    /// Whether the programs that run are those that this binary carries; not known is no.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.pins.build() == Some(build())
    }

    fn rename(&self, new: &BTreeMap<Program, OwnedFd>) -> Result<(), EdgeError> {
        let tracepoint = link_tracepoint(new[&Program::ConnState].as_fd())?;
        replace_pin(tracepoint.as_fd(), tracepoint_path(&self.pins))?;
        new.iter().try_for_each(|(program, new)| {
            replace_pin(new.as_fd(), self.pins.path(Kind::Program, program.name()))
        })
    }

    /// Gives every link of an interface that is there another program; all or none.
    fn update_links(&self, programs: &BTreeMap<Program, OwnedFd>) -> Result<(), EdgeError> {
        let mut updated: Vec<(OwnedFd, Program)> = Vec::new();
        for (path, program) in self.links()? {
            let result = sys::open_pin(&path).and_then(|link| {
                sys::link_update(link.as_fd(), programs[&program].as_fd())?;
                updated.push((link, program));
                Ok(())
            });
            // Its interface is gone: nothing runs there.
            if let Err(source) = result.or_else(unless_gone) {
                for (link, program) in updated {
                    if let Err(error) = sys::link_update(link.as_fd(), self.program(program)) {
                        tracing::error!(%error, ?program, "a link could not be given its old program");
                    }
                }
                return Err(EdgeError::Update { path, source });
            }
        }
        Ok(())
    }

    /// Links of interfaces, with what is attached there.
    fn links(&self) -> Result<Vec<(PathBuf, Program)>, EdgeError> {
        let names = self.pins.names(Kind::Link)?;
        let links = names.into_iter().filter_map(|name| {
            let (program, _index) = name.split_once('-')?;
            let program = OF_INTERFACE
                .into_iter()
                .find(|known| known.name() == program)?;
            Some((self.pins.path(Kind::Link, &name), program))
        });
        Ok(links.collect())
    }
}

fn attach_new(
    pins: &Pins,
    loaded: &Loaded,
    options: &AttachOptions,
    lock: &Lock,
) -> Result<Edge, EdgeError> {
    let (maps, namespace) = (loaded.maps(), here()?);
    maps.control
        .store_part(0, offset_of!(EdgeControl, layout), &LAYOUT);
    maps.control
        .store_part(0, offset_of!(EdgeControl, netns_cookie), &namespace.cookie);
    pins.set_namespace(namespace)?;
    make_secrets(maps).map_err(|source| EdgeError::Random { source })?;
    for name in Maps::NAMES {
        pin(maps.handle(name).as_fd(), pins.path(Kind::Map, name))?;
    }
    let programs = handles(loaded)?;
    for (program, handle) in &programs {
        pin(handle.as_fd(), pins.path(Kind::Program, program.name()))?;
    }
    pins.set_build(&build())?;
    let tracepoint = link_tracepoint(programs[&Program::ConnState].as_fd())?;
    pin(tracepoint.as_fd(), tracepoint_path(pins))?;
    State::default().write(pins, lock)?;
    let edge = Edge::adopt(pins)?;
    for interface in &options.interfaces {
        edge.attach_locked(interface, options.mode, lock)?;
    }
    Ok(edge)
}

fn handles(loaded: &Loaded) -> Result<BTreeMap<Program, OwnedFd>, EdgeError> {
    let handle = |program: Program| -> Result<_, EdgeError> {
        let handle = loaded.program(program).map_err(EdgeError::Handle)?;
        Ok((
            program,
            handle
                .as_fd()
                .try_clone_to_owned()
                .map_err(|error| EdgeError::Handle(error.into()))?,
        ))
    };
    PINNED.into_iter().map(handle).collect()
}

/// The one link of no interface.
fn tracepoint_path(pins: &Pins) -> PathBuf {
    pins.path(Kind::Link, Program::ConnState.name())
}

fn link_tracepoint(program: BorrowedFd<'_>) -> Result<OwnedFd, EdgeError> {
    sys::link_create(program, 0, Hook::Tracepoint).map_err(|source| EdgeError::Attach {
        program: Program::ConnState.name(),
        place: "inet_sock_set_state".to_owned(),
        source,
    })
}

fn here() -> Result<NetworkNamespace, EdgeError> {
    NetworkNamespace::current().map_err(|source| EdgeError::Namespace { source })
}

/// Whether a link is that of XDP, on an interface that is there: packets are decided on, whatever else is missing.
fn on_interface(link: &Path) -> bool {
    let info = Link::open(link).and_then(|link| link.info());
    matches!(info.map(|info| info.info), Ok(LinkTypeInfo::Xdp(xdp)) if xdp.ifindex != 0)
}

/// The interface that a link is on: none if it was detached, the interface is gone, or it is no link of one.
fn interface_of(link: &Path) -> Option<u32> {
    let info = Link::open(link).and_then(|link| link.info()).ok()?;
    let index = match info.info {
        LinkTypeInfo::Xdp(xdp) => xdp.ifindex,
        LinkTypeInfo::Tcx(tcx) => tcx.ifindex,
        _ => return None,
    };
    // The kernel says 0 of a link that is on none.
    (index != 0).then_some(index)
}

/// Removes what somebody who died while attaching has left, as long as it is on no interface.
///
/// # Errors
///
/// [`EdgeError::Present`] if it can be adopted, [`EdgeError::Incomplete`] if it cannot, and is on an interface.
fn clear_unfinished(pins: &Pins) -> Result<(), EdgeError> {
    let maps = Maps::NAMES.map(|name| pins.path(Kind::Map, name));
    let programs = PINNED.map(|program| pins.path(Kind::Program, program.name()));
    let mut pinned = maps
        .into_iter()
        .chain(programs)
        .chain([tracepoint_path(pins)]);
    let Some(path) = pinned.find(|pin| !pin.exists()) else {
        let root = pins.root().to_owned();
        return Err(EdgeError::Present { root });
    };
    if pins.all_links()?.iter().any(|link| on_interface(link)) {
        let source = io::ErrorKind::NotFound.into();
        return Err(EdgeError::Incomplete { path, source });
    }
    tracing::info!(path = %path.display(), "clearing away what an attempt to attach has left");
    Ok(pins.remove_own()?)
}

fn index_of(name: &str) -> Result<u32, EdgeError> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None);
    any.and_then(|any| netdevice::name_to_index(any, name))
        .map_err(|errno| EdgeError::Interface {
            name: name.to_owned(),
            source: errno.into(),
        })
}

fn pin(object: BorrowedFd<'_>, path: PathBuf) -> Result<(), EdgeError> {
    sys::pin(object, &path).map_err(|source| PinError::Pin { path, source }.into())
}

fn unless_gone(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::ENOLINK) => Ok(()),
        _ => Err(error),
    }
}

/// Gives a name to another object in one step: there is no moment without one.
fn replace_pin(object: BorrowedFd<'_>, path: PathBuf) -> Result<(), EdgeError> {
    let mut new = path.clone().into_os_string();
    new.push("-new");
    let new = PathBuf::from(new);
    // Left by a process that died here.
    let _ = fs::remove_file(&new);
    sys::pin(object, &new)
        .and_then(|()| fs::rename(&new, &path))
        .map_err(|source| PinError::Pin { path, source }.into())
}
