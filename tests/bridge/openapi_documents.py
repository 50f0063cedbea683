"""The documents that the tests of OpenAPI read."""

from __future__ import annotations

from typing import Any

from fleet.v1 import fleet_pb2, node_pb2, queue_pb2, vision_pb2
from jsonschema_rs import Draft202012Validator

from fleet_server.bridge.openapi import OpenApiOptions, openapi_document
from fleet_server.bridge.special import SpecialRoute
from fleet_server.domain.errors import REASON_CODES
from fleet_server.protojson import JsonCodec
from tests.bridge.harbour import compile_proto, service

FILES = compile_proto("documented")
HARBOUR = service(FILES, "Harbour")
CODEC = JsonCodec()


async def page(scope: Any, receive: Any, send: Any) -> None:
    """Never called here."""


def document_of(**more: Any) -> dict[str, Any]:
    return openapi_document([HARBOUR], OpenApiOptions("Harbour", "1", REASON_CODES, **more))


DOCUMENT = document_of(files=FILES, special=[SpecialRoute("GET", "/docs", page, "The docs page")])
SCHEMAS = DOCUMENT["components"]["schemas"]

CONTRACT = [
    module.DESCRIPTOR.services_by_name[name]
    for module, name in ((fleet_pb2, "Fleet"), (vision_pb2, "Vision"), (queue_pb2, "Queue"), (node_pb2, "Node"))
]
CONTRACT_DOCUMENT = openapi_document(CONTRACT, OpenApiOptions("Fleet", "1", REASON_CODES))


def operation(path: str, method: str = "get") -> Any:
    return DOCUMENT["paths"][path][method]


def parameter(of: Any, name: str) -> Any:
    return next(parameter for parameter in of["parameters"] if parameter["name"] == name)


def validator(document: dict[str, Any], name: str) -> Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return Draft202012Validator(schema, validate_formats=True)
