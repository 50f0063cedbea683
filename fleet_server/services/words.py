"""The words of jobs on both sides: enums of the contract and those of the domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from fleet.v1 import types_pb2

from fleet_server.domain.job import JobState, Priority
from fleet_server.domain.node import CLUSTER_OF_TYPE
from fleet_server.protojson import enum_names

_TYPES: Mapping[int, str] = enum_names(types_pb2.JobType.DESCRIPTOR).words
_TYPE_NUMBERS = {word: number for number, word in _TYPES.items()}
_STATUSES = {state: enum_names(types_pb2.JobStatus.DESCRIPTOR).numbers[state.value] for state in JobState}
_PRIORITIES = {priority: enum_names(types_pb2.JobPriority.DESCRIPTOR).numbers[priority.value] for priority in Priority}
_PRIORITIES_BACK = {number: priority for priority, number in _PRIORITIES.items()}
_STATES_BACK = {number: state for state, number in _STATUSES.items()}

JOB_TYPES: tuple[types_pb2.JobType.ValueType, ...] = tuple(
    cast("types_pb2.JobType.ValueType", number) for number in _TYPES if number
)
"""All job types, in the order of the contract."""

DEFAULT_CLUSTERS = CLUSTER_OF_TYPE
"""The cluster of a job whose caller names none, by job type."""


def type_word(number: int) -> str:
    """`image_gen` for JOB_TYPE_IMAGE_GEN."""
    return _TYPES[number]


def type_number(word: str) -> types_pb2.JobType.ValueType:
    """JOB_TYPE_IMAGE_GEN for `image_gen`; 0 for a word that this version does not know."""
    return cast("types_pb2.JobType.ValueType", _TYPE_NUMBERS.get(word, 0))


def status_number(state: JobState) -> types_pb2.JobStatus.ValueType:
    """JOB_STATUS_QUEUED for JobState.QUEUED."""
    return cast("types_pb2.JobStatus.ValueType", _STATUSES[state])


def state_of(number: int) -> JobState:
    """JobState.QUEUED for JOB_STATUS_QUEUED."""
    return _STATES_BACK[number]


def priority_number(priority: Priority) -> types_pb2.JobPriority.ValueType:
    """JOB_PRIORITY_HIGH for Priority.HIGH."""
    return cast("types_pb2.JobPriority.ValueType", _PRIORITIES[priority])


def priority_of(number: int) -> Priority:
    """Priority.HIGH for JOB_PRIORITY_HIGH."""
    return _PRIORITIES_BACK[number]
