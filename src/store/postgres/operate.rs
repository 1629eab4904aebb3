//! Cancel, redrive and the operations that do so to many; the pause; keys.

use std::collections::{BTreeMap, HashSet};

use deadpool_postgres::{GenericClient, Object, Transaction};
use serde_json::Value;
use tokio_postgres::Row;

use super::left::{Kind, write_left};
use super::search::search;
use super::{bounds, first_column, read_all};
use crate::clock::Timestamp;
use crate::message::MessageId;
use crate::store::operate::{ApiKey, Change, Control, Cursor, Deletion, Filter, Operation, OperationId};
use crate::store::{Mask, Result, StoreError, latest_present, limit};

/// Rounds of looking and writing until a cancel gives up on messages that move all the time.
const ROUNDS: usize = 5;

/// Changes those of these messages whose status allows it, and says which.
pub(super) async fn change(
    db: &Transaction<'_>,
    change: Change,
    ids: &[MessageId],
    now: Timestamp,
) -> Result<Vec<MessageId>> {
    let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
    let changed = match change {
        Change::Cancel => cancel(db, &ids, now).await?,
        Change::Redrive => redrive(db, &ids, now).await?,
    };
    Ok(changed.into_iter().map(MessageId).collect())
}

/// Cancels what has not ended. Each place is looked at and written under its lock, batches before leases before `waiting`, as everybody does; what has
/// moved on between two looks is looked for again. No claim runs meanwhile, because it would keep the snapshot
/// that it has begun with.
async fn cancel(db: &Transaction<'_>, ids: &[i64], now: Timestamp) -> Result<Vec<i64>> {
    fence_feeds(db).await?;
    let mut cancelled = Vec::new();
    for _ in 0..ROUNDS {
        let open = open(db, ids).await?;
        if open.is_empty() {
            break;
        }
        let ids: Vec<i64> = open.iter().map(|(id, _)| *id).collect();
        let mut taken = cancel_left(db, Kind::Batches, &ids).await?;
        taken.extend(cancel_left(db, Kind::Leases, &ids).await?);
        taken.extend(cancel_waiting(db, &ids).await?);
        let pending: Vec<i64> = open.iter().filter(|(_, unclaimed)| *unclaimed).map(|(id, _)| *id).collect();
        let note = "/* ams:cancel_unclaimed */ with c as (insert into cancels (message_id, at) \
                        select id, $2 from unnest($1::bigint[]) id on conflict do nothing returning message_id) \
                    select c.message_id, coalesce(e.id, u.id, 0), 0 from c cross join lateral ( \
                            select endpoint from messages where id = c.message_id limit 1) m \
                        left join endpoints e on e.name = m.endpoint left join unknown_endpoints u on u.name = m.endpoint";
        taken.extend(read_all(
            &db.query(&db.prepare_cached(note).await?, &[&pending, &now]).await?,
            taken_row,
        )?);
        write_cancelled(db, &taken, now).await?;
        cancelled.extend(taken.iter().map(|taken| taken.0));
        if taken.len() == open.len() {
            break;
        }
    }
    Ok(cancelled)
}

/// Lets no claim that runs now come to anything: it would keep the snapshot that it has begun with.
async fn fence_feeds(db: &Transaction<'_>) -> Result<()> {
    db.execute("/* ams:fence_feeds */ update feed set seq = seq + 1", &[]).await?;
    Ok(())
}

/// A delivery that was taken out of its place: message, endpoint, and attempts made.
type TakenOut = (i64, i32, i32);

fn taken_row(row: &Row) -> Result<TakenOut> {
    Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
}

pub(super) const OPEN: &str = "/* ams:open */ select p.message_id, p.status = 'pending' and p.due_at is null from places p \
     where p.message_id = any($1) and p.message_id between $2 and $3 \
         and p.status not in ('sent', 'dead', 'cancelled', 'expired')";

/// Those of these messages that have not ended, and whether no feed has come to them yet, by one look at all places.
async fn open(db: &Transaction<'_>, ids: &[i64]) -> Result<Vec<(i64, bool)>> {
    let (first, last) = bounds(ids);
    read_all(&db.query(&db.prepare_cached(OPEN).await?, &[&ids, &first, &last]).await?, |row| {
        Ok((row.try_get(0)?, row.try_get(1)?))
    })
}

async fn cancel_waiting(db: &Transaction<'_>, ids: &[i64]) -> Result<Vec<TakenOut>> {
    let statement = "/* ams:cancel_waiting */ delete from waiting where message_id = any($1) \
                     returning message_id, endpoint_id, attempts";
    read_all(&db.query(&db.prepare_cached(statement).await?, &[&ids]).await?, taken_row)
}

/// Takes these messages out of batches or leases.
async fn cancel_left(db: &Transaction<'_>, kind: Kind, ids: &[i64]) -> Result<Vec<TakenOut>> {
    let look = match kind {
        Kind::Batches => {
            "/* ams:cancel_batches */ select id, ids, endpoints, attempts, \"left\" from batches \
             where lo <= $2 and hi >= $1 and ids && $3::bigint[] order by id for update"
        }
        Kind::Leases => {
            "/* ams:cancel_leases */ select id, ids, endpoints, attempts, \"left\" from leases \
             where lo <= $2 and hi >= $1 and ids && $3::bigint[] order by id for update"
        }
    };
    let (first, last) = bounds(ids);
    let rows = db.query(&db.prepare_cached(look).await?, &[&first, &last, &ids]).await?;
    let wanted: HashSet<i64> = ids.iter().copied().collect();
    let (mut taken, mut left) = (Vec::new(), BTreeMap::new());
    for row in &rows {
        let (ids, endpoints): (Vec<i64>, Vec<i32>) = (row.try_get(1)?, row.try_get(2)?);
        let attempts: Option<Vec<i32>> = row.try_get(3)?;
        let mut mask: Mask = row.try_get(4)?;
        for (position, (id, endpoint)) in ids.into_iter().zip(endpoints).enumerate() {
            if wanted.contains(&id) && mask.has(position) {
                mask.clear(position);
                let made = attempts.as_ref().and_then(|attempts| attempts.get(position).copied());
                taken.push((id, endpoint, made.unwrap_or(0)));
            }
        }
        left.insert(row.try_get::<_, i64>(0)?, mask);
    }
    write_left(db, kind, left.iter().map(|(id, mask)| (*id, mask))).await?;
    Ok(taken)
}

async fn write_cancelled(db: &Transaction<'_>, taken: &[TakenOut], now: Timestamp) -> Result<()> {
    let ids: Vec<i64> = taken.iter().map(|taken| taken.0).collect();
    let endpoints: Vec<i32> = taken.iter().map(|taken| taken.1).collect();
    let attempts: Vec<i32> = taken.iter().map(|taken| taken.2).collect();
    let statement = "/* ams:cancelled */ insert into deliveries \
                         (message_id, endpoint_id, status, attempts, lane, finished_at) \
                     select i, e, 'cancelled', n, '', $4 from unnest($1::bigint[], $2::int[], $3::int[]) as t (i, e, n) \
                     on conflict do nothing";
    db.execute(&db.prepare_cached(statement).await?, &[&ids, &endpoints, &attempts, &now]).await?;
    Ok(())
}

/// Each status by itself would be looked for in the index of the unsent, for each id and in every partition.
pub(super) const REDRIVE: &str = "/* ams:redrive */ with d as (delete from deliveries where message_id = any($1) \
             and message_id between $3 and $4 and status::text in ('dead', 'cancelled', 'expired') \
             returning message_id, endpoint_id, attempts), \
         dl as (delete from dead_letters x where message_id = any($1) \
             and exists (select from d where d.message_id = x.message_id and d.endpoint_id = x.endpoint_id)), \
         c as (delete from cancels where message_id = any(array(select message_id from d)) returning message_id), \
         w as (insert into waiting (message_id, endpoint_id, due_at, attempts, lane, lane_tries, priority, expires_at) \
             select d.message_id, d.endpoint_id, greatest(m.send_at, $2), d.attempts, '', 0, m.priority, \
                 case when m.expires_at > $2 then m.expires_at end \
             from d cross join lateral (select priority, send_at, expires_at from messages where id = d.message_id limit 1) m \
             where d.message_id not in (select message_id from c)) \
         select message_id from d";

/// Gives back what ended without being sent. Lanes and waits begin anew; attempts stay counted, and an expiry that has
/// passed counts no more, because it would end the delivery again. One that was cancelled before its time still waits
/// for it.
async fn redrive(db: &Transaction<'_>, ids: &[i64], now: Timestamp) -> Result<Vec<i64>> {
    fence_feeds(db).await?;
    let (first, last) = bounds(ids);
    first_column(&db.query(&db.prepare_cached(REDRIVE).await?, &[&ids, &now, &first, &last]).await?)
}

/// Notes an operation that begins with the newest message.
pub(super) async fn open_operation(
    db: &Object,
    change: Change,
    filter: &Filter,
    now: Timestamp,
) -> Result<Operation> {
    let statement = "/* ams:open_operation */ insert into operations (kind, filter, up_to, created_at, updated_at) \
         select $1, $2, coalesce(max(id), 0), $3, $3 from (select id from messages order by id desc limit 1) m \
         returning id, kind, filter, matched, changed, created_at, updated_at, finished_at";
    let filter = serde_json::to_value(filter).map_err(|error| StoreError::Internal(error.to_string()))?;
    operation_of(&db.query_one(statement, &[&change.as_str(), &filter, &now]).await?)
}

/// An operation.
pub(super) async fn operation(db: &impl GenericClient, id: OperationId) -> Result<Option<Operation>> {
    let statement = "/* ams:operation */ select id, kind, filter, matched, changed, created_at, updated_at, finished_at \
                     from operations where id = $1";
    db.query_opt(statement, &[&id.0]).await?.as_ref().map(operation_of).transpose()
}

/// Operations at which nobody has worked since `before`.
pub(super) async fn idle_operations(db: &Object, before: Timestamp) -> Result<Vec<OperationId>> {
    let statement = db
        .prepare_cached(
            "/* ams:idle_operations */ select id from operations \
             where finished_at is null and (updated_at < $1 or updated_at > $2) order by id",
        )
        .await?;
    let rows = db.query(&statement, &[&before, &latest_present(before)]).await?;
    read_all(&rows, |row| Ok(OperationId(row.try_get(0)?)))
}

/// Works off a piece of an operation: its rows and how far it has come are one transaction.
pub(super) async fn work_operation(
    db: &mut Object,
    id: OperationId,
    count: usize,
    now: Timestamp,
) -> Result<Option<Operation>> {
    let transaction = db.transaction().await?;
    let take = "/* ams:take_operation */ select id, kind, filter, matched, changed, created_at, updated_at, finished_at, \
                    up_to, cursor_at, cursor_id \
                from operations where id = $1 and finished_at is null for update skip locked";
    let Some(row) = transaction.query_opt(take, &[&id.0]).await? else {
        return operation(&transaction, id).await;
    };
    let mut operation = operation_of(&row)?;
    let up_to: i64 = row.try_get(8)?;
    let cursor = match (row.try_get(9)?, row.try_get(10)?) {
        (Some(at), Some(id)) => Some(Cursor { at, id: MessageId(id) }),
        _ => None,
    };
    let from = cursor.unwrap_or_else(|| Cursor::start(&operation.filter));
    let found = search(&transaction, &operation.filter, from, count).await?;
    let ids: Vec<_> = found.ids.into_iter().filter(|id| id.0 <= up_to).collect();
    let changed = change(&transaction, operation.change, &ids, now).await?;
    operation.matched += ids.len() as u64;
    operation.changed += changed.len() as u64;
    operation.updated_at = now;
    operation.finished_at = found.next.is_none().then_some(now);
    let note = "/* ams:note_operation */ update operations set cursor_at = $2, cursor_id = $3, matched = matched + $4, \
                    changed = changed + $5, updated_at = $6, finished_at = $7 where id = $1";
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 7] = [
        &id.0,
        &found.next.map(|next| next.at),
        &found.next.map(|next| next.id.0),
        &limit(ids.len()),
        &limit(changed.len()),
        &now,
        &operation.finished_at,
    ];
    transaction.execute(note, &values).await?;
    transaction.commit().await?;
    Ok(Some(operation))
}

fn operation_of(row: &Row) -> Result<Operation> {
    let kind: &str = row.try_get(1)?;
    let unknown = || StoreError::Internal(format!("`{kind}` is not a word of ours"));
    Ok(Operation {
        id: OperationId(row.try_get(0)?),
        change: Change::parse(kind).ok_or_else(unknown)?,
        filter: serde_json::from_value(row.try_get::<_, Value>(2)?)
            .map_err(|error| StoreError::Internal(format!("an operation's filter can't be read: {error}")))?,
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
        pacing: pace.map(|(count, ms)| crate::rate::Rate::of(count.into(), ms)),
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
