//! Which migrations the database has, and applying those that it lacks.

use rusqlite::Connection;

use crate::store::schema_version::{self, Migrations, SchemaVersion};
use crate::store::{Result, StoreError};

mod embedded {
    refinery::embed_migrations!("migrations/sqlite");
}

/// Applies what is missing and returns the names.
pub(super) fn migrate(connection: &mut Connection) -> Result<Vec<String>> {
    let lacking = schema_version(connection)?.missing;
    if lacking.is_empty() {
        return Ok(lacking);
    }
    if let Err(error) = embedded::migrations::runner().run(connection) {
        // Another process may have been faster; then all is well.
        if !schema_version(connection)?.missing.is_empty() {
            return Err(StoreError::Unavailable(format!("the migrations failed: {error}")));
        }
        return Ok(Vec::new());
    }
    Ok(lacking)
}

/// How the database stands to this program.
pub(super) fn schema_version(connection: &Connection) -> Result<SchemaVersion> {
    let known = embedded::migrations::runner()
        .get_migrations()
        .iter()
        .map(|known| (known.version(), (known.name().to_owned(), known.checksum().to_string())))
        .collect();
    schema_version::compare(&known, applied(connection)?, needs(connection)?)
}

/// The migrations in the database.
fn applied(connection: &Connection) -> Result<Migrations> {
    let any: bool = connection.query_row(
        "/* ams:version */ select exists (select 1 from sqlite_schema where name = 'refinery_schema_history')",
        [],
        |row| row.get(0),
    )?;
    if !any {
        return Ok(Migrations::new());
    }
    let mut statement = connection
        .prepare("/* ams:migrations */ select version, name, checksum from refinery_schema_history")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// The migration that a program has to know; `None` when the database is of a time before it said so.
fn needs(connection: &Connection) -> Result<Option<i32>> {
    let says: bool = connection.query_row(
        "/* ams:says_needs */ select exists (select 1 from pragma_table_info('installation') \
         where name = 'needs_migration')",
        [],
        |row| row.get(0),
    )?;
    if !says {
        return Ok(None);
    }
    let statement = "/* ams:needs */ select max(needs_migration) from installation";
    Ok(connection.query_row(statement, [], |row| row.get(0))?)
}
