"""The four buckets of the fleet, and who may read them."""

from __future__ import annotations

import json
from typing import Any

MODELS = "fleet-models"
OUTPUTS = "fleet-outputs"
LORAS = "fleet-loras"
WORKSPACE = "fleet-workspace"
BUCKETS = (MODELS, OUTPUTS, LORAS, WORKSPACE)
PUBLIC = frozenset({OUTPUTS})
"""Whose objects anybody may read by name; no bucket may be listed by anybody."""

_SID = "FleetPublicObjects"


def public_statement(bucket: str) -> dict[str, Any]:
    """The statement that lets anybody read objects of a bucket, and nothing else."""
    return {
        "Sid": _SID,
        "Effect": "Allow",
        "Principal": {"AWS": ["*"]},
        "Action": ["s3:GetObject"],
        "Resource": [f"arn:aws:s3:::{bucket}/*"],
    }


def policy_for(bucket: str, current: str | None) -> tuple[str | None, list[str]]:
    """The policy that a bucket ought to have, None for no policy; and what of `current` had to go, in words.

    Statements about named users, denials and those under a condition are the operator's and stay; unconditional grants
    to everybody are replaced by ours. Where nothing has to change the very text `current` comes back.
    """
    statements = _statements(current)
    kept = [statement for statement in statements if not _open_to_all(statement)]
    removed = [statement for statement in statements if _open_to_all(statement)]
    ours = [public_statement(bucket)] if bucket in PUBLIC else []
    if current is not None and [_canonical(one) for one in removed] == [_canonical(one) for one in ours]:
        return current, []
    if current is None and not ours:
        return None, []
    words = [
        f"{bucket}: its policy let anybody do {', '.join(_actions(one))}"
        for one in removed
        if _canonical(one) not in [_canonical(own) for own in ours]
    ]
    wanted = [*kept, *ours]
    return (json.dumps({"Version": "2012-10-17", "Statement": wanted}) if wanted else None), words


def _statements(policy: str | None) -> list[dict[str, Any]]:
    if policy is None:
        return []
    try:
        found = json.loads(policy).get("Statement", [])
    except (ValueError, AttributeError):
        return []
    if isinstance(found, dict):
        found = [found]
    return [statement for statement in found if isinstance(statement, dict)] if isinstance(found, list) else []


def _open_to_all(statement: dict[str, Any]) -> bool:
    return (
        statement.get("Effect") == "Allow"
        and not statement.get("Condition")
        and ("*" in _principals(statement.get("Principal")) or "NotPrincipal" in statement)
    )


def _principals(principal: Any) -> list[str]:
    if isinstance(principal, dict):
        return [name for value in principal.values() for name in _words(value)]
    return _words(principal)


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []


def _actions(statement: dict[str, Any]) -> list[str]:
    return _words(statement.get("Action")) or ["more than it may"]


def _canonical(statement: dict[str, Any]) -> tuple[Any, ...]:
    return (
        statement.get("Effect"),
        sorted(set(_principals(statement.get("Principal")))),
        sorted(_words(statement.get("Action"))),
        sorted(_words(statement.get("Resource"))),
        sorted(set(statement) & {"NotAction", "NotResource", "NotPrincipal"}),
    )
