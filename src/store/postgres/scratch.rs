//! A database of its own for a benchmark, on the server that is configured; thrown away afterwards.

use tokio_postgres::Client;

use super::{PostgresOptions, tls};
use crate::store::{Result, StoreError};

/// A scratch database.
pub struct Scratch {
    server: PostgresOptions,
    url: String,
    name: String,
}

impl Scratch {
    /// Makes the database `name` on the server of `url`.
    ///
    /// # Errors
    /// When the server can't be reached or the user may not make databases.
    pub async fn create(url: &str, name: &str) -> Result<Scratch> {
        let server = PostgresOptions::parse(url)?;
        let mut own =
            url::Url::parse(url).map_err(|error| StoreError::Refused(format!("DATABASE_URL: {error}")))?;
        own.set_path(name);
        let scratch = Scratch { server, url: own.into(), name: name.to_owned() };
        let client = connect(&scratch.server).await?;
        client.batch_execute(&format!("create database \"{name}\"")).await?;
        Ok(scratch)
    }

    /// The URL of the scratch database.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A connection to it.
    ///
    /// # Errors
    /// When the server can't be reached.
    pub async fn client(&self) -> Result<Client> {
        connect(&PostgresOptions::parse(&self.url)?).await
    }

    /// Statements run in this database so far; `None` where the server does not count.
    ///
    /// # Errors
    /// When the server can't be reached.
    pub async fn statements(&self) -> Result<Option<u64>> {
        let client = self.client().await?;
        // Without the preloaded library the extension is there and counts nothing.
        let _ = client.batch_execute("create extension if not exists pg_stat_statements").await;
        let statement = "select coalesce(sum(calls), 0)::bigint from pg_stat_statements s \
                         join pg_database d on d.oid = s.dbid where d.datname = current_database()";
        let counted = client.query_one(statement, &[]).await.ok();
        let Some(row) = counted else { return Ok(None) };
        Ok(Some(row.try_get::<_, i64>(0)?.unsigned_abs()))
    }

    /// Removes all databases on the server of `url` whose names begin with `prefix`.
    ///
    /// # Errors
    /// When the server can't be reached.
    pub async fn remove_all(url: &str, prefix: &str) -> Result<()> {
        let client = connect(&PostgresOptions::parse(url)?).await?;
        let found = "select datname::text from pg_database where starts_with(datname::text, $1)";
        for row in client.query(found, &[&prefix]).await? {
            drop_database(&client, row.try_get(0)?).await?;
        }
        Ok(())
    }

    /// Removes the database, whoever is still connected.
    ///
    /// # Errors
    /// When the server can't be reached.
    pub async fn remove(self) -> Result<()> {
        drop_database(&connect(&self.server).await?, &self.name).await
    }
}

async fn drop_database(client: &Client, name: &str) -> Result<()> {
    // It waits for a checkpoint, and that for a disk that the benchmark has kept busy.
    client.batch_execute("set statement_timeout = 0").await?;
    client.batch_execute(&format!("drop database \"{name}\" with (force)")).await?;
    Ok(())
}

async fn connect(options: &PostgresOptions) -> Result<Client> {
    let (client, connection) = options.config.connect(tls::connector(options.verify)).await?;
    tokio::spawn(connection);
    Ok(client)
}
