//! Removing what is old: whole partitions, and where these fill slowly, rows.

use deadpool_postgres::Object;

use super::read_all;
use crate::clock::Timestamp;
use crate::message::MessageId;
use crate::store::{Removal, Removed, Result, limit};

/// Removes what is old.
pub(super) async fn remove_old(db: &Object, removal: &Removal) -> Result<Removed> {
    // Only at the start of a walk, because to look whether all of a partition is old reads it.
    let drop = "/* ams:drop_old_partition */ select drop_old_partition($1)";
    if removal.from == MessageId(0) && db.query_one(drop, &[&removal.before]).await?.try_get(0)? {
        return Ok(Removed { partitions: 1, messages: 0, next: Some(MessageId(0)) });
    }
    let removed = remove_rows(db, removal).await?;
    if removed.next.is_none() {
        remove_others(db, removal.before).await?;
    }
    Ok(removed)
}

/// Removes the old ones among the next deliveries, and their messages and attempts with them. A message whose dead letter
/// has still to be published stays.
async fn remove_rows(db: &Object, removal: &Removal) -> Result<Removed> {
    let statement = db
        .prepare_cached(
            "/* ams:remove_old */ with w as materialized (select message_id, finished_at from deliveries \
                 where message_id > $1 order by message_id limit $2), \
             o as materialized (select array_agg(message_id) as ids, min(message_id) as lo, max(message_id) as hi from w \
                 where finished_at < $3 and not exists (select from dead_letters d where d.message_id = w.message_id)), \
             a as (delete from attempts where message_id = any((select ids from o)::bigint[]) \
                 and message_id between (select lo from o) and (select hi from o)), \
             d as (delete from deliveries where message_id = any((select ids from o)::bigint[]) \
                 and message_id between (select lo from o) and (select hi from o)), \
             m as (delete from messages where id = any((select ids from o)::bigint[]) \
                 and id between (select lo from o) and (select hi from o) returning 1) \
             select (select count(*) from m), (select count(*) from w), (select max(message_id) from w)",
        )
        .await?;
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
        [&removal.from.0, &limit(removal.limit), &removal.rows_before];
    let rows = db.query(&statement, &values).await?;
    let read = read_all(&rows, |row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)))?;
    let (messages, walked, last): (i64, i64, Option<i64>) = read.into_iter().next().unwrap_or_default();
    let next = last.filter(|_| walked >= limit(removal.limit)).map(MessageId);
    Ok(Removed { partitions: 0, messages: messages.unsigned_abs(), next })
}

/// Removes what belongs to no message any more.
async fn remove_others(db: &Object, before: Timestamp) -> Result<()> {
    for statement in [
        "/* ams:remove_keys */ delete from idempotency_keys where created_at < $1 \
         and not exists (select from messages where id = message_id)",
        "/* ams:remove_stats */ delete from stats where minute < $1",
        "/* ams:remove_operations */ delete from operations where finished_at < $1",
    ] {
        db.execute(&db.prepare_cached(statement).await?, &[&before]).await?;
    }
    Ok(())
}
