"""The OpenAPI document: valid, complete and the same each time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema_rs import meta
from openapi_spec_validator import OpenAPIV31SpecValidator

from fleet_server.bridge.httprule import rules_of
from fleet_server.bridge.openapi import OpenApiOptions, openapi_document
from fleet_server.bridge.special import SpecialRoute
from fleet_server.domain.errors import REASON_CODES
from tests.bridge.harbour import message
from tests.bridge.openapi_documents import (
    CONTRACT,
    CONTRACT_DOCUMENT,
    DOCUMENT,
    FILES,
    HARBOUR,
    SCHEMAS,
    document_of,
    operation,
    page,
    parameter,
)


@pytest.mark.parametrize(
    "document", [DOCUMENT, CONTRACT_DOCUMENT, openapi_document([], OpenApiOptions("None", "1", {}))]
)
def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()
    for schema in document["components"]["schemas"].values():
        meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_the_same_input_gives_the_same_bytes() -> None:
    again = document_of(files=FILES, special=[SpecialRoute("GET", "/docs", page, "The docs page")])
    assert json.dumps(again) == json.dumps(DOCUMENT)


def test_every_binding_of_the_contract_is_there_once() -> None:
    ids = [op["operationId"] for item in CONTRACT_DOCUMENT["paths"].values() for op in item.values()]
    ids += [socket["operationId"] for socket in CONTRACT_DOCUMENT["x-websockets"]]
    bindings = [binding for one in CONTRACT for method in one.methods for binding in rules_of(method)]
    assert len(set(ids)) == len(ids) == len(bindings)


def test_paths_show_variables_wildcards_and_verbs() -> None:
    assert list(DOCUMENT["paths"]) == [
        "/v1/boats",
        "/v1/ships",
        "/v1/berths/{berth}/moor",
        "/v1/boats/{boat.name}",
        "/v1/boats/{name}",
        "/v1/files/{name}",
        "/v1/pairs/a/{name_1}/b/{name_2}:sink",
        "/v1/photo/{name}",
        "/v1/send",
        "/v1/tags",
        "/v1/log",
        "/docs",
    ]
    assert parameter(operation("/v1/files/{name}"), "name")["x-multi-segment"] is True
    sink = operation("/v1/pairs/a/{name_1}/b/{name_2}:sink", "delete")
    assert [p["name"] for p in sink["parameters"]] == ["name_1", "name_2"]


def test_operations_are_named_tagged_and_described_by_their_comments() -> None:
    boats = operation("/v1/boats")
    assert (boats["operationId"], boats["tags"]) == ("Harbour_ListBoats", ["Harbour"])
    assert (boats["summary"], boats["description"]) == ("Lists boats", "Lists boats. In order of arrival.")
    assert operation("/v1/ships")["operationId"] == "Harbour_ListBoats_2"
    moor = operation("/v1/berths/{berth}/moor", "post")
    assert moor["summary"] == "Moors a boat" and "buf:lint" not in json.dumps(DOCUMENT)
    assert operation("/v1/boats/{name}", "patch")["deprecated"] is True
    assert DOCUMENT["tags"] == [{"name": "Harbour", "description": "Boats and their crews."}]
    assert SCHEMAS["Drive"] == {"type": "string", "enum": ["sail", "motor"], "description": "How a boat is driven."}
    assert SCHEMAS["Boat"]["properties"]["name"]["description"] == "Its name."
    assert SCHEMAS["MoorRequestBody"]["description"] == "What to moor. a long boat pays"


def test_without_source_info_there_are_no_descriptions_but_the_same_operations() -> None:
    bare = document_of()
    assert "summary" not in bare["paths"]["/v1/boats"]["get"]
    assert bare["paths"].keys() == DOCUMENT["paths"].keys() - {"/docs"}


def test_query_parameters_are_flattened_and_repeated_ones_are_lists() -> None:
    boats = operation("/v1/boats")
    names = [p["name"] for p in boats["parameters"]]
    assert names == [
        "drives",
        "limit",
        "filter.name",
        "filter.inner.sunk",
        "page_token",
        "since",
        "serial",
        "owner",
    ]
    drives = parameter(boats, "drives")
    assert (drives["style"], drives["explode"], drives["schema"]["maxItems"]) == ("form", True, 3)
    assert drives["schema"]["items"]["anyOf"][0] == {"type": "string", "enum": ["sail", "motor"]}
    limit = {"type": "integer", "format": "int32", "minimum": 1, "maximum": 1000, "default": 100}
    assert parameter(boats, "limit")["schema"] == limit
    assert parameter(boats, "serial")["schema"]["maximum"] == (1 << 64) - 1
    assert parameter(boats, "owner")["required"] is True
    assert "required" not in parameter(boats, "page_token")
    assert parameter(boats, "since")["schema"]["format"] == "date-time"


def test_path_parameters_have_the_fields_own_rules_and_hold_no_slash() -> None:
    assert parameter(operation("/v1/berths/{berth}/moor", "post"), "berth")["schema"]["pattern"] == "^[a-z]{1,3}$"
    photo = parameter(operation("/v1/photo/{name}"), "name")["schema"]
    assert photo == {"type": "string", "pattern": "^[^/\\\\\\u0000]+$", "minLength": 1}
    names = [p["name"] for p in operation("/v1/boats/{boat.name}")["parameters"]]
    assert names[0] == "boat.name" and names.count("boat.name") == 1 and "boat.length" in names
    patch = [(p["name"], p["in"]) for p in operation("/v1/boats/{name}", "patch")["parameters"]]
    assert patch == [("name", "path"), ("dry_run", "query")]


def body(path: str, method: str) -> Any:
    return operation(path, method)["requestBody"]


def test_bodies_are_the_request_less_the_path_or_one_field_or_raw_bytes() -> None:
    moor = body("/v1/berths/{berth}/moor", "post")
    ref = {"$ref": "#/components/schemas/MoorRequestBody"}
    assert moor == {"required": True, "content": {"application/json": {"schema": ref}}}
    assert "berth" not in SCHEMAS["MoorRequestBody"]["properties"]
    patch = body("/v1/boats/{name}", "patch")
    assert patch["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/BoatInput"}
    assert body("/v1/send", "put") == {"content": {"*/*": {"schema": {}}}}
    tags = body("/v1/tags", "post")["content"]["application/json"]["schema"]
    assert (tags["type"], tags["maxItems"]) == (["array", "null"], 4)
    assert "requestBody" not in operation("/v1/boats")


def test_replies_are_messages_fields_bytes_and_streams() -> None:
    def content(path: str, method: str = "get") -> Any:
        return operation(path, method)["responses"]["200"]["content"]

    boat = {"$ref": "#/components/schemas/Boat"}
    assert content("/v1/berths/{berth}/moor", "post") == {"application/json": {"schema": boat}}
    assert content("/v1/boats/{boat.name}") == {"application/json": {"schema": boat}}
    assert content("/v1/tags", "post")["application/json"]["schema"]["type"] == "array"
    assert content("/v1/files/{name}") == {"*/*": {"schema": {"type": "string", "format": "binary"}}}
    log = content("/v1/log")
    assert set(log) == {"application/x-ndjson", "text/event-stream"}
    assert log["text/event-stream"]["x-item-schema"] == {"$ref": "#/components/schemas/Entry"}
    photo = operation("/v1/photo/{name}")["responses"]
    assert {"200", "206", "304"} <= photo.keys() and "content" not in photo["304"]
    pictures = document_of(media_types={"documented.v1.Harbour.Photo": ["image/png"]})
    assert list(pictures["paths"]["/v1/photo/{name}"]["get"]["responses"]["200"]["content"]) == ["image/png"]


def test_errors_are_the_universal_ones_and_those_of_the_method_all_of_one_schema() -> None:
    boats = operation("/v1/boats")["responses"]
    universal = {"400", "401", "403", "404", "405", "408", "413", "415", "429", "431", "500", "503", "504"}
    assert boats.keys() == {"200"} | universal
    moor = operation("/v1/berths/{berth}/moor", "post")["responses"]
    assert moor.keys() == {"200", "501"} | universal
    assert "JOB_NOT_FOUND" in moor["404"]["description"] and "QUEUE_FULL" in moor["503"]["description"]
    assert boats["404"] == {"$ref": "#/components/responses/Error404"}
    for reply in (*DOCUMENT["components"]["responses"].values(), moor["404"], moor["501"]):
        assert reply["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
    assert (
        "Retry-After" in moor["503"]["headers"]
        and "Allow" in DOCUMENT["components"]["responses"]["Error405"]["headers"]
    )


def test_a_reason_without_a_code_stops_the_start_naming_the_method() -> None:
    codes = {reason: code for reason, code in REASON_CODES.items() if reason != "QUEUE_FULL"}
    with pytest.raises(ValueError, match=r"documented\.v1\.Harbour\.Moor: the reason QUEUE_FULL"):
        openapi_document([HARBOUR], OpenApiOptions("Harbour", "1", codes))


def test_websockets_and_special_routes_are_listed() -> None:
    watch, radio = DOCUMENT["x-websockets"]
    assert (watch["path"], watch["operationId"]) == ("/v1/log/ws", "Harbour_Log_2")
    assert [p["name"] for p in watch["parameters"]] == ["since"] and "send" not in watch
    assert radio["send"] == {"$ref": "#/components/schemas/EntryInput"}
    assert operation("/docs")["summary"] == "The docs page"
    assert not any("Inside" in json.dumps(item) for item in DOCUMENT["paths"].values())


def test_a_free_object_may_name_the_messages_that_it_holds() -> None:
    boat = message(FILES, "Boat").DESCRIPTOR
    named = document_of(variants={"documented.v1.MoorRequest.extra": [boat]})
    extra = named["components"]["schemas"]["MoorRequestBody"]["properties"]["extra"]
    assert extra["anyOf"][0] == {"$ref": "#/components/schemas/BoatInput"}


def test_every_field_of_a_reply_is_required_but_the_members_of_a_oneof() -> None:
    boat = SCHEMAS["Boat"]
    assert set(boat["properties"]) - set(boat["required"]) == {"diesel", "horses"}
    properties = boat["properties"]
    assert properties["length"]["type"] == ["integer", "null"]
    assert properties["second_drive"] == {"anyOf": [{"$ref": "#/components/schemas/Drive"}, {"type": "null"}]}
    assert properties["tender"] == {"anyOf": [{"$ref": "#/components/schemas/Boat"}, {"type": "null"}]}
    assert properties["built"] == {"type": ["string", "null"], "format": "date-time"}
    assert properties["weight"]["type"] == ["integer", "string"]
    assert properties["crew"] == {"type": "array", "items": {"type": "string"}}
    assert properties["sunk"] == {"type": "boolean"}
