//! Instances, the active producer, endpoints and lanes.

use std::time::Duration;

use deadpool_postgres::Object;
use tokio_postgres::Row;
use uuid::Uuid;

use super::schema::make_partition;
use super::{first_column, read_all};
use crate::clock::Timestamp;
use crate::lane::{Lane, LaneGroup};
use crate::rate::Rate;
use crate::store::{About, Bid, Endpoint, InstanceId, Leadership, Result, StoreError, latest_present};

/// The random number of this store.
pub(super) async fn installation(db: &Object) -> Result<Uuid> {
    Ok(db.query_one("/* ams:installation */ select id from installation", &[]).await?.try_get(0)?)
}

/// Makes partitions ahead of the ids in use, each in a transaction of its own.
pub(super) async fn make_partitions(db: &Object) -> Result<()> {
    while make_partition(db).await? {}
    Ok(())
}

/// What the server says of itself. One that does not know a setting has nothing to say of it.
pub(super) async fn about(db: &Object) -> Result<About> {
    let statement = "/* ams:about */ select current_setting('server_version'), clock_timestamp(), \
                     (select count(*) from pg_stat_activity where backend_type = 'client backend'), \
                     (select coalesce(jsonb_object_agg(name, setting), '{}')::text from pg_settings where name in \
                     ('fsync', 'synchronous_commit', 'full_page_writes', 'max_connections', \
                     'superuser_reserved_connections', 'transaction_read_only'))";
    let row = db.query_one(statement, &[]).await?;
    let settings = serde_json::from_str(row.try_get(3)?)
        .map_err(|error| StoreError::Internal(format!("its settings can't be read: {error}")))?;
    Ok(About {
        version: row.try_get(0)?,
        now: row.try_get(1)?,
        connections: row.try_get::<_, i64>(2)?.unsigned_abs(),
        settings,
    })
}

/// What the server's clock says.
pub(super) async fn time(db: &Object) -> Result<Timestamp> {
    Ok(db.query_one("/* ams:time */ select clock_timestamp()", &[]).await?.try_get(0)?)
}

/// Registers a process.
pub(super) async fn enroll(
    db: &Object,
    service: &str,
    host: &str,
    now: Timestamp,
    lease_until: Timestamp,
) -> Result<InstanceId> {
    let statement = "/* ams:enroll */ insert into instances \
                     (service, host, version, started_at, seen_at, lease_until) values ($1, $2, $3, $4, $4, $5) returning id";
    let version = env!("CARGO_PKG_VERSION");
    let row = db.query_one(statement, &[&service, &host, &version, &now, &lease_until]).await?;
    Ok(InstanceId(row.try_get(0)?))
}

/// Renews a lease that has not been taken away.
pub(super) async fn renew(
    db: &Object,
    instance: InstanceId,
    now: Timestamp,
    lease_until: Timestamp,
) -> Result<bool> {
    let statement = db
        .prepare_cached("/* ams:renew */ update instances set seen_at = $2, lease_until = $3 where id = $1")
        .await?;
    Ok(db.execute(&statement, &[&instance.0, &now, &lease_until]).await? > 0)
}

/// Notes which endpoints are saturated, as an instance says.
pub(super) async fn report_saturated(db: &Object, instance: InstanceId, endpoints: &[String]) -> Result<()> {
    let statement = db
        .prepare_cached("/* ams:report_saturated */ update instances set saturated = $2 where id = $1")
        .await?;
    db.execute(&statement, &[&instance.0, &endpoints]).await?;
    Ok(())
}

/// The endpoints that are saturated, as some instance says.
pub(super) async fn saturated(db: &Object) -> Result<Vec<String>> {
    let statement = db
        .prepare_cached("/* ams:saturated */ select distinct unnest(saturated) from instances order by 1")
        .await?;
    first_column(&db.query(&statement, &[]).await?)
}

/// Takes an instance and its leadership away.
pub(super) async fn retire(db: &mut Object, instance: InstanceId) -> Result<()> {
    let transaction = db.transaction().await?;
    transaction.execute("/* ams:retire */ delete from instances where id = $1", &[&instance.0]).await?;
    let step_down = "/* ams:step_down */ update leader set owner = null where owner = $1";
    transaction.execute(step_down, &[&instance.0]).await?;
    Ok(transaction.commit().await?)
}

/// Makes the bidder the leader, unless another's term is not over.
pub(super) async fn lead(db: &Object, bid: &Bid) -> Result<Option<Leadership>> {
    let statement = db
        .prepare_cached(
            "/* ams:lead */ update leader set owner = $1, until = $3, \
                 steady_since = case when until + interval '1 s' <= $2 or until > $7 or steady_since > $2 then $2 \
                     else steady_since end, \
                 paced_until = coalesce($4, paced_until), pace_count = $5, pace_interval_ms = $6 \
             where owner is null or owner = $1 or until <= $2 or until > $7 \
             returning steady_since, paced_until, paused",
        )
        .await?;
    let paced_until = bid.paced_until;
    let pacing = bid.pacing.map(Rate::numbers);
    let count = pacing.map(|(count, _)| i32::try_from(count).unwrap_or(i32::MAX));
    let interval = pacing.map(|(_, ms)| ms);
    let latest = bid.latest_until();
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
        [&bid.instance.0, &bid.now, &bid.until, &paced_until, &count, &interval, &latest];
    let won = db.query_opt(&statement, &values).await?;
    won.map(|row| {
        Ok(Leadership {
            steady_since: row.try_get::<_, Option<Timestamp>>(0)?.unwrap_or(bid.now),
            paced_until: row.try_get(1)?,
            paused: row.try_get(2)?,
        })
    })
    .transpose()
}

/// All endpoints, by name.
pub(super) async fn endpoints(db: &Object) -> Result<Vec<Endpoint>> {
    let statement = db
        .prepare_cached(
            "/* ams:endpoints */ select name, url, timeout_ms, in_flight_max, rate_count, rate_interval_ms, final_statuses, enabled, secret \
             from endpoints order by name",
        )
        .await?;
    let rows = db.query(&statement, &[]).await?;
    read_all(&rows, |row| {
        Ok(Endpoint {
            name: row.try_get(0)?,
            url: row.try_get(1)?,
            timeout: Duration::from_millis(row.try_get::<_, i32>(2)?.unsigned_abs().into()),
            in_flight_max: row.try_get::<_, i32>(3)?.unsigned_abs(),
            rate: rate(row, 4)?,
            final_statuses: final_statuses(row, 6),
            enabled: row.try_get(7)?,
            secret: row.try_get(8)?,
        })
    })
}

/// The rate of an endpoint, in two columns from the first on.
pub(super) fn rate(row: &Row, first: usize) -> Result<Option<Rate>> {
    let ms: i32 = row.try_get(first + 1)?;
    Ok(row.try_get::<_, Option<i32>>(first)?.map(|count| Rate::of(count.into(), ms.into())))
}

/// Statuses of an endpoint. What is no status is passed over: a list that the program can't hold, written
/// past the trigger, must not stop the messages of all endpoints.
fn final_statuses(row: &Row, column: usize) -> Vec<u16> {
    let listed: Vec<Option<i32>> = row.try_get(column).unwrap_or_default();
    listed.into_iter().flatten().filter_map(|status| u16::try_from(status).ok()).collect()
}

/// Creates or replaces an endpoint.
pub(super) async fn put_endpoint(db: &Object, endpoint: &Endpoint) -> Result<()> {
    // The change first: the trigger of an insert takes a number for the endpoint, also when it then comes to a change.
    let change = "/* ams:change_endpoint */ update endpoints set url = $2, timeout_ms = $3, in_flight_max = $4, \
                  rate_count = $5, rate_interval_ms = $6, final_statuses = $7, enabled = $8, secret = $9 where name = $1";
    let insert = "/* ams:put_endpoint */ insert into endpoints \
                  (name, url, timeout_ms, in_flight_max, rate_count, rate_interval_ms, final_statuses, enabled, secret) \
                  values ($1, $2, $3, $4, $5, $6, $7, $8, $9) on conflict (name) do update set url = excluded.url, \
                  timeout_ms = excluded.timeout_ms, in_flight_max = excluded.in_flight_max, \
                  rate_count = excluded.rate_count, rate_interval_ms = excluded.rate_interval_ms, \
                  final_statuses = excluded.final_statuses, enabled = excluded.enabled, secret = excluded.secret";
    let timeout_ms = i32::try_from(endpoint.timeout.as_millis()).unwrap_or(i32::MAX);
    let in_flight_max = i32::try_from(endpoint.in_flight_max).unwrap_or(i32::MAX);
    let number = |number: i64| i32::try_from(number).unwrap_or(i32::MAX);
    let (rate_count, rate_interval_ms) = Rate::columns(endpoint.rate);
    let (rate_count, rate_interval_ms) = (rate_count.map(number), number(rate_interval_ms));
    let final_statuses: Vec<i32> = endpoint.final_statuses.iter().map(|status| i32::from(*status)).collect();
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 9] = [
        &endpoint.name,
        &endpoint.url,
        &timeout_ms,
        &in_flight_max,
        &rate_count,
        &rate_interval_ms,
        &final_statuses,
        &endpoint.enabled,
        &endpoint.secret,
    ];
    if db.execute(change, &values).await? == 0 {
        db.execute(insert, &values).await?;
    }
    Ok(())
}

/// All lanes, by topic.
pub(super) async fn lanes(db: &Object) -> Result<Vec<Lane>> {
    let statement = db
        .prepare_cached(
            "/* ams:lanes */ select topic, consumer_group, next, fresh, tries, interval_ms, interval_max_ms \
             from lanes order by topic",
        )
        .await?;
    let rows = db.query(&statement, &[]).await?;
    let millis = |value: i64| Duration::from_millis(value.unsigned_abs());
    read_all(&rows, |row| {
        Ok(Lane {
            topic: row.try_get(0)?,
            group: row.try_get(1)?,
            next: row.try_get(2)?,
            fresh: row.try_get(3)?,
            tries: row.try_get(4)?,
            interval: millis(row.try_get(5)?),
            interval_max: millis(row.try_get(6)?),
        })
    })
}

/// Registers a lane; returns what stood there before, if it was different.
pub(super) async fn put_lane(db: &Object, lane: &Lane, now: Timestamp) -> Result<Option<Lane>> {
    let before = lanes(db).await?.into_iter().find(|before| before.topic == lane.topic);
    let statement = "/* ams:put_lane */ insert into lanes \
                     (topic, consumer_group, next, fresh, tries, interval_ms, interval_max_ms, registered_at) \
                     values ($1, $2, $3, $4, $5, $6, $7, $8) on conflict (topic) do update set \
                     consumer_group = excluded.consumer_group, next = excluded.next, fresh = excluded.fresh, \
                     tries = excluded.tries, interval_ms = excluded.interval_ms, \
                     interval_max_ms = excluded.interval_max_ms, registered_at = excluded.registered_at";
    let millis = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    let (interval, interval_max) = (millis(lane.interval), millis(lane.interval_max));
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 8] =
        [&lane.topic, &lane.group, &lane.next, &lane.fresh, &lane.tries, &interval, &interval_max, &now];
    db.execute(statement, &values).await?;
    Ok(before.filter(|before| before != lane))
}

/// The consumer groups of all lanes.
pub(super) async fn lane_groups(db: &Object) -> Result<Vec<LaneGroup>> {
    let statement =
        "/* ams:lane_groups */ select topic, consumer_group, seen_at from lane_groups order by 1, 2";
    let statement = db.prepare_cached(statement).await?;
    let rows = db.query(&statement, &[]).await?;
    read_all(&rows, |row| {
        Ok(LaneGroup { topic: row.try_get(0)?, group: row.try_get(1)?, seen_at: row.try_get(2)? })
    })
}

/// Notes that a group reads a lane. Groups that nobody has heard of for long go, and what was heard of them by a
/// clock that was ahead: the living would seem silent beside them.
pub(super) async fn put_lane_group(db: &Object, group: &LaneGroup) -> Result<()> {
    let statement = db
        .prepare_cached(
            "/* ams:put_lane_group */ with gone as (delete from lane_groups where topic = $1 \
                 and consumer_group <> $2 and (seen_at < $3::timestamptz - interval '1 hour' or seen_at > $4)) \
             insert into lane_groups (topic, consumer_group, seen_at) values ($1, $2, $3) \
             on conflict (topic, consumer_group) do update \
             set seen_at = case when lane_groups.seen_at > $4 then excluded.seen_at \
                 else greatest(lane_groups.seen_at, excluded.seen_at) end",
        )
        .await?;
    let latest = latest_present(group.seen_at);
    db.execute(&statement, &[&group.topic, &group.group, &group.seen_at, &latest]).await?;
    Ok(())
}
