//! Roles of least privilege, as somebody attacks with them: whose rights the store's functions run with, and what
//! each role can read and change beyond what the documents promise.

use std::time::Duration;

use ams::testclient::TestClientOptions;
use tokio_postgres::Client;

use crate::harness::*;

/// What a writer may say of a message.
const WRITABLE: [&str; 11] = [
    "endpoint",
    "recipient",
    "content",
    "content_type",
    "headers",
    "ordering_key",
    "priority",
    "send_at",
    "expires_at",
    "idempotency_key",
    "tags",
];
const ROLES: [&str; 3] = ["ams_writer", "ams_reader", "ams_service"];

/// A stack, its owner, and a login in one of our roles.
struct Attack {
    stack: Stack,
    owner: Client,
    login: String,
}

impl Attack {
    async fn new(role: &str) -> Attack {
        let receiver = Receiver::start(TestClientOptions::default()).await;
        let stack = Stack::new("roles", &receiver).await;
        let owner = stack.sql().await;
        let login = format!("login_{}", stack.name);
        owner.batch_execute(&format!("create role {login} login in role {role}")).await.unwrap();
        owner
            .batch_execute(
                "insert into endpoints (name, url, secret) values ('sms', 'http://h/', 'whsec_c2VjcmV0') \
                 on conflict (name) do update set secret = excluded.secret",
            )
            .await
            .unwrap();
        Attack { stack, owner, login }
    }

    /// A new session of the login.
    async fn session(&self) -> Client {
        let mut url = url::Url::parse(&self.stack.database_url).unwrap();
        url.set_username(&self.login).unwrap();
        sql_on(url.as_str()).await
    }

    /// The first column, as texts.
    async fn list(&self, sql: &str) -> Vec<String> {
        self.owner.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    }

    async fn relations(&self, kinds: &str) -> Vec<String> {
        let of = format!("relnamespace = 'public'::regnamespace and relkind in ({kinds})");
        self.list(&format!("select relname::text from pg_class where {of} order by 1")).await
    }

    async fn columns(&self, table: &str) -> Vec<String> {
        let of = format!("attrelid = 'public.{table}'::regclass and attnum > 0 and not attisdropped");
        self.list(&format!("select attname::text from pg_attribute where {of} order by attnum")).await
    }

    /// Asserts that the login has become nothing more than it was.
    async fn assert_powerless(&self, after: &str) {
        let power = "select rolsuper or rolcreaterole or rolcreatedb or rolbypassrls, \
                     (select count(*) from pg_auth_members where member = pg_roles.oid) \
                     from pg_roles where rolname = $1";
        let row = self.owner.query_one(power, &[&self.login]).await.unwrap();
        assert_eq!((row.get::<_, bool>(0), row.get::<_, i64>(1)), (false, 1), "after {after}");
    }

    async fn end(self) {
        // What its sessions have made goes once the server has noticed that they are gone.
        let drop = format!("drop role {}", self.login);
        until("the role is dropped", Duration::from_secs(20), async || {
            self.owner.batch_execute(&drop).await.is_ok()
        })
        .await;
    }
}

/// In front of everything of ours, something of the same name in the session's own schema, with triggers where that
/// is possible: a function of ours that takes it for ours runs the attacker's code with its own rights.
async fn poison(attack: &Attack, session: &Client) {
    let evil = format!(
        "create temp table stolen (ran_as name, secrets text); \
         create function pg_temp.evil() returns trigger language plpgsql as $$ \
         begin \
             begin \
                 insert into pg_temp.stolen select current_user, string_agg(secret, ',') from public.endpoints; \
             exception when others then \
                 insert into pg_temp.stolen values (current_user, null); \
             end; \
             begin execute 'alter role {} superuser'; exception when others then null; end; \
             return coalesce(new, old); \
         end $$",
        attack.login
    );
    session.batch_execute(&evil).await.unwrap();
    // Functions that ours call, and ours themselves, in the schema that an unqualified name must not lead to.
    for (name, arguments, returns) in [
        ("format", "text, bigint", "text"),
        ("format", "text, text, bigint", "text"),
        ("to_regclass", "text", "regclass"),
        ("hashtext", "text", "integer"),
        ("pg_try_advisory_xact_lock", "integer", "boolean"),
        ("translate", "text, text, text", "text"),
        ("lower", "text", "text"),
        ("octet_length", "text", "integer"),
        ("jsonb_typeof", "jsonb", "text"),
        ("currval", "regclass", "bigint"),
        ("nextval", "regclass", "bigint"),
        ("pg_current_xact_id", "", "xid8"),
        ("make_partitions", "", "boolean"),
        ("rfc3339", "timestamptz", "text"),
    ] {
        session
            .batch_execute(&format!(
                "create function pg_temp.{name}({arguments}) returns {returns} language plpgsql as $$ begin \
                     insert into pg_temp.stolen values (current_user, null); return null; \
                 end $$"
            ))
            .await
            .unwrap();
    }
    for name in attack.relations("'r', 'p', 'v', 'S'").await {
        let columns = "select string_agg(format('%I %s', attname, format_type(atttypid, atttypmod)), ', ' order by attnum) \
                       from pg_attribute where attrelid = $1::text::regclass and attnum > 0 and not attisdropped";
        let columns: String =
            attack.owner.query_one(columns, &[&format!("public.{name}")]).await.unwrap().get(0);
        session
            .batch_execute(&format!(
                "create temp table \"{name}\" ({columns}); \
                 create trigger evil before insert or update or delete on pg_temp.\"{name}\" \
                     for each row execute function pg_temp.evil(); \
                 create trigger evil_too after insert or update or delete or truncate on pg_temp.\"{name}\" \
                     for each statement execute function pg_temp.evil()"
            ))
            .await
            .unwrap();
    }
    // A sequence is read as a table is.
    session.batch_execute("insert into pg_temp.message_ids (last_value) values (7000000)").await.unwrap();
    session.batch_execute("delete from pg_temp.stolen").await.unwrap();
}

#[tokio::test]
async fn temporary_objects_in_front_of_ours_run_with_nobody_elses_rights() {
    for role in ROLES {
        let attack = Attack::new(role).await;
        for path in ["", "set search_path = pg_temp, public", "set search_path = public, pg_temp, pg_catalog"]
        {
            let session = attack.session().await;
            poison(&attack, &session).await;
            session.batch_execute(path).await.unwrap();
            let key = format!("key {path}");
            let insert = "insert into public.messages (recipient, content, idempotency_key, headers, content_type, tags) \
                          values ('+90', 'x', $1, '{\"x-a\": \"b\"}', 'text/plain', '{}')";
            let taken = [session.execute(insert, &[&key]).await, session.execute(insert, &[&key]).await];
            let may_insert = role != "ams_reader";
            assert_eq!(taken[0].is_ok(), may_insert, "{role} {path}: {taken:?}");
            assert!(taken[1].is_err(), "{role} {path}: one key was taken twice");
            for function in attack
                .list("select proname::text from pg_proc where pronamespace = 'public'::regnamespace")
                .await
            {
                let called = session.batch_execute(&format!("select public.{function}()")).await;
                let may_call = role == "ams_service" && function == "make_partitions";
                assert_eq!(called.is_ok(), may_call, "{role} {path}: {function}: {called:?}");
            }
            for view in attack.relations("'v'").await {
                let read = session.batch_execute(&format!("select * from public.{view}")).await;
                assert_eq!(read.is_ok(), role != "ams_writer", "{role}: {view}: {read:?}");
            }
            let ran = "select count(*), count(*) filter (where ran_as <> session_user or secrets is not null) from pg_temp.stolen";
            let row = session.query_one(ran, &[]).await.unwrap();
            assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (0, 0), "{role} {path}");
            attack.assert_powerless(path).await;
        }
        let keys = attack.list("select key from idempotency_keys").await.len();
        assert_eq!(keys, if role == "ams_reader" { 0 } else { 3 }, "the keys stand where they belong");
        attack.end().await;
    }
}

#[tokio::test]
async fn functions_that_run_with_their_owners_rights_name_their_schema() {
    let attack = Attack::new("ams_writer").await;
    let loose = "select proname::text || ' ' || coalesce(array_to_string(proconfig, ' '), '') from pg_proc \
                 where pronamespace = 'public'::regnamespace and prosecdef \
                     and not coalesce(proconfig, '{}') @> '{\"search_path=pg_catalog, public, pg_temp\"}'";
    assert_eq!(attack.list(loose).await, Vec::<String>::new());
    let definers = "select proname::text from pg_proc where pronamespace = 'public'::regnamespace and prosecdef order by 1";
    assert_eq!(
        attack.list(definers).await,
        [
            "claim_idempotency_key",
            "close_breaker",
            "drop_old_partition",
            "make_partitions",
            "number_endpoint"
        ]
    );
    attack.end().await;
}

/// What no role of ours may do.
fn forbidden(login: &str) -> Vec<String> {
    let mut forbidden: Vec<String> = [
        "set role postgres",
        "set session authorization postgres",
        "create table public.mine (n int)",
        "create schema mine",
        "create function public.mine() returns int language sql as 'select 1'",
        "create function public.format(text, bigint) returns text language sql as 'select $1'",
        "alter table public.messages disable trigger all",
        "alter table public.messages add column mine int",
        "alter function public.claim_idempotency_key() security invoker",
        "alter function public.make_partitions() set search_path = pg_temp",
        "create or replace view public.message_status as select 1 as id",
        "create trigger mine before insert on public.messages for each row execute function public.refuse_what_is_ours()",
        "create rule mine as on insert to public.messages do instead nothing",
        "drop table public.messages_0",
        "truncate public.messages",
        "select setval('public.message_ids', 1)",
        "alter sequence public.message_ids restart",
        "copy (select 1) to program 'true'",
        "copy (select 1) to '/tmp/ams_roles'",
        "select pg_read_file('PG_VERSION')",
        "update public.installation set id = gen_random_uuid()",
        "update public.refinery_schema_history set checksum = '1'",
        "alter system set fsync = off",
    ]
    .map(str::to_owned)
    .into();
    forbidden.push(format!("alter role {login} superuser"));
    forbidden.extend(ROLES.map(|role| format!("grant {role} to {login} with admin option")));
    forbidden
}

#[tokio::test]
async fn no_role_can_do_what_is_not_its_own() {
    for role in ROLES {
        let attack = Attack::new(role).await;
        let session = attack.session().await;
        for sql in forbidden(&attack.login) {
            let refused = session.batch_execute(&sql).await;
            assert!(refused.is_err(), "{role}: {sql}");
        }
        for other in ROLES.into_iter().filter(|other| *other != role) {
            assert!(session.batch_execute(&format!("set role {other}")).await.is_err(), "{role} as {other}");
        }
        for table in attack.relations("'r', 'p', 'v'").await {
            let readable = match role {
                "ams_writer" => false,
                "ams_reader" => !matches!(
                    table.as_str(),
                    "api_keys" | "installation" | "refinery_schema_history" | "endpoints"
                ),
                _ => true,
            };
            // A partition is reached through its table only.
            let part = format!(
                "select 'yes' from pg_class where oid = 'public.{table}'::regclass and relispartition"
            );
            let readable = readable && attack.list(&part).await.is_empty();
            let read = session.batch_execute(&format!("select * from public.{table} limit 1")).await;
            assert_eq!(read.is_ok(), readable, "{role} reads {table}: {read:?}");
            if role == "ams_service" {
                continue;
            }
            for sql in
                [format!("delete from public.{table}"), format!("insert into public.{table} default values")]
            {
                assert!(session.batch_execute(&sql).await.is_err(), "{role}: {sql}");
            }
            let column = &attack.columns(&table).await[0];
            let update = format!("update public.{table} set {column} = {column}");
            assert!(session.batch_execute(&update).await.is_err(), "{role}: {update}");
        }
        assert_eq!(
            session.batch_execute("select secret from endpoints").await.is_ok(),
            role == "ams_service"
        );
        attack.assert_powerless("all of this").await;
        attack.end().await;
    }
}

#[tokio::test]
async fn nobody_can_set_the_columns_that_are_ours() {
    for role in ROLES {
        let attack = Attack::new(role).await;
        let session = attack.session().await;
        let mine =
            attack.columns("messages").await.into_iter().filter(|name| !WRITABLE.contains(&name.as_str()));
        for column in mine {
            let value = match column.as_str() {
                "id" => "4711",
                "tx" => "'1'",
                // The program gives its own time, and a writer none.
                "created_at" if role == "ams_service" => "'infinity'",
                "created_at" => "now()",
                other => panic!("what is {other}?"),
            };
            let insert =
                format!("insert into messages (recipient, content, {column}) values ('+90', 'x', {value})");
            assert!(session.batch_execute(&insert).await.is_err(), "{role}: {insert}");
        }
        let insert = "insert into messages (recipient, content) values ('+90', 'x')";
        assert_eq!(session.batch_execute(insert).await.is_ok(), role != "ams_reader");
        attack.end().await;
    }
}
