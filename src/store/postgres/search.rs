//! Looking for messages: each filter scans the index that leads to few other rows.
//!
//! The rows of a scan are bounded before they are filtered, so no search reads more than
//! [`SCAN`](crate::store::operate::SCAN) of them.

use deadpool_postgres::GenericClient;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::read::unclaimed_of;
use super::read_all;
use crate::clock::Timestamp;
use crate::message::MessageId;
use crate::store::Urgency;
use crate::store::operate::{Cursor, DeadReason, Filter, Page, SCAN, Scan};
use crate::store::{Result, limit};

/// The columns that a filter may ask for.
const COLUMNS: &str = "id, endpoint, recipient, created_at";

/// A statement that is put together with its values.
#[derive(Default)]
struct Sql {
    values: Vec<Box<dyn ToSql + Sync + Send>>,
}

impl Sql {
    /// Where the value stands in the statement.
    fn value(&mut self, value: impl ToSql + Sync + Send + 'static) -> String {
        self.values.push(Box::new(value));
        format!("${}", self.values.len())
    }

    fn values(&self) -> Vec<&(dyn ToSql + Sync)> {
        self.values.iter().map(|value| value.as_ref() as &(dyn ToSql + Sync)).collect()
    }
}

/// The ids of matching messages, newest first.
pub(super) async fn search(
    db: &impl GenericClient,
    filter: &Filter,
    from: Cursor,
    count: usize,
) -> Result<Page> {
    let mut sql = Sql::default();
    let scan = scan(&mut sql, filter, from);
    // The order of the scan, column by column, so that no more of it is read than the page needs.
    let order = match filter.scan() {
        Scan::Created => "created_at desc, id desc",
        Scan::Recipient(_) => "recipient desc, id desc",
        Scan::Endpoint(_) => "endpoint desc, id desc",
        _ => "id desc",
    };
    let wanted = wanted(&mut sql, filter);
    let most = sql.value(limit(count + 1));
    let text = format!(
        "/* ams:search */ select id, created_at from ({scan}) w \
             cross join lateral (select status, reason from places where message_id = w.id limit 1) p \
         where {wanted} order by {order} limit {most}"
    );
    let rows = db.query(&db.prepare_cached(&text).await?, &sql.values()).await?;
    let cursors = read_all(&rows, cursor)?;
    let ids = cursors.iter().take(count).map(|cursor| cursor.id).collect();
    if cursors.len() > count {
        return Ok(Page { ids, next: cursors.get(count.saturating_sub(1)).copied() });
    }
    Ok(Page { ids, next: end_of_scan(db, filter, from).await? })
}

fn cursor(row: &Row) -> Result<Cursor> {
    Ok(Cursor { at: row.try_get(1)?, id: MessageId(row.try_get(0)?) })
}

/// Where a scan ended that met its bound; `None` when it came to its end.
async fn end_of_scan(db: &impl GenericClient, filter: &Filter, from: Cursor) -> Result<Option<Cursor>> {
    let mut sql = Sql::default();
    let scan = scan(&mut sql, filter, from);
    let order = if filter.scan() == Scan::Created { "created_at, id" } else { "id" };
    let text = format!(
        "/* ams:search_end */ select id, created_at, count(*) over () from ({scan}) w order by {order} limit 1"
    );
    let last = db.query_opt(&db.prepare_cached(&text).await?, &sql.values()).await?;
    let Some(last) = last else { return Ok(None) };
    let scanned: i64 = last.try_get(2)?;
    (scanned >= limit(SCAN)).then(|| cursor(&last)).transpose()
}

fn scan(sql: &mut Sql, filter: &Filter, from: Cursor) -> String {
    let id = sql.value(from.id.0);
    let rows = |condition: String| {
        format!("select {COLUMNS} from messages where {condition}id < {id} order by id desc limit {SCAN}")
    };
    // Not `column = value order by id`: the planner may then read all messages by id until it has found
    // enough, which for a rare value is all of them. This order only the index of the column has.
    let among = |column: &str, value: String| {
        format!(
            "select {COLUMNS} from messages where ({column}, id) < ({value}, {id}) and {column} >= {value} \
             order by {column} desc, id desc limit {SCAN}"
        )
    };
    // Each row is looked up by its id: a join would let the planner read all messages for the order.
    let listed = |ids: String| {
        format!(
            "select l.id, m.* from ({ids} order by id desc limit {SCAN}) l cross join lateral \
             (select {} from messages where messages.id = l.id limit 1) m",
            COLUMNS.trim_start_matches("id, ")
        )
    };
    match filter.scan() {
        Scan::All => rows(String::new()),
        Scan::Recipient(recipient) => {
            among("recipient", format!("{}::text", sql.value(recipient.to_owned())))
        }
        Scan::Endpoint(endpoint) => among("endpoint", format!("{}::text", sql.value(endpoint.to_owned()))),
        Scan::Unsent(status) => {
            let status = format!("{}::text::message_state", sql.value(status.as_str()));
            listed(format!(
                "select id from (select message_id as id from deliveries where status <> 'sent' \
                     and (status, message_id) < ({status}, {id}) and status >= {status} \
                 order by status desc, message_id desc limit {SCAN}) d"
            ))
        }
        Scan::Waiting => listed(format!("select message_id as id from waiting where message_id < {id}")),
        Scan::Pending => {
            let waiting = listed(format!("select message_id as id from waiting where message_id < {id}"));
            // A feed's index is in the order of the transactions, not of the ids: it gives all that is new or nothing. Where
            // more is new than a scan is long, most of the newest messages are among it.
            let (wanted, order) = (format!("and id < {id}"), format!("order by tx, id limit {}", SCAN + 1));
            let new: Vec<String> = Urgency::ALL
                .into_iter()
                .map(|urgency| format!("({})", unclaimed_of(urgency, COLUMNS, &wanted, &order)))
                .collect();
            let (new, newest) =
                (new.join(" union all "), rows(format!("(select count(*) from new) > {SCAN} and ")));
            format!(
                "with new as materialized ({new}) select {COLUMNS} from ( \
                     (select {COLUMNS} from new where (select count(*) from new) <= {SCAN}) \
                     union ({newest}) union ({waiting})) u order by id desc limit {SCAN}"
            )
        }
        Scan::Queued => listed(left("batches", &id)),
        Scan::Processing => listed(left("leases", &id)),
        Scan::Tried => listed(format!(
            "select id from (select message_id as id from deliveries where message_id < {id} \
             order by message_id desc limit {SCAN}) d"
        )),
        Scan::Created => {
            let at = sql.value(from.at);
            let after = sql.value(filter.created_after.unwrap_or(Timestamp::MIN));
            format!(
                "select {COLUMNS} from messages where (created_at, id) < ({at}, {id}) and created_at >= {after} \
                 order by created_at desc, id desc limit {SCAN}"
            )
        }
    }
}

/// The ids below one whose bits are set in these batches or leases.
fn left(table: &str, id: &str) -> String {
    format!(
        "select distinct t.id from {table} x, unnest(x.ids) with ordinality t (id, place) \
         where get_bit(x.\"left\", (t.place - 1)::int) = 1 and t.id < {id}"
    )
}

fn wanted(sql: &mut Sql, filter: &Filter) -> String {
    let mut conditions = vec!["true".to_owned()];
    if let Some(status) = filter.status {
        conditions.push(format!("status = {}::text::message_state", sql.value(status.as_str())));
    }
    for (column, value) in
        [("endpoint", &filter.endpoint), ("recipient", &filter.recipient), ("reason", &filter.reason)]
    {
        if let Some(value) = value {
            conditions.push(format!("{column} = {}", sql.value(value.clone())));
        }
    }
    if let Some(after) = filter.created_after {
        conditions.push(format!("created_at >= {}", sql.value(after)));
    }
    if let Some(before) = filter.created_before {
        conditions.push(format!("created_at < {}", sql.value(before)));
    }
    conditions.join(" and ")
}

/// Why the newest dead messages are dead.
pub(super) async fn dead_reasons(db: &impl GenericClient) -> Result<Vec<DeadReason>> {
    let statement = db
        .prepare_cached(
            "/* ams:dead_reasons */ select coalesce(reason, ''), count(*), max(id) from ( \
                 select message_id as id, reason from deliveries where status <> 'sent' and status = 'dead' \
                 order by status desc, message_id desc limit 10000) newest \
             group by 1 order by 2 desc, 1",
        )
        .await?;
    let rows = db.query(&statement, &[]).await?;
    read_all(&rows, |row| {
        Ok(DeadReason {
            reason: row.try_get(0)?,
            count: row.try_get::<_, i64>(1)?.unsigned_abs(),
            newest: MessageId(row.try_get(2)?),
        })
    })
}
