"""Envoy's configuration as a gRPC-JSON transcoder in front of one gRPC server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.peers.contract import IMAGE, SERVICE

_TYPES = "type.googleapis.com/envoy.extensions"


def write_config(folder: Path, listen_port: int, grpc_port: int) -> Path:
    """Writes the configuration and the descriptor set into `folder`; returns the file for `envoy -c`."""
    image = folder / "jobs.binpb"
    image.write_bytes(IMAGE.SerializeToString())
    path = folder / "envoy.json"
    path.write_text(json.dumps(_config(image, listen_port, grpc_port)))
    return path


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _config(image: Path, listen_port: int, grpc_port: int) -> dict[str, Any]:
    transcoder = {
        "@type": f"{_TYPES}.filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "proto_descriptor": str(image),
        "services": [SERVICE.full_name],
        "case_insensitive_enum_parsing": True,
        "print_options": {"preserve_proto_field_names": True, "always_print_primitive_fields": True},
    }
    router = {"@type": f"{_TYPES}.filters.http.router.v3.Router"}
    manager = {
        "@type": f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "codec_type": "AUTO",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "jobs",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "jobs", "timeout": "30s"}}],
                }
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.grpc_json_transcoder", "typed_config": transcoder},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    http2 = {
        "@type": f"{_TYPES}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": _address(grpc_port)}}]}]
    cluster = {
        "name": "jobs",
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2},
        "load_assignment": {"cluster_name": "jobs", "endpoints": endpoints},
    }
    listener = {"name": "http", "address": _address(listen_port), "filter_chains": [{"filters": filters}]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
