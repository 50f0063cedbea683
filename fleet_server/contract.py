"""What the REST API is documented to answer: the server refuses to start where one of these is unbound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleet.v1 import fleet_pb2, node_pb2, queue_pb2, types_pb2, vision_pb2
from google.protobuf.descriptor import Descriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from fleet_server import __version__
from fleet_server.bridge.openapi import OpenApiOptions, openapi_document
from fleet_server.bridge.special import SpecialRoute
from fleet_server.domain.errors import REASON_CODES

SERVICES: tuple[ServiceDescriptor, ...] = (
    fleet_pb2.DESCRIPTOR.services_by_name["Fleet"],
    vision_pb2.DESCRIPTOR.services_by_name["Vision"],
    queue_pb2.DESCRIPTOR.services_by_name["Queue"],
    node_pb2.DESCRIPTOR.services_by_name["Node"],
)

PAYLOADS: tuple[Descriptor, ...] = (
    types_pb2.ImagePayload.DESCRIPTOR,
    types_pb2.VideoPayload.DESCRIPTOR,
    types_pb2.LlmPayload.DESCRIPTOR,
    types_pb2.TranscriptionPayload.DESCRIPTOR,
    types_pb2.ContainerPayload.DESCRIPTOR,
)
"""What a job's free `payload` holds, by job type; that of `custom` is any object."""

DOCUMENTED_PATHS = (
    "POST /api/fleet/generate",
    "GET /api/fleet/generate/status",
    "POST /api/fleet/connect",
    "GET /api/fleet/connect",
    "GET /api/fleet/status",
    "GET /api/fleet/capabilities",
    "GET /health",
    "GET /api/status",
    "POST /api/vision/generate",
    "GET /api/vision/jobs/{job_id}",
    "POST /api/queue/jobs",
    "GET /api/queue/jobs",
    "GET /api/queue/jobs/{job_id}",
    "DELETE /api/queue/jobs/{job_id}",
    "POST /api/queue/jobs/{job_id}/retry",
    "GET /api/queue/stats",
    "POST /api/queue/jobs/batch",
    "GET /api/nodes",
    "GET /api/nodes/{node_id}",
    "GET /api/nodes/heartbeats",
    "GET /api/vision/nodes",
    "POST /api/fleet/deploy",
    "DELETE /api/fleet/deploy/{node_id}/{container_name}",
    "POST /api/fleet/exec/{node_id}",
    "GET /api/fleet/logs/{node_id}/{container_name}",
    "GET /api/swarm/services",
    "GET /api/swarm/services/{service_id}",
    "POST /api/swarm/services/{service_id}/scale",
    "GET /api/vision/gallery",
    "GET /api/vision/outputs/{filename}",
    "DELETE /api/vision/outputs/{filename}",
    "GET /api/vision/models/available",
    "GET /api/vision/loras",
    "GET /api/vision/models/loaded",
    "WEBSOCKET /ws",
    "GET /api/outputs/stats",
    "GET /api/outputs/list",
    "POST /api/outputs/sync",
    "POST /api/outputs/cleanup",
    "POST /api/outputs/move-all-to-s3",
)

EMBEDDED_ALIASES = {"SDXL_4GB_FP8.safetensors": "sketch"}
"""In embedded mode the model names of the API reference are aliases of what is there; every list says so."""


def descriptions() -> FileDescriptorSet:
    """The protos with their comments, as the stubs' package brings them."""
    folder = Path(fleet_pb2.__file__).parent
    return FileDescriptorSet.FromString((folder / "descriptors.binpb").read_bytes())


def api_document(special: Sequence[SpecialRoute]) -> dict[str, Any]:
    """The OpenAPI document of this server, with these routes beside those of its methods."""
    options = OpenApiOptions(
        title="Fleet Commander",
        version=__version__,
        reason_codes=REASON_CODES,
        files=descriptions(),
        variants={"fleet.v1.CreateJobRequest.payload": PAYLOADS},
        media_types={"fleet.v1.Fleet.Generate": ["image/png"]},
        special=special,
    )
    return openapi_document(SERVICES, options)
