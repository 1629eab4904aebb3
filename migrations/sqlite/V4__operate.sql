-- What operators do: look for messages, pause, cancel and redrive many at once, let programs in by keys.

-- One for each filter of a list, newest first.
create index messages_by_recipient on messages (recipient, id);
create index messages_by_endpoint on messages (endpoint, id);
-- A writer's time may be written in several forms: it is compared as milliseconds since 1970.
create index messages_by_created_at on messages (
    cast(round((julianday(created_at) - 2440587.5) * 86400000.0) as integer), id
);

-- A cancel or redrive of many messages, worked off piece by piece.
create table operations (
    id integer primary key autoincrement,
    kind text not null,
    filter text not null,
    -- Messages with higher ids came after the operation and are none of its business.
    up_to integer not null,
    -- How far it has come; null at its start.
    cursor_at integer,
    cursor_id integer,
    matched integer not null default 0,
    changed integer not null default 0,
    created_at integer not null,
    updated_at integer not null,
    finished_at integer,

    constraint operations_kind_known check (kind in ('cancel', 'redrive'))
) strict;

create index operations_open on operations (id) where finished_at is null;

-- Keys of those who may call the API. Of a key only its hash is here.
create table api_keys (
    -- The visible start of the key.
    id text primary key,
    name text not null,
    hash blob not null,
    -- A JSON list.
    scopes text not null,
    created_at integer not null,
    expires_at integer,
    last_used_at integer,
    revoked_at integer
) strict, without rowid;
