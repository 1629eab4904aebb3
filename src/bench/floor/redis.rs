//! Redis by pipeline: one answer for each message.

use redis::{AsyncCommands, Client};

use super::{ANSWER, GROUP, Job, Meter};
use crate::app::Result;
use crate::bench::failed;

/// Seconds that an answer lives, as in the system.
const LIVES: u64 = 86_400;

/// Measures the writes of all answers.
pub(super) async fn measure(Job { testbed, count, .. }: Job<'_>, meter: &mut Meter<'_>) -> Result<()> {
    let Some(url) = testbed.redis() else { return Ok(()) };
    let wrong = |error| failed("the floor's cache failed")(&error);
    let client = Client::open(url).map_err(wrong)?;
    let mut connection = client.get_multiplexed_async_connection().await.map_err(wrong)?;
    // It answers before it is measured.
    let _: Option<String> = connection.get("floor").await.map_err(wrong)?;
    let before = meter.start();
    for first in (0..count).step_by(GROUP) {
        let mut pipe = redis::pipe();
        for id in first..count.min(first + GROUP) {
            pipe.set_ex(format!("floor:{id}"), ANSWER, LIVES).ignore();
        }
        pipe.query_async::<()>(&mut connection).await.map_err(wrong)?;
    }
    meter.stop("cache", &before);
    Ok(())
}
