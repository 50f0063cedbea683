"""The two clients are one: what the blocking one can do, the other can, in the same words."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any, get_type_hints

import pytest
from fleet_client import AsyncFleetCommander, FleetCommander


def methods(client: type) -> dict[str, Any]:
    return {name: member for name, member in inspect.getmembers(client, inspect.isfunction) if name[0] != "_"}


def test_both_have_the_same_methods() -> None:
    assert set(methods(FleetCommander)) == set(methods(AsyncFleetCommander))
    assert {"connect", "generate_image", "queue_job", "get_job", "list_nodes", "get_gallery"} <= set(
        methods(FleetCommander)
    )


@pytest.mark.parametrize("name", ["__init__", *sorted(methods(FleetCommander))])
def test_a_method_is_called_alike(name: str) -> None:
    blocking, awaited = getattr(FleetCommander, name), getattr(AsyncFleetCommander, name)
    assert inspect.signature(blocking).parameters == inspect.signature(awaited).parameters
    returned, later = get_type_hints(blocking)["return"], get_type_hints(awaited)["return"]
    if inspect.isgeneratorfunction(blocking):
        assert inspect.isasyncgenfunction(awaited)
        assert returned.__args__[0] == later.__args__[0]
        assert issubclass(returned.__origin__, Iterator) and issubclass(later.__origin__, AsyncIterator)
    else:
        assert returned == later
        assert name == "__init__" or inspect.iscoroutinefunction(awaited)


@pytest.mark.parametrize("name", sorted(methods(FleetCommander)))
def test_a_method_promises_the_same(name: str) -> None:
    assert inspect.getdoc(getattr(FleetCommander, name)) == inspect.getdoc(getattr(AsyncFleetCommander, name))
    assert inspect.getdoc(getattr(FleetCommander, name))
