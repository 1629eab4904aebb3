-- To be run with psql before `ams migrate` applies V4 to a PostgreSQL store of millions of messages that is in use.
--
-- V4 makes four indexes, and while it builds them nobody can insert. This builds them first, partition by
-- partition, while everybody goes on; V4 then finds and takes them. It may be run again. Should it have been
-- broken off: `select indexrelid::regclass from pg_index where not indisvalid` names what to drop before.
select format('create index concurrently if not exists %1$s_%2$s on %1$s (%3$s)', inhrelid::regclass, name, columns)
from pg_inherits, (values
    ('by_recipient', 'recipient, id'), ('by_endpoint', 'endpoint, id'), ('by_created_at', 'created_at, id')
) as wanted (name, columns)
where inhparent = 'messages'::regclass
\gexec
select format(
    'create index concurrently if not exists %1$s_waiting on %1$s (id) where timed_at is not null or held is not null',
    inhrelid::regclass
)
from pg_inherits where inhparent = 'messages'::regclass
\gexec
