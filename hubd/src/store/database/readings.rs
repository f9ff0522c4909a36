//! How often databases were read, for tests that count.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

static READINGS: LazyLock<Mutex<HashMap<PathBuf, u64>>> = LazyLock::new(Mutex::default);

/// A database is read.
pub(super) fn note(database: &Path) {
    let mut readings = READINGS.lock().unwrap_or_else(PoisonError::into_inner);
    *readings.entry(database.to_owned()).or_default() += 1;
}

/// Readings of all databases in this folder so far.
pub(crate) fn below(folder: &Path) -> u64 {
    let readings = READINGS.lock().unwrap_or_else(PoisonError::into_inner);
    readings.iter().filter(|(path, _)| path.starts_with(folder)).map(|(_, count)| count).sum()
}
