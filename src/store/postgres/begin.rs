//! Begin, the leases it writes, and the recovery of what stands in them.

use deadpool_postgres::Object;
use futures_util::future::try_join_all;
use tokio_postgres::Row;

use super::claim::give_back;
use super::{bounds, by_epoch, read_all};
use crate::clock::Timestamp;
use crate::message::{Epoch, MessageId};
use crate::store::{Begin, Begun, BegunMessage, InstanceId, Recovered, Recovery, Result};

pub(super) const BEGIN: &str = "/* ams:begin */ with u as (update messages set \
                 status = case when expires_at <= $5 then 'expired'::message_state else 'processing' end, \
                 due_at = case when expires_at <= $5 then null else due_at end, \
                 finished_at = case when expires_at <= $5 then $5 end \
                 where id = any($1) and epoch = $2 and status = 'queued' and id between $3 and $4 \
                 returning id, epoch, attempts, lane_tries, status = 'processing' as begun), \
             l as (insert into leases (id, epoch, owner, ids) \
                 select $6, $2, $7, array_agg(id) from u where begun having count(*) > 0) \
             select id, epoch, attempts, lane_tries from u where begun";

/// Begins what is `queued` in its ticket's epoch. Each epoch is one statement that writes its lease
/// with it; they go out together and need no transaction around them, because each stands for itself.
pub(super) async fn begin(db: &Object, begin: &Begin<'_>) -> Result<Begun> {
    let mut messages = if begin.repeated { begun_before(db, begin).await? } else { Vec::new() };
    let statement = db.prepare_cached(BEGIN).await?;
    let groups = by_epoch(begin.tickets.iter().map(|(id, epoch)| (id.0, *epoch)));
    let now = begin.now;
    let calls = groups.iter().map(|(epoch, ids)| {
        let (statement, now) = (&statement, &now);
        async move {
            let (first, last) = bounds(ids);
            db.query(statement, &[ids, epoch, &first, &last, now, &begin.lease.0, &begin.owner.0]).await
        }
    });
    for row in try_join_all(calls).await?.iter().flatten() {
        messages.push(begun(row)?);
    }
    Ok(Begun { messages })
}

fn begun(row: &Row) -> Result<BegunMessage> {
    Ok(BegunMessage {
        id: MessageId(row.try_get(0)?),
        epoch: row.try_get(1)?,
        attempts: row.try_get(2)?,
        lane_tries: row.try_get(3)?,
    })
}

/// What an earlier call with this lease number took and still has.
async fn begun_before(db: &Object, begin: &Begin<'_>) -> Result<Vec<BegunMessage>> {
    let statement = db
        .prepare_cached(
            "/* ams:begun */ select m.id, m.epoch, m.attempts, m.lane_tries from leases l join messages m \
             on m.id = any(l.ids) and m.epoch = l.epoch where l.id = $1 and m.status = 'processing'",
        )
        .await?;
    let rows = db.query(&statement, &[&begin.lease.0]).await?;
    read_all(&rows, begun)
}

/// Takes dead instances away, and gives back what stands in leases that have no instance.
pub(super) async fn recover(db: &mut Object, recovery: &Recovery<'_>) -> Result<Recovered> {
    let Recovery { now, latest, silent } = recovery;
    let silent: Vec<i64> = silent.iter().map(|id| id.0).collect();
    let look = db
        .prepare_cached(
            "/* ams:recover_look */ select \
                 exists (select 1 from instances where lease_until <= $1 or id = any($3) and lease_until > $2) \
                 or exists (select 1 from leases where not exists (select 1 from instances i where i.id = leases.owner)), \
                 array(select id from instances where lease_until > $2 order by id), \
                 array(select seen_at from instances where lease_until > $2 order by id)",
        )
        .await?;
    let looked = db.query_one(&look, &[now, latest, &silent]).await?;
    let (ahead, seen_at): (Vec<i64>, Vec<Timestamp>) = (looked.try_get(1)?, looked.try_get(2)?);
    let ahead = ahead.into_iter().map(InstanceId).zip(seen_at).collect();
    if !looked.try_get::<_, bool>(0)? {
        return Ok(Recovered { ahead, ..Recovered::default() });
    }
    let transaction = db.transaction().await?;
    let bury = "/* ams:bury */ delete from instances \
                where lease_until <= $1 or id = any($3) and lease_until > $2";
    let instances = transaction.execute(bury, &[now, latest, &silent]).await?;
    let dethrone = "/* ams:dethrone */ update leader set owner = null \
                    where owner is not null and not exists (select 1 from instances i where i.id = leader.owner)";
    transaction.execute(dethrone, &[]).await?;
    let left = "/* ams:recover */ delete from leases \
                where not exists (select 1 from instances i where i.id = leases.owner) returning epoch, ids";
    let mut messages = 0;
    for row in transaction.query(left, &[]).await? {
        let (epoch, ids): (Epoch, Vec<i64>) = (row.try_get(0)?, row.try_get(1)?);
        messages += give_back(&transaction, &ids, epoch, "processing", *now).await?;
    }
    transaction.commit().await?;
    Ok(Recovered { instances, messages, ahead })
}
