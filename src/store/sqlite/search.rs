//! Looking for messages: each filter scans the index that leads to few other rows.
//!
//! The rows of a scan are bounded before they are filtered, so no search reads more than
//! [`SCAN`](crate::store::operate::SCAN) of them.

use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};

use super::claim::UNCLAIMED;
use super::place::{self, Whereabouts};
use super::text;
use crate::clock::Timestamp;
use crate::message::MessageId;
use crate::store::Result;
use crate::store::operate::{Cursor, DeadReason, Filter, Page, SCAN, Scan};

/// The columns that a filter may ask for; the age as the index of ages has it. Status and reason are the place's.
const COLUMNS: &str = "id, endpoint, recipient, \
    cast(round((julianday(created_at) - 2440587.5) * 86400000.0) as integer) as age";

/// Messages whose places are looked for together.
const PLACES: usize = 256;

/// The values of a statement that is put together.
#[derive(Default)]
struct Sql {
    values: Vec<Value>,
}

impl Sql {
    /// Where the value stands in the statement.
    fn value(&mut self, value: impl Into<Value>) -> String {
        self.values.push(value.into());
        format!("?{}", self.values.len())
    }
}

/// A time as the index of ages has it. A bound between two milliseconds is the later one.
fn age(time: Timestamp) -> i64 {
    time.as_micros().div_euclid(1_000) + i64::from(time.as_micros().rem_euclid(1_000) > 0)
}

/// A message of a scan.
struct Walked {
    cursor: Cursor,
    /// Whether its columns are those that the filter wants.
    wanted: bool,
}

/// The ids of matching messages, newest first.
pub(super) fn search(db: &Connection, filter: &Filter, from: Cursor, count: usize) -> Result<Page> {
    let mut sql = Sql::default();
    let scan = scan(&mut sql, filter, from);
    let order = if filter.scan() == Scan::Created { "age desc, id desc" } else { "id desc" };
    let wanted = wanted(&mut sql, filter);
    let walked = db
        .prepare_cached(&format!(
            "/* ams:search */ select id, age, {wanted} from ({scan}) w order by {order}"
        ))?
        .query_map(params_from_iter(&sql.values), |row| {
            let age: Option<i64> = row.get(1)?;
            let at = Timestamp::from_micros(age.unwrap_or_default().saturating_mul(1_000));
            Ok(Walked { cursor: Cursor { id: MessageId(row.get(0)?), at }, wanted: row.get(2)? })
        })?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let candidates: Vec<Cursor> = walked.iter().filter(|row| row.wanted).map(|row| row.cursor).collect();
    let mut found: Vec<Cursor> = Vec::new();
    for some in candidates.chunks(PLACES) {
        found.extend(with_status(db, filter, some)?);
        if found.len() > count {
            break;
        }
    }
    let next = if found.len() > count {
        found.get(count.saturating_sub(1)).copied()
    } else {
        // The scan has met its bound, or its end.
        walked.last().filter(|_| walked.len() >= SCAN).map(|row| row.cursor)
    };
    found.truncate(count);
    Ok(Page { ids: found.into_iter().map(|cursor| cursor.id).collect(), next })
}

/// Those of these messages that stand where the filter wants them.
fn with_status(db: &Connection, filter: &Filter, some: &[Cursor]) -> Result<Vec<Cursor>> {
    if filter.status.is_none() && filter.reason.is_none() {
        return Ok(some.to_vec());
    }
    let ids: Vec<MessageId> = some.iter().map(|cursor| cursor.id).collect();
    let places = place::find(db, &ids)?;
    let nowhere = Whereabouts::NEW;
    let stands = |cursor: &Cursor| {
        let at = places.get(&cursor.id).unwrap_or(&nowhere);
        filter.status.is_none_or(|status| status == at.status)
            && (filter.reason.is_none() || filter.reason == at.reason)
    };
    Ok(some.iter().copied().filter(stands).collect())
}

fn scan(sql: &mut Sql, filter: &Filter, from: Cursor) -> String {
    let id = sql.value(from.id.0);
    let rows = |index: &str, condition: String| {
        format!(
            "select {COLUMNS} from messages {index} where {condition}id < {id} order by id desc limit {SCAN}"
        )
    };
    // Cross join: the list leads, and each message is looked up by its id.
    let listed = |ids: String| {
        format!(
            "select {} from (select id from ({ids}) order by id desc limit {SCAN}) l cross join messages on messages.id = l.id",
            COLUMNS.replacen("id,", "messages.id as id,", 1)
        )
    };
    // Also those that have been tried or not: to tell them apart here would read all of the others.
    let waiting = |limit| format!("select message_id as id from waiting where message_id < {id} {limit}");
    let newest = format!("order by message_id desc limit {SCAN}");
    match filter.scan() {
        Scan::All => rows("", String::new()),
        Scan::Recipient(recipient) => {
            let recipient = sql.value(recipient.to_owned());
            rows("indexed by messages_by_recipient", format!("recipient = {recipient} and "))
        }
        Scan::Endpoint(endpoint) => {
            let endpoint = sql.value(endpoint.to_owned());
            rows("indexed by messages_by_endpoint", format!("endpoint = {endpoint} and "))
        }
        // A literal: SQLite uses a partial index only when it can see that the condition implies it.
        Scan::Unsent(status) => listed(format!(
            "select message_id as id from deliveries indexed by deliveries_unsent \
             where status <> 'sent' and status = '{status}' and message_id < {id} {newest}"
        )),
        Scan::Waiting => listed(waiting(newest.as_str())),
        Scan::Pending => {
            let new = UNCLAIMED.map(|source| {
                format!(
                    "select id from (select m.id{source} and m.id < {id} order by m.id desc limit {SCAN})"
                )
            });
            let waiting = format!("select id from ({})", waiting(newest.as_str()));
            listed(format!("select id from ({} union all {waiting})", new.join(" union all ")))
        }
        Scan::Queued => listed(left("batches", &id)),
        Scan::Processing => listed(left("leases", &id)),
        Scan::Tried => listed(format!(
            "select distinct message_id as id from deliveries where message_id < {id} {newest}"
        )),
        Scan::Created => {
            let at = sql.value(age(from.at));
            let after = sql.value(filter.created_after.map_or(i64::MIN, age));
            let age = "cast(round((julianday(created_at) - 2440587.5) * 86400000.0) as integer)";
            let rows = |condition: String| {
                format!(
                    "select {COLUMNS} from messages indexed by messages_by_created_at \
                     where {condition} and {age} >= {after} order by {age} desc, id desc limit {SCAN}"
                )
            };
            // Two scans, because a comparison of pairs does not lead SQLite to its place in an index of an expression.
            let (same, older) = (rows(format!("{age} = {at} and id < {id}")), rows(format!("{age} < {at}")));
            format!(
                "select * from (select * from ({same}) union all select * from ({older})) \
                 order by age desc, id desc limit {SCAN}"
            )
        }
    }
}

/// The ids below one that stand in these batches or leases.
fn left(table: &str, id: &str) -> String {
    format!(
        "select distinct value as id from {table}, json_each({table}.ids) at \
         where lo < {id} and value < {id} and substr(\"left\", at.key + 1, 1) = '1'"
    )
}

fn wanted(sql: &mut Sql, filter: &Filter) -> String {
    let mut conditions = vec!["true".to_owned()];
    for (column, value) in [("endpoint", &filter.endpoint), ("recipient", &filter.recipient)] {
        if let Some(value) = value {
            conditions.push(format!("{column} = {}", sql.value(value.clone())));
        }
    }
    if let Some(after) = filter.created_after {
        conditions.push(format!("age >= {}", sql.value(age(after))));
    }
    if let Some(before) = filter.created_before {
        conditions.push(format!("age < {}", sql.value(age(before))));
    }
    conditions.join(" and ")
}

/// Why the newest dead messages are dead.
pub(super) fn dead_reasons(db: &Connection) -> Result<Vec<DeadReason>> {
    let mut statement = db.prepare_cached(
        "/* ams:dead_reasons */ select coalesce(reason, ''), count(*), max(id) from ( \
             select message_id as id, reason from deliveries indexed by deliveries_unsent \
             where status <> 'sent' and status = 'dead' order by message_id desc limit 10000) \
         group by 1 order by 2 desc, 1",
    )?;
    let reasons = statement.query_map([], |row| {
        Ok(DeadReason {
            reason: text(row, 0)?,
            count: row.get::<_, i64>(1)?.unsigned_abs(),
            newest: MessageId(row.get(2)?),
        })
    })?;
    Ok(reasons.collect::<rusqlite::Result<_>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Status;
    use crate::store::sqlite::{Backend, SqliteStore, lock};

    /// Steps of SQLite's machine for one scan from its start: what it reads, whatever it gives back.
    fn steps(db: &Connection, filter: &Filter) -> i32 {
        let mut sql = Sql::default();
        let scan = scan(&mut sql, filter, Cursor::start(filter));
        let mut statement = db.prepare(&format!("select count(*) from ({scan})")).unwrap();
        statement.query_row(params_from_iter(&sql.values), |row| row.get::<_, i64>(0)).unwrap();
        statement.get_status(rusqlite::StatementStatus::VmStep)
    }

    #[test]
    fn no_walk_reads_more_than_its_bound() {
        let store = SqliteStore::in_memory().unwrap();
        let Backend::Inline(connection) = &*store.backend else { panic!("in_memory has no threads") };
        let db = lock(connection);
        db.execute_batch(
            "insert into messages (recipient, content, created_at) \
             with recursive n(i) as (select 1 union all select i + 1 from n where i < 60000) \
             select '+' || i % 7, 'Hello', strftime('%Y-%m-%dT%H:%M:%fZ', i, 'unixepoch') from n; \
             update feed set position = 30000 where class = 1; \
             insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at) \
             select id, 1, case id % 3 when 0 then 'sent' else 'dead' end, 1, 'messages', 1 from messages \
             where id <= 30000 and id % 2 = 0; \
             insert into waiting (message_id, endpoint_id, due_at, attempts, lane, lane_tries, priority) \
             select id, 1, 1, id % 7 = 0, 'messages', 0, 0 from messages where id <= 30000 and id % 2 = 1;",
        )
        .unwrap();
        let filter = Filter::default;
        let text = |text: &str| Some(text.to_owned());
        let at = |second: i64| Some(Timestamp::from_micros(second * 1_000_000));
        let mut filters = vec![
            filter(),
            Filter { recipient: text("+1"), ..filter() },
            Filter { endpoint: text("default"), ..filter() },
            Filter { endpoint: text("rare"), ..filter() },
            Filter { created_after: at(59_000), ..filter() },
            Filter { created_before: at(5_000), ..filter() },
            Filter { created_after: at(4_000), created_before: at(5_000), ..filter() },
        ];
        filters.extend(Status::ALL.map(|status| Filter { status: Some(status), ..filter() }));
        for filter in filters {
            let steps = steps(&db, &filter);
            assert!(steps < 80 * SCAN as i32, "{steps} steps for {filter:?}");
        }
    }
}
