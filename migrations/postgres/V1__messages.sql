-- Messages as their senders wrote them, what became of them, and what a writer may and may not say.
--
-- A message is written once by its sender and once by its result. In between its state stands in rows that stand for
-- a thousand messages each; see V2.
--
-- Partitioned by id range from the first day: a partition is dropped when all of it is old.

create type message_state as enum (
    'pending', 'queued', 'processing', 'sent', 'retrying', 'dead', 'cancelled', 'expired'
);

create table installation (
    -- The random number that webhook-ids carry; made here, once.
    id uuid not null,
    -- The newest migration that a program has to know. A program whose own newest is older is refused; one that
    -- knows it may work, whatever migrations came later. A migration that programs before it can't work with sets
    -- this to its own number; every other one leaves it alone.
    needs_migration integer not null default 4
);

insert into installation (id) values (gen_random_uuid());

-- PostgreSQL 15 has no identity on partitioned tables; a sequence gives the same order.
create sequence message_ids;

create table messages (
    id bigint not null default nextval('message_ids'),
    -- The transaction that wrote it: what the feeds go by, because a transaction is committed whole.
    tx xid8 not null default pg_current_xact_id(),
    created_at timestamptz not null default now(),
    send_at timestamptz,
    expires_at timestamptz,
    priority smallint not null default 0,
    endpoint text not null default 'default',
    recipient text not null,
    ordering_key text,
    idempotency_key text,
    -- Null: the standard JSON envelope is sent. Else the content itself is the body, with this type.
    content_type text,
    headers jsonb,
    tags jsonb,
    content text not null,

    constraint messages_id_positive check (id > 0),
    constraint messages_endpoint_not_empty check (endpoint <> ''),
    constraint messages_endpoint_at_most_255_characters check (length(endpoint) <= 255),
    constraint messages_recipient_not_empty check (recipient <> ''),
    constraint messages_recipient_at_most_1024_characters check (length(recipient) <= 1024),
    constraint messages_content_at_most_1_mib check (octet_length(content) <= 1048576),
    constraint messages_content_type_not_empty check (content_type <> ''),
    constraint messages_content_type_at_most_255_characters check (length(content_type) <= 255),
    constraint messages_ordering_key_not_empty check (ordering_key <> ''),
    constraint messages_ordering_key_at_most_255_characters check (length(ordering_key) <= 255),
    constraint messages_priority_between_minus_100_and_100 check (priority between -100 and 100),
    constraint messages_created_at_is_a_time check (isfinite(created_at)),
    constraint messages_send_at_is_a_time check (isfinite(send_at)),
    constraint messages_expires_at_is_a_time check (isfinite(expires_at)),
    constraint messages_expires_at_after_send_at check (expires_at > send_at),
    constraint messages_idempotency_key_not_empty check (idempotency_key <> ''),
    constraint messages_idempotency_key_at_most_255_characters check (length(idempotency_key) <= 255),
    constraint messages_headers_is_an_object_of_texts check (
        jsonb_typeof(headers) = 'object' and not jsonb_path_exists(headers, '$.* ? (@.type() != "string")')
    ),
    constraint messages_tags_is_a_json_object check (jsonb_typeof(tags) = 'object'),
    primary key (id)
) partition by range (id);

alter sequence message_ids owned by messages.id;

-- What the feeds read: a row stands in one of them.
create index messages_urgent on messages (tx, id) where priority > 0;
create index messages_normal on messages (tx, id) where priority = 0;
create index messages_bulk on messages (tx, id) where priority < 0;

-- The test of the trigger's condition is all that an ordinary insert pays. The id is the one that the sequence has
-- just given for this row.
create function refuse_what_is_ours() returns trigger language plpgsql as $$
begin
    raise exception '% is set by AMS; insert without it', case
        when new.tx is distinct from pg_catalog.pg_current_xact_id() then 'tx'
        else 'id'
    end;
end
$$;

create trigger messages_ours before insert on messages for each row
when (new.tx is distinct from pg_current_xact_id() or new.id is distinct from currval('message_ids'::regclass))
execute function refuse_what_is_ours();

-- What a row may hold beyond the constraints: what can be delivered, and read back. RFC 3339 can write the years 1
-- to 9999.
create function check_times() returns trigger language plpgsql as $$
begin
    raise exception '% must lie between the years 1 and 9999', case
        when not new.created_at between '0001-01-01T00:00:00Z' and '9999-12-31T23:59:59.999999Z' then 'created_at'
        when not new.send_at between '0001-01-01T00:00:00Z' and '9999-12-31T23:59:59.999999Z' then 'send_at'
        else 'expires_at'
    end using errcode = 'check_violation';
end
$$;

create trigger messages_times before insert on messages for each row
when (
    not new.created_at between '0001-01-01T00:00:00Z'::timestamptz and '9999-12-31T23:59:59.999999Z'::timestamptz
    or not new.send_at between '0001-01-01T00:00:00Z'::timestamptz and '9999-12-31T23:59:59.999999Z'::timestamptz
    or not new.expires_at between '0001-01-01T00:00:00Z'::timestamptz and '9999-12-31T23:59:59.999999Z'::timestamptz
)
execute function check_times();

-- The rules for a request's headers; `src/intake/rules.rs` says the same to callers of the API.
create function check_headers() returns trigger language plpgsql as $$
declare
    fault text;
begin
    if new.content_type ~ '[\u0001-\u0008\u000a-\u001f\u007f]' then
        raise exception 'content_type must be a text without control characters' using errcode = 'check_violation';
    end if;
    if new.headers is null or pg_catalog.jsonb_typeof(new.headers) <> 'object' then
        return new;
    end if;
    select case
        when pg_catalog.count(*) > 64 then 'must be at most 64'
        when pg_catalog.sum(pg_catalog.octet_length(key) + pg_catalog.octet_length(value #>> '{}')) > 16384
            then 'must have at most 16 KiB, names and values together'
        else pg_catalog.min(case
            when pg_catalog.jsonb_typeof(value) <> 'string' then 'must be a JSON object of texts'
            when key !~ '^[-!#$%&''*+.^_`|~0-9A-Za-z]+$' then 'have a name that is no header name'
            when key ~* '^(webhook-|ams-|proxy-)' or pg_catalog.lower(key) in (
                'host', 'content-length', 'content-type', 'transfer-encoding', 'connection', 'keep-alive',
                'upgrade', 'te', 'trailer', 'expect', 'user-agent', 'idempotency-key'
            ) then 'name one that is set by AMS; leave it out'
            when value #>> '{}' ~ '[\u0001-\u0008\u000a-\u001f\u007f]' then 'have a value with control characters'
        end)
    end into fault from pg_catalog.jsonb_each(new.headers);
    if fault is not null then
        raise exception 'headers %', fault using errcode = 'check_violation';
    end if;
    return new;
end
$$;

create trigger messages_headers before insert on messages for each row
when (new.headers is not null or new.content_type is not null)
execute function check_headers();

-- Twice what the API takes, because jsonb writes more blanks.
create function check_tags() returns trigger language plpgsql as $$
begin
    raise exception 'tags must have at most 32 KiB' using errcode = 'check_violation';
end
$$;

create trigger messages_tags before insert on messages for each row
when (octet_length(new.tags::text) > 32768)
execute function check_tags();

-- No unique index spans partitions, so the keys stand in a table of their own.
create table idempotency_keys (
    key text primary key,
    message_id bigint not null,
    created_at timestamptz not null
);

-- Small: keys come in the order of their age.
create index idempotency_keys_by_age on idempotency_keys using brin (created_at);

-- A function that runs with its owner's rights looks names up in our schema and nowhere else. The schema of
-- temporary tables stands last in its path, because it stands first in every path that does not name it.
do $do$
begin
    execute format($sql$
        create function %1$I.claim_idempotency_key() returns trigger language plpgsql security definer
        set search_path = pg_catalog, %1$I, pg_temp as $body$
        begin
            -- An exception block would cost a subtransaction for each row.
            insert into %1$I.idempotency_keys (key, message_id, created_at)
            values (new.idempotency_key, new.id, new.created_at)
            on conflict do nothing;
            if not found then
                raise exception 'idempotency_key was used before; a message with this key is stored already'
                    using errcode = 'unique_violation', constraint = 'idempotency_keys_pkey';
            end if;
            return null;
        end
        $body$
    $sql$, current_schema());
end
$do$;

create trigger messages_idempotency_key after insert on messages for each row
when (new.idempotency_key is not null)
execute function claim_idempotency_key();

-- A delivery that has ended: one message to one endpoint. Only a success that comes late, and a redrive, change it.
create table deliveries (
    message_id bigint not null,
    endpoint_id integer not null,
    -- `sent`, `dead`, `cancelled` or `expired`.
    status message_state not null,
    -- Attempts made, over all lanes.
    attempts integer not null,
    -- The lane of the last attempt; empty: there was none.
    lane text not null,
    finished_at timestamptz not null,
    reason text,
    -- The attempt that succeeded; null where none did. The batch of its ticket tells attempts apart.
    batch bigint,
    started_at timestamptz,
    connect_us integer,
    head_us integer,
    body_us integer,
    http_status smallint,
    address text,
    provider_message_id text,
    -- The first 4 KiB of the answer's body.
    answer text,
    primary key (message_id, endpoint_id)
) partition by range (message_id);

create index deliveries_unsent on deliveries (status, message_id) where status <> 'sent';

-- An attempt that is not told by its delivery: one that failed, or a further success. The key makes a record that is
-- written twice harmless.
create table attempts (
    message_id bigint not null,
    endpoint_id integer not null,
    batch bigint not null,
    attempt integer not null,
    started_at timestamptz not null,
    connect_us integer not null,
    head_us integer not null,
    body_us integer not null,
    -- The code of the answer's status line, when one arrived.
    status smallint,
    lane text not null,
    class text not null,
    address text not null,
    error text,
    provider_message_id text,
    answer text not null,
    primary key (message_id, endpoint_id, batch)
) partition by range (message_id);

-- Rows whose id has no partition of its own stand here: a sequence that was moved ahead, and days without a
-- producer take no more from a writer than that.
create table messages_default (like messages including all);
alter table messages attach partition messages_default default;
create table deliveries_default (like deliveries including all);
alter table deliveries attach partition deliveries_default default;
create table attempts_default (like attempts including all);
alter table attempts attach partition attempts_default default;

-- Makes one partition, the first that is missing of the four from the ids in use on, and says whether there may
-- be more to do. One for each call, because to attach it locks the default partition until the end of the
-- transaction, and who locks two may wait for somebody who waits for him.
do $do$
begin
    execute format($sql$
        create function %1$I.make_partitions() returns boolean language plpgsql security definer
        set search_path = pg_catalog, %1$I, pg_temp
        -- Whoever needs the default partition waits behind a lock that is waited for. A reader may hold it for hours.
        set lock_timeout = '100ms' as $body$
        declare
            -- Few enough partitions that no statement opens more than the 16 relations that a backend locks cheaply before
            -- PostgreSQL 18, small enough that what is old goes soon.
            size constant bigint := 5000000;
            -- The partition of the last id that there can be.
            last_number constant bigint := 9223372036854775807 / size - 1;
            number bigint;
            ahead bigint;
            parent text;
            part text;
            id text;
            taken boolean;
        begin
            if not pg_try_advisory_xact_lock(hashtext('ams make_partitions')) then
                return false;
            end if;
            select last_value / size, last_value / size + 3 into number, ahead from %1$I.message_ids;
            while number <= ahead and number <= last_number loop
                foreach parent in array array['messages', 'deliveries', 'attempts'] loop
                    part := format('%%s_%%s', parent, number);
                    id := case parent when 'messages' then 'id' else 'message_id' end;
                    continue when to_regclass(format('%%I.%%I', %1$L, part)) is not null;
                    -- What the default partition has taken in stays there.
                    execute format(
                        'select exists (select from %%I.%%I where %%I >= $1 and %%I < $2)',
                        %1$L, parent || '_default', id, id
                    ) into taken using number * size, (number + 1) * size;
                    continue when taken;
                    execute format(
                        'create table %%1$I.%%2$I (like %%1$I.%%3$I including all)',
                        %1$L, part, parent
                    );
                    execute format(
                        'alter table %%1$I.%%2$I attach partition %%1$I.%%3$I for values from (%%4$s) to (%%5$s)',
                        %1$L, parent, part, number * size, (number + 1) * size
                    );
                    return true;
                end loop;
                number := number + 1;
            end loop;
            return false;
        end
        $body$
    $sql$, current_schema());
end
$do$;

