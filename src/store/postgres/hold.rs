//! Held rows: each endpoint's stand together in an index of their own.

use deadpool_postgres::Object;

use super::claim::as_it_was;
use super::{bounds, by_epoch, limit, read_all};
use crate::clock::Timestamp;
use crate::message::{Epoch, Held, MessageId};
use crate::store::Result;

/// Holds what is `queued` in the ticket's epoch; it becomes as it was before the claim.
pub(super) async fn hold(
    db: &Object,
    tickets: &[(MessageId, Epoch)],
    held: Held,
    now: Timestamp,
) -> Result<u64> {
    let statement = db
        .prepare_cached(concat!(
            "/* ams:hold */ update messages set held = $5, ",
            as_it_was!("$6"),
            " where id = any($1) and epoch = $2 and status = 'queued' and id between $3 and $4",
        ))
        .await?;
    let mut count = 0;
    for (epoch, ids) in by_epoch(tickets.iter().map(|(id, epoch)| (id.0, *epoch))) {
        let (first, last) = bounds(&ids);
        count += db.execute(&statement, &[&ids, &epoch, &first, &last, &held.as_str(), &now]).await?;
    }
    Ok(count)
}

/// Which endpoints have rows held, and why: one look into the index for each pair.
pub(super) async fn held(db: &Object) -> Result<Vec<(String, Held)>> {
    let statement = db
        .prepare_cached(
            "/* ams:held */ with recursive pair as ( \
                 (select endpoint, held from messages where held is not null order by endpoint, held limit 1) \
                 union all \
                 select next.endpoint, next.held from pair cross join lateral ( \
                     select m.endpoint, m.held from messages m \
                     where m.held is not null and (m.endpoint, m.held) > (pair.endpoint, pair.held) \
                     order by m.endpoint, m.held limit 1) next) \
             select endpoint, held from pair",
        )
        .await?;
    let rows = db.query(&statement, &[]).await?;
    let pairs = read_all(&rows, |row| Ok((row.try_get(0)?, Held::parse(row.try_get(1)?))))?;
    Ok(pairs.into_iter().filter_map(|(endpoint, held)| Some((endpoint, held?))).collect())
}

/// Frees held rows, oldest first.
pub(super) async fn unhold(
    db: &Object,
    endpoint: &str,
    held: Held,
    count: usize,
    now: Timestamp,
) -> Result<u64> {
    let statement = db
        .prepare_cached(
            "/* ams:unhold */ with c as materialized (select id from messages \
                 where held is not null and endpoint = $1 and held = $2 order by id limit $3 for update skip locked) \
             update messages m set held = null, \
                 due_at = case when m.status = 'retrying' then greatest(m.due_at, $4::timestamptz) end \
             where m.id = any(array(select id from c)) \
                 and m.id between (select min(id) from c) and (select max(id) from c)",
        )
        .await?;
    Ok(db.execute(&statement, &[&endpoint, &held.as_str(), &limit(count), &now]).await?)
}
