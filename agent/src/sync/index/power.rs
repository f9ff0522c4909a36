//! What a loss of power may have taken back.
//!
//! A program that saves a file rarely asks the disk to keep it: for some seconds it is in memory alone, while
//! the look here sees it, and sends it. If the power fails then, the file is gone or what it was before, and
//! the index knows better: that would look like somebody's deletion, or somebody's change back, and would be
//! sent to all others. So after another start of the machine the files that were changed last are distrusted
//! until they are seen again. What is missing, or is there as it was before, nobody here has taken away: the
//! hub's version comes back.

use std::cmp::Ordering;
use std::time::Duration;

use cortex_shared::entry::{Entry, same};
use rusqlite::params;

use super::{Index, IndexError, IndexRow, Stamp};

/// How long a change may be in memory alone. The kernel writes after 30 s, laptops are told to wait longer.
const IN_MEMORY: Duration = Duration::from_secs(300);

/// In the column of what is racy: the machine was started since.
pub(super) const DISTRUSTED: i64 = 2;

impl Index {
    /// Notes which start of the machine this is. After another one than before, distrusts what was changed
    /// last by the file system's clock, which says `now_ns`. Both are durable together.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn begin_boot(&mut self, boot: &str, now_ns: i64) -> Result<(), IndexError> {
        const BOOT: &str = "boot";
        let known = self.meta(BOOT)?;
        if boot.is_empty() || known.as_deref() == Some(boot.as_bytes()) {
            return Ok(());
        }
        let distrusted = self.batch(|writer| {
            writer.set_meta(BOOT, boot.as_bytes())?;
            if known.is_none() {
                return Ok(0);
            }
            writer.forget_sent()?;
            let in_memory = i64::try_from(IN_MEMORY.as_nanos()).unwrap_or(i64::MAX);
            // A time that is still to come is none of those.
            Ok(writer.database.execute(
                "UPDATE entry SET racy = racy | ?1 WHERE ctime <= ?2 AND ctime >= \
                 (SELECT max(ctime) FROM entry WHERE ctime <= ?2) - ?3",
                params![DISTRUSTED, now_ns, in_memory],
            )?)
        })?;
        if distrusted > 0 {
            tracing::info!(
                files = distrusted,
                "the machine was started since: what was changed last is read again"
            );
        }
        Ok(())
    }
}

impl IndexRow {
    /// What was known of the tree here turns out to be gone, and not by somebody: with it goes what both
    /// sides agreed on, so that the hub's version counts. Whether that is so.
    pub(super) fn is_lost(&self) -> bool {
        self.stamp.is_some_and(|stamp| stamp.distrusted)
    }

    /// Something else is found than what was known here, which the hub has: whether somebody put it there. If
    /// nobody can have, both sides agreed on that; if nobody can tell, on nothing, and both are kept.
    pub(super) fn base_of_found(&self, found: &Entry, stamp: Option<&Stamp>) -> Option<Entry> {
        let base = self.row.base.clone();
        let (Some(known), Some(now)) = (&self.stamp, stamp) else { return base };
        let local = self.row.local.as_ref();
        let is_sent = local.is_some() && same(local, self.row.remote.as_ref());
        if !known.distrusted || !is_sent || same(local, Some(found)) {
            return base;
        }
        match now.ctime_ns.cmp(&known.ctime_ns) {
            Ordering::Less => Some(found.clone()),
            // If the last look came too soon, somebody may have changed it after that within the same tick.
            Ordering::Equal if !known.racy => Some(found.clone()),
            // Whoever changed it since may not have had in front of him what the hub has.
            Ordering::Equal | Ordering::Greater => None,
        }
    }
}
