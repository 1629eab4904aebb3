//! Instances, the active producer and lanes.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use uuid::Uuid;

use super::{json, list, our_optional_time, our_time, text};
use crate::clock::Timestamp;
use crate::lane::{Lane, LaneGroup};
use crate::rate::Rate;
use crate::store::{About, Bid, InstanceId, Leadership, Result, StoreError, latest_present};

/// The random number of this store.
pub(super) fn installation(db: &Connection) -> Result<Uuid> {
    let id = db
        .prepare_cached("/* ams:installation */ select id from installation")?
        .query_row([], |row| text(row, 0))?;
    Uuid::parse_str(&id)
        .map_err(|error| StoreError::Internal(format!("`{id}` is no installation id: {error}")))
}

/// What the library says of itself and the file.
pub(super) fn about(db: &Connection) -> Result<About> {
    let now =
        "/* ams:about */ select cast(round((julianday('now') - 2440587.5) * 86400000.0) as integer) * 1000";
    let journal: String = db.query_row("pragma journal_mode", [], |row| row.get(0))?;
    Ok(About {
        version: rusqlite::version().to_owned(),
        now: db.query_row(now, [], |row| our_time(row, 0))?,
        settings: [("journal_mode".to_owned(), journal)].into(),
        connections: 0,
    })
}

/// Registers a process.
pub(super) fn enroll(
    db: &Connection,
    service: &str,
    host: &str,
    now: Timestamp,
    lease_until: Timestamp,
) -> Result<InstanceId> {
    let (now, until) = (now.as_micros(), lease_until.as_micros());
    db.prepare_cached(
        "/* ams:enroll */ insert into instances (service, host, version, started_at, seen_at, lease_until) \
         values (?1, ?2, ?3, ?4, ?4, ?5)",
    )?
    .execute(params![service, host, env!("CARGO_PKG_VERSION"), now, until])?;
    Ok(InstanceId(db.last_insert_rowid()))
}

/// Renews a lease that has not been taken away.
pub(super) fn renew(
    db: &Connection,
    instance: InstanceId,
    now: Timestamp,
    lease_until: Timestamp,
) -> Result<bool> {
    let count = db
        .prepare_cached("/* ams:renew */ update instances set seen_at = ?2, lease_until = ?3 where id = ?1")?
        .execute(params![instance.0, now.as_micros(), lease_until.as_micros()])?;
    Ok(count > 0)
}

/// Notes which endpoints an instance has said to be busy.
pub(super) fn report_saturated(db: &Connection, instance: InstanceId, endpoints: &[String]) -> Result<()> {
    db.prepare_cached("/* ams:report_saturated */ update instances set saturated = ?2 where id = ?1")?
        .execute(params![instance.0, json(&endpoints)?])?;
    Ok(())
}

/// The endpoints that some instance has said to be busy.
pub(super) fn saturated(db: &Connection) -> Result<Vec<String>> {
    let mut statement =
        db.prepare_cached("/* ams:saturated */ select saturated from instances where saturated <> '[]'")?;
    let mut rows = statement.query([])?;
    let mut all = std::collections::BTreeSet::new();
    while let Some(row) = rows.next()? {
        all.extend(list::<String>(&text(row, 0)?)?);
    }
    Ok(all.into_iter().collect())
}

/// Takes an instance and its leadership away.
pub(super) fn retire(db: &Connection, instance: InstanceId) -> Result<()> {
    db.prepare_cached("/* ams:retire */ delete from instances where id = ?1")?.execute([instance.0])?;
    db.prepare_cached("/* ams:step_down */ update leader set owner = null where owner = ?1")?
        .execute([instance.0])?;
    Ok(())
}

/// Makes the bidder the leader, unless another's term is not over.
pub(super) fn lead(db: &Connection, bid: &Bid) -> Result<Option<Leadership>> {
    let mut statement = db.prepare_cached(
        "/* ams:lead */ update leader set owner = ?1, until = ?3, \
         steady_since = case when until + 1000000 <= ?2 or until > ?7 or steady_since > ?2 then ?2 \
             else steady_since end, \
         paced_until = coalesce(?4, paced_until), pace_count = ?5, pace_interval_ms = ?6 \
         where owner is null or owner = ?1 or until <= ?2 or until > ?7 \
         returning steady_since, paced_until, paused",
    )?;
    let paced_until = bid.paced_until.map(Timestamp::as_micros);
    let (count, interval) = bid.pacing.map(Rate::numbers).unzip();
    let values = params![
        bid.instance.0,
        bid.now.as_micros(),
        bid.until.as_micros(),
        paced_until,
        count,
        interval,
        bid.latest_until().as_micros(),
    ];
    let won = statement.query_row(values, |row| {
        Ok(Leadership {
            steady_since: our_time(row, 0)?,
            paced_until: our_optional_time(row, 1)?,
            paused: row.get(2)?,
        })
    });
    Ok(won.optional()?)
}

/// All lanes, by topic.
pub(super) fn lanes(db: &Connection) -> Result<Vec<Lane>> {
    let mut statement = db.prepare_cached(
        "/* ams:lanes */ select topic, consumer_group, next, fresh, tries, interval_ms, interval_max_ms \
         from lanes order by topic",
    )?;
    let lanes = statement.query_map([], |row| {
        Ok(Lane {
            topic: text(row, 0)?,
            group: text(row, 1)?,
            next: text(row, 2)?,
            fresh: row.get(3)?,
            tries: row.get(4)?,
            interval: millis(row.get(5)?),
            interval_max: millis(row.get(6)?),
        })
    })?;
    Ok(lanes.collect::<rusqlite::Result<_>>()?)
}

/// Registers a lane; returns what stood there before, if it was different.
pub(super) fn put_lane(db: &Connection, lane: &Lane, now: Timestamp) -> Result<Option<Lane>> {
    let before = lanes(db)?.into_iter().find(|before| before.topic == lane.topic);
    db.prepare_cached(
        "/* ams:put_lane */ insert or replace into lanes \
         (topic, consumer_group, next, fresh, tries, interval_ms, interval_max_ms, registered_at) \
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?
    .execute(params![
        lane.topic,
        lane.group,
        lane.next,
        lane.fresh,
        lane.tries,
        in_millis(lane.interval),
        in_millis(lane.interval_max),
        now.as_micros(),
    ])?;
    Ok(before.filter(|before| before != lane))
}

/// The consumer groups of all lanes.
pub(super) fn lane_groups(db: &Connection) -> Result<Vec<LaneGroup>> {
    let mut statement = db.prepare_cached(
        "/* ams:lane_groups */ select topic, consumer_group, seen_at from lane_groups order by 1, 2",
    )?;
    let groups = statement.query_map([], |row| {
        Ok(LaneGroup { topic: text(row, 0)?, group: text(row, 1)?, seen_at: our_time(row, 2)? })
    })?;
    Ok(groups.collect::<rusqlite::Result<_>>()?)
}

/// Notes that a group reads a lane. Groups that nobody has heard of for long go, and what was heard of them by a
/// clock that was ahead: the living would seem silent beside them.
pub(super) fn put_lane_group(db: &Connection, group: &LaneGroup) -> Result<()> {
    let (seen_at, latest) = (group.seen_at.as_micros(), latest_present(group.seen_at).as_micros());
    db.prepare_cached(
        "/* ams:forget_lane_groups */ delete from lane_groups where topic = ?1 \
         and consumer_group <> ?2 and (seen_at < ?3 - 3600000000 or seen_at > ?4)",
    )?
    .execute(params![group.topic, group.group, seen_at, latest])?;
    db.prepare_cached(
        "/* ams:put_lane_group */ insert into lane_groups (topic, consumer_group, seen_at) values (?1, ?2, ?3) \
         on conflict (topic, consumer_group) do update \
         set seen_at = case when seen_at > ?4 then excluded.seen_at else max(seen_at, excluded.seen_at) end",
    )?
    .execute(params![group.topic, group.group, seen_at, latest])?;
    Ok(())
}

pub(super) fn millis(value: i64) -> Duration {
    Duration::from_millis(u64::try_from(value).unwrap_or(0))
}

pub(super) fn in_millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
