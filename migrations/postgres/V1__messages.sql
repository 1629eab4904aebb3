-- Messages, their tries, and what a writer may and may not say.
--
-- Partitioned by id range from the first day: a partition is dropped when all of it is old, and every
-- batched statement carries id bounds, so that it looks at the partitions it needs.

create type message_state as enum (
    'pending', 'queued', 'processing', 'sent', 'retrying', 'dead', 'cancelled', 'expired'
);

create table installation (
    -- The random number that webhook-ids carry; made here, once.
    id uuid not null
);

insert into installation (id) values (gen_random_uuid());

-- PostgreSQL 15 has no identity on partitioned tables; a sequence gives the same order.
create sequence message_ids;

create table messages (
    id bigint not null default nextval('message_ids'),
    created_at timestamptz not null default now(),
    -- Set by AMS from here ...
    due_at timestamptz,
    finished_at timestamptz,
    status message_state not null default 'pending',
    epoch integer not null default 0,
    attempts integer not null default 0,
    lane_tries integer not null default 0,
    -- The lane of its next or last try; empty: the fresh lane.
    lane text not null default '',
    -- Why the row is kept back although it is due.
    held text,
    reason text,
    -- ... to here; the rest is the writer's.
    priority smallint not null default 0,
    send_at timestamptz,
    expires_at timestamptz,
    endpoint text not null default 'default',
    recipient text not null,
    ordering_key text,
    idempotency_key text,
    -- Null: the standard JSON envelope is sent. Else the content itself is the body, with this type.
    content_type text,
    headers jsonb,
    tags jsonb,
    content text not null,
    -- Generated, because a later status change then touches no index and stays on its page (HOT).
    fresh boolean generated always as (status = 'pending' and held is null and send_at is null) stored,
    -- When a row that waits for its time is due; null for every other row.
    timed_at timestamptz generated always as (
        case
            when held is not null then null
            when status = 'retrying' then due_at
            when status = 'pending' then send_at
        end
    ) stored,
    -- The status of a row that ended without being sent; null for every other row.
    unsent message_state generated always as (
        case when status in ('dead', 'cancelled', 'expired') then status end
    ) stored,

    constraint messages_id_positive check (id > 0),
    constraint messages_held_known check (held in ('endpoint_busy', 'endpoint_closed')),
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

-- Each index holds only the rows that somebody looks for.
create index messages_fresh on messages (id) where fresh;
create index messages_timed on messages (lane, timed_at, id) where timed_at is not null;
create index messages_held on messages (endpoint, held, id) where held is not null;
create index messages_unsent on messages (unsent, id) where unsent is not null;

-- The test of the trigger's condition is all that an ordinary insert pays.
create function refuse_what_is_ours() returns trigger language plpgsql as $$
begin
    raise exception '% is set by AMS; insert without it', case
        when new.status is distinct from 'pending' then 'status'
        when new.epoch is distinct from 0 then 'epoch'
        when new.attempts is distinct from 0 then 'attempts'
        when new.lane_tries is distinct from 0 then 'lane_tries'
        when new.lane is distinct from '' then 'lane'
        when new.held is not null then 'held'
        when new.due_at is not null then 'due_at'
        when new.finished_at is not null then 'finished_at'
        else 'reason'
    end;
end
$$;

create trigger messages_ours before insert on messages for each row
when (
    new.status is distinct from 'pending' or new.epoch is distinct from 0 or new.attempts is distinct from 0
    or new.lane_tries is distinct from 0 or new.lane is distinct from '' or new.held is not null
    or new.due_at is not null or new.finished_at is not null or new.reason is not null
)
execute function refuse_what_is_ours();

-- No unique index spans partitions, so the keys stand in a table of their own.
create table idempotency_keys (
    key text primary key,
    message_id bigint not null,
    created_at timestamptz not null
);

create function claim_idempotency_key() returns trigger language plpgsql security definer
set search_path from current as $$
begin
    insert into idempotency_keys (key, message_id, created_at)
    values (new.idempotency_key, new.id, new.created_at);
    return null;
exception when unique_violation then
    raise exception 'idempotency_key was used before; a message with this key is stored already'
        using errcode = 'unique_violation', constraint = 'idempotency_keys_pkey';
end
$$;

create trigger messages_idempotency_key after insert on messages for each row
when (new.idempotency_key is not null)
execute function claim_idempotency_key();

-- One row for each try. The key makes a record that is written twice harmless.
create table attempts (
    message_id bigint not null,
    epoch integer not null,
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
    -- The first 4 KiB of the answer's body.
    answer text not null,
    primary key (message_id, epoch)
) partition by range (message_id);

-- Makes the partitions of half a million ids each, four ahead of the ids in use. A partition is built
-- apart and then attached, which waits for nobody who writes.
create function make_partitions() returns void language plpgsql security definer
set search_path from current as $$
declare
    size constant bigint := 500000;
    used bigint;
begin
    perform pg_advisory_xact_lock(hashtext('ams make_partitions'));
    select last_value into used from message_ids;
    for number in used / size .. used / size + 4 loop
        if to_regclass(format('messages_%s', number)) is null then
            execute format('create table messages_%s (like messages including all) with (fillfactor = 50)', number);
            execute format(
                'alter table messages attach partition messages_%s for values from (%s) to (%s)',
                number, number * size, (number + 1) * size
            );
        end if;
        if to_regclass(format('attempts_%s', number)) is null then
            execute format('create table attempts_%s (like attempts including all)', number);
            execute format(
                'alter table attempts attach partition attempts_%s for values from (%s) to (%s)',
                number, number * size, (number + 1) * size
            );
        end if;
    end loop;
end
$$;

select make_partitions();
