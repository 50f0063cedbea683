"""What ComfyUI's clients see besides the jobs themselves: which prompts there are, who has been told of their end, the
names of uploaded files, and what each node's ComfyUI had when it was seen last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fleet_server.store._room import Room
from fleet_server.store.client import gather
from fleet_server.store.records import pairs

HISTORY = 10_000
"""Ended prompts that the history keeps, as ComfyUI does."""

UNTOLD_MS = 86_400_000
NOTE_MS = 7 * 86_400_000

Ids = list[str]


class ComfyStore:
    """The prompts' lists are an index of jobs: what is no job any more is left out by who reads, and pruned.

    Each method raises FleetError STORE_UNAVAILABLE if the store is away.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._keys = room.keys

    async def next_number(self) -> int:
        """The next number of the queue, 0 the first; gaps are possible."""
        return int(await self._room.bulk.call("INCR", self._keys.comfy_number)) - 1

    async def number(self) -> int:
        """What `next_number` would give."""
        return int(await self._room.bulk.call("GET", self._keys.comfy_number) or 0)

    async def begin(self, job_id: str, created_ms: int, *, owner: str, client_id: str) -> None:
        """A prompt is about to be submitted; its client, if it has one, is to be told of its end."""
        posted = [self._room.bulk.post_call("ZADD", self._keys.comfy_open, created_ms, job_id)]
        if client_id:
            key = self._keys.comfy_untold(owner, client_id)
            posted.append(self._room.bulk.post_call("SADD", key, job_id))
            posted.append(self._room.bulk.post_call("PEXPIRE", key, UNTOLD_MS))
        await gather(posted)

    async def open(self) -> list[tuple[str, int]]:
        """Prompts that had not ended when they were looked at last, with the time of their submit, the oldest first."""
        flat = await self._room.bulk.call("ZRANGE", self._keys.comfy_open, 0, -1, "WITHSCORES")
        return [(job_id.decode(), int(float(score))) for job_id, score in zip(flat[::2], flat[1::2], strict=True)]

    async def is_open(self, job_id: str) -> bool:
        """Whether it is a prompt that has not ended."""
        return await self._room.bulk.call("ZSCORE", self._keys.comfy_open, job_id) is not None

    async def end(self, job_id: str, ended_ms: int | None) -> bool:
        """The prompt ended; into the history, or (None) into nothing. False: that was known. Repeatable."""
        keys = [self._keys.comfy_open, self._keys.comfy_ended]
        rest = self._room.args(job_id, "" if ended_ms is None else ended_ms, HISTORY)
        return bool(await self._room.bulk.run("comfy_end", keys, rest))

    async def ended(self, first: int, count: int, *, newest: bool) -> Ids:
        """Prompts of the history by their end, from place `first` on; the newest or the oldest first."""
        command = "ZREVRANGE" if newest else "ZRANGE"
        found = await self._room.bulk.call(command, self._keys.comfy_ended, first, first + count - 1)
        return [job_id.decode() for job_id in found]

    async def in_history(self, job_ids: Sequence[str]) -> list[bool]:
        """Whether each is in the history."""
        scores = await gather(
            [self._room.bulk.post_call("ZSCORE", self._keys.comfy_ended, job_id) for job_id in job_ids]
        )
        return [score is not None for score in scores]

    async def hide(self, job_ids: Sequence[str]) -> None:
        """Takes prompts out of the history; the jobs stay."""
        if job_ids:
            await self._room.bulk.call("ZREM", self._keys.comfy_ended, *job_ids)

    # Who has been told.

    async def untold(self, owner: str, client_id: str) -> Ids:
        """The client's prompts whose end it has not been told of."""
        return [job_id.decode() for job_id in await self._room.bulk.call("SMEMBERS", self._untold(owner, client_id))]

    async def told(self, owner: str, client_id: str, job_id: str) -> bool:
        """Whether the client is to be told now; True once for each prompt."""
        return bool(await self._room.bulk.call("SREM", self._untold(owner, client_id), job_id))

    def _untold(self, owner: str, client_id: str) -> str:
        return self._keys.comfy_untold(owner, client_id)

    # What an interrupted prompt had done.

    async def note(self, job_id: str, note: bytes) -> None:
        """Keeps what the history says of a prompt that was stopped, for a week."""
        await self._room.bulk.call("SET", self._keys.comfy_note(job_id), note, "PX", NOTE_MS)

    async def notes(self, job_ids: Sequence[str]) -> list[bytes | None]:
        """The notes of these prompts."""
        if not job_ids:
            return []
        return list(await self._room.bulk.call("MGET", *(self._keys.comfy_note(job_id) for job_id in job_ids)))

    # Names of uploaded files.

    async def file(self, owner: str, name: str) -> bytes | None:
        """What is known of an uploaded file by its name; None if there is none."""
        found: bytes | None = await self._room.bulk.call("HGET", self._keys.comfy_files(owner), name)
        return found

    async def put_file(self, owner: str, name: str, record: bytes, *, only_new: bool) -> bool:
        """Gives a name to a file; False where `only_new` and the name is taken."""
        key = self._keys.comfy_files(owner)
        if only_new:
            return bool(await self._room.bulk.call("HSETNX", key, name, record))
        await self._room.bulk.call("HSET", key, name, record)
        return True

    async def drop_file(self, owner: str, name: str) -> None:
        """The name is free again."""
        await self._room.bulk.call("HDEL", self._keys.comfy_files(owner), name)

    # What nodes have.

    async def catalogues(self) -> Mapping[str, bytes]:
        """What each node's ComfyUI had, by node_id."""
        return pairs(await self._room.bulk.call("HGETALL", self._keys.comfy_nodes))

    async def put_catalogue(self, node_id: str, catalogue: bytes) -> None:
        """Keeps what a node's ComfyUI has."""
        await self._room.bulk.call("HSET", self._keys.comfy_nodes, node_id, catalogue)

    async def drop_catalogue(self, node_id: str) -> None:
        """The node is no more, or has no ComfyUI."""
        await self._room.bulk.call("HDEL", self._keys.comfy_nodes, node_id)
