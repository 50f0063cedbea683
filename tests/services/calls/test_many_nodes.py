"""What is asked at each submit does not grow with what thousand nodes report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.domain.node import ModelView, NodeStatus, NodeView
from fleet_server.services.models import ModelCatalog
from fleet_server.services.ports import Nodes


class Counted(dict[str, ModelView]):
    """An inventory that counts how often it is gone through."""

    looks = 0

    def items(self) -> Iterator[tuple[str, ModelView]]:  # type: ignore[override]
        self.looks += 1
        return iter(super().items())


class Few:
    """Some nodes, as the catalogue asks for them."""

    def __init__(self) -> None:
        self.inventory = Counted({"a": ModelView("a"), "l": ModelView("l", kind="lora")})
        self.views = [self.view("n0", self.inventory), self.view("n1", {"b": ModelView("b")})]

    @staticmethod
    def view(node_id: str, models: Mapping[str, ModelView]) -> NodeView:
        return NodeView(node_id, NodeStatus.ONLINE, job_types=frozenset({"image_gen"}), models=models)

    def nodes(self) -> list[NodeView]:
        return self.views


@pytest.fixture
def few() -> Few:
    return Few()


@pytest.fixture
def catalog(few: Few) -> ModelCatalog:
    return ModelCatalog(cast(Nodes, few))


def missing(catalog: ModelCatalog, name: str) -> bool:
    try:
        catalog.resolve(name, "image_gen")
    except FleetError as error:
        return error.reason == "MODEL_NOT_FOUND"
    return False


def test_inventories_are_gone_through_once_while_work_comes_and_goes(few: Few, catalog: ModelCatalog) -> None:
    for free in range(5):
        few.views[0] = replace(few.views[0], slots_free=free)
        assert not missing(catalog, "a") and not missing(catalog, "b")
        catalog.check_loras(["l"], "image_gen")
    assert few.inventory.looks == 2


def test_a_change_is_seen_at_once(few: Few, catalog: ModelCatalog) -> None:
    assert missing(catalog, "new")
    few.views[1] = few.view("n1", {"new": ModelView("new")})
    assert not missing(catalog, "new") and missing(catalog, "b")
    few.views.append(few.view("n2", {"more": ModelView("more")}))
    assert not missing(catalog, "more")
    del few.views[1]
    assert missing(catalog, "new")
    few.views[0] = replace(few.views[0], job_types=frozenset({"custom"}))
    assert missing(catalog, "a") and not missing(catalog, "more")


def test_without_a_node_for_the_type_any_name_waits(few: Few, catalog: ModelCatalog) -> None:
    assert catalog.resolve("x", "video_gen").resolved == "x"
    catalog.check_loras(["x"], "video_gen")
    few.views[0] = replace(few.views[0], job_types=frozenset({"video_gen"}))
    with pytest.raises(FleetError):
        catalog.resolve("x", "video_gen")
    with pytest.raises(FleetError):
        catalog.check_loras(["x"], "video_gen")
