"""schemathesis over /openapi.json of a running fleet: no 500, no answer that the document does not have.

Deterministic: the coverage phase (each limit of each field, and just beyond) and a few fuzzed cases a call. Pictures
are kept small; streams are ended by a deadline. What the document says is what the converters and the validator do, so
valid data must be taken and invalid data refused, but for what JSON Schema cannot say.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema

from tests.e2e.fleet_process import FleetProcess

Document = dict[str, Any]
SUBMITS = ("POST /api/queue/jobs", "POST /api/queue/jobs/batch", "POST /api/queue/dry-run")
SECOND = re.compile(r"_\d$")
"""In an operationId: a second address of an rpc."""
PAYLOADS = {
    "image_gen": "ImagePayloadInput",
    "transcription": "TranscriptionPayloadInput",
    "training": "ContainerPayloadInput",
    "custom": "JsonObject",
}
PARTS = ["Fleet generate", "Fleet deploy", "Fleet", "Vision generate", "Vision", "Queue", "Node", "Pages"]
STREAM_SECONDS = 0.05

LOOSER = {
    # An opaque token of the server's own.
    "page_token",
    # One field's meaning hangs on another's.
    "strength", "mask_image", "init_image", "job_ids", "clusters", "min_replicas", "host_port", "port",
    # Addresses and references, judged by a parser.
    "callback_url", "audio", "mounts", "inputs", "command", "image", "address", "host_key",
    # Moments in relation to now.
    "schedule_time",
    # Integers in a Struct go to 2^53 as numbers; beyond they are strings.
    "seed", "memory_bytes",
    # Limits on what is made of all fields together.
    "payload", "env",
    # Names of a map's entries.
    "labels",
}  # fmt: skip
"""Fields whose documented schema takes more than the server does, and why it must."""

CONFIG = {
    "seed": 1,
    "request-timeout": 60,
    "continue-on-failure": True,
    "suppress-health-check": ["all"],
    "generation": {"max-examples": 3, "deterministic": True, "database": "none", "no-shrink": True},
    "phases": {"stateful": {"enabled": False}, "examples": {"enabled": False}},
    "checks": {
        "enabled": False,
        "not_a_server_error": {"enabled": True, "expected-statuses": ["2xx", "3xx", "4xx", "503"]},
        **{
            name: {"enabled": True}
            for name in (
                "status_code_conformance",
                "content_type_conformance",
                "response_schema_conformance",
                "response_headers_conformance",
                "allow_header_conformance",
                "unsupported_method",
                "negative_data_rejection",
                "positive_data_acceptance",
            )
        },
    },
}


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetProcess]:
    """A fleet of its own: what is tried here leaves thousands of jobs."""
    with FleetProcess(tmp_path_factory.mktemp("schema") / "data") as process:
        yield process


@pytest.fixture(scope="module")
def document(tried: FleetProcess) -> Document:
    reply: Document = httpx.get(f"{tried.url}/openapi.json", trust_env=False, timeout=60).json()
    return reply


@pytest.fixture(scope="module", autouse=True)
def _tamed() -> Iterator[None]:
    """Each case is made small, and each stream ends, before it is sent."""

    def before_call(_: Any, case: schemathesis.Case[Any], __: Any) -> None:
        case.body = small(case.body)
        if case.path.endswith("/events"):
            case.headers["Grpc-Timeout"] = f"{int(STREAM_SECONDS * 1000)}m"

    schemathesis.hook(before_call)
    yield
    schemathesis.hooks.unregister(before_call)


@dataclass
class Findings:
    """What a run found: calls tried, how often, and what was wrong."""

    cases: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def small(value: Any) -> Any:
    """The value with pictures that are quick to make; what is out of bounds stays so."""
    if isinstance(value, list):
        return [small(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {name: small(item) for name, item in value.items()}
    for name, most, size in (("width", 2048, 64), ("height", 2048, 64), ("steps", 150, 1)):
        if type(kept.get(name)) is int and size <= kept[name] <= most and (size == 1 or kept[name] % 8 == 0):
            kept[name] = size
    return kept


def try_out(url: str, document: Document, calls: set[str]) -> Findings:
    """Runs schemathesis over these calls of the document."""
    config = SchemathesisConfig.from_dict({**CONFIG, "base-url": url})
    # Of the paths of these calls all methods stay in the document: it says which others a path takes.
    paths = {path: item for path, item in document["paths"].items() if any(call.endswith(f" {path}") for call in calls)}
    whole = schemathesis.openapi.from_dict({**document, "paths": paths}, config=config)
    schema = whole.include(lambda context: context.operation.label in calls)

    found = Findings()
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            recorder = event.recorder
            found.cases[recorder.label] = found.cases.get(recorder.label, 0) + len(recorder.cases)
            for case_id, checks in recorder.checks.items():
                response = recorder.interactions[case_id].response
                for check in checks:
                    if check.status is Status.FAILURE and not explained(check.name, recorder.label, response):
                        found.problems.append(told(check, recorder.cases[case_id].value, response))
        elif isinstance(event, events.NonFatalError | events.FatalError):
            found.problems.append(f"{getattr(event, 'label', '')}: {getattr(event, 'value', None) or event}")
    return found


def explained(check: str, label: str, response: Any) -> bool:
    """Whether a finding is none."""
    body = {} if response is None else as_json(response.content)
    if check == "positive_data_acceptance":
        fields = [set(re.findall(r"[a-z_]+", one["field"])) for one in body.get("violations", ())]
        return bool(fields) and all(words & LOOSER for words in fields)
    if check == "not_a_server_error":
        # The deadline that ends a stream may come before its first event.
        return label.endswith("/events") and body.get("reason") == "TIMEOUT"
    # No body counts as `{}` where that would do, as the document says; the tool takes it for bad data. An input may be
    # of any bytes.
    return check == "negative_data_rejection" and (response.request.body is None or label == "POST /api/inputs")


def as_json(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def told(check: Any, case: schemathesis.Case[Any], response: Any) -> str:
    failure = check.failure_info.failure
    answer = "" if response is None else f"{response.status_code} {response.content[:400]!r}"
    return f"{check.name}: {failure.title}: {failure.message[:300]}\n  {case.as_curl_command()[:800]}\n  {answer}"


def calls_of(document: Document, part: str) -> set[str]:
    """The calls of one service, less those that have parts of their own, submits, and second addresses of an rpc."""
    tag, _, word = part.partition(" ")
    others = [one.split()[1] for one in PARTS if one.startswith(f"{tag} ") and one != part]
    found = set()
    for path, methods in document["paths"].items():
        last = path.rsplit("/", 1)[-1]
        for method, call in methods.items():
            label = f"{method.upper()} {path}"
            mine = call["tags"] == [tag] and (last == word if word else last not in others)
            if mine and label not in SUBMITS and not SECOND.search(call["operationId"]):
                found.add(label)
    return found


def narrowed(document: Document, kind: str, *, batch: bool) -> Document:
    """The document for jobs of one type: JSON Schema ties no payload to its type, and the jobs of a batch have no
    request_id."""
    narrow = copy.deepcopy(document)
    fields = narrow["components"]["schemas"]["CreateJobRequest"]["properties"]
    fields["job_type"] = {"enum": [kind]}
    fields["payload"] = {"$ref": f"#/components/schemas/{PAYLOADS[kind]}"}
    # A graph takes the place of a payload.
    del fields["workflow_json"]
    if batch:
        del fields["request_id"]
    return narrow


def verify(tried: FleetProcess, document: Document, calls: set[str]) -> None:
    found = try_out(tried.url, document, calls)
    assert not found.problems, "\n\n".join(found.problems[:10])
    assert set(found.cases) == calls
    assert sum(found.cases.values()) >= 3 * len(calls)


@pytest.mark.parametrize("part", PARTS)
def test_answers_are_those_of_the_document(tried: FleetProcess, document: Document, part: str) -> None:
    verify(tried, document, calls_of(document, part))


@pytest.mark.parametrize("kind", PAYLOADS)
def test_submits_are_those_of_the_document(tried: FleetProcess, document: Document, kind: str) -> None:
    verify(tried, narrowed(document, kind, batch=False), {SUBMITS[0]})


def test_batches_are_those_of_the_document(tried: FleetProcess, document: Document) -> None:
    verify(tried, narrowed(document, "custom", batch=True), set(SUBMITS[1:]))


def test_every_call_is_tried(document: Document) -> None:
    tried = {label for part in PARTS for label in calls_of(document, part)} | set(SUBMITS)
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            assert f"{method.upper()} {path}" in tried or SECOND.search(call["operationId"])


def test_an_undocumented_answer_would_be_found(tried: FleetProcess, document: Document) -> None:
    lacking = copy.deepcopy(document)
    del lacking["paths"]["/api/nodes/{node_id}"]["get"]["responses"]["404"]
    found = try_out(tried.url, lacking, {"GET /api/nodes/{node_id}"})
    assert any("status_code_conformance" in problem for problem in found.problems)


def test_the_server_took_it_well(tried: FleetProcess) -> None:
    assert httpx.get(f"{tried.url}/health", trust_env=False, timeout=60).json()["status"] == "ok"
    log = tried.log.read_text()
    assert "Traceback" not in log
    assert not [line for line in log.splitlines() if '"level": "error"' in line]
