//! Cancel, redrive and the jobs that do so to many; the pause; keys.

use deadpool_postgres::{GenericClient, Object};
use serde_json::Value;
use tokio_postgres::Row;

use super::search::search;
use super::{bounds, limit, read_all};
use crate::clock::Timestamp;
use crate::message::MessageId;
use crate::store::operate::{ApiKey, Change, Control, Cursor, Deletion, Filter, Job, JobId};
use crate::store::{Result, StoreError, latest_present};

const CANCEL: &str = "/* ams:cancel */ update messages set status = 'cancelled', held = null, due_at = null, \
         finished_at = $4 \
     where id = any($1) and id between $2 and $3 and status in ('pending', 'queued', 'processing', 'retrying') \
     returning id";

/// Its lanes and waits begin anew; its tries stay counted. An expiry that has passed would end it again.
const REDRIVE: &str = "/* ams:redrive */ update messages set status = 'pending', lane = '', lane_tries = 0, \
         held = null, due_at = null, finished_at = null, reason = null, \
         expires_at = case when expires_at > $4 then expires_at end \
     where id = any($1) and id between $2 and $3 and status in ('dead', 'cancelled', 'expired') returning id";

/// Changes those of these messages whose status allows it, and says which.
pub(super) async fn change(
    db: &impl GenericClient,
    change: Change,
    ids: &[MessageId],
    now: Timestamp,
) -> Result<Vec<MessageId>> {
    let statement = match change {
        Change::Cancel => CANCEL,
        Change::Redrive => REDRIVE,
    };
    let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
    let (first, last) = bounds(&ids);
    let statement = db.prepare_cached(statement).await?;
    let rows = db.query(&statement, &[&ids, &first, &last, &now]).await?;
    read_all(&rows, |row| Ok(MessageId(row.try_get(0)?)))
}

/// Notes a job that begins with the newest message.
pub(super) async fn open_job(db: &Object, change: Change, filter: &Filter, now: Timestamp) -> Result<Job> {
    let statement = "/* ams:open_job */ insert into jobs (kind, filter, up_to, created_at, updated_at) \
         select $1, $2, coalesce(max(id), 0), $3, $3 from (select id from messages order by id desc limit 1) m \
         returning id, kind, filter, matched, changed, created_at, updated_at, finished_at";
    let filter = serde_json::to_value(filter).map_err(|error| StoreError::Internal(error.to_string()))?;
    job_of(&db.query_one(statement, &[&change.as_str(), &filter, &now]).await?)
}

/// A job.
pub(super) async fn job(db: &impl GenericClient, id: JobId) -> Result<Option<Job>> {
    let statement = "/* ams:job */ select id, kind, filter, matched, changed, created_at, updated_at, finished_at \
                     from jobs where id = $1";
    db.query_opt(statement, &[&id.0]).await?.as_ref().map(job_of).transpose()
}

/// Jobs at which nobody has worked since `before`.
pub(super) async fn idle_jobs(db: &Object, before: Timestamp) -> Result<Vec<JobId>> {
    let statement = db
        .prepare_cached(
            "/* ams:idle_jobs */ select id from jobs \
             where finished_at is null and (updated_at < $1 or updated_at > $2) order by id",
        )
        .await?;
    let rows = db.query(&statement, &[&before, &latest_present(before)]).await?;
    read_all(&rows, |row| Ok(JobId(row.try_get(0)?)))
}

/// Works off a piece of a job: its rows and how far it has come are one transaction.
pub(super) async fn work_job(
    db: &mut Object,
    id: JobId,
    count: usize,
    now: Timestamp,
) -> Result<Option<Job>> {
    let transaction = db.transaction().await?;
    let take = "/* ams:take_job */ select id, kind, filter, matched, changed, created_at, updated_at, finished_at, \
                    up_to, cursor_at, cursor_id \
                from jobs where id = $1 and finished_at is null for update skip locked";
    let Some(row) = transaction.query_opt(take, &[&id.0]).await? else {
        return job(&transaction, id).await;
    };
    let mut job = job_of(&row)?;
    let up_to: i64 = row.try_get(8)?;
    let cursor = match (row.try_get(9)?, row.try_get(10)?) {
        (Some(at), Some(id)) => Some(Cursor { at, id: MessageId(id) }),
        _ => None,
    };
    let from = cursor.unwrap_or_else(|| Cursor::start(&job.filter));
    let found = search(&transaction, &job.filter, from, count).await?;
    let ids: Vec<_> = found.ids.into_iter().filter(|id| id.0 <= up_to).collect();
    let changed = change(&transaction, job.change, &ids, now).await?;
    job.matched += ids.len() as u64;
    job.changed += changed.len() as u64;
    job.updated_at = now;
    job.finished_at = found.next.is_none().then_some(now);
    let note = "/* ams:note_job */ update jobs set cursor_at = $2, cursor_id = $3, matched = matched + $4, \
                    changed = changed + $5, updated_at = $6, finished_at = $7 where id = $1";
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 7] = [
        &id.0,
        &found.next.map(|next| next.at),
        &found.next.map(|next| next.id.0),
        &limit(ids.len()),
        &limit(changed.len()),
        &now,
        &job.finished_at,
    ];
    transaction.execute(note, &values).await?;
    transaction.commit().await?;
    Ok(Some(job))
}

fn job_of(row: &Row) -> Result<Job> {
    let kind: &str = row.try_get(1)?;
    let unknown = || StoreError::Internal(format!("`{kind}` is not a word of ours"));
    Ok(Job {
        id: JobId(row.try_get(0)?),
        change: Change::parse(kind).ok_or_else(unknown)?,
        filter: serde_json::from_value(row.try_get::<_, Value>(2)?)
            .map_err(|error| StoreError::Internal(format!("a job's filter can't be read: {error}")))?,
        matched: row.try_get::<_, i64>(3)?.unsigned_abs(),
        changed: row.try_get::<_, i64>(4)?.unsigned_abs(),
        created_at: row.try_get(5)?,
        updated_at: row.try_get(6)?,
        finished_at: row.try_get(7)?,
    })
}

/// Pauses all producers, or lets them go on.
pub(super) async fn set_paused(db: &Object, paused: bool) -> Result<()> {
    db.execute("/* ams:set_paused */ update leader set paused = $1", &[&paused]).await?;
    Ok(())
}

/// What the producers are told, and what the active one says.
pub(super) async fn control(db: &Object, now: Timestamp) -> Result<Control> {
    let statement = db
        .prepare_cached(
            "/* ams:control */ select paused, owner is not null and until > $1 and until <= $2, pace_count, pace_interval_ms, \
                 paced_until \
             from leader",
        )
        .await?;
    let row = db.query_one(&statement, &[&now, &latest_present(now)]).await?;
    let pace = row.try_get::<_, Option<i32>>(2)?.zip(row.try_get::<_, Option<i64>>(3)?);
    Ok(Control {
        paused: row.try_get(0)?,
        active: row.try_get(1)?,
        pacing: pace.map(|(count, ms)| crate::store::Pacing::of(count.into(), ms)),
        paced_until: row.try_get(4)?,
    })
}

/// Deletes an endpoint that no message names.
pub(super) async fn delete_endpoint(db: &mut Object, name: &str) -> Result<Deletion> {
    let transaction = db.transaction().await?;
    let used = "/* ams:endpoint_used */ select exists (select 1 from messages where endpoint = $1)";
    if transaction.query_one(used, &[&name]).await?.try_get(0)? {
        return Ok(Deletion::Used);
    }
    let delete = "/* ams:delete_endpoint */ delete from endpoints where name = $1";
    let deleted = transaction.execute(delete, &[&name]).await?;
    transaction.commit().await?;
    Ok(if deleted == 0 { Deletion::Missing } else { Deletion::Deleted })
}

/// Stores a new key.
pub(super) async fn put_key(db: &Object, key: &ApiKey) -> Result<()> {
    let statement = "/* ams:put_key */ insert into api_keys (id, name, hash, scopes, created_at, expires_at) \
                     values ($1, $2, $3, $4, $5, $6)";
    let (created_at, expires_at) = (key.created_at, key.expires_at);
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
        [&key.id, &key.name, &key.hash, &key.scopes, &created_at, &expires_at];
    db.execute(statement, &values).await?;
    Ok(())
}

/// All keys, oldest first.
pub(super) async fn keys(db: &Object) -> Result<Vec<ApiKey>> {
    let statement = db
        .prepare_cached(
            "/* ams:keys */ select id, name, hash, scopes, created_at, expires_at, last_used_at, revoked_at \
             from api_keys order by created_at, id",
        )
        .await?;
    let rows = db.query(&statement, &[]).await?;
    read_all(&rows, |row| {
        Ok(ApiKey {
            id: row.try_get(0)?,
            name: row.try_get(1)?,
            hash: row.try_get(2)?,
            scopes: row.try_get(3)?,
            created_at: row.try_get(4)?,
            expires_at: row.try_get(5)?,
            last_used_at: row.try_get(6)?,
            revoked_at: row.try_get(7)?,
        })
    })
}

/// Revokes a key; `false`: there is none, or it is revoked already.
pub(super) async fn revoke_key(db: &Object, id: &str, now: Timestamp) -> Result<bool> {
    let statement =
        "/* ams:revoke_key */ update api_keys set revoked_at = $2 where id = $1 and revoked_at is null";
    Ok(db.execute(statement, &[&id, &now]).await? > 0)
}

/// Notes when keys were last used.
pub(super) async fn keys_used(db: &Object, ids: &[String], now: Timestamp) -> Result<()> {
    let statement = "/* ams:keys_used */ update api_keys set last_used_at = $2 where id = any($1)";
    db.execute(statement, &[&ids, &now]).await?;
    Ok(())
}
