//! Looking for messages: each filter walks the index that leads to few other rows.
//!
//! The rows of a walk are bounded before they are filtered, so no search reads more than
//! [`WALK`](crate::store::operate::WALK) of them.

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, params_from_iter};

use super::text;
use crate::clock::Timestamp;
use crate::message::MessageId;
use crate::store::Result;
use crate::store::operate::{Cursor, DeadReason, Filter, Found, WALK, Walk};

/// The columns that a filter may ask for; the age as the index of ages has it.
const COLUMNS: &str = "id, status, endpoint, recipient, reason, \
    cast(round((julianday(created_at) - 2440587.5) * 86400000.0) as integer) as age";

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

/// The ids of matching messages, newest first.
pub(super) fn search(db: &Connection, filter: &Filter, from: Cursor, count: usize) -> Result<Found> {
    let by_age = filter.walk() == Walk::Created;
    let mut sql = Sql::default();
    let walk = walk(&mut sql, filter, from);
    let order = if by_age { "age desc, id desc" } else { "id desc" };
    let wanted = wanted(&mut sql, filter);
    let most = sql.value(i64::try_from(count + 1).unwrap_or(i64::MAX));
    let text = format!(
        "/* ams:search */ select id, age from ({walk}) w where {wanted} order by {order} limit {most}"
    );
    let cursors = db
        .prepare_cached(&text)?
        .query_map(params_from_iter(&sql.values), cursor)?
        .collect::<rusqlite::Result<Vec<Cursor>>>()?;
    let ids = cursors.iter().take(count).map(|cursor| cursor.id).collect();
    if cursors.len() > count {
        return Ok(Found { ids, next: cursors.get(count.saturating_sub(1)).copied() });
    }
    Ok(Found { ids, next: end_of_walk(db, filter, from, by_age)? })
}

fn cursor(row: &rusqlite::Row<'_>) -> rusqlite::Result<Cursor> {
    let age: Option<i64> = row.get(1)?;
    Ok(Cursor {
        id: MessageId(row.get(0)?),
        at: Timestamp::from_micros(age.unwrap_or_default().saturating_mul(1_000)),
    })
}

/// Where a walk ended that met its bound; `None` when it came to its end.
fn end_of_walk(db: &Connection, filter: &Filter, from: Cursor, by_age: bool) -> Result<Option<Cursor>> {
    let mut sql = Sql::default();
    let walk = walk(&mut sql, filter, from);
    let order = if by_age { "age, id" } else { "id" };
    let text = format!(
        "/* ams:search_end */ select id, age, count(*) over () from ({walk}) w order by {order} limit 1"
    );
    let last = db
        .prepare_cached(&text)?
        .query_row(params_from_iter(&sql.values), |row| Ok((cursor(row)?, row.get::<_, i64>(2)?)))
        .optional()?;
    Ok(last.filter(|(_, walked)| *walked >= WALK as i64).map(|(cursor, _)| cursor))
}

fn walk(sql: &mut Sql, filter: &Filter, from: Cursor) -> String {
    let id = sql.value(from.id.0);
    let rows = |index: &str, condition: String| {
        format!(
            "select {COLUMNS} from messages {index} where {condition}id < {id} order by id desc limit {WALK}"
        )
    };
    // Cross join: the list leads, and each message is looked up by its id.
    let listed = |ids: String| {
        format!(
            "select {} from ({ids} order by id desc limit {WALK}) l cross join messages on messages.id = l.id",
            COLUMNS.replacen("id,", "messages.id as id,", 1)
        )
    };
    let fresh = "status = 'pending' and held is null and send_at is null and ";
    let waiting = "(timed_at is not null or held is not null) and ";
    match filter.walk() {
        Walk::All => rows("", String::new()),
        Walk::Recipient(recipient) => {
            let recipient = sql.value(recipient.to_owned());
            rows("indexed by messages_by_recipient", format!("recipient = {recipient} and "))
        }
        Walk::Endpoint(endpoint) => {
            let endpoint = sql.value(endpoint.to_owned());
            rows("indexed by messages_by_endpoint", format!("endpoint = {endpoint} and "))
        }
        // A literal: SQLite uses a partial index only when it can see that the condition implies it.
        Walk::Unsent(status) => rows("indexed by messages_unsent", format!("status = '{status}' and ")),
        Walk::Waiting => rows("indexed by messages_waiting", waiting.to_owned()),
        Walk::Pending => {
            let fresh = rows("indexed by messages_fresh", fresh.to_owned());
            let waiting = rows("indexed by messages_waiting", waiting.to_owned());
            format!(
                "select * from (select * from ({fresh}) union all select * from ({waiting})) \
                 order by id desc limit {WALK}"
            )
        }
        Walk::Queued => listed(format!(
            "select distinct value as id from batches, json_each(batches.ids) where value < {id}"
        )),
        Walk::Processing => listed(format!(
            "select distinct value as id from leases, json_each(leases.ids) where value < {id}"
        )),
        Walk::Tried => {
            listed(format!("select distinct message_id as id from attempts where message_id < {id}"))
        }
        Walk::Created => {
            let at = sql.value(age(from.at));
            let after = sql.value(filter.created_after.map_or(i64::MIN, age));
            let age = "cast(round((julianday(created_at) - 2440587.5) * 86400000.0) as integer)";
            let rows = |condition: String| {
                format!(
                    "select {COLUMNS} from messages indexed by messages_by_created_at \
                     where {condition} and {age} >= {after} order by {age} desc, id desc limit {WALK}"
                )
            };
            // Two walks, because a comparison of pairs does not lead SQLite to its place in an index of an expression.
            let (same, older) = (rows(format!("{age} = {at} and id < {id}")), rows(format!("{age} < {at}")));
            format!(
                "select * from (select * from ({same}) union all select * from ({older})) \
                 order by age desc, id desc limit {WALK}"
            )
        }
    }
}

fn wanted(sql: &mut Sql, filter: &Filter) -> String {
    let mut conditions = vec!["true".to_owned()];
    let status = filter.status.map(|status| status.to_string());
    for (column, value) in [
        ("status", &status),
        ("endpoint", &filter.endpoint),
        ("recipient", &filter.recipient),
        ("reason", &filter.reason),
    ] {
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
             select id, reason from messages indexed by messages_unsent where status = 'dead' \
             order by id desc limit 10000) \
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

    /// Steps of SQLite's machine for one walk from its start: what it reads, whatever it gives back.
    fn steps(db: &Connection, filter: &Filter) -> i32 {
        let mut sql = Sql::default();
        let walk = walk(&mut sql, filter, Cursor::start(filter));
        let mut statement = db.prepare(&format!("select count(*) from ({walk})")).unwrap();
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
             update messages set status = 'dead' where id % 2 = 0; \
             update messages set status = 'retrying', due_at = 1 where id % 7 = 0;",
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
            assert!(steps < 80 * WALK as i32, "{steps} steps for {filter:?}");
        }
    }
}
