//! What is left in batches and leases.

use std::collections::{BTreeMap, BTreeSet};

use deadpool_postgres::Transaction;

use super::read_all;
use crate::store::{Mask, Result};
use crate::ticket::Ticket;

/// Where a bit stands.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Batches,
    Leases,
}

/// Writes what is left in these batches or leases; those with nothing go.
pub(super) async fn write_left<'a>(
    db: &Transaction<'_>,
    kind: Kind,
    left: impl Iterator<Item = (i64, &'a Mask)>,
) -> Result<()> {
    let (empty, rest): (Vec<_>, Vec<_>) = left.partition(|(_, mask)| mask.is_empty());
    if empty.is_empty() && rest.is_empty() {
        return Ok(());
    }
    let empty: Vec<i64> = empty.into_iter().map(|(id, _)| id).collect();
    let (ids, masks): (Vec<i64>, Vec<&Mask>) = rest.into_iter().unzip();
    let statement = match kind {
        Kind::Batches => {
            "/* ams:write_batches */ with gone as (delete from batches where id = any($1)) \
             update batches set \"left\" = v.mask from unnest($2::bigint[], $3::varbit[]) as v (id, mask) \
             where batches.id = any($2) and batches.id = v.id"
        }
        Kind::Leases => {
            "/* ams:write_leases */ with gone as (delete from leases where id = any($1)) \
             update leases set \"left\" = v.mask from unnest($2::bigint[], $3::varbit[]) as v (id, mask) \
             where leases.id = any($2) and leases.id = v.id"
        }
    };
    db.execute(&db.prepare_cached(statement).await?, &[&empty, &ids, &masks]).await?;
    Ok(())
}

/// Takes the deliveries of these tickets out of their batches, as far as they still stand there.
pub(super) async fn take<'a>(db: &Transaction<'_>, tickets: &'a [Ticket]) -> Result<Vec<&'a Ticket>> {
    let mut batches: Vec<i64> = tickets.iter().map(|ticket| ticket.batch.0).collect();
    batches.sort_unstable();
    batches.dedup();
    let lock =
        "/* ams:lock_batches */ select id, \"left\" from batches where id = any($1) order by id for update";
    let rows = db.query(&db.prepare_cached(lock).await?, &[&batches]).await?;
    let left = read_all(&rows, |row| Ok((row.try_get(0)?, row.try_get(1)?)))?;
    let mut left: BTreeMap<i64, Mask> = left.into_iter().collect();
    let mut taken = Vec::with_capacity(tickets.len());
    for ticket in tickets {
        let position = usize::from(ticket.position);
        if let Some(mask) = left.get_mut(&ticket.batch.0).filter(|mask| mask.has(position)) {
            mask.clear(position);
            taken.push(ticket);
        }
    }
    let changed: BTreeSet<i64> = taken.iter().map(|ticket| ticket.batch.0).collect();
    write_left(
        db,
        Kind::Batches,
        left.iter().filter(|(id, _)| changed.contains(id)).map(|(id, mask)| (*id, mask)),
    )
    .await?;
    Ok(taken)
}
