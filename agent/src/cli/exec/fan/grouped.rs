//! Output of each node as a whole, once; nodes with equal output together.
//!
//! Output waits in one temporary file without a name, which is gone with this process; in memory are
//! a bounded piece of each node that runs and the places of the rest. What turns out to be equal to
//! another node's is given back to the file system.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use cortex_proto::v1::OutputStream;
use rustix::fs::{FallocateFlags, Mode, OFlags};

use super::lines::{STREAMS, index};
use super::output::Destination;
use crate::cli::exec::writer::{Captured, pass, write_ours};

/// Output that is gathered in memory before it is written to the file.
const PIECE_BYTES: usize = 64 * 1024;

/// One stream of one node.
#[derive(Default)]
struct Spooled {
    hasher: blake3::Hasher,
    recent: Vec<u8>,
    /// Offset and length in the file.
    places: Vec<(u64, usize)>,
}

/// Nodes with equal output.
struct Group {
    nodes: Vec<String>,
    places: [Vec<(u64, usize)>; 2],
}

/// See the module.
pub(super) struct Grouped {
    file: File,
    file_end: u64,
    running: HashMap<String, [Spooled; 2]>,
    groups: Vec<Group>,
    by_hash: HashMap<[[u8; 32]; 2], usize>,
    out: [File; 2],
}

impl Grouped {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            file: unnamed_file()?,
            file_end: 0,
            running: HashMap::new(),
            groups: Vec::new(),
            by_hash: HashMap::new(),
            out: pass()?,
        })
    }

    fn show(&mut self, group: &Group) -> io::Result<()> {
        let count = group.nodes.len();
        let nodes = if count == 1 { String::new() } else { format!(" ({count} nodes)") };
        let heading = format!("== {}{nodes}\n", group.nodes.join(", "));
        let mut buffer = vec![0; PIECE_BYTES];
        for (stream, places) in STREAMS.into_iter().zip(&group.places) {
            // Nodes that wrote nothing at all are still named.
            if stream == OutputStream::Stderr && places.is_empty() {
                continue;
            }
            write_ours(&mut self.out, stream, heading.as_bytes())?;
            let mut last = b'\n';
            for (offset, length) in places {
                let piece = &mut buffer[..*length];
                self.file.read_exact_at(piece, *offset)?;
                write_ours(&mut self.out, stream, piece)?;
                last = piece.last().copied().unwrap_or(last);
            }
            if last != b'\n' {
                write_ours(&mut self.out, stream, b"\n")?;
            }
        }
        Ok(())
    }
}

/// Writes what waits of a stream to the file.
fn spill(spooled: &mut Spooled, file: &File, file_end: &mut u64) -> io::Result<()> {
    for piece in spooled.recent.chunks(PIECE_BYTES) {
        file.write_all_at(piece, *file_end)?;
        spooled.places.push((*file_end, piece.len()));
        *file_end += u64::try_from(piece.len()).unwrap_or(u64::MAX);
    }
    spooled.recent.clear();
    Ok(())
}

fn unnamed_file() -> io::Result<File> {
    let folder = std::env::temp_dir();
    let mode = Mode::from_raw_mode(0o600);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(&folder, flags, mode) {
        return Ok(file.into());
    }
    // A file system without unnamed files: made anew under a name nobody can guess, and unnamed then.
    let path = folder.join(format!("cortex-{:032x}", rand::random::<u128>()));
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, mode)?;
    std::fs::remove_file(&path)?;
    Ok(file.into())
}

impl Destination for Grouped {
    fn write(&mut self, node: &str, stream: OutputStream, data: &[u8]) -> io::Result<()> {
        if !self.running.contains_key(node) {
            self.running.insert(node.to_owned(), Default::default());
        }
        let Some(streams) = self.running.get_mut(node) else { return Ok(()) };
        let spooled = &mut streams[index(stream)];
        spooled.hasher.update(data);
        spooled.recent.extend_from_slice(data);
        if spooled.recent.len() >= PIECE_BYTES {
            spill(spooled, &self.file, &mut self.file_end)?;
        }
        Ok(())
    }

    fn end(&mut self, node: &str) -> io::Result<Captured> {
        let mut streams = self.running.remove(node).unwrap_or_default();
        let hashes = [0, 1].map(|index: usize| *streams[index].hasher.finalize().as_bytes());
        if let Some(group) = self.by_hash.get(&hashes) {
            self.groups[*group].nodes.push(node.to_owned());
            for (offset, length) in streams.iter().flat_map(|stream| &stream.places) {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let length = u64::try_from(*length).unwrap_or(0);
                // Where that is not to be had, the file is only larger.
                rustix::fs::fallocate(&self.file, flags, *offset, length).ok();
            }
            return Ok(Captured::default());
        }
        for stream in &mut streams {
            spill(stream, &self.file, &mut self.file_end)?;
        }
        let places = streams.map(|stream| stream.places);
        self.by_hash.insert(hashes, self.groups.len());
        self.groups.push(Group { nodes: vec![node.to_owned()], places });
        Ok(Captured::default())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        let mut groups = std::mem::take(&mut self.groups);
        for group in &mut groups {
            group.nodes.sort();
        }
        // What most nodes say first.
        groups.sort_by(|a, b| b.nodes.len().cmp(&a.nodes.len()).then(a.nodes.cmp(&b.nodes)));
        groups.iter().try_for_each(|group| self.show(group))
    }
}
