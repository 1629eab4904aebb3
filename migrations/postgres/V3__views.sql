-- What became of messages, for people; and who may do what.

create function rfc3339(moment timestamptz) returns text language sql stable as $$
    select to_char(moment at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
$$;

create view message_status as
select
    id,
    endpoint,
    recipient,
    status,
    case
        when held = 'endpoint_busy' then 'held: endpoint ' || endpoint || ' is busy'
        when held = 'endpoint_closed' then 'held: endpoint ' || endpoint || ' is disabled or does not exist'
        when status = 'pending' and send_at is not null then 'due at ' || rfc3339(send_at)
        when status = 'pending' then 'due now'
        when status = 'queued' then 'its ticket is on a lane'
        when status = 'processing' then 'a try is under way'
        when status = 'retrying' then 'due at ' || rfc3339(due_at) || coalesce('; last: ' || reason, '')
        when status = 'expired' then 'not sent before ' || rfc3339(expires_at)
        else reason
    end as why,
    attempts,
    timed_at as next_try_at,
    created_at,
    finished_at
from messages;

-- One line for each event: its creation, each try, and an end that no try brought.
create view message_history as
select
    id as message_id,
    created_at as at,
    0 as attempt,
    'created' as what,
    null::smallint as status,
    null::text as error,
    null::numeric as took_ms,
    null::text as lane,
    null::text as address
from messages
union all
select
    message_id,
    started_at,
    attempt,
    class,
    status,
    error,
    (connect_us::bigint + head_us + body_us) / 1000.0,
    lane,
    address
from attempts
union all
select id, finished_at, attempts, status::text, null, reason, null, null, null
from messages
where unsent is not null;

-- Roles belong to the whole server: another store there may have made them, and whoever migrates may
-- not be allowed to, which is no reason to stop.
create function make_role(name text) returns boolean language plpgsql as $$
begin
    execute format('create role %I nologin', name);
    return true;
exception
    when duplicate_object or unique_violation then
        return true;
    when insufficient_privilege then
        raise notice 'role % was not made: not allowed here', name;
        return exists (select 1 from pg_roles where rolname = name);
end
$$;

do $$
begin
    if make_role('ams_writer') then
        grant insert (
            endpoint, recipient, content, content_type, headers, ordering_key, priority, send_at, expires_at,
            idempotency_key, tags
        ) on messages to ams_writer;
        grant usage on sequence message_ids to ams_writer;
    end if;
    if make_role('ams_reader') then
        grant select on
            messages, attempts, idempotency_keys, instances, leader, batches, leases, lanes, dead_letters,
            message_status, message_history
        to ams_reader;
        grant select (name, url, timeout_ms, in_flight_max, final_statuses, enabled) on endpoints to ams_reader;
    end if;
    if make_role('ams_service') then
        grant select, insert, update, delete on
            messages, attempts, idempotency_keys, instances, leader, batches, leases, lanes, dead_letters, endpoints
        to ams_service;
        grant select on installation, message_status, message_history, refinery_schema_history to ams_service;
        grant usage, select on all sequences in schema public to ams_service;
        grant execute on function make_partitions() to ams_service;
    end if;
end
$$;

revoke execute on function make_partitions() from public;
drop function make_role(text);
