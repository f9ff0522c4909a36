//! Memory files that nobody can change any more, for what is too long for one message.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};

/// A memory file with this content.
pub(super) fn sealed(bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create("cortex", flags)?);
    file.write_all(bytes)?;
    io::Seek::rewind(&mut file)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

/// What is in a memory file that can no longer change: at most `most` bytes.
pub(super) fn read_sealed(file: &OwnedFd, most: u64) -> io::Result<Vec<u8>> {
    let seals = rustix::fs::fcntl_get_seals(file.as_fd())?;
    if !seals.contains(SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK) {
        return Err(io::Error::other("the memory file is not sealed"));
    }
    let mut bytes = Vec::new();
    File::from(file.try_clone()?).take(most + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length <= most) {
        Ok(bytes)
    } else {
        Err(io::Error::other(format!("the memory file is longer than {most} bytes")))
    }
}
