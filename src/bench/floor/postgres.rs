//! Minimal statements on minimal tables: take a group of messages, begin it, store its results.

use tokio_postgres::{Client, Statement};

use super::{ANSWER, GROUP, Job, Meter, PROVIDER_ID, RECIPIENT};
use crate::app::{AppError, Result};
use crate::bench::failed;

const TABLES: &str = "\
    create table floor_messages (id bigint primary key, recipient text not null, content text not null); \
    create table floor_groups (number bigint primary key, lo bigint not null, hi bigint not null, begun boolean); \
    create table floor_results (id bigint primary key, finished_at timestamptz not null, provider_id text, answer text)";
const FILL: &str = "insert into floor_messages select i, $2, $3 from generate_series(0, $1::bigint - 1) i";
const CLAIM: &str = "with c as materialized ( \
        select id, recipient, content from floor_messages where id >= $1 order by id limit $2), \
    g as (insert into floor_groups select $1, min(id), max(id) from c having count(*) > 0) \
    select id, recipient, content from c";
const BEGIN: &str = "update floor_groups set begun = true where number = $1";
const RECORD: &str = "with g as (delete from floor_groups where number = $1) \
    insert into floor_results select id, now(), provider_id, answer \
    from unnest($2::bigint[], $3::text[], $4::text[]) as t(id, provider_id, answer)";

/// Measures the stages of the store.
pub(super) async fn measure(Job { testbed, content, count }: Job<'_>, meter: &mut Meter<'_>) -> Result<()> {
    let scratch = testbed.database("floor").await?;
    let client =
        scratch.client().await.map_err(|error| failed("the floor's store can't be reached")(&error))?;
    let measured = stages(&client, content, count, meter).await;
    let taken = measured.map_err(|error| failed("a statement of the floor failed")(&error))?;
    if taken != count {
        return Err(AppError(format!("the floor's store gave {taken} of {count} messages")));
    }
    scratch.remove().await.map_err(|error| AppError(error.to_string()))
}

/// Runs all stages; how many messages the claims gave.
async fn stages(
    db: &Client,
    content: &str,
    count: usize,
    meter: &mut Meter<'_>,
) -> std::result::Result<usize, tokio_postgres::Error> {
    db.batch_execute(TABLES).await?;
    db.execute(FILL, &[&(count as i64), &RECIPIENT, &content]).await?;
    // What a busy server has done beforehand: statistics, and no page that waits for its first write.
    db.batch_execute("analyze floor_messages; checkpoint").await.or_else(|_| Ok(()))?;
    let statements = [db.prepare(CLAIM).await?, db.prepare(BEGIN).await?, db.prepare(RECORD).await?];
    let [claim, begin, record]: &[Statement; 3] = &statements;
    let firsts: Vec<i64> = (0..count).step_by(GROUP).map(|first| first as i64).collect();

    let before = meter.start();
    let mut taken = 0;
    for first in &firsts {
        let rows = db.query(claim, &[first, &(GROUP as i64)]).await?;
        for row in &rows {
            // The texts are read where they stand; a program has to look at them at least.
            taken += usize::from(row.try_get::<_, &str>(2)?.len() == content.len());
        }
    }
    meter.stop("claim", &before);

    let before = meter.start();
    for first in &firsts {
        db.execute(begin, &[first]).await?;
    }
    meter.stop("begin", &before);

    let before = meter.start();
    for first in &firsts {
        let size = GROUP.min(count - usize::try_from(*first).unwrap_or(0));
        let ids: Vec<i64> = (*first..).take(size).collect();
        db.execute(record, &[first, &ids, &vec![PROVIDER_ID; size], &vec![ANSWER; size]]).await?;
    }
    meter.stop("record", &before);
    Ok(taken)
}
