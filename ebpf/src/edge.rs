//! The edge as a whole: attached to interfaces, kept by its pins, adopted by the next process.
//!
//! 1. The pins are in force, not the process: `kill -9` changes nothing, and dropping a handle
//!    detaches nothing.
//! 2. Programs are replaced link by link, each at once for the next packet, after the new ones have
//!    passed the self-test. If one link refuses, all get their old program back.
//! 3. Programs of a new version work on the maps that are there: no count, rule or limit is lost.
//! 4. A process that changes pins holds their lock.
//! 5. An edge belongs to the network namespace that it was attached in: its interfaces and its
//!    table are there. Its pins are visible from every network namespace.
//! 6. The edge attaches to no interface that is gone, whatever the caller asked for: another
//!    interface may have its name or its index by now.

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

use crate::abi::{EdgeControl, LAYOUT};
pub use crate::error::EdgeError;
use crate::interface::{self, AttachMode, Interface};
use crate::journal::{Journal, Step, reach};
use crate::lease::make_secrets;
use crate::load::{LoadOptions, Loaded, Program, build};
use crate::maps::Maps;
use crate::netns::NetworkNamespace;
use crate::pins::{EdgeLock, Kind, PinError, Pins, remove_link};
use crate::publish::Publisher;
use crate::selftest;

use crate::sys::{self, Hook};

/// Options of an attachment.
#[derive(Debug, Clone, Default)]
pub struct AttachOptions {
    /// Names of interfaces in the calling thread's network namespace.
    pub interfaces: Vec<String>,
    /// The mode of XDP: in the driver, or in the kernel's generic code.
    pub mode: AttachMode,
    /// Sizes of the maps. They are fixed until everything is detached.
    pub sizes: LoadOptions,
}

/// A handle of the pinned objects. It holds every descriptor that work without capabilities needs.
#[derive(Debug)]
pub struct Edge {
    pins: Pins,
    maps: Maps,
    programs: BTreeMap<Program, OwnedFd>,
}

/// What [`Edge::renew`] did.
#[derive(Debug, Default)]
pub struct Renewed {
    /// Interfaces that the edge is on now, and was not.
    pub added: Vec<String>,
    /// Interfaces that it could not be attached to, and why.
    pub not_added: Vec<(String, EdgeError)>,
    /// Whether the programs of another version were replaced; none: there were none.
    pub reloaded: Option<Result<(), EdgeError>>,
}

/// Programs that are pinned. The one for tests is not: it charges and counts.
const PINNED: [Program; 6] = [
    Program::Edge,
    Program::EdgeTrace,
    Program::ConnState,
    Program::ConnWalk,
    Program::Stamp,
    Program::Learn,
];

/// Programs of an interface, in the order in which they are attached. The stamp's reader comes
/// first: without it, the table would drop what the program passes.
const OF_INTERFACE: [Program; 3] = [Program::Stamp, Program::Learn, Program::Edge];

impl Edge {
    /// Loads, tests, pins and attaches the programs. They refuse nothing before a set is published.
    /// What a process left that died while attaching is removed, unless it can be adopted.
    ///
    /// # Errors
    ///
    /// See [`EdgeError`]. Everything is then as before.
    pub fn attach(pins: &Pins, options: &AttachOptions) -> Result<Self, EdgeError> {
        // It waits for the lock: a process that is being started holds a copy of every lock of its
        // parent until it executes, even of one that the parent has released.
        Self::attach_new(pins, options, &pins.lock_waiting()?)
    }

    /// As [`Self::attach`], for a caller that holds the lock.
    ///
    /// # Errors
    ///
    /// See [`EdgeError`]. Everything is then as before.
    pub fn attach_new(
        pins: &Pins,
        options: &AttachOptions,
        lock: &EdgeLock,
    ) -> Result<Self, EdgeError> {
        if let Some(found) = pins.foreign_layouts()?.pop() {
            let root = pins.root().to_owned();
            return Err(EdgeError::Layout { root, found });
        }
        if pins.is_present() {
            clear_unfinished(pins)?;
        }
        selftest::run()?;
        let loaded = Loaded::load(&options.sizes)?;
        // If this is refused, the pins of a running edge may be out of sight. Then nothing may be
        // removed.
        pins.create()?;
        let edge = pin_new(pins, &loaded, options, lock);
        if edge.is_err() {
            // The caller gets the first error.
            let _ = pins.remove_own();
        }
        edge
    }

    /// Adopts what is pinned.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Absent`] if nothing is pinned, [`EdgeError::Layout`] if another version of this
    /// program has pinned it, [`EdgeError::Incomplete`] if something is missing.
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
        // Without this link, TCP is charged and never counted.
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

    /// Removes everything: links, programs, maps, and the file beside them. It needs no other
    /// process, and works for any layout.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Pins`]. As much as possible is removed then.
    pub fn detach(pins: &Pins) -> Result<(), EdgeError> {
        Self::detach_under(pins, &pins.lock_waiting()?)
    }

    /// As [`Self::detach`], for a caller that holds the lock.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Pins`]; what could be removed is.
    pub fn detach_under(pins: &Pins, _lock: &EdgeLock) -> Result<(), EdgeError> {
        Ok(pins.remove()?)
    }

    /// Checks that the calling thread may detach what is pinned, whatever its layout: it must be in
    /// the network namespace of the attachment, unless the edge is on no interface any more.
    /// Returns that namespace if it is another one than the caller's: a table that the edge left
    /// there stays.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Elsewhere`] in another namespace. [`EdgeError::OutOfSight`] where a running
    /// edge would lose all but its pins.
    pub fn may_detach(pins: &Pins) -> Result<Option<NetworkNamespace>, EdgeError> {
        if pins.are_out_of_sight()?
            && <Journal>::read(pins).is_ok_and(|journal| !journal.interfaces.is_empty())
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

    /// Checks that the calling thread is in the network namespace of the attachment.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Elsewhere`] if it is not.
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

    /// The pins.
    #[must_use]
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// The maps.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Publishes a set under a number, under the lock of the pins: see [`Publisher::publish`]. Then
    /// counts TCP connections that are open already: see [`Self::count_open`].
    ///
    /// # Errors
    ///
    /// [`EdgeError::Publish`]. The set in force stays then.
    pub fn publish(
        &self,
        set: &Compiled,
        number: u32,
        confirm_within: Option<Duration>,
    ) -> Result<(), EdgeError> {
        self.publish_under(set, number, confirm_within, &self.pins.lock_waiting()?)
    }

    /// As [`Self::publish`], for a caller that holds the lock.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Publish`]; what was in force is.
    pub fn publish_under(
        &self,
        set: &Compiled,
        number: u32,
        confirm_within: Option<Duration>,
        lock: &EdgeLock,
    ) -> Result<(), EdgeError> {
        Publisher::new(&self.maps).publish(set, number, confirm_within)?;
        self.count_older(lock);
        Ok(())
    }

    /// Confirms the set that awaits confirmation.
    ///
    /// # Errors
    ///
    /// `PublishError::NotAwaitingConfirm` if none is.
    pub fn confirm(&self) -> Result<(), EdgeError> {
        self.confirm_under(&self.pins.lock_waiting()?)
    }

    /// As [`Self::confirm`], for a caller that holds the lock.
    ///
    /// # Errors
    ///
    /// `PublishError::NotAwaitingConfirm`.
    pub fn confirm_under(&self, _lock: &EdgeLock) -> Result<(), EdgeError> {
        Ok(Publisher::new(&self.maps).confirm()?)
    }

    /// Takes back the set that awaits confirmation. Then counts open TCP connections as
    /// [`Self::publish`] does, because it may bring back ports.
    ///
    /// # Errors
    ///
    /// `PublishError::NotAwaitingConfirm` if none is.
    pub fn revert(&self) -> Result<(), EdgeError> {
        self.revert_under(&self.pins.lock_waiting()?)
    }

    /// As [`Self::revert`], for a caller that holds the lock.
    ///
    /// # Errors
    ///
    /// `PublishError::NotAwaitingConfirm`.
    pub fn revert_under(&self, lock: &EdgeLock) -> Result<(), EdgeError> {
        Publisher::new(&self.maps).revert()?;
        self.count_older(lock);
        Ok(())
    }

    /// Counts TCP connections that are older than their port's declaration, once each. It finds
    /// those that a process has accepted which the caller can see. It takes no capability. Its time
    /// grows with the number of files that are open on this host.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Walk`]. Some connections may be counted then.
    pub fn count_open(&self) -> Result<(), EdgeError> {
        let lock = self.pins.lock_waiting()?;
        self.walk(&lock)
    }

    /// [`Self::count_open`] after ports came into force. They stay in force if it fails.
    fn count_older(&self, lock: &EdgeLock) {
        if let Err(error) = self.walk(lock) {
            tracing::warn!(%error, "sources may hold more connections than their cap until older ones close");
        }
    }

    fn walk(&self, _lock: &EdgeLock) -> Result<(), EdgeError> {
        let walk = sys::walk(self.program(Program::ConnWalk));
        walk.map_err(|source| EdgeError::Walk { source })
    }

    /// The interfaces that the edge is attached to.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Journal`] if the journal cannot be read.
    pub fn interfaces(&self) -> Result<Vec<Interface>, EdgeError> {
        Ok(<Journal>::read(&self.pins)?.interfaces)
    }

    /// Whether all programs of an interface are on it now. None is once the interface was removed,
    /// for example by its driver or with its network namespace, even if another has the same name
    /// by now. An operator may also have detached one of them.
    #[must_use]
    pub fn is_live(&self, interface: &Interface) -> bool {
        OF_INTERFACE.into_iter().all(|program| {
            let link = self.link_path(program, interface.index);
            interface_of(&link) == Some(interface.index)
        })
    }

    /// Attaches to one more interface of the calling thread's network namespace, or again to an
    /// interface that was made anew or lost one of its programs.
    ///
    /// # Errors
    ///
    /// [`EdgeError::Interface`] if there is none of this name, [`EdgeError::Attach`] if the kernel
    /// refuses, [`EdgeError::Elsewhere`] in another network namespace. No interface that has
    /// all its programs has lost one then; one that had lost some may have lost the others.
    pub fn attach_interface(&mut self, name: &str, mode: AttachMode) -> Result<(), EdgeError> {
        self.attach_under(name, mode, &self.pins.lock_waiting()?)
    }

    /// As [`Self::attach_interface`], for a caller that holds the lock.
    ///
    /// # Errors
    ///
    /// As [`Self::attach_interface`].
    pub fn attach_under(
        &self,
        name: &str,
        mode: AttachMode,
        lock: &EdgeLock,
    ) -> Result<(), EdgeError> {
        self.check_here()?;
        let index = index_of(name)?;
        let mut journal = <Journal>::read(&self.pins)?;
        let known = |interface: &Interface| interface.index == index;
        if journal
            .interfaces
            .iter()
            .any(|i| known(i) && self.is_live(i))
        {
            return Ok(());
        }
        let gone = |interface: &Interface| {
            (known(interface) || interface.name == name) && !self.is_live(interface)
        };
        for interface in journal.interfaces.extract_if(.., |i| gone(i)) {
            self.remove_links(interface.index)?;
        }
        // A process may have died between its links and the journal.
        self.remove_links(index)?;
        let stamp = self.link(Program::Stamp, name, index, Hook::TcxIngress)?;
        let learn = self.link(Program::Learn, name, index, Hook::TcxEgress)?;
        let (edge, mode) = self.link_xdp(name, index, mode)?;
        let pinned = OF_INTERFACE
            .into_iter()
            .zip([stamp, learn, edge])
            .try_for_each(|(program, link)| {
                pin(link.as_fd(), self.link_path(program, index))?;
                reach(Step::Linked);
                Ok(())
            });
        journal.interfaces.push(Interface {
            name: name.to_owned(),
            index,
            mode,
        });
        let kept = pinned.and_then(|()| Ok(journal.write(&self.pins, lock)?));
        if kept.is_err() {
            self.remove_links(index)?;
        }
        kept
    }

    /// Detaches from an interface, which need not exist any more.
    ///
    /// # Errors
    ///
    /// [`EdgeError::NotAttached`] if the edge is not attached to one of this name.
    pub fn detach_interface(&mut self, name: &str) -> Result<(), EdgeError> {
        let lock = self.pins.lock_waiting()?;
        let mut journal = <Journal>::read(&self.pins)?;
        let Some(place) = journal
            .interfaces
            .iter()
            .position(|interface| interface.name == name)
        else {
            return Err(EdgeError::NotAttached {
                name: name.to_owned(),
            });
        };
        let interface = journal.interfaces.remove(place);
        self.remove_links(interface.index)?;
        Ok(journal.write(&self.pins, &lock)?)
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

    /// A program of [`PINNED`].
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

    /// Links a program to an interface. Returns the link, and the mode that it got.
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

    /// Loads the programs of this binary on the present maps, tests them, and replaces the running
    /// programs by them.
    ///
    /// # Errors
    ///
    /// See [`EdgeError`]. Every link then has its old program.
    pub fn reload(&mut self) -> Result<(), EdgeError> {
        self.reload_under(&self.pins.lock_waiting()?)
    }

    /// As [`Self::reload`], for a caller that holds the lock.
    ///
    /// # Errors
    ///
    /// See [`EdgeError`]; every link has the program that it had.
    pub fn reload_under(&mut self, lock: &EdgeLock) -> Result<(), EdgeError> {
        let loaded = self.load_beside()?;
        self.replace_under(&loaded, lock)
    }

    /// Loads the programs of this binary on the present maps, after the self-test. They are not in
    /// force yet.
    ///
    /// # Errors
    ///
    /// [`EdgeError::SelfTest`] if a program decides wrongly, [`EdgeError::Load`] if the kernel
    /// refuses one.
    pub fn load_beside(&self) -> Result<Loaded, EdgeError> {
        selftest::run()?;
        let reuse = Maps::NAMES.map(|name| (name.to_owned(), self.pins.path(Kind::Map, name)));
        Ok(Loaded::load(&LoadOptions {
            reuse: reuse.into(),
            ..LoadOptions::default()
        })?)
    }

    /// Replaces the running programs. Every packet meets the old program or the new one.
    ///
    /// # Errors
    ///
    /// See [`EdgeError`]. Every link then has its old program.
    pub fn replace(&mut self, loaded: &Loaded) -> Result<(), EdgeError> {
        self.replace_under(loaded, &self.pins.lock_waiting()?)
    }

    fn replace_under(&mut self, loaded: &Loaded, _lock: &EdgeLock) -> Result<(), EdgeError> {
        let new = handles(loaded)?;
        self.update_links(&new)?;
        // The new programs are in force. What remains are the pins by which other processes find
        // them, and the tracepoint. Its old program counts until the new one does; a connection
        // that both see is counted once.
        if let Err(error) = self.rename(&new) {
            self.update_links(&self.programs)?;
            // Undoes the names that were given: it fails at the same name as the first pass, at the
            // latest.
            if let Err(error) = self.rename(&self.programs) {
                tracing::debug!(%error, "names are those of the old programs up to here");
            }
            return Err(error);
        }
        self.pins.set_build(&build())?;
        *self = Self::adopt(&self.pins)?;
        Ok(())
    }

    /// Gives the edge what it lacks: those of the interfaces that it is not on, and the programs of
    /// this binary. What is in force stays; what fails stands in the answer.
    pub fn renew(&mut self, interfaces: &[String], mode: AttachMode, lock: &EdgeLock) -> Renewed {
        let known = self.interfaces().unwrap_or_default();
        let mut renewed = Renewed::default();
        for name in interfaces {
            let mut named = known.iter().filter(|known| known.name == *name);
            if named.any(|known| self.is_live(known)) {
                continue;
            }
            match self.attach_under(name, mode, lock) {
                Ok(()) => renewed.added.push(name.clone()),
                Err(error) => renewed.not_added.push((name.clone(), error)),
            }
        }
        if !self.is_current() {
            renewed.reloaded = Some(self.reload_under(lock));
        }
        renewed
    }

    /// Whether the running programs are those that this binary carries. False if that is not known.
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

    /// Gives another program to the link of every interface that is there; all or none.
    fn update_links(&self, programs: &BTreeMap<Program, OwnedFd>) -> Result<(), EdgeError> {
        let mut updated: Vec<(OwnedFd, Program)> = Vec::new();
        for (path, program) in self.links()? {
            let result = sys::open_pin(&path).and_then(|link| {
                sys::link_update(link.as_fd(), programs[&program].as_fd())?;
                updated.push((link, program));
                Ok(())
            });
            // The interface is gone, so no program runs there.
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

    /// Links of interfaces, with the program of each.
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

fn pin_new(
    pins: &Pins,
    loaded: &Loaded,
    options: &AttachOptions,
    lock: &EdgeLock,
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
    <Journal>::default().write(pins, lock)?;
    let edge = Edge::adopt(pins)?;
    for interface in &options.interfaces {
        edge.attach_under(interface, options.mode, lock)?;
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

/// The one link that belongs to no interface.
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

/// Whether a link is that of XDP on an interface that is there: then it decides on packets,
/// whatever else is missing.
fn on_interface(link: &Path) -> bool {
    let info = Link::open(link).and_then(|link| link.info());
    matches!(info.map(|info| info.info), Ok(LinkTypeInfo::Xdp(xdp)) if xdp.ifindex != 0)
}

/// The interface of a link. None if the link was detached, the interface is gone, or the link
/// belongs to no interface.
fn interface_of(link: &Path) -> Option<u32> {
    let info = Link::open(link).and_then(|link| link.info()).ok()?;
    let index = match info.info {
        LinkTypeInfo::Xdp(xdp) => xdp.ifindex,
        LinkTypeInfo::Tcx(tcx) => tcx.ifindex,
        _ => return None,
    };
    // The kernel reports 0 for a link without an interface.
    (index != 0).then_some(index)
}

/// Removes what a process left that died while attaching, unless it is on an interface.
///
/// # Errors
///
/// [`EdgeError::Present`] if it can be adopted, [`EdgeError::Incomplete`] if it cannot and is on an
/// interface.
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
    tracing::info!(path = %path.display(), "removing what an unfinished attach left");
    Ok(pins.remove_own()?)
}

fn index_of(name: &str) -> Result<u32, EdgeError> {
    interface::index_of(name).map_err(|source| EdgeError::Interface {
        name: name.to_owned(),
        source,
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

/// Gives a name to another object in one step: the name exists at every moment.
fn replace_pin(object: BorrowedFd<'_>, path: PathBuf) -> Result<(), EdgeError> {
    let mut new = path.clone().into_os_string();
    new.push("-new");
    let new = PathBuf::from(new);
    // A process that died here may have left it.
    let _ = fs::remove_file(&new);
    sys::pin(object, &new)
        .and_then(|()| fs::rename(&new, &path))
        .map_err(|source| PinError::Pin { path, source }.into())
}
