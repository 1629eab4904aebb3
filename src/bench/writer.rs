//! Writes messages as programs do: by SQL, and nothing of the engine is on the way.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::{Connection, params};
use tokio_postgres::Client;

use super::failed;
use crate::app::{AppError, Result};
use crate::store::postgres::Scratch;

/// Rows in one statement while much is written.
const ROWS: usize = 20_000;

/// A connection to the store under test.
pub(super) enum Writer {
    Postgres(Client),
    Sqlite(Arc<Mutex<Connection>>),
}

/// What to write.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows<'a> {
    pub(super) count: usize,
    pub(super) endpoint: &'a str,
    pub(super) payload: usize,
}

impl Writer {
    pub(super) async fn postgres(scratch: &Scratch) -> Result<Writer> {
        let client = scratch.client().await;
        client.map(Writer::Postgres).map_err(|error| failed("the store can't be reached")(&error))
    }

    pub(super) fn sqlite(path: &Path) -> Result<Writer> {
        let open = || -> rusqlite::Result<Connection> {
            let connection = Connection::open(path)?;
            connection.busy_timeout(std::time::Duration::from_secs(30))?;
            Ok(connection)
        };
        let connection = open().map_err(|error| failed("the store can't be opened")(&error))?;
        Ok(Writer::Sqlite(Arc::new(Mutex::new(connection))))
    }

    /// Inserts these messages, in as many statements as it takes.
    pub(super) async fn insert(&self, rows: Rows<'_>) -> Result<()> {
        let mut left = rows.count;
        while left > 0 {
            let count = left.min(ROWS);
            self.insert_some(Rows { count, ..rows }).await?;
            left -= count;
        }
        Ok(())
    }

    async fn insert_some(&self, rows: Rows<'_>) -> Result<()> {
        let count = rows.count as i64;
        match self {
            Writer::Postgres(client) => {
                let statement = "insert into messages (recipient, content, endpoint) \
                                 select '+905551111111', repeat('x', $1), $2 from generate_series(1, $3::bigint)";
                let payload = i32::try_from(rows.payload).unwrap_or(i32::MAX);
                let statement = client.prepare(statement).await;
                let statement = statement.map_err(|error| failed("messages can't be inserted")(&error))?;
                let done = client.execute(&statement, &[&payload, &rows.endpoint, &count]).await;
                done.map(drop).map_err(|error| failed("messages can't be inserted")(&error))
            }
            Writer::Sqlite(_) => {
                let statement = "with recursive n(i) as (select 1 union all select i + 1 from n where i < ?3) \
                                 insert into messages (recipient, content, endpoint) \
                                 select '+905551111111', printf('%.*c', ?1, 'x'), ?2 from n";
                let (payload, endpoint) = (rows.payload as i64, rows.endpoint.to_owned());
                self.blocking(move |db| {
                    db.prepare_cached(statement)?.execute(params![payload, endpoint, count])
                })
                .await
                .map(drop)
            }
        }
    }

    /// How many deliveries are recorded as sent.
    pub(super) async fn recorded(&self) -> Result<usize> {
        let sent = self.number("select cast(coalesce(sum(sent), 0) as bigint) from stats").await?;
        Ok(usize::try_from(sent).unwrap_or(0))
    }

    /// The one number that a statement answers.
    pub(super) async fn number(&self, statement: &'static str) -> Result<i64> {
        match self {
            Writer::Postgres(client) => {
                let row = client.query_one(statement, &[]).await;
                let row = row.map_err(|error| failed("the store can't be asked")(&error))?;
                row.try_get(0).map_err(|error| failed("the store can't be asked")(&error))
            }
            Writer::Sqlite(_) => self.blocking(move |db| db.query_row(statement, [], |row| row.get(0))).await,
        }
    }

    /// Runs statements without an answer, on PostgreSQL.
    pub(super) async fn run(&self, statements: &str) -> Result<()> {
        match self {
            Writer::Postgres(client) => {
                client.batch_execute(statements).await.map_err(|error| failed("a statement failed")(&error))
            }
            Writer::Sqlite(_) => Err(AppError("this is for PostgreSQL only".to_owned())),
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let Writer::Sqlite(connection) = self else {
            return Err(AppError("this is for SQLite only".to_owned()));
        };
        let connection = Arc::clone(connection);
        let done = tokio::task::spawn_blocking(move || {
            work(&connection.lock().unwrap_or_else(PoisonError::into_inner))
        });
        done.await
            .map_err(|error| failed("the thread of the store failed")(&error))?
            .map_err(|error| failed("the store refuses a statement")(&error))
    }
}
