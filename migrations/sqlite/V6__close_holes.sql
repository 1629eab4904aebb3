-- The consumer groups that read a lane, apart from the lane's settings: each group's consumers say every few
-- seconds that they are there. A group that is silent for a lease's time does not count.
create table lane_groups (
    topic text not null,
    consumer_group text not null,
    seen_at integer not null,
    primary key (topic, consumer_group)
) strict, without rowid;
