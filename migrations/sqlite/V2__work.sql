-- Who works on what: instances, the active producer, the feeds, batches and leases, what waits; and where messages go.
--
-- Lists are JSON. Of a batch or lease the narrow columns stand first, so that a look at them reads none of its lists.

-- One row for each process; it lives as long as it renews its lease.
create table instances (
    -- Never used again for another process.
    id integer primary key autoincrement,
    service text not null,
    host text not null,
    version text not null,
    started_at integer not null,
    seen_at integer not null,
    lease_until integer not null,
    -- Endpoints that it can't try as fast as their messages come: a JSON list.
    saturated text not null default '[]'
) strict;

-- The one active producer. Pacing stands here too, because it holds over all producers together.
create table leader (
    id integer primary key check (id = 1),
    owner integer,
    until integer not null,
    -- Since when somebody has led without a break: so long the store has been there for all.
    steady_since integer,
    paced_until integer,
    -- A pause holds for all producers and over restarts; the pacing is what the active producer said last.
    paused integer not null default 0,
    pace_count integer,
    pace_interval_ms integer
) strict;

insert into leader (id, until) values (1, 0);

-- How far each class of priority (0 above 0, 1 for 0, 2 below 0) has been read: every message of the class up to this
-- id has a place or is ours no more.
create table feed (
    class integer primary key,
    position integer not null
) strict;

insert into feed (class, position) values (0, 0), (1, 0), (2, 0);

-- Deliveries that were claimed together, until all have been begun. Those whose mark in `left` is 1 are queued.
create table batches (
    -- Random: it fences the tickets that name it.
    id integer primary key,
    -- The first batch that these deliveries were in; their positions never change.
    root integer not null,
    owner integer not null,
    -- The lowest and the highest id.
    lo integer not null,
    hi integer not null,
    created_at integer not null,
    partition integer,
    last_offset integer,
    lane text not null,
    -- One mark, 0 or 1, for each position.
    "left" text not null,
    ids text not null,
    endpoints text not null,
    -- Attempts made before, over all lanes and on this one; null: none.
    attempts text,
    lane_tries text,
    -- When each is due, if that is still to come, and when it ends; null: at once, and as the message says.
    dues text,
    expiries text
) strict;

create index batches_by_root on batches (root);

-- Deliveries of one batch that one consumer has begun together, until all are recorded. Those whose mark is 1 are
-- processing. The consumer picks the number.
create table leases (
    id integer primary key,
    root integer not null,
    batch integer not null,
    owner integer not null,
    lo integer not null,
    hi integer not null,
    lane text not null,
    "left" text not null,
    ids text not null,
    endpoints text not null,
    attempts text,
    lane_tries text,
    dues text,
    expiries text
) strict;

create index leases_by_root on leases (root);

-- Deliveries that wait for a time, or for their endpoint. Whoever claims one deletes it.
create table waiting (
    message_id integer not null,
    endpoint_id integer not null,
    -- Before this time it is not due, held or not.
    due_at integer not null,
    -- Why it is kept back although it is due.
    held text,
    attempts integer not null,
    -- The lane of its next attempt; empty: the fresh lane.
    lane text not null,
    lane_tries integer not null,
    priority integer not null,
    expires_at integer,
    -- What the last attempt came to.
    reason text,
    -- Its time was reserved under its endpoint's rate.
    reserved integer not null default 0,

    constraint waiting_held_known check (held = 'endpoint_busy' or held = 'endpoint_rate' or held = 'endpoint_disabled'),
    primary key (message_id, endpoint_id)
) strict, without rowid;

create index waiting_due on waiting (lane, due_at, message_id) where held is null;
create index waiting_held on waiting (endpoint_id, held, priority desc, message_id) where held is not null;
create index waiting_expires on waiting (expires_at) where expires_at is not null;

-- Messages that were cancelled before a feed came to them: the feed passes over them, and takes them out of here.
create table cancels (
    message_id integer primary key,
    at integer not null
) strict;

-- The reconciliation proves that every message that a feed has passed has a place. One row: how far it has come, and
-- what it has found.
create table reconciliation (
    id integer primary key check (id = 1),
    at_id integer not null default 0,
    checked integer not null default 0,
    repaired integer not null default 0,
    finished_at integer
) strict;

insert into reconciliation (id) values (1);

-- What came of each endpoint's attempts in each minute.
create table stats (
    endpoint_id integer not null,
    minute integer not null,
    sent integer not null,
    failed integer not null,
    dead integer not null,
    -- Together, from the first byte of each request to the end of its answer.
    took_us integer not null,
    -- When the last success was recorded.
    sent_at integer,
    primary key (endpoint_id, minute)
) strict, without rowid;

-- The last number that was given to an endpoint; none is ever given to another.
create table endpoint_ids (
    id integer primary key check (id = 1),
    last integer not null
) strict;

insert into endpoint_ids (id, last) values (1, 0);

-- HTTP destinations. The program makes the row `default`.
create table endpoints (
    name text primary key,
    -- Given by a trigger right after the insert, which is made without it.
    id integer not null default 0 unique,
    url text not null,
    timeout_ms integer not null default 15000,
    in_flight_max integer not null default 1024,
    -- Attempts at it in any interval, over all consumers together; null: as many as it takes.
    rate_count integer,
    rate_interval_ms integer not null default 1000,
    -- A JSON list of statuses after which a message is dead at once.
    final_statuses text not null default '[410]',
    enabled integer not null default 1,
    secret text,

    constraint endpoints_name_not_empty check (name <> ''),
    constraint endpoints_url_not_empty check (url <> ''),
    constraint endpoints_timeout_ms_positive check (timeout_ms > 0),
    constraint endpoints_in_flight_max_positive check (in_flight_max > 0),
    constraint endpoints_rate_count_positive check (rate_count > 0),
    constraint endpoints_rate_interval_ms_at_least_1000 check (rate_interval_ms >= 1000),
    constraint endpoints_final_statuses_is_a_json_list check (
        case when json_valid(final_statuses) then json_type(final_statuses) = 'array' else 0 end
    ),
    constraint endpoints_enabled_is_0_or_1 check (enabled in (0, 1))
) strict, without rowid;

-- When the next attempt at an endpoint with a rate may be reserved.
create table rates (
    endpoint_id integer primary key,
    next_at integer not null
) strict;

-- Breakers of endpoints that are not closed: such an endpoint has failed for long or asked for a pause. While one is
-- open, until that time, deliveries of its endpoint are held; then one attempt at a time probes the endpoint.
create table breakers (
    endpoint_id integer primary key,
    cause text not null,
    since integer not null,
    until integer not null,
    -- How often it was opened since then.
    openings integer not null,
    -- What the last attempt came to.
    reason text not null,
    -- Somebody probes the endpoint until then.
    probed_until integer,

    constraint breakers_cause_known check (cause in ('failing', 'retry_after'))
) strict;

-- Numbers of endpoints that messages name and that do not exist: an endpoint of that name takes its number over.
create table unknown_endpoints (
    name text primary key,
    id integer not null default 0 unique
) strict, without rowid;

create trigger unknown_endpoints_number after insert on unknown_endpoints
when new.id = 0
begin
    update endpoint_ids set last = last + 1;
    update unknown_endpoints set id = (select last from endpoint_ids) where name = new.name;
end;

-- `insert or replace` takes a row away without firing a trigger of its deletion. The number is what deliveries
-- know their endpoint by, so it is kept for the new row.
create trigger endpoints_replaced before insert on endpoints
begin
    insert into unknown_endpoints (name, id)
    select name, id from endpoints
    where name = new.name and not exists (select 1 from unknown_endpoints where name = new.name);
end;

create trigger endpoints_number after insert on endpoints
begin
    insert into unknown_endpoints (name)
    select new.name where not exists (select 1 from unknown_endpoints where name = new.name);
    update endpoints set id = (select id from unknown_endpoints where name = new.name) where name = new.name;
    delete from unknown_endpoints where name = new.name;
end;

-- An insert that turned into an update has kept a number for nothing.
create trigger endpoints_kept after update on endpoints
begin
    delete from unknown_endpoints where name = old.name and id = new.id;
end;

-- Deliveries of an endpoint that was deleted wait until it is made again.
create trigger endpoints_deleted after delete on endpoints
begin
    insert into unknown_endpoints (name, id)
    select old.name, old.id where not exists (select 1 from unknown_endpoints where name = old.name);
    delete from breakers where endpoint_id = old.id;
end;

-- Whoever changes an endpoint has mended something.
create trigger endpoints_changed after update on endpoints
when old.id <> 0 and (
    old.url, old.timeout_ms, old.in_flight_max, old.rate_count, old.rate_interval_ms, old.final_statuses, old.enabled, old.secret
) is not (
    new.url, new.timeout_ms, new.in_flight_max, new.rate_count, new.rate_interval_ms, new.final_statuses, new.enabled, new.secret
)
begin
    delete from breakers where endpoint_id = old.id;
end;

-- A setting that no program can hold would stop the messages of all endpoints, and a password in a URL is
-- shown to everybody who may read.
create trigger endpoints_inserted before insert on endpoints
begin
    -- Between the scheme and the path, the query or the fragment.
    select raise(abort, 'url holds a user or password; take them out, and let a header or the secret identify you')
    from (
        select ltrim(substr(url, instr(url, ':') + 1), '/') || '/' as rest
        from (select replace(replace(replace(new.url, char(92), '/'), '?', '/'), '#', '/') as url)
    )
    where instr(substr(rest, 1, instr(rest, '/')), '@');
    select raise(abort, 'timeout_ms, in_flight_max, rate_count and rate_interval_ms must be at most 2147483647')
    where max(new.timeout_ms, new.in_flight_max, coalesce(new.rate_count, 0), new.rate_interval_ms) > 2147483647;
    select raise(abort, 'final_statuses must be a plain list of numbers from 100 to 599')
    from json_each(new.final_statuses) where type <> 'integer' or value not between 100 and 599;
end;

create trigger endpoints_updated before update of url, timeout_ms, in_flight_max, rate_count, rate_interval_ms, final_statuses on endpoints
begin
    -- Between the scheme and the path, the query or the fragment. One of before may stay while something else changes.
    select raise(abort, 'url holds a user or password; take them out, and let a header or the secret identify you')
    from (
        select ltrim(substr(url, instr(url, ':') + 1), '/') || '/' as rest
        from (select replace(replace(replace(new.url, char(92), '/'), '?', '/'), '#', '/') as url)
    )
    where new.url is not old.url and instr(substr(rest, 1, instr(rest, '/')), '@');
    select raise(abort, 'timeout_ms, in_flight_max, rate_count and rate_interval_ms must be at most 2147483647')
    where max(new.timeout_ms, new.in_flight_max, coalesce(new.rate_count, 0), new.rate_interval_ms) > 2147483647;
    select raise(abort, 'final_statuses must be a plain list of numbers from 100 to 599')
    from json_each(new.final_statuses) where type <> 'integer' or value not between 100 and 599;
end;

-- Lanes as their consumers registered them; the newest wins.
create table lanes (
    topic text primary key,
    consumer_group text not null,
    next text not null,
    fresh integer not null,
    tries integer not null,
    interval_ms integer not null,
    interval_max_ms integer not null,
    registered_at integer not null
) strict, without rowid;

-- The consumer groups that read a lane, apart from the lane's settings: each group's consumers say every few
-- seconds that they are there. A group that is silent for a lease's time does not count.
create table lane_groups (
    topic text not null,
    consumer_group text not null,
    seen_at integer not null,
    primary key (topic, consumer_group)
) strict, without rowid;

-- Dead deliveries whose record has still to reach the dead-letter lane.
create table dead_letters (
    message_id integer not null,
    endpoint_id integer not null,
    lane text not null,
    reason text not null,
    attempts integer not null,
    last_status integer,
    last_error text,
    dead_at integer not null,
    primary key (message_id, endpoint_id)
) strict, without rowid;

create index dead_letters_by_age on dead_letters (dead_at, message_id);
