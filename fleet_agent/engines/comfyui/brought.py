"""Files that are brought to ComfyUI for a task: each under a name that nobody else can guess.

A ComfyUI has one folder of inputs for everybody, and graphs name what lies there. Under its plain name an owner's file
would be there for any other owner's graph; so its name begins with one made of its reference, which only its owner has,
and what is told of the prompt names it plainly again. It stays in the folder that it was given for: many node classes
take no files but those that they list, and they list that folder alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fleet_agent.engines.base import EngineError, InputFile
from fleet_agent.engines.comfyui.client import ComfyClient

_MADE = (" [output]", " [temp]")
_LONGEST = 255
"""Bytes of a file's name that file systems take."""
_UPLOADS = ("image_upload", "video_upload", "audio_upload", "file_upload")


class Brought:
    """The files of one task."""

    def __init__(self, client: ComfyClient) -> None:
        self._client = client
        self._marks: set[str] = set()
        self._named: dict[str, frozenset[str]] = {}

    def put(self, reference: str, name: str, subfolder: str, kind: str, file: InputFile) -> str:
        """Uploads a file; what graphs call it, without an annotation. Raises EngineError."""
        mark = f"fleet-{hashlib.sha256(reference.encode()).hexdigest()[:32]}-"
        self._marks.add(mark)
        while len(mark) + len(name.encode()) > _LONGEST:
            # Its ending says what it is.
            name = name[1:]
        with file.path.open("rb") as data:
            return self._client.upload(mark + name, subfolder, kind, file.content_type, data)

    def put_for(self, graph: Mapping[str, Any], one: Mapping[str, Any], file: InputFile) -> None:
        """Uploads a file that the graph names, and changes the name in the inputs that take files."""
        name, subfolder, kind = one["filename"], one.get("subfolder", ""), one.get("type") or "input"
        got = self.put(one["reference"], name, subfolder, kind, file)
        meant = f"{subfolder}/{name}" if subfolder else name
        old = {f"{meant} [{kind}]"} | ({meant} if kind == "input" else set())
        new = got if kind == "input" else f"{got} [{kind}]"
        for node in graph.values():
            inputs = node.get("inputs", {})
            for field in [field for field, value in inputs.items() if isinstance(value, str) and value in old]:
                if field in self._file_inputs(str(node.get("class_type"))):
                    inputs[field] = new

    def check(self, graph: Mapping[str, Any]) -> None:
        """Raises EngineError where the graph takes a file from the folders of outputs that was not brought for it: what
        lies there under a plain name was made by anybody's prompts."""
        for node_id, node in graph.items():
            for field, value in node.get("inputs", {}).items():
                if not isinstance(value, str) or not value.endswith(_MADE):
                    continue
                brought = any(mark in value for mark in self._marks)
                if not brought and field in self._file_inputs(str(node.get("class_type"))):
                    words = f"workflow: node {node_id}: {field}: no prompt of yours has made {value!r}"
                    raise EngineError("INVALID_FIELD", f"{words}; give the name that your client was told")

    def plain(self, text: str) -> str:
        """A text of ComfyUI's with the files named as the graph named them."""
        for mark in self._marks:
            text = text.replace(mark, "")
        return text

    def _file_inputs(self, class_type: str) -> frozenset[str]:
        """The inputs of a class that name files; a prompt's text may be the same word."""
        known = self._named.get(class_type)
        if known is None:
            inputs = (self._client.node_class(class_type) or {}).get("input", {})
            known = self._named[class_type] = frozenset(
                name
                for part in ("required", "optional")
                for name, spec in (inputs.get(part) or {}).items()
                if len(spec) > 1 and isinstance(spec[1], dict) and any(spec[1].get(word) for word in _UPLOADS)
            )
        return known
