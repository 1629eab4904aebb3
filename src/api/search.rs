//! Lists of messages: filters, pages, and why messages are dead.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::ApiState;
use super::explain::Surroundings;
use super::messages::MessageView;
use super::problem::{Code, Problem};
use crate::clock::Timestamp;
use crate::message::{MessageId, Status};
use crate::store::operate::{Cursor, Filter, Page};

/// Messages on a page, at most, and when nobody says.
const PAGE_MAX: usize = 100;
const PAGE: usize = 20;
/// Bounded searches that one page may take before it is answered short.
const SEARCHES: usize = 5;
/// How long they may take together before no other is begun.
const SEARCHING: Duration = Duration::from_millis(15);
/// Characters of a content that a list shows.
const CONTENT: usize = 1_000;

/// Which messages to list. Everything that is set must hold.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Only messages of this status.
    #[param(schema_with = super::document::status)]
    status: Option<Status>,
    /// Only messages to this endpoint.
    #[param(example = "default")]
    endpoint: Option<String>,
    /// Only messages to this recipient.
    #[param(example = "+905551111111")]
    recipient: Option<String>,
    /// Only messages that are dead for this reason, word for word.
    #[param(example = "status 500")]
    reason: Option<String>,
    /// Only messages created then or later.
    #[param(value_type = Option<String>, format = DateTime, example = "2030-01-01T09:00:00Z")]
    created_after: Option<Timestamp>,
    /// Only messages created earlier.
    #[param(value_type = Option<String>, format = DateTime, example = "2030-01-02T09:00:00Z")]
    created_before: Option<Timestamp>,
    /// Messages on the page: 20 unless told, at most 100.
    #[param(minimum = 1, maximum = 100, example = 20)]
    limit: Option<usize>,
    /// `next_cursor` of the page before.
    #[param(example = "MTg5MzQ5MjAwMDAwMDAwMDo0Mg")]
    cursor: Option<String>,
}

/// A page of messages, newest first.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct MessageList {
    /// The messages; of a long content the first 1,000 characters. A page may be short, even empty,
    /// although more follow.
    data: Vec<MessageView>,
    /// Where the next page begins; null on the last.
    #[schema(example = "MTg5MzQ5MjAwMDAwMDAwMDo0Mg")]
    next_cursor: Option<String>,
}

/// Dead messages of one reason.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct DeadReasonView {
    /// Why they are dead.
    #[schema(example = "status 500")]
    reason: String,
    /// How many of the newest 10,000 dead messages.
    #[schema(example = 12)]
    count: u64,
    /// The newest of them.
    #[schema(example = 4711)]
    newest_id: i64,
}

/// Why messages are dead, the most frequent reason first.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct DeadReasonList {
    /// The reasons.
    data: Vec<DeadReasonView>,
    /// Always null: all reasons are one page.
    #[schema(example = json!(null))]
    next_cursor: Option<String>,
}

/// Write a cursor as a text that says nothing to others
pub(super) fn written(cursor: Cursor) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(format!("{}:{}", cursor.at.as_micros(), cursor.id.0))
}

fn read(text: &str) -> Option<Cursor> {
    let plain = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
    let (at, id) = plain.split_once(':')?;
    Some(Cursor { at: Timestamp::from_micros(at.parse().ok()?), id: MessageId(id.parse().ok()?) })
}

/// List messages, newest first
#[utoipa::path(
    get, path = "/v1/messages", operation_id = "list_messages", tag = "messages", params(ListQuery),
    responses(
        (status = 200, description = "A page of messages", body = MessageList),
        (status = 400, description = "A parameter is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(state): State<ApiState>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<MessageList>, Problem> {
    let query = query.map_err(|rejection| Problem::new(Code::InvalidQuery, &rejection.body_text()))?.0;
    let limit = query.limit.unwrap_or(PAGE);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(Problem::new(Code::InvalidQuery, "limit must be from 1 to 100"));
    }
    let filter = Filter {
        status: query.status,
        endpoint: query.endpoint,
        recipient: query.recipient,
        reason: query.reason,
        created_after: query.created_after,
        created_before: query.created_before,
    };
    refuse_nul(&filter)?;
    let from = match query.cursor.as_deref().map(read) {
        None => Cursor::start(&filter),
        Some(Some(cursor)) => cursor,
        Some(None) => {
            let detail = "cursor is none of ours; take next_cursor of the page before, or leave it out";
            return Err(Problem::new(Code::InvalidQuery, detail));
        }
    };
    let found = page(&state, &filter, from, limit).await?;
    let mut messages = state.context.store.messages(&found.ids).await?;
    messages.sort_by_key(|message| found.ids.iter().position(|id| *id == message.id));
    let surroundings = Surroundings::of_many(&state.context).await;
    let data = messages.into_iter().map(|mut message| {
        shorten(&mut message.content);
        MessageView::of(message, &surroundings)
    });
    Ok(Json(MessageList { data: data.collect(), next_cursor: found.next.map(written) }))
}

/// PostgreSQL can't be asked for a text with a nul in it, and no message has one.
pub(super) fn refuse_nul(filter: &Filter) -> Result<(), Problem> {
    let texts = [&filter.endpoint, &filter.recipient, &filter.reason];
    if texts.into_iter().flatten().any(|text| text.contains('\0')) {
        return Err(Problem::new(Code::InvalidQuery, "no text may hold the character U+0000"));
    }
    Ok(())
}

/// Searches until the page is full, or has cost enough.
async fn page(state: &ApiState, filter: &Filter, from: Cursor, limit: usize) -> Result<Page, Problem> {
    let mut page = Page { ids: Vec::new(), next: Some(from) };
    let watch = state.context.clock.stopwatch();
    for search in 0..SEARCHES {
        if search > 0 && watch.elapsed() >= SEARCHING {
            break;
        }
        let Some(from) = page.next.filter(|_| page.ids.len() < limit) else { break };
        let found = state.context.store.search(filter, from, limit - page.ids.len()).await?;
        page.ids.extend(found.ids);
        page.next = found.next;
    }
    Ok(page)
}

fn shorten(content: &mut String) {
    if let Some((end, _)) = content.char_indices().nth(CONTENT) {
        content.truncate(end);
    }
}

/// Show why messages are dead, the most frequent reason first
#[utoipa::path(
    get, path = "/v1/dead-reasons", operation_id = "list_dead_reasons", tag = "messages",
    responses(
        (status = 200, description = "The reasons of the newest 10,000 dead messages", body = DeadReasonList),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn dead_reasons(State(state): State<ApiState>) -> Result<Json<DeadReasonList>, Problem> {
    let reasons = state.context.store.dead_reasons().await?;
    let view = |reason: crate::store::operate::DeadReason| DeadReasonView {
        reason: reason.reason,
        count: reason.count,
        newest_id: reason.newest.0,
    };
    Ok(Json(DeadReasonList { data: reasons.into_iter().map(view).collect(), next_cursor: None }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_reads_back_and_others_are_refused() {
        let cursor = Cursor { at: Timestamp::from_micros(-7), id: MessageId(i64::MAX) };
        assert_eq!(read(&written(cursor)), Some(cursor));
        for text in ["", "x", "MQ", "OjE", "MTo", "////", "ä"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn a_long_content_is_cut_between_characters() {
        let mut content = "ä".repeat(CONTENT + 1);
        shorten(&mut content);
        assert_eq!(content.chars().count(), CONTENT);
        let mut short = "short".to_owned();
        shorten(&mut short);
        assert_eq!(short, "short");
    }
}
