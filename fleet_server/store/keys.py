"""Every key of the store. All begin with the fleet's hash tag, `{fleet}:`, so that they share one slot.

| name          | key                       | type   | TTL    | written by | holds |
|---------------|---------------------------|--------|--------|------------|------|
| job           | j:<job>                   | hash   | -      | jobs       | short fields (records.FIELDS) |
| spec          | s:<job>                   | string | staged | submit     | encoded JobSpec, never changed |
| staged        | b:<batch>:<n>             | string | 60 s   | stage      | jobs of a batch that is not committed |
| result        | r:<job>                   | string | -      | jobs       | encoded JobResult |
| attempts      | a:<job>                   | list   | -      | jobs       | ended attempts, the latest 20 |
| state         | st:<state>                | zset   | -      | jobs       | jobs of a state by creation, no children |
| child_state   | sk:<state>                | zset   | -      | jobs       | children of a state by creation |
| children      | g:<group>                 | zset   | -      | jobs       | a group's children in order |
| unmet         | u:<job>                   | set    | -      | jobs       | what a job waits for that did not succeed |
| dependents    | d:<job>                   | zset   | -      | jobs       | who waits for a live job, by arrival |
| unsettled     | e:<verdict><job>.<gen>    | zset   | -      | jobs       | those whom an end still has to reach |
| cascade       | cascade                   | zset   | -      | jobs       | "<verdict><job>.<gen>" by when it ended |
| ended         | ended                     | zset   | -      | jobs       | ended jobs by end, no children |
| dead          | dead                      | zset   | -      | jobs       | failed ones of them, the newest 10,000 |
| priorities    | prio                      | hash   | -      | jobs       | priority -> queued jobs |
| lanes         | lanes                     | hash   | -      | jobs       | lane -> its definition (JSON) |
| lane_jobs     | lane:jobs                 | hash   | -      | jobs       | lane -> jobs not ended |
| lane_waiting  | lane:waiting              | hash   | -      | jobs       | lane -> jobs in line |
| lane_running  | lane:running              | hash   | -      | jobs       | lane -> running jobs |
| lane_urgent   | lane:urgent               | hash   | -      | claim      | lane -> 1: a high was forced last |
| line          | q:<prio>:<n>:<lane>:<own> | zset   | -      | jobs       | an owner's jobs in line by enqueue time |
| turns         | t:<prio>:<n>:<lane>       | zset   | -      | jobs       | owners in line by (older) virtual time |
| heads         | h:<prio>:<n>:<lane>       | zset   | -      | jobs       | owners in line by their oldest job |
| shares        | vt:<cluster>              | zset   | -      | jobs       | owners in line by virtual time |
| rested        | vr:<cluster>              | zset   | -      | jobs       | owners who left ahead of the rest |
| owner_lines   | vn:<cluster>              | hash   | -      | jobs       | owner -> lines of theirs |
| waiting       | w:<cluster>               | zset   | -      | jobs       | jobs in line by enqueue time less boost |
| scheduled     | scheduled                 | zset   | -      | jobs       | SCHEDULED and BACKOFF jobs by due time |
| ttl           | ttl                       | zset   | -      | jobs       | queued jobs that never started, by expiry |
| leases        | leases                    | zset   | -      | jobs       | running jobs by lease end |
| deadlines     | deadlines                 | zset   | -      | jobs       | started jobs by start + timeout |
| held          | held:<node>               | hash   | -      | jobs       | attempt token -> job, of a node |
| pauses        | pauses                    | hash   | -      | pause      | what is paused -> since when (ms) |
| resumed       | resumed                   | string | 60 s   | pause      | operation id of the last resume |
| hooks         | hooks                     | zset   | -      | jobs       | "<job>.<generation>" due a webhook |
| hook          | hk:<job>.<generation>     | hash   | -      | hooks      | a callback, see lib/hooks.lua |
| hook_claim    | hc:<sender>               | list   | claim  | hooks      | a sender's last claim |
| idempotency   | i:<hash>                  | string | 24 h   | jobs       | fingerprint and job ids of a keyed call |
| reply         | y:<hash>                  | hash   | 24 h   | reply      | fingerprint and reply of a keyed call |
| events        | events                    | stream | capped | all        | state changes, about the newest 100,000 |
| broadcast     | broadcast                 | pubsub | -      | broadcast  | progress, from replica to replica |
| output        | o:<filename>              | hash   | -      | outputs    | one row of the outputs' index |
| outputs       | outs                      | zset   | -      | outputs    | filenames by creation |
| job_outputs   | jo:<job>                  | zset   | -      | outputs    | a job's filenames in order |
| output_totals | outs:totals               | hash   | -      | outputs    | counts, bytes, number of the last change |
| output_changes | outs:changes             | zset   | -      | outputs    | filenames by the number of their change |
| output_tombstones | outs:dead             | zset   | -      | outputs    | deleted ones of them, the newest 10,000 |
| output_local  | ol:<server>               | zset   | -      | outputs    | files on a server's disk by creation |
| output_unsynced | ou:<server>             | zset   | -      | outputs    | those of them that no bucket has |
| output_failed | outs:failed               | zset   | -      | outputs    | those that could not be copied so far |
| output_leaving | outs:leaving             | hash   | -      | outputs    | deleted ones -> where they still are |
| input         | in:<input>                | hash   | needed | inputs     | one row of the uploaded inputs |
| node          | n:<node>                  | hash   | -      | nodes      | one NodeRow |
| nodes         | nodes                     | set    | -      | nodes      | all node ids |
| online        | online                    | set    | -      | nodes      | those of them that have a stream |
| lost          | lost                      | zset   | -      | nodes      | who vanished, by when; no goodbyes |
| frozen        | frozen                    | string | -      | reap       | since when those are too many |
| life          | life:<server>             | string | 1 day  | reap       | a server's life sign: since, until, boot |
| identities    | identities                | hash   | -      | join       | node -> what its certificates name |
| join          | jt:<hash>                 | hash   | 15 min | join       | a join token, and the key that used it |
| doors         | doors                     | hash   | -      | replicas   | server -> where other servers dial it |
| speeds        | speeds                    | hash   | -      | speeds     | node -> measured speeds and loads (JSON) |
| service_rules | svc:rules                 | hash   | -      | swarm      | swarm service -> fleet.v1.Autoscale |
| service_seen  | sv:<service>              | string | 7 d    | swarm      | version and hash of what was told of it |
| autoscaler    | svc:scaler                | string | lease  | swarm      | the replica that scales services |
| comfy_number  | cn                        | string | -      | comfy      | the next number of a ComfyUI prompt |
| comfy_open    | co                        | zset   | -      | comfy      | ComfyUI prompts not ended, by submit |
| comfy_ended   | ce                        | zset   | -      | comfy      | ended ones in the history, by end |
| comfy_untold  | cu:<owner, client>        | set    | 24 h   | comfy      | prompts whose end a client was not told |
| comfy_note    | cw:<job>                  | string | 7 d    | comfy      | the history of a prompt that was stopped |
| comfy_files   | cf:<owner>                | hash   | -      | comfy      | ComfyUI's name -> uploaded file (JSON) |
| comfy_nodes   | cs                        | hash   | -      | comfy      | node -> what its ComfyUI has (packed) |

Children are those of groups. A pause's field is its cluster, type and priority with NULs between, "" for any.
`<n>` is the length of the lane's id, so that no two (lane, owner) pairs meet in one key. Writers: `jobs` are the
scripts that move jobs, `hooks` hook_*.lua, `nodes` node_*.lua, `join` join*.lua and node_delete, `outputs` complete and
output_*.lua, `inputs` input_*.lua and what submits, retries and ends jobs. "staged": with a TTL until the batch is
committed; "claim": as long as a claim lasts; "needed": 24 h, longer while a job that has not ended names it. Scripts
name keys as `K.<name>`; the loader puts the prefix and the text of `NAMES` in its place.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "job": "j:",
        "spec": "s:",
        "staged": "b:",
        "result": "r:",
        "attempts": "a:",
        "state": "st:",
        "child_state": "sk:",
        "children": "g:",
        "unmet": "u:",
        "dependents": "d:",
        "unsettled": "e:",
        "cascade": "cascade",
        "ended": "ended",
        "dead": "dead",
        "priorities": "prio",
        "lanes": "lanes",
        "lane_jobs": "lane:jobs",
        "lane_waiting": "lane:waiting",
        "lane_running": "lane:running",
        "lane_urgent": "lane:urgent",
        "line": "q:",
        "turns": "t:",
        "heads": "h:",
        "shares": "vt:",
        "rested": "vr:",
        "owner_lines": "vn:",
        "waiting": "w:",
        "scheduled": "scheduled",
        "ttl": "ttl",
        "leases": "leases",
        "deadlines": "deadlines",
        "held": "held:",
        "pauses": "pauses",
        "resumed": "resumed",
        "hooks": "hooks",
        "hook": "hk:",
        "hook_claim": "hc:",
        "idempotency": "i:",
        "reply": "y:",
        "broadcast": "broadcast",
        "events": "events",
        "output": "o:",
        "outputs": "outs",
        "job_outputs": "jo:",
        "output_totals": "outs:totals",
        "output_changes": "outs:changes",
        "output_tombstones": "outs:dead",
        "output_local": "ol:",
        "output_unsynced": "ou:",
        "output_failed": "outs:failed",
        "output_leaving": "outs:leaving",
        "input": "in:",
        "node": "n:",
        "nodes": "nodes",
        "online": "online",
        "lost": "lost",
        "frozen": "frozen",
        "life": "life:",
        "identities": "identities",
        "join": "jt:",
        "doors": "doors",
        "speeds": "speeds",
        "service_rules": "svc:rules",
        "service_seen": "sv:",
        "autoscaler": "svc:scaler",
        "comfy_number": "cn",
        "comfy_open": "co",
        "comfy_ended": "ce",
        "comfy_untold": "cu:",
        "comfy_note": "cw:",
        "comfy_files": "cf:",
        "comfy_nodes": "cs",
    }
)
"""Name -> what follows the tag; those that end in a colon are followed by an id."""

TTL_NAMES = frozenset(
    {
        "autoscaler",
        "service_seen",
        "comfy_note",
        "comfy_untold",
        "hook_claim",
        "idempotency",
        "life",
        "reply",
        "staged",
        "resumed",
    }
)
"""Keys that always expire; a spec does while its batch is staged, an input unless a job needs it."""

IDEMPOTENCY_TTL_MS = 86_400_000
STAGED_TTL_MS = 60_000
LIFE_KEPT_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One row of the table above."""

    name: str
    type: str


def table() -> tuple[KeyRow, ...]:
    """The rows of this module's table, which the tests compare with what a server holds."""
    rows = re.findall(r"^\| (\w+) +\| [^|]+\| (hash|string|list|zset|stream|set|pubsub) ", __doc__ or "", re.MULTILINE)
    return tuple(KeyRow(name, kind) for name, kind in rows)


class Keys:
    """The keys of one namespace."""

    def __init__(self, namespace: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", namespace):
            raise ValueError(f"namespace: use 1 to 64 of A-Z a-z 0-9 _ . -; got {namespace!r}")
        self.prefix = f"{{{namespace}}}:"
        self.events = self.prefix + NAMES["events"]
        self.broadcast = self.prefix + NAMES["broadcast"]
        self.dead = self.prefix + NAMES["dead"]
        self.priorities = self.prefix + NAMES["priorities"]
        self.pauses = self.prefix + NAMES["pauses"]
        self.service_rules = self.prefix + NAMES["service_rules"]
        self.autoscaler = self.prefix + NAMES["autoscaler"]
        self.resumed = self.prefix + NAMES["resumed"]
        self.outputs = self.prefix + NAMES["outputs"]
        self.output_totals = self.prefix + NAMES["output_totals"]
        self.output_failed = self.prefix + NAMES["output_failed"]
        self.output_leaving = self.prefix + NAMES["output_leaving"]
        self.nodes = self.prefix + NAMES["nodes"]
        self.identities = self.prefix + NAMES["identities"]
        self.doors = self.prefix + NAMES["doors"]
        self.speeds = self.prefix + NAMES["speeds"]
        self.comfy_number = self.prefix + NAMES["comfy_number"]
        self.comfy_open = self.prefix + NAMES["comfy_open"]
        self.comfy_ended = self.prefix + NAMES["comfy_ended"]
        self.comfy_nodes = self.prefix + NAMES["comfy_nodes"]
        self.hooks = self.prefix + NAMES["hooks"]
        self._job = self.prefix + NAMES["job"]
        self._spec = self.prefix + NAMES["spec"]
        self._result = self.prefix + NAMES["result"]
        self._attempts = self.prefix + NAMES["attempts"]

    def job(self, job_id: str) -> str:
        return self._job + job_id

    def spec(self, job_id: str) -> str:
        return self._spec + job_id

    def whole_job(self, job_id: str) -> tuple[str, str, str, str]:
        """The four keys of one job: short fields, spec, result, attempts."""
        return (self._job + job_id, self._spec + job_id, self._result + job_id, self._attempts + job_id)

    def staged(self, batch: str, chunk: int) -> str:
        return f"{self.prefix}{NAMES['staged']}{batch}:{chunk}"

    def state(self, state: str) -> str:
        return self.prefix + NAMES["state"] + state

    def child_state(self, state: str) -> str:
        return self.prefix + NAMES["child_state"] + state

    def children(self, group_job_id: str) -> str:
        return self.prefix + NAMES["children"] + group_job_id

    def waiting(self, cluster: str) -> str:
        return self.prefix + NAMES["waiting"] + cluster

    def service_seen(self, service_id: str) -> str:
        return self.prefix + NAMES["service_seen"] + service_id

    def held(self, node_id: str) -> str:
        return self.prefix + NAMES["held"] + node_id

    def output(self, filename: str) -> str:
        return self.prefix + NAMES["output"] + filename

    def job_outputs(self, job_id: str) -> str:
        return self.prefix + NAMES["job_outputs"] + job_id

    def output_local(self, home: str) -> str:
        return self.prefix + NAMES["output_local"] + home

    def output_unsynced(self, home: str) -> str:
        return self.prefix + NAMES["output_unsynced"] + home

    def input(self, input_id: str) -> str:
        return self.prefix + NAMES["input"] + input_id

    def hook_claim(self, sender: str) -> str:
        return self.prefix + NAMES["hook_claim"] + sender

    def node(self, node_id: str) -> str:
        return self.prefix + NAMES["node"] + node_id

    def join(self, token_hash: str) -> str:
        return self.prefix + NAMES["join"] + token_hash

    def comfy_untold(self, owner: str, client_id: str) -> str:
        return self.prefix + NAMES["comfy_untold"] + _digest(owner, client_id)

    def comfy_note(self, job_id: str) -> str:
        return self.prefix + NAMES["comfy_note"] + job_id

    def comfy_files(self, owner: str) -> str:
        return self.prefix + NAMES["comfy_files"] + _digest(owner)

    def idempotency(self, owner: str, method: str, key: str) -> str:
        """One key for each (owner, method, key), whatever characters they hold."""
        return self.prefix + NAMES["idempotency"] + _digest(owner, method, key)

    def reply(self, owner: str, method: str, key: str) -> str:
        return self.prefix + NAMES["reply"] + _digest(owner, method, key)


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:40]
