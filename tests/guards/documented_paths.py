"""Every method and path that the REST reference documents, as written there, in its order.

This list is kept by hand and never made from the protos: it is what they are checked against.
"""

from __future__ import annotations

DOCUMENTED: tuple[tuple[str, str], ...] = (
    # Quick start
    ("POST", "/api/fleet/generate"),
    ("GET", "/api/fleet/generate/status"),
    # Connection
    ("POST", "/api/fleet/connect"),
    ("GET", "/api/fleet/connect"),
    ("GET", "/api/fleet/status"),
    ("GET", "/api/fleet/capabilities"),
    ("GET", "/health"),
    ("GET", "/api/status"),
    # Vision scheduler
    ("POST", "/api/vision/generate"),
    ("GET", "/api/vision/jobs/{job_id}"),
    # Job queue
    ("POST", "/api/queue/jobs"),
    ("GET", "/api/queue/jobs"),
    ("GET", "/api/queue/jobs/{job_id}"),
    ("DELETE", "/api/queue/jobs/{job_id}"),
    ("POST", "/api/queue/jobs/{job_id}/retry"),
    ("GET", "/api/queue/stats"),
    ("POST", "/api/queue/jobs/batch"),
    # Nodes
    ("GET", "/api/nodes"),
    ("GET", "/api/nodes/{node_id}"),
    ("GET", "/api/vision/nodes"),
    ("GET", "/api/nodes/heartbeats"),
    # Containers
    ("POST", "/api/fleet/deploy"),
    ("DELETE", "/api/fleet/deploy/{node_id}/{container_name}"),
    ("POST", "/api/fleet/exec/{node_id}"),
    ("GET", "/api/fleet/logs/{node_id}/{container_name}"),
    # Swarm
    ("GET", "/api/swarm/services"),
    ("GET", "/api/swarm/services/{service_id}"),
    ("POST", "/api/swarm/services/{service_id}/scale"),
    # Gallery and outputs
    ("GET", "/api/vision/gallery"),
    ("GET", "/api/vision/outputs/{filename}"),
    ("DELETE", "/api/vision/outputs/{filename}"),
    # Models
    ("GET", "/api/vision/models/available"),
    ("GET", "/api/vision/loras"),
    ("GET", "/api/vision/models/loaded"),
    # Events
    ("WEBSOCKET", "/ws"),
    # Output management
    ("GET", "/api/outputs/stats"),
    ("GET", "/api/outputs/list"),
    ("POST", "/api/outputs/sync"),
    ("POST", "/api/outputs/cleanup"),
    ("POST", "/api/outputs/move-all-to-s3"),
)
# Parameters that the reference gives in the query of a POST: such a binding must not have a body.
QUERY_PARAMETERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("GET", "/api/fleet/logs/{node_id}/{container_name}"): ("tail",),
    ("POST", "/api/swarm/services/{service_id}/scale"): ("replicas",),
    ("GET", "/api/vision/gallery"): ("limit",),
    ("GET", "/api/outputs/list"): ("source", "limit"),
    ("POST", "/api/outputs/cleanup"): ("max_age_hours", "dry_run"),
}
