"""The committed descriptors bind every documented path, and the baseline is an image of an earlier contract."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2

from tests.guards.documented_paths import DOCUMENTED, QUERY_PARAMETERS
from tests.guards.tree import ROOT

DESCRIPTORS = ROOT / "clients/python/fleet/v1/descriptors.binpb"
_VERBS = ("get", "post", "put", "patch", "delete")


@dataclass(frozen=True)
class Binding:
    """One way to reach an RPC over HTTP."""

    rpc: str
    request: str
    body: str


def _files() -> list[descriptor_pb2.FileDescriptorProto]:
    return list(descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file)


def _method_and_path(rule: http_pb2.HttpRule) -> tuple[str, str]:
    kind = rule.WhichOneof("pattern")
    if kind == "custom":
        return rule.custom.kind, rule.custom.path
    assert kind in _VERBS, rule
    return kind.upper(), getattr(rule, kind)


def _bindings() -> dict[tuple[str, str], Binding]:
    found: dict[tuple[str, str], Binding] = {}
    for file in _files():
        for service in file.service:
            for method in service.method:
                rule = method.options.Extensions[annotations_pb2.http]
                for each in (rule, *rule.additional_bindings):
                    if each.WhichOneof("pattern"):
                        name = f"{file.package}.{service.name}/{method.name}"
                        key = _method_and_path(each)
                        assert key not in found, f"{key} is bound to {found[key].rpc} and to {name}"
                        found[key] = Binding(name, method.input_type.lstrip("."), each.body)
    return found


def _fields(message: str) -> set[str]:
    for file in _files():
        for candidate in file.message_type:
            if f"{file.package}.{candidate.name}" == message:
                return {field.name for field in candidate.field}
    raise AssertionError(f"no message {message} in {DESCRIPTORS}")


def _shape(key: tuple[str, str]) -> tuple[str, str]:
    """Method and path without what a template may say of a variable: {name=pattern} is {name}."""
    return key[0], re.sub(r"\{(\w+)=[^}]*\}", r"{\1}", key[1])


@pytest.mark.parametrize("documented", DOCUMENTED, ids=" ".join)
def test_documented_path_is_bound(documented: tuple[str, str]) -> None:
    assert documented in {_shape(key) for key in _bindings()}


@pytest.mark.parametrize("documented", QUERY_PARAMETERS, ids=" ".join)
def test_documented_query_parameters_are_fields_outside_the_body(documented: tuple[str, str]) -> None:
    binding = {_shape(key): binding for key, binding in _bindings().items()}[documented]

    assert set(QUERY_PARAMETERS[documented]) <= _fields(binding.request)
    assert binding.body == ""


def test_descriptors_carry_our_comments_and_their_imports() -> None:
    files = {file.name: file for file in _files()}

    missing = {name for file in files.values() for name in file.dependency} - set(files)
    silent = [
        name
        for name, file in files.items()
        if name.startswith("fleet/")
        and not any(location.leading_comments for location in file.source_code_info.location)
    ]
    assert missing == set()
    assert silent == []


def test_baseline_holds_the_four_services() -> None:
    baseline = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "proto/baseline.binpb").read_bytes())

    services = {f"{file.package}.{service.name}" for file in baseline.file for service in file.service}

    assert {"fleet.v1.Fleet", "fleet.v1.Vision", "fleet.v1.Queue", "fleet.v1.Node"} <= services
