-- Which programs may work on this store, so that two versions can do so side by side.

-- The newest migration that a program has to know. A program whose own newest is older is refused; one that
-- knows it may work, whatever migrations came later. A migration that programs before it can't work with sets
-- this to its own number; every other one leaves it alone.
alter table installation add column needs_migration integer not null default 5;
