//! Which migrations the database has, and applying those that it lacks.

use super::{PostgresOptions, read_all, tls};
use crate::store::schema_version::{self, Migrations, SchemaVersion};
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
    let missing = schema_version(&client).await?.missing;
    if !missing.is_empty() {
        embedded::migrations::runner()
            .run_async(&mut client)
            .await
            .map_err(|error| StoreError::Internal(format!("the migrations failed: {error}")))?;
    }
    while make_partition(&client).await? {}
    Ok(missing)
}

/// Makes one partition ahead of the ids in use. Whether there may be more to make.
pub(super) async fn make_partition(client: &tokio_postgres::Client) -> Result<bool> {
    let made = client.query_one("/* ams:make_partitions */ select make_partitions()", &[]).await?;
    Ok(made.try_get(0)?)
}

/// How the database stands to this program.
pub(super) async fn schema_version(client: &tokio_postgres::Client) -> Result<SchemaVersion> {
    check_encoding(client).await?;
    let known = embedded::migrations::runner()
        .get_migrations()
        .iter()
        .map(|known| (known.version(), (known.name().to_owned(), known.checksum().to_string())))
        .collect();
    schema_version::compare(&known, applied(client).await?, needs(client).await?)
}

/// Only in a database of this encoding the server makes sure that each text can be read.
async fn check_encoding(client: &tokio_postgres::Client) -> Result<()> {
    let row = client.query_one("/* ams:encoding */ select current_setting('server_encoding')", &[]).await?;
    match row.try_get(0)? {
        "UTF8" => Ok(()),
        other => Err(StoreError::Unsupported(format!(
            "the database has the encoding {other}, in which a text need not be readable; create one with \
             `createdb -E UTF8 -T template0 NAME`, and set DB_NAME or DATABASE_URL to it"
        ))),
    }
}

/// The migrations in the database.
async fn applied(client: &tokio_postgres::Client) -> Result<Migrations> {
    let any = client
        .query_one("/* ams:version */ select to_regclass('refinery_schema_history') is not null", &[])
        .await?;
    if !any.try_get::<_, bool>(0)? {
        return Ok(Migrations::new());
    }
    let statement = "/* ams:migrations */ select version, name, checksum from refinery_schema_history";
    let rows = client.query(statement, &[]).await?;
    let applied = read_all(&rows, |row| Ok((row.try_get(0)?, (row.try_get(1)?, row.try_get(2)?))))?;
    Ok(applied.into_iter().collect())
}

/// The migration that a program has to know; `None` when the database is not migrated.
async fn needs(client: &tokio_postgres::Client) -> Result<Option<i32>> {
    let says = "/* ams:says_needs */ select exists (select 1 from pg_attribute \
                where attrelid = to_regclass('installation') and attname = 'needs_migration')";
    if !client.query_one(says, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(None);
    }
    let row = client.query_opt("/* ams:needs */ select max(needs_migration) from installation", &[]).await?;
    match row {
        Some(row) => Ok(row.try_get(0)?),
        None => Ok(None),
    }
}
