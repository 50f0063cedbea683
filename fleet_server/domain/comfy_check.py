"""Whether a ComfyUI would take a graph, judged by its catalogue, and its refusal in ComfyUI's own words. Pure.

The types, messages and details are those that ComfyUI's clients know; where its own check cannot be foreseen (classes
that judge their inputs themselves), the graph passes and the node has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fleet_server.domain.comfy import Catalogue, Graph, InputSpec, NodeClass, literal

Json = Any
Error = dict[str, Json]
HasFile = Callable[[str], bool]

_LONG_LIST = 20
_CASTS: Mapping[str, Callable[[Json], Json]] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
_NAMES_MISSING = (0, 12)
"""From this version on a missing class is an error of a type of its own."""
_KINDS = {"image": "image", "video": "video", "audio": "audio", "file": "file"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`error` is None where at least one output can be made; then `outputs` are those.

    `node_errors` may tell of the others. `faults` counts what is wrong: the less, the nearer the node is to the graph.
    """

    error: Error | None = None
    node_errors: dict[str, Json] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    faults: int = 0


def refusal(kind: str, message: str, details: str = "", **extra: Json) -> Error:
    """The `error` of a 400."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra}


def check(
    graph: Graph, catalogue: Catalogue, *, targets: frozenset[str] | None = None, has_file: HasFile = lambda _: False
) -> Verdict:
    """Judges a graph. `targets` are the outputs that alone are to be made; `has_file` knows the files that we bring."""
    missing = [(node_id, node) for node_id, node in graph.items() if node.get("class_type") not in catalogue.classes]
    if missing:
        words = _no_class if catalogue.version >= _NAMES_MISSING else _no_class_before
        return Verdict(words(*missing[0]), faults=1_000 * len(missing))
    wanted = [
        node_id
        for node_id, node in graph.items()
        if catalogue.classes[node["class_type"]].output_node and (targets is None or node_id in targets)
    ]
    if not wanted:
        return Verdict(refusal("prompt_no_outputs", "Prompt has no outputs"), faults=1)
    walk = _Walk(graph, catalogue, has_file)
    good: list[str] = []
    node_errors: dict[str, Json] = {}
    own: list[str] = []
    for output in wanted:
        if walk.valid(output):
            good.append(output)
            continue
        own += [f"{reason['message']}: {reason['details']}" for reason in walk.errors.get(output, ())]
        for node_id in walk.seen_from(output):
            errors = walk.errors[node_id]
            if errors:
                class_type = graph[node_id]["class_type"]
                entry = node_errors.setdefault(
                    node_id, {"errors": errors, "dependent_outputs": [], "class_type": class_type}
                )
                entry["dependent_outputs"].append(output)
    faults = sum(len(errors) for errors in walk.errors.values())
    if good:
        return Verdict(None, node_errors, tuple(good), faults)
    error = refusal("prompt_outputs_failed_validation", "Prompt outputs failed validation", "\n".join(own))
    return Verdict(error, node_errors, (), max(1, faults))


def _no_class(node_id: str, node: Mapping[str, Json]) -> Error:
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    kind = node.get("class_type")
    if "class_type" in node:
        title = kind if title is None else title
        words = f"Node '{title}' not found. The custom node may not be installed."
    else:
        unnamed = f"ID #{node_id}"
        words = (
            f"Node '{title or unnamed}' has no class_type. The workflow may be corrupted or a custom node is missing."
        )
    details = f"Node ID '#{node_id}'"
    return refusal("missing_node_type", words, details, node_id=node_id, class_type=kind, node_title=title)


def _no_class_before(node_id: str, node: Mapping[str, Json]) -> Error:
    """As it was said by versions that are older."""
    details = f"Node ID '#{node_id}'"
    if "class_type" not in node:
        words = "Cannot execute because a node is missing the class_type property."
        return refusal("invalid_prompt", words, details)
    words = f"Cannot execute because node {node['class_type']} does not exist."
    return refusal("invalid_prompt", words, details)


class _Walk:
    """Goes from outputs to what they rest on, each node once, without recursion: graphs may be long chains."""

    def __init__(self, graph: Graph, catalogue: Catalogue, has_file: HasFile) -> None:
        self._graph = graph
        self._catalogue = catalogue
        self._has_file = has_file
        self._verdicts: dict[str, bool] = {}
        self._open: set[str] = set()
        self._links: dict[str, list[str]] = {}
        self.errors: dict[str, list[Error]] = {}
        """In the order in which the nodes were done."""

    def valid(self, output: str) -> bool:
        """Whether the output can be made."""
        if output in self._verdicts:
            return self._verdicts[output]
        stack: list[tuple[str, Generator[str, bool, bool]]] = [(output, self._node(output))]
        answer: bool | None = None
        while stack:
            node_id, visit = stack[-1]
            try:
                child = next(visit) if answer is None else visit.send(answer)
            except StopIteration as done:
                self._verdicts[node_id] = answer = done.value
                self._open.discard(node_id)
                stack.pop()
                continue
            answer = self._verdicts.get(child)
            if answer is None:
                stack.append((child, self._node(child)))
        return self._verdicts[output]

    def seen_from(self, output: str) -> list[str]:
        """The nodes that were judged for the output, in the order in which they were done."""
        reached, waiting = {output}, [output]
        while waiting:
            for child in self._links.get(waiting.pop(), ()):
                if child not in reached:
                    reached.add(child)
                    waiting.append(child)
        return [node_id for node_id in self.errors if node_id in reached]

    def _node(self, node_id: str) -> Generator[str, bool, bool]:
        self._open.add(node_id)
        node = self._graph[node_id]
        kind = self._catalogue.classes[node["class_type"]]
        given = node.get("inputs")
        inputs: Mapping[str, Json] = given if isinstance(given, Mapping) else {}
        errors: list[Error] = []
        valid = True
        for spec in kind.inputs:
            if spec.name not in inputs:
                if spec.required:
                    words = "Required input is missing"
                    errors.append(refusal("required_input_missing", words, spec.name, input_name=spec.name))
                continue
            value = inputs[spec.name]
            if not isinstance(value, list):
                errors += self._literal(spec, literal(value))
                continue
            fault = self._link(spec, value)
            if fault is not None:
                errors.append(fault)
                continue
            child = str(value[0])
            self._links.setdefault(node_id, []).append(child)
            if child in self._open:
                errors.append(_cycle(spec, value))
            elif not (yield child):
                valid = False
        self.errors[node_id] = errors
        return valid and not errors

    def _link(self, spec: InputSpec, value: list[Json]) -> Error | None:
        if len(value) != 2:
            words = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            extra = {"input_name": spec.name, "input_config": _config(spec), "received_value": value}
            return refusal("bad_linked_input", words, spec.name, **extra)
        node = self._graph.get(str(value[0])) if isinstance(value[0], str | int) else None
        returns = self._catalogue.classes[node["class_type"]].returns if node is not None else ()
        if node is None or not isinstance(value[1], int) or not 0 <= value[1] < len(returns):
            words = "Exception when validating inner node"
            return refusal(
                "exception_during_inner_validation",
                words,
                f"{spec.name}: no output {value[1]!r} of a node {value[0]!r} is there",
                input_name=spec.name,
                input_config=_config(spec),
                linked_node=value,
            )
        received = returns[value[1]]
        if _fits(received, spec.type):
            return None
        return refusal(
            "return_type_mismatch",
            "Return type mismatch between linked nodes",
            f"{spec.name}, received_type({received}) mismatch input_type({spec.type})",
            input_name=spec.name,
            input_config=_config(spec),
            received_type=received,
            linked_node=value,
        )

    def _literal(self, spec: InputSpec, value: Json) -> list[Error]:
        extra = {"input_name": spec.name, "input_config": _config(spec), "received_value": value}
        if spec.upload and isinstance(value, str):
            return self._file(spec, value)
        cast = _CASTS.get(spec.type) if isinstance(spec.type, str) else None
        if cast is not None:
            try:
                value = cast(value)
            except (TypeError, ValueError, OverflowError) as error:
                words = f"Failed to convert an input value to a {spec.type} value"
                details = f"{spec.name}, {value}, {error}"
                return [refusal("invalid_input_type", words, details, **extra, exception_message=str(error))]
            extra["received_value"] = value
        low, high = spec.options.get("min"), spec.options.get("max")
        if _comparable(low, value) and value < low:
            words = f"Value {value} smaller than min of {low}"
            return [refusal("value_smaller_than_min", words, spec.name, **extra)]
        if _comparable(high, value) and value > high:
            words = f"Value {value} bigger than max of {high}"
            return [refusal("value_bigger_than_max", words, spec.name, **extra)]
        return [] if spec.takes(value) else [_not_listed(spec, value)]

    def _file(self, spec: InputSpec, value: str) -> list[Error]:
        if self._has_file(value) or (spec.choices is not None and value in spec.choices):
            return []
        words = f"{spec.name} - Invalid {_KINDS[spec.upload]} file: {value}"
        kind = "Custom validation failed for node"
        return [refusal("custom_validation_failed", kind, words, input_name=spec.name)]


def _not_listed(spec: InputSpec, value: Json) -> Error:
    choices = list(spec.choices or ())
    long = len(choices) > _LONG_LIST
    shown = f"(list of length {len(choices)})" if long else str(choices)
    return refusal(
        "value_not_in_list",
        "Value not in list",
        f"{spec.name}: '{value}' not in {shown}",
        input_name=spec.name,
        input_config=None if long else _config(spec),
        received_value=value,
    )


def _cycle(spec: InputSpec, value: list[Json]) -> Error:
    words = "Dependency cycle detected"
    details = f"{spec.name}: node {value[0]} rests on itself"
    return refusal("dependency_cycle", words, details, input_name=spec.name, linked_node=value)


def _config(spec: InputSpec) -> list[Json]:
    return [spec.type, dict(spec.options)]


def _fits(received: Json, wanted: Json) -> bool:
    """Whether an output may be linked to an input: one type in common, or one of them takes anything."""
    if received == wanted or "*" in (received, wanted):
        return True
    if isinstance(received, list) or isinstance(wanted, list):
        return (isinstance(received, list) or received == "COMBO") and (isinstance(wanted, list) or wanted == "COMBO")
    if not isinstance(received, str) or not isinstance(wanted, str):
        return False
    if wanted.startswith("COMFY_") or received.startswith("COMFY_"):
        # Types that are matched as the graph runs; the node knows.
        return True
    return bool({part.strip() for part in received.split(",")} & {part.strip() for part in wanted.split(",")})


def _comparable(bound: Json, value: Json) -> bool:
    return isinstance(bound, int | float) and isinstance(value, int | float)


__all__ = ["Graph", "NodeClass", "Verdict", "check", "refusal"]
