"""Which models, LoRAs and loaded models there are, and what a model's name means.

From what agents report and what the buckets hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Protocol

from fleet.v1 import types_pb2

from fleet_server.domain.fetching import ShelfFile
from fleet_server.domain.node import LoadedView, ModelView, NodeView
from fleet_server.services.ports import Nodes
from fleet_server.services.refusals import refused
from fleet_server.services.words import type_number

Names = dict[str, list[ModelView]]
"""Files by name."""

DEFAULTED = "image_gen"
"""The one job type that runs a model of the server's choice where the caller names none."""


class Stock(Protocol):
    """The model files of the buckets."""

    def find(self, kind: str, name: str) -> ShelfFile | None: ...

    def files(self, kind: str) -> Mapping[str, ShelfFile]: ...

    def missed(self) -> None:
        """A name was asked for that is nowhere: it may have been put there just now."""
        ...


class _NoStock:
    def find(self, kind: str, name: str) -> ShelfFile | None:
        return None

    def files(self, kind: str) -> Mapping[str, ShelfFile]:
        return {}

    def missed(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class CatalogSettings:
    """`aliases` are names that stand for another model wherever no node has a model of that name itself."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    default_model: str | None = None


@dataclass(frozen=True, slots=True)
class Resolution:
    """`target` is the name asked for (or the default), `resolved` what runs; both None where none is needed."""

    target: str | None
    resolved: str | None

    @property
    def alias(self) -> bool:
        return self.resolved is not None and self.resolved != self.target


class ModelCatalog:
    """The models of the fleet, from what the nodes report at each call, and those of `stock`, which nodes could
    bring.

    Which names there are is worked out again only when an inventory has changed: each submit asks for it.
    """

    def __init__(self, nodes: Nodes, settings: CatalogSettings | None = None, stock: Stock | None = None) -> None:
        self._nodes = nodes
        self._shelf = stock or _NoStock()
        self._settings = settings or CatalogSettings()
        self._inventories: list[object] = []
        self._worked_out: dict[tuple[str, str], Names | None] = {}

    def resolve(self, name: str | None, job_type: str, *, path: str = "model") -> Resolution:
        """What `name` runs for a job type.

        Raises MODEL_NOT_FOUND for a name that neither a node nor a bucket has, unless no node for the job type is
        known: such jobs wait.
        """
        if name is None and job_type != DEFAULTED:
            return Resolution(None, None)
        serving = self._served("checkpoint", job_type)
        known = serving if serving is not None else {}
        if name is None:
            return self._default(known)
        if name in known or self._to_be_had("checkpoint", name, job_type):
            return Resolution(name, name)
        real = self._settings.aliases.get(name, name)
        if serving is not None and real not in known and not self._on_shelf(real, job_type):
            self._shelf.missed()
            words = f"neither a node nor S3 has a model {name!r}; see GET /api/vision/models/available"
            raise refused("MODEL_NOT_FOUND", path, words)
        return Resolution(name, real)

    def real_name(self, name: str, node: NodeView) -> str:
        """What the name stands for on a node: itself where the node has it or could bring it."""
        if name in node.models or any(
            self._to_be_had("checkpoint", name, job_type, node) for job_type in node.job_types
        ):
            return name
        return self._settings.aliases.get(name, name)

    def _to_be_had(self, kind: str, name: str, job_type: str, node: NodeView | None = None) -> bool:
        """Whether a node that runs the type would bring that file of the buckets and load it."""
        file = self._shelf.find(kind, name)
        if file is None:
            return False
        nodes = self._nodes.nodes() if node is None else [node]
        return any(_loads(one, file, job_type) for one in nodes)

    def _on_shelf(self, name: str, job_type: str) -> bool:
        """Whether the buckets have the model, and if nodes could load it, then for this type: else its jobs wait."""
        file = self._shelf.find("checkpoint", name)
        if file is None:
            return False
        types = _types_of(self._nodes.nodes(), file)
        return not types or job_type in types

    def check_loras(self, names: Iterable[str], job_type: str, *, path: str = "loras") -> None:
        """Raises LORA_NOT_FOUND for a name that neither a node nor a bucket has, unless no node for the job type is
        known."""
        wanted = tuple(names)
        known = self._served("lora", job_type) if wanted else None
        if known is None:
            return
        for index, name in enumerate(wanted):
            if name not in known and self._shelf.find("lora", name) is None:
                self._shelf.missed()
                words = f"neither a node nor S3 has a LoRA {name!r}; see GET /api/vision/loras"
                raise refused("LORA_NOT_FOUND", f"{path}[{index}].name", words)

    def _served(self, kind: str, job_type: str) -> Names | None:
        """The files by name on nodes that run the type; None where no node does."""
        nodes = self._nodes.nodes()
        # Views are replaced with each job; their inventories are the same objects until one changes.
        inventories: list[object] = [node.models for node in nodes]
        inventories += [node.job_types for node in nodes]
        if len(inventories) != len(self._inventories) or not all(map(is_, inventories, self._inventories)):
            self._inventories = inventories
            self._worked_out.clear()
        key = kind, job_type
        if key not in self._worked_out:
            serving = [node for node in nodes if job_type in node.job_types]
            self._worked_out[key] = _names(serving, kind, job_type) if serving else None
        return self._worked_out[key]

    def default_model(self) -> str | None:
        """The name that runs where image_gen names none; None if no node has any."""
        return self._default(_names(self._nodes.nodes(), "checkpoint", DEFAULTED)).target

    def alias_notes(self) -> list[str]:
        """One sentence for each alias in force."""
        known = self._files("checkpoint")
        return [
            f"{alias} is an alias of {real}" + (", which is no diffusion model" if _is_sketch(known[real]) else "")
            for alias, real in sorted(self._settings.aliases.items())
            if real in known and alias not in known
        ]

    def models(self, *, job_type: int | None = None, node_id: str | None = None) -> list[types_pb2.Model]:
        """Checkpoints and aliases of them, in no order."""
        default = self.default_model()
        stocked = self._stocked()
        found = []
        for name, real, holders in self._named("checkpoint"):
            # (A real model that nodes would bring goes before an alias of its name.)
            if name in stocked or (node_id is not None and node_id not in holders):
                continue
            model = _model(name, real, holders, self._loaded_on(real))
            model.in_s3 = self._shelf.find("checkpoint", real) is not None
            found.append(model)
        if node_id is None:
            found += [_stocked_model(file, types) for file, types in stocked.values()]
        for model in found:
            model.is_default = model.name == default
        return [model for model in found if job_type is None or job_type in model.job_types]

    def _stocked(self) -> dict[str, tuple[ShelfFile, frozenset[str]]]:
        """Models that the buckets alone have, and what nodes could do with them. Without any use they leave their name
        to an alias."""
        nodes, on_nodes, aliases = self._nodes.nodes(), self._files("checkpoint"), self._settings.aliases
        found = {}
        for name, file in self._shelf.files("checkpoint").items():
            types = _types_of(nodes, file)
            if name not in on_nodes and (types or aliases.get(name) not in on_nodes):
                found[name] = file, types
        return found

    def loaded(
        self, *, node_id: str | None = None, running: Mapping[tuple[str, str], int]
    ) -> list[types_pb2.LoadedModel]:
        """One for each (node, model in memory), and for each alias of it. `running` counts jobs by (node, model)."""
        aliases: dict[str, list[str]] = {}
        known = self._files("checkpoint")
        for alias, real in self._settings.aliases.items():
            if alias not in known:
                aliases.setdefault(real, []).append(alias)
        found = []
        for node in self._nodes.online():
            if node_id is not None and node.node_id != node_id:
                continue
            for view in node.loaded:
                jobs = running.get((node.node_id, view.name), 0)
                found.append(_loaded(node, view, view.name, None, jobs))
                found += [_loaded(node, view, alias, view.name, jobs) for alias in aliases.get(view.name, ())]
        return found

    def loras(self, *, node_id: str | None = None) -> list[types_pb2.Lora]:
        """LoRAs, in no order."""
        found = []
        for name, _, holders in self._named("lora"):
            if node_id is not None and node_id not in holders:
                continue
            file = _best(holders.values())
            lora = types_pb2.Lora(name=name, trigger_words=file.trigger_words, node_ids=sorted(holders))
            _describe(lora, file)
            lora.in_s3 = self._shelf.find("lora", name) is not None
            found.append(lora)
        if node_id is None:
            here = {lora.name for lora in found}
            found += [_stocked_lora(file) for name, file in self._shelf.files("lora").items() if name not in here]
        return found

    def _default(self, known: Mapping[str, Sequence[ModelView]]) -> Resolution:
        wanted = self._settings.default_model
        if wanted is not None:
            if wanted in known or self._to_be_had("checkpoint", wanted, DEFAULTED):
                return Resolution(wanted, wanted)
            real = self._settings.aliases.get(wanted, wanted)
            if real in known or not known:
                return Resolution(wanted, real)
        if not known:
            return Resolution(None, None)
        first = min(known)
        return Resolution(first, first)

    def _files(self, kind: str) -> dict[str, dict[str, ModelView]]:
        found: dict[str, dict[str, ModelView]] = {}
        for node in self._nodes.nodes():
            for name, view in node.models.items():
                if view.kind == kind:
                    found.setdefault(name, {})[node.node_id] = view
        return found

    def _named(self, kind: str) -> Iterator[tuple[str, str, dict[str, ModelView]]]:
        """(name, real name, file by node) of every name, aliases included."""
        files = self._files(kind)
        for name, holders in files.items():
            yield name, name, holders
        if kind == "checkpoint":
            for alias, real in self._settings.aliases.items():
                if real in files and alias not in files:
                    yield alias, real, files[real]

    def _loaded_on(self, real: str) -> list[str]:
        return [node.node_id for node in self._nodes.online() if any(view.name == real for view in node.loaded)]


def _names(nodes: Iterable[NodeView], kind: str, job_type: str) -> Names:
    found: Names = {}
    for node in nodes:
        for name, view in node.models.items():
            # A file that names no job types fits them all; a LoRA goes by its architecture.
            fits = kind == "lora" or not view.job_types or job_type in view.job_types
            if view.kind == kind and fits:
                found.setdefault(name, []).append(view)
    return found


def _loads(node: NodeView, file: ShelfFile, job_type: str) -> bool:
    return any(file.architecture in one.architectures and job_type in one.job_types for one in node.loadable)


def _types_of(nodes: Iterable[NodeView], file: ShelfFile) -> frozenset[str]:
    """What the file would be for, by the engines that load its kind."""
    return frozenset(
        job_type
        for node in nodes
        for one in node.loadable
        if file.architecture in one.architectures
        for job_type in one.job_types
    )


def _stocked_model(file: ShelfFile, types: Iterable[str]) -> types_pb2.Model:
    model = types_pb2.Model(name=file.name, format="safetensors", in_s3=True)
    model.job_types.extend(number for number in map(type_number, sorted(types)) if number)
    _describe(model, _as_view(file))
    return model


def _as_view(file: ShelfFile) -> ModelView:
    return ModelView(
        file.name, kind=file.kind, size_bytes=file.size_bytes, sha256=file.sha256, architecture=file.architecture
    )


def _stocked_lora(file: ShelfFile) -> types_pb2.Lora:
    lora = types_pb2.Lora(name=file.name, trigger_words=file.trigger_words, in_s3=True)
    _describe(lora, _as_view(file))
    return lora


def _is_sketch(holders: Mapping[str, ModelView]) -> bool:
    return any(view.engine == "sketch" for view in holders.values())


def _best(views: Iterable[ModelView]) -> ModelView:
    """One whose hash is known, if there is one."""
    return max(views, key=lambda view: (bool(view.sha256), view.size_bytes))


def _model(name: str, real: str, holders: Mapping[str, ModelView], loaded: Iterable[str]) -> types_pb2.Model:
    file = _best(holders.values())
    model = types_pb2.Model(
        name=name,
        alias_of=real if real != name else None,
        job_types=[number for number in map(type_number, sorted(file.job_types)) if number],
        format=file.format or None,
        node_ids=sorted(holders),
        loaded_node_ids=sorted(loaded),
    )
    _describe(model, file)
    return model


def _describe(message: types_pb2.Model | types_pb2.Lora, file: ModelView) -> None:
    if file.architecture:
        message.architecture = file.architecture
    if file.sha256:
        message.sha256 = file.sha256
    message.size_bytes = file.size_bytes


def _loaded(node: NodeView, view: LoadedView, name: str, real: str | None, jobs: int) -> types_pb2.LoadedModel:
    loaded = types_pb2.LoadedModel(
        node_id=node.node_id,
        name=name,
        alias_of=real,
        engine=view.engine,
        gpu_index=view.gpu_index,
        memory_bytes=view.memory_bytes,
        loras=view.loras,
        running_jobs=jobs,
        pinned=view.pinned,
    )
    loaded.load_time.FromMilliseconds(view.load_ms)
    loaded.last_used_time.FromMilliseconds(view.used_ms)
    return loaded
