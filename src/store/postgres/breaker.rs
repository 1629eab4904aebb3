//! Breakers of endpoints that are not closed.

use deadpool_postgres::Object;

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

/// Opens and closes breakers. One that was opened further stays, and one that was closed meanwhile opens for the first time only.
pub(super) async fn set_breakers(
    db: &mut Object,
    changes: &[(String, Option<Breaker>)],
) -> Result<Vec<bool>> {
    let transaction = db.transaction().await?;
    let open = transaction
        .prepare_cached(
            "/* ams:open_breaker */ insert into breakers (endpoint_id, cause, since, until, openings, reason) \
             select id, $2, $3, $4, $5, $6 from endpoints where name = $1 and ($5 = 1 or id in (select endpoint_id from breakers)) \
                 and ($7::timestamptz is null or not exists (select from stats s where s.endpoint_id = id \
                     and s.minute > $7 - interval '15 min' and s.sent_at > $7)) \
             on conflict (endpoint_id) do update set cause = excluded.cause, until = excluded.until, \
                 openings = excluded.openings, reason = excluded.reason, probed_until = null \
             where (breakers.openings, breakers.until) < (excluded.openings, excluded.until)",
        )
        .await?;
    let close = transaction
        .prepare_cached(
            "/* ams:close_breaker */ delete from breakers \
             where endpoint_id = (select id from endpoints where name = $1)",
        )
        .await?;
    let mut made = Vec::with_capacity(changes.len());
    for (endpoint, change) in changes {
        let rows = match change {
            Some(b) => {
                let unless = b.unless_sent_since();
                let values: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
                    [endpoint, &b.cause.as_str(), &b.since, &b.until, &b.openings, &b.reason, &unless];
                transaction.execute(&open, &values).await?
            }
            None => transaction.execute(&close, &[endpoint]).await?,
        };
        made.push(rows > 0);
    }
    transaction.commit().await?;
    Ok(made)
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
