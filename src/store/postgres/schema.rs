//! Which migrations the database has, and applying those that it lacks.

use std::collections::BTreeMap;

use deadpool_postgres::Object;

use super::{PostgresOptions, tls};
use crate::store::{Result, StoreError};

mod embedded {
    refinery::embed_migrations!("migrations/postgres");
}

/// Applies what is missing and returns the names. One process at a time does so; the others wait.
pub(super) async fn migrate(options: &PostgresOptions) -> Result<Vec<String>> {
    let (mut client, connection) = options.config.connect(tls::connector(options.verify)).await?;
    tokio::spawn(connection);
    // A migration may take its time, and the lock with it.
    client
        .batch_execute("set statement_timeout = 0; select pg_advisory_lock(hashtext('ams migrate'))")
        .await?;
    let missing = missing_in(&client).await?;
    if !missing.is_empty() {
        embedded::migrations::runner()
            .run_async(&mut client)
            .await
            .map_err(|error| StoreError::Internal(format!("the migrations failed: {error}")))?;
    }
    client.batch_execute("select make_partitions()").await?;
    Ok(missing)
}

/// The names of what is missing.
pub(super) async fn missing(db: &Object) -> Result<Vec<String>> {
    missing_in(db).await
}

async fn missing_in(client: &tokio_postgres::Client) -> Result<Vec<String>> {
    let mut applied = applied(client).await?;
    let mut known = embedded::migrations::runner().get_migrations().clone();
    known.sort();
    let mut missing = Vec::new();
    for migration in known {
        let name = format!("V{}__{}", migration.version(), migration.name());
        match applied.remove(&migration.version()) {
            None => missing.push(name),
            Some((_, checksum)) if checksum == migration.checksum().to_string() => {}
            Some((other, _)) => {
                return Err(StoreError::Version(format!(
                    "the store's migration V{}__{other} is not this program's {name}: they are of different versions",
                    migration.version()
                )));
            }
        }
    }
    match applied.into_iter().next() {
        None => Ok(missing),
        Some((version, (name, _))) => Err(StoreError::Version(format!(
            "the store has the migration V{version}__{name}, which this program does not know; use a newer program"
        ))),
    }
}

/// The migrations in the database: version, then name and checksum.
async fn applied(client: &tokio_postgres::Client) -> Result<BTreeMap<i32, (String, String)>> {
    let any = client
        .query_one("/* ams:version */ select to_regclass('refinery_schema_history') is not null", &[])
        .await?;
    if !any.get::<_, bool>(0) {
        return Ok(BTreeMap::new());
    }
    let statement = "/* ams:migrations */ select version, name, checksum from refinery_schema_history";
    let rows = client.query(statement, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect())
}
