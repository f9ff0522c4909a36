//! Somebody who works in a tree, and remembers what he wrote and what he took away.

use std::collections::BTreeSet;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use rand::RngExt as _;
use rand::rngs::StdRng;

use super::disk::SimDisk;
use crate::root_dir::{DirHandle, Disk as _, FileHandle, FileKind};

/// Few, so that everybody works on the same files.
const NAMES: [&str; 3] = ["a", "b.txt", "A"];

/// What all users wrote and took away.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pub(super) next: u64,
    pub(super) written: BTreeSet<String>,
    /// Contents that somebody removed who had them in front of him.
    pub(super) removed: BTreeSet<String>,
    pub(super) deeds: Vec<String>,
    /// Contents that were saved without waiting for the disk, by the users of each member.
    pub(super) hasty: BTreeSet<(String, String)>,
    /// Those of them that a loss of power took, and the hub had.
    pub(super) at_hub: BTreeSet<String>,
    /// Some contents are large.
    pub(super) large: bool,
}

/// Every so many contents one is large, if any are.
const LARGE_EVERY: u64 = 80;
/// What contents begin with: all are equally long up to there, so that one can be written over another.
const HEADER_BYTES: usize = "content 000000".len();

static FRONT: LazyLock<Vec<u8>> = LazyLock::new(|| noise(b"front", 2_300_000));
static BACK: LazyLock<Vec<u8>> = LazyLock::new(|| noise(b"back", 2_000_000));

fn noise(seed: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(seed).finalize_xof().fill(&mut bytes);
    bytes
}

/// What is in the middle of a large content.
fn middle(number: &[u8]) -> Vec<u8> {
    noise(number, 300_000)
}

/// Content that is named `header+number`: too much for one pack, and most of it the same for all numbers.
/// Any other is its name.
pub(super) fn bytes_of(content: &str) -> Vec<u8> {
    let (header, number) = content.split_at(HEADER_BYTES);
    let Some(number) = number.strip_prefix('+') else { return header.as_bytes().to_vec() };
    let number = number.as_bytes();
    [header.as_bytes(), number, &**FRONT, &*middle(number), &**BACK].concat()
}

fn is_body(bytes: &[u8], number: &[u8]) -> bool {
    let rest = bytes.strip_prefix(number).and_then(|rest| rest.strip_prefix(&**FRONT));
    rest.and_then(|rest| rest.strip_prefix(&*middle(number))) == Some(&**BACK)
}

/// The users of one member.
#[derive(Clone)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) root: PathBuf,
    /// Outside of the root, on the same disk.
    pub(super) aside: PathBuf,
    pub(super) ledger: Arc<Mutex<Ledger>>,
    /// A file that a program has open, and goes on writing to wherever it is by now.
    pub(super) open: Arc<Mutex<Option<FileHandle>>>,
}

/// The name of a file's content.
pub(super) fn read(file: &FileHandle) -> String {
    let mut bytes = Vec::new();
    if let Err(error) = file.reader().read_to_end(&mut bytes) {
        return error.to_string();
    }
    if let Some((header, rest)) = bytes.split_at_checked(HEADER_BYTES)
        && let Some(number) = rest.get(..6).filter(|number| is_body(rest, number))
    {
        return format!("{}+{}", header.escape_ascii(), number.escape_ascii());
    }
    // One that nobody wrote so is told by its beginning.
    let shown = &bytes[..bytes.len().min(1000)];
    String::from_utf8_lossy(shown).into_owned()
}

impl User {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, random: &mut StdRng) -> Vec<&'static str> {
        let depth = [1, 1, 2, 2, 3][random.random_range(0..5)];
        (0..depth).map(|_| NAMES[random.random_range(0..NAMES.len())]).collect()
    }

    fn parent(&self, disk: &SimDisk, path: &[&str], make: bool) -> io::Result<DirHandle> {
        let mut directory = disk.open(&self.root)?;
        for name in &path[..path.len() - 1] {
            let name = name.as_bytes();
            if make && directory.try_lstat(name)?.is_none() {
                directory.make_dir(name, 0o755)?;
            }
            directory = directory.open_dir(name)?;
        }
        Ok(directory)
    }

    /// New content, not longer or shorter than any other but large ones.
    fn content(&self) -> String {
        let mut ledger = self.ledger();
        ledger.next += 1;
        let number = ledger.next;
        if ledger.large && number.is_multiple_of(LARGE_EVERY) {
            format!("content {number:06}+{number:06}")
        } else {
            format!("content {number:06}")
        }
    }

    /// Does something. What cannot be done is left.
    pub(super) fn act(&self, disk: &SimDisk, random: &mut StdRng) {
        self.do_something(disk, random, true);
    }

    /// Does something between two calls of an engine. A write that hides itself there, between the last
    /// look at a file and its displacement, cannot be told from none: a rename sets the only time that
    /// would have shown it.
    pub(super) fn intrude(&self, disk: &SimDisk, random: &mut StdRng) {
        self.do_something(disk, random, false);
    }

    fn do_something(&self, disk: &SimDisk, random: &mut StdRng, may_hide: bool) {
        let path = self.path(random);
        let deed = match random.random_range(0..100) {
            0..35 => self.save_as(disk, &path, random.random_bool(0.5)),
            35..50 => {
                let hides = random.random_bool(0.3);
                self.write(disk, &path, hides && may_hide, random.random_bool(0.5))
            }
            50..62 => self.remove(disk, &path),
            62..74 => {
                let other = self.path(random);
                self.rename(disk, &path, &other)
            }
            74..80 => self.toggle_executable(disk, &path),
            80..85 => self.touch(disk, &path),
            85..88 => self.link(disk, &path),
            88..91 => self.open(disk, &path),
            91..95 => self.write_open(random.random_bool(0.5)),
            _ => self.make_directory(disk, &path),
        };
        if let Ok(deed) = deed {
            let (name, path) = (&self.name, path.join("/"));
            self.ledger().deeds.push(format!("{name}: {deed} {path}"));
        }
    }

    /// Notes what lies aside and takes it away for good.
    fn note_removed(&self, directory: &DirHandle, name: &[u8]) -> io::Result<()> {
        match directory.lstat(name)?.kind {
            FileKind::Dir => {
                let below = directory.open_dir(name)?;
                for name in below.names()? {
                    self.note_removed(&below, &name)?;
                }
                directory.remove_dir(name)
            }
            FileKind::File => {
                let content = read(&directory.open_file(name)?);
                self.ledger().removed.insert(content);
                directory.remove_file(name)
            }
            FileKind::Link | FileKind::Other => directory.remove_file(name),
        }
    }

    fn note_written(&self, content: &str, hasty: bool) {
        let mut ledger = self.ledger();
        ledger.written.insert(content.to_owned());
        if hasty {
            ledger.hasty.insert((self.name.clone(), content.to_owned()));
        }
    }

    /// After a loss of power: of what was saved in haste, what `is_kept` elsewhere has to be there all the same.
    /// Whatever stands here now, halves as well, is as good as written, and may be taken away.
    pub(super) fn lose_power(&self, disk: &SimDisk, is_kept: impl Fn(&[u8]) -> bool) {
        // In the trash as well: what was cut off there looks like a late write.
        let found = tree(disk, Path::new("/"));
        let mut ledger = self.ledger();
        let Ledger { hasty, at_hub, written, removed, .. } = &mut *ledger;
        for (_, content) in hasty.extract_if(.., |(name, _)| *name == self.name) {
            let place = if is_kept(&bytes_of(&content)) { &mut *at_hub } else { &mut *removed };
            place.insert(content);
        }
        for (_, shown) in found {
            let content = shown.trim_end_matches('*').to_owned();
            if !written.contains(&content) {
                removed.insert(content.clone());
                written.insert(content);
            }
        }
    }

    /// Saves as editors do, by a rename over the old file.
    pub(super) fn save(&self, disk: &SimDisk, path: &[&str]) -> io::Result<String> {
        self.save_as(disk, path, false)
    }

    /// The same; in haste, the disk is not waited for.
    fn save_as(&self, disk: &SimDisk, path: &[&str], hasty: bool) -> io::Result<String> {
        let parent = self.parent(disk, path, true)?;
        let name = path[path.len() - 1].as_bytes();
        let content = self.content();
        let aside = disk.open(&self.aside)?;
        let file = aside.create_new(content.as_bytes(), 0o644)?;
        file.write_all_at(&bytes_of(&content), 0)?;
        if !hasty {
            file.sync()?;
        }
        if aside.rename_new(content.as_bytes(), &parent, name).is_err() {
            aside.exchange(content.as_bytes(), &parent, name)?;
            self.note_removed(&aside, content.as_bytes())?;
        }
        if !hasty {
            parent.sync()?;
        }
        self.note_written(&content, hasty);
        Ok(format!("saves {content}{} at", if hasty { " in haste" } else { "" }))
    }

    /// Writes into the file that stands there, and may hide it.
    fn write(
        &self,
        disk: &SimDisk,
        path: &[&str],
        sneaky: bool,
        hasty: bool,
    ) -> io::Result<String> {
        let parent = self.parent(disk, path, false)?;
        let file = parent.open_for_writing(path[path.len() - 1].as_bytes())?;
        let (old, before) = (read(&file), file.meta()?);
        let content = self.content();
        file.set_len(0)?;
        file.write_all_at(&bytes_of(&content), 0)?;
        if sneaky {
            file.set_mtime(before.mtime_ns)?;
        }
        if !hasty {
            file.sync()?;
        }
        self.ledger().removed.insert(old);
        self.note_written(&content, hasty);
        let (unseen, hasty) =
            (if sneaky { " (unseen)" } else { "" }, if hasty { " in haste" } else { "" });
        Ok(format!("writes {content}{hasty} into{unseen}"))
    }

    pub(super) fn open(&self, disk: &SimDisk, path: &[&str]) -> io::Result<String> {
        let parent = self.parent(disk, path, false)?;
        let file = parent.open_for_writing(path[path.len() - 1].as_bytes())?;
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        Ok("opens".to_owned())
    }

    pub(super) fn write_open(&self, close: bool) -> io::Result<String> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let file = open.as_ref().ok_or(io::ErrorKind::NotFound)?;
        if file.meta()?.links == 0 {
            *open = None;
            return Err(io::ErrorKind::NotFound.into());
        }
        let old = read(file);
        file.write_all_at(&bytes_of(&self.content()), 0)?;
        file.sync()?;
        // What follows in a large file stays as it was.
        let content = read(file);
        if close {
            *open = None;
        }
        let mut ledger = self.ledger();
        ledger.removed.insert(old);
        ledger.written.insert(content.clone());
        Ok(format!("writes {content} into what is open, not"))
    }

    pub(super) fn remove(&self, disk: &SimDisk, path: &[&str]) -> io::Result<String> {
        let parent = self.parent(disk, path, false)?;
        let aside = disk.open(&self.aside)?;
        let name = self.content();
        parent.rename_new(path[path.len() - 1].as_bytes(), &aside, name.as_bytes())?;
        self.note_removed(&aside, name.as_bytes())?;
        Ok("removes".to_owned())
    }

    pub(super) fn rename(&self, disk: &SimDisk, from: &[&str], to: &[&str]) -> io::Result<String> {
        let (old, new) = (self.parent(disk, from, false)?, self.parent(disk, to, false)?);
        let name = |path: &[&str]| path[path.len() - 1].as_bytes().to_vec();
        old.rename_new(&name(from), &new, &name(to))?;
        Ok(format!("renames to {} from", to.join("/")))
    }

    pub(super) fn toggle_executable(&self, disk: &SimDisk, path: &[&str]) -> io::Result<String> {
        let parent = self.parent(disk, path, false)?;
        let file = parent.open_for_writing(path[path.len() - 1].as_bytes())?;
        file.set_mode(file.meta()?.mode ^ 0o111)?;
        file.sync()?;
        Ok("toggles the mode of".to_owned())
    }

    fn touch(&self, disk: &SimDisk, path: &[&str]) -> io::Result<String> {
        let parent = self.parent(disk, path, false)?;
        let file = parent.open_for_writing(path[path.len() - 1].as_bytes())?;
        file.set_mtime(file.meta()?.mtime_ns + 3_600_000_000_000)?;
        file.sync()?;
        Ok("touches".to_owned())
    }

    pub(super) fn link(&self, disk: &SimDisk, path: &[&str]) -> io::Result<String> {
        let parent = self.parent(disk, path, true)?;
        parent.make_link(path[path.len() - 1].as_bytes(), b"a")?;
        Ok("links".to_owned())
    }

    pub(super) fn make_directory(&self, disk: &SimDisk, path: &[&str]) -> io::Result<String> {
        let parent = self.parent(disk, path, true)?;
        parent.make_dir(path[path.len() - 1].as_bytes(), 0o755)?;
        Ok("makes".to_owned())
    }
}

/// Everything below a directory: path, and what stands there.
pub(super) fn tree(disk: &SimDisk, root: &Path) -> Vec<(String, String)> {
    fn collect(directory: &DirHandle, prefix: &str, tree: &mut Vec<(String, String)>) {
        for name in directory.names().unwrap() {
            let path = format!("{prefix}{}", name.escape_ascii());
            let meta = directory.lstat(&name).unwrap();
            let below = format!("{path}/");
            match meta.kind {
                FileKind::Dir => {
                    tree.push((path, "directory".to_owned()));
                    collect(&directory.open_dir(&name).unwrap(), &below, tree);
                }
                FileKind::Link => {
                    let target = directory.read_link(&name).unwrap();
                    tree.push((path, format!("link to {}", target.escape_ascii())));
                }
                FileKind::File | FileKind::Other => {
                    let content = read(&directory.open_file(&name).unwrap());
                    let executable = if meta.executable() { "*" } else { "" };
                    tree.push((path, format!("{content}{executable}")));
                }
            }
        }
    }
    let mut found = Vec::new();
    collect(&disk.open(root).unwrap(), "", &mut found);
    found
}
