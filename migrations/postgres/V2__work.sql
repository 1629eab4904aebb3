-- Who works on what: instances, the active producer, the feeds, batches and leases, what waits; and where messages go.
--
-- Small tables that change often: they are vacuumed early, and nothing walks them from their start.

-- One row for each process; it lives as long as it renews its lease.
create table instances (
    -- Never used again for another process.
    id bigint generated always as identity primary key,
    service text not null,
    host text not null,
    version text not null,
    started_at timestamptz not null,
    seen_at timestamptz not null,
    lease_until timestamptz not null,
    -- Endpoints that it can't try as fast as their messages come.
    saturated text[] not null default '{}'
);

-- The one active producer. Pacing stands here too, because it holds over all producers together.
create table leader (
    id integer primary key check (id = 1),
    owner bigint,
    until timestamptz not null,
    -- Since when somebody has led without a break: so long the store has been there for all.
    steady_since timestamptz,
    paced_until timestamptz,
    -- A pause holds for all producers and over restarts; the pacing is what the active producer said last.
    paused boolean not null default false,
    pace_count integer,
    pace_interval_ms bigint
);

insert into leader (id, until) values (1, 'epoch');

-- How far each class of priority (0 above 0, 1 for 0, 2 below 0) has been read: everything that is visible in
-- `done` has a place or is ours no more, and of what became visible since, up to `upto`, everything up to the position.
-- The sequence number is in the key, because then the newest version of a row is found first, however many old ones a
-- long transaction keeps.
create table feed (
    class smallint not null,
    seq bigint not null,
    done pg_snapshot not null,
    upto pg_snapshot not null,
    -- The position in `upto`; null: all of it has been read.
    at_tx xid8,
    at_id bigint,
    -- Messages up to this id got their places when the feeds were made anew; the feeds take later ones only.
    base_id bigint not null default 0,
    primary key (class, seq)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

insert into feed (class, seq, done, upto)
select class, 0, pg_current_snapshot(), pg_current_snapshot() from generate_series(0, 2) class;

-- Deliveries that were claimed together, until all have been begun. Those whose bit is set are queued.
create table batches (
    -- Random: it fences the tickets that name it.
    id bigint primary key,
    -- The first batch that these deliveries were in; their positions never change.
    root bigint not null,
    lane text not null,
    owner bigint not null,
    -- The lowest and the highest id.
    lo bigint not null,
    hi bigint not null,
    ids bigint[] not null,
    endpoints integer[] not null,
    -- Attempts made before, over all lanes and on this one; null: none.
    attempts integer[],
    lane_tries integer[],
    -- When each was due and ends, where that is not what the message says; null: as the message says.
    dues timestamptz[],
    expiries timestamptz[],
    "left" varbit not null,
    created_at timestamptz not null,
    partition integer,
    last_offset bigint
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

alter table batches alter ids set storage external;
create index batches_by_root on batches (root);

-- Deliveries of one batch that one consumer has begun together, until all are recorded. Those whose bit is set are
-- processing. The consumer picks the number.
create table leases (
    id bigint primary key,
    root bigint not null,
    batch bigint not null,
    lane text not null,
    owner bigint not null,
    lo bigint not null,
    hi bigint not null,
    ids bigint[] not null,
    endpoints integer[] not null,
    attempts integer[],
    lane_tries integer[],
    dues timestamptz[],
    expiries timestamptz[],
    "left" varbit not null
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

alter table leases alter ids set storage external;
create index leases_by_root on leases (root);

-- Deliveries that wait for a time, or for their endpoint. Whoever claims one deletes it.
create table waiting (
    message_id bigint not null,
    endpoint_id integer not null,
    -- Before this time it is not due, held or not.
    due_at timestamptz not null,
    -- Why it is kept back although it is due.
    held text,
    attempts integer not null,
    -- The lane of its next attempt; empty: the fresh lane.
    lane text not null,
    lane_tries integer not null,
    priority smallint not null,
    expires_at timestamptz,
    -- What the last attempt came to.
    reason text,
    -- Its time was reserved under its endpoint's rate.
    reserved boolean not null default false,

    constraint waiting_held_known check (held in ('endpoint_busy', 'endpoint_rate', 'endpoint_disabled')),
    primary key (message_id, endpoint_id)
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);

create index waiting_due on waiting (lane, due_at, message_id) where held is null;
create index waiting_held on waiting (endpoint_id, held, priority desc, message_id) where held is not null;
create index waiting_expires on waiting (expires_at) where expires_at is not null;

-- Messages that were cancelled before a feed came to them: the feed passes over them, and takes them out of here.
create table cancels (
    message_id bigint primary key,
    at timestamptz not null
);

-- The reconciliation proves that every message that a feed has passed has a place. One row: how far it has come, what it
-- has found, and the server on which the feeds' transaction numbers mean something.
create table reconciliation (
    id integer primary key check (id = 1),
    at_id bigint not null default 0,
    -- The feeds were made anew, and what stood before them has not been looked at since.
    urgent boolean not null default false,
    checked bigint not null default 0,
    repaired bigint not null default 0,
    finished_at timestamptz,
    feeds_made_at timestamptz,
    server bigint not null
);

insert into reconciliation (id, server) select 1, system_identifier from pg_control_system();

-- What came of each endpoint's attempts in each minute.
create table stats (
    endpoint_id integer not null,
    minute timestamptz not null,
    sent bigint not null,
    failed bigint not null,
    dead bigint not null,
    -- Together, from the first byte of each request to the end of its answer.
    took_us bigint not null,
    -- When the last success was recorded.
    sent_at timestamptz,
    primary key (endpoint_id, minute)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- An endpoint's number is never given to another.
create sequence endpoint_ids as integer;

-- HTTP destinations. The program makes the row `default`.
create table endpoints (
    name text primary key,
    id integer not null unique,
    url text not null,
    timeout_ms integer not null default 15000,
    in_flight_max integer not null default 1024,
    -- Attempts at it in any interval, over all consumers together; null: as many as it takes.
    rate_count integer,
    rate_interval_ms integer not null default 1000,
    -- Statuses after which a message is dead at once.
    final_statuses integer[] not null default '{410}',
    enabled boolean not null default true,
    secret text,

    constraint endpoints_name_not_empty check (name <> ''),
    constraint endpoints_url_not_empty check (url <> ''),
    constraint endpoints_timeout_ms_positive check (timeout_ms > 0),
    constraint endpoints_in_flight_max_positive check (in_flight_max > 0),
    constraint endpoints_rate_count_positive check (rate_count > 0),
    constraint endpoints_rate_interval_ms_at_least_1000 check (rate_interval_ms >= 1000)
);

create index endpoints_rated on endpoints (id) where rate_count is not null;

-- When the next attempt at an endpoint with a rate may be reserved.
create table rates (
    endpoint_id integer primary key,
    next_at timestamptz not null
);

-- Breakers of endpoints that are not closed: such an endpoint has failed for long or asked for a pause. While one is
-- open, until that time, deliveries of its endpoint are held; then one attempt at a time probes the endpoint.
create table breakers (
    endpoint_id integer primary key,
    cause text not null,
    since timestamptz not null,
    until timestamptz not null,
    -- How often it was opened since then.
    openings integer not null,
    -- What the last attempt came to.
    reason text not null,
    -- Somebody probes the endpoint until then.
    probed_until timestamptz,

    constraint breakers_cause_known check (cause in ('failing', 'retry_after'))
);

-- Numbers of endpoints that messages name and that do not exist: an endpoint of that name takes its number over.
create table unknown_endpoints (
    name text primary key,
    id integer not null unique default nextval('endpoint_ids')
);

-- They run with the rights of their owner, because whoever may make or change an endpoint need not know of the numbers and
-- the breakers. Whoever changes an endpoint has mended something.
do $do$
begin
    execute format($sql$
        create function %1$I.number_endpoint() returns trigger language plpgsql security definer
        set search_path = pg_catalog, %1$I, pg_temp as $body$
        begin
            delete from %1$I.unknown_endpoints where name = new.name returning id into new.id;
            if not found then
                new.id := nextval('%1$I.endpoint_ids');
            end if;
            return new;
        end
        $body$;

        create function %1$I.close_breaker() returns trigger language plpgsql security definer
        set search_path = pg_catalog, %1$I, pg_temp as $body$
        begin
            delete from %1$I.breakers where endpoint_id = old.id;
            return null;
        end
        $body$
    $sql$, current_schema());
end
$do$;

create trigger endpoints_changed after update on endpoints for each row
when (old.* is distinct from new.*) execute function close_breaker();
create trigger endpoints_deleted after delete on endpoints for each row execute function close_breaker();
create trigger endpoints_number before insert on endpoints for each row execute function number_endpoint();

-- A setting that no program can hold would stop the messages of all endpoints, and a password in a URL is
-- shown to everybody who may read.
create function check_endpoint() returns trigger language plpgsql as $$
begin
    -- Programs that read URLs pass over these three characters.
    if pg_catalog.translate(new.url, e'\t\n\r', '') ~* '^\s*https?:[/\\]*[^/\\?#]*@' then
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

-- Lanes as their consumers registered them; the newest wins.
create table lanes (
    topic text primary key,
    consumer_group text not null,
    next text not null,
    fresh boolean not null,
    tries integer not null,
    interval_ms bigint not null,
    interval_max_ms bigint not null,
    registered_at timestamptz not null
);

-- The consumer groups that read a lane, apart from the lane's settings: each group's consumers say every few
-- seconds that they are there. A group that is silent for a lease's time does not count.
create table lane_groups (
    topic text not null,
    consumer_group text not null,
    seen_at timestamptz not null,
    primary key (topic, consumer_group)
);

-- Dead deliveries whose record has still to reach the dead-letter lane.
create table dead_letters (
    message_id bigint not null,
    endpoint_id integer not null,
    lane text not null,
    reason text not null,
    attempts integer not null,
    last_status smallint,
    last_error text,
    dead_at timestamptz not null,
    primary key (message_id, endpoint_id)
);

create index dead_letters_by_age on dead_letters (dead_at, message_id);
