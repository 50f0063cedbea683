"""Which binding answers which path."""

from __future__ import annotations

import re
from typing import Any

import pytest
from google.api import http_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_server.bridge import Binding, RouteError, Router, routes, rules_of
from fleet_server.bridge.errors import MethodNotAllowedError
from fleet_server.domain.errors import FleetError
from tests.bridge.dynamic import custom, get, post, service_of
from tests.bridge.library import SERVICE


def bindings_of(*rules: http_pb2.HttpRule, **shape: Any) -> list[Binding]:
    return [binding for method in service_of(*rules, **shape).methods for binding in rules_of(method)]


def router_of(*rules: http_pb2.HttpRule, required: tuple[str, ...] = (), **shape: Any) -> Router[str]:
    return Router(bindings_of(*rules, **shape), lambda binding: str(binding.template), required=required)


def found(router: Router[str], path: str, method: str = "GET") -> tuple[str, dict[str, str]]:
    target, variables = router.match(method, path.encode())
    return target, dict(variables)


def refusal(router: Router[str], path: str | bytes, method: str = "GET") -> FleetError:
    with pytest.raises(FleetError) as caught:
        router.match(method, path if isinstance(path, bytes) else path.encode())
    return caught.value


def test_literals_beat_variables_and_one_star_beats_two() -> None:
    router = router_of(get("/{title=**}"), get("/a/{title=**}"), get("/a/{title}"), get("/a/b"), get("/a/b/{title}"))
    assert found(router, "/a/b") == ("/a/b", {})
    assert found(router, "/a/c") == ("/a/{title}", {"title": "c"})
    assert found(router, "/a/b/c") == ("/a/b/{title}", {"title": "c"})
    assert found(router, "/a/c/d") == ("/a/{title=**}", {"title": "c/d"})
    assert found(router, "/x/y") == ("/{title=**}", {"title": "x/y"})


def test_the_search_goes_back_where_a_literal_leads_nowhere() -> None:
    router = router_of(get("/a/b/c"), get("/{title}/b/{book_id}"))
    assert found(router, "/a/b/d") == ("/{title}/b/{book_id}", {"title": "a", "book_id": "d"})


def test_two_stars_match_nothing_too() -> None:
    router = router_of(get("/a/{title=**}"))
    assert found(router, "/a") == ("/a/{title=**}", {"title": ""})


def test_a_variable_of_many_segments_takes_just_those() -> None:
    router = router_of(get("/v1/{title=a/*/b/*}/{book_id}"))
    assert found(router, "/v1/a/1/b/2/3")[1] == {"title": "a/1/b/2", "book_id": "3"}
    assert refusal(router, "/v1/a/1/c/2/3").reason == "ROUTE_NOT_FOUND"


def test_a_verb_belongs_to_the_last_segment() -> None:
    router = router_of(get("/a/{title}:undo"), get("/a/{title}"), get("/f/{title=**}:undo"))
    assert found(router, "/a/x:undo") == ("/a/{title}:undo", {"title": "x"})
    assert found(router, "/a/x:redo") == ("/a/{title}", {"title": "x:redo"})
    assert found(router, "/a/x%3Aundo") == ("/a/{title}", {"title": "x:undo"})
    assert found(router, "/a/:undo") == ("/a/{title}", {"title": ":undo"})
    assert found(router, "/f/x/y:undo") == ("/f/{title=**}:undo", {"title": "x/y"})
    assert refusal(router, "/f/x/y").reason == "ROUTE_NOT_FOUND"


@pytest.mark.parametrize("path", ["/a/b/", "//a/b", "/a//b", "/", "", "a/b", "/a/b/c", "/A/b", "/a%2Fb", "/a/%"])
def test_other_paths_are_not_found(path: str) -> None:
    assert refusal(router_of(get("/a/b")), path).reason == "ROUTE_NOT_FOUND"


def test_a_trailing_slash_meets_no_variable() -> None:
    for rule in (get("/a/{title}"), get("/a/{title=**}")):
        assert refusal(router_of(rule), "/a/").reason == "ROUTE_NOT_FOUND"


def test_escaped_literals_match_and_segments_are_decoded_once() -> None:
    router = router_of(get("/a/b"), get("/v/{title}"), get("/caf%C3%A9"))
    assert found(router, "/%61/b")[0] == "/a/b"
    assert found(router, "/caf%c3%a9")[0] == "/café"
    assert found(router, "/v/a%20%C3%A9%2541+b")[1] == {"title": "a é%41+b"}


@pytest.mark.parametrize("segment", ["a%2Fb", "a%2fb", "a%5Cb", "a\\b", "%00", "%zz", "%", "%FF", "%C3"])
def test_a_single_segment_holds_no_slash_backslash_nul_or_malformed_escape(segment: str) -> None:
    error = refusal(router_of(get("/v/{title}")), f"/v/{segment}")
    assert error.reason == "INVALID_PATH"
    assert error.detail.startswith("title:")


def test_many_segments_keep_an_encoded_slash_as_it_is() -> None:
    router = router_of(get("/v/{title=**}"))
    assert found(router, "/v/a%2Fb/c%2fd%20e%5C")[1] == {"title": "a%2Fb/c%2fd e\\"}
    for path in ("/v/a/%00", "/v/a/%FF", "/v/%z"):
        assert refusal(router, path).reason == "INVALID_PATH"


def test_a_wrong_method_names_the_right_ones() -> None:
    router = router_of(get("/a"), post("/a"), post("/b/{title}"), get("/b/c"))
    error = refusal(router, "/a", "DELETE")
    assert isinstance(error, MethodNotAllowedError)
    assert error.allow == "GET, HEAD, POST"
    wrong = refusal(router, "/b/x", "GET")
    assert isinstance(wrong, MethodNotAllowedError)
    assert wrong.allow == "POST"
    narrower = refusal(router, "/b/c", "POST")  # the path decides before the method does
    assert isinstance(narrower, MethodNotAllowedError)
    assert narrower.allow == "GET, HEAD"


def test_head_is_get() -> None:
    router = router_of(get("/a"), post("/b"))
    assert found(router, "/a", "HEAD") == ("/a", {})
    assert refusal(router, "/b", "HEAD").reason == "METHOD_NOT_ALLOWED"


def test_sockets_and_plain_calls_are_told_apart() -> None:
    router = Router(
        [*bindings_of(custom("WEBSOCKET", "/ws"), server=True), *bindings_of(get("/a"))],
        lambda binding: str(binding.template),
    )
    assert found(router, "/ws", "WEBSOCKET") == ("/ws", {})
    plain = refusal(router, "/ws", "GET")
    assert plain.reason == "INVALID_PATH"
    assert "ws://" in plain.detail
    assert refusal(router, "/a", "WEBSOCKET").reason == "ROUTE_NOT_FOUND"
    wrong = refusal(router, "/ws", "POST")
    assert isinstance(wrong, MethodNotAllowedError)
    assert wrong.allow == "GET, HEAD"


def test_two_bindings_of_one_shape_are_refused_by_name() -> None:
    with pytest.raises(RouteError, match=r"/a/\{title\} .*Method0.* and .*/a/\{book_id\} .*Method1"):
        router_of(get("/a/{title}"), get("/a/{book_id}"))
    with pytest.raises(RouteError, match="answer the same paths"):
        router_of(get("/a/*/b"), get("/{title=a/*/b}"))
    router_of(get("/a/{title}"), post("/a/{book_id}"))
    router_of(get("/a/{title}"), get("/a/{book_id}:undo"))


def test_bindings_that_cross_are_refused_and_narrower_ones_are_not() -> None:
    with pytest.raises(RouteError, match="neither is the narrower"):
        router_of(get("/{title}/b"), get("/a/{title}"))
    with pytest.raises(RouteError, match="neither is the narrower"):
        router_of(get("/{title}/b"), get("/a/{title=**}"))
    router_of(get("/{title}/{book_id}"), get("/a/{title}"), get("/a/b"), get("/a/b/*/{title=**}"), get("/{title}"))


def test_a_required_path_must_be_answered_by_a_binding_of_its_shape() -> None:
    router_of(get("/a/{title}"), required=("GET /a/{other}",))
    with pytest.raises(RouteError, match=r"GET /b/\{x\}: no binding"):
        router_of(get("/a/{title}"), required=("GET /b/{x}",))
    with pytest.raises(RouteError, match=r"POST /a/\{x\}: no binding"):
        router_of(get("/a/{title}"), required=("POST /a/{x}",))
    with pytest.raises(RouteError, match=r"GET /a/b: it is answered by another binding, GET /a/\{title\}"):
        router_of(get("/a/{title}"), required=("GET /a/b",))
    Router([], str, required=["GET /docs", "GET /"], specials=["GET /docs", "GET /"])


def test_the_service_of_these_tests_has_no_two_bindings_in_each_other_s_way() -> None:
    bindings = [binding for method in SERVICE.methods for binding in rules_of(method)]
    assert Router(bindings, str).bindings == tuple(bindings)


@given(st.one_of(st.binary(max_size=30), st.text(alphabet="/ab%2F0:*undo", max_size=24).map(str.encode)))
@settings(max_examples=500, derandomize=True, deadline=None)
def test_any_path_is_matched_or_refused(path: bytes) -> None:
    for method in ("GET", "POST"):
        try:
            _, variables = _FUZZED.match(method, path)
        except FleetError as error:
            assert error.reason in {"ROUTE_NOT_FOUND", "METHOD_NOT_ALLOWED", "INVALID_PATH"}
        else:
            assert all("\0" not in text for _, text in variables)


@given(st.text(alphabet="/ab0:*undo", max_size=24).map(lambda text: f"/{text}".encode()))
@settings(max_examples=1000, derandomize=True, deadline=None)
def test_the_short_way_of_plain_paths_is_the_long_way(path: bytes) -> None:
    def outcome() -> object:
        try:
            target, variables = _FUZZED.match("GET", path)
        except FleetError as error:
            return error.reason, error.detail
        return target, list(variables)

    short = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "_PLAIN", re.compile(rb"(?!)"))
        assert outcome() == short


_FUZZED = router_of(
    get("/a"), get("/a/{title}:undo"), get("/a/{title}"), get("/b/{title=**}"), post("/a/b/{title=*/*}")
)
