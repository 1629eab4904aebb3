//! Held deliveries: each endpoint's stand together in an index of their own.

use deadpool_postgres::{Object, Transaction};

use super::left::take;
use super::read_all;
use crate::clock::Timestamp;
use crate::message::Held;
use crate::store::{Result, Unhold, limit};
use crate::ticket::Ticket;

/// A delivery that comes to wait.
pub(super) struct Waits<'a> {
    pub(super) ticket: &'a Ticket,
    pub(super) due_at: Timestamp,
    pub(super) held: Option<Held>,
    pub(super) attempts: i32,
    pub(super) lane: &'a str,
    pub(super) lane_tries: i32,
    pub(super) reason: Option<String>,
}

impl<'a> Waits<'a> {
    /// One that is given back as it was before its claim from this lane: due at once, or when it was due if that
    /// is still to come.
    pub(super) fn again(ticket: &'a Ticket, lane: &'a str, held: Option<Held>, now: Timestamp) -> Waits<'a> {
        let attempts = ticket.attempt - 1;
        Waits {
            ticket,
            due_at: ticket.due_at.map_or(now, |at| at.max(now)),
            held,
            attempts,
            lane: if attempts == 0 { "" } else { lane },
            lane_tries: ticket.lane_tries,
            reason: None,
        }
    }
}

/// Writes what comes to wait.
pub(super) async fn wait(db: &Transaction<'_>, waits: &[Waits<'_>]) -> Result<()> {
    if waits.is_empty() {
        return Ok(());
    }
    fn column<'a, T>(waits: &'a [Waits<'_>], value: impl Fn(&'a Waits<'_>) -> T) -> Vec<T> {
        waits.iter().map(value).collect()
    }
    let statement = db
        .prepare_cached(
            "/* ams:wait */ insert into waiting (message_id, endpoint_id, due_at, held, attempts, lane, lane_tries, \
                 priority, expires_at, reason) \
             select v.* from unnest($1::bigint[], $2::int[], $3::timestamptz[], $4::text[], $5::int[], $6::text[], \
                 $7::int[], $8::smallint[], $9::timestamptz[], $10::text[]) v on conflict do nothing",
        )
        .await?;
    let ids = column(waits, |w| w.ticket.id.0);
    let endpoints = column(waits, |w| w.ticket.endpoint_id.0);
    let dues = column(waits, |w| w.due_at);
    let held = column(waits, |w| w.held.map(Held::as_str));
    let attempts = column(waits, |w| w.attempts);
    let lanes = column(waits, |w| w.lane);
    let lane_tries = column(waits, |w| w.lane_tries);
    let priorities = column(waits, |w| w.ticket.priority);
    let expiries = column(waits, |w| w.ticket.expires_at);
    let reasons = column(waits, |w| w.reason.as_deref());
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 10] =
        [&ids, &endpoints, &dues, &held, &attempts, &lanes, &lane_tries, &priorities, &expiries, &reasons];
    db.execute(&statement, &values).await?;
    Ok(())
}

/// Holds what still stands in its batch; it becomes as it was before the claim.
pub(super) async fn hold(
    db: &mut Object,
    lane: &str,
    tickets: &[Ticket],
    held: Held,
    now: Timestamp,
) -> Result<u64> {
    let transaction = db.transaction().await?;
    let taken = take(&transaction, tickets).await?;
    let waits: Vec<_> = taken.iter().map(|ticket| Waits::again(ticket, lane, Some(held), now)).collect();
    wait(&transaction, &waits).await?;
    transaction.commit().await?;
    Ok(waits.len() as u64)
}

/// Which endpoints have deliveries held, and why: one look into the index for each pair.
pub(super) async fn held(db: &Object) -> Result<Vec<(String, Held)>> {
    let statement = db
        .prepare_cached(
            "/* ams:held */ with recursive pair as ( \
                 (select endpoint_id, held from waiting where held is not null order by endpoint_id, held limit 1) \
                 union all \
                 select next.endpoint_id, next.held from pair cross join lateral ( \
                     select w.endpoint_id, w.held from waiting w \
                     where w.held is not null and (w.endpoint_id, w.held) > (pair.endpoint_id, pair.held) \
                     order by w.endpoint_id, w.held limit 1) next) \
             select distinct coalesce(e.name, u.name), pair.held from pair \
                 left join endpoints e on e.id = pair.endpoint_id left join unknown_endpoints u on u.id = pair.endpoint_id \
             where coalesce(e.name, u.name) is not null order by 1, 2",
        )
        .await?;
    let rows = db.query(&statement, &[]).await?;
    let pairs = read_all(&rows, |row| Ok((row.try_get(0)?, Held::parse(row.try_get(1)?))))?;
    Ok(pairs.into_iter().filter_map(|(endpoint, held)| Some((endpoint, held?))).collect())
}

/// `f`: those that are freed by their priority; `l`: the lowest priority that there is; `s`: its share, where `f` has none of
/// it.
pub(super) const UNHOLD: &str = "/* ams:unhold */ with wanted as materialized ( \
         select * from unnest($1::text[], $2::bigint[]) with ordinality w(name, count, number)), \
     e as materialized ( \
         select w.number, w.count, e.id from wanted w join endpoints e on e.name = w.name \
         union all select w.number, w.count, s.id from wanted w join unknown_endpoints s on s.name = w.name), \
     c as materialized (select w.place from e cross join lateral ( \
         with f as (select x.place, x.priority, row_number() over () as number from ( \
                 select ctid as place, priority from waiting \
                 where held is not null and endpoint_id = e.id and held = $3 \
                 order by endpoint_id, held, priority desc, message_id limit e.count) x), \
             l as (select priority from waiting where held is not null and endpoint_id = e.id and held = $3 \
                 order by endpoint_id desc, held desc, priority, message_id desc limit 1), \
             s as (select x.place from l cross join lateral (select ctid as place from waiting \
                 where held is not null and endpoint_id = e.id and held = $3 and priority = l.priority \
                 order by endpoint_id, held, priority desc, message_id limit (e.count + 2) / 4) x \
                 where l.priority < (select min(priority) from f)) \
         select place from s union all select place from f where number <= e.count - (select count(*) from s)) w), \
     u as (update waiting set held = null, reserved = false, due_at = greatest(due_at, $4::timestamptz) \
         where ctid = any(array(select place from c)) and coalesce(held is not null, false) returning endpoint_id) \
     select e.number, count(*) from u join e on e.id = u.endpoint_id group by e.number";

/// Frees held deliveries, of each endpoint urgent ones first, then the oldest; a quarter are of the lowest priority.
pub(super) async fn unhold(db: &Object, wanted: &[Unhold], held: Held, now: Timestamp) -> Result<Vec<u64>> {
    let statement = db.prepare_cached(UNHOLD).await?;
    let names: Vec<&str> = wanted.iter().map(|wanted| wanted.endpoint.as_str()).collect();
    let counts: Vec<i64> = wanted.iter().map(|wanted| limit(wanted.limit)).collect();
    let mut freed = vec![0; wanted.len()];
    for row in db.query(&statement, &[&names, &counts, &held.as_str(), &now]).await? {
        let (number, count): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        let at = usize::try_from(number - 1).ok().and_then(|at| freed.get_mut(at));
        at.into_iter().for_each(|freed| *freed = count.unsigned_abs());
    }
    Ok(freed)
}

pub(super) const EXPIRE: &str = "/* ams:expire */ with d as materialized (select ctid as place from waiting \
         where expires_at is not null and expires_at <= $1 order by expires_at limit $2), \
     u as (delete from waiting where ctid = any(array(select place from d)) \
         and coalesce(expires_at <= $1, false) returning message_id, endpoint_id, attempts, lane) \
     insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at) \
     select message_id, endpoint_id, 'expired', attempts, lane, $1 from u on conflict do nothing";

/// Ends what waits beyond its time.
pub(super) async fn expire(db: &Object, now: Timestamp, count: usize) -> Result<u64> {
    let statement = db.prepare_cached(EXPIRE).await?;
    Ok(db.execute(&statement, &[&now, &limit(count)]).await?)
}
