-- Who works on what: instances, the active producer, the ledger of batches, leases; and where messages go.

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
    busy text not null default '[]'
) strict;

-- The one active producer. Pacing stands here too, because it holds over all producers together.
create table leader (
    id integer primary key check (id = 1),
    owner integer,
    until integer not null,
    -- Since when somebody has led without a break: so long the store has been there for all.
    steady_since integer,
    paced_until integer
) strict;

insert into leader (id, until) values (1, 0);

-- The ledger: one row for each claim, until all of its tickets are settled. Ids and epochs are JSON lists.
create table batches (
    id integer primary key autoincrement,
    lane text not null,
    owner integer not null,
    ids text not null,
    epochs text not null,
    created_at integer not null,
    partition integer,
    last_offset integer
) strict;

-- One row for each begin call that began anything, until all of it is recorded.
create table leases (
    id integer primary key,
    owner integer not null,
    ids text not null,
    epochs text not null
) strict;

-- HTTP destinations. The program makes the row `default`.
create table endpoints (
    name text primary key,
    url text not null,
    timeout_ms integer not null default 15000,
    in_flight_max integer not null default 1024,
    -- A JSON list of statuses after which a message is dead at once.
    final_statuses text not null default '[410]',
    enabled integer not null default 1,
    secret text,

    constraint endpoints_name_not_empty check (name <> ''),
    constraint endpoints_url_not_empty check (url <> ''),
    constraint endpoints_timeout_ms_positive check (timeout_ms > 0),
    constraint endpoints_in_flight_max_positive check (in_flight_max > 0),
    constraint endpoints_final_statuses_is_a_json_list check (
        case when json_valid(final_statuses) then json_type(final_statuses) = 'array' else 0 end
    ),
    constraint endpoints_enabled_is_0_or_1 check (enabled in (0, 1))
) strict, without rowid;

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

-- Dead messages whose record has still to reach the dead-letter lane.
create table dead_letters (
    message_id integer primary key,
    lane text not null,
    reason text not null,
    attempts integer not null,
    last_status integer,
    last_error text,
    dead_at integer not null
) strict;

create index dead_letters_by_age on dead_letters (dead_at, message_id);
