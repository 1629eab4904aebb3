//! The limit: what each stage that a message can't do without costs by itself.
//!
//! Full stack: claim, begin and record on the store, publish and take on the queue, POST and receive
//! over HTTP. Each runs alone, and the CPU time of the whole machine is read around it; the machine's
//! processors divided by the sum is the rate that nothing could beat. Embedded, everything is one
//! process, and the limit is the rate of the bare HTTP client against the same receiver.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::cpu::machine_us;
use super::receiver::Receiver;
use super::stack::Stack;
use super::{BenchOptions, failed};
use crate::app::Result;
use crate::clock::Timestamp;
use crate::message::{Class, MessageId, Outcome, Times, Verdict};
use crate::publish::lane_record;
use crate::store::{Begin, Claim, Due, LeaseId, Mask, Record, Records, Urgency, Wanted};
use crate::ticket::{BatchId, EndpointId, Ticket};

/// Requests in flight in the bare client: what the limits allow a receiver that answers at once.
const IN_FLIGHT: usize = 64;
const BATCH: usize = 1_000;

pub(super) struct Limit {
    pub(super) per_s: f64,
    pub(super) stages: BTreeMap<&'static str, f64>,
}

pub(super) async fn measure(stack: &mut Stack, receiver: &Receiver, options: &BenchOptions) -> Result<Limit> {
    let count = options.messages.clamp(BATCH, 100_000) / BATCH * BATCH;
    eprintln!("measuring the limit with {count} messages");
    let tickets: Vec<Ticket> = (0..count).map(|i| ticket(stack, i, options.payload_bytes)).collect();
    let mut stages = BTreeMap::new();
    if stack.kind() == "embedded" {
        let per_s = post(stack, receiver, &tickets, &mut stages).await?;
        return Ok(Limit { per_s, stages: BTreeMap::from([("post_and_receive_per_s", per_s)]) });
    }
    store(stack, count, options.payload_bytes, &mut stages).await?;
    queue(stack, &tickets, &mut stages).await?;
    post(stack, receiver, &tickets, &mut stages).await?;
    let cores = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
    let sum: f64 = stages.values().sum();
    Ok(Limit { per_s: cores * 1e6 / sum, stages })
}

/// Reads the machine's CPU time around stages of `count` messages.
struct Meter<'a> {
    count: f64,
    stages: &'a mut BTreeMap<&'static str, f64>,
}

impl Meter<'_> {
    fn add(&mut self, stage: &'static str, before: f64) {
        *self.stages.entry(stage).or_default() += (machine_us() - before) / self.count;
    }
}

async fn store(
    stack: &Stack,
    count: usize,
    payload: usize,
    stages: &mut BTreeMap<&'static str, f64>,
) -> Result<()> {
    let (store, scratch) = stack.bare_store(count, payload).await?;
    let wrong = failed("a bare store stage failed");
    let now = stack.clock().now();
    let owner = store.enroll("bench", "bench", now, now.after(std::time::Duration::from_secs(600))).await;
    let owner = owner.map_err(|error| wrong(&error))?;
    let mut meter = Meter { count: count as f64, stages };

    let mut groups: Vec<Vec<Ticket>> = Vec::new();
    let before = machine_us();
    loop {
        let (due, batch) = (Due::New(Urgency::Normal), BatchId::random());
        let claim = Claim { due, limit: BATCH, lane: "bench", batch, saturated: &[], owner, now };
        let claimed = store.claim(&claim).await.map_err(|error| wrong(&error))?;
        if claimed.seen == 0 {
            break;
        }
        groups.push(claimed.tickets);
    }
    meter.add("claim", before);

    let wanted: Vec<[Wanted; 1]> = groups.iter().map(|tickets| [wanted(tickets)]).collect();
    let before = machine_us();
    for wanted in &wanted {
        let begin = Begin { wanted, repeated: false, owner };
        store.begin(&begin).await.map_err(|error| wrong(&error))?;
    }
    meter.add("begin", before);

    let groups: Vec<Vec<Record>> = groups
        .into_iter()
        .zip(&wanted)
        .map(|(group, [wanted])| group.into_iter().map(|ticket| sent(ticket, wanted.lease, now)).collect())
        .collect();
    let before = machine_us();
    for records in &groups {
        store.record(&Records { records, now }).await.map_err(|error| wrong(&error))?;
    }
    meter.add("record", before);
    drop(store);
    scratch.remove().await.map_err(|error| wrong(&error))
}

async fn queue(stack: &Stack, tickets: &[Ticket], stages: &mut BTreeMap<&'static str, f64>) -> Result<()> {
    let (queue, lane) = (stack.queue(), stack.lane("limit"));
    let wrong = failed("a bare queue stage failed");
    let mut meter = Meter { count: tickets.len() as f64, stages };
    queue.ensure(std::slice::from_ref(&lane)).await.map_err(|error| wrong(&error))?;
    let before = machine_us();
    for batch in tickets.chunks(BATCH) {
        queue.publish(&lane, batch.iter().map(lane_record).collect()).await.map_err(|error| wrong(&error))?;
    }
    meter.add("publish", before);

    let mut subscription =
        queue.subscribe(&lane, &lane, 2 * tickets.len()).await.map_err(|error| wrong(&error))?;
    let mut taken = 0;
    let mut before = machine_us();
    while taken < tickets.len() {
        let Some(batch) = subscription.taken.recv().await else { break };
        if taken == 0 {
            // Joining the group takes seconds and is not part of a message's way.
            before = machine_us();
        }
        taken += batch.len();
        // The subscription lives as long as we hold it.
        let _ = subscription.done.send(batch.iter().map(|taken| taken.receipt).collect());
    }
    meter.add("take", before);
    subscription.close().await;
    Ok(())
}

/// Delivers all tickets with the bare client; returns how many a second.
async fn post(
    stack: &Stack,
    receiver: &Receiver,
    tickets: &[Ticket],
    stages: &mut BTreeMap<&'static str, f64>,
) -> Result<f64> {
    let delivery = stack.delivery()?;
    let endpoint = Arc::new(super::stack::endpoint(&receiver.url()));
    let watch = stack.clock().stopwatch();
    let mut meter = Meter { count: tickets.len() as f64, stages };
    let before = machine_us();
    let mut clients = JoinSet::new();
    for part in tickets.chunks(tickets.len().div_ceil(IN_FLIGHT)) {
        let (delivery, endpoint, part) = (Arc::clone(&delivery), Arc::clone(&endpoint), part.to_vec());
        clients.spawn(async move {
            let mut refused = 0;
            for ticket in &part {
                let tried = delivery.deliver(ticket, &endpoint).await;
                let accepted = tried.is_ok_and(|outcome| outcome.class == Class::Accepted);
                refused += usize::from(!accepted);
            }
            refused
        });
    }
    let refused: usize = clients.join_all().await.into_iter().sum();
    if refused > 0 {
        return Err(failed("the bare client failed")(&format!("{refused} requests were not accepted")));
    }
    meter.add("post_and_receive", before);
    Ok(tickets.len() as f64 / watch.elapsed().as_secs_f64())
}

fn ticket(stack: &Stack, i: usize, payload: usize) -> Ticket {
    let message = super::message(payload);
    Ticket {
        id: MessageId(i64::try_from(i).unwrap_or(i64::MAX)),
        batch: BatchId(1),
        position: u16::try_from(i % BATCH).unwrap_or(0),
        endpoint_id: EndpointId(1),
        endpoint: "default".into(),
        recipient: message.recipient,
        content: message.content,
        created_at: stack.clock().now(),
        attempt: 1,
        lane_tries: 0,
        priority: 0,
        content_type: None,
        headers: None,
        ordering_key: None,
        expires_at: None,
        due_at: None,
    }
}

fn wanted(tickets: &[Ticket]) -> Wanted {
    let batch = tickets.first().map_or(BatchId(0), |ticket| ticket.batch);
    Wanted { lease: LeaseId::random(), batch, positions: Mask::first(tickets.len()) }
}

fn sent(ticket: Ticket, lease: LeaseId, now: Timestamp) -> Record {
    let outcome = Outcome {
        class: Class::Accepted,
        status: Some(200),
        address: "http://127.0.0.1:21000/".into(),
        error: None,
        answer: r#"{"message":"Accepted","messageId":"00000000-0000-4000-8000-000000000000"}"#.into(),
        provider_message_id: Some("00000000-0000-4000-8000-000000000000".into()),
        provider_message: Some("Accepted".into()),
        retry_after_ms: None,
        started_at: now,
        times: Times::default(),
    };
    let root = ticket.batch;
    Record {
        ticket,
        lane: "bench".into(),
        lease,
        root,
        outcome: Some(outcome),
        verdict: Verdict::Sent,
        judged_at: now,
    }
}
