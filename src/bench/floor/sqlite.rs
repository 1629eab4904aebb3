//! The same minimal statements on a file of SQLite's, as durable as the embedded store: take, begin, store.

use std::path::Path;

use rusqlite::{Connection, params};

use super::{ANSWER, GROUP, Job, Meter, PROVIDER_ID, RECIPIENT};
use crate::app::{AppError, Result};
use crate::bench::failed;

const TABLES: &str = "\
    pragma journal_mode = wal; pragma synchronous = full; \
    create table floor_messages (id integer primary key, recipient text not null, content text not null); \
    create table floor_groups (number integer primary key, lo integer not null, hi integer not null, begun integer); \
    create table floor_results (id integer primary key, finished_at integer, provider_id text, answer text)";

/// Measures the stages of the store, on a thread of its own.
pub(super) async fn measure(Job { testbed, content, count }: Job<'_>, meter: &mut Meter<'_>) -> Result<()> {
    let folder = testbed.folder().join("floor");
    let stays = |error| failed("the floor's folder can't be made or removed")(&error);
    std::fs::create_dir(&folder).map_err(stays)?;
    let (path, content) = (folder.join("floor.db"), content.to_owned());
    let filled = tokio::task::spawn_blocking({
        let path = path.clone();
        move || fill(&path, &content, count)
    });
    let gone = |error| failed("the thread of the floor's store failed")(&error);
    let wrong = |error| failed("a statement of the floor failed")(&error);
    let db = filled.await.map_err(&gone)?.map_err(wrong)?;
    let before = meter.start();
    let walked = tokio::task::spawn_blocking(move || walk(&db, count));
    let taken = walked.await.map_err(gone)?.map_err(wrong)?;
    meter.stop("store", &before);
    if taken != count {
        return Err(AppError(format!("the floor's store gave {taken} of {count} messages")));
    }
    std::fs::remove_dir_all(&folder).map_err(stays)
}

fn fill(path: &Path, content: &str, count: usize) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.execute_batch(TABLES)?;
    let fill = "with recursive n(i) as (select 0 union all select i + 1 from n where i + 1 < ?1) \
                insert into floor_messages select i, ?2, ?3 from n";
    db.execute(fill, params![count as i64, RECIPIENT, content])?;
    Ok(db)
}

/// Takes, begins and stores group by group; how many messages were taken.
fn walk(db: &Connection, count: usize) -> rusqlite::Result<usize> {
    let mut taken = 0;
    for first in (0..count).step_by(GROUP).map(|first| first as i64) {
        let ids = claim(db, first)?;
        taken += ids.len();
        db.execute_batch("begin immediate")?;
        db.prepare_cached("update floor_groups set begun = 1 where number = ?1")?.execute([first])?;
        db.execute_batch("commit; begin immediate")?;
        let mut result = db.prepare_cached("insert into floor_results values (?1, ?2, ?3, ?4)")?;
        for id in ids {
            result.execute(params![id, first, PROVIDER_ID, ANSWER])?;
        }
        db.prepare_cached("delete from floor_groups where number = ?1")?.execute([first])?;
        db.execute_batch("commit")?;
    }
    Ok(taken)
}

fn claim(db: &Connection, first: i64) -> rusqlite::Result<Vec<i64>> {
    let mut read = db.prepare_cached(
        "select id, recipient, content from floor_messages where id >= ?1 order by id limit ?2",
    )?;
    let mut rows = read.query(params![first, GROUP as i64])?;
    let mut ids = Vec::with_capacity(GROUP);
    while let Some(row) = rows.next()? {
        // The texts are read where they stand; a program has to look at them at least.
        let (id, _, content): (i64, &str, &str) =
            (row.get(0)?, row.get_ref(1)?.as_str()?, row.get_ref(2)?.as_str()?);
        if !content.is_empty() {
            ids.push(id);
        }
    }
    let last = ids.last().copied().unwrap_or(first);
    db.prepare_cached("insert into floor_groups values (?1, ?1, ?2, 0)")?.execute(params![first, last])?;
    Ok(ids)
}
