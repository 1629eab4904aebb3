-- Closes holes: whose rights a function runs with, what a row may hold, and that every id finds a partition.

-- A function that runs with its owner's rights looks names up in our schema and nowhere else. The schema of
-- temporary tables stands last in its path, because it stands first in every path that does not name it.
do $do$
begin
    execute format($sql$
        create or replace function %1$I.claim_idempotency_key() returns trigger language plpgsql security definer
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

-- Rows whose id has no partition of its own stand here: a statement of millions of rows, a sequence that was
-- moved ahead, and hours without a producer take no more from a writer than that.
create table messages_default (like messages including all) with (fillfactor = 50);
alter table messages attach partition messages_default default;
create table attempts_default (like attempts including all);
alter table attempts attach partition attempts_default default;

-- Makes one partition, the first that is missing of the five from the ids in use on, and says whether there may
-- be more to do. One for each call, because to attach it locks the default partition until the end of the
-- transaction, and who locks two may wait for somebody who waits for him.
drop function make_partitions();
do $do$
begin
    execute format($sql$
        create function %1$I.make_partitions() returns boolean language plpgsql security definer
        set search_path = pg_catalog, %1$I, pg_temp
        -- Whoever needs the default partition waits behind a lock that is waited for. A reader may hold it for hours.
        set lock_timeout = '100ms' as $body$
        declare
            size constant bigint := 500000;
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
            select last_value / size, last_value / size + 4 into number, ahead from %1$I.message_ids;
            while number <= ahead and number <= last_number loop
                foreach parent in array array['messages', 'attempts'] loop
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
                        'create table %%1$I.%%2$I (like %%1$I.%%3$I including all) with (fillfactor = %%4$s)',
                        %1$L, part, parent, case parent when 'messages' then 50 else 100 end
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

revoke execute on function make_partitions() from public;
do $$
begin
    if exists (select 1 from pg_roles where rolname = 'ams_service') then
        grant execute on function make_partitions() to ams_service;
    end if;
end
$$;

-- The id is ours, too: it is the one that the sequence has just given for this row.
create or replace function refuse_what_is_ours() returns trigger language plpgsql as $$
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
        when new.reason is not null then 'reason'
        else 'id'
    end;
end
$$;

drop trigger messages_ours on messages;
create trigger messages_ours before insert on messages for each row
when (
    new.status is distinct from 'pending' or new.epoch is distinct from 0 or new.attempts is distinct from 0
    or new.lane_tries is distinct from 0 or new.lane is distinct from '' or new.held is not null
    or new.due_at is not null or new.finished_at is not null or new.reason is not null
    or new.id is distinct from currval('message_ids'::regclass)
)
execute function refuse_what_is_ours();

-- What a row may hold beyond the constraints of V1: what can be delivered, and read back. In a trigger, because a
-- constraint would be tested again at each change of the row, and would stop this migration at rows of before.
-- RFC 3339 can write the years 1 to 9999.
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

-- A setting that no program can hold would stop the messages of all endpoints, and a password in a URL is
-- shown to everybody who may read.
create function check_endpoint() returns trigger language plpgsql as $$
begin
    -- Programs that read URLs pass over these three characters. A URL of before may stay while something else changes.
    if (tg_op = 'INSERT' or new.url is distinct from old.url) and pg_catalog.translate(new.url, e'\t\n\r', '') ~* '^\s*https?:[/\\]*[^/\\?#]*@' then
        raise exception 'url holds a user or password; take them out, and let a header or the secret identify you'
            using errcode = 'check_violation';
    end if;
    if pg_catalog.array_ndims(new.final_statuses) > 1
        or exists (select from pg_catalog.unnest(new.final_statuses) s where s is null or s not between 100 and 599)
    then
        raise exception 'final_statuses must be a plain list of numbers from 100 to 599' using errcode = 'check_violation';
    end if;
    return new;
end
$$;

create trigger endpoints_values before insert or update of url, final_statuses on endpoints for each row
execute function check_endpoint();

-- The consumer groups that read a lane, apart from the lane's settings: each group's consumers say every few
-- seconds that they are there. A group that is silent for a lease's time does not count.
create table lane_groups (
    topic text not null,
    consumer_group text not null,
    seen_at timestamptz not null,
    primary key (topic, consumer_group)
);

do $$
begin
    if exists (select 1 from pg_roles where rolname = 'ams_reader') then
        grant select on lane_groups to ams_reader;
    end if;
    if exists (select 1 from pg_roles where rolname = 'ams_service') then
        grant select, insert, update, delete on lane_groups to ams_service;
    end if;
end
$$;
