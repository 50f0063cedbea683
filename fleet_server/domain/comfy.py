"""What a node's ComfyUI has: its classes, their inputs, the values that these take; and what a graph needs of it. Pure.

A catalogue is made of the reply of /object_info. Needs are plain values, so that they can be kept with a job and be
compared with nodes that join later.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = Any
Graph = Mapping[str, Mapping[str, Any]]

ENGINE = "comfyui"
"""The name of the engine that runs graphs."""

_UPLOADS = {"image_upload": "image", "video_upload": "video", "audio_upload": "audio", "file_upload": "file"}
_BROUGHT = re.compile(r"(?:^|/)fleet-[0-9a-f]{32}-")
"""In the name of a file that was brought for a prompt of ours: it is its owner's alone."""
_MODELS = frozenset({"ckpt_name", "unet_name"})
_WEIGHTS = re.compile(r".+\.(?:safetensors|sft|ckpt|pt|pth|bin|gguf)", re.DOTALL | re.IGNORECASE)
_ANNOTATED = re.compile(r"(.+) \[(input|output|temp)\]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Need:
    """A class, or (with `input`) a value that an input of it takes: text, number or bool."""

    class_type: str
    input: str = ""
    value: str | int | float | bool | None = None

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.class_type}.{self.input} = {self.value!r}" if self.input else f"the node class {self.class_type}"


@dataclass(frozen=True, slots=True)
class InputSpec:
    """An input of a class. `type` and `options` are as /object_info has them.

    `choices` are what a list takes, None where any value goes. `upload` is the kind of file that it names, or "".
    """

    name: str
    required: bool
    type: Json
    options: Mapping[str, Json]
    choices: tuple[Json, ...] | None = None
    upload: str = ""

    def takes(self, value: Json) -> bool:
        """Whether the value is one of the choices."""
        return self.choices is None or value in self.choices


@dataclass(frozen=True, slots=True)
class NodeClass:
    """A class: its inputs in their order, required ones first, and the types that it returns."""

    name: str
    inputs: tuple[InputSpec, ...]
    returns: tuple[Json, ...]
    output_node: bool


@dataclass(frozen=True, slots=True, eq=False)
class Catalogue:
    """What one ComfyUI has. `digest` tells two apart; catalogues are the same only if they are the same object."""

    digest: str
    classes: Mapping[str, NodeClass]
    choices: Mapping[str, Mapping[str, frozenset[Json]]] = field(default_factory=dict)
    """What the lists of each class take, by input."""
    version: tuple[int, ...] = ()
    """Of this ComfyUI, such as (0, 12, 1); empty where it is not known."""

    @classmethod
    def of(cls, object_info: Mapping[str, Json], digest: str, version: str = "") -> Catalogue:
        """Of a reply of /object_info; what in it is not of that form is left out."""
        classes = {name: _class(name, found) for name, found in object_info.items() if isinstance(found, dict)}
        choices = {
            name: {
                spec.name: frozenset(choice for choice in spec.choices if _scalar(choice))
                for spec in one.inputs
                if spec.choices is not None
            }
            for name, one in classes.items()
        }
        numbers = re.match(r"v?(\d+(?:\.\d+)*)", version)
        return cls(digest, classes, choices, tuple(map(int, numbers[1].split("."))) if numbers else ())

    def missing(self, needs: Iterable[Need]) -> Iterator[Need]:
        """What of the needs it lacks, in order. An input that takes anything here lacks nothing."""
        for need in needs:
            if need.class_type not in self.classes:
                yield need
            elif need.input:
                choices = self.choices.get(need.class_type, {}).get(need.input)
                if choices is not None and need.value not in choices:
                    yield need

    def lists(self, class_type: str, name: str) -> bool:
        """Whether an input takes one of a list."""
        return name in self.choices.get(class_type, {})

    def only(self, needs: Iterable[Need]) -> Catalogue:
        """As much of it as tells which of these needs it lacks."""
        classes: dict[str, NodeClass] = {}
        choices: dict[str, dict[str, frozenset[Json]]] = {}
        for need in needs:
            if need.class_type in self.classes:
                classes[need.class_type] = NodeClass(need.class_type, (), (), False)
            known = self.choices.get(need.class_type, {}).get(need.input)
            if known is not None:
                kept = choices.setdefault(need.class_type, {})
                kept[need.input] = kept.get(need.input, frozenset()) | ({need.value} & known)
        return Catalogue(self.digest, classes, choices, self.version)


@dataclass(frozen=True, slots=True)
class FileName:
    """A file as graphs name it: name, folder, and ComfyUI's own folder (input, output, temp)."""

    name: str
    subfolder: str = ""
    type: str = "input"

    @classmethod
    def of(cls, value: str) -> FileName:
        """Of `folder/name.png`, `name.png [output]` and the like."""
        match = _ANNOTATED.fullmatch(value)
        path, kind = (match[1], match[2]) if match else (value, "input")
        subfolder, _, name = path.rpartition("/")
        return cls(name, subfolder, kind)


def needs_of(graph: Graph, catalogues: Iterable[Catalogue], *, own: Iterable[tuple[str, str]] = ()) -> tuple[Need, ...]:
    """What a node must have for the graph, each thing once, in a fixed order.

    An input counts as a list if any catalogue says so. `own` are (node id, input) pairs whose files we bring ourselves.
    """
    known = list(catalogues)
    brought = set(own)
    found: dict[tuple[str, str, str], Need] = {}
    for node_id, node in graph.items():
        class_type = str(node.get("class_type"))
        found.setdefault((class_type, "", ""), Need(class_type))
        inputs = node.get("inputs")
        for name, raw in inputs.items() if isinstance(inputs, Mapping) else ():
            value = literal(raw)
            if (node_id, name) in brought or isinstance(raw, list) or not _scalar(value):
                continue
            if any(one.lists(class_type, name) for one in known):
                found.setdefault((class_type, name, repr(value)), Need(class_type, name, value))
    return tuple(found[key] for key in sorted(found))


@functools.lru_cache(maxsize=1_024)
def weights_of(needs: tuple[Need, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The models and the LoRAs that a graph with these needs has in memory while it runs, each once, in order."""
    files = [need for need in needs if isinstance(need.value, str) and _WEIGHTS.fullmatch(need.value)]
    models = {str(need.value) for need in files if need.input in _MODELS}
    loras = {str(need.value) for need in files if "lora" in need.input.lower()}
    return tuple(sorted(models)), tuple(sorted(loras))


def literal(value: Json) -> Json:
    """An input's value; ComfyUI lets a list be written as {"__value__": [...]} to tell it from a link."""
    if isinstance(value, dict) and "__value__" in value and len(value) == 1:
        return value["__value__"]
    return value


def link(value: Json) -> tuple[str, int] | None:
    """The node and the slot that an input is linked to; None where it is not."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and isinstance(value[0], str | int):
        return str(value[0]), value[1]
    return None


def ancestors(graph: Graph, outputs: Iterable[str]) -> set[str]:
    """The nodes that the outputs rest on, they themselves included."""
    found: set[str] = set()
    waiting = [node_id for node_id in outputs if node_id in graph]
    while waiting:
        node_id = waiting.pop()
        if node_id in found:
            continue
        found.add(node_id)
        inputs = graph[node_id].get("inputs")
        for value in inputs.values() if isinstance(inputs, Mapping) else ():
            linked = link(value)
            if linked is not None and linked[0] in graph:
                waiting.append(linked[0])
    return found


def merged(infos: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    """One /object_info of several: each class as the first has it, lists with the values of all."""
    whole: dict[str, Json] = {}
    for info in infos:
        for name, one in info.items():
            if name not in whole:
                whole[name] = one
            elif isinstance(one, dict) and one is not whole[name]:
                whole[name] = _with_choices(whole[name], one)
    return whole


def without_brought(info: Mapping[str, Json]) -> dict[str, Json]:
    """A reply of /object_info without the files that were brought to that ComfyUI for prompts of ours."""
    return {name: _less(one) if isinstance(one, dict) else one for name, one in info.items()}


def _less(one: dict[str, Json]) -> dict[str, Json]:
    parts = one.get("input")
    changed = {
        part: {name: _fewer(spec) for name, spec in inputs.items()} if isinstance(inputs, dict) else inputs
        for part, inputs in (parts.items() if isinstance(parts, dict) else ())
    }
    return one if changed == (parts or {}) else {**one, "input": changed}


def _fewer(spec: Json) -> Json:
    choices = _choices(spec)
    kept = [one for one in choices or () if not (isinstance(one, str) and _BROUGHT.search(one))]
    if choices is None or len(kept) == len(choices):
        return spec
    return [kept, *spec[1:]] if isinstance(spec[0], list) else [spec[0], {**spec[1], "options": kept}, *spec[2:]]


def _with_choices(base: dict[str, Json], other: Mapping[str, Json]) -> dict[str, Json]:
    parts = base.get("input")
    if not isinstance(parts, dict) or not isinstance(other.get("input"), dict):
        return base
    changed = dict(parts)
    for part in ("required", "optional"):
        mine, theirs = parts.get(part), other["input"].get(part)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            changed[part] = {name: _wider(spec, theirs.get(name)) for name, spec in mine.items()}
    return {**base, "input": changed} if changed != parts else base


def _wider(spec: Json, other: Json) -> Json:
    mine, theirs = _choices(spec), _choices(other)
    if mine is None or theirs is None:
        return spec
    more = [choice for choice in theirs if choice not in mine]
    if not more:
        return spec
    if isinstance(spec[0], list):
        return [[*mine, *more], *spec[1:]]
    return [spec[0], {**spec[1], "options": [*mine, *more]}, *spec[2:]]


def _choices(spec: Json) -> list[Json] | None:
    """What an input takes, where it is a list of words, in either way of writing it."""
    if not isinstance(spec, list) or not spec:
        return None
    if isinstance(spec[0], list):
        return spec[0]
    options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    if spec[0] == "COMBO" and isinstance(options.get("options"), list) and "remote" not in options:
        listed: list[Json] = options["options"]
        return listed
    return None


def _class(name: str, found: Mapping[str, Json]) -> NodeClass:
    parts = found.get("input")
    parts = parts if isinstance(parts, dict) else {}
    inputs = [
        _input(input_name, spec, required=part == "required")
        for part in ("required", "optional")
        for input_name, spec in (parts.get(part) or {}).items()
        if isinstance(spec, list) and spec
    ]
    return NodeClass(name, tuple(inputs), tuple(found.get("output") or ()), bool(found.get("output_node")))


def _input(name: str, spec: list[Json], *, required: bool) -> InputSpec:
    options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    choices = _choices(spec)
    upload = next((kind for option, kind in _UPLOADS.items() if options.get(option)), "")
    return InputSpec(name, required, spec[0], options, None if choices is None else tuple(choices), upload)


def _scalar(value: Json) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
