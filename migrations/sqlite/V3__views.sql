-- What became of messages, for people.

-- Where each message stands; its times are integers, as in the tables. Batches and leases are looked into only for a
-- message that stands nowhere else, and their bounds rule most of them out.
create view places as
select
    m.id as message_id,
    coalesce(
        d.status,
        case when w.lane = '' then 'pending' when w.lane <> '' then 'retrying' end,
        case when l.id is not null then 'processing' end,
        case when b.id is not null then 'queued' end,
        'pending'
    ) as status,
    w.held,
    coalesce(
        d.attempts,
        w.attempts,
        json_extract(l.attempts, '$[' || (select key from json_each(l.ids) where value = m.id) || ']'),
        json_extract(b.attempts, '$[' || (select key from json_each(b.ids) where value = m.id) || ']'),
        0
    ) as attempts,
    coalesce(d.lane, w.lane, l.lane, b.lane, '') as lane,
    w.due_at,
    d.finished_at,
    coalesce(d.reason, w.reason) as reason
from messages m
left join deliveries d
    on d.message_id = m.id
    and d.endpoint_id = (select min(endpoint_id) from deliveries where message_id = m.id)
left join waiting w
    on w.message_id = m.id
    and w.endpoint_id = (select min(endpoint_id) from waiting where message_id = m.id)
    and d.status is null
left join leases l on l.id = (
    select leases.id from leases, json_each(leases.ids) at
    where d.status is null and w.attempts is null
        and m.id between leases.lo and leases.hi and at.value = m.id and substr(leases."left", at.key + 1, 1) = '1'
    limit 1
)
left join batches b on b.id = (
    select batches.id from batches, json_each(batches.ids) at
    where d.status is null and w.attempts is null and l.id is null
        and m.id between batches.lo and batches.hi and at.value = m.id and substr(batches."left", at.key + 1, 1) = '1'
    limit 1
);

create view message_status as
select
    m.id,
    m.endpoint,
    m.recipient,
    p.status,
    case
        when p.held = 'endpoint_busy' then 'held: endpoint ' || m.endpoint || coalesce(
            (
                select case b.cause
                    when 'failing' then ' has failed for long (last: ' || b.reason || '); it is probed from '
                    else ' asked for a pause (' || b.reason || '); it is tried again from '
                end || strftime('%Y-%m-%dT%H:%M:%fZ', b.until / 1000000.0, 'unixepoch') || ' on'
                from endpoints e join breakers b on b.endpoint_id = e.id where e.name = m.endpoint
            ),
            ' is busy'
        )
        when p.held = 'endpoint_rate'
            then 'held: endpoint ' || m.endpoint || ' has a rate; its attempts are made in their turn' || coalesce(
                (
                    select '; the next begins at ' || strftime('%Y-%m-%dT%H:%M:%fZ', r.next_at / 1000000.0, 'unixepoch')
                    from endpoints e join rates r on r.endpoint_id = e.id where e.name = m.endpoint
                ),
                ''
            )
        when p.held = 'endpoint_disabled' then 'held: endpoint ' || m.endpoint || ' is disabled, does not exist or can not be used'
        when p.status = 'pending' and p.due_at is not null
            then 'due at ' || strftime('%Y-%m-%dT%H:%M:%fZ', p.due_at / 1000000.0, 'unixepoch')
        when p.status = 'pending' and m.send_at is not null
            then 'due at ' || strftime('%Y-%m-%dT%H:%M:%fZ', m.send_at)
        when p.status = 'pending' then 'due now'
        when p.status = 'queued' then 'its ticket is on a lane'
        when p.status = 'processing' then 'a try is under way'
        when p.status = 'retrying'
            then 'due at ' || strftime('%Y-%m-%dT%H:%M:%fZ', p.due_at / 1000000.0, 'unixepoch')
                || coalesce('; last: ' || p.reason, '')
        when p.status = 'expired' then 'not sent before ' || m.expires_at
        else p.reason
    end as why,
    p.attempts,
    case
        when p.held is not null or p.status not in ('pending', 'retrying') then null
        when p.due_at is not null then strftime('%Y-%m-%dT%H:%M:%fZ', p.due_at / 1000000.0, 'unixepoch')
        when m.send_at is not null then strftime('%Y-%m-%dT%H:%M:%fZ', m.send_at)
    end as next_try_at,
    m.created_at,
    case
        when p.finished_at is not null then strftime('%Y-%m-%dT%H:%M:%fZ', p.finished_at / 1000000.0, 'unixepoch')
    end as finished_at
from messages m
join places p on p.message_id = m.id;

-- One line for each event: its creation, each attempt, and an end that no attempt brought.
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
    message_id,
    strftime('%Y-%m-%dT%H:%M:%fZ', started_at / 1000000.0, 'unixepoch'),
    attempts,
    'accepted',
    http_status,
    null,
    (connect_us + head_us + body_us) / 1000.0,
    lane,
    address
from deliveries
where batch is not null
union all
select
    message_id,
    strftime('%Y-%m-%dT%H:%M:%fZ', finished_at / 1000000.0, 'unixepoch'),
    attempts,
    status,
    null,
    reason,
    null,
    null,
    null
from deliveries
where status <> 'sent';
