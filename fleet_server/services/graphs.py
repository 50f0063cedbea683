"""Graphs on their way in: judged by what the nodes' ComfyUIs have, with what they need and the files that they name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fleet.v1 import types_pb2

from fleet_server.domain.comfy import Catalogue, FileName, Graph, Need, ancestors, literal, needs_of
from fleet_server.domain.comfy_check import Verdict, check, refusal
from fleet_server.domain.errors import invalid_field
from fleet_server.protojson import dumps_exact, loads_exact

Json = Any


class Catalogues(Protocol):
    """What is known of the nodes' ComfyUIs."""

    def catalogues(self) -> Sequence[Catalogue]:
        """Of all registered nodes, each kind once."""
        ...


class NamedFiles(Protocol):
    """Files that were uploaded under ComfyUI's names."""

    async def reference(self, owner: str, name: FileName) -> str | None:
        """What the file is called in payloads; None if the owner has none of this name."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """A graph as it would be run. `verdict` is that of the ComfyUI which comes nearest."""

    verdict: Verdict
    needs: tuple[Need, ...]
    inputs: tuple[types_pb2.WorkflowInput, ...]
    known: bool
    """Whether any ComfyUI is known at all."""


class Graphs:
    """Judges graphs; keeps nothing."""

    def __init__(self, catalogues: Catalogues, files: NamedFiles) -> None:
        self._catalogues = catalogues
        self._files = files

    async def judge(self, graph: Graph, *, owner: str, targets: Iterable[str] | None = None) -> Judged:
        """The verdict is that of the first ComfyUI which would take the graph whole, else of the one that makes most of
        its outputs, else of the one that misses least.
        """
        catalogues = self._catalogues.catalogues()
        files = await self._own_files(graph, catalogues, owner)
        wanted = None if targets is None else frozenset(targets)
        best: Verdict | None = None
        for catalogue in catalogues:
            verdict = check(graph, catalogue, targets=wanted, has_file=files.__contains__)
            if best is None or _rank(verdict) < _rank(best):
                best = verdict
            if verdict.error is None and not verdict.node_errors:
                break
        verdict = best or Verdict(refusal("no_node", "No node with ComfyUI is known"), faults=1)
        made = ancestors(graph, verdict.outputs) if verdict.error is None else set(graph)
        needs = _needs(graph, made, catalogues, files)
        return Judged(verdict, needs, tuple(files.values()), bool(catalogues))

    async def complete(self, payload: types_pb2.WorkflowPayload, *, owner: str, path: str) -> None:
        """Fills in the needs and the files of a payload that came as JSON text.

        Raises INVALID_FIELD for what is no graph. What no node has is no fault here: the job waits.
        """
        graph = graph_of(payload.workflow_json, path=path)
        catalogues = self._catalogues.catalogues()
        files = await self._own_files(graph, catalogues, owner)
        fill(payload, _needs(graph, set(graph), catalogues, files), files.values())

    async def _own_files(
        self, graph: Graph, catalogues: Sequence[Catalogue], owner: str
    ) -> Mapping[str, types_pb2.WorkflowInput]:
        """The uploaded files that the graph names, by what it calls them."""
        found: dict[str, types_pb2.WorkflowInput] = {}
        for _, _, value in _named_files(graph, catalogues):
            if value in found:
                continue
            name = FileName.of(value)
            reference = await self._files.reference(owner, name)
            if reference is not None:
                found[value] = types_pb2.WorkflowInput(
                    reference=reference, filename=name.name, subfolder=name.subfolder, type=name.type
                )
        return found


def graph_of(text: str, *, path: str) -> dict[str, dict[str, Json]]:
    """The graph in a JSON text. Raises INVALID_FIELD naming `path`."""
    try:
        value = loads_exact(text)
    except ValueError as error:
        raise invalid_field(path, f"must be JSON ({error})") from None
    if not is_graph(value) or not all(node.get("class_type") for node in value.values()):
        words = 'must be a graph in ComfyUI\'s API format: {"<node>": {"class_type": "...", "inputs": {...}}, ...}'
        raise invalid_field(path, words)
    found: dict[str, dict[str, Json]] = value
    return found


def is_graph(value: Json) -> bool:
    """Whether it has the form of ComfyUI's API format; whether a node has a class is judged with the classes."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(node, dict)
            and isinstance(node.get("class_type", ""), str)
            and isinstance(node.get("inputs", {}), dict)
            for node in value.values()
        )
    )


def fill(payload: types_pb2.WorkflowPayload, needs: Iterable[Need], inputs: Iterable[types_pb2.WorkflowInput]) -> None:
    """Writes needs and files into a payload."""
    payload.ClearField("needs")
    payload.ClearField("inputs")
    for need in needs:
        value = dumps_exact(need.value) if need.input else ""
        payload.needs.add(class_type=need.class_type, input=need.input, value_json=value)
    payload.inputs.extend(inputs)


def _rank(verdict: Verdict) -> tuple[bool, int, int]:
    return verdict.error is not None, -len(verdict.outputs), verdict.faults


def _needs(
    graph: Graph, made: set[str], catalogues: Sequence[Catalogue], files: Mapping[str, object]
) -> tuple[Need, ...]:
    """All classes of the graph, and the values of those nodes that will run."""
    own = [(node_id, name) for node_id, name, value in _named_files(graph, catalogues) if value in files]
    running = needs_of({node_id: node for node_id, node in graph.items() if node_id in made}, catalogues, own=own)
    classes = needs_of({node_id: {"class_type": node.get("class_type")} for node_id, node in graph.items()}, ())
    return tuple(dict.fromkeys((*classes, *running)))


def _named_files(graph: Graph, catalogues: Sequence[Catalogue]) -> list[tuple[str, str, str]]:
    """Node, input and value of the inputs that name uploaded files."""
    uploads: dict[str, set[str]] = {}
    for class_type in {str(node.get("class_type")) for node in graph.values()}:
        classes = [one.classes[class_type] for one in catalogues if class_type in one.classes]
        uploads[class_type] = {spec.name for one in classes for spec in one.inputs if spec.upload}
    return [
        (node_id, name, value)
        for node_id, node in graph.items()
        for name, raw in (node.get("inputs") or {}).items()
        if name in uploads[str(node.get("class_type"))] and isinstance(value := literal(raw), str)
    ]
