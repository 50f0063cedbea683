"""What a caller is told that a field must be."""

from __future__ import annotations

import pytest
from fleet.v1 import queue_pb2
from google.protobuf import struct_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.rpc.validation import validate


def test_all_words_of_an_enum_are_named() -> None:
    with pytest.raises(FleetError) as refused:
        validate(queue_pb2.CreateJobRequest(payload=struct_pb2.Struct()))
    words = "image_gen, video_gen, llm_inference, transcription, training, custom"
    assert f"job_type: must be one of {words}" in refused.value.detail
