//! The reconciliation, and feeds that come from another server.

use deadpool_postgres::{Object, Transaction};

use crate::clock::Timestamp;
use crate::message::MessageId;
use crate::store::{Reconciled, Reconciliation, Result, limit};

/// Whether what the feeds remember means nothing here: the database was restored into another cluster, whose
/// transactions have other numbers, or its numbers are lower than those that the feeds have seen.
const FOREIGN: &str = "/* ams:foreign_feeds */ select exists (select from reconciliation \
         where server <> (select system_identifier from pg_control_system())) \
     or exists (select from feed where pg_snapshot_xmax(done) > pg_snapshot_xmax(pg_current_snapshot()) \
         or pg_snapshot_xmax(upto) > pg_snapshot_xmax(pg_current_snapshot()))";

/// Makes the feeds anew when they are another server's. Messages that are there now have got their places, or get them by
/// the reconciliation; the feeds take later ones only. Nobody inserts meanwhile, so that none is both.
pub(super) async fn check_feeds(db: &mut Object, now: Timestamp) -> Result<bool> {
    if !db.query_one(FOREIGN, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(false);
    }
    let transaction = db.transaction().await?;
    transaction.batch_execute("set local lock_timeout = '5s'; lock table messages in share mode").await?;
    if !transaction.query_one(FOREIGN, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(false);
    }
    let make = "/* ams:make_feeds */ update feed set seq = seq + 1, done = pg_current_snapshot(), \
                    upto = pg_current_snapshot(), at_tx = null, at_id = null, \
                    base_id = (select coalesce(max(id), 0) from messages)";
    transaction.execute(make, &[]).await?;
    let note = "/* ams:note_feeds */ update reconciliation set at_id = 0, urgent = true, feeds_made_at = $1, \
                    server = (select system_identifier from pg_control_system())";
    transaction.execute(note, &[&now]).await?;
    transaction.commit().await?;
    Ok(true)
}

/// Looks at the next messages.
pub(super) async fn reconcile(db: &mut Object, now: Timestamp, count: usize) -> Result<Reconciled> {
    let transaction = db.transaction().await?;
    let take = "/* ams:take_reconciliation */ select at_id, urgent from reconciliation where id = 1 for update skip locked";
    let Some(row) = transaction.query_opt(&transaction.prepare_cached(take).await?, &[]).await? else {
        return Ok(Reconciled::default());
    };
    let (from, urgent): (i64, bool) = (row.try_get(0)?, row.try_get(1)?);
    let walk = "/* ams:reconcile_walk */ select count(*), coalesce(max(id), 0) from ( \
                    select id from messages where id > $1 order by id limit $2) w";
    let row =
        transaction.query_one(&transaction.prepare_cached(walk).await?, &[&from, &limit(count)]).await?;
    let (checked, to): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let repaired = if checked > 0 { repair(&transaction, from, to, now).await? } else { 0 };
    let finished = checked < limit(count);
    let note = "/* ams:note_reconciliation */ update reconciliation set at_id = $1, urgent = urgent and not $2, \
                    checked = checked + $3, repaired = repaired + $4, \
                    finished_at = case when $2 then $5 else finished_at end where id = 1";
    let at = if finished { 0 } else { to };
    let (checked_i64, repaired_i64) = (checked, i64::try_from(repaired).unwrap_or(i64::MAX));
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
        [&at, &finished, &checked_i64, &repaired_i64, &now];
    transaction.execute(&transaction.prepare_cached(note).await?, &values).await?;
    transaction.commit().await?;
    Ok(Reconciled { checked: checked.unsigned_abs(), repaired, finished, urgent: urgent && !finished })
}

/// Messages of a range that a feed has passed and that have no place come to wait. One statement, hence one moment: what
/// moves from place to place is seen in one of them.
async fn repair(db: &Transaction<'_>, from: i64, to: i64, now: Timestamp) -> Result<u64> {
    let statement = "/* ams:reconcile */ with f as materialized ( \
             select distinct on (class) class, done, base_id from feed order by class, seq desc), \
         p as materialized (select m.id, m.endpoint, m.priority, m.send_at, m.expires_at, m.tx from messages m \
             where m.id > $1 and m.id <= $2 \
                 and (select true from deliveries d where d.message_id = m.id limit 1) is null \
                 and (select true from waiting w where w.message_id = m.id limit 1) is null), \
         s as materialized (select p.* from p join f on f.class = case when p.priority > 0 then 0 when p.priority = 0 then 1 else 2 end \
             where (p.id <= f.base_id or pg_visible_in_snapshot(p.tx, f.done)) \
                 and (select true from batches b where p.id between b.lo and b.hi and p.id = any(b.ids) \
                     and get_bit(b.\"left\", array_position(b.ids, p.id) - 1) = 1 limit 1) is null \
                 and (select true from leases l where p.id between l.lo and l.hi and p.id = any(l.ids) \
                     and get_bit(l.\"left\", array_position(l.ids, p.id) - 1) = 1 limit 1) is null \
                 and (select true from cancels c where c.message_id = p.id limit 1) is null), \
         named as (insert into unknown_endpoints (name) select distinct s.endpoint from s \
             where not exists (select from endpoints e where e.name = s.endpoint) \
                 and not exists (select from unknown_endpoints u where u.name = s.endpoint) \
             on conflict do nothing returning name, id) \
         insert into waiting (message_id, endpoint_id, due_at, attempts, lane, lane_tries, priority, expires_at) \
         select s.id, coalesce(e.id, u.id, n.id), greatest(s.send_at, $3), 0, '', 0, s.priority, s.expires_at \
         from s left join endpoints e on e.name = s.endpoint left join unknown_endpoints u on u.name = s.endpoint \
             left join named n on n.name = s.endpoint \
         on conflict do nothing";
    Ok(db.execute(&db.prepare_cached(statement).await?, &[&from, &to, &now]).await?)
}

/// How the reconciliation stands.
pub(super) async fn reconciliation(db: &Object) -> Result<Reconciliation> {
    let statement = "/* ams:reconciliation */ select at_id, checked, repaired, finished_at, feeds_made_at from reconciliation";
    let row = db.query_one(&db.prepare_cached(statement).await?, &[]).await?;
    Ok(Reconciliation {
        at: MessageId(row.try_get(0)?),
        checked: row.try_get::<_, i64>(1)?.unsigned_abs(),
        repaired: row.try_get::<_, i64>(2)?.unsigned_abs(),
        finished_at: row.try_get(3)?,
        feeds_made_at: row.try_get(4)?,
    })
}
