-- Messages, their tries, and what a writer may and may not say.
--
-- Everything here must work in a plain sqlite3 shell of version 3.40, because anyone may insert.
-- A writer's times are text in UTC that julianday() understands, kept to the millisecond; our own
-- times are integers, microseconds since 1970. The migrations of PostgreSQL have the same names and
-- the same meaning.

create table installation (
    -- The random number that webhook-ids carry; made here, once.
    id text not null
) strict;

insert into installation (id)
select lower(
    hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-'
    || substr('89ab', 1 + (random() & 3), 1) || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6))
);

-- Our narrow columns stand first: they are read and written without walking through a long content.
create table messages (
    id integer primary key autoincrement,
    -- Set by AMS from here ...
    status text not null default 'pending',
    epoch integer not null default 0,
    attempts integer not null default 0,
    lane_tries integer not null default 0,
    -- The lane of its next or last try; empty: the fresh lane.
    lane text not null default '',
    -- Why the row is kept back although it is due.
    held text,
    due_at integer,
    finished_at integer,
    reason text,
    -- ... to here; the rest is the writer's.
    endpoint text not null default 'default',
    recipient text not null,
    priority integer not null default 0,
    -- Taken as given, so that rows can be brought over from elsewhere; nothing is decided by it.
    created_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    send_at text,
    expires_at text,
    ordering_key text,
    idempotency_key text,
    -- Null: the standard JSON envelope is sent. Else the content itself is the body, with this type.
    content_type text,
    headers text,
    tags text,
    content text not null,
    -- When a row that waits for its time is due; null for every other row.
    timed_at integer generated always as (
        case
            when held is not null then null
            when status = 'retrying' then due_at
            when status = 'pending' and send_at like '____-__-__%'
                then cast(round((julianday(send_at) - 2440587.5) * 86400000.0) as integer) * 1000
        end
    ) virtual,

    constraint messages_id_positive check (id > 0),
    constraint messages_status_known check (
        status = 'pending' or status = 'queued' or status = 'processing' or status = 'sent'
        or status = 'retrying' or status = 'dead' or status = 'cancelled' or status = 'expired'
    ),
    constraint messages_held_known check (held = 'endpoint_busy' or held = 'endpoint_closed'),
    constraint messages_endpoint_not_empty check (endpoint <> ''),
    constraint messages_endpoint_at_most_255_characters check (length(endpoint) <= 255),
    constraint messages_recipient_not_empty check (recipient <> ''),
    constraint messages_recipient_at_most_1024_characters check (length(recipient) <= 1024),
    constraint messages_content_at_most_1_mib check (length(cast(content as blob)) <= 1048576),
    constraint messages_content_type_not_empty check (content_type <> ''),
    constraint messages_content_type_at_most_255_characters check (length(content_type) <= 255),
    constraint messages_ordering_key_not_empty check (ordering_key <> ''),
    constraint messages_ordering_key_at_most_255_characters check (length(ordering_key) <= 255),
    constraint messages_priority_between_minus_100_and_100 check (priority between -100 and 100),
    constraint messages_created_at_is_a_time check (created_at like '____-__-__%' and julianday(created_at) is not null),
    constraint messages_send_at_is_a_time check (
        send_at is null or (send_at like '____-__-__%' and julianday(send_at) is not null)
    ),
    constraint messages_expires_at_is_a_time check (
        expires_at is null or (expires_at like '____-__-__%' and julianday(expires_at) is not null)
    ),
    constraint messages_expires_at_after_send_at check (
        send_at is null or expires_at is null or julianday(expires_at) > julianday(send_at)
    ),
    constraint messages_idempotency_key_not_empty check (idempotency_key <> ''),
    constraint messages_idempotency_key_at_most_255_characters check (length(idempotency_key) <= 255),
    constraint messages_headers_is_a_json_object check (
        headers is null or case when json_valid(headers) then json_type(headers) = 'object' else 0 end
    ),
    constraint messages_tags_is_a_json_object check (
        tags is null or case when json_valid(tags) then json_type(tags) = 'object' else 0 end
    )
) strict;

-- Each index holds only the rows that somebody looks for, so a status change elsewhere costs nothing.
-- Comparisons stand here and above instead of `in (...)`, which makes a list anew for each row: 5 us a write.
create index messages_fresh on messages (id) where status = 'pending' and held is null and send_at is null;
create index messages_timed on messages (lane, timed_at, id) where timed_at is not null;
create index messages_held on messages (endpoint, held, id) where held is not null;
create index messages_unsent on messages (status, id)
where status = 'dead' or status = 'cancelled' or status = 'expired';

create trigger messages_ours before insert on messages
when new.status is not 'pending' or new.epoch is not 0 or new.attempts is not 0 or new.lane_tries is not 0
    or new.lane is not '' or new.held is not null or new.due_at is not null or new.finished_at is not null
    or new.reason is not null
begin
    select case
        when new.status is not 'pending' then raise(abort, 'status is set by AMS; insert without it')
        when new.epoch is not 0 then raise(abort, 'epoch is set by AMS; insert without it')
        when new.attempts is not 0 then raise(abort, 'attempts is set by AMS; insert without it')
        when new.lane_tries is not 0 then raise(abort, 'lane_tries is set by AMS; insert without it')
        when new.lane is not '' then raise(abort, 'lane is set by AMS; insert without it')
        when new.held is not null then raise(abort, 'held is set by AMS; insert without it')
        when new.due_at is not null then raise(abort, 'due_at is set by AMS; insert without it, or set send_at')
        when new.finished_at is not null then raise(abort, 'finished_at is set by AMS; insert without it')
        else raise(abort, 'reason is set by AMS; insert without it')
    end;
end;

create trigger messages_headers after insert on messages
when new.headers is not null
begin
    select raise(abort, 'headers must be a JSON object whose values are all text')
    from json_each(new.headers) where json_each.type <> 'text' limit 1;
end;

-- Keys outlive the rows' place in any index of messages: one table says which were used.
create table idempotency_keys (
    key text primary key,
    message_id integer not null,
    created_at text not null
) strict, without rowid;

create trigger messages_idempotency_key after insert on messages
when new.idempotency_key is not null
begin
    select raise(abort, 'idempotency_key was used before; a message with this key is stored already')
    from idempotency_keys where key = new.idempotency_key;
    insert into idempotency_keys (key, message_id, created_at)
    values (new.idempotency_key, new.id, new.created_at);
end;

-- One row for each try. The key makes a record that is written twice harmless.
create table attempts (
    message_id integer not null,
    epoch integer not null,
    attempt integer not null,
    lane text not null,
    class text not null,
    -- The code of the answer's status line, when one arrived.
    status integer,
    address text not null,
    error text,
    -- The first 4 KiB of the answer's body.
    answer text not null,
    provider_message_id text,
    started_at integer not null,
    connect_us integer not null,
    head_us integer not null,
    body_us integer not null,
    primary key (message_id, epoch)
) strict, without rowid;
