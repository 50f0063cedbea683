"""What a ComfyUI says of a graph before it takes it: the errors of POST /prompt, as recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.comfy_node.classes import Config

Graph = dict[str, Any]
Errors = list[dict[str, Any]]
_LONG_LIST = 20


class InvalidPromptError(Exception):
    """POST /prompt answers 400 with this body."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body["error"]["message"])
        self.body = body


def refusal(
    kind: str,
    message: str,
    details: str = "",
    node_errors: Mapping[str, Any] | None = None,
    **extra: Any,
) -> InvalidPromptError:
    """The error object of a 400."""
    error = {"type": kind, "message": message, "details": details, "extra_info": extra}
    return InvalidPromptError({"error": error, "node_errors": dict(node_errors or {})})


def is_link(value: Any) -> bool:
    """Whether an input is another node's output."""
    return isinstance(value, list)


class Validation:
    """One graph against the classes that a node has; `has_input` says whether a file was uploaded."""

    def __init__(self, graph: Graph, classes: Mapping[str, Config], has_input: Callable[[str], bool]) -> None:
        self._graph = graph
        self._classes = classes
        self._has_input = has_input
        self._validated: dict[str, tuple[bool, Errors]] = {}

    def outputs(self) -> tuple[list[str], dict[str, Any]]:
        """The outputs that can be made, and what is wrong with the others. Raises InvalidPromptError where none can."""
        for node_id, node in self._graph.items():
            name = node.get("class_type")
            if name not in self._classes:
                words = f"Cannot execute because node {name} does not exist."
                raise refusal("invalid_prompt", words, f"Node ID '#{node_id}'")
        wanted = [node_id for node_id, node in self._graph.items() if self._classes[node["class_type"]]["output_node"]]
        if not wanted:
            raise refusal("prompt_no_outputs", "Prompt has no outputs")
        good: list[str] = []
        lines: list[str] = []
        node_errors: dict[str, Any] = {}
        for output in wanted:
            valid, errors = self._validate(output)
            if valid:
                good.append(output)
                continue
            lines += [f"{error['message']}: {error['details']}" for error in errors]
            for node_id, (is_valid, reasons) in self._validated.items():
                if is_valid or not reasons:
                    continue
                kind = self._graph[node_id]["class_type"]
                entry = {"errors": reasons, "dependent_outputs": [], "class_type": kind}
                node_errors.setdefault(node_id, entry)["dependent_outputs"].append(output)
        if not good:
            words = "Prompt outputs failed validation"
            raise refusal("prompt_outputs_failed_validation", words, "\n".join(lines), node_errors)
        return good, node_errors

    def _validate(self, node_id: str) -> tuple[bool, Errors]:
        if node_id in self._validated:
            return self._validated[node_id]
        node = self._graph[node_id]
        config = self._classes[node["class_type"]]["input"]
        valid, errors = True, Errors()
        # Known before its inputs are looked at, as in the recording: node 1 before the one that links to it.
        for required in (True, False):
            for name, spec in config.get("required" if required else "optional", {}).items():
                if name not in node["inputs"]:
                    if required:
                        errors.append(_error("required_input_missing", "Required input is missing", name, name))
                    continue
                value = node["inputs"][name]
                if is_link(value):
                    wrong, reachable = self._link(name, spec, value)
                    valid = valid and reachable
                else:
                    wrong = self._value(node, name, spec, value)
                errors += [wrong] if wrong else []
        self._validated[node_id] = (valid and not errors, errors)
        return self._validated[node_id]

    def _link(self, name: str, spec: list[Any], link: list[Any]) -> tuple[dict[str, Any] | None, bool]:
        if len(link) != 2 or link[0] not in self._graph:
            words = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return _error("bad_linked_input", words, name, name, input_config=spec, received_value=link), False
        other = self._classes[self._graph[link[0]]["class_type"]]
        received, wanted = other["output"][link[1]], "COMBO" if isinstance(spec[0], list) else spec[0]
        if received != wanted:
            details = f"{name}, received_type({received}) mismatch input_type({wanted})"
            words = "Return type mismatch between linked nodes"
            more = {"input_config": spec, "received_type": received, "linked_node": link}
            return _error("return_type_mismatch", words, details, name, **more), False
        return None, self._validate(link[0])[0]

    def _value(self, node: dict[str, Any], name: str, spec: list[Any], value: Any) -> dict[str, Any] | None:
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        if node["class_type"] in ("LoadImage", "LoadImageMask") and name == "image":
            if self._has_input(str(value)):
                return None
            details = f"image - Invalid image file: {value}"
            return _error("custom_validation_failed", "Custom validation failed for node", details, name)
        if isinstance(kind, list):
            return None if value in kind else _not_in_list(name, spec, value)
        made = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(kind)
        if made is None:
            return None
        try:
            value = node["inputs"][name] = made(value)
        except (TypeError, ValueError) as error:
            words = f"Failed to convert an input value to a {kind} value"
            more = {"input_config": spec, "received_value": value, "exception_message": str(error)}
            return _error("invalid_input_type", words, f"{name}, {value}, {error}", name, **more)
        more = {"input_config": spec, "received_value": value}
        if "min" in options and value < options["min"]:
            words = f"Value {value} smaller than min of {options['min']}"
            return _error("value_smaller_than_min", words, name, name, **more)
        if "max" in options and value > options["max"]:
            words = f"Value {value} bigger than max of {options['max']}"
            return _error("value_bigger_than_max", words, name, name, **more)
        return None


def _not_in_list(name: str, spec: list[Any], value: Any) -> dict[str, Any]:
    words: list[Any] = spec[0]
    long = len(words) > _LONG_LIST
    listed = f"(list of length {len(words)})" if long else f"{words}"
    more = {"input_config": None if long else spec, "received_value": value}
    return _error("value_not_in_list", "Value not in list", f"{name}: '{value}' not in {listed}", name, **more)


def _error(kind: str, message: str, details: str, name: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": {"input_name": name, **more}}


def order(graph: Graph, outputs: list[str]) -> list[str]:
    """The nodes that the outputs need, each after what it links to."""
    found: list[str] = []

    def visit(node_id: str) -> None:
        if node_id in found:
            return
        for value in graph[node_id]["inputs"].values():
            if is_link(value):
                visit(value[0])
        found.append(node_id)

    for output in outputs:
        visit(output)
    return found


def signature(graph: Graph, node_id: str, stamp: Callable[[str], str]) -> str:
    """What a node's result depends on; `stamp` is that of an uploaded file."""
    node = graph[node_id]
    parts = [node["class_type"]]
    for name, value in sorted(node["inputs"].items()):
        if is_link(value):
            parts.append(f"{name}<-{value[1]} of ({signature(graph, value[0], stamp)})")
        else:
            parts.append(f"{name}={value!r}")
    if node["class_type"].startswith("LoadImage"):
        parts.append(stamp(str(node["inputs"]["image"])))
    return "|".join(parts)
