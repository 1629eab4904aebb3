-- Closes holes: what a row may hold. The migration of PostgreSQL with this name says the same, and has more.

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
    select raise(abort, 'timeout_ms and in_flight_max must be at most 2147483647')
    where new.timeout_ms > 2147483647 or new.in_flight_max > 2147483647;
    select raise(abort, 'final_statuses must be a plain list of numbers from 100 to 599')
    from json_each(new.final_statuses) where type <> 'integer' or value not between 100 and 599;
end;

create trigger endpoints_updated before update on endpoints
begin
    -- Between the scheme and the path, the query or the fragment. One of before may stay while something else changes.
    select raise(abort, 'url holds a user or password; take them out, and let a header or the secret identify you')
    from (
        select ltrim(substr(url, instr(url, ':') + 1), '/') || '/' as rest
        from (select replace(replace(replace(new.url, char(92), '/'), '?', '/'), '#', '/') as url)
    )
    where new.url is not old.url and instr(substr(rest, 1, instr(rest, '/')), '@');
    select raise(abort, 'timeout_ms and in_flight_max must be at most 2147483647')
    where new.timeout_ms > 2147483647 or new.in_flight_max > 2147483647;
    select raise(abort, 'final_statuses must be a plain list of numbers from 100 to 599')
    from json_each(new.final_statuses) where type <> 'integer' or value not between 100 and 599;
end;

-- The consumer groups that read a lane, apart from the lane's settings: each group's consumers say every few
-- seconds that they are there. A group that is silent for a lease's time does not count.
create table lane_groups (
    topic text not null,
    consumer_group text not null,
    seen_at integer not null,
    primary key (topic, consumer_group)
) strict, without rowid;
