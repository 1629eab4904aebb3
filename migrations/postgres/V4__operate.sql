-- What operators do: look for messages, pause, cancel and redrive many at once, let programs in by keys.

-- One for each filter of a list, newest first. They cost every insert about 2 us a row.
create index messages_by_recipient on messages (recipient, id);
create index messages_by_endpoint on messages (endpoint, id);
create index messages_by_created_at on messages (created_at, id);
-- A cancel or redrive of many messages, worked off piece by piece.
create table operations (
    id bigint generated always as identity primary key,
    kind text not null,
    filter jsonb not null,
    -- Messages with higher ids came after the operation and are none of its business.
    up_to bigint not null,
    -- How far it has come; null at its start.
    cursor_at timestamptz,
    cursor_id bigint,
    matched bigint not null default 0,
    changed bigint not null default 0,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    finished_at timestamptz,

    constraint operations_kind_known check (kind in ('cancel', 'redrive'))
);

create index operations_open on operations (id) where finished_at is null;

-- Keys of those who may call the API. Of a key only its hash is here.
create table api_keys (
    -- The visible start of the key.
    id text primary key,
    name text not null,
    hash bytea not null,
    scopes text[] not null,
    created_at timestamptz not null,
    expires_at timestamptz,
    last_used_at timestamptz,
    revoked_at timestamptz
);

do $$
begin
    if exists (select 1 from pg_roles where rolname = 'ams_reader') then
        grant select on operations to ams_reader;
    end if;
    if exists (select 1 from pg_roles where rolname = 'ams_service') then
        grant select, insert, update, delete on operations, api_keys to ams_service;
        grant usage, select on all sequences in schema public to ams_service;
    end if;
end
$$;
