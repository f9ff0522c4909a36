//! Taking over new rules of what is left out.
//!
//! The rules are those of the `.cortexignore` that stands here, whoever wrote it: as soon as it was
//! seen, and so before anything that it leaves out is sent. While the hub has a newer one, nothing is
//! sent but what concerns the rules, and the hub would not take it.

use cortex_shared::entry::{Digest, Entry};
use cortex_shared::wire_path::{RULES_NAME, WirePath};

use super::{Engine, Work};
use crate::sync::core::{Core, SyncError};
use crate::sync::hub::Hub;
use crate::sync::ignore::Ignore;
use crate::sync::plan::PushOp;
use crate::sync::problem::{Code, Finding, Stage};
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
            code: Code::IgnoreRules,
            message: format!("not all of it is obeyed: {}", ignore.refused().join("; ")),
        });
        work.problems.replace(Stage::Rules, |_| true, findings.collect());
        Ok(())
    }
}

fn rules_path() -> Option<WirePath> {
    WirePath::new(RULES_NAME).ok()
}

/// Whether an operation may be sent by who goes by older rules: one that concerns the rules.
pub(super) fn concerns_rules(op: &PushOp) -> bool {
    [Some(&op.path), op.conflict_of.as_ref()].into_iter().flatten().any(is_rules)
}

/// Whether the hub has newer rules than those that were gone by here.
pub(super) fn are_outdated(core: &mut Core) -> Result<bool, SyncError> {
    let Some(path) = rules_path() else { return Ok(false) };
    let remote = core.index.get(&path)?.and_then(|found| found.row.remote);
    Ok(content_of(remote.as_ref()) != core.rules_base)
}

/// Whether the newest rules of the hub are what both sides have agreed on.
pub(super) fn are_in_place(core: &mut Core) -> Result<bool, SyncError> {
    let Some(path) = rules_path() else { return Ok(true) };
    let Some(found) = core.index.get(&path)? else { return Ok(true) };
    Ok(content_of(found.row.remote.as_ref()) == content_of(found.row.base.as_ref()))
}

/// Whether this is the file with the rules.
pub(super) fn is_rules(path: &WirePath) -> bool {
    path.as_bytes() == RULES_NAME
}

/// Tells that the rules of the workspace could not be taken over.
pub(super) fn not_taken_over() -> Finding {
    let text = "the newest rules of the workspace cannot be taken over here, so nothing is sent";
    Finding { path: rules_path(), code: Code::RulesOutdated, message: text.to_owned() }
}

fn content_of(entry: Option<&Entry>) -> Option<Digest> {
    match entry {
        Some(Entry::File(file)) => Some(file.content),
        _ => None,
    }
}

fn adopt(core: &mut Core) -> Result<Option<Ignore>, SyncError> {
    let Some(path) = rules_path() else { return Ok(None) };
    let found = core.index.get(&path)?;
    // What cannot be read now stays what it was.
    if found.as_ref().is_some_and(|found| found.row.unknown) {
        return Ok(None);
    }
    let (local, base) = found.map_or((None, None), |found| (found.row.local, found.row.base));
    let base = content_of(base.as_ref());
    let file = match local {
        Some(Entry::File(file)) => Some(file),
        _ => None,
    };
    let version = file.as_ref().map(|file| file.content);
    if version == core.ignore.version() {
        core.rules_base = base;
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
    core.rules_base = base;
    Ok(Some(ignore))
}
