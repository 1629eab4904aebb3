//! Instances, the active producer, endpoints and lanes.

use std::time::Duration;

use deadpool_postgres::Object;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{optional_time, time, written};
use crate::clock::Timestamp;
use crate::retry::{Lane, LaneGroup};
use crate::store::{About, Bid, Endpoint, InstanceId, Leadership, Pacing, Result, StoreError};

/// The random number of this store.
pub(super) async fn installation(db: &Object) -> Result<Uuid> {
    Ok(db.query_one("/* ams:installation */ select id from installation", &[]).await?.get(0))
}

/// Makes partitions ahead of the ids in use.
pub(super) async fn make_partitions(db: &Object) -> Result<()> {
    let statement = db.prepare_cached("/* ams:make_partitions */ select make_partitions()").await?;
    db.execute(&statement, &[]).await?;
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
    let settings = serde_json::from_str(row.get(3))
        .map_err(|error| StoreError::Internal(format!("its settings can't be read: {error}")))?;
    Ok(About {
        version: row.get(0),
        now: time(&row, 1),
        connections: row.get::<_, i64>(2).unsigned_abs(),
        settings,
    })
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
    let row =
        db.query_one(statement, &[&service, &host, &version, &written(now), &written(lease_until)]).await?;
    Ok(InstanceId(row.get(0)))
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
    Ok(db.execute(&statement, &[&instance.0, &written(now), &written(lease_until)]).await? > 0)
}

/// Notes which endpoints an instance has said to be busy.
pub(super) async fn say_busy(db: &Object, instance: InstanceId, endpoints: &[String]) -> Result<()> {
    let statement =
        db.prepare_cached("/* ams:say_busy */ update instances set busy = $2 where id = $1").await?;
    db.execute(&statement, &[&instance.0, &endpoints]).await?;
    Ok(())
}

/// The endpoints that some instance has said to be busy.
pub(super) async fn busy(db: &Object) -> Result<Vec<String>> {
    let statement =
        db.prepare_cached("/* ams:busy */ select distinct unnest(busy) from instances order by 1").await?;
    Ok(db.query(&statement, &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// Takes an instance and its leadership away.
pub(super) async fn retire(db: &mut Object, instance: InstanceId) -> Result<()> {
    let transaction = db.transaction().await?;
    transaction.execute("/* ams:retire */ delete from instances where id = $1", &[&instance.0]).await?;
    let abdicate = "/* ams:abdicate */ update leader set owner = null where owner = $1";
    transaction.execute(abdicate, &[&instance.0]).await?;
    Ok(transaction.commit().await?)
}

/// Makes the bidder the leader, unless another's term is not over.
pub(super) async fn lead(db: &Object, bid: &Bid) -> Result<Option<Leadership>> {
    let statement = db
        .prepare_cached(
            "/* ams:lead */ update leader set owner = $1, until = $3, \
                 steady_since = case when until + interval '1 s' <= $2 then $2 else steady_since end, \
                 paced_until = coalesce($4, paced_until), pace_count = $5, pace_interval_ms = $6 \
             where owner is null or owner = $1 or until <= $2 returning steady_since, paced_until, paused",
        )
        .await?;
    let paced_until = bid.paced_until.map(written);
    let pacing = bid.pacing.map(Pacing::numbers);
    let count = pacing.map(|(count, _)| i32::try_from(count).unwrap_or(i32::MAX));
    let interval = pacing.map(|(_, ms)| ms);
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
        [&bid.instance.0, &written(bid.now), &written(bid.until), &paced_until, &count, &interval];
    let won = db.query_opt(&statement, &values).await?;
    Ok(won.map(|row| Leadership {
        steady_since: time(&row, 0),
        paced_until: optional_time(&row, 1),
        paused: row.get(2),
    }))
}

/// All endpoints, by name.
pub(super) async fn endpoints(db: &Object) -> Result<Vec<Endpoint>> {
    let statement = db
        .prepare_cached(
            "/* ams:endpoints */ select name, url, timeout_ms, in_flight_max, final_statuses, enabled, secret \
             from endpoints order by name",
        )
        .await?;
    let rows = db.query(&statement, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| Endpoint {
            name: row.get(0),
            url: row.get(1),
            timeout: Duration::from_millis(row.get::<_, i32>(2).unsigned_abs().into()),
            in_flight_max: row.get::<_, i32>(3).unsigned_abs(),
            final_statuses: row.get::<_, Vec<i32>>(4).iter().filter_map(|s| u16::try_from(*s).ok()).collect(),
            enabled: row.get(5),
            secret: row.get(6),
        })
        .collect())
}

/// Creates or replaces an endpoint.
pub(super) async fn put_endpoint(db: &Object, endpoint: &Endpoint) -> Result<()> {
    let statement = "/* ams:put_endpoint */ insert into endpoints \
                     (name, url, timeout_ms, in_flight_max, final_statuses, enabled, secret) \
                     values ($1, $2, $3, $4, $5, $6, $7) on conflict (name) do update set url = excluded.url, \
                     timeout_ms = excluded.timeout_ms, in_flight_max = excluded.in_flight_max, \
                     final_statuses = excluded.final_statuses, enabled = excluded.enabled, secret = excluded.secret";
    let timeout_ms = i32::try_from(endpoint.timeout.as_millis()).unwrap_or(i32::MAX);
    let in_flight_max = i32::try_from(endpoint.in_flight_max).unwrap_or(i32::MAX);
    let final_statuses: Vec<i32> = endpoint.final_statuses.iter().map(|status| i32::from(*status)).collect();
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 7] = [
        &endpoint.name,
        &endpoint.url,
        &timeout_ms,
        &in_flight_max,
        &final_statuses,
        &endpoint.enabled,
        &endpoint.secret,
    ];
    db.execute(statement, &values).await?;
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
    Ok(rows
        .iter()
        .map(|row| Lane {
            topic: row.get(0),
            group: row.get(1),
            next: row.get(2),
            fresh: row.get(3),
            tries: row.get(4),
            interval: millis(row.get(5)),
            interval_max: millis(row.get(6)),
        })
        .collect())
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
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 8] = [
        &lane.topic,
        &lane.group,
        &lane.next,
        &lane.fresh,
        &lane.tries,
        &interval,
        &interval_max,
        &written(now),
    ];
    db.execute(statement, &values).await?;
    Ok(before.filter(|before| before != lane))
}

/// The consumer groups of all lanes.
pub(super) async fn lane_groups(db: &Object) -> Result<Vec<LaneGroup>> {
    let statement =
        "/* ams:lane_groups */ select topic, consumer_group, seen_at from lane_groups order by 1, 2";
    let statement = db.prepare_cached(statement).await?;
    let rows = db.query(&statement, &[]).await?;
    let group = |row: &Row| LaneGroup { topic: row.get(0), group: row.get(1), seen_at: time(row, 2) };
    Ok(rows.iter().map(group).collect())
}

/// Notes that a group reads a lane; groups that nobody has heard of for long go.
pub(super) async fn put_lane_group(db: &Object, group: &LaneGroup) -> Result<()> {
    let statement = db
        .prepare_cached(
            "/* ams:put_lane_group */ with gone as (delete from lane_groups where topic = $1 \
                 and consumer_group <> $2 and seen_at < $3::timestamptz - interval '1 hour') \
             insert into lane_groups (topic, consumer_group, seen_at) values ($1, $2, $3) \
             on conflict (topic, consumer_group) do update \
             set seen_at = greatest(lane_groups.seen_at, excluded.seen_at)",
        )
        .await?;
    db.execute(&statement, &[&group.topic, &group.group, &written(group.seen_at)]).await?;
    Ok(())
}
