//! Packs as files: `packs/<hash>`, immutable, as they were received. (Earlier hubs put them into
//! `packs/<first two digits>/`, where they are still found.)
//!
//! A pack is written to `tmp/`, flushed, renamed and its folder flushed before anything else knows
//! of it. Packs that come at the same time share the flush of the folder, which is one for that reason. A crash leaves at most a file in `tmp/`, which the next start sweeps, or a complete pack
//! that no index knows, which the next start adopts: packs describe themselves.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use cortex_shared::crash::crash_point;
use cortex_shared::durable;
use cortex_shared::entry::Digest;
use cortex_shared::pack::{MAX_ENCODED_BYTES, Pack};

/// A file or folder that could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}")]
pub struct PackFileError {
    /// What was tried.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

impl PackFileError {
    pub(super) fn new(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self { action, path: path.to_owned(), source }
    }

    /// Whether trying again is of no use: the disk cannot read it.
    pub(super) fn is_lost(&self) -> bool {
        self.source.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
    }

    /// Whether there was no space left.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// The pack files of one workspace. All methods block on the disk.
#[derive(Debug)]
pub struct PackFiles {
    packs: PathBuf,
    temporary: PathBuf,
    damaged: PathBuf,
    next_temporary: AtomicU64,
    flush: GroupFlush,
}

impl PackFiles {
    /// Creates the folders below `folder` where they are missing, and sweeps what an interrupted
    /// write left over.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(folder: &Path) -> Result<Self, PackFileError> {
        let files = Self::of_another(folder);
        for path in [&files.packs, &files.temporary] {
            durable::create_private_folder(path)
                .map_err(|error| PackFileError::new("create", path, error))?;
        }
        for path in [&files.packs, &folder.to_owned()] {
            durable::sync_folder(path).map_err(|error| PackFileError::new("flush", path, error))?;
        }
        for left_over in list(&files.temporary)? {
            fs::remove_file(&left_over)
                .map_err(|error| PackFileError::new("remove", &left_over, error))?;
        }
        Ok(files)
    }

    /// The same folders as they are, to read what another process keeps in them: nothing is created or
    /// swept.
    #[must_use]
    pub fn of_another(folder: &Path) -> Self {
        Self {
            packs: folder.join("packs"),
            temporary: folder.join("tmp"),
            damaged: folder.join("damaged"),
            next_temporary: AtomicU64::new(0),
            flush: GroupFlush::default(),
        }
    }

    /// Writes a pack. When this returns, it survives power loss.
    ///
    /// # Errors
    /// Those of the file system; the pack is then not there.
    pub fn write(&self, pack: &Pack) -> Result<(), PackFileError> {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.temporary.join(number.to_string());
        let path = self.path(&pack.hash());
        let written = (|| {
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(pack.bytes())?;
            crash_point("sync.pack.received");
            // After a failed flush the cached pages cannot be believed, so the file goes and the
            // sender repeats.
            file.sync_all()?;
            fs::rename(&temporary, &path)
        })();
        if let Err(error) = written {
            // The first error is the one that matters; the next start sweeps the folder anyway.
            fs::remove_file(&temporary).ok();
            return Err(PackFileError::new("write", &path, error));
        }
        crash_point("sync.pack.renamed");
        self.flush
            .flush(|| durable::sync_folder(&self.packs))
            .map_err(|error| PackFileError::new("flush", &self.packs, error))?;
        crash_point("sync.pack.durable");
        Ok(())
    }

    /// Gives a pack of another workspace a second name here; where the file system cannot, writes
    /// `bytes`, its content. When this returns, it survives power loss.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn link_from(
        &self,
        other: &Self,
        hash: &Digest,
        bytes: &[u8],
    ) -> Result<(), PackFileError> {
        let path = self.path(hash);
        let linked = other.paths(hash).iter().any(|theirs| match fs::hard_link(theirs, &path) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::AlreadyExists,
        });
        if !linked {
            let pack = Pack::parse(bytes.to_vec().into()).map_err(|error| {
                PackFileError::new("copy", &path, io::Error::other(error.to_string()))
            })?;
            return self.write(&pack);
        }
        crash_point("sync.pack.linked");
        self.flush
            .flush(|| durable::sync_folder(&self.packs))
            .map_err(|error| PackFileError::new("flush", &self.packs, error))
    }

    /// Removes what interrupted writes left in `tmp/` and nobody has written to since.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn sweep(&self, untouched_for: Duration) -> Result<(), PackFileError> {
        for path in list(&self.temporary)? {
            let failed = |error| PackFileError::new("sweep", &path, error);
            match fs::metadata(&path).and_then(|meta| meta.modified()) {
                Ok(modified) if modified.elapsed().is_ok_and(|age| age > untouched_for) => {
                    fs::remove_file(&path).map_err(failed)?;
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads a pack whole; `None` if it is not there, or is no longer what its name says.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&self, hash: &Digest) -> Result<Option<Bytes>, PackFileError> {
        let mut found = None;
        for path in self.paths(hash) {
            match read_bounded(&path) {
                Ok(bytes) => {
                    found = Some(bytes);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(PackFileError::new("read", &path, error)),
            }
        }
        let Some(bytes) = found else { return Ok(None) };
        let body = bytes.len().saturating_sub(32);
        let intact = Digest::of(&bytes[..body]) == *hash && bytes[body..] == *hash.as_bytes();
        Ok(intact.then(|| bytes.into()))
    }

    /// Removes packs. What a crash leaves of them is adopted again, and collected again later.
    ///
    /// # Errors
    /// Those of the file system, after the others have been removed.
    pub fn remove(&self, packs: &[Digest]) -> Result<(), PackFileError> {
        let mut result = Ok(());
        for path in packs.iter().flat_map(|pack| self.paths(pack)) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    result = Err(PackFileError::new("remove", &path, error));
                }
                _ => {}
            }
        }
        result
    }

    /// The names of all packs on disk.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn list(&self) -> Result<Vec<Digest>, PackFileError> {
        let mut packs = Vec::new();
        let mut take = |path: PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            match parse_name(name) {
                Some(hash) if self.paths(&hash).contains(&path) => packs.push(hash),
                _ => tracing::warn!(path = %path.display(), "this file is not a pack"),
            }
        };
        for path in list(&self.packs)? {
            if path.is_dir() { list(&path)?.into_iter().for_each(&mut take) } else { take(path) }
        }
        Ok(packs)
    }

    /// Puts a pack that is not intact aside, where nothing reads it but a person can. One that is
    /// gone is no error.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn set_aside(&self, hash: &Digest) -> Result<(), PackFileError> {
        durable::create_private_folder(&self.damaged)
            .map_err(|error| PackFileError::new("create", &self.damaged, error))?;
        for path in self.paths(hash) {
            match fs::rename(&path, self.damaged.join(hash.to_string())) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(PackFileError::new("move", &path, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn path(&self, hash: &Digest) -> PathBuf {
        self.packs.join(hash.to_string())
    }

    /// Where a pack may lie: where they go now, and where earlier hubs put them.
    fn paths(&self, hash: &Digest) -> [PathBuf; 2] {
        [self.path(hash), self.packs.join(hash.short_hex(1)).join(hash.to_string())]
    }
}

/// A flush that those who need it at the same time share.
#[derive(Debug, Default)]
struct GroupFlush {
    state: Mutex<FlushState>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct FlushState {
    /// Callers so far.
    asked: u64,
    /// Callers whose work is flushed: those up to this one.
    flushed: u64,
    running: bool,
}

impl GroupFlush {
    /// Returns once a flush has begun and succeeded after this call. Whoever comes first carries it out;
    /// those who come while one runs share the next.
    fn flush(&self, flush: impl Fn() -> io::Result<()>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.asked += 1;
        let mine = state.asked;
        while state.flushed < mine {
            if state.running {
                state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.running = true;
            let covered = state.asked;
            drop(state);
            let result = flush();
            state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.running = false;
            self.ended.notify_all();
            result?;
            state.flushed = covered;
        }
        Ok(())
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let file = File::open(path)?;
    let len = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    let mut bytes = Vec::with_capacity(len.min(MAX_ENCODED_BYTES));
    file.take(MAX_ENCODED_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, PackFileError> {
    let failed = |error| PackFileError::new("list", folder, error);
    fs::read_dir(folder)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()).map_err(failed))
        .collect()
}

/// The hash that a pack's file name says.
pub(crate) fn parse_name(name: &str) -> Option<Digest> {
    if name.len() != 64 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, digits) in hash.iter_mut().zip(name.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(Digest::from_bytes(hash))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn those_who_come_while_a_flush_runs_share_the_next_one() {
        let (group, flushes) = (GroupFlush::default(), AtomicU64::new(0));
        let (begun, has_begun) = channel();
        let (go_on, may_go_on) = channel::<()>();
        let may_go_on = Mutex::new(may_go_on);
        let flush = || {
            flushes.fetch_add(1, Ordering::Relaxed);
            begun.send(()).unwrap();
            may_go_on.lock().unwrap().recv().unwrap();
            Ok(())
        };
        std::thread::scope(|scope| {
            scope.spawn(|| group.flush(flush));
            has_begun.recv().unwrap();
            for _ in 0..9 {
                scope.spawn(|| group.flush(flush));
            }
            while group.state.lock().unwrap().asked < 10 {
                std::thread::yield_now();
            }
            go_on.send(()).unwrap();
            has_begun.recv().unwrap();
            go_on.send(()).unwrap();
        });
        assert_eq!(flushes.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_flush_that_fails_is_tried_again_by_those_who_waited_for_it() {
        let (group, flushes) = (GroupFlush::default(), AtomicU64::new(0));
        let flush = || match flushes.fetch_add(1, Ordering::Relaxed) {
            0 => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        };
        assert!(group.flush(flush).is_err());
        assert!(group.flush(flush).is_ok());
    }
}
