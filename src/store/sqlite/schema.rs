//! Which migrations the database has, and applying those that it lacks.

use std::collections::BTreeMap;

use rusqlite::Connection;

use crate::store::{Result, StoreError};

mod embedded {
    refinery::embed_migrations!("migrations/sqlite");
}

/// Applies what is missing and returns the names.
pub(super) fn migrate(connection: &mut Connection) -> Result<Vec<String>> {
    let lacking = missing(connection)?;
    if lacking.is_empty() {
        return Ok(lacking);
    }
    if let Err(error) = embedded::migrations::runner().run(connection) {
        // Another process may have been faster; then all is well.
        if !missing(connection)?.is_empty() {
            return Err(StoreError::Unavailable(format!("the migrations failed: {error}")));
        }
        return Ok(Vec::new());
    }
    Ok(lacking)
}

/// The names of what is missing.
pub(super) fn missing(connection: &Connection) -> Result<Vec<String>> {
    let mut applied = applied(connection)?;
    let mut lacking = Vec::new();
    let mut known = embedded::migrations::runner().get_migrations().clone();
    known.sort();
    for migration in known {
        let name = format!("V{}__{}", migration.version(), migration.name());
        match applied.remove(&i64::from(migration.version())) {
            None => lacking.push(name),
            Some((_, checksum)) if checksum == migration.checksum().to_string() => {}
            Some((other, _)) => {
                return Err(StoreError::Version(format!(
                    "the store's migration V{}__{other} is not this program's {name}: they are of different versions",
                    migration.version()
                )));
            }
        }
    }
    if let Some((version, (name, _))) = applied.into_iter().next() {
        return Err(StoreError::Version(format!(
            "the store has the migration V{version}__{name}, which this program does not know; use a newer program"
        )));
    }
    Ok(lacking)
}

/// The migrations in the database: version, then name and checksum.
fn applied(connection: &Connection) -> Result<BTreeMap<i64, (String, String)>> {
    let any: bool = connection.query_row(
        "/* ams:version */ select exists (select 1 from sqlite_schema where name = 'refinery_schema_history')",
        [],
        |row| row.get(0),
    )?;
    if !any {
        return Ok(BTreeMap::new());
    }
    let mut statement = connection
        .prepare("/* ams:migrations */ select version, name, checksum from refinery_schema_history")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}
