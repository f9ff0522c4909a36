//! Hints from the kernel that something changed here.
//!
//! An event only says where to look; the scan decides. So nothing is lost if events are, and nothing
//! is believed of them. Every directory is watched by itself, before it is listed, each time it is
//! scanned: watching one again costs little and heals what a rename left behind.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cortex_shared::wire_path::WirePath;
use notify::event::{AccessKind, AccessMode, CreateKind, EventKind, ModifyKind, RenameMode};
use notify::{Config, ErrorKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;

use super::ignore::Ignore;
use super::scan::{Directories, Scope};
use crate::root_dir::{DirHandle, DirIdentity};

/// More places than that are not remembered one by one: everything is looked at instead.
const MAX_SCOPES: usize = 10_000;

/// Where changes have to be looked for. Shared by the watcher and the engine.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    scopes: Mutex<HashSet<Scope>>,
    changed: Notify,
    /// The last of what was added was the end of a change, as far as the kernel tells.
    finished: AtomicBool,
    /// A whole tree was added, whose directories may have lost their watches.
    moved: AtomicBool,
    ignore: Mutex<Ignore>,
}

impl Dirty {
    fn lock(&self) -> MutexGuard<'_, HashSet<Scope>> {
        self.scopes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a place and wakes the engine.
    pub(super) fn add(&self, scope: Scope) {
        if matches!(scope, Scope::Tree(_)) {
            self.moved.store(true, Ordering::Relaxed);
        }
        self.insert(scope);
    }

    /// Adds everything, because somebody wants it looked at and not because something happened to it.
    pub(super) fn add_everything(&self) {
        self.insert(Scope::Tree(None));
    }

    fn insert(&self, scope: Scope) {
        let mut scopes = self.lock();
        if scopes.contains(&Scope::Tree(None)) {
            // Covers everything.
        } else if scope == Scope::Tree(None) || scopes.len() >= MAX_SCOPES {
            // Among those that are forgotten there may be one that lost its watches.
            let lost = scope != Scope::Tree(None);
            self.moved.fetch_or(lost, Ordering::Relaxed);
            scopes.clear();
            scopes.insert(Scope::Tree(None));
        } else {
            scopes.insert(scope);
        }
        drop(scopes);
        self.changed.notify_one();
    }

    /// From now on these names are left out.
    pub(super) fn set_ignore(&self, ignore: Ignore) {
        *self.ignore.lock().unwrap_or_else(PoisonError::into_inner) = ignore;
    }

    fn ignore(&self) -> Ignore {
        self.ignore.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the last hint was of a file that was closed or renamed, which is how a save ends.
    pub(super) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Relaxed)
    }

    /// Takes all places, in the order of the tree.
    pub(super) fn take(&self) -> Vec<Scope> {
        let mut scopes: Vec<_> = std::mem::take(&mut *self.lock()).into_iter().collect();
        // What is looked at as part of a tree need not be looked at by itself. Everything below a
        // directory comes right after it.
        let mut tree: Option<Option<WirePath>> = None;
        let key = |scope: &Scope| matches!(scope, Scope::Children(_));
        scopes.sort_by(|a, b| a.directory().cmp(&b.directory()).then_with(|| key(a).cmp(&key(b))));
        scopes.retain(|scope| {
            let inside = match (&tree, scope.directory()) {
                (None, _) => false,
                (Some(None), _) => true,
                (Some(Some(top)), Some(path)) => path == top || path.is_below(top),
                (Some(Some(_)), None) => false,
            };
            if !inside && let Scope::Tree(directory) = scope {
                tree = Some(directory.clone());
            }
            !inside
        });
        scopes
    }

    /// Whether a directory of what was taken may have lost its watch; asked before everything is looked at.
    pub(super) fn take_moved(&self) -> bool {
        self.moved.swap(false, Ordering::Relaxed)
    }

    /// Whether everything is to be looked at.
    pub(super) fn is_everything(&self) -> bool {
        self.lock().contains(&Scope::Tree(None))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Waits until something is added.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// Takes what the kernel tells, on a thread of whoever asks the kernel.
pub(super) type Handler = Box<dyn FnMut(notify::Result<notify::Event>) + Send>;

/// Who asks the kernel to tell of changes.
pub(super) trait Kernel: Send {
    /// Tells from now on of what happens directly in a directory.
    fn watch(&mut self, directory: &Path) -> notify::Result<()>;
}

impl Kernel for RecommendedWatcher {
    fn watch(&mut self, directory: &Path) -> notify::Result<()> {
        notify::Watcher::watch(self, directory, RecursiveMode::NonRecursive)
    }
}

/// How hints are asked for: of the machine's kernel, or of a simulated one. Cheap to clone.
#[derive(Clone)]
pub(super) struct Kernels(Arc<dyn Fn(Handler) -> notify::Result<Box<dyn Kernel>> + Send + Sync>);

impl Kernels {
    pub(super) fn new(
        begin: impl Fn(Handler) -> notify::Result<Box<dyn Kernel>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(begin))
    }

    /// The machine's own.
    pub(super) fn real() -> Self {
        Self::new(|handler| {
            let config = Config::default().with_follow_symlinks(false);
            Ok(Box::new(RecommendedWatcher::new(handler, config)?))
        })
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").finish_non_exhaustive()
    }
}

/// Watches the directories of one workspace.
pub(super) struct Watch {
    kernel: Box<dyn Kernel>,
    root: PathBuf,
    /// The kernel watches no more directories: the rest is looked at from time to time.
    pub(super) limited: bool,
    /// Directories that were entered since they were last forgotten, and which they were: a name may
    /// stand for another directory by now. One byte string for each directory of the tree.
    entered: HashMap<WirePath, DirIdentity>,
    /// Those are not watched again: it would take longer than listing them.
    trusts: bool,
}

impl Watch {
    /// Begins without any directory.
    ///
    /// # Errors
    /// If the kernel has no more watchers to give.
    pub(super) fn new(kernels: &Kernels, root: &Path, dirty: Arc<Dirty>) -> notify::Result<Self> {
        let handler_root = root.to_owned();
        let handler = move |event: notify::Result<notify::Event>| {
            dirty.finished.store(event.as_ref().is_ok_and(ends_a_change), Ordering::Relaxed);
            for scope in scopes_of(&handler_root, event, &dirty.ignore()) {
                dirty.add(scope);
            }
        };
        let kernel = (kernels.0)(Box::new(handler))?;
        let (limited, entered, trusts) = Default::default();
        Ok(Self { kernel, root: root.to_owned(), limited, entered, trusts })
    }

    /// A look at `scope` begins; `moved` if directories may have lost their watches.
    pub(super) fn begin(&mut self, scope: &Scope, moved: bool) {
        let everything = *scope == Scope::Tree(None);
        self.trusts = everything && !moved;
        if everything && moved {
            self.forget();
        }
    }

    /// Begins to remember anew which directories were entered: everything is about to be.
    fn forget(&mut self) {
        self.entered.clear();
        // Others may have given watches back: each directory is tried again.
        self.limited = false;
    }

    /// Watches a directory (the root for `None`), if the kernel lets us; whether somebody sees to
    /// it from then on.
    fn directory(&mut self, directory: Option<&WirePath>) -> bool {
        let path = match directory {
            Some(directory) => self.root.join(OsStr::from_bytes(directory.as_bytes())),
            None => self.root.clone(),
        };
        match self.kernel.watch(&path) {
            Ok(()) => true,
            Err(error) if matches!(error.kind, ErrorKind::MaxFilesWatch) => {
                // Everything is looked at from time to time instead.
                self.limited = true;
                true
            }
            // It vanished between being found and being watched; whoever removed it made an event.
            Err(error) => {
                tracing::debug!(?path, %error, "cannot watch directory");
                false
            }
        }
    }
}

impl Directories for Watch {
    fn enter(&mut self, directory: Option<&WirePath>, handle: &DirHandle) {
        let identity = handle.identity();
        if self.trusts
            && let (Some(directory), Ok(identity)) = (directory, &identity)
            && self.looks_after(directory, *identity)
        {
            return;
        }
        let watched = self.directory(directory);
        let Some(directory) = directory else { return };
        match identity {
            Ok(identity) if watched => {
                self.entered.insert(directory.clone(), identity);
            }
            _ => {
                self.entered.remove(directory);
            }
        }
    }

    fn looks_after(&self, directory: &WirePath, identity: DirIdentity) -> bool {
        self.entered.get(directory) == Some(&identity)
    }
}

/// In place of a [`Watch`] where the kernel gives none: everything is looked at from time to time.
pub(super) struct Unwatched;

impl Directories for Unwatched {
    fn enter(&mut self, _: Option<&WirePath>, _: &DirHandle) {}

    fn looks_after(&self, _: &WirePath, _: DirIdentity) -> bool {
        true
    }
}

/// Whether a file was closed after writing, or got its name: nothing more is to be expected of it.
fn ends_a_change(event: &notify::Event) -> bool {
    matches!(
        event.kind,
        EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both))
    )
}

fn scopes_of(root: &Path, event: notify::Result<notify::Event>, ignore: &Ignore) -> Vec<Scope> {
    let Ok(event) = event else { return vec![Scope::Tree(None)] };
    if event.need_rescan() {
        return vec![Scope::Tree(None)];
    }
    // Our own reading makes these; but whoever closes what was open for writing has finished it.
    let written = EventKind::Access(AccessKind::Close(AccessMode::Write));
    if matches!(event.kind, EventKind::Access(_)) && event.kind != written {
        return Vec::new();
    }
    let arrived = matches!(
        event.kind,
        EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both | RenameMode::Any))
            | EventKind::Create(CreateKind::Folder)
    );
    let mut scopes = Vec::new();
    for path in &event.paths {
        let Ok(relative) = path.strip_prefix(root) else { continue };
        let bytes = relative.as_os_str().as_bytes();
        if bytes.is_empty() {
            scopes.push(Scope::Children(None));
            continue;
        }
        let Ok(path) = WirePath::new(bytes) else { continue };
        if ignore.ignores(&path, false) {
            continue;
        }
        scopes.push(Scope::Children(path.parent()));
        if arrived {
            // A directory that was moved here has lost the watches below it; a new one has none, and
            // it may be known already: made by us, or in the place of one that was removed. The
            // kernel may even give it the number of that one.
            scopes.push(Scope::Tree(Some(path)));
        }
    }
    scopes
}

#[cfg(test)]
mod tests {
    use notify::Event;
    use notify::event::Flag;

    use super::*;

    fn scopes(event: Event) -> Vec<Scope> {
        scopes_of(Path::new("/root"), Ok(event), &Ignore::default())
    }

    fn path(text: &str) -> Option<WirePath> {
        Some(WirePath::new(text).unwrap())
    }

    #[test]
    fn events_name_the_directory_to_look_at() {
        let create =
            |path: &str| Event::new(EventKind::Create(CreateKind::File)).add_path(path.into());
        assert_eq!(scopes(create("/root/a/b")), [Scope::Children(path("a"))]);
        assert_eq!(scopes(create("/root/a")), [Scope::Children(None)]);
        assert_eq!(scopes(create("/root")), [Scope::Children(None)]);
        assert!(scopes(create("/root/.git/index.lock")).is_empty());
        assert!(scopes(create("/root/.cortex/stage/1")).is_empty());
        assert!(scopes(create("/elsewhere")).is_empty());
        let read = Event::new(EventKind::Access(AccessKind::Any)).add_path("/root/a".into());
        assert!(scopes(read).is_empty());
        let close = |mode| {
            let kind = EventKind::Access(AccessKind::Close(mode));
            scopes(Event::new(kind).add_path("/root/a/b".into()))
        };
        assert_eq!(close(AccessMode::Write), [Scope::Children(path("a"))]);
        assert!(close(AccessMode::Read).is_empty());
        let made = Event::new(EventKind::Create(CreateKind::Folder)).add_path("/root/d".into());
        assert_eq!(scopes(made), [Scope::Children(None), Scope::Tree(path("d"))]);
        let overflow = Event::new(EventKind::Other).set_flag(Flag::Rescan);
        assert_eq!(scopes(overflow), [Scope::Tree(None)]);
        let moved = Event::new(EventKind::Modify(ModifyKind::Name(RenameMode::To)))
            .add_path("/root/a/d".into());
        assert_eq!(scopes(moved), [Scope::Children(path("a")), Scope::Tree(path("a/d"))]);
    }

    #[test]
    fn t11_too_many_places_become_everything() {
        let dirty = Dirty::default();
        for number in 0..=MAX_SCOPES {
            dirty.add(Scope::Children(path(&format!("d{number}"))));
        }
        dirty.add(Scope::Children(path("later")));
        assert_eq!(dirty.take(), [Scope::Tree(None)]);
        assert!(dirty.is_empty());
    }

    #[test]
    fn what_is_part_of_a_tree_is_not_looked_at_twice() {
        let dirty = Dirty::default();
        for scope in [
            Scope::Children(path("a/b")),
            Scope::Children(path("a")),
            Scope::Tree(path("a/b/c")),
            Scope::Tree(path("a")),
            Scope::Tree(path("a b")),
            Scope::Children(None),
            Scope::Children(path("b")),
        ] {
            dirty.add(scope);
        }
        let expected = [
            Scope::Children(None),
            Scope::Tree(path("a")),
            Scope::Tree(path("a b")),
            Scope::Children(path("b")),
        ];
        assert_eq!(dirty.take(), expected);
    }

    #[test]
    fn a_file_in_a_watched_directory_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let dirty = Arc::new(Dirty::default());
        let mut watch = Watch::new(&Kernels::real(), folder.path(), dirty.clone()).unwrap();
        assert!(watch.directory(None));
        std::fs::write(folder.path().join("f"), b"x").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(dirty.changed());
        assert_eq!(dirty.take(), [Scope::Children(None)]);
    }

    #[test]
    fn what_may_have_been_moved_is_remembered_until_everything_is_looked_at() {
        let dirty = Dirty::default();
        dirty.add_everything();
        assert!(!dirty.take_moved(), "somebody only wanted it to be looked at");
        dirty.add(Scope::Tree(path("d")));
        assert_eq!(dirty.take(), [Scope::Tree(None)]);
        assert!(dirty.take_moved() && !dirty.take_moved());
        for number in 0..=MAX_SCOPES {
            dirty.add(Scope::Children(path(&format!("d{number}"))));
        }
        assert!(dirty.take_moved(), "it is not known any more what happened");
    }

    #[test]
    fn a_directory_is_watched_again_unless_nothing_happened_to_it() {
        struct Counting(Arc<std::sync::atomic::AtomicUsize>);
        impl Kernel for Counting {
            fn watch(&mut self, _: &Path) -> notify::Result<()> {
                self.0.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        }
        let folder = tempfile::tempdir().unwrap();
        for name in ["d", "e"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let top = DirHandle::open_ambient(folder.path()).unwrap();
        let [d, e] = [b"d", b"e"].map(|name| top.open_dir(name).unwrap());
        let count = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counting = count.clone();
        let kernels = Kernels::new(move |_| Ok(Box::new(Counting(counting.clone()))));
        let mut watch = Watch::new(&kernels, folder.path(), Arc::default()).unwrap();
        let mut watches = |scope: Scope, moved, handle: &DirHandle| {
            watch.begin(&scope, moved);
            watch.enter(path("d").as_ref(), handle);
            count.swap(0, Ordering::Relaxed)
        };
        let everything = Scope::Tree(None);
        assert_eq!(watches(everything.clone(), true, &d), 1);
        assert_eq!(watches(everything.clone(), false, &d), 0);
        assert_eq!(watches(Scope::Tree(path("d")), false, &d), 1, "it was moved here");
        assert_eq!(watches(everything.clone(), false, &e), 1, "another one of this name");
        assert_eq!(watches(everything.clone(), false, &e), 0);
        assert_eq!(watches(everything, true, &e), 1);
    }
}
