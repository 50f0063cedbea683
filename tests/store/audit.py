"""Compares every key and index of a namespace with what the jobs' hashes say."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fleet_server.domain.job import BOOST_MS, JobRecord, JobState, WaitReason
from fleet_server.store import decode_job
from fleet_server.store.keys import NAMES, TTL_NAMES, table

Zsets = dict[str, dict[str, float]]


def _name(rest: str) -> str:
    """The table's name of a key without its tag."""
    for name, text in NAMES.items():
        if rest == text or (text.endswith(":") and rest.startswith(text)):
            return name
    raise AssertionError(f"key {rest!r} is not in the table of keys.py")


def _text(flat: dict[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in flat.items()}


class Book:
    """What a namespace holds."""

    def __init__(self, client: Any, namespace: str) -> None:
        self.prefix = f"{{{namespace}}}:"
        self.client = client
        self.zsets: Zsets = {}
        self.jobs: dict[str, JobRecord] = {}
        self.raw: dict[str, dict[str, bytes]] = {}
        self.specs: set[str] = set()
        self.inputs: dict[str, int] = {}
        types = {row.name: row.type for row in table()}
        keys = _keys(client, namespace)
        self.rests = [key.decode().removeprefix(self.prefix) for key in keys]
        for start in range(0, len(keys), 1000):
            self._read(keys[start : start + 1000], types)

    def _read(self, keys: list[bytes], types: dict[str, str]) -> None:
        pipe = self.client.pipeline(transaction=False)
        for key in keys:
            pipe.type(key)
            pipe.pttl(key)
        found = pipe.execute()
        for number, key in enumerate(keys):
            kind, ttl = found[2 * number].decode(), found[2 * number + 1]
            rest = key.decode().removeprefix(self.prefix)
            name = _name(rest)
            assert kind == types[name], f"{rest} is a {kind}, the table says {types[name]}"
            assert (ttl > 0) == (name in TTL_NAMES) or name in {"spec", "input"}, f"{rest} has a TTL of {ttl} ms"
            if name == "input":
                self.inputs[rest.removeprefix(NAMES["input"])] = ttl
            if name == "spec" and ttl == -1:
                self.specs.add(rest.removeprefix(NAMES["spec"]))
            if kind == "zset":
                pipe.zrange(key, 0, -1, withscores=True)
            elif name == "job":
                pipe.hgetall(key)
            else:
                pipe.exists(key)
        for key, value in zip(keys, pipe.execute(), strict=True):
            rest = key.decode().removeprefix(self.prefix)
            if _name(rest) == "job":
                job_id = rest.removeprefix(NAMES["job"])
                self.raw[job_id] = {field.decode(): content for field, content in value.items()}
                self.jobs[job_id] = decode_job(self.raw[job_id], job_id=job_id)
            elif isinstance(value, list):
                self.zsets[rest] = {member.decode(): score for member, score in value}

    def named(self, kind: str) -> set[str]:
        """What follows `kind` in the keys that begin with it."""
        return {rest.removeprefix(kind) for rest in self.rests if rest.startswith(kind)}

    def zset(self, rest: str) -> dict[str, float]:
        return self.zsets.get(rest, {})

    def hash(self, rest: str) -> dict[str, str]:
        return _text(self.client.hgetall(self.prefix + rest))


def _keys(client: Any, namespace: str) -> list[bytes]:
    return list(client.scan_iter(match=f"{{{namespace}}}:*", count=1000))


def _counted(values: Counter[str]) -> dict[str, str]:
    return {name: str(count) for name, count in values.items() if count}


def clear(client: Any, namespace: str) -> None:
    """Leaves nothing of a namespace whose test is over: each scan goes over all keys of a server."""
    keys = _keys(client, namespace)
    for start in range(0, len(keys), 1000):
        client.unlink(*keys[start : start + 1000])


def audit(client: Any, namespace: str) -> None:
    """Raises AssertionError where an index and the jobs differ, or a key is unknown, mistyped or without its TTL."""
    book = Book(client, namespace)
    jobs = book.jobs
    for state in JobState:
        for kind, children in (("st", False), ("sk", True)):
            expected = {
                job_id: job.created_ms
                for job_id, job in jobs.items()
                if job.state is state and bool(job.group_job_id) == children
            }
            assert book.zset(f"{kind}:{state.value}") == expected, f"{kind}:{state.value}"
    unended = {job_id: job for job_id, job in jobs.items() if not job.state.ended}
    live = {job_id: job for job_id, job in unended.items() if not job.children}
    queued = {job_id: job for job_id, job in live.items() if job.state is JobState.QUEUED}
    in_line = {job_id: job for job_id, job in queued.items() if not job.wait_reason}
    busy = {job_id: job for job_id, job in live.items() if job.state is JobState.RUNNING}
    ended = {job_id: job.ended_ms for job_id, job in jobs.items() if job.state.ended and not job.group_job_id}
    assert book.zset("ended") == ended
    assert set(book.zset("dead")) <= {job_id for job_id in ended if jobs[job_id].state is JobState.FAILED}
    _audit_nodes(book)
    _audit_lines(book, in_line)
    _audit_shares(book, in_line)
    _audit_dependencies(book)
    _audit_groups(book)
    _audit_inputs(book, unended)
    assert set(book.zset("scheduled")) == {
        job_id for job_id, job in unended.items() if job.wait_reason in {WaitReason.SCHEDULED, WaitReason.BACKOFF}
    }
    assert set(book.zset("leases")) == set(busy)
    assert book.zset("deadlines") == {
        job_id: job.started_ms + job.timeout_ms
        for job_id, job in busy.items()
        if job.started_ms is not None and book.raw[job_id].get("od") != b"T"
    } | {
        job_id: due
        for job_id, due in book.zset("deadlines").items()
        if job_id in busy and book.raw[job_id].get("ex") == book.raw[job_id]["tk"]
    }
    assert book.zset("ttl") == {
        job_id: int(book.raw[job_id].get("tb", job.enqueued_ms)) + job.queue_ttl_ms
        for job_id, job in queued.items()
        if "ra" not in book.raw[job_id]
    }
    assert book.hash("prio") == _counted(
        Counter(job.priority.value for job in unended.values() if job.state is JobState.QUEUED)
    )
    assert book.hash("lane:jobs") == _counted(Counter(job.lane_id for job in live.values()))
    assert book.hash("lane:running") == _counted(Counter(job.lane_id for job in busy.values()))
    assert set(book.hash("lanes")) == {job.lane_id for job in live.values()}
    assert set(book.hash("lane:urgent")) <= set(book.hash("lanes"))
    held: dict[str, dict[str, str]] = {}
    for job_id, job in busy.items():
        held.setdefault(job.node_id, {})[job.token] = job_id
    for node_id in book.named("held:"):
        assert book.hash(f"held:{node_id}") == held.pop(node_id, {}), node_id
    assert not held
    for job_id, job in jobs.items():
        _audit_record(job_id, job)
        assert job_id in book.specs, f"the spec of {job_id} is missing or would expire"
    for member in book.zset("hooks").keys() | book.named("hk:"):
        assert member.rpartition(".")[0] in jobs, f"the callback {member} outlived its job"
    for job_id in book.named("r:") | book.named("a:"):
        assert job_id in jobs, f"the result or an attempt of {job_id} outlived it"


def _audit_nodes(book: Book) -> None:
    """Who is online, and who vanished, is what the nodes' rows say."""
    rows = {node_id: book.hash(f"n:{node_id}") for node_id in book.named("n:")}
    online = {node_id for node_id, row in rows.items() if row["status"] == "online"}
    assert {member.decode() for member in book.client.smembers(f"{book.prefix}online")} == online
    assert set(book.zset("lost")) <= set(rows) - online


def _audit_lines(book: Book, in_line: dict[str, JobRecord]) -> None:
    """Lines, turns, heads, waiting and their counter."""
    lines: Zsets = {}
    waiting: Zsets = {}
    heads: Zsets = {}
    for job_id, job in in_line.items():
        lane = f"{job.priority.value}:{len(job.lane_id)}:{job.lane_id}"
        lines.setdefault(f"q:{lane}:{job.owner}", {})[job_id] = job.enqueued_ms
        waiting.setdefault(f"w:{job.cluster}", {})[job_id] = job.enqueued_ms - BOOST_MS[job.priority]
        oldest = heads.setdefault(f"h:{lane}", {})
        oldest[job.owner] = min(oldest.get(job.owner, job.enqueued_ms), job.enqueued_ms)
    for kind, expected in (("q:", lines), ("w:", waiting), ("h:", heads)):
        assert {rest: zset for rest, zset in book.zsets.items() if rest.startswith(kind)} == expected, kind
    turns = {f"h:{rest[2:]}": set(zset) for rest, zset in book.zsets.items() if rest.startswith("t:")}
    assert turns == {rest: set(zset) for rest, zset in heads.items()}
    assert book.hash("lane:waiting") == _counted(Counter(job.lane_id for job in in_line.values()))


def _audit_shares(book: Book, in_line: dict[str, JobRecord]) -> None:
    """Owners in line have a level in their cluster, lines that are counted, and turns no further than it."""
    lines: dict[str, Counter[str]] = {}
    for cluster, owner, _, _ in {(job.cluster, job.owner, job.lane_id, job.priority) for job in in_line.values()}:
        lines.setdefault(cluster, Counter())[owner] += 1
    for kind in ("vt", "vn", "vr"):
        of_kind = book.named(f"{kind}:")
        assert of_kind <= set(lines) if kind == "vr" else of_kind == set(lines), kind
    for cluster, owners in lines.items():
        shares = book.zset(f"vt:{cluster}")
        assert book.hash(f"vn:{cluster}") == _counted(owners)
        assert set(shares) == set(owners)
        assert not set(shares) & set(book.zset(f"vr:{cluster}"))
    for rest, turns in book.zsets.items():
        if rest.startswith("t:"):
            lane_id = rest.split(":", 3)[3]
            (cluster,) = {job.cluster for job in in_line.values() if job.lane_id == lane_id}
            shares = book.zset(f"vt:{cluster}")
            assert all(turn <= shares[owner] for owner, turn in turns.items()), rest


def _audit_dependencies(book: Book) -> None:
    """Who waits is known to each live job that they wait for, or to an end that is still to reach them."""
    unsettled = {rest[2:]: set(zset) for rest, zset in book.zsets.items() if rest.startswith("e:")}
    assert set(unsettled) == set(book.zset("cascade"))
    reached: dict[str, set[str]] = {}
    for entry, members in unsettled.items():
        reached.setdefault(entry[1:].rpartition(".")[0], set()).update(members)
    unmet = book.named("u:")
    assert unmet <= set(book.jobs)
    for job_id, job in book.jobs.items():
        dependents = set(book.zset(f"d:{job_id}"))
        assert not dependents or not job.state.ended, f"{job_id} has ended and others wait for it"
        if job.wait_reason is not WaitReason.DEPENDENCY:
            spent = job.state in {JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED}
            assert not spent or job_id not in unmet, f"{job_id} still has what it waits for"
        else:
            parents = {parent.decode() for parent in book.client.smembers(f"{book.prefix}u:{job_id}")}
            assert len(parents) == job.waits > 0, job_id
            for parent in parents:
                known = {*book.zset(f"d:{parent}"), *reached.get(parent, ())}
                assert job_id in known, f"{job_id} waits for {parent}, which does not know"
    for rest in book.zsets:
        assert not rest.startswith("d:") or rest[2:] in book.jobs, f"{rest} outlived its job"


def _audit_groups(book: Book) -> None:
    """A group knows its children and how many live; it ends with the last of them."""
    members: dict[str, list[str]] = {}
    for job_id, job in book.jobs.items():
        if job.group_job_id:
            members.setdefault(job.group_job_id, []).append(job_id)
    assert {rest[2:]: set(zset) for rest, zset in book.zsets.items() if rest.startswith("g:")} == {
        group: set(children) for group, children in members.items()
    }
    for group, children in members.items():
        alive = sum(1 for child in children if not book.jobs[child].state.ended)
        assert len(children) == book.jobs[group].children
        if book.jobs[group].state is JobState.CANCELLED:
            assert alive == 0 or book.zset("cascade"), f"children of {group} live on"
        else:
            assert int(book.raw[group]["kl"]) == alive, group
            assert (alive == 0) == book.jobs[group].state.ended, group


def _audit_inputs(book: Book, unended: dict[str, JobRecord]) -> None:
    """An input counts the live jobs that name it, and stays while there are any."""
    needed = Counter(
        name for job_id in unended for name in book.raw[job_id].get("iu", b"").decode().split("\0") if name
    )
    for input_id, ttl in book.inputs.items():
        count = needed[input_id]
        assert book.hash(f"in:{input_id}").get("n") == (str(count) if count else None), input_id
        assert (ttl > 0) == (not count), f"input {input_id}, named by {count} jobs, has a TTL of {ttl} ms"


def _audit_record(job_id: str, job: JobRecord) -> None:
    """What must hold of any job by itself."""
    running = job.state is JobState.RUNNING
    assert bool(job.token) == (running and not job.children), job_id
    assert job.waits == 0 or job.wait_reason is WaitReason.DEPENDENCY, job_id
    assert (job.ended_ms is not None) == job.state.ended, job_id
    assert not job.wait_reason or job.state is JobState.QUEUED, job_id
    assert bool(job.error) == (job.state is JobState.FAILED) or job.state is JobState.CANCELLED, job_id
    assert job.attempt - job.losses <= job.max_retries + 1, job_id
