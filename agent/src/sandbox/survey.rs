//! Which names in a workspace other programs on the host would execute or obey, where they lead,
//! and what stood there.
//!
//! The agent looks before a command, so that [`super::protect`] pins what is there, and once more
//! after it, so that what came or changed is said ([`super::planted`]). Nothing is followed out of
//! the workspace, nothing blocks (a command may have put a fifo or a lease there), and every list
//! has a bound; a bound that is met costs protection only where `docs/sandbox.md` says so.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};

use super::git_files::{self, Setting};

/// Parts of a git directory that make git run programs, or look elsewhere for such parts.
const GIT_ACTIVE: [&str; 5] = ["hooks", "config", "config.worktree", "commondir", "gitdir"];

/// Other names at the top of a workspace that programs outside obey.
const OBEYED: [&str; 17] = [
    // Links to skills lead over it.
    ".cortex",
    ".vscode",
    ".idea",
    ".claude",
    ".codex",
    ".agents",
    ".cursor",
    ".husky",
    ".mcp.json",
    ".envrc",
    ".bashrc",
    ".bash_profile",
    ".bash_login",
    ".profile",
    ".zshrc",
    ".zshenv",
    ".zprofile",
];

/// Most git directories that are protected one by one.
const MAX_REPOSITORIES: usize = 256;
/// Most configuration files that are read, and most names that are protected.
const MAX_SETTINGS: usize = 256;
const MAX_NAMES: usize = 4096;
/// Names of one git directory, about.
const REPOSITORY_NAMES: usize = GIT_ACTIVE.len() + 1;
/// Directories on the way to a name that are kept in their place one by one: what lies deeper is
/// protected as a whole, so that no way is so long that others get no protection.
const MAX_WAY: usize = 32;
/// Among how many entries of directories that are obeyed links are looked for, in one of them and in all,
/// and how many directories deep.
const LINKED_ENTRIES: usize = 256;
const ALL_LINKED_ENTRIES: usize = 4096;
const LINKED_DEPTH: usize = 2;
/// Most entries looked at below one `modules` or `worktrees`.
const MAX_MODULE_ENTRIES: usize = 4096;
/// Longest name of one of them: longer ones are protected with what they are in.
const MAX_MODULE_NAME_BYTES: usize = 512;
/// Longest way of links and includes from one name to the next.
const MAX_HOPS: usize = 16;
/// How deep, in how many directories and among how many entries nested repositories are looked for:
/// every command waits for it.
const NESTED_DEPTH: usize = 3;
const NESTED_DIRECTORIES: usize = 128;
const NESTED_ENTRIES: usize = 4096;
/// Looked into last, as they hold so many directories.
const LAST: [&[u8]; 3] = [b"node_modules", b"target", b".venv"];
/// Longest file that is read: a configuration, or what names another place.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Whether a name at the top of a workspace, by itself, is one that programs outside obey. Some file
/// systems take a name for another one that differs in case.
#[must_use]
pub fn is_obeyed_at_top(name: &[u8]) -> bool {
    OBEYED.iter().any(|obeyed| name.eq_ignore_ascii_case(obeyed.as_bytes()))
}

/// How a name is kept from the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// It cannot be moved or removed; what is in it can be changed.
    InPlace,
    /// Nor can it, or anything in it, be changed.
    ReadOnly,
}

/// What stands at a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    Nothing,
    Directory { device: u64, inode: u64 },
    Link { text: PathBuf },
    File { device: u64, inode: u64, content: Content },
    Other { device: u64, inode: u64 },
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    Hash(blake3::Hash),
    /// Of a file too large to read each time, or unreadable.
    Stamp {
        size: i64,
        modified: (i64, i64),
        changed: (i64, i64),
    },
}

/// One name.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) hold: Hold,
    pub(super) seen: Seen,
    /// It is obeyed itself, and not only on the way to such a name.
    pub(super) obeyed: bool,
}

/// What was found in a workspace, by names relative to it; the names above come first.
#[derive(Debug, Clone, Default)]
pub(super) struct Survey {
    pub(super) names: BTreeMap<PathBuf, Found>,
    /// Not every directory was looked into for nested repositories.
    pub(super) truncated: bool,
    /// There are more names than are protected.
    pub(super) full: bool,
}

impl Survey {
    /// Looks at the workspace in `host`, a path without links. What cannot be looked at is not there.
    pub(super) fn of(host: &Path) -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match rustix::fs::openat(rustix::fs::CWD, host, flags, Mode::empty()) {
            Ok(root) => {
                let tree = Tree { root, host };
                let mut surveyor = Surveyor {
                    tree,
                    survey: Self::default(),
                    repositories: BTreeSet::new(),
                    settings: BTreeSet::new(),
                    linked: BTreeSet::new(),
                    linked_left: ALL_LINKED_ENTRIES,
                };
                surveyor.look();
                surveyor.survey
            }
            Err(_) => Self::default(),
        }
    }
}

/// A workspace, in which nothing leads out.
struct Tree<'a> {
    root: OwnedFd,
    host: &'a Path,
}

impl Tree<'_> {
    fn open(&self, name: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let name = if name.as_os_str().is_empty() { Path::new(".") } else { name };
        // The kernel takes no superfluous flag here.
        let blocking = if flags.contains(OFlags::PATH) { flags } else { flags | OFlags::NONBLOCK };
        let flags = blocking | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat2(&self.root, name, flags, Mode::empty(), resolve)
    }

    fn stat(&self, name: &Path) -> Option<Stat> {
        let mut parts = name.components();
        match (parts.next(), parts.next()) {
            (Some(Component::Normal(name)), None) => {
                rustix::fs::statat(&self.root, name, AtFlags::SYMLINK_NOFOLLOW).ok()
            }
            _ => rustix::fs::fstat(self.open(name, OFlags::PATH).ok()?).ok(),
        }
    }

    fn kind(&self, name: &Path) -> Option<FileType> {
        self.stat(name).map(|found| FileType::from_raw_mode(found.st_mode))
    }

    fn read(&self, name: &Path) -> Option<Vec<u8>> {
        let file = self.open(name, OFlags::RDONLY).ok()?;
        let found = rustix::fs::fstat(&file).ok()?;
        let size = u64::try_from(found.st_size).ok()?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile || size > MAX_FILE_BYTES
        {
            return None;
        }
        let mut bytes = Vec::new();
        std::fs::File::from(file).take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    fn link_text(&self, name: &Path) -> Option<PathBuf> {
        let link = self.open(name, OFlags::PATH).ok()?;
        let text = rustix::fs::readlinkat(link, "", Vec::new()).ok()?;
        Some(PathBuf::from(OsStr::from_bytes(text.as_bytes())))
    }

    /// At most so many entries, and whether there are more.
    fn list(&self, name: &Path, most: usize) -> (Vec<(OsString, FileType)>, bool) {
        let read = || {
            let directory = self.open(name, OFlags::RDONLY | OFlags::DIRECTORY)?;
            Dir::new(directory)?
                .filter_map(|entry| match entry {
                    Ok(entry) => {
                        let name = entry.file_name().to_bytes();
                        let kind = entry.file_type();
                        (name != b"." && name != b"..")
                            .then(|| Ok((OsStr::from_bytes(name).to_owned(), kind)))
                    }
                    Err(error) => Some(Err(error)),
                })
                .take(most + 1)
                .collect::<rustix::io::Result<Vec<_>>>()
        };
        let mut entries = read().unwrap_or_default();
        let more = entries.len() > most;
        entries.truncate(most);
        (entries, more)
    }

    fn see(&self, name: &Path) -> Seen {
        let Some(found) = self.stat(name) else { return Seen::Nothing };
        let (device, inode) = (found.st_dev, found.st_ino);
        match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory => Seen::Directory { device, inode },
            FileType::Symlink => Seen::Link { text: self.link_text(name).unwrap_or_default() },
            FileType::RegularFile => {
                let content = match self.read(name) {
                    Some(bytes) => Content::Hash(blake3::hash(&bytes)),
                    None => Content::Stamp {
                        size: found.st_size,
                        modified: (found.st_mtime, found.st_mtime_nsec as _),
                        changed: (found.st_ctime, found.st_ctime_nsec as _),
                    },
                };
                Seen::File { device, inode, content }
            }
            _ => Seen::Other { device, inode },
        }
    }
}

/// One below the top.
enum Repository {
    /// A `.git`, of any kind.
    Named(PathBuf),
    /// A directory that git takes for one of its own whatever its name.
    Bare(PathBuf),
}

struct Surveyor<'a> {
    tree: Tree<'a>,
    survey: Survey,
    /// Git directories that were looked at.
    repositories: BTreeSet<PathBuf>,
    /// Configuration files that were read.
    settings: BTreeSet<PathBuf>,
    /// Directories in which links were looked for, and how many more entries may be.
    linked: BTreeSet<PathBuf>,
    linked_left: usize,
}

impl Surveyor<'_> {
    fn look(&mut self) {
        // The names at the top come before all that they may lead to, so that nothing takes their place.
        for name in OBEYED {
            self.note(Path::new(name), Hold::ReadOnly, true);
        }
        self.repository(Path::new(".git"), MAX_HOPS);
        for name in OBEYED {
            self.obeyed(Path::new(name), MAX_HOPS);
        }
        for repository in self.nested() {
            match repository {
                Repository::Named(name) => self.repository(&name, MAX_HOPS),
                Repository::Bare(directory) => {
                    self.git_directory(&directory, &directory, MAX_HOPS, false);
                }
            }
        }
    }

    fn note(&mut self, name: &Path, hold: Hold, obeyed: bool) {
        if let Some(found) = self.survey.names.get_mut(name) {
            found.obeyed |= obeyed;
            if hold == Hold::ReadOnly {
                found.hold = hold;
            }
            return;
        }
        if self.survey.names.len() >= MAX_NAMES {
            (self.survey.truncated, self.survey.full) = (true, true);
            return;
        }
        let seen = self.tree.see(name);
        self.survey.names.insert(name.to_owned(), Found { hold, seen, obeyed });
    }

    /// What is on the way to a name must not be moved either: another could take its place.
    fn keep_way_to(&mut self, name: &Path) {
        let way = name.ancestors().skip(1).filter(|way| !way.as_os_str().is_empty());
        let too_deep = way.clone().count().saturating_sub(MAX_WAY);
        for (above, way) in way.skip(too_deep).enumerate() {
            let whole = too_deep > 0 && above == 0;
            self.note(way, if whole { Hold::ReadOnly } else { Hold::InPlace }, whole);
        }
    }

    /// A name that is obeyed as it is, with what it leads to, and what links in it lead to.
    fn obeyed(&mut self, name: &Path, hops: usize) {
        self.keep_way_to(name);
        self.note(name, Hold::ReadOnly, true);
        if let Some(target) = self.leads_to(name, hops) {
            self.obeyed(&target, hops - 1);
        }
        if hops > 0 {
            for link in self.links_in(name) {
                self.linked(&link, hops - 1);
            }
        }
    }

    /// A link in a directory that is obeyed, with the file that it leads to. Not a directory: it may be any of
    /// the workspace, which commands have to write.
    fn linked(&mut self, link: &Path, hops: usize) {
        self.keep_way_to(link);
        self.note(link, Hold::ReadOnly, true);
        let Some(target) = self.leads_to(link, hops) else { return };
        match self.tree.kind(&target) {
            Some(FileType::RegularFile) => self.obeyed(&target, hops - 1),
            Some(FileType::Symlink) => self.linked(&target, hops - 1),
            _ => {}
        }
    }

    /// Links in a directory that is obeyed: a hook may be one, to a file that can be changed.
    fn links_in(&mut self, name: &Path) -> Vec<PathBuf> {
        let is_directory = |found: &Found| matches!(found.seen, Seen::Directory { .. });
        let mut links = Vec::new();
        if !self.survey.names.get(name).is_some_and(is_directory)
            || !self.linked.insert(name.to_owned())
        {
            return links;
        }
        let mut left = LINKED_ENTRIES.min(self.linked_left);
        let mut pending = VecDeque::from([(name.to_owned(), 1)]);
        while let Some((directory, depth)) = pending.pop_front() {
            let (entries, _) = self.tree.list(&directory, left);
            left -= entries.len();
            self.linked_left -= entries.len();
            for (name, kind) in entries {
                match kind {
                    FileType::Symlink => links.push(directory.join(name)),
                    FileType::Directory if depth < LINKED_DEPTH => {
                        pending.push_back((directory.join(name), depth + 1));
                    }
                    _ => {}
                }
            }
        }
        links
    }

    /// Where a link leads, if that is in the workspace.
    fn leads_to(&mut self, name: &Path, hops: usize) -> Option<PathBuf> {
        match &self.survey.names.get(name)?.seen {
            Seen::Link { text } if hops > 0 => {
                let text = text.clone();
                self.resolve(name.parent()?, &text)
            }
            _ => None,
        }
    }

    /// The name in the workspace that a path in a file or link of directory `from` means. Links on
    /// the way are protected; one at the end is left to the caller.
    fn resolve(&mut self, from: &Path, path: &Path) -> Option<PathBuf> {
        let mut at = from.to_owned();
        let mut pending: VecDeque<OsString> = VecDeque::new();
        let mut hops = MAX_HOPS;
        let host = self.tree.host;
        let enter = |at: &mut PathBuf, pending: &mut VecDeque<OsString>, path: &Path| {
            let path = if path.is_absolute() {
                at.clear();
                path.strip_prefix(host).ok()?
            } else {
                path
            };
            for part in path.components().rev() {
                pending.push_front(part.as_os_str().to_owned());
            }
            Some(())
        };
        enter(&mut at, &mut pending, path)?;
        while let Some(part) = pending.pop_front() {
            match part.as_bytes() {
                b"." => {}
                b".." => {
                    if !at.pop() {
                        return None;
                    }
                }
                _ => {
                    let next = at.join(&part);
                    if !pending.is_empty() && self.tree.kind(&next) == Some(FileType::Symlink) {
                        hops = hops.checked_sub(1)?;
                        let text = self.tree.link_text(&next)?;
                        enter(&mut at, &mut pending, &text)?;
                        self.note(&next, Hold::ReadOnly, true);
                        if self.survey.full {
                            return None;
                        }
                    } else {
                        at = next;
                    }
                }
            }
        }
        (!at.as_os_str().is_empty()).then_some(at)
    }

    /// A `.git`: a directory, or what leads to one.
    fn repository(&mut self, name: &Path, hops: usize) {
        self.keep_way_to(name);
        match self.tree.kind(name) {
            Some(FileType::Directory) => {
                self.git_directory(name, name.parent().unwrap_or(Path::new("")), hops, true);
            }
            Some(FileType::Symlink) => {
                self.note(name, Hold::ReadOnly, true);
                if let Some(target) = self.leads_to(name, hops) {
                    self.repository(&target, hops - 1);
                }
            }
            // A worktree's or submodule's `.git` is a file that names the directory.
            Some(FileType::RegularFile) => {
                self.note(name, Hold::ReadOnly, true);
                let directory = name.parent().unwrap_or(Path::new(""));
                let named = self.tree.read(name).and_then(|text| git_files::named_directory(&text));
                let target = named.and_then(|named| self.resolve(directory, &named));
                if let Some(target) = target {
                    self.git_directory(&target, directory, hops, true);
                }
            }
            _ => self.note(name, Hold::ReadOnly, true),
        }
    }

    /// What makes git obey is in it, whether or not it is `named` as a git directory. One that is not, a bare
    /// repository, was an ordinary directory before it had its parts.
    fn git_directory(&mut self, directory: &Path, worktree: &Path, hops: usize, named: bool) {
        if self.repositories.len() >= MAX_REPOSITORIES
            || hops == 0
            || !self.repositories.insert(directory.to_owned())
        {
            return;
        }
        self.keep_way_to(directory);
        if !directory.as_os_str().is_empty() {
            self.note(directory, Hold::InPlace, named);
        }
        for name in GIT_ACTIVE {
            self.obeyed(&directory.join(name), hops);
        }
        for name in ["config", "config.worktree"] {
            self.settings(&directory.join(name), worktree, hops);
        }
        let common = self.tree.read(&directory.join("commondir"));
        let common = common.map(|text| PathBuf::from(OsStr::from_bytes(text.trim_ascii())));
        if let Some(common) = common.and_then(|common| self.resolve(directory, &common)) {
            self.git_directory(&common, worktree, hops - 1, named);
        }
        for container in ["modules", "worktrees"] {
            self.contained(&directory.join(container), hops);
        }
    }

    /// What a configuration makes git obey.
    fn settings(&mut self, file: &Path, worktree: &Path, hops: usize) {
        if self.settings.len() >= MAX_SETTINGS || !self.settings.insert(file.to_owned()) {
            return;
        }
        let Some(text) = self.tree.read(file) else { return };
        let directory = file.parent().unwrap_or(Path::new(""));
        for setting in git_files::settings(&text) {
            match setting {
                Setting::Hooks(path) => {
                    if let Some(target) = self.resolve(worktree, &path) {
                        self.obeyed(&target, hops);
                    }
                }
                Setting::Include(path) if hops > 0 => {
                    if let Some(target) = self.resolve(directory, &path) {
                        self.obeyed(&target, hops);
                        self.settings(&target, worktree, hops - 1);
                    }
                }
                Setting::Include(_) => {}
            }
        }
    }

    /// The git directories of submodules and worktrees, which may be in directories of their own
    /// name. Too many to be protected one by one are protected as a whole, so that nobody can lock a
    /// workspace by making them, nor take the room of other names.
    fn contained(&mut self, container: &Path, hops: usize) {
        if self.tree.kind(container) != Some(FileType::Directory) {
            return;
        }
        let mut found = Vec::new();
        let mut pending = vec![container.to_owned()];
        let mut left = MAX_MODULE_ENTRIES;
        let (mut ways, room) = (0, MAX_NAMES.saturating_sub(self.survey.names.len()) / 2);
        while let Some(directory) = pending.pop() {
            ways += 1;
            let (entries, mut more) = self.tree.list(&directory, left);
            left -= entries.len();
            for (name, kind) in entries {
                let path = directory.join(name);
                more |= path.as_os_str().len() > MAX_MODULE_NAME_BYTES;
                if kind != FileType::Directory && kind != FileType::Unknown {
                    continue;
                }
                // By more than HEAD, which a command may remove and bring back.
                let mut signs = ["HEAD", "config", "hooks", "commondir"].iter();
                if signs.any(|sign| self.tree.stat(&path.join(sign)).is_some()) {
                    found.push(path);
                } else {
                    pending.push(path);
                }
            }
            let too_many = found.len() + self.repositories.len() > MAX_REPOSITORIES
                || ways + found.len() * REPOSITORY_NAMES > room;
            if more || too_many {
                self.note(container, Hold::ReadOnly, true);
                return;
            }
        }
        self.note(container, Hold::InPlace, false);
        for directory in found {
            self.git_directory(&directory, &directory, hops - 1, true);
        }
    }

    /// Every `.git` below the top, and every bare repository, as far as it is looked for.
    fn nested(&mut self) -> Vec<Repository> {
        let mut found = Vec::new();
        let mut pending = VecDeque::from([(PathBuf::new(), 0)]);
        let mut last = VecDeque::new();
        let (mut directories, mut left) = (NESTED_DIRECTORIES, NESTED_ENTRIES);
        while let Some((directory, depth)) = pending.pop_front().or_else(|| last.pop_front()) {
            if directories == 0 || left == 0 {
                self.survey.truncated = true;
                break;
            }
            directories -= 1;
            let (entries, more) = self.tree.list(&directory, left);
            left -= entries.len();
            self.survey.truncated |= more;
            // By these git takes a directory for one of its own.
            let has = |sign: &str| entries.iter().any(|(name, _)| name == sign);
            if has("HEAD") && (has("commondir") || has("objects") && has("refs")) {
                found.push(Repository::Bare(directory.clone()));
            }
            for (name, kind) in entries {
                let bytes = name.as_bytes();
                if bytes == b".git" && depth > 0 {
                    found.push(Repository::Named(directory.join(name)));
                } else if kind == FileType::Directory && bytes != b".git" {
                    if depth == NESTED_DEPTH {
                        self.survey.truncated = true;
                        continue;
                    }
                    let queue = if LAST.contains(&bytes) { &mut last } else { &mut pending };
                    queue.push_back((directory.join(name), depth + 1));
                }
            }
        }
        found
    }
}
