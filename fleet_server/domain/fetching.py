"""Which node should bring a model or LoRA from the buckets to its disk, for jobs that no node can run without. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from fleet_server.domain.eta import start_seconds
from fleet_server.domain.feasibility import Refusal, Refused, feasible
from fleet_server.domain.job import Lane
from fleet_server.domain.node import ModelView, NodeView
from fleet_server.domain.ranking import load_seconds
from fleet_server.domain.speeds import Timing

FETCH_BYTES_PER_SECOND = 100e6
"""How fast a node brings a file, until it is measured: a good local network."""

_BUSY_SECONDS = 60.0
"""What a node without a free slot counts for where nobody knows when one will be."""


@dataclass(frozen=True, slots=True)
class ShelfFile:
    """A file in a bucket. `kind` is checkpoint or lora; `sha256` is empty where nobody has computed it yet."""

    name: str
    kind: str
    size_bytes: int
    etag: str = ""
    sha256: str = ""
    architecture: str = ""
    trigger_words: tuple[str, ...] = ()


class Shelf(Protocol):
    """The files of the buckets, in memory."""

    def find(self, kind: str, name: str) -> ShelfFile | None:
        """The file of that name, None if there is none."""
        ...

    def trouble(self, node_id: str, kind: str, name: str) -> str | None:
        """Why the node had better not try to bring it just now, None if nothing is known against it."""
        ...


class NoShelf:
    """There are no buckets."""

    def find(self, kind: str, name: str) -> ShelfFile | None:
        return None

    def trouble(self, node_id: str, kind: str, name: str) -> str | None:
        return None


NO_SHELF = NoShelf()


def missing(node: NodeView, lane: Lane) -> tuple[tuple[str, str], ...]:
    """(kind, name) of what the lane's jobs need and the node does not have."""
    wanted = [("checkpoint", lane.model)] if lane.model else []
    wanted += [("lora", name) for name in lane.loras]
    return tuple(one for one in wanted if (file := node.models.get(one[1])) is None or file.kind != one[0])


def fetch_plan(node: NodeView, lane: Lane, shelf: Shelf) -> tuple[ShelfFile, ...] | Refusal:
    """The files that would make the node able to run the lane's jobs, none where it is; or why nothing would."""
    refusal = feasible(node, lane)
    if refusal is None:
        return ()
    files = []
    for kind, name in missing(node, lane):
        file = shelf.find(kind, name)
        if file is None:
            return refusal
        against = _against(node, lane, file, shelf)
        if against is not None:
            word = Refused.MODEL_MISSING if kind == "checkpoint" else Refused.LORA_MISSING
            return Refusal(word, against)
        files.append(file)
    if not files:
        return refusal
    return feasible(with_files(node, files), lane) or tuple(files)


def with_files(node: NodeView, files: Iterable[ShelfFile]) -> NodeView:
    """The node as it would be with these files on its disk."""
    return replace(node, models={**node.models, **{file.name: _view(node, file) for file in files}})


def fetch_seconds(node: NodeView, files: Iterable[ShelfFile], timing: Timing) -> float:
    """How long the node would take to bring them."""
    return sum(file.size_bytes for file in files) / (timing.fetch_speed(node) or FETCH_BYTES_PER_SECOND)


def cold_fetch_seconds(node: NodeView, lane: Lane, files: Iterable[ShelfFile], timing: Timing) -> float:
    """From the beginning of the download until the lane's model and LoRAs are in the node's memory."""
    files = tuple(files)
    return fetch_seconds(node, files, timing) + load_seconds(with_files(node, files), lane, timing)


def best_fetch(
    nodes: Iterable[NodeView], lane: Lane, shelf: Shelf, timing: Timing, now_ms: int
) -> tuple[NodeView, tuple[ShelfFile, ...]] | None:
    """The node that would first be able to run the lane's jobs, and what it has to bring.

    None where a node can run them already, if only when it is free, and where no node ever could.
    """
    found: list[tuple[float, str, NodeView, tuple[ShelfFile, ...]]] = []
    for node in nodes:
        plan = fetch_plan(node, lane, shelf)
        if plan == ():
            return None
        if isinstance(plan, Refusal):
            continue
        start = start_seconds(node, now_ms)
        brought = fetch_seconds(node, plan, timing)
        ready = max(brought, _BUSY_SECONDS if start is None else start)
        loaded = load_seconds(with_files(node, plan), lane, timing)
        run = timing.run_seconds(node, lane) or 0.0
        found.append((ready + loaded + run, node.node_id, node, plan))
    if not found:
        return None
    _, _, node, files = min(found, key=lambda one: one[:2])
    return node, files


def _against(node: NodeView, lane: Lane, file: ShelfFile, shelf: Shelf) -> str | None:
    """Why the node would not bring the file; None if it would."""
    if not node.loadable:
        return f"it does not have {_noun(file)} {file.name}, and brings none from S3"
    if not any(file.architecture in one.architectures for one in node.loadable):
        kind = f"of the architecture {file.architecture}" if file.architecture else "whose architecture is unknown"
        return f"it does not have {_noun(file)} {file.name} (in S3), {kind}: no engine of it loads that"
    if node.largest_file_bytes and file.size_bytes > node.largest_file_bytes:
        return (
            f"it does not have {_noun(file)} {file.name} (in S3), {file.size_bytes:,} bytes: "
            f"more than its budget of {node.largest_file_bytes:,} for models"
        )
    return shelf.trouble(node.node_id, file.kind, file.name)


def _noun(file: ShelfFile) -> str:
    return "the LoRA" if file.kind == "lora" else "the model"


def _view(node: NodeView, file: ShelfFile) -> ModelView:
    able = next((one for one in node.loadable if file.architecture in one.architectures), None)
    return ModelView(
        file.name,
        kind=file.kind,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        architecture=file.architecture,
        format="safetensors",
        trigger_words=file.trigger_words,
        job_types=able.job_types if able is not None else (),
        engine=able.engine if able is not None else "",
    )
