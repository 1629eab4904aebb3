-- The consumer groups that read a lane, apart from the lane's settings: each group's consumers say every few
-- seconds that they are there. A group that is silent for a lease's time does not count.
create table lane_groups (
    topic text not null,
    consumer_group text not null,
    seen_at timestamptz not null,
    primary key (topic, consumer_group)
);

do $$
begin
    if exists (select 1 from pg_roles where rolname = 'ams_reader') then
        grant select on lane_groups to ams_reader;
    end if;
    if exists (select 1 from pg_roles where rolname = 'ams_service') then
        grant select, insert, update, delete on lane_groups to ams_service;
    end if;
end
$$;
