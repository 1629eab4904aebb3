-- What became of messages, for people.

create view message_status as
select
    id,
    endpoint,
    recipient,
    status,
    case
        when held = 'endpoint_busy' then 'held: endpoint ' || endpoint || ' is busy'
        when held = 'endpoint_closed' then 'held: endpoint ' || endpoint || ' is disabled or does not exist'
        when status = 'pending' and send_at is not null then 'due at ' || send_at
        when status = 'pending' then 'due now'
        when status = 'queued' then 'its ticket is on a lane'
        when status = 'processing' then 'a try is under way'
        when status = 'retrying'
            then 'due at ' || strftime('%Y-%m-%dT%H:%M:%fZ', due_at / 1000000.0, 'unixepoch')
                || coalesce('; last: ' || reason, '')
        when status = 'expired' then 'not sent before ' || expires_at
        else reason
    end as why,
    attempts,
    case
        when timed_at is not null then strftime('%Y-%m-%dT%H:%M:%fZ', timed_at / 1000000.0, 'unixepoch')
    end as next_try_at,
    created_at,
    case
        when finished_at is not null then strftime('%Y-%m-%dT%H:%M:%fZ', finished_at / 1000000.0, 'unixepoch')
    end as finished_at
from messages;

-- One line for each event: its creation, each try, and an end that no try brought.
create view message_history as
select
    id as message_id,
    created_at as at,
    0 as attempt,
    'created' as what,
    null as status,
    null as error,
    null as took_ms,
    null as lane,
    null as address
from messages
union all
select
    message_id,
    strftime('%Y-%m-%dT%H:%M:%fZ', started_at / 1000000.0, 'unixepoch'),
    attempt,
    class,
    status,
    error,
    (connect_us + head_us + body_us) / 1000.0,
    lane,
    address
from attempts
union all
select
    id,
    strftime('%Y-%m-%dT%H:%M:%fZ', finished_at / 1000000.0, 'unixepoch'),
    attempts,
    status,
    null,
    reason,
    null,
    null,
    null
from messages where status in ('dead', 'cancelled', 'expired');
