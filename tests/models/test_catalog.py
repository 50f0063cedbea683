"""What names mean where some files are in buckets alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from fleet.v1 import types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.fetching import ShelfFile
from fleet_server.domain.node import Loadable, LoadedView, ModelView, NodeStatus, NodeView
from fleet_server.services.fleet import FleetView
from fleet_server.services.models import CatalogSettings, ModelCatalog

IMAGE = "image_gen"
ALIASES = {"SDXL.safetensors": "sketch"}
NODE = NodeView(
    "agx0",
    NodeStatus.ONLINE,
    clusters=frozenset({"vision"}),
    job_types=frozenset({IMAGE}),
    models={"sketch": ModelView("sketch", engine="sketch", architecture="sketch", job_types=(IMAGE,))},
    loadable=(Loadable("sketch", ("sketch",), (IMAGE,)),),
)


class Nodes(FleetView):
    """These and no others."""

    def __init__(self, *nodes: NodeView) -> None:
        super().__init__()
        self.views = list(nodes)

    def nodes(self) -> list[NodeView]:
        return self.views


@dataclass
class Stock:
    """The buckets."""

    held: list[ShelfFile] = field(default_factory=list)
    misses: int = 0

    def find(self, kind: str, name: str) -> ShelfFile | None:
        return self.files(kind).get(name)

    def files(self, kind: str) -> dict[str, ShelfFile]:
        return {file.name: file for file in self.held if file.kind == kind}

    def missed(self) -> None:
        self.misses += 1


def checkpoint(name: str, architecture: str = "sketch") -> ShelfFile:
    return ShelfFile(name, "checkpoint", 100, "e", "", architecture)


def catalog(*held: ShelfFile, nodes: tuple[NodeView, ...] = (NODE,), default: str | None = None) -> ModelCatalog:
    return catalog_of(Stock(list(held)), *nodes, default=default)


def catalog_of(stock: Stock, *nodes: NodeView, default: str | None = None) -> ModelCatalog:
    return ModelCatalog(Nodes(*nodes), CatalogSettings(aliases=ALIASES, default_model=default), stock)


def named(models: list[types_pb2.Model]) -> dict[str, types_pb2.Model]:
    return {model.name: model for model in models}


def test_a_file_of_a_bucket_is_listed_and_may_be_asked_for() -> None:
    made = catalog(checkpoint("far"), ShelfFile("ink", "lora", 5, "e", "ab", "sketch", ("ink",)))
    assert made.resolve("far", IMAGE).resolved == "far"
    made.check_loras(["ink"], IMAGE)
    model = named(made.models())["far"]
    assert (model.in_s3, list(model.node_ids), model.size_bytes, model.format) == (True, [], 100, "safetensors")
    assert list(model.job_types) == [types_pb2.JOB_TYPE_IMAGE_GEN]
    (lora,) = made.loras()
    assert (lora.name, lora.in_s3, list(lora.trigger_words), lora.sha256) == ("ink", True, ["ink"], "ab")
    assert "far" not in named(made.models(node_id="agx0")) and made.loras(node_id="agx0") == []


def test_one_that_a_node_has_too_is_listed_once() -> None:
    has = replace(
        NODE, models={**NODE.models, "far": ModelView("far", size_bytes=100), "ink": ModelView("ink", "lora")}
    )
    made = catalog(checkpoint("far"), ShelfFile("ink", "lora", 5), nodes=(has,))
    assert [(one.in_s3, list(one.node_ids)) for one in made.models() if one.name == "far"] == [(True, ["agx0"])]
    assert [(one.in_s3, list(one.node_ids)) for one in made.loras()] == [(True, ["agx0"])]
    assert not named(made.models())["sketch"].in_s3


def test_a_model_that_no_engine_loads_is_listed_and_its_jobs_wait() -> None:
    made = catalog(checkpoint("flux", "flux"))
    assert list(named(made.models())["flux"].job_types) == []
    assert named(made.models(job_type=types_pb2.JOB_TYPE_IMAGE_GEN)).keys() == {"sketch", "SDXL.safetensors"}
    assert made.resolve("flux", IMAGE).resolved == "flux"


def test_a_model_for_another_type_of_job_is_refused() -> None:
    llm = replace(NODE, node_id="b", loadable=(Loadable("x", ("llama",), ("llm_inference",)),))
    stock = Stock([checkpoint("llama", "llama")])
    made = catalog_of(stock, NODE, llm)
    with pytest.raises(FleetError, match="neither a node nor S3"):
        made.resolve("llama", IMAGE)
    with pytest.raises(FleetError, match="neither a node nor S3"):
        made.resolve("none", IMAGE)
    with pytest.raises(FleetError, match="neither a node nor S3"):
        made.check_loras(["none"], IMAGE)
    assert stock.misses == 3


def test_an_alias_counts_until_a_real_model_of_its_name_can_be_had() -> None:
    name = "SDXL.safetensors"
    for held, alias in (([], "sketch"), ([checkpoint(name, "sdxl")], "sketch"), ([checkpoint(name)], None)):
        made = catalog(*held)
        assert made.resolve(name, IMAGE).resolved == (alias or name)
        assert made.real_name(name, NODE) == (alias or name)
        (model,) = [one for one in made.models() if one.name == name]
        assert (model.alias_of or None) == alias
        assert model.in_s3 == (alias is None)


def test_the_default_may_be_in_a_bucket_but_none_is_chosen_from_there() -> None:
    assert catalog(checkpoint("a")).default_model() == "sketch"
    made = catalog(checkpoint("a"), default="a")
    assert made.resolve(None, IMAGE).resolved == "a"
    assert [one.name for one in made.models() if one.is_default] == ["a"]
    assert catalog(checkpoint("a", "flux"), default="a").default_model() == "sketch"


def test_a_pinned_model_says_so() -> None:
    made = catalog(nodes=(replace(NODE, loaded=(LoadedView("sketch", "sketch", pinned=True),)),))
    assert {one.name: one.pinned for one in made.loaded(running={})} == {"sketch": True, "SDXL.safetensors": True}
