//! Late writes to displaced files.
//!
//! A program that has a file open goes on writing to it after another version has taken its place:
//! the file lies in the trash by then, and nobody would see what was written. So it is remembered
//! what each displaced file looked like, and looked at again a few times before it is removed. One
//! that has changed goes back into the tree: to its own name if that is free, which makes it a new
//! version, or as a conflict copy beside what stands there.

use std::collections::BTreeSet;
use std::io;

use cortex_shared::chunk::Cutter;
use cortex_shared::entry::{Digest, Entry, File};
use cortex_shared::wire_path::WirePath;

use crate::root_dir::{FileKind, Meta, RootDir};
use crate::sync::index::{Displaced, Index};
use crate::sync::plan::copy_names;
use crate::sync::private_dir::PrivateDir;
use crate::sync::problem::{Code, Finding};

use super::{ApplyError, exists, vanished};

/// What is the matter with one that could not be put back.
const WRITTEN: &str = "it was written to after it was replaced";
/// And with one that could not be looked at.
const UNSEEN: &str = "it cannot be told whether it was written to after it was replaced";
/// Where such a file lies, below the private directory.
const STAGE: &str = "stage";
const TRASH: &str = "trash";
/// Displaced files that are looked at in one go.
const PAGE_ROWS: u32 = 1024;

/// What was found in the trash.
#[derive(Debug, Default)]
pub struct LateWrites {
    /// Directories to which files were put back.
    pub dirty: BTreeSet<Option<WirePath>>,
    /// Files that could not be put back, or looked at.
    pub findings: Vec<Finding>,
}

impl Displaced {
    /// Whether nobody has written to it, as far as its length and its time tell.
    fn looks_unchanged(&self, meta: &Meta) -> bool {
        (self.size, self.mtime_ns) == (meta.size, meta.mtime_ns)
    }
}

/// What was found at a look.
enum Found {
    /// It holds this, which nobody is to be told of.
    Unwritten(Digest),
    /// Somebody has written to it; it is in the tree again.
    PutBack(WirePath),
}

/// Looks at all displaced files that are remembered. Blocking.
///
/// # Errors
/// If the index fails, or the trash cannot be read.
pub fn rescue_late_writes(
    root: &RootDir,
    private: &PrivateDir,
    index: &mut Index,
) -> Result<LateWrites, ApplyError> {
    let mut late = LateWrites::default();
    let mut after = None;
    // Before any of them is looked at: what is written later has another time than one that is older.
    let clock = private.clock_of_readers().map_err(ApplyError::Trash)?;
    loop {
        let rows = index.displaced(after.as_deref(), PAGE_ROWS)?;
        let Some(last) = rows.last() else { return Ok(late) };
        after = Some(last.name.clone());
        let (mut over, mut ours) = (Vec::new(), Vec::new());
        for row in rows {
            let meta = match private.trash().try_lstat(&row.name) {
                Ok(Some(meta)) => meta,
                Ok(None) => {
                    match private.discard(&row.name) {
                        // It could not be brought here before; the next look sees it.
                        Ok(()) => {}
                        // It was removed in its time.
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {
                            over.push(row.name);
                        }
                        Err(error) => {
                            late.findings.push(finding(private, STAGE, &row, UNSEEN, &error));
                        }
                    }
                    continue;
                }
                // One that cannot be looked at holds up nothing else.
                Err(error) => {
                    late.findings.push(finding(private, TRASH, &row, UNSEEN, &error));
                    continue;
                }
            };
            if meta.kind != FileKind::File || row.content.is_none() && row.looks_unchanged(&meta) {
                continue;
            }
            match put_back(root, private, index, &row)? {
                Ok(Found::Unwritten(content)) => {
                    let Meta { size, mtime_ns, .. } = meta;
                    // Once it is old enough, its time tells.
                    let hides = clock.may_hide_a_write(mtime_ns);
                    let content = hides.then_some(content);
                    ours.push(Displaced { size, mtime_ns, content, ..row });
                }
                Ok(Found::PutBack(path)) => {
                    tracing::warn!(%path, "a file was written to after it was replaced");
                    late.dirty.insert(path.parent());
                    over.push(row.name);
                }
                Err(error) => late.findings.push(finding(private, TRASH, &row, WRITTEN, &error)),
            }
        }
        if !over.is_empty() || !ours.is_empty() {
            index.batch(|writer| {
                over.iter().try_for_each(|name| writer.forget_displaced(name))?;
                ours.iter().try_for_each(|file| writer.note_displaced(file))
            })?;
        }
    }
}

/// What is told of a displaced file, and where it lies.
fn finding(
    private: &PrivateDir,
    folder: &str,
    row: &Displaced,
    what: &str,
    error: &io::Error,
) -> Finding {
    let folder = private.path().join(folder);
    let (name, folder) = (row.name.escape_ascii(), folder.display());
    let text = format!("{what}; that version is {name} in {folder}: {error}");
    Finding::at(&row.path, Code::LateWrite, text)
}

/// Moves a displaced file back into the tree. Whoever has it open goes on writing to it there.
///
/// Unless nobody has written to it: it holds what it held, or what the hub has at its path. That is what we
/// were about to put there when our process ended, between the note and the exchange.
fn put_back(
    root: &RootDir,
    private: &PrivateDir,
    index: &Index,
    row: &Displaced,
) -> Result<io::Result<Found>, ApplyError> {
    let file = match read(private, row) {
        Ok(file) => file,
        Err(error) => return Ok(Err(error)),
    };
    if row.content == Some(file.content) {
        return Ok(Ok(Found::Unwritten(file.content)));
    }
    let remote = index.get(&row.path)?.and_then(|found| found.row.remote);
    if matches!(remote, Some(Entry::File(remote)) if remote.content == file.content) {
        return Ok(Ok(Found::Unwritten(file.content)));
    }
    Ok(place(root, private, row, &Entry::File(file)).map(Found::PutBack))
}

fn read(private: &PrivateDir, row: &Displaced) -> io::Result<File> {
    let file = private.trash().open_file(&row.name)?;
    let cut = Cutter::new()
        .cut(file.reader(), |_, _| Ok::<_, std::convert::Infallible>(()))
        .map_err(|error| io::Error::other(format!("{error:?}")))?;
    Ok(File {
        content: cut.content,
        size: cut.size,
        executable: false,
        mtime_ns: row.mtime_ns,
        recipe: cut.recipe,
    })
}

/// Moves a file from the trash to where it belongs, or beside it.
fn place(
    root: &RootDir,
    private: &PrivateDir,
    row: &Displaced,
    entry: &Entry,
) -> io::Result<WirePath> {
    // Where its directory has gone, it goes to the top.
    let top = WirePath::new(row.path.name()).map_err(io::Error::other)?;
    for path in [&row.path, &top] {
        for candidate in std::iter::once(path.clone()).chain(copy_names(path, entry)) {
            let placed = root
                .parent_of(&candidate)
                .and_then(|(parent, leaf)| private.trash().rename_new(&row.name, &parent, leaf));
            match placed {
                Ok(()) => return Ok(candidate),
                Err(error) if exists(&error) => {}
                Err(error) if vanished(&error) => break,
                Err(error) => return Err(error),
            }
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}
