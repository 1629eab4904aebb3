//! Verdicts, attempts and dead letters.
//!
//! A batch that holds successes only is one statement. With other verdicts in it, it is one transaction
//! whose statements go out together.

use std::borrow::Cow;

use deadpool_postgres::{Object, Transaction};

use super::claim::as_it_was;
use super::{bounds, first_column};
use crate::clock::Timestamp;
use crate::message::{MessageId, Outcome, Verdict};
use crate::retry::summary;
use crate::store::{Record, Records, Result};

/// Bytes of an answer that are kept.
const ANSWER: usize = 4_096;

/// Successes are constant for all rows, so they go by id alone; the attempts and the finished leases of
/// the whole batch go with them. A dead letter that still waits is taken back.
const SENT: &str = "/* ams:sent */ with s as (update messages set status = 'sent', held = null, \
         attempts = attempts + 1, due_at = null, finished_at = $4, reason = null \
         where id = any($1) and id between $2 and $3 and status <> 'sent'), \
     d as (delete from dead_letters where message_id = any($1)), \
     l as (delete from leases where id = any($5)) \
     insert into attempts (message_id, epoch, attempt, lane, class, status, address, error, answer, \
         provider_message_id, started_at, connect_us, head_us, body_us) \
     select * from unnest($6::bigint[], $7::int[], $8::int[], $9::text[], $10::text[], $11::smallint[], \
         $12::text[], $13::text[], $14::text[], $15::text[], $16::timestamptz[], $17::int[], $18::int[], $19::int[]) \
     on conflict do nothing";

/// Values differ for each row, so this one is joined; the CASE hides the guard from statistics that
/// would say "no such row" and make the plan quadratic. The array has it read these rows, and not all that lie
/// between an old message and a new one. The subscripts are there for the planner: it takes an unknown array
/// for ten values, for which it would compare each with each (measured: 219 ms for 1,000 rows, and 30 so), and
/// subscripts for a thousand.
pub(super) const RETRY: &str = "/* ams:retry */ update messages m set status = 'retrying', attempts = m.attempts + 1, \
         lane = v.lane, lane_tries = v.lane_tries, due_at = v.due_at, reason = v.reason \
     from rows from (generate_subscripts($1::bigint[], 1), unnest($1::bigint[], $2::int[], $3::text[], $4::int[], \
         $5::timestamptz[], $6::text[])) as v (n, id, epoch, lane, lane_tries, due_at, reason) \
     where m.id = any($1) and m.id = v.id and m.id between $7 and $8 \
         and case when m.epoch = v.epoch and m.status = 'processing' then true else false end \
     returning m.id";

pub(super) const DEAD: &str = "/* ams:dead */ with v as materialized (select * from rows from ( \
         generate_subscripts($1::bigint[], 1), \
         unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::smallint[], $6::text[])) \
         as v (n, id, epoch, lane, reason, last_status, last_error)), \
     u as (update messages m set status = 'dead', attempts = m.attempts + 1, due_at = null, finished_at = $9, \
             reason = v.reason \
         from v where m.id = any($1) and m.id = v.id and m.id between $7 and $8 \
             and case when m.epoch = v.epoch and m.status = 'processing' then true else false end \
         returning m.id, m.attempts) \
     insert into dead_letters (message_id, lane, reason, attempts, last_status, last_error, dead_at) \
     select u.id, v.lane, v.reason, u.attempts, v.last_status, v.last_error, $9 from u join v on v.id = u.id \
     on conflict (message_id) do update set lane = excluded.lane, reason = excluded.reason, \
         attempts = excluded.attempts, last_status = excluded.last_status, last_error = excluded.last_error, \
         dead_at = excluded.dead_at \
     returning message_id";

pub(super) const RELEASE: &str = concat!(
    "/* ams:release */ update messages m set ",
    as_it_was!("$5"),
    " from rows from (generate_subscripts($1::bigint[], 1), unnest($1::bigint[], $2::int[])) as v (n, id, epoch) \
     where m.id = any($1) and m.id = v.id and m.id between $3 and $4 \
         and case when m.epoch = v.epoch and m.status = 'processing' then true else false end \
     returning m.id"
);

/// Writes records; returns the ids whose verdict was refused.
pub(super) async fn record(db: &mut Object, records: &Records<'_>) -> Result<Vec<MessageId>> {
    let others: Vec<&Record> =
        records.records.iter().filter(|record| record.verdict != Verdict::Sent).collect();
    let sent = Sent::new(records);
    let statement = db.prepare_cached(SENT).await?;
    if others.is_empty() {
        sent.write(db, &statement, records.now).await?;
        return Ok(Vec::new());
    }
    let transaction = db.transaction().await?;
    let (retried, dead, released, _) = tokio::try_join!(
        retry(&transaction, &others),
        dead(&transaction, &others, records.now),
        release(&transaction, &others, records.now),
        sent.write(&transaction, &statement, records.now),
    )?;
    transaction.commit().await?;
    let accepted: std::collections::HashSet<i64> = [retried, dead, released].concat().into_iter().collect();
    Ok(others.iter().map(|record| record.id).filter(|id| !accepted.contains(&id.0)).collect())
}

/// The columns of the first statement.
#[derive(Default)]
struct Sent<'a> {
    ids: Vec<i64>,
    finished: Vec<i64>,
    tried: Vec<(&'a Record, &'a Outcome)>,
}

impl<'a> Sent<'a> {
    fn new(records: &Records<'a>) -> Sent<'a> {
        let sent = records.records.iter().filter(|record| record.verdict == Verdict::Sent);
        Sent {
            ids: sent.map(|record| record.id.0).collect(),
            finished: records.finished.iter().map(|lease| lease.0).collect(),
            tried: records
                .records
                .iter()
                .filter_map(|record| Some((record, record.outcome.as_ref()?)))
                .collect(),
        }
    }

    fn column<T>(&self, value: impl Fn(&'a Record, &'a Outcome) -> T) -> Vec<T> {
        self.tried.iter().map(|(record, outcome)| value(record, outcome)).collect()
    }

    async fn write(
        &self,
        db: &impl deadpool_postgres::GenericClient,
        statement: &tokio_postgres::Statement,
        now: Timestamp,
    ) -> Result<()> {
        let (first, last) = bounds(&self.ids);
        let ids = self.column(|record, _| record.id.0);
        let epochs = self.column(|record, _| record.epoch);
        let attempts = self.column(|record, _| record.attempt);
        let lanes = self.column(|record, _| record.lane.as_str());
        let classes = self.column(|_, outcome| outcome.class.as_str());
        let statuses = self.column(|_, outcome| outcome.status.and_then(|status| i16::try_from(status).ok()));
        let addresses = self.column(|_, outcome| outcome.address.as_str());
        let errors = self.column(|_, outcome| outcome.error.as_deref().map(storable));
        let answers =
            self.column(|_, outcome| storable(&outcome.answer[..outcome.answer.floor_char_boundary(ANSWER)]));
        let provider_ids = self.column(|_, outcome| outcome.provider_message_id.as_deref());
        let starts = self.column(|_, outcome| outcome.started_at);
        let connects = self.column(|_, outcome| outcome.times.connect_us);
        let heads = self.column(|_, outcome| outcome.times.head_us);
        let bodies = self.column(|_, outcome| outcome.times.body_us);
        db.execute(
            statement,
            &[
                &self.ids,
                &first,
                &last,
                &now,
                &self.finished,
                &ids,
                &epochs,
                &attempts,
                &lanes,
                &classes,
                &statuses,
                &addresses,
                &errors,
                &answers,
                &provider_ids,
                &starts,
                &connects,
                &heads,
                &bodies,
            ],
        )
        .await?;
        Ok(())
    }
}

/// PostgreSQL's text can't hold the nul character, and a receiver may answer anything.
fn storable(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { Cow::Owned(text.replace('\0', "")) } else { Cow::Borrowed(text) }
}

async fn retry(db: &Transaction<'_>, records: &[&Record]) -> Result<Vec<i64>> {
    let (mut ids, mut epochs, mut lanes, mut tries, mut dues, mut reasons) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for record in records {
        if let Verdict::Retry { lane, lane_tries, at } = &record.verdict {
            ids.push(record.id.0);
            epochs.push(record.epoch);
            lanes.push(lane.as_str());
            tries.push(*lane_tries);
            dues.push(*at);
            reasons.push(record.outcome.as_ref().map(summary));
        }
    }
    if ids.is_empty() {
        return Ok(ids);
    }
    let statement = db.prepare_cached(RETRY).await?;
    let (first, last) = bounds(&ids);
    let rows = db.query(&statement, &[&ids, &epochs, &lanes, &tries, &dues, &reasons, &first, &last]).await?;
    first_column(&rows)
}

async fn dead(db: &Transaction<'_>, records: &[&Record], now: Timestamp) -> Result<Vec<i64>> {
    let (mut ids, mut epochs, mut lanes, mut reasons, mut statuses, mut errors) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for record in records {
        if let Verdict::Dead { reason, lane } = &record.verdict {
            let outcome = record.outcome.as_ref();
            ids.push(record.id.0);
            epochs.push(record.epoch);
            lanes.push(lane.as_str());
            reasons.push(reason.as_str());
            statuses.push(outcome.and_then(|o| o.status).and_then(|status| i16::try_from(status).ok()));
            errors.push(outcome.and_then(|outcome| outcome.error.as_deref()));
        }
    }
    if ids.is_empty() {
        return Ok(ids);
    }
    let statement = db.prepare_cached(DEAD).await?;
    let (first, last) = bounds(&ids);
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 9] =
        [&ids, &epochs, &lanes, &reasons, &statuses, &errors, &first, &last, &now];
    let rows = db.query(&statement, &values).await?;
    first_column(&rows)
}

async fn release(db: &Transaction<'_>, records: &[&Record], now: Timestamp) -> Result<Vec<i64>> {
    let released = records.iter().filter(|record| record.verdict == Verdict::Release);
    let (ids, epochs): (Vec<i64>, Vec<i32>) = released.map(|record| (record.id.0, record.epoch)).unzip();
    if ids.is_empty() {
        return Ok(ids);
    }
    let statement = db.prepare_cached(RELEASE).await?;
    let (first, last) = bounds(&ids);
    let rows = db.query(&statement, &[&ids, &epochs, &first, &last, &now]).await?;
    first_column(&rows)
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
