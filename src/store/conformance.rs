//! What every store has to do, one behaviour a test: the same tests run on every backend.
//!
//! A backend calls [`store_conformance!`] in a test module with an async function that makes a fresh,
//! migrated, empty store. Nothing here knows what a store is made of.

use std::sync::Arc;
use std::time::Duration;

use super::{
    BatchId, Begin, Claim, Claimed, Due, Endpoint, Inserted, InstanceId, LeaseId, Mask, Record, Records,
    Recovered, Recovery, Reissue, Reissued, Scheduling, Store, Suspect, Unhold, Urgency, Wanted,
};
use crate::clock::{Clock, Timestamp};
use crate::message::{Class, Held, Message, MessageId, NewMessage, Outcome, Times, Verdict};
use crate::ticket::Ticket;

pub(crate) mod breaking;
pub(crate) mod claiming;
pub(crate) mod entering;
pub(crate) mod healing;
pub(crate) mod holding;
pub(crate) mod knowing;
pub(crate) mod newer;
pub(crate) mod operating;
pub(crate) mod random;
pub(crate) mod rating;
pub(crate) mod removing;
pub(crate) mod trying;

/// Makes one test for each behaviour. `$make` is an async function without arguments that returns
/// an `Arc<dyn Store>`: fresh, migrated and empty.
macro_rules! store_conformance {
    ($make:path) => {
        $crate::store::conformance::store_conformance! { @each $make;
            entering::a_fresh_store_is_empty_and_of_this_version,
            entering::a_message_reads_back_as_it_was_inserted,
            entering::an_insert_takes_all_or_nothing,
            entering::values_that_can_not_be_are_refused,
            entering::an_idempotency_key_is_used_once,
            entering::idempotency_keys_are_checked_within_a_batch,
            entering::one_conflict_keeps_a_whole_batch_out,
            entering::inserts_are_numbered_in_order,
            claiming::a_claim_takes_new_messages_in_id_order,
            claiming::a_claim_takes_no_more_than_its_limit,
            claiming::a_claimed_message_is_not_claimed_again,
            claiming::urgent_messages_have_a_feed_of_their_own,
            claiming::a_scheduled_message_waits_for_its_time,
            claiming::waiting_deliveries_are_claimed_lane_by_lane_oldest_due_first,
            claiming::a_delivery_that_is_claimed_ahead_keeps_its_time,
            claiming::an_expired_message_is_not_queued,
            claiming::messages_of_a_closed_endpoint_are_held_by_the_claim,
            claiming::a_ticket_carries_what_the_request_needs,
            claiming::an_endpoint_takes_over_the_number_that_its_messages_have,
            claiming::a_claim_of_nothing_writes_no_batch,
            claiming::concurrent_claims_never_take_a_message_twice,
            claiming::a_store_says_when_something_is_due,
            trying::a_begin_takes_what_is_left_in_the_batch,
            trying::a_ticket_begins_once,
            trying::a_stale_ticket_begins_nothing,
            trying::a_repeated_begin_answers_what_it_began,
            trying::a_repeated_begin_that_never_happened_begins,
            trying::a_repeated_begin_finds_all_of_its_leases,
            trying::an_attempt_that_came_too_late_is_expired,
            trying::a_success_is_recorded_with_its_attempt,
            trying::a_retry_waits_for_its_time_on_its_lane,
            trying::the_last_failure_makes_a_message_dead,
            trying::a_released_message_is_as_it_was,
            trying::a_record_repeated_changes_nothing,
            trying::a_stale_failure_is_refused_and_its_attempt_kept,
            trying::a_late_success_is_accepted_wherever_its_delivery_stands,
            trying::a_late_success_takes_the_dead_letter_back,
            trying::one_write_takes_every_kind_of_verdict,
            holding::a_held_ticket_is_not_claimable,
            holding::messages_of_a_saturated_endpoint_are_held_by_the_claim,
            holding::held_deliveries_expire,
            holding::what_instances_say_to_be_busy_is_known_while_they_live,
            holding::only_what_is_left_in_its_batch_is_held,
            holding::held_deliveries_are_freed_urgent_first_then_oldest,
            holding::a_quarter_of_what_is_freed_is_of_the_lowest_priority,
            holding::a_held_delivery_that_was_tried_is_due_again_when_freed,
            holding::deliveries_of_several_endpoints_are_freed_in_one_call,
            holding::a_begun_delivery_is_given_back_and_held,
            breaking::a_breaker_stays_until_it_is_closed,
            breaking::a_breaker_does_not_open_beside_successes,
            breaking::a_breaker_goes_with_a_change_of_its_endpoint,
            breaking::deliveries_are_held_while_their_breaker_is_open,
            breaking::one_probes_at_a_time,
            rating::deliveries_of_an_endpoint_with_a_rate_go_one_by_one,
            rating::times_are_reserved_for_urgent_and_due_deliveries_first,
            rating::a_reserved_time_that_was_not_used_is_given_up,
            rating::a_rate_is_kept_and_taken_away,
            rating::two_who_reserve_at_once_keep_the_rate,
            healing::batches_and_their_places_are_remembered,
            healing::the_oldest_batches_come_first,
            healing::a_batch_of_a_dead_owner_is_orphaned,
            healing::a_reissue_takes_only_what_is_still_queued,
            healing::a_reissue_keeps_what_its_tickets_said,
            healing::recovery_lists_what_the_dead_had_begun,
            healing::recovery_leaves_the_living_alone,
            healing::recovery_leaves_recorded_messages_alone,
            healing::recovery_lists_what_the_retired_left,
            healing::a_lease_that_was_taken_away_can_not_be_renewed,
            healing::an_instance_whose_clock_was_ahead_is_dead_once_it_is_silent,
            healing::one_instance_leads_until_its_term_ends,
            healing::a_term_in_the_far_future_keeps_nobody_from_leading,
            healing::a_leader_that_retires_is_succeeded_at_once,
            healing::pacing_holds_over_all_leaders,
            knowing::an_endpoint_is_created_and_replaced,
            knowing::the_newest_lane_wins,
            knowing::the_groups_of_a_lane_are_known_by_when_they_were_seen,
            knowing::dead_letters_wait_until_they_are_published,
            knowing::an_unknown_message_has_nothing,
            knowing::attempts_read_back_in_order,
            knowing::long_answers_are_kept_in_part,
            knowing::the_overview_counts_every_status,
            knowing::the_overview_knows_the_oldest_due_row,
            knowing::the_database_describes_itself,
            knowing::partitions_can_be_made_at_any_time,
            healing::a_clock_that_was_set_back_delays_no_retry,
            removing::every_place_is_found_by_the_reconciliation,
            removing::what_is_old_and_final_goes,
            removing::what_has_not_ended_stays_however_old_it_is,
            removing::keys_go_with_their_messages,
            operating::a_search_gives_newest_first_page_by_page,
            operating::each_filter_finds_its_messages,
            operating::a_page_stays_right_while_rows_are_added,
            operating::a_search_goes_on_where_its_walk_met_its_bound,
            operating::a_cancelled_message_is_tried_no_more,
            operating::a_cancelled_try_that_succeeds_is_sent,
            operating::a_redriven_message_begins_anew,
            operating::only_what_a_status_allows_is_changed,
            operating::a_job_changes_what_matched_when_it_was_opened,
            operating::a_job_goes_on_after_a_break,
            operating::dead_messages_are_counted_by_reason,
            operating::a_pause_holds_for_every_leader,
            operating::an_endpoint_is_deleted_when_unused,
            operating::keys_are_kept_used_and_revoked,
            random::random_calls_never_lose_a_message,
        }
    };
    (@each $make:path; $($room:ident::$name:ident),* $(,)?) => {
        $(
            #[tokio::test]
            async fn $name() {
                $crate::store::conformance::$room::$name($make().await).await;
            }
        )*
    };
}
pub(crate) use store_conformance;

/// The lane of first tries in these tests.
const FRESH: &str = "messages";
/// The lane of later tries in these tests.
const RETRY: &str = "messages-retry";
/// How long instances live in these tests.
const LEASE: Duration = Duration::from_secs(10);

/// A store with an enrolled instance and a clock that is moved by hand.
struct Bench {
    store: Arc<dyn Store>,
    clock: Clock,
    owner: InstanceId,
}

impl Bench {
    /// A bench whose clock starts at the present, because a store may mistrust rows from another age.
    /// Whole milliseconds, because a store may keep a writer's times no finer.
    async fn new(store: Arc<dyn Store>) -> Bench {
        let start = Clock::system().now().as_micros() / 1_000 * 1_000;
        let clock = Clock::manual(Timestamp::from_micros(start));
        let now = clock.now();
        let owner = store.enroll("up", "here", now, now.after(LEASE)).await.unwrap();
        let bench = Bench { store, clock, owner };
        bench.open("default").await;
        bench
    }

    /// Makes an endpoint.
    async fn open(&self, name: &str) {
        self.store.put_endpoint(&Endpoint::new(name, "http://localhost:3000")).await.unwrap();
    }

    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn pass(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }

    fn in_seconds(&self, seconds: u64) -> Timestamp {
        self.now().after(Duration::from_secs(seconds))
    }

    async fn enroll(&self) -> InstanceId {
        let until = self.now().after(LEASE);
        self.store.enroll("consumer", "there", self.now(), until).await.unwrap()
    }

    async fn insert(&self, messages: &[NewMessage]) -> Vec<MessageId> {
        let inserted = self.store.insert(messages, self.now()).await.unwrap();
        inserted.iter().map(new_id).collect()
    }

    /// Inserts `count` messages that differ in their text.
    async fn fill(&self, count: usize) -> Vec<MessageId> {
        self.insert(&(0..count).map(|n| text(&format!("text {n}"))).collect::<Vec<_>>()).await
    }

    async fn claim_beside(
        &self,
        owner: InstanceId,
        due: Due<'_>,
        limit: usize,
        saturated: &[String],
    ) -> Claimed {
        let lane = match due {
            Due::Timed { lane, .. } if !lane.is_empty() => lane,
            _ => FRESH,
        };
        let claim = Claim { due, limit, lane, batch: BatchId::random(), saturated, owner, now: self.now() };
        self.store.claim(&claim).await.unwrap()
    }

    async fn claim_by(&self, owner: InstanceId, due: Due<'_>, limit: usize) -> Claimed {
        self.claim_beside(owner, due, limit, &[]).await
    }

    async fn claim(&self, due: Due<'_>, limit: usize) -> Claimed {
        self.claim_by(self.owner, due, limit).await
    }

    /// Claims every new message of the usual priority.
    async fn claim_fresh(&self) -> Claimed {
        self.claim(Due::New(Urgency::Normal), 1_000).await
    }

    async fn claim_timed(&self, lane: &str) -> Claimed {
        self.claim(Due::Timed { lane, by: self.now() }, 1_000).await
    }

    /// Issues a batch again.
    async fn reissue(&self, suspect: Suspect) -> Option<Reissued> {
        let reissue = Reissue { suspect, batch: BatchId::random(), owner: self.owner, now: self.now() };
        self.store.reissue(&reissue).await.unwrap()
    }

    async fn begin_by(&self, owner: InstanceId, tickets: &[Ticket]) -> Vec<BegunDelivery> {
        let wanted = wanted(tickets);
        let begun = self.store.begin(&Begin { wanted: &wanted, repeated: false, owner }).await.unwrap();
        deliveries(tickets, &begun)
    }

    async fn begin(&self, tickets: &[Ticket]) -> Vec<BegunDelivery> {
        self.begin_by(self.owner, tickets).await
    }

    /// Brings `count` new messages to `processing`.
    async fn processing(&self, count: usize) -> Vec<BegunDelivery> {
        self.fill(count).await;
        let deliveries = self.begin(&self.claim_fresh().await.tickets).await;
        assert_eq!(deliveries.len(), count);
        deliveries
    }

    async fn record(&self, records: &[Record]) -> Vec<MessageId> {
        self.store.record(&Records { records, now: self.now() }).await.unwrap()
    }

    async fn recover(&self) -> Recovered {
        self.store.recover(&recovery(self.now(), &[])).await.unwrap()
    }

    async fn message(&self, id: MessageId) -> Message {
        self.store.message(id).await.unwrap().expect("the message is there")
    }

    /// A record of a failed attempt whose next is due in three seconds on the retry lane.
    fn failed(&self, delivery: &BegunDelivery) -> Record {
        let verdict = Verdict::Retry { lane: RETRY.to_owned(), lane_tries: 0, at: self.in_seconds(3) };
        record(delivery, Some(outcome(Class::Rejected, Some(500), self.now())), verdict)
    }

    fn sent(&self, delivery: &BegunDelivery) -> Record {
        record(delivery, Some(outcome(Class::Accepted, Some(200), self.now())), Verdict::Sent)
    }

    fn dead(&self, delivery: &BegunDelivery) -> Record {
        let verdict =
            Verdict::Dead { reason: "all tries failed".to_owned(), lane: "messages-dlq".to_owned() };
        record(delivery, Some(outcome(Class::Timeout, None, self.now())), verdict)
    }

    fn released(&self, delivery: &BegunDelivery) -> Record {
        record(delivery, None, Verdict::Release { held: None })
    }
}

/// A ticket that has begun.
#[derive(Clone, Debug)]
struct BegunDelivery {
    ticket: Ticket,
    lease: LeaseId,
    root: BatchId,
}

impl BegunDelivery {
    fn id(&self) -> MessageId {
        self.ticket.id
    }
}

/// What is wanted of these tickets' batches.
fn wanted(tickets: &[Ticket]) -> Vec<Wanted> {
    let mut wanted: Vec<Wanted> = Vec::new();
    for ticket in tickets {
        if !wanted.iter().any(|wanted| wanted.batch == ticket.batch) {
            let (lease, positions) = (LeaseId::random(), Mask::EMPTY);
            wanted.push(Wanted { lease, batch: ticket.batch, positions });
        }
        let of_batch = wanted.iter_mut().find(|wanted| wanted.batch == ticket.batch);
        of_batch.unwrap().positions.set(usize::from(ticket.position));
    }
    wanted
}

/// The tickets that have begun, each once, in the order of their ids.
fn deliveries(tickets: &[Ticket], begun: &[super::Begun]) -> Vec<BegunDelivery> {
    let mut deliveries: Vec<BegunDelivery> = Vec::new();
    for ticket in tickets {
        let position = usize::from(ticket.position);
        let of_batch = begun.iter().find(|b| b.batch == ticket.batch && b.positions.has(position));
        let twice = deliveries.iter().any(|delivery| {
            (delivery.ticket.batch, delivery.ticket.position) == (ticket.batch, ticket.position)
        });
        if let (Some(begun), false) = (of_batch, twice) {
            deliveries.push(BegunDelivery { ticket: ticket.clone(), lease: begun.lease, root: begun.root });
        }
    }
    deliveries.sort_by_key(BegunDelivery::id);
    deliveries
}

/// A recovery at a time at which no lease ends later than ten times [`LEASE`] from now.
fn recovery(now: Timestamp, silent: &[InstanceId]) -> Recovery<'_> {
    Recovery { now, latest: now.after(LEASE * 10), silent }
}

fn text(content: &str) -> NewMessage {
    NewMessage { recipient: "+905551111111".to_owned(), content: content.to_owned(), ..NewMessage::default() }
}

fn new_id(inserted: &Inserted) -> MessageId {
    match inserted {
        Inserted::New { id, .. } => *id,
        other => panic!("{other:?} is not new"),
    }
}

pub(crate) fn outcome(class: Class, status: Option<u16>, started_at: Timestamp) -> Outcome {
    let accepted = class == Class::Accepted;
    Outcome {
        class,
        status,
        address: "127.0.0.1:3000".to_owned(),
        error: (!accepted).then(|| "no luck".to_owned()),
        answer: "an answer".to_owned(),
        provider_message_id: accepted.then(|| "p-1".to_owned()),
        provider_message: accepted.then(|| "Accepted".to_owned()),
        retry_after_ms: None,
        started_at,
        times: Times { connect_us: 1, head_us: 20, body_us: 300 },
    }
}

/// Frees held deliveries of one endpoint.
pub(crate) async fn unhold(
    store: &(impl Scheduling + ?Sized),
    endpoint: &str,
    held: Held,
    limit: usize,
    now: Timestamp,
) -> u64 {
    let wanted = [Unhold { endpoint: endpoint.to_owned(), limit }];
    store.unhold(&wanted, held, now).await.unwrap()[0]
}

fn record(delivery: &BegunDelivery, outcome: Option<Outcome>, verdict: Verdict) -> Record {
    let BegunDelivery { ticket, lease, root } = delivery.clone();
    let (ticket, outcome) = (ticket.into(), outcome.map(Into::into));
    Record { ticket, lane: FRESH.into(), lease, root, outcome, verdict, judged_at: Timestamp::EPOCH }
}

fn ids(claimed: &Claimed) -> Vec<MessageId> {
    claimed.tickets.iter().map(|ticket| ticket.id).collect()
}

/// The batch of a claim that queued something.
fn batch(claimed: &Claimed) -> BatchId {
    claimed.tickets[0].batch
}
