//! Reserved times for deliveries of endpoints with a rate.

use deadpool_postgres::{Object, Transaction};

use super::{first_column, read_all, registry};
use crate::clock::Timestamp;
use crate::rate::Rate;
use crate::store::{Result, limit};

/// Endpoints with a rate that have deliveries without a reserved time.
pub(super) const RATED: &str = "/* ams:rated */ select id, rate_count, rate_interval_ms from endpoints e \
     where rate_count is not null and exists (select from waiting w \
         where w.held is not null and w.endpoint_id = e.id and w.held = 'endpoint_rate')";

/// The deliveries of an endpoint whose turn is next.
pub(super) const NEXT: &str = "/* ams:next_rated */ select message_id from waiting \
     where held is not null and endpoint_id = $1 and held = 'endpoint_rate' and due_at <= $2 \
     order by endpoint_id, held, priority desc, message_id limit $3";

/// Rows are deleted and written anew, because as an update that joins them to their times they may be compared each with
/// each. One that was changed meanwhile stays as it is.
const RESERVE: &str = "/* ams:reserve */ with v as materialized (select id, at from unnest($2::bigint[], $3::timestamptz[]) v(id, at)), \
     d as (delete from waiting where endpoint_id = $1 and message_id = any($2) \
         and coalesce(held = 'endpoint_rate', false) \
         returning message_id, endpoint_id, attempts, lane, lane_tries, priority, expires_at, reason) \
     insert into waiting (message_id, endpoint_id, due_at, held, attempts, lane, lane_tries, priority, expires_at, reason, reserved) \
     select d.message_id, d.endpoint_id, v.at, null, d.attempts, d.lane, d.lane_tries, d.priority, d.expires_at, d.reason, true \
     from d join v on v.id = d.message_id";

/// Reserves times between these for deliveries of endpoints with a rate; for how many.
pub(super) async fn reserve(db: &mut Object, from: Timestamp, until: Timestamp) -> Result<u64> {
    let rows = db.query(&db.prepare_cached(RATED).await?, &[]).await?;
    let rated = read_all(&rows, |row| Ok((row.try_get(0)?, registry::rate(row, 1)?)))?;
    let mut count = 0;
    for (endpoint, rate) in rated {
        let Some(rate) = rate else { continue };
        let transaction = db.transaction().await?;
        count += reserve_for(&transaction, endpoint, rate, from, until).await?;
        transaction.commit().await?;
    }
    Ok(count)
}

async fn reserve_for(
    db: &Transaction<'_>,
    endpoint: i32,
    rate: Rate,
    from: Timestamp,
    until: Timestamp,
) -> Result<u64> {
    // Whoever comes second waits here for the first.
    let lock = "/* ams:lock_rate */ insert into rates (endpoint_id, next_at) values ($1, $2) \
                on conflict (endpoint_id) do update set next_at = rates.next_at returning next_at";
    let next = db.query_one(&db.prepare_cached(lock).await?, &[&endpoint, &from]).await?.try_get(0)?;
    let times = rate.reservable(Some(next), from, until);
    let wanted = limit(times.count);
    let rows = db.query(&db.prepare_cached(NEXT).await?, &[&endpoint, &from, &wanted]).await?;
    let ids: Vec<i64> = first_column(&rows)?;
    let statement = db.prepare_cached(RESERVE).await?;
    let count = db.execute(&statement, &[&endpoint, &ids, &times.times(ids.len())]).await?;
    let next = "/* ams:move_rate */ update rates set next_at = $2 where endpoint_id = $1";
    db.execute(&db.prepare_cached(next).await?, &[&endpoint, &times.after(ids.len())]).await?;
    Ok(count)
}

/// When the next time of an endpoint may be reserved for.
pub(super) async fn next_reserved(db: &Object, endpoint: &str) -> Result<Option<Timestamp>> {
    let statement = "/* ams:next_reserved */ select next_at from rates \
                     where endpoint_id = (select id from endpoints where name = $1)";
    let row = db.query_opt(&db.prepare_cached(statement).await?, &[&endpoint]).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}
