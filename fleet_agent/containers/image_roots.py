"""Which images containers of this node may be made of."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fleet_agent.commands.faults import CommandFault

_HUB = "docker.io"
_HUB_ITSELF = frozenset({_HUB, "index.docker.io", "registry-1.docker.io"})
_ID = re.compile(r"(sha256:)?[0-9a-f]{2,64}\Z")


class ImagePolicy:
    """The allow-list: registries, folders of a registry, and repositories, with all below them, without tags; empty:
    any image.

    An image is judged by the name that the engine would pull it by: `nginx` is `docker.io/library/nginx`.
    """

    def __init__(self, roots: Iterable[str] = ()) -> None:
        self._roots = tuple(roots)
        self._whole = tuple(map(_root, self._roots))

    def judge(self, image: str) -> None:
        """Raises CommandFault PRIVILEGE_FORBIDDEN where the image is not of the list."""
        if not self._whole:
            return
        # An id is looked for among all images of the node, wherever they are from.
        name = "" if _ID.match(image) else _repository(image)
        if not any(name == root or name.startswith(f"{root}/") for root in self._whole):
            raise CommandFault(
                "PRIVILEGE_FORBIDDEN",
                f"image: {image} is outside the node's image roots ({', '.join(self._roots)}): use an image of one of "
                "them, by its name and tag, or add it to FLEET_AGENT_IMAGE_ROOTS on the node",
            )


def _root(words: str) -> str:
    """With a registry, what lies below it, word for word; without one, a repository as the engine reads it."""
    head, slash, path = words.rstrip("/").partition("/")
    if not _is_registry(head):
        return _repository(words.rstrip("/"))
    return f"{_HUB if head in _HUB_ITSELF else head}{slash}{path}"


def _repository(image: str) -> str:
    """Registry and path of an image's name, without tag and digest."""
    name = image.partition("@")[0]
    head, slash, path = name.partition("/")
    if not slash or not _is_registry(head):
        head, path = _HUB, name
    elif head in _HUB_ITSELF:
        head = _HUB
    path = path.partition(":")[0]
    return f"{head}/library/{path}" if head == _HUB and "/" not in path else f"{head}/{path}"


def _is_registry(head: str) -> bool:
    """Whether the engine takes the first part of a name for a registry."""
    return "." in head or ":" in head or head == "localhost" or head != head.lower()
