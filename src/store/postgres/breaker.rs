//! Breakers of endpoints that are not closed.

use std::collections::HashSet;

use deadpool_postgres::Object;
use tokio_postgres::types::ToSql;

use super::{first_column, read_all};
use crate::breaker::{Breaker, Cause};
use crate::clock::Timestamp;
use crate::store::Result;

/// All breakers that are not closed.
pub(super) async fn breakers(db: &Object) -> Result<Vec<(String, Breaker)>> {
    let statement = db
        .prepare_cached(
            "/* ams:breakers */ select e.name, b.cause, b.since, b.until, b.openings, b.reason \
             from breakers b join endpoints e on e.id = b.endpoint_id order by b.since, e.name",
        )
        .await?;
    let rows = db.query(&statement, &[]).await?;
    read_all(&rows, |row| {
        let breaker = Breaker {
            cause: Cause::read(row.try_get(1)?),
            since: row.try_get(2)?,
            until: row.try_get(3)?,
            openings: row.try_get(4)?,
            reason: row.try_get(5)?,
        };
        Ok((row.try_get(0)?, breaker))
    })
}

/// Opens and closes breakers. One that was opened further stays, and one that was closed meanwhile opens for the first time
/// only.
pub(super) async fn set_breakers(
    db: &mut Object,
    changes: &[(String, Option<Breaker>)],
) -> Result<Vec<bool>> {
    let opened: Vec<_> = changes.iter().filter_map(|(name, b)| Some((name, b.as_ref()?))).collect();
    let closed: Vec<&String> = changes.iter().filter(|(_, b)| b.is_none()).map(|(name, _)| name).collect();
    let transaction = db.transaction().await?;
    let open = transaction
        .prepare_cached(
            "/* ams:open_breaker */ with made as ( \
                 insert into breakers (endpoint_id, cause, since, until, openings, reason) \
                 select e.id, v.cause, v.since, v.until, v.openings, v.reason \
                 from unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::int[], $6::text[], \
                     $7::timestamptz[]) v(name, cause, since, until, openings, reason, unless) \
                 join endpoints e on e.name = v.name \
                 where (v.openings = 1 or e.id in (select endpoint_id from breakers)) \
                     and (v.unless is null or not exists (select from stats s where s.endpoint_id = e.id \
                         and s.minute > v.unless - interval '15 min' and s.sent_at > v.unless)) \
                 on conflict (endpoint_id) do update set cause = excluded.cause, until = excluded.until, \
                     openings = excluded.openings, reason = excluded.reason, probed_until = null \
                 where (breakers.openings, breakers.until) < (excluded.openings, excluded.until) \
                 returning endpoint_id) \
             select e.name from made join endpoints e on e.id = made.endpoint_id",
        )
        .await?;
    let close = transaction
        .prepare_cached(
            "/* ams:close_breaker */ delete from breakers b using endpoints e \
             where e.name = any($1) and b.endpoint_id = e.id returning e.name",
        )
        .await?;
    fn column<'a, T>(opened: &[(&'a String, &'a Breaker)], value: impl Fn(&'a Breaker) -> T) -> Vec<T> {
        opened.iter().map(|(_, breaker)| value(breaker)).collect()
    }
    let names: Vec<&String> = opened.iter().map(|(name, _)| *name).collect();
    let values: [&(dyn ToSql + Sync); 7] = [
        &names,
        &column(&opened, |b| b.cause.as_str()),
        &column(&opened, |b| b.since),
        &column(&opened, |b| b.until),
        &column(&opened, |b| b.openings),
        &column(&opened, |b| b.reason.as_str()),
        &column(&opened, Breaker::unless_sent_since),
    ];
    let opened = first_column::<String>(&transaction.query(&open, &values).await?)?;
    let closed = first_column::<String>(&transaction.query(&close, &[&closed]).await?)?;
    transaction.commit().await?;
    let made: HashSet<String> = opened.into_iter().chain(closed).collect();
    Ok(changes.iter().map(|(name, _)| made.contains(name)).collect())
}

/// Takes the right to probe those endpoints that nobody probes. A right that lasts for longer than any was written by a
/// clock that was wrong.
pub(super) async fn probe(
    db: &Object,
    endpoints: &[(String, Timestamp)],
    now: Timestamp,
) -> Result<Vec<String>> {
    let statement = db
        .prepare_cached(
            "/* ams:probe */ update breakers b set probed_until = v.until \
             from endpoints e join unnest($1::text[], $2::timestamptz[]) v(name, until) on v.name = e.name \
             where b.endpoint_id = e.id and b.until <= $3 \
                 and (b.probed_until is null or b.probed_until <= $3 or b.probed_until > $3 + interval '1 h') \
             returning e.name",
        )
        .await?;
    let (names, untils): (Vec<&str>, Vec<Timestamp>) =
        endpoints.iter().map(|(name, until)| (name.as_str(), *until)).unzip();
    first_column(&db.query(&statement, &[&names, &untils, &now]).await?)
}
