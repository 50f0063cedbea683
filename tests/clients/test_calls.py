"""What the clients send."""

from __future__ import annotations

import io

import pytest
from fleet.v1 import queue_pb2
from fleet_client import SettingError
from fleet_client.calls import (
    JOB_FIELDS,
    base_url,
    batch_body,
    exact,
    headers,
    image_fields,
    job_body,
    segment,
    to_image,
)
from PIL import Image


@pytest.mark.parametrize(
    ("given", "address"),
    [
        (None, "http://localhost:8765"),
        ("http://gpu.lan:8765/", "http://gpu.lan:8765"),
        ("gpu.lan:8765", "http://gpu.lan:8765"),
        ("https://fleet.example/prefix", "https://fleet.example/prefix"),
        ("[::1]:8765", "http://[::1]:8765"),
    ],
)
def test_addresses(given: str | None, address: str) -> None:
    assert base_url(given) == address


@pytest.mark.parametrize("given", ["ftp://gpu.lan", "http://", "http://a b", "http://gpu.lan:port"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(SettingError, match="url: "):
        base_url(given)


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_URL", "http://gpu.lan:1")
    monkeypatch.setenv("FLEET_API_KEY", "of-the-environment\n")
    assert base_url(None) == "http://gpu.lan:1"
    assert base_url("http://given:2") == "http://given:2"
    assert headers(None) == {"X-API-Key": "of-the-environment"}
    assert headers("given") == {"X-API-Key": "given"}


def test_without_a_key_no_header() -> None:
    assert headers(None) == {}


@pytest.mark.parametrize("key", ["two words", "schlüssel", "a\nb"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(SettingError, match="api_key: ") as raised:
        headers(key)
    assert key not in str(raised.value)


def test_what_is_none_is_left_out() -> None:
    assert image_fields("a sunset", {"seed": None, "steps": 4, "negative_prompt": ""}) == {
        "prompt": "a sunset",
        "steps": 4,
        "negative_prompt": "",
    }
    assert exact({"job_type": "custom", "payload": {"a": None}, "callback_url": None}) == {
        "job_type": "custom",
        "payload": {"a": None},
    }


def test_seeds_that_json_cannot_hold_are_strings() -> None:
    assert image_fields("p", {"seed": 1 << 53})["seed"] == 1 << 53
    assert image_fields("p", {"seed": (1 << 53) + 1})["seed"] == "9007199254740993"
    assert exact({"payload": {"seed": (1 << 64) - 1}})["payload"]["seed"] == "18446744073709551615"
    assert batch_body([{"payload": {"seed": 1 << 60}}], None)["jobs"][0]["payload"]["seed"] == str(1 << 60)


def test_fields_of_the_job_stand_beside_the_payload() -> None:
    assert job_body("p", "low", None, {"steps": 4, "max_retries": 0, "request_id": "r"}) == {
        "job_type": "image_gen",
        "priority": "low",
        "payload": {"prompt": "p", "steps": 4},
        "max_retries": 0,
        "request_id": "r",
    }


def test_the_fields_of_the_job_are_those_of_the_contract() -> None:
    told_otherwise = {"job_type", "payload", "priority", "callback_url"}
    told_otherwise.add("workflow_json")  # a graph takes the place of the prompt: `submit_job` takes it, in the payload
    assert JOB_FIELDS | told_otherwise == set(queue_pb2.CreateJobRequest.DESCRIPTOR.fields_by_name)


def test_ids_are_one_segment() -> None:
    assert segment("../a b?c") == "..%2Fa%20b%3Fc"


def test_a_picture_knows_what_the_server_said_of_it() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 4)).save(file, "PNG")
    picture = to_image(file.getvalue(), {"x-seed": "18446744073709551615", "x-filename": "a.png", "x-job-id": "j"})
    assert picture.size == (8, 4)
    assert picture.info["seed"] == (1 << 64) - 1
    assert (picture.info["filename"], picture.info["job_id"]) == ("a.png", "j")
    assert "resolved_model" not in picture.info
