//! Begin, the leases it writes, the recovery of what stands in them, and the repair of both.

use deadpool_postgres::Object;
use tokio_postgres::Row;

use super::claim::ticket;
use super::read_all;
use crate::clock::Timestamp;
use crate::store::{
    BatchId, Begin, Begun, InstanceId, LeaseId, Mask, Recovered, Recovery, Reissue, Reissued, Result, Suspect,
};

/// Of each batch the wanted bits that are still there go into a lease. A batch that nothing is left of goes.
pub(super) const BEGIN: &str = "/* ams:begin */ with \
     v as materialized (select * from unnest($1::bigint[], $2::varbit[], $3::bigint[]) as v (batch, wanted, lease)), \
     o as materialized (select b.id, b.\"left\" & v.wanted as taken, b.\"left\" & ~v.wanted as rest, v.lease, b.root, b.lane, \
             b.lo, b.hi, b.ids, b.endpoints, b.attempts, b.lane_tries, b.dues, b.expiries \
         from batches b join v on v.batch = b.id where b.id = any($1) \
             and not exists (select from leases l where l.id = any($3)) \
         order by b.id for update of b), \
     d as (delete from batches where id = any(array(select id from o where bit_count(rest) = 0))), \
     u as (update batches set \"left\" = o.rest from o \
         where batches.id = any($1) and batches.id = o.id and bit_count(o.rest) > 0 and bit_count(o.taken) > 0), \
     l as (insert into leases (id, root, batch, lane, owner, lo, hi, ids, endpoints, attempts, lane_tries, dues, expiries, \"left\") \
         select lease, root, id, lane, $4, lo, hi, ids, endpoints, attempts, lane_tries, dues, expiries, taken \
         from o where bit_count(taken) > 0) \
     select lease, id, root, taken from o where bit_count(taken) > 0";

/// Begins what is still queued. All of a call is begun or nothing, so a repeated call that finds one of its leases
/// knows that all of them are there.
///
/// The first call may still be waiting for a lock while the second asks: so the second one runs too, waits for the same
/// lock, and looks for its leases in a statement of its own, which sees what the first has committed meanwhile.
pub(super) async fn begin(db: &Object, begin: &Begin<'_>) -> Result<Vec<Begun>> {
    let statement = db.prepare_cached(BEGIN).await?;
    let batches: Vec<i64> = begin.wanted.iter().map(|wanted| wanted.batch.0).collect();
    let masks: Vec<&Mask> = begin.wanted.iter().map(|wanted| &wanted.positions).collect();
    let leases: Vec<i64> = begin.wanted.iter().map(|wanted| wanted.lease.0).collect();
    let rows = db.query(&statement, &[&batches, &masks, &leases, &begin.owner.0]).await?;
    if !rows.is_empty() || !begin.repeated {
        return read_all(&rows, begun);
    }
    let look = "/* ams:begun */ select id, batch, root, \"left\" from leases where id = any($1)";
    let rows = db.query(&db.prepare_cached(look).await?, &[&leases]).await?;
    read_all(&rows, begun)
}

fn begun(row: &Row) -> Result<Begun> {
    Ok(Begun {
        lease: LeaseId(row.try_get(0)?),
        batch: BatchId(row.try_get(1)?),
        root: BatchId(row.try_get(2)?),
        positions: row.try_get(3)?,
    })
}

/// Takes dead instances away, and lists the leases that have no instance.
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
    let remove = "/* ams:remove_expired */ delete from instances \
                where lease_until <= $1 or id = any($3) and lease_until > $2";
    let instances = transaction.execute(remove, &[now, latest, &silent]).await?;
    let clear = "/* ams:clear_leader */ update leader set owner = null \
                    where owner is not null and not exists (select 1 from instances i where i.id = leader.owner)";
    transaction.execute(clear, &[]).await?;
    let left = "/* ams:recover */ select id from leases \
                where not exists (select 1 from instances i where i.id = leases.owner) order by id limit 1000";
    let rows = transaction.query(left, &[]).await?;
    let leases = read_all(&rows, |row| Ok(LeaseId(row.try_get(0)?)))?;
    transaction.commit().await?;
    Ok(Recovered { instances, leases, ahead })
}

/// Makes a new batch of what is left; the text of the two differs only in what is taken away. A delivery that has
/// ended all the same is left out: it is the net under everything else.
macro_rules! reissue {
    ($name:literal, $suspect:expr) => {
        concat!(
            "/* ams:reissue_",
            $name,
            " */ with o as (",
            $suspect,
            " returning root, lane, lo, hi, ids, endpoints, attempts, lane_tries, dues, expiries, \"left\"), \
             t as materialized (select t.id, t.endpoint_id, coalesce(t.attempts, 0) as attempts, \
                     coalesce(t.lane_tries, 0) as lane_tries, t.due_at, t.expires_at, o.expiries is not null as expires, \
                     (t.place - 1)::int as position \
                 from o, unnest(o.ids, o.endpoints, o.attempts, o.lane_tries, o.dues, o.expiries) with ordinality \
                     t(id, endpoint_id, attempts, lane_tries, due_at, expires_at, place) \
                 where get_bit(o.\"left\", (t.place - 1)::int) = 1 and (select true from deliveries f \
                     where f.message_id = t.id and f.endpoint_id = t.endpoint_id) is null), \
             b as (insert into batches (id, root, lane, owner, lo, hi, ids, endpoints, attempts, lane_tries, dues, expiries, \
                     \"left\", created_at) \
                 select $2, root, lane, $3, lo, hi, ids, endpoints, attempts, lane_tries, dues, expiries, \
                     (select bit_or(set_bit(repeat('0', 2048)::varbit, t.position, 1)) from t), $4 \
                 from o where exists (select from t)) \
             select t.id, t.endpoint_id, m.endpoint, m.created_at, m.recipient, m.content, m.content_type, \
                 m.headers, m.ordering_key, m.priority, case when t.expires then t.expires_at else m.expires_at end, \
                 t.attempts + 1, t.lane_tries, case when t.due_at > $4 then t.due_at end, (select lane from o), t.position \
             from t cross join lateral (select endpoint, created_at, recipient, content, content_type, headers, \
                 ordering_key, priority, expires_at from messages where id = t.id limit 1) m order by t.position"
        )
    };
}

pub(super) const REISSUE_BATCH: &str = reissue!("batch", "delete from batches b where b.id = $1");
pub(super) const REISSUE_LEASE: &str = reissue!(
    "lease",
    "delete from leases l where l.id = $1 and not exists (select from instances i where i.id = l.owner)"
);

/// Issues again what is left in a batch or lease.
pub(super) async fn reissue(db: &Object, reissue: &Reissue) -> Result<Option<Reissued>> {
    let (statement, id) = match reissue.suspect {
        Suspect::Batch(id) => (REISSUE_BATCH, id.0),
        Suspect::Lease(id) => (REISSUE_LEASE, id.0),
    };
    let statement = db.prepare_cached(statement).await?;
    let rows = db.query(&statement, &[&id, &reissue.batch.0, &reissue.owner.0, &reissue.now]).await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let lane = first.try_get(14)?;
    let tickets = read_all(&rows, |row| {
        let position: i32 = row.try_get(15)?;
        ticket(row, reissue.batch, usize::try_from(position).unwrap_or(usize::MAX))
    })?;
    Ok(Some(Reissued { lane, tickets }))
}
