"""What every run needs: failures that say how to mend them, processes, PostgreSQL, the receiver, CPU time."""

import contextlib
import glob
import http.client
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse

# Below the ephemeral range, so that no client can take the port first; above those of `ams bench` itself.
PORTS = range(21100, 21201)
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Failure(Exception):
    """Ends the run. Its text says what went wrong, where, and how to mend it."""


def say(text):
    """Tells the progress, away from the table."""
    print(text, file=sys.stderr, flush=True)


# --- processes ---------------------------------------------------------------------------------------------


def output_of(command, what, mend, **options):
    """Runs COMMAND to its end and gives its standard output; a child is never left behind."""
    try:
        child = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    except OSError as error:
        raise Failure(f"{what} can't be started: {error}. {mend}") from error
    with stopped_at_the_end(child):
        out, err = child.communicate()
    if child.returncode != 0:
        raise Failure(f"{what} failed (exit {child.returncode}). {mend} Its last words:\n{tail(err)}")
    return out


@contextlib.contextmanager
def stopped_at_the_end(child):
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()  # first politely: `ams bench` then stops its services and drops its database
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def tail(text, lines=15):
    return "\n".join("  " + line for line in text.strip().splitlines()[-lines:]) or "  (it wrote nothing)"


class Workers:
    """A peer's worker processes, their log, and how they end."""

    def __init__(self, name, command, count, environment):
        self.name = name
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.children = []
        self.command, self.count, self.environment = command, count, environment

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        with self.stack:
            self.stack.enter_context(self.log)
            for _ in range(self.count):
                child = subprocess.Popen(self.command, env=self.environment, stdin=subprocess.DEVNULL,
                                         stdout=subprocess.DEVNULL, stderr=self.log)
                self.children.append(self.stack.enter_context(stopped_at_the_end(child)))
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *why):
        return self.stack.__exit__(*why)

    def pids(self):
        return [child.pid for child in self.children]

    def logged(self):
        self.log.seek(0)
        return self.log.read()

    def check(self):
        for child in self.children:
            if child.poll() is not None:
                raise Failure(f"a worker of {self.name} ended by itself (exit {child.returncode}). Its last words:\n"
                              + tail(self.logged()))


# --- CPU time ----------------------------------------------------------------------------------------------


def cpu_us(pid):
    """User and system time of a process so far, in µs; 0 when it is gone."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    # The command's name, in parentheses, may itself contain blanks; utime and stime are fields 14 and 15.
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1e6 / CLOCK_TICKS


def machine_us():
    """What all cores of this machine have worked so far, in µs."""
    ticks = pathlib.Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    return sum(int(ticks[i]) for i in (0, 1, 2, 5, 6)) * 1e6 / CLOCK_TICKS  # not idle, not waiting for a disk


def postgres_pids():
    pids = []
    for path in pathlib.Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            if path.read_text(encoding="utf-8", errors="replace").strip() == "postgres":
                pids.append(int(path.parent.name))
    return pids


def cpu_by_pid(pids):
    return {pid: cpu_us(pid) for pid in pids}


def used_since(before, pids):
    return sum(max(0.0, us - before.get(pid, 0.0)) for pid, us in cpu_by_pid(pids).items())


# --- PostgreSQL --------------------------------------------------------------------------------------------


def database_url():
    url = os.environ.get("DATABASE_URL", "")
    if not url:
        raise Failure("DATABASE_URL is not set: run `dev/services start`, then `eval \"$(dev/services env)\"`.")
    if not url.startswith(("postgres://", "postgresql://")):
        raise Failure("DATABASE_URL names no PostgreSQL: the peers need postgres://USER@HOST:PORT/DATABASE.")
    return url


def psql_program():
    """The one on the PATH, else the newest where Debian puts them."""
    folders = glob.glob("/usr/lib/postgresql/*/bin/psql")
    newest = max(folders, key=lambda path: float(path.split("/")[4]), default=None)
    found = shutil.which("psql") or newest
    if not found:
        raise Failure("psql is not found: install PostgreSQL's client (Debian: postgresql-client).")
    return found


def sql(url, statement):
    command = [psql_program(), "-XqAt", "-v", "ON_ERROR_STOP=1", "-d", url, "-c", statement]
    return output_of(command, f"the statement `{statement}`", "Does the server of DATABASE_URL run?").strip()


class Session:
    """One connection that stays open: a psql for each question would cost more than the question."""

    def __init__(self, url):
        command = [psql_program(), "-XqAt", "-v", "ON_ERROR_STOP=1", "-d", url]
        self.child = subprocess.Popen(command, text=True, bufsize=1, stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *why):
        with stopped_at_the_end(self.child), contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.child.stdin.close()  # psql ends at the end of its input
            self.child.wait(timeout=5)

    def ask(self, question):
        """The answer to a QUESTION that has one row and one column."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, either
            self.child.stdin.write(question + ";\n")
            self.child.stdin.flush()
        answer = self.child.stdout.readline().strip()
        if not answer:
            raise Failure(f"`{question}` has no answer. The last words of psql:\n{tail(self.child.stderr.read())}")
        return answer


@contextlib.contextmanager
def scratch_database(name):
    """A database of its own on the server of DATABASE_URL, gone at the end. Gives its URL."""
    server = database_url()
    sql(server, f'CREATE DATABASE "{name}"')
    try:
        yield urllib.parse.urlsplit(server)._replace(path=f"/{name}").geturl()
    finally:
        sql(server, f'DROP DATABASE "{name}" WITH (FORCE)')


# --- the receiver ------------------------------------------------------------------------------------------


def free_port():
    for port in PORTS:
        with socket.socket() as probe:
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise Failure(f"no port from {PORTS[0]} to {PORTS[-1]} is free: stop what holds them (`ss -ltnp` shows it).")


class Receiver:
    """`ams bench-receiver`, which answers at once and counts."""

    def __init__(self, ams):
        self.ams, self.port = ams, free_port()
        self.url = f"http://127.0.0.1:{self.port}/"

    def __enter__(self):
        command = [self.ams, "bench-receiver", "--port", str(self.port)]
        with contextlib.ExitStack() as stack:
            # In a folder of its own: a settings file where we are must not reach it.
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            child = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            self.child = stack.enter_context(stopped_at_the_end(child))
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            stack.callback(self.connection.close)
            self.wait_until_it_answers()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *why):
        return self.stack.__exit__(*why)

    def wait_until_it_answers(self):
        give_up = time.monotonic() + 10
        while True:
            try:
                return self.ask("DELETE", "/")
            except OSError as error:
                if self.child.poll() is not None or time.monotonic() > give_up:
                    raise Failure(f"`{self.ams} bench-receiver` does not answer on port {self.port}: {error}. "
                                  "Is AMS a current build (cargo build --release)?") from error
                self.connection.close()
                time.sleep(0.02)

    def ask(self, method, path):
        self.connection.request(method, path)
        return self.connection.getresponse().read()

    def counts(self):
        try:
            return json.loads(self.ask("GET", "/counts"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Failure(f"the receiver on port {self.port} does not say what has arrived: {error}.") from error
