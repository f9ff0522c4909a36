//! Output into files of a directory: `NODE.stdout` and `NODE.stderr`, made anew.
//!
//! Files of an earlier run are removed first, and new ones are never made through links, so that
//! nothing outside the directory is written to, whoever else may write in it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use cortex_proto::v1::OutputStream;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};

use super::lines::index;
use super::output::Destination;
use crate::cli::exec::writer::{Captured, write_all};

/// See the module.
pub(super) struct Files {
    directory: OwnedFd,
    open: HashMap<String, [File; 2]>,
}

impl Files {
    /// With this directory, which is made if there is none.
    pub(super) fn new(directory: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, directory, flags, Mode::empty())?;
        Ok(Self { directory, open: HashMap::new() })
    }

    fn create(&self, name: &str) -> io::Result<File> {
        match rustix::fs::unlinkat(&self.directory, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let flags = flags | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::from_raw_mode(0o666))?;
        Ok(file.into())
    }

    /// Both files of a node. They exist from its first output or its end on.
    fn of(&mut self, node: &str) -> io::Result<&mut [File; 2]> {
        if !self.open.contains_key(node) {
            let files =
                [self.create(&format!("{node}.stdout"))?, self.create(&format!("{node}.stderr"))?];
            self.open.insert(node.to_owned(), files);
        }
        self.open.get_mut(node).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Destination for Files {
    fn write(&mut self, node: &str, stream: OutputStream, data: &[u8]) -> io::Result<()> {
        write_all(&mut self.of(node)?[index(stream)], data)
    }

    fn end(&mut self, node: &str) -> io::Result<Captured> {
        self.of(node)?;
        self.open.remove(node);
        Ok(Captured::default())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}
