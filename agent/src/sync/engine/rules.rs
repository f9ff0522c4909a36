//! Taking over new rules of what is left out.
//!
//! The rules are those of the `.cortexignore` that stands here, whoever wrote it: as soon as it was
//! seen, and so before anything that it leaves out is sent.

use cortex_shared::entry::Entry;
use cortex_shared::wire_path::WirePath;

use super::{Engine, Work};
use crate::sync::core::{Core, SyncError};
use crate::sync::hub::Hub;
use crate::sync::ignore::{Ignore, RULES_NAME};
use crate::sync::problem::{Finding, Stage};
use crate::sync::scan::Scope;

impl<H: Hub> Engine<H> {
    /// Takes over the rules if they are others now; then everything is to be looked at again.
    pub(super) async fn adopt_rules(&self, work: &mut Work) -> Result<bool, SyncError> {
        let adopted = work.core.run(adopt).await?;
        let Some(ignore) = adopted else { return Ok(false) };
        tracing::info!(workspace = %self.config.name, ?ignore, "other rules of what is left out");
        work.dirty.set_ignore(ignore);
        work.dirty.add(Scope::Tree(None));
        self.tell_rules(work).await?;
        Ok(true)
    }

    /// Says which rules are not obeyed.
    pub(super) async fn tell_rules(&self, work: &mut Work) -> Result<(), SyncError> {
        let ignore = work.core.run(|core| Ok::<_, SyncError>(core.ignore.clone())).await?;
        let findings = ignore.refused().iter().take(1).map(|_| Finding {
            path: rules_path(),
            code: "ignore_rules",
            message: format!("not all of it is obeyed: {}", ignore.refused().join("; ")),
        });
        work.problems.replace(Stage::Rules, |_| true, findings.collect());
        Ok(())
    }
}

fn rules_path() -> Option<WirePath> {
    WirePath::new(RULES_NAME).ok()
}

fn adopt(core: &mut Core) -> Result<Option<Ignore>, SyncError> {
    let Some(path) = rules_path() else { return Ok(None) };
    let found = core.index.get(&path)?;
    // What cannot be read now stays what it was.
    if found.as_ref().is_some_and(|found| found.row.unknown) {
        return Ok(None);
    }
    let file = match found.and_then(|found| found.row.local) {
        Some(Entry::File(file)) => Some(file),
        _ => None,
    };
    let version = file.as_ref().map(|file| file.content);
    if version == core.ignore.version() {
        return Ok(None);
    }
    let ignore = match &file {
        Some(file) if Ignore::is_too_long(file.size) => Ignore::too_long(file.content),
        Some(_) => Ignore::load(&core.root)?,
        None => Ignore::default(),
    };
    if ignore.version() != version {
        // It was changed since it was looked at: there will be another look.
        return Ok(None);
    }
    core.index.set_ignore(ignore.clone())?;
    core.ignore = ignore.clone();
    Ok(Some(ignore))
}
