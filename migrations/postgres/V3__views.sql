-- What became of messages, for people; and who may do what.

create function rfc3339(moment timestamptz) returns text language sql stable as $$
    select to_char(moment at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
$$;

-- Where each message stands. Look-ups of one row each, because a join would read the tables whole for one message; the
-- bounds of a batch rule most of them out.
create view places as
select
    m.id as message_id,
    coalesce(
        d.status,
        case when w.lane = '' then 'pending'::message_state when w.lane <> '' then 'retrying' end,
        l.status,
        b.status,
        'pending'
    ) as status,
    w.held,
    coalesce(d.attempts, w.attempts, l.attempts, b.attempts, 0) as attempts,
    coalesce(d.lane, w.lane, l.lane, b.lane, '') as lane,
    w.due_at,
    d.finished_at,
    coalesce(d.reason, w.reason) as reason
from messages m
left join lateral (
    select status, attempts, lane, finished_at, reason from deliveries where message_id = m.id limit 1
) d on true
left join lateral (
    select held, attempts, lane, due_at, reason from waiting where message_id = m.id and d.status is null limit 1
) w on true
left join lateral (
    select 'processing'::message_state as status, coalesce(attempts[at], 0) as attempts, lane
    from (
        select array_position(ids, m.id) as at, "left", attempts, lane from leases
        where m.id between lo and hi and d.status is null and w.attempts is null offset 0
    ) l
    where at is not null and get_bit("left", at - 1) = 1 limit 1
) l on true
left join lateral (
    select 'queued'::message_state as status, coalesce(attempts[at], 0) as attempts, lane
    from (
        select array_position(ids, m.id) as at, "left", attempts, lane from batches
        where m.id between lo and hi and d.status is null and w.attempts is null and l.status is null offset 0
    ) b
    where at is not null and get_bit("left", at - 1) = 1 limit 1
) b on true;

create view message_status as
select
    m.id,
    m.endpoint,
    m.recipient,
    p.status,
    case
        when p.held = 'endpoint_busy' then 'held: endpoint ' || m.endpoint || coalesce(
            (
                select case b.cause
                    when 'failing' then ' has failed for long (last: ' || b.reason || '); it is probed from '
                    else ' asked for a pause (' || b.reason || '); it is tried again from '
                end || rfc3339(b.until) || ' on'
                from endpoints e join breakers b on b.endpoint_id = e.id where e.name = m.endpoint
            ),
            ' is busy'
        )
        when p.held = 'endpoint_rate'
            then 'held: endpoint ' || m.endpoint || ' has a rate; its attempts are made in their turn' || coalesce(
                (
                    select '; the next begins at ' || rfc3339(r.next_at)
                    from endpoints e join rates r on r.endpoint_id = e.id where e.name = m.endpoint
                ),
                ''
            )
        when p.held = 'endpoint_disabled' then 'held: endpoint ' || m.endpoint || ' is disabled, does not exist or can not be used'
        when p.status = 'pending' and coalesce(p.due_at, m.send_at) is not null
            then 'due at ' || rfc3339(coalesce(p.due_at, m.send_at))
        when p.status = 'pending' then 'due now'
        when p.status = 'queued' then 'its ticket is on a lane'
        when p.status = 'processing' then 'a try is under way'
        when p.status = 'retrying' then 'due at ' || rfc3339(p.due_at) || coalesce('; last: ' || p.reason, '')
        when p.status = 'expired' then 'not sent before ' || rfc3339(m.expires_at)
        else p.reason
    end as why,
    p.attempts,
    case when p.held is null and p.status in ('pending', 'retrying') then coalesce(p.due_at, m.send_at) end
        as next_try_at,
    m.created_at,
    p.finished_at
from messages m
join places p on p.message_id = m.id;

-- One line for each event: its creation, each attempt, and an end that no attempt brought.
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
select
    message_id,
    started_at,
    attempts,
    'accepted',
    http_status,
    null,
    (connect_us::bigint + head_us + body_us) / 1000.0,
    lane,
    address
from deliveries
where batch is not null
union all
select message_id, finished_at, attempts, status::text, null, reason, null, null, null
from deliveries
where status <> 'sent';

-- Drops the oldest partition if every message in it has ended before a time, with its deliveries and attempts. Says
-- whether it did. One for each call; a reader who holds the table is given way to after a moment.
do $do$
begin
    execute format($sql$
        create function %1$I.drop_old_partition(before timestamptz) returns boolean language plpgsql security definer
        set search_path = pg_catalog, %1$I, pg_temp
        set lock_timeout = '100ms' set enable_seqscan = on as $body$
        declare
            size constant bigint := 5000000;
            number bigint;
            first bigint;
            last bigint;
            found_one boolean;
        begin
            select min(substr(c.relname, 10)::bigint) into number
            from pg_inherits i join pg_class c on c.oid = i.inhrelid
            where i.inhparent = '%1$I.messages'::regclass and c.relname ~ '^messages_[0-9]+$';
            -- Ids in it may still be given.
            if number is null or (number + 1) * size > (select last_value from %1$I.message_ids) then
                return false;
            end if;
            first := number * size;
            last := first + size - 1;
            execute format('select exists (select from %%1$I.%%2$I where created_at >= $1 limit 1)', %1$L, 'messages_' || number)
            into found_one using before;
            if found_one then
                return false;
            end if;
            -- A place other than `deliveries`, an end that is too young, or a transaction that no feed has passed.
            if exists (select from %1$I.waiting where message_id between first and last)
                or exists (select from %1$I.batches where lo <= last and hi >= first)
                or exists (select from %1$I.leases where lo <= last and hi >= first)
                or exists (select from %1$I.dead_letters where message_id between first and last)
                or exists (select from %1$I.cancels where message_id between first and last)
            then
                return false;
            end if;
            execute format(
                'select exists (select from %%1$I.%%2$I where finished_at >= $1) '
                'or (select max(tx) from %%1$I.%%3$I) >= (select min(pg_snapshot_xmax(done)) from %%1$I.feed) '
                'or exists (select from %%1$I.feed f, pg_snapshot_xip(f.done) x '
                '    where exists (select from %%1$I.%%3$I where priority > 0 and tx = x) '
                '    or exists (select from %%1$I.%%3$I where priority = 0 and tx = x) '
                '    or exists (select from %%1$I.%%3$I where priority < 0 and tx = x)) '
                'or (select count(*) from %%1$I.%%2$I) < (select count(*) from %%1$I.%%3$I)',
                %1$L, 'deliveries_' || number, 'messages_' || number
            ) into found_one using before;
            if found_one then
                return false;
            end if;
            execute format('drop table %%1$I.%%2$I', %1$L, 'messages_' || number);
            execute format('drop table if exists %%1$I.%%2$I', %1$L, 'deliveries_' || number);
            execute format('drop table if exists %%1$I.%%2$I', %1$L, 'attempts_' || number);
            return true;
        end
        $body$
    $sql$, current_schema());
end
$do$;

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
            messages, deliveries, attempts, idempotency_keys, instances, leader, feed, batches, leases, waiting, cancels,
            stats, reconciliation, rates, breakers, lanes, lane_groups, dead_letters, unknown_endpoints, places, message_status, message_history
        to ams_reader;
        grant select (
            name, id, url, timeout_ms, in_flight_max, rate_count, rate_interval_ms, final_statuses, enabled
        ) on endpoints to ams_reader;
    end if;
    if make_role('ams_service') then
        grant select, insert, update, delete on
            messages, deliveries, attempts, idempotency_keys, instances, leader, feed, batches, leases, waiting, cancels,
            stats, reconciliation, rates, breakers, lanes, lane_groups, dead_letters, endpoints, unknown_endpoints
        to ams_service;
        grant select on installation, places, message_status, message_history, refinery_schema_history to ams_service;
        grant usage, select on all sequences in schema public to ams_service;
        grant execute on function make_partitions(), drop_old_partition(timestamptz) to ams_service;
    end if;
end
$$;

revoke execute on function make_partitions(), drop_old_partition(timestamptz) from public;
drop function make_role(text);
