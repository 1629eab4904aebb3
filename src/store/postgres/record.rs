//! What attempts came to.
//!
//! Under load nearly all records are successes of deliveries that stand in their lease: these go in one statement, all
//! or nothing by the bits. Everything else is settled in a transaction that locks what it decides by.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};

use deadpool_postgres::{Object, Transaction};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use super::hold::{Waits, wait};
use super::left::{Kind, write_left};
use super::{bounds, read_all};
use crate::clock::Timestamp;
use crate::message::{MessageId, Outcome, Verdict};
use crate::retry::summary;
use crate::store::settle::{Left, Places, settle};
use crate::store::{BatchId, EndpointId, LeaseId, Mask, Record, Records, Result};

/// Bytes of an answer that are kept.
const ANSWER: usize = 4_096;

/// Writes successes when all of them stand in their leases, and says whether they did. Inserted plainly, because
/// `on conflict` costs as much as a third of the insert (measured); a delivery that has ended already is an error then.
/// Texts are unnested and numbers subscripted, because each further array to unnest costs 0.07 us a row and a subscript of
/// numbers without nulls nearly nothing (measured: 1.8 in place of 2.4 us a row).
pub(super) const SENT: &str = "/* ams:sent */ with \
     v as materialized (select * from unnest($1::bigint[], $2::varbit[]) as v (id, mask)), \
     g as materialized (select id, \"left\" from leases where id = any($1) order by id for update), \
     ok as materialized (select count(*) = cardinality($1::bigint[]) as ok from g join v using (id) \
         where g.\"left\" & v.mask = v.mask), \
     lu as (update leases l set \"left\" = l.\"left\" & ~v.mask from v, ok \
         where ok.ok and l.id = any($1) and l.id = v.id and bit_count(l.\"left\" & ~v.mask) > 0), \
     ld as (delete from leases l using v, ok \
         where ok.ok and l.id = any($1) and l.id = v.id and bit_count(l.\"left\" & ~v.mask) = 0), \
     st as (insert into stats (endpoint_id, minute, sent, failed, dead, took_us, sent_at) \
         select t.*, $9 from ok, unnest($3::int[], $4::timestamptz[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[]) t \
         where ok.ok on conflict (endpoint_id, minute) do update set sent = stats.sent + excluded.sent, \
             failed = stats.failed + excluded.failed, dead = stats.dead + excluded.dead, \
             took_us = stats.took_us + excluded.took_us, sent_at = excluded.sent_at), \
     de as (insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at, batch, started_at, \
             connect_us, head_us, body_us, http_status, address, provider_message_id, answer) \
         select ($11::bigint[])[g], ($12::int[])[g], 'sent', ($13::int[])[g], $10, $9, ($14::bigint[])[g], \
             ($15::timestamptz[])[g], ($16::int[])[g], ($17::int[])[g], ($18::int[])[g], ($19::smallint[])[g], a, p, w \
         from ok, unnest($20::text[], $21::text[], $22::text[]) with ordinality as t (a, p, w, g) where ok.ok) \
     select ok from ok";

/// Writes records; returns the ids whose verdict was refused.
pub(super) async fn record(db: &mut Object, records: &Records<'_>) -> Result<Vec<MessageId>> {
    if records.records.is_empty() {
        return Ok(Vec::new());
    }
    let all_sent = records.records.iter().all(|record| record.verdict == Verdict::Sent);
    if all_sent && sent_at_once(db, records).await? {
        return Ok(Vec::new());
    }
    let transaction = db.transaction().await?;
    let refused = settle_in(&transaction, records).await?;
    transaction.commit().await?;
    Ok(refused)
}

/// The fast way. `false`: something does not stand where it should, and nothing was written.
async fn sent_at_once(db: &Object, records: &Records<'_>) -> Result<bool> {
    let mut leases = BTreeMap::<i64, Mask>::new();
    let mut twice = false;
    for record in records.records {
        let (mask, position) =
            (leases.entry(record.lease.0).or_insert(Mask::EMPTY), usize::from(record.ticket.position));
        twice |= mask.has(position);
        mask.set(position);
    }
    let mut all: Vec<&Record> = records.records.iter().collect();
    // Rows in the order of their index fill its pages: 0.3 us less for each than in random order, and a quarter less to
    // keep (measured).
    all.sort_unstable_by_key(|record| record.ticket.id);
    let columns = Columns::of(&all);
    let Some(lane) = columns.lanes.first().filter(|lane| columns.lanes.iter().all(|other| other == *lane))
    else {
        return Ok(false);
    };
    if twice || columns.starts.contains(&None) || columns.statuses.contains(&None) {
        return Ok(false);
    }
    let (ids, masks): (Vec<i64>, Vec<Mask>) = leases.into_iter().unzip();
    let stats = Stats::of(records.records.iter());
    let mut values: Vec<&(dyn ToSql + Sync)> = vec![&ids, &masks];
    values.extend(stats.values());
    values.push(&records.now);
    values.push(lane);
    values.extend(columns.numbers());
    values.extend(columns.texts());
    match db.query_one(&db.prepare_cached(SENT).await?, &values).await {
        Ok(row) => Ok(row.try_get(0)?),
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The columns of deliveries that were sent.
#[derive(Default)]
struct Columns<'a> {
    ids: Vec<i64>,
    endpoints: Vec<i32>,
    attempts: Vec<i32>,
    lanes: Vec<&'a str>,
    batches: Vec<i64>,
    starts: Vec<Option<Timestamp>>,
    times: [Vec<Option<i32>>; 3],
    statuses: Vec<Option<i16>>,
    addresses: Vec<Option<&'a str>>,
    provider_ids: Vec<Option<&'a str>>,
    answers: Vec<Option<Cow<'a, str>>>,
}

impl<'a> Columns<'a> {
    fn of(records: &[&'a Record]) -> Columns<'a> {
        let mut columns = Columns::default();
        for record in records {
            let (ticket, outcome) = (&record.ticket, record.outcome.as_deref());
            columns.ids.push(ticket.id.0);
            columns.endpoints.push(ticket.endpoint_id.0);
            columns.attempts.push(ticket.attempt);
            columns.lanes.push(&record.lane);
            columns.batches.push(ticket.batch.0);
            columns.starts.push(outcome.map(|outcome| outcome.started_at));
            let [connect, head, body] = &mut columns.times;
            connect.push(outcome.map(|outcome| outcome.times.connect_us));
            head.push(outcome.map(|outcome| outcome.times.head_us));
            body.push(outcome.map(|outcome| outcome.times.body_us));
            columns.statuses.push(outcome.and_then(http_status));
            columns.addresses.push(outcome.map(|outcome| outcome.address.as_str()));
            columns.provider_ids.push(outcome.and_then(|outcome| outcome.provider_message_id.as_deref()));
            columns.answers.push(outcome.map(answer));
        }
        columns
    }

    /// The columns of numbers, in the order of the fast statement.
    fn numbers(&self) -> [&(dyn ToSql + Sync); 9] {
        let [connect, head, body] = &self.times;
        [
            &self.ids,
            &self.endpoints,
            &self.attempts,
            &self.batches,
            &self.starts,
            connect,
            head,
            body,
            &self.statuses,
        ]
    }

    fn texts(&self) -> [&(dyn ToSql + Sync); 3] {
        [&self.addresses, &self.provider_ids, &self.answers]
    }
}

fn http_status(outcome: &Outcome) -> Option<i16> {
    outcome.status.and_then(|status| i16::try_from(status).ok())
}

/// The start of an answer, as far as it is kept.
fn answer(outcome: &Outcome) -> Cow<'_, str> {
    storable(&outcome.answer[..outcome.answer.floor_char_boundary(ANSWER)])
}

/// PostgreSQL's text can't hold the nul character, and a receiver may answer anything.
fn storable(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { Cow::Owned(text.replace('\0', "")) } else { Cow::Borrowed(text) }
}

/// What records add to the statistics: one row for each endpoint and minute.
#[derive(Default)]
struct Stats {
    endpoints: Vec<i32>,
    minutes: Vec<Timestamp>,
    counts: [Vec<i64>; 4],
}

impl Stats {
    fn of<'a>(records: impl Iterator<Item = &'a Record>) -> Stats {
        let mut rows = BTreeMap::<(i32, i64), [i64; 4]>::new();
        for record in records {
            let Some(outcome) = &record.outcome else { continue };
            let minute = outcome.started_at.as_micros().div_euclid(60_000_000) * 60_000_000;
            let [sent, failed, dead, took] = rows.entry((record.ticket.endpoint_id.0, minute)).or_default();
            *sent += i64::from(record.verdict == Verdict::Sent);
            *failed += i64::from(record.verdict != Verdict::Sent);
            *dead += i64::from(matches!(record.verdict, Verdict::Dead { .. }));
            *took += i64::from(outcome.times.total_us());
        }
        let mut stats = Stats::default();
        for ((endpoint, minute), counts) in rows {
            stats.endpoints.push(endpoint);
            stats.minutes.push(Timestamp::from_micros(minute));
            stats.counts.iter_mut().zip(counts).for_each(|(column, count)| column.push(count));
        }
        stats
    }

    fn values(&self) -> [&(dyn ToSql + Sync); 6] {
        let [sent, failed, dead, took] = &self.counts;
        [&self.endpoints, &self.minutes, sent, failed, dead, took]
    }
}

/// Settles records whatever became of their leases.
async fn settle_in(db: &Transaction<'_>, records: &Records<'_>) -> Result<Vec<MessageId>> {
    let settled = settle(records.records, places(db, records.records).await?);
    write_left(db, Kind::Batches, settled.batches.iter().map(|(id, mask)| (id.0, mask))).await?;
    write_left(db, Kind::Leases, settled.leases.iter().map(|(id, mask)| (id.0, mask))).await?;
    let judged = || records.records.iter().zip(&settled.accepted);
    let accepted: Vec<&Record> =
        judged().filter(|(_, accepted)| **accepted).map(|(record, _)| record).collect();
    let before = write_sent(db, &accepted, records.now).await?;
    let attempt = |record: &Record| (record.ticket.id.0, record.ticket.batch.0);
    let told: HashSet<(i64, i64)> = accepted
        .iter()
        .filter(|record| record.verdict == Verdict::Sent)
        .map(|record| attempt(record))
        .filter(|told| before.get(told) != Some(&Before::Another))
        .collect();
    let counted: Vec<&Record> = accepted
        .iter()
        .copied()
        .filter(|record| before.get(&attempt(record)) != Some(&Before::This))
        .collect();
    let waits: Vec<_> = accepted.iter().filter_map(|record| waits(record, records.now)).collect();
    let logged: Vec<&Record> =
        records.records.iter().filter(|record| !told.contains(&attempt(record))).collect();
    tokio::try_join!(
        wait(db, &waits),
        write_ended(db, &accepted, records.now),
        write_dead_letters(db, &accepted, records.now),
        write_attempts(db, &logged),
        write_stats(db, &counted, records.now),
    )?;
    Ok(judged().filter(|(_, accepted)| !**accepted).map(|(record, _)| record.ticket.id).collect())
}

/// Which attempt had sent a delivery before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// This very one: its record is written a second time.
    This,
    Another,
}

/// Locks and reads every place that these records may change: batches before leases, as everybody does.
async fn places(db: &Transaction<'_>, records: &[Record]) -> Result<Places> {
    let mut roots: Vec<i64> = records.iter().map(|record| record.root.0).collect();
    roots.sort_unstable();
    roots.dedup();
    let batches = "/* ams:places_batches */ select id, root, \"left\" from batches where root = any($1) order by id for update";
    let leases = "/* ams:places_leases */ select id, root, \"left\" from leases where root = any($1) order by id for update";
    let left = |row: &tokio_postgres::Row| -> Result<(i64, Left)> {
        Ok((row.try_get(0)?, Left { root: BatchId(row.try_get(1)?), positions: row.try_get(2)? }))
    };
    let batches = read_all(&db.query(&db.prepare_cached(batches).await?, &[&roots]).await?, left)?;
    let leases = read_all(&db.query(&db.prepare_cached(leases).await?, &[&roots]).await?, left)?;
    // A success counts whatever stands there.
    let asks = records.iter().filter(|record| record.verdict != Verdict::Sent);
    let ids: Vec<i64> = asks.map(|record| record.ticket.id.0).collect();
    let (first, last) = bounds(&ids);
    let ended = "/* ams:places_ended */ select message_id, endpoint_id from deliveries \
                 where message_id = any($1) and message_id between $2 and $3";
    let ended =
        read_all(&db.query(&db.prepare_cached(ended).await?, &[&ids, &first, &last]).await?, |row| {
            Ok((MessageId(row.try_get(0)?), EndpointId(row.try_get(1)?)))
        })?;
    Ok(Places {
        batches: batches.into_iter().map(|(id, left)| (BatchId(id), left)).collect(),
        leases: leases.into_iter().map(|(id, left)| (LeaseId(id), left)).collect(),
        ended: ended.into_iter().collect(),
    })
}

pub(super) const SENT_LATE: &str = "/* ams:sent_late */ with t as materialized (select * from unnest($2::bigint[], $3::int[], $4::int[], $5::bigint[], \
                     $6::timestamptz[], $7::int[], $8::int[], $9::int[], $10::smallint[], $11::text[], $12::text[], \
                     $13::text[], $14::text[]) as t (i, e, n, b, s, x, y, z, h, a, p, w, l)), \
                 w as (delete from waiting where ctid = any(array(select x.place from t cross join lateral ( \
         select ctid as place from waiting where message_id = t.i and endpoint_id = t.e limit 1) x))), \
     dl as (delete from dead_letters where ctid = any(array(select x.place from t cross join lateral ( \
         select ctid as place from dead_letters where message_id = t.i and endpoint_id = t.e limit 1) x))), \
     before as materialized (select t.i as message_id, t.b, d.batch is distinct from t.b as other \
         from t cross join lateral (select batch from deliveries \
             where message_id = t.i and endpoint_id = t.e and status = 'sent' limit 1) d), \
     de as (insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at, batch, started_at, \
             connect_us, head_us, body_us, http_status, address, provider_message_id, answer) \
         select i, e, 'sent', n, l, $1, b, s, x, y, z, h, a, p, w from t \
         on conflict (message_id, endpoint_id) do update set status = excluded.status, \
             attempts = excluded.attempts, lane = excluded.lane, finished_at = excluded.finished_at, reason = null, \
             batch = excluded.batch, started_at = excluded.started_at, connect_us = excluded.connect_us, \
             head_us = excluded.head_us, body_us = excluded.body_us, http_status = excluded.http_status, \
             address = excluded.address, provider_message_id = excluded.provider_message_id, \
             answer = excluded.answer \
         where deliveries.status <> 'sent') \
 select message_id, b, other from before";

/// Writes successes over whatever else the deliveries ended as. Returns those that had been sent before, by message and
/// batch.
async fn write_sent(
    db: &Transaction<'_>,
    accepted: &[&Record],
    now: Timestamp,
) -> Result<HashMap<(i64, i64), Before>> {
    let mut seen = HashSet::new();
    let sent: Vec<&Record> = accepted
        .iter()
        .copied()
        .filter(|record| record.verdict == Verdict::Sent)
        .filter(|record| seen.insert((record.ticket.id, record.ticket.endpoint_id)))
        .collect();
    if sent.is_empty() {
        return Ok(HashMap::new());
    }
    let columns = Columns::of(&sent);
    let statement = db.prepare_cached(SENT_LATE).await?;
    let mut values: Vec<&(dyn ToSql + Sync)> = vec![&now];
    values.extend(columns.numbers());
    values.extend(columns.texts());
    values.push(&columns.lanes);
    let rows = db.query(&statement, &values).await?;
    let before = read_all(&rows, |row| {
        let before = if row.try_get(2)? { Before::Another } else { Before::This };
        Ok(((row.try_get(0)?, row.try_get(1)?), before))
    })?;
    Ok(before.into_iter().collect())
}

/// How a delivery goes on that comes to wait; `None` for one that has ended.
fn waits<'a>(record: &'a Record, now: Timestamp) -> Option<Waits<'a>> {
    match &record.verdict {
        Verdict::Retry { lane, lane_tries, at } => Some(Waits {
            ticket: &record.ticket,
            due_at: *at,
            held: None,
            attempts: record.ticket.attempt,
            lane,
            lane_tries: *lane_tries,
            reason: record.outcome.as_deref().map(summary),
        }),
        Verdict::Release { held } => Some(Waits::again(&record.ticket, &record.lane, *held, now)),
        Verdict::Sent | Verdict::Dead { .. } | Verdict::Expired => None,
    }
}

/// Writes deliveries that ended without a success.
async fn write_ended(db: &Transaction<'_>, accepted: &[&Record], now: Timestamp) -> Result<()> {
    let (mut ids, mut endpoints, mut statuses, mut attempts, mut lanes, mut reasons) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for record in accepted {
        let (status, reason) = match &record.verdict {
            Verdict::Dead { reason, .. } => ("dead", Some(reason.as_str())),
            Verdict::Expired => ("expired", None),
            _ => continue,
        };
        ids.push(record.ticket.id.0);
        endpoints.push(record.ticket.endpoint_id.0);
        statuses.push(status);
        attempts.push(record.attempts());
        lanes.push(&*record.lane);
        reasons.push(reason);
    }
    if ids.is_empty() {
        return Ok(());
    }
    let statement = db
        .prepare_cached(
            "/* ams:ended */ insert into deliveries (message_id, endpoint_id, status, attempts, lane, reason, finished_at) \
             select i, e, s::message_state, n, l, r, $7 from unnest($1::bigint[], $2::int[], $3::text[], $4::int[], \
                 $5::text[], $6::text[]) as t (i, e, s, n, l, r) on conflict do nothing",
        )
        .await?;
    let values: [&(dyn ToSql + Sync); 7] = [&ids, &endpoints, &statuses, &attempts, &lanes, &reasons, &now];
    db.execute(&statement, &values).await?;
    Ok(())
}

async fn write_dead_letters(db: &Transaction<'_>, accepted: &[&Record], now: Timestamp) -> Result<()> {
    let (mut ids, mut endpoints, mut lanes, mut reasons, mut attempts, mut statuses, mut errors) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for record in accepted {
        let Verdict::Dead { reason, lane } = &record.verdict else { continue };
        let outcome = record.outcome.as_deref();
        ids.push(record.ticket.id.0);
        endpoints.push(record.ticket.endpoint_id.0);
        lanes.push(lane.as_str());
        reasons.push(reason.as_str());
        attempts.push(record.attempts());
        statuses.push(outcome.and_then(http_status));
        errors.push(outcome.and_then(|outcome| outcome.error.as_deref()).map(storable));
    }
    if ids.is_empty() {
        return Ok(());
    }
    let statement = db
        .prepare_cached(
            "/* ams:write_dead_letters */ insert into dead_letters \
                 (message_id, endpoint_id, lane, reason, attempts, last_status, last_error, dead_at) \
             select t.*, $8 from unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::int[], $6::smallint[], \
                 $7::text[]) t \
             on conflict (message_id, endpoint_id) do update set lane = excluded.lane, reason = excluded.reason, \
                 attempts = excluded.attempts, last_status = excluded.last_status, last_error = excluded.last_error, \
                 dead_at = excluded.dead_at",
        )
        .await?;
    let values: [&(dyn ToSql + Sync); 8] =
        [&ids, &endpoints, &lanes, &reasons, &attempts, &statuses, &errors, &now];
    db.execute(&statement, &values).await?;
    Ok(())
}

/// Writes the attempts that no delivery tells.
async fn write_attempts(db: &Transaction<'_>, records: &[&Record]) -> Result<()> {
    let tried: Vec<(&Record, &Outcome)> =
        records.iter().filter_map(|record| Some((*record, record.outcome.as_deref()?))).collect();
    if tried.is_empty() {
        return Ok(());
    }
    fn column<'a, T>(
        tried: &[(&'a Record, &'a Outcome)],
        value: impl Fn(&'a Record, &'a Outcome) -> T,
    ) -> Vec<T> {
        tried.iter().map(|(record, outcome)| value(record, outcome)).collect()
    }
    let statement = db
        .prepare_cached(
            "/* ams:attempts_write */ insert into attempts (message_id, endpoint_id, batch, attempt, started_at, connect_us, \
                 head_us, body_us, status, lane, class, address, error, provider_message_id, answer) \
             select t.* from unnest($1::bigint[], $2::int[], $3::bigint[], $4::int[], $5::timestamptz[], $6::int[], $7::int[], \
                 $8::int[], $9::smallint[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[], $15::text[]) t \
             on conflict do nothing",
        )
        .await?;
    let values: [&(dyn ToSql + Sync); 15] = [
        &column(&tried, |record, _| record.ticket.id.0),
        &column(&tried, |record, _| record.ticket.endpoint_id.0),
        &column(&tried, |record, _| record.ticket.batch.0),
        &column(&tried, |record, _| record.ticket.attempt),
        &column(&tried, |_, outcome| outcome.started_at),
        &column(&tried, |_, outcome| outcome.times.connect_us),
        &column(&tried, |_, outcome| outcome.times.head_us),
        &column(&tried, |_, outcome| outcome.times.body_us),
        &column(&tried, |_, outcome| http_status(outcome)),
        &column(&tried, |record, _| &*record.lane),
        &column(&tried, |_, outcome| outcome.class.as_str()),
        &column(&tried, |_, outcome| outcome.address.as_str()),
        &column(&tried, |_, outcome| outcome.error.as_deref().map(storable)),
        &column(&tried, |_, outcome| outcome.provider_message_id.as_deref()),
        &column(&tried, |_, outcome| answer(outcome)),
    ];
    db.execute(&statement, &values).await?;
    Ok(())
}

async fn write_stats(db: &Transaction<'_>, accepted: &[&Record], now: Timestamp) -> Result<()> {
    let stats = Stats::of(accepted.iter().copied());
    if stats.endpoints.is_empty() {
        return Ok(());
    }
    let statement = db
        .prepare_cached(
            "/* ams:stats */ insert into stats (endpoint_id, minute, sent, failed, dead, took_us, sent_at) \
             select t.*, case when t.sent > 0 then $7::timestamptz end \
             from unnest($1::int[], $2::timestamptz[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[]) \
                 t(endpoint_id, minute, sent, failed, dead, took_us) \
             on conflict (endpoint_id, minute) do update set sent = stats.sent + excluded.sent, \
                 failed = stats.failed + excluded.failed, dead = stats.dead + excluded.dead, \
                 took_us = stats.took_us + excluded.took_us, sent_at = coalesce(excluded.sent_at, stats.sent_at)",
        )
        .await?;
    let mut values = stats.values().to_vec();
    values.push(&now);
    db.execute(&statement, &values).await?;
    Ok(())
}

/// Marks dead letters as published.
pub(super) async fn dead_lettered(db: &Object, ids: &[MessageId]) -> Result<()> {
    let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
    let statement = db
        .prepare_cached("/* ams:dead_lettered */ delete from dead_letters where message_id = any($1)")
        .await?;
    db.execute(&statement, &[&ids]).await?;
    Ok(())
}
