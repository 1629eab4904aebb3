//! The conformance suite, inline and on a file, and what is SQLite's own: the file and its other users.

use std::sync::Arc;

use super::*;

mod inline {
    use super::*;
    use crate::store::conformance::store_conformance;

    async fn make() -> Arc<dyn Store> {
        Arc::new(SqliteStore::in_memory().unwrap())
    }

    store_conformance!(make);
}

mod file {
    use super::*;
    use crate::store::conformance::store_conformance;

    /// A store in a file whose folder is unlinked at once: the open files live on, and nothing is left behind.
    async fn make() -> Arc<dyn Store> {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("ams.db")).unwrap();
        store.migrate().await.unwrap();
        Arc::new(store)
    }

    store_conformance!(make);
}

/// SQLite would plan a statement anew for other values of its parameters.
#[test]
fn a_statement_is_planned_once() {
    let store = SqliteStore::in_memory().unwrap();
    let Backend::Inline(connection) = &*store.backend else { panic!("in_memory has no threads") };
    let connection = lock(connection);
    let mut due = connection
        .prepare(
            "select message_id from waiting indexed by waiting_due \
             where held is null and lane = ?1 and due_at <= ?3 order by due_at, message_id limit ?2",
        )
        .unwrap();
    for now in 0..3 {
        assert!(!due.exists(("", 1, now)).unwrap());
    }
    assert_eq!(due.get_status(rusqlite::StatementStatus::RePrepare), 0);
}

/// What other programs may do with the file, and what this one makes of files.
mod shell {
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;
    use crate::message::{Class, Verdict};
    use crate::store::conformance::{newer, outcome, unhold};
    use crate::store::{Due, LeaseId, Mask, Record, Urgency, Wanted};
    use crate::ticket::Ticket;

    struct File {
        store: SqliteStore,
        path: PathBuf,
        _folder: tempfile::TempDir,
    }

    async fn file() -> File {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/folder/ams.db");
        let store = SqliteStore::open(&path).unwrap();
        let missing = store.missing_migrations().await.unwrap();
        assert_eq!(missing[0], "V1__messages");
        assert_eq!(store.migrate().await.unwrap(), missing);
        store.put_endpoint(&Endpoint::new("default", "http://localhost:3000")).await.unwrap();
        File { store, path, _folder: folder }
    }

    fn now() -> Timestamp {
        crate::clock::Clock::system().now()
    }

    impl File {
        /// Runs statements in the system's sqlite3 shell: what it prints, or what it complains of.
        fn sqlite3(&self, sql: &str) -> std::result::Result<String, String> {
            let ran = Command::new("sqlite3").arg("-bail").arg(&self.path).arg(sql).output();
            let ran = ran.expect("the sqlite3 shell is installed");
            let printed = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
            match ran.status.success() {
                true => Ok(printed(&ran.stdout)),
                false => Err(printed(&ran.stderr)),
            }
        }

        async fn claim(&self) -> Vec<Ticket> {
            let now = now();
            let mut tickets = Vec::new();
            for due in [Due::New(Urgency::Normal), Due::Timed { lane: "", by: now }] {
                let (lane, owner, batch) = ("messages", InstanceId(1), BatchId::random());
                let claim = Claim { due, limit: 100, lane, batch, saturated: &[], owner, now };
                tickets.extend(self.store.claim(&claim).await.unwrap().tickets);
            }
            tickets
        }
    }

    #[tokio::test]
    async fn a_shell_inserts_while_the_store_is_open() {
        let file = file().await;
        file.sqlite3("insert into messages (recipient, content) values ('+905551111111', 'Hello')").unwrap();
        file.sqlite3(
            "insert into messages (recipient, content, headers, send_at, expires_at, idempotency_key) values \
             (905551111111, 'Later', '{\"x-a\":\"1\"}', datetime('now', '-1 second'), '2999-12-31 12:00', 'k')",
        )
        .unwrap();
        let tickets = file.claim().await;
        assert_eq!(tickets.len(), 2);
        assert_eq!((tickets[0].recipient.as_str(), tickets[0].content.as_str()), ("+905551111111", "Hello"));
        assert_eq!((tickets[1].recipient.as_str(), tickets[1].attempt), ("905551111111", 1));
        let later = file.store.message(tickets[1].id).await.unwrap().unwrap();
        assert_eq!(later.expires_at.unwrap().to_string(), "2999-12-31T12:00:00Z");
        let keyed = NewMessage {
            recipient: "r".to_owned(),
            idempotency_key: Some("k".to_owned()),
            ..NewMessage::default()
        };
        let inserted = file.store.insert(&[keyed], later.created_at).await.unwrap();
        assert_eq!(inserted, [Inserted::Conflict(later.id)]);
        assert_eq!(file.sqlite3("select message_id, status from places").unwrap(), "1|queued\n2|queued");
    }

    #[tokio::test]
    async fn a_rolled_back_insert_is_never_claimed() {
        let file = file().await;
        let insert = "insert into messages (recipient, content) values ('r', 'c')";
        file.sqlite3(&format!("begin; {insert}; rollback; begin; {insert}")).unwrap();
        assert!(file.claim().await.is_empty());
        file.sqlite3(&format!("begin; {insert}; commit")).unwrap();
        assert_eq!(file.claim().await.len(), 1);
    }

    #[tokio::test]
    async fn nonsense_is_refused_in_a_clear_sentence() {
        let file = file().await;
        let keyed = "insert into messages (recipient, content, idempotency_key) values ('r', 'c', 'used')";
        file.sqlite3(keyed).unwrap();
        for (column, value, sentence) in [
            ("status", "'sent'", "has no column named status"),
            ("send_at", "'now'", "messages_send_at_is_a_time"),
            ("send_at", "1700000000", "messages_send_at_is_a_time"),
            ("expires_at", "'2026-13-01'", "messages_expires_at_is_a_time"),
            ("created_at", "'yesterday'", "messages_created_at_is_a_time"),
            ("headers", "'{\"a\":1}'", "headers must be a JSON object whose values are all text"),
            ("headers", "'{a'", "messages_headers_is_a_json_object"),
            ("tags", "'[]'", "messages_tags_is_a_json_object"),
            ("priority", "101", "messages_priority_between_minus_100_and_100"),
            ("priority", "'high'", "messages.priority"),
            ("endpoint", "''", "messages_endpoint_not_empty"),
            ("ordering_key", "x'ff'", "cannot store BLOB value in TEXT column messages.ordering_key"),
            ("idempotency_key", "'used'", "idempotency_key was used before"),
            ("id", "-1", "messages_id_positive"),
        ] {
            let sql =
                format!("insert into messages (recipient, content, {column}) values ('r', 'c', {value})");
            let complaint = file.sqlite3(&sql).unwrap_err();
            assert!(complaint.contains(sentence), "{column}: {complaint}");
        }
        assert_eq!(file.claim().await.len(), 1);
    }

    #[tokio::test]
    async fn another_programs_commit_is_due_at_once() {
        let file = file().await;
        assert!(!file.store.due(&[""], now()).await.unwrap().new);
        file.sqlite3("insert into messages (recipient, content) values ('r', 'c')").unwrap();
        assert!(file.store.due(&[""], now()).await.unwrap().new);
        assert_eq!(file.claim().await.len(), 1);
        assert!(!file.store.due(&[""], now()).await.unwrap().new);
    }

    #[tokio::test]
    async fn another_programs_lock_does_not_keep_the_look() {
        let file = file().await;
        let other = Connection::open(&file.path).unwrap();
        other.execute_batch("begin immediate").unwrap();
        assert!(!file.store.due(&[""], now()).await.unwrap().new);
    }

    #[tokio::test]
    async fn a_lock_is_waited_for() {
        let file = file().await;
        let other = Connection::open(&file.path).unwrap();
        other.execute_batch("begin immediate").unwrap();
        let message = NewMessage { recipient: "r".to_owned(), ..NewMessage::default() };
        let store = file.store.clone();
        let call = tokio::spawn(async move { store.insert(&[message], Timestamp::EPOCH).await });
        // The call has to be at the lock before it is given up: reads go on meanwhile.
        for _ in 0..10 {
            assert!(!call.is_finished());
            assert_eq!(file.store.message(MessageId(1)).await.unwrap(), None);
        }
        other.execute_batch("commit").unwrap();
        assert!(matches!(call.await.unwrap().unwrap()[0], Inserted::New { .. }));
    }

    #[tokio::test]
    async fn calls_that_fail_leave_those_they_share_a_commit_with_alone() {
        let file = file().await;
        let message =
            |recipient: &str| NewMessage { recipient: recipient.to_owned(), ..NewMessage::default() };
        let calls = (0..200).map(|n| {
            let store = file.store.clone();
            let batch = [message("good"), message(if n % 2 == 0 { "good" } else { "" })];
            tokio::spawn(async move { store.insert(&batch, Timestamp::EPOCH).await })
        });
        for (n, call) in calls.collect::<Vec<_>>().into_iter().enumerate() {
            assert_eq!(call.await.unwrap().is_ok(), n % 2 == 0, "call {n}");
        }
        assert_eq!(file.sqlite3("select count(*) from messages").unwrap(), "200");
    }

    #[tokio::test]
    async fn what_was_answered_is_there_after_opening_again() {
        let file = file().await;
        let message = NewMessage { recipient: "r".to_owned(), ..NewMessage::default() };
        file.store.insert(&[message], Timestamp::EPOCH).await.unwrap();
        let installation = file.store.installation().await.unwrap();
        let File { store, path, _folder } = file;
        drop(store);
        let store = SqliteStore::open(&path).unwrap();
        assert!(store.message(MessageId(1)).await.unwrap().is_some());
        assert_eq!(store.installation().await.unwrap(), installation);
    }

    #[tokio::test]
    async fn a_file_that_can_not_be_used_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text.db");
        std::fs::write(&text, "This is not a database, but it is long enough to be looked at. ".repeat(40))
            .unwrap();
        for (path, why) in [
            (text.clone(), "file is not a database"),
            (folder.path().to_owned(), "unable to open database file"),
            (text.join("ams.db"), "folder can't be created"),
        ] {
            let Err(StoreError::Unavailable(sentence)) = SqliteStore::open(&path) else {
                panic!("{} was opened", path.display())
            };
            assert!(sentence.contains(why), "{sentence}");
            assert!(sentence.contains(&path.display().to_string()), "{sentence}");
        }
    }

    #[tokio::test]
    async fn a_newer_store_is_worked_on_as_long_as_it_needs_nothing_unknown() {
        let file = file().await;
        newer::migrated_by_a_newer_program(&file.store, async |sql| {
            file.sqlite3(&sql).unwrap();
        })
        .await;
        let Err(StoreError::Unsupported(sentence)) = SqliteStore::open(&file.path) else {
            panic!("it was opened")
        };
        assert!(sentence.contains("__later"), "{sentence}");
        file.sqlite3("delete from refinery_schema_history where name = 'later'").unwrap();
        file.sqlite3("update refinery_schema_history set checksum = '1' where version = 1").unwrap();
        assert!(matches!(SqliteStore::open(&file.path), Err(StoreError::Unsupported(_))));
    }

    #[tokio::test]
    async fn words_of_a_newer_program_are_shown_and_left_alone() {
        let file = file().await;
        newer::words_of_a_newer_program(Arc::new(file.store.clone()), async |sql| {
            file.sqlite3(&format!("pragma ignore_check_constraints = on; {sql}")).unwrap();
        })
        .await;
    }

    #[tokio::test]
    async fn a_shell_can_not_insert_what_is_ours_or_nobody_can_hold() {
        let file = file().await;
        let bytes = |hex: &str| format!("cast(x'{hex}' as text)");
        for (column, value, why) in [
            ("id", "9223372036854775807".to_owned(), "id is set by AMS"),
            ("id", "1".to_owned(), "id is set by AMS"),
            ("endpoint", bytes("6dfc6c6c6572"), "endpoint must be UTF-8"),
            ("endpoint", bytes("80"), "endpoint must be UTF-8"),
            ("ordering_key", bytes("e282"), "ordering_key must be UTF-8"),
            ("ordering_key", bytes("c080"), "ordering_key must be UTF-8"),
            ("content_type", bytes("f4908080"), "content_type must be UTF-8"),
            ("idempotency_key", bytes("6100ff"), "idempotency_key must be UTF-8"),
            ("idempotency_key", bytes("6100"), "idempotency_key must be UTF-8"),
            (
                "content_type",
                "'a' || char(10) || 'b'".to_owned(),
                "content_type must be a text without control",
            ),
            ("send_at", "'0000-01-01'".to_owned(), "between the years 1 and 9999"),
            ("created_at", "'0000-01-01'".to_owned(), "between the years 1 and 9999"),
            ("expires_at", "'99999-01-01'".to_owned(), "messages_expires_at_is_a_time"),
            ("priority", "99999999999".to_owned(), "messages_priority_between"),
            ("priority", "'high'".to_owned(), "cannot store TEXT value in INTEGER column"),
            ("content_type", "x'00ff'".to_owned(), "cannot store BLOB value in TEXT column"),
            (
                "tags",
                "'{\"a\": \"' || hex(zeroblob(20000)) || '\"}'".to_owned(),
                "tags must have at most 32 KiB",
            ),
            (
                "tags",
                "'{\"a\": \"\\u0000\"}'".to_owned(),
                "headers and tags must not hold the character U+0000",
            ),
        ] {
            let insert =
                format!("insert into messages (recipient, content, {column}) values ('+90', 'x', {value})");
            let refused = file.sqlite3(&insert).expect_err(&insert);
            assert!(refused.contains(why), "{insert}: {refused}");
        }
        for recipient in ["müller", "€uro", "😀", "\u{fffd}"] {
            let insert =
                format!("insert into messages (recipient, content) values ('{recipient}', '{recipient}')");
            file.sqlite3(&insert).unwrap();
        }
        let recipients: Vec<_> = file.claim().await.into_iter().map(|ticket| ticket.recipient).collect();
        assert_eq!(recipients, ["müller", "€uro", "😀", "\u{fffd}"]);
    }

    /// The rules for headers stand in three places: for the API, for the request, and here.
    #[tokio::test]
    async fn headers_that_no_request_can_carry_are_refused() {
        let file = file().await;
        let many: Vec<_> = (0..65).map(|n| format!("\"x-{n}\":\"y\"")).collect();
        let long = "x".repeat(16_400);
        for headers in [
            r#"["a"]"#,
            r#"{"a":1}"#,
            r#"{"a":["b"]}"#,
            r#"{"Host":"a"}"#,
            r#"{"Webhook-Id":"a"}"#,
            r#"{"proxy-x":"a"}"#,
            r#"{"a b":"c"}"#,
            r#"{"a]":"c"}"#,
            r#"{"":"c"}"#,
            r#"{"a":"b\nc"}"#,
            r#"{"a":"b\u0000c"}"#,
            r#"{"ä":"b"}"#,
            r#"{"a":"\ud800"}"#,
            r#"{"a":"\udc00\ud800"}"#,
            &format!("{{{}}}", many.join(",")),
            &format!("{{\"a\":\"{long}\"}}"),
        ] {
            let insert = format!(
                "insert into messages (recipient, content, headers) values ('+90', 'x', '{headers}')"
            );
            let refused = file.sqlite3(&insert).expect_err(headers);
            assert!(refused.contains("headers"), "{headers}: {refused}");
        }
        file.sqlite3(r#"insert into messages (recipient, content, headers) values ('+90', 'x', '{"X-a_b":"tab\tü\ud83d\ude00"}')"#)
            .unwrap();
    }

    /// Rows from before the store refused them, and contents, which only the claim reads whole.
    #[tokio::test]
    async fn a_row_that_can_not_be_read_ends_alone() {
        let file = file().await;
        file.sqlite3(
            "drop trigger messages_text; \
             insert into messages (recipient, content) values ('1', 'good'); \
             insert into messages (recipient, content) values ('2', cast(x'6dfc6c' as text)); \
             insert into messages (recipient, content, endpoint) values ('3', 'x', cast(x'6dfc6c' as text)); \
             insert into messages (recipient, content, send_at) values (cast(x'80' as text), 'x', '2020-01-01'); \
             insert into messages (recipient, content) values ('5', 'x'); \
             insert into cancels (message_id, at) values (5, 0); \
             insert into waiting (message_id, endpoint_id, due_at, attempts, lane, lane_tries, priority) \
             values (5, 1, 0, 99999999999, '', 0, 0); \
             insert into messages (recipient, content) values ('6', 'good')",
        )
        .unwrap();
        let claimed: Vec<_> = file.claim().await.into_iter().map(|ticket| ticket.recipient).collect();
        assert_eq!(claimed, ["1", "6"]);
        let dead = "select message_id || '|' || endpoint_id, reason from deliveries where status = 'dead' order by 1";
        let dead = file.sqlite3(dead).unwrap();
        let dead: Vec<_> = dead.lines().collect();
        assert_eq!(dead.len(), 4, "{dead:?}");
        let columns = ["2|1|content", "3|0|endpoint", "4|1|recipient", "5|1|attempts"];
        for (line, column) in dead.iter().zip(columns) {
            let (start, column) = column.rsplit_once('|').unwrap();
            assert!(line.starts_with(&format!("{start}|the message can't be read: {column}: ")), "{line}");
        }
        assert!(file.claim().await.is_empty(), "each ends once");
        // It is shown as far as that is possible.
        let shown = file.store.message(MessageId(2)).await.unwrap().unwrap();
        assert_eq!((shown.content.as_str(), shown.status), ("m\u{fffd}l", crate::message::Status::Dead));
        // What is given back ends again.
        let redriven = file.store.change(Change::Redrive, &[MessageId(3)], now()).await.unwrap();
        assert_eq!((redriven, file.claim().await.len()), (vec![MessageId(3)], 0));
        assert_eq!(file.sqlite3("select status from places where message_id = 3").unwrap(), "dead");
    }

    /// A look for the next pair, or the next lane, that begins behind other bytes than those that it has found finds
    /// them for ever.
    #[tokio::test]
    async fn rows_whose_words_are_no_text_are_found_once() {
        let file = file().await;
        file.sqlite3(
            "pragma ignore_check_constraints = on; insert into unknown_endpoints (name) values (cast(x'ff' as text)); \
             insert into waiting (message_id, endpoint_id, due_at, held, attempts, lane, lane_tries, priority) values \
                 (1, 1, 0, 'endpoint_busy', 0, '', 0, 0), (2, 1, 0, cast(x'ff' as text), 0, '', 0, 0), \
                 (3, 2, 0, 'endpoint_disabled', 0, '', 0, 0), (4, 3, 0, 'endpoint_disabled', 0, '', 0, 0)",
        )
        .unwrap();
        let held = tokio::time::timeout(Duration::from_secs(10), file.store.held()).await.expect("it ends");
        let expected = [("default", Held::EndpointBusy), ("\u{fffd}", Held::EndpointDisabled)];
        assert_eq!(held.unwrap(), expected.map(|(name, held)| (name.to_owned(), held)));
        file.sqlite3("update waiting set held = null, attempts = 1, due_at = 5, lane = cast(x'ff' as text)")
            .unwrap();
        let overview = tokio::time::timeout(Duration::from_secs(10), file.store.overview(now())).await;
        assert_eq!(overview.expect("it ends").unwrap().oldest_due_at, Some(Timestamp::from_micros(5)));
    }

    /// Deliveries know their endpoint by its number.
    #[tokio::test]
    async fn an_endpoints_number_is_its_own_for_ever() {
        let file = file().await;
        let number = |name: &str| {
            let sql = format!("select id from endpoints where name = '{name}'");
            file.sqlite3(&sql).unwrap().parse::<i32>().unwrap()
        };
        assert_eq!(number("default"), 1);
        file.sqlite3("insert into messages (recipient, content, endpoint) values ('r', 'c', 'later')")
            .unwrap();
        assert!(file.claim().await.is_empty());
        file.sqlite3(
            "insert into endpoints (name, url) values ('other', 'http://a/'), ('later', 'http://b/')",
        )
        .unwrap();
        assert_eq!((number("later"), number("other")), (2, 3), "what messages named takes its number over");
        file.sqlite3(
            "insert or replace into endpoints (name, url) values ('later', 'http://c/'); \
             insert into endpoints (name, url) values ('later', 'http://d/') on conflict (name) do update set url = excluded.url",
        )
        .unwrap();
        assert_eq!(
            (number("later"), file.sqlite3("select count(*) from unknown_endpoints").unwrap()),
            (2, "0".into())
        );
        file.sqlite3("delete from endpoints where name = 'later'; update endpoints set name = 'new' where name = 'other'").unwrap();
        file.sqlite3(
            "insert into endpoints (name, url) values ('other', 'http://a/'), ('later', 'http://b/')",
        )
        .unwrap();
        assert_eq!((number("later"), number("new"), number("other")), (2, 3, 4));
        let freed = unhold(&file.store, "later", Held::EndpointDisabled, 10, now()).await;
        assert_eq!((freed, file.claim().await.len()), (1, 1));
    }

    /// Before the store refused such settings, one endpoint could have stopped the messages of all.
    #[tokio::test]
    async fn an_endpoint_that_can_not_be_is_refused_and_harms_no_other() {
        let file = file().await;
        for (name, values) in [
            ("url holds a user", "'http://user:hunter2@host/', '[]', 1"),
            ("url holds a user", "'http:\\user@host', '[]', 1"),
            ("url holds a user", "'https:u@host', '[]', 1"),
            ("final_statuses", "'http://host/', '[70000]', 1"),
            ("final_statuses", "'http://host/', '[\"a\"]', 1"),
            ("final_statuses", "'http://host/', '[[410]]', 1"),
            ("in_flight_max", "'http://host/', '[]', 99999999999"),
        ] {
            let insert = format!(
                "insert into endpoints (name, url, final_statuses, in_flight_max) values ('a', {values})"
            );
            let refused = file.sqlite3(&insert).expect_err(values);
            assert!(refused.contains(name) && !refused.contains("hunter2"), "{values}: {refused}");
        }
        file.sqlite3("insert into endpoints (name, url) values ('good', 'http://host/@?a=@')").unwrap();
        let changed = file.sqlite3("update endpoints set url = 'http://u@h' where name = 'good'");
        assert!(changed.unwrap_err().contains("url holds a user"));
        file.sqlite3(
            "drop trigger endpoints_inserted; \
             insert into endpoints (name, url, final_statuses, in_flight_max, secret) values \
                 ('bad', 'http://host/', '[70000,\"a\",404]', 99999999999, cast(x'ff' as text))",
        )
        .unwrap();
        let endpoints = file.store.endpoints().await.unwrap();
        let read: Vec<_> = endpoints.iter().map(|e| (e.name.as_str(), e.in_flight_max)).collect();
        assert_eq!(read, [("bad", u32::MAX), ("default", 1_024), ("good", 1_024)]);
        assert_eq!(endpoints[0].final_statuses, [404]);
    }

    #[tokio::test]
    async fn the_views_tell_people_what_happens() {
        let file = file().await;
        file.sqlite3(
            "insert into messages (recipient, content, endpoint) values ('r', 'c', 'default'), ('r', 'c', 'nowhere'); \
             insert into messages (recipient, content, send_at) values ('r', 'c', '2999-01-01')",
        )
        .unwrap();
        file.claim().await;
        file.sqlite3("insert into messages (recipient, content) values ('r', 'c')").unwrap();
        let seen =
            file.sqlite3("select id, status, why, next_try_at from message_status order by id").unwrap();
        assert_eq!(
            seen,
            "1|queued|its ticket is on a lane|\n\
             2|pending|held: endpoint nowhere is disabled, does not exist or can not be used|\n\
             3|pending|due at 2999-01-01T00:00:00.000Z|2999-01-01T00:00:00.000Z\n\
             4|pending|due now|"
        );
        let history = "select message_id, attempt, what from message_history order by message_id, at";
        assert_eq!(file.sqlite3(history).unwrap(), "1|0|created\n2|0|created\n3|0|created\n4|0|created");
    }

    /// The view and the program derive a message's status from its place, each in its own way.
    #[tokio::test]
    async fn the_view_and_the_program_agree() {
        let file = file().await;
        file.sqlite3(
            "insert into messages (recipient, content) \
             with recursive n(i) as (select 1 union all select i + 1 from n where i < 9) select 'r', 'c' from n",
        )
        .unwrap();
        let tickets = file.claim().await;
        let lease = LeaseId(7);
        let wanted = [Wanted { lease, batch: tickets[0].batch, positions: Mask::first(7) }];
        let begin = Begin { wanted: &wanted, repeated: false, owner: InstanceId(1) };
        let root = file.store.begin(&begin).await.unwrap()[0].root;
        let retry = Verdict::Retry { lane: "slow".to_owned(), lane_tries: 1, at: now() };
        let dead = Verdict::Dead { reason: "no".to_owned(), lane: "dlq".to_owned() };
        let verdicts = [Verdict::Sent, retry, dead, Verdict::Expired, Verdict::Release { held: None }];
        let record = |(ticket, verdict): (&Ticket, Verdict)| {
            let failed = !matches!(verdict, Verdict::Sent | Verdict::Expired | Verdict::Release { .. });
            let class = if failed { Class::Timeout } else { Class::Accepted };
            let made = !matches!(verdict, Verdict::Expired | Verdict::Release { .. });
            let outcome = made.then(|| outcome(class, None, now()));
            Record {
                ticket: ticket.clone().into(),
                lane: "messages".into(),
                lease,
                root,
                outcome: outcome.map(Into::into),
                verdict,
                judged_at: now(),
            }
        };
        let records: Vec<_> = tickets.iter().zip(verdicts).map(record).collect();
        assert!(file.store.record(&Records { records: &records, now: now() }).await.unwrap().is_empty());
        file.store.change(Change::Cancel, &[tickets[5].id, tickets[8].id], now()).await.unwrap();
        file.sqlite3("insert into messages (recipient, content) values ('r', 'c')").unwrap();
        let words = [
            "sent",
            "retrying",
            "dead",
            "expired",
            "pending",
            "cancelled",
            "processing",
            "queued",
            "cancelled",
            "pending",
        ];
        let view = file.sqlite3("select message_id, status, attempts, lane, reason from places").unwrap();
        let ids: Vec<_> = (1..=10).map(MessageId).collect();
        let read = file.store.messages(&ids).await.unwrap();
        assert_eq!(read.iter().map(|message| message.status.as_str()).collect::<Vec<_>>(), words);
        let told = |message: Message| {
            let Message { id, status, attempts, lane, reason, .. } = message;
            format!("{id}|{status}|{attempts}|{lane}|{}", reason.unwrap_or_default())
        };
        let told: Vec<_> = read.into_iter().map(told).collect();
        assert_eq!(view.lines().collect::<Vec<_>>(), told);
        assert_eq!(
            file.sqlite3("select endpoint_id, sum(sent), sum(failed), sum(dead), sum(took_us) from stats")
                .unwrap(),
            "1|1|2|1|963"
        );
    }
}
