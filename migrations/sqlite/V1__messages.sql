-- Messages as their senders wrote them, what became of them, and what a writer may and may not say.
--
-- A message is written once by its sender and once by its result. In between its state stands in rows that stand for
-- a thousand messages each; see V2.
--
-- Everything here must work in a plain sqlite3 shell of version 3.40, because anyone may insert.
-- A writer's times are text in UTC that julianday() understands; our own times are integers, microseconds since 1970.
-- The migrations of PostgreSQL have the same names and the same meaning.

create table installation (
    -- The random number that webhook-ids carry; made here, once.
    id text not null,
    -- The newest migration that a program has to know. A program whose own newest is older is refused; one that
    -- knows it may work, whatever migrations came later. A migration that programs before it can't work with sets
    -- this to its own number; every other one leaves it alone.
    needs_migration integer not null default 4
) strict;

insert into installation (id)
select lower(
    hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-'
    || substr('89ab', 1 + (random() & 3), 1) || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6))
);

-- There is one writer at a time, so the ids are in the order of the commits: a feed goes by them.
create table messages (
    id integer primary key autoincrement,
    -- The narrow columns stand first: they are read without walking through a long content.
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

    constraint messages_id_positive check (id > 0),
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

-- What the feeds read: a row stands in one of them.
create index messages_urgent on messages (id) where priority > 0;
create index messages_normal on messages (id) where priority = 0;
create index messages_bulk on messages (id) where priority < 0;

-- The id is ours, too. Without one in the statement it is -1 here, before it is given.
create trigger messages_id before insert on messages
when new.id is not -1
begin
    select raise(abort, 'id is set by AMS; insert without it');
end;

-- Text is UTF-8. SQLite takes any bytes, so these columns are read character by character when they hold more
-- than ASCII: bytes that are no character come back as another one. The content may be too long for that; the
-- claim looks at it.
create trigger messages_text before insert on messages
when new.endpoint glob '*[^' || char(1) || '-~]*' or instr(new.endpoint, char(0))
    or new.recipient glob '*[^' || char(1) || '-~]*' or instr(new.recipient, char(0))
    or new.content_type glob '*[^' || char(1) || '-~]*' or instr(new.content_type, char(0))
    or new.ordering_key glob '*[^' || char(1) || '-~]*' or instr(new.ordering_key, char(0))
    or new.idempotency_key glob '*[^' || char(1) || '-~]*' or instr(new.idempotency_key, char(0))
begin
    select case given.name
        when 'endpoint' then raise(abort, 'endpoint must be UTF-8 without the character U+0000')
        when 'recipient' then raise(abort, 'recipient must be UTF-8 without the character U+0000')
        when 'content_type' then raise(abort, 'content_type must be UTF-8 without the character U+0000')
        when 'ordering_key' then raise(abort, 'ordering_key must be UTF-8 without the character U+0000')
        else raise(abort, 'idempotency_key must be UTF-8 without the character U+0000')
    end
    from (
        select 'endpoint' as name, new.endpoint as text
        union all select 'recipient', new.recipient
        union all select 'content_type', new.content_type
        union all select 'ordering_key', new.ordering_key
        union all select 'idempotency_key', new.idempotency_key
    ) given
    where given.text is not null and (
        instr(given.text, char(0))
        or exists (
            with recursive at (i) as (select 1 union all select i + 1 from at where i < length(given.text))
            select 1 from at where char(unicode(substr(given.text, i, 1))) is not substr(given.text, i, 1)
        )
    )
    limit 1;
end;

-- RFC 3339 can write the years 1 to 9999; SQLite knows a year 0, too.
create trigger messages_times before insert on messages
when new.created_at like '0000%' or new.send_at like '0000%' or new.expires_at like '0000%'
begin
    select raise(abort, 'created_at, send_at and expires_at must lie between the years 1 and 9999');
end;

-- The rules for a request's headers; `src/intake/rules.rs` says the same to callers of the API.
create trigger messages_content_type before insert on messages
when new.content_type glob '*[' || char(1) || '-' || char(8, 10) || '-' || char(31, 127) || ']*'
begin
    select raise(abort, 'content_type must be a text without control characters');
end;

create trigger messages_header_rules after insert on messages
when new.headers is not null
begin
    select raise(abort, 'headers must be at most 64') where (select count(*) from json_each(new.headers)) > 64;
    select raise(abort, 'headers must have at most 16 KiB, names and values together')
    where (
        select sum(length(cast(key as blob)) + length(cast(value as blob))) from json_each(new.headers)
    ) > 16384;
    select raise(abort, 'headers have a name that is no header name') from json_each(new.headers)
    where key = '' or key glob '*[^-!#$%&''*+.^_`|~0-9A-Za-z]*' limit 1;
    select raise(abort, 'headers name one that is set by AMS; leave it out') from json_each(new.headers)
    where key like 'webhook-%' or key like 'ams-%' or key like 'proxy-%' or lower(key) in (
        'host', 'content-length', 'content-type', 'transfer-encoding', 'connection', 'keep-alive', 'upgrade',
        'te', 'trailer', 'expect', 'user-agent', 'idempotency-key'
    )
    limit 1;
    select raise(abort, 'headers have a value with control characters') from json_each(new.headers)
    where value glob '*[' || char(1) || '-' || char(8, 10) || '-' || char(31, 127) || ']*' or instr(value, char(0))
    limit 1;
    -- JSON can write half of a surrogate pair, which is no character.
    select raise(abort, 'headers have a value that is not UTF-8') from json_each(new.headers) given
    where given.value glob '*[^' || char(1) || '-~]*' and exists (
        with recursive at (i) as (select 1 union all select i + 1 from at where i < length(given.value))
        select 1 from at where char(unicode(substr(given.value, i, 1))) is not substr(given.value, i, 1)
    )
    limit 1;
end;

create trigger messages_tags before insert on messages
when length(cast(new.tags as blob)) > 32768
begin
    select raise(abort, 'tags must have at most 32 KiB');
end;

create trigger messages_json_nul before insert on messages
when instr(new.headers, '\u0000') or instr(new.tags, '\u0000')
begin
    select raise(abort, 'headers and tags must not hold the character U+0000');
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

-- A delivery that has ended: one message to one endpoint. Only a success that comes late, and a redrive, change it.
create table deliveries (
    message_id integer not null,
    -- 0: the message can't be read, not even where it goes.
    endpoint_id integer not null,
    status text not null,
    -- Attempts made, over all lanes.
    attempts integer not null,
    -- The lane of the last attempt; empty: there was none.
    lane text not null,
    finished_at integer not null,
    reason text,
    -- The attempt that succeeded; null where none did. The batch of its ticket tells attempts apart.
    batch integer,
    started_at integer,
    connect_us integer,
    head_us integer,
    body_us integer,
    http_status integer,
    address text,
    provider_message_id text,
    -- The first 4 KiB of the answer's body.
    answer text,
    -- Comparisons instead of `in (...)`, which makes a list anew for each row: 5 us a write.
    constraint deliveries_status_known check (
        status = 'sent' or status = 'dead' or status = 'cancelled' or status = 'expired'
    ),
    primary key (message_id, endpoint_id)
) strict, without rowid;

create index deliveries_unsent on deliveries (status, message_id) where status <> 'sent';

-- An attempt that is not told by its delivery: one that failed, or a further success. The key makes a record that is
-- written twice harmless.
create table attempts (
    message_id integer not null,
    endpoint_id integer not null,
    batch integer not null,
    attempt integer not null,
    started_at integer not null,
    connect_us integer not null,
    head_us integer not null,
    body_us integer not null,
    -- The code of the answer's status line, when one arrived.
    status integer,
    lane text not null,
    class text not null,
    address text not null,
    error text,
    provider_message_id text,
    answer text not null,
    primary key (message_id, endpoint_id, batch)
) strict, without rowid;
