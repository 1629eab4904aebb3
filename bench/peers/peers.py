"""The peers: how each is built, and how one run of each is measured. And AMS, which measures itself."""

import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import tempfile
import time

from harness import (Failure, Receiver, Session, Workers, cpu_by_pid, machine_us, output_of, postgres_pids, say,
                     scratch_database, sql, tail, used_since)

HERE = pathlib.Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or CHECKOUT / "target").resolve()
BUILT = TARGET / "peers"

# 24 bytes, as the specification recommends at least. Nobody checks the signature.
SECRET = "whsec_YmVuY2htYXJrLXNlY3JldC1vZi0yNGJ5"
# How often we look, in seconds, and without anything new for how long we believe the rest lost.
GLANCE, PATIENCE = 0.05, 30
# The share of the machine that may go elsewhere: to this driver and to the kernel, before we complain.
NOISE = 0.15

# What each peer is set to; the README says from which page of its documentation. A variable of the same name in
# the environment goes before these, for whoever wants to look for better ones.
SETTINGS = {
    "RIVER_MAX_WORKERS": "2000",
    "RIVER_FETCH_COOLDOWN_MS": "2",
    "RIVER_FETCH_POLL_INTERVAL_MS": "20",
    "GRAPHILE_PROCESSES": "2",
    "GRAPHILE_CONCURRENT_JOBS": "24",
    "GRAPHILE_LOCAL_QUEUE_SIZE": "500",
    "GRAPHILE_BATCH_DELAY_MS": "250",
}


def settings():
    return {name: os.environ.get(name, value) for name, value in SETTINGS.items()}


class River:
    name = "River"
    # Through an index: a scan of the whole table 20 times a second would be work that River did not ask for.
    unfinished = ("SELECT EXISTS (SELECT 1 FROM river_job WHERE state IN "
                  "('available', 'running', 'retryable', 'scheduled', 'pending', 'cancelled', 'discarded'))")
    processes = 1

    def build(self):
        program = BUILT / "river"
        mend = "River needs Go (see go.mod for its version) and, the first time, the Go module proxy."
        options = {"cwd": HERE / "river", "env": {**os.environ, "GOFLAGS": "-mod=readonly"}}
        output_of(["go", "build", "-trimpath", "-o", str(program), "."], "`go build` of bench/peers/river", mend,
                  **options)
        version = "github.com/riverqueue/river"
        version = output_of(["go", "list", "-m", "-f", "{{.Version}}", version], "`go list`", mend, **options)
        go = output_of(["go", "version", str(program)], "`go version`", mend).split()[-1]
        self.command, self.version = [str(program)], f"{version.strip()}, {go}"


class Graphile:
    name = "Graphile Worker"
    # The public view of the jobs that are left: a finished job's row is gone.
    unfinished = "SELECT EXISTS (SELECT 1 FROM graphile_worker.jobs)"

    def build(self):
        source, folder = HERE / "graphile", BUILT / "graphile"
        folder.mkdir(parents=True, exist_ok=True)
        lists = ["package.json", "package-lock.json", ".npmrc"]
        for name in [*lists, "peer.js"]:
            shutil.copyfile(source / name, folder / name)
        wanted = hashlib.sha256(b"".join((source / name).read_bytes() for name in lists)).hexdigest()
        stamp = folder / "node_modules" / ".installed"
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
            mend = "Graphile Worker needs npm and, the first time, the npm registry."
            output_of(["npm", "ci", "--no-audit", "--no-fund"], f"`npm ci` in {folder}", mend, cwd=folder)
            stamp.write_text(wanted, encoding="utf-8")
        self.processes = int(settings()["GRAPHILE_PROCESSES"])
        node = self.node(folder)
        self.command = [node, str(folder / "peer.js")]
        package = json.loads((folder / "node_modules/graphile-worker/package.json").read_text(encoding="utf-8"))
        runtime = output_of([node, "--version"], f"{node} --version", "").strip()
        self.version = f"{package['version']}, Node {runtime}"

    @staticmethod
    def node(folder):
        """The Node.js that package.json pins; where that has none for the machine, the machine's own."""
        pinned = folder / "node_modules/.bin/node"
        node = str(pinned) if pinned.exists() else shutil.which("node")
        mend = "Graphile Worker needs Node.js 22.19 or newer."
        if not node:
            raise Failure(f"Node.js is not found. {mend}")
        version = output_of([node, "--version"], f"{node} --version", mend).strip()
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < (22, 19):
            raise Failure(f"{node} is {version}. {mend}")
        return node


def measure_peer(peer, ams, messages):
    """One run: a database and a receiver of its own, a backlog, then the workers until it is done."""
    name = f"ams_peers_{peer.name.split()[0].lower()}_{os.getpid()}"
    with scratch_database(name) as url, Receiver(ams) as receiver:
        environment = {**os.environ, **settings(), "DATABASE_URL": url, "RECEIVER_URL": receiver.url,
                       "WEBHOOK_SECRET": SECRET, "NODE_ENV": "production"}
        for verb in (["migrate"], ["insert", str(messages)]):
            say(f"{peer.name}: {' '.join(verb)}")
            output_of([*peer.command, *verb], f"{peer.name}'s {verb[0]}", "", env=environment)
        # A table in use has statistics; one that was filled a moment ago has none, and a plan made without them
        # doubles what Graphile Worker costs the database.
        sql(url, "ANALYZE")
        say(f"{peer.name}: work")
        with Session(url) as session:
            return drain(peer, receiver, session, environment, messages)


def drain(peer, receiver, session, environment, messages):
    postgres = cpu_by_pid(postgres_pids())
    answering = cpu_by_pid([receiver.child.pid])
    machine, started = machine_us(), time.monotonic()
    with Workers(peer.name, [*peer.command, "work"], peer.processes, environment) as workers:
        counts, done_at = wait_until_done(peer, receiver, session, workers, messages)
        cpu = {
            "postgres": used_since(postgres, postgres_pids()),
            "workers": used_since({}, workers.pids()),
            "receiver": used_since(answering, [receiver.child.pid]),
        }
        others = (machine_us() - machine - sum(cpu.values())) / 1e6 / (time.monotonic() - started) / os.cpu_count()
        if workers.logged():
            say(f"{peer.name}'s workers wrote warnings:\n{tail(workers.logged(), 5)}")
    if others > NOISE:
        say(f"{peer.name}: something else used {others:.0%} of the machine during this run; measure again in peace")
    seconds = max(done_at - counts["first_us"] / 1e6, 1e-6)
    return {
        "per_s": counts["distinct"] / seconds,
        "lost": messages - counts["distinct"],
        "repeats": counts["arrivals"] - counts["distinct"],
        "cpu_us_per_message": {name: us / messages for name, us in cpu.items()},
    }


def wait_until_done(peer, receiver, session, workers, messages):
    """Gives the last counts, and when the last job was recorded as done."""
    arrivals, news_at = -1, time.monotonic()
    while True:
        workers.check()
        counts = receiver.counts()
        # The table is asked only once all have arrived, so that asking costs the database next to nothing.
        if counts["distinct"] >= messages and session.ask(peer.unfinished) == "f":
            return counts, time.time()
        if counts["arrivals"] != arrivals:
            arrivals, news_at = counts["arrivals"], time.monotonic()
        elif time.monotonic() - news_at > PATIENCE:
            if counts["distinct"] >= messages:
                raise Failure(f"{peer.name} has delivered all messages, but after {PATIENCE} s its table still "
                              f"holds jobs that are not done. Its workers' last words:\n{tail(workers.logged())}")
            return counts, counts["last_us"] / 1e6
        time.sleep(GLANCE)


def measure_ams(ams, messages):
    """One run of AMS's own benchmark: the same job, counted in the same way, on a database of its own."""
    words = shlex.split(os.environ.get("AMS_BENCH_ARGS") or "bench throughput --rounds 1")
    command = [ams, *words, "--messages", str(messages), "--json"]
    say("AMS: " + " ".join(command[1:]))
    with tempfile.TemporaryDirectory() as folder:
        out = output_of(command, f"`{shlex.join(command)}`", "Is it a current build (cargo build --release)?",
                        cwd=folder)
    try:
        report = json.loads(out)
        cpu = dict(report["cpu_us_per_message"])
        result = {"per_s": report["delivered_per_s"], "lost": report["lost"], "repeats": report["duplicates"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"AMS's report can't be read ({error!r}). Is {ams} a current build?") from error
    if "postgres" not in cpu:
        raise Failure("AMS did not run on PostgreSQL, so it can't be compared: set KAFKA_BROKERS and REDIS_URL, "
                      "too (`eval \"$(dev/services env)\"` does).")
    known = {"postgres": cpu.pop("postgres"), "receiver": cpu.pop("receiver", 0.0)}
    known["queue_and_cache"] = cpu.pop("kafka", 0.0) + cpu.pop("redis", 0.0)
    known["workers"] = sum(cpu.values())
    return {**result, "cpu_us_per_message": known}
