"""Rules become bindings, and rules that do not fit their method are refused at start."""

from __future__ import annotations

from typing import Any

import pytest
from google.api import http_pb2

from fleet_server.bridge import HttpRuleError, rules_of
from tests.bridge.dynamic import LIST_REQUEST, RAW_REQUEST, custom, get, post, service_of
from tests.bridge.library import SERVICE


def bindings(name: str) -> list[Any]:
    return rules_of(SERVICE.methods_by_name[name])


def test_a_rule_and_its_additional_ones_are_bindings_in_order() -> None:
    first, second = bindings("GetBook")
    assert (first.http_method, str(first.template)) == ("GET", "/v1/books/{book_id}")
    assert (second.http_method, str(second.template)) == ("GET", "/v1/shelves/{shelf.name}/books/{book_id}")
    assert first.rpc_path == "/transcode.test.v1.Library/GetBook"
    assert not first.websocket


def test_body_and_response_body_are_fields() -> None:
    (update,) = bindings("UpdateBook")
    assert (update.http_method, update.body, update.body_field.name) == ("PATCH", "book", "book")
    (first,) = bindings("FirstBook")
    assert first.response_field.name == "first"
    assert bindings("CreateBook")[0].body_field is None


@pytest.mark.parametrize(
    ("rule", "method"),
    [
        (http_pb2.HttpRule(put="/a"), "PUT"),
        (http_pb2.HttpRule(delete="/a"), "DELETE"),
        (http_pb2.HttpRule(patch="/a"), "PATCH"),
        (custom("options", "/a"), "OPTIONS"),
    ],
)
def test_every_pattern_is_a_method(rule: http_pb2.HttpRule, method: str) -> None:
    assert rules_of(service_of(rule).methods[0])[0].http_method == method


def test_a_method_without_rule_has_no_binding() -> None:
    assert bindings("Unbound") == []


def test_the_custom_kind_and_bidirectional_methods_are_websockets() -> None:
    http, socket = bindings("Watch")
    assert (http.http_method, socket.http_method, socket.websocket) == ("GET", "WEBSOCKET", True)
    both = rules_of(service_of(get("/a"), client=True, server=True).methods[0])[0]
    assert (both.http_method, both.websocket) == ("WEBSOCKET", True)


@pytest.mark.parametrize(
    ("rule", "shape", "problem"),
    [
        (http_pb2.HttpRule(), {}, "no pattern"),
        (custom("SEND", "/a"), {}, "unknown custom kind 'SEND'"),
        (custom("WEBSOCKET", "/a"), {}, "only a method with a stream of replies"),
        (get("/a", additional_bindings=[get("/b", additional_bindings=[get("/c")])]), {}, "any of their own"),
        (get("/a", body="*"), {}, "a GET has no body"),
        (post("/a", body="nothing"), {}, "body 'nothing' is no field of"),
        (post("/{shelf.name}", body="shelf"), {}, "both the path and the body"),
        (get("/a", response_body="nothing"), {}, "response_body 'nothing' is no field of"),
        (get("/{nothing}"), {}, "names 'nothing', which is no field of"),
        (get("/{shelf.nothing}"), {}, "names 'nothing', which is no field of transcode.test.v1.Shelf"),
        (get("/{title.nothing}"), {}, "a field that is no message"),
        (get("/{shelf}"), {}, "must not be a message"),
        (get("/{tags}"), {"request": LIST_REQUEST}, "must not be repeated"),
        (get("/{labels}"), {"request": LIST_REQUEST}, "must not be repeated or a map"),
        (post("/a", body="*"), {"client": True}, "a client stream has no HTTP form"),
        (post("/a"), {"client": True, "request": RAW_REQUEST}, "a client stream has no HTTP form"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused_by_name(
    rule: http_pb2.HttpRule, shape: dict[str, Any], problem: str
) -> None:
    service = service_of(rule, **shape)
    with pytest.raises(HttpRuleError) as caught:
        rules_of(service.methods[0])
    assert problem in str(caught.value)
    assert service.methods[0].full_name in str(caught.value)
