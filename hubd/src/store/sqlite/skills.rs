//! Versions of skills.

use cortex_shared::entry::Digest;
use cortex_shared::ids::CommitId;
use cortex_shared::wire_path::WirePath;
use rusqlite::{Connection, Row, params};

use super::super::{Actor, SkillOrigin, SkillVersion, StoreError};
use super::{damaged, is_duplicate, workspace_id};

const COLUMNS: &str = "id, skill, version, workspace, path, restored_from, digest, entries, \
                       content_bytes, by_name, by_uid, at, pending, ended_at";

pub(super) fn list(
    connection: &Connection,
    skill: Option<&str>,
) -> Result<Vec<SkillVersion>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM skill_versions WHERE ?1 IS NULL OR skill = ?1
         ORDER BY skill, version"
    ))?;
    statement.query_and_then([skill], version)?.collect()
}

fn version(row: &Row<'_>) -> Result<SkillVersion, StoreError> {
    let number = |number: i64| u64::try_from(number).map_err(|_| damaged("a negative number"));
    let path = row.get::<_, Vec<u8>>(4)?;
    Ok(SkillVersion {
        id: CommitId::from_slice(&row.get::<_, Vec<u8>>(0)?).map_err(|_| damaged("skill id"))?,
        skill: row.get(1)?,
        version: number(row.get(2)?)?,
        origin: SkillOrigin {
            workspace: workspace_id(&row.get::<_, Vec<u8>>(3)?)?,
            path: WirePath::new(path).map_err(|_| damaged("path of a skill"))?,
        },
        restored_from: row.get::<_, Option<i64>>(5)?.map(number).transpose()?,
        digest: Digest::from_slice(&row.get::<_, Vec<u8>>(6)?)
            .ok_or(damaged("digest of a skill"))?,
        entries: number(row.get(7)?)?,
        content_bytes: number(row.get(8)?)?,
        by: Actor { name: row.get(9)?, uid: row.get(10)? },
        at_ms: row.get(11)?,
        pending: row.get(12)?,
        ended_at_ms: row.get(13)?,
    })
}

pub(super) fn begin(t: &Connection, new: &SkillVersion) -> Result<(), StoreError> {
    let number = |number: u64| i64::try_from(number).map_err(|_| damaged("a number beyond all"));
    t.execute(
        &format!(
            "INSERT INTO skill_versions ({COLUMNS})
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, 1, NULL)"
        ),
        params![
            new.id.as_bytes().as_slice(),
            new.skill,
            number(new.version)?,
            new.origin.workspace.as_bytes().as_slice(),
            new.origin.path.as_bytes(),
            new.restored_from.map(number).transpose()?,
            new.digest.as_bytes().as_slice(),
            number(new.entries)?,
            number(new.content_bytes)?,
            new.by.name,
            new.by.uid,
            new.at_ms,
        ],
    )
    .map_err(|error| {
        if is_duplicate(&error) {
            let name = format!("{}@{}", new.skill, new.version);
            StoreError::Exists { what: "skill", name }
        } else {
            error.into()
        }
    })?;
    Ok(())
}

/// Makes a pending version the current one, in the place of the one before. Whether it was pending.
pub(super) fn finish(t: &Connection, id: CommitId, now_ms: i64) -> Result<bool, StoreError> {
    let id = id.as_bytes().as_slice();
    t.execute(
        "UPDATE skill_versions SET ended_at = ?2 WHERE pending = 0 AND ended_at IS NULL
         AND skill = (SELECT skill FROM skill_versions WHERE id = ?1 AND pending = 1)",
        params![id, now_ms],
    )?;
    let finish = "UPDATE skill_versions SET pending = 0 WHERE id = ?1 AND pending = 1";
    Ok(t.execute(finish, [id])? > 0)
}

pub(super) fn abandon(t: &Connection, id: CommitId) -> Result<(), StoreError> {
    t.execute(
        "DELETE FROM skill_versions WHERE id = ?1 AND pending = 1",
        [id.as_bytes().as_slice()],
    )?;
    Ok(())
}

pub(super) fn remove(t: &Connection, id: CommitId, now_ms: i64) -> Result<(), StoreError> {
    let ended = t.execute(
        "UPDATE skill_versions SET ended_at = ?2
         WHERE id = ?1 AND pending = 0 AND ended_at IS NULL",
        params![id.as_bytes().as_slice(), now_ms],
    )?;
    if ended == 0 {
        return Err(StoreError::NotFound { what: "current skill", name: id.to_string() });
    }
    Ok(())
}
