-- Who works on what: instances, the active producer, the ledger of batches, leases; and where messages go.

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
    busy text[] not null default '{}'
);

-- The one active producer. Pacing stands here too, because it holds over all producers together.
create table leader (
    id integer primary key check (id = 1),
    owner bigint,
    until timestamptz not null,
    -- Since when somebody has led without a break: so long the store has been there for all.
    steady_since timestamptz,
    paced_until timestamptz
);

insert into leader (id, until) values (1, 'epoch');

-- The ledger: one row for each claim, until all of its tickets are settled.
create table batches (
    id bigint generated always as identity primary key,
    lane text not null,
    owner bigint not null,
    ids bigint[] not null,
    epochs integer[] not null,
    created_at timestamptz not null,
    partition integer,
    last_offset bigint
);

-- What was begun together in one epoch, until all of it is recorded. The caller picks the number.
create table leases (
    id bigint not null,
    epoch integer not null,
    owner bigint not null,
    ids bigint[] not null,
    primary key (id, epoch)
);

-- HTTP destinations. The program makes the row `default`.
create table endpoints (
    name text primary key,
    url text not null,
    timeout_ms integer not null default 15000,
    in_flight_max integer not null default 1024,
    -- Statuses after which a message is dead at once.
    final_statuses integer[] not null default '{410}',
    enabled boolean not null default true,
    secret text,

    constraint endpoints_name_not_empty check (name <> ''),
    constraint endpoints_url_not_empty check (url <> ''),
    constraint endpoints_timeout_ms_positive check (timeout_ms > 0),
    constraint endpoints_in_flight_max_positive check (in_flight_max > 0)
);

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

-- Dead messages whose record has still to reach the dead-letter lane.
create table dead_letters (
    message_id bigint primary key,
    lane text not null,
    reason text not null,
    attempts integer not null,
    last_status smallint,
    last_error text,
    dead_at timestamptz not null
);

create index dead_letters_by_age on dead_letters (dead_at, message_id);
