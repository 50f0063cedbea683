"""The router: which binding answers a path.

The path decides first, the method second: literal segments beat variables, `*` beats `**`, from left to
right; a path whose best match has no such method is 405 with `Allow`, even where a wider template has it.
Matching is on the raw path, split on "/"; each segment is decoded once. An empty segment (a trailing slash
among them) matches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar
from urllib.parse import unquote_to_bytes

from fleet_server.bridge.errors import MethodNotAllowedError
from fleet_server.bridge.httprule import WEBSOCKET, Binding
from fleet_server.bridge.template import DoubleWildcard, Literal, Piece, Template, Wildcard, parse_template
from fleet_server.domain.errors import FleetError

__all__ = ["Binding", "RouteError", "Router", "Variables"]

T = TypeVar("T")
Variables = Sequence[tuple[str, str]]
"""Path variables: (field path, decoded text), in order."""

_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ENCODED_SLASH: Final = re.compile(rb"(%2[fF])")
_FORBIDDEN: Final = re.compile(r"[/\\\0]")
_PLAIN: Final = re.compile(rb"/[!-$&-\[\]-~]*")
"""Paths whose segments are their own text, fit for any variable: no escape, no backslash, ASCII alone."""


class RouteError(ValueError):
    """Bindings that cannot be served together; the message names them."""


@dataclass(frozen=True, slots=True)
class _Capture:
    name: str
    start: int
    end: int | None
    multi_segment: bool


@dataclass(frozen=True, slots=True)
class _Entry(Generic[T]):
    binding: Binding
    target: T
    captures: tuple[_Capture, ...]
    singles: tuple[tuple[str, int], ...] | None
    """Name and place of each variable where all are whole single segments, else None."""


class _Methods(dict[str, _Entry[T]]):
    """The entries of one path shape by HTTP method (WEBSOCKET is one)."""

    @property
    def allow(self) -> str:
        names = set(self)
        if WEBSOCKET in names:  # the upgrade is a GET
            names = names - {WEBSOCKET} | {"GET"}
        if "GET" in names:
            names.add("HEAD")
        return ", ".join(sorted(names))


class _Node(Generic[T]):
    __slots__ = ("ends", "literals", "rest", "wildcard")

    def __init__(self) -> None:
        self.literals: dict[str, _Node[T]] = {}
        self.wildcard: _Node[T] | None = None
        self.ends: dict[str, _Methods[T]] = {}
        """Verb ("" for none) -> what ends here."""
        self.rest: dict[str, _Methods[T]] = {}
        """The same for `**`."""


class Router(Generic[T]):
    """Routes of many bindings, each with a target that `compile_target` makes of it at start.

    Raises RouteError where two bindings of one method have the same shape or overlap with neither being the
    narrower one, and where one of `required` ("GET /api/nodes/{node_id}") is answered by no binding of that
    shape. `specials` are further paths of the same form that something else answers.
    """

    def __init__(
        self,
        bindings: Iterable[Binding],
        compile_target: Callable[[Binding], T],
        *,
        required: Iterable[str] = (),
        specials: Iterable[str] = (),
    ) -> None:
        self.bindings = tuple(bindings)
        self._root: _Node[T] = _Node()
        self._exact: dict[bytes, _Methods[T]] = {}
        self._verbs: set[str] = set()
        _check_overlaps(self.bindings)
        for binding in self.bindings:
            captures = _captures(binding.template)
            self._add(_Entry(binding, compile_target(binding), captures, _singles(binding.template, captures)))
        self._check_required(required, frozenset(map(_normal, specials)))

    def match(self, http_method: str, raw_path: bytes) -> tuple[T, Variables]:
        """The target of a request, and its path variables. `raw_path` is as it came, without the query.

        Raises FleetError: ROUTE_NOT_FOUND, METHOD_NOT_ALLOWED (as MethodNotAllowedError), INVALID_PATH.
        """
        methods = self._exact.get(raw_path)
        if methods is not None:
            entry = methods.get(http_method) or self._other_method(methods, http_method, raw_path)
            return entry.target, ()
        if _PLAIN.fullmatch(raw_path):
            return self._match_plain(http_method, raw_path)
        segments = raw_path.split(b"/")[1:]
        methods = self._find_encoded(segments, raw_path)
        entry = methods.get(http_method) or self._other_method(methods, http_method, raw_path)
        if entry.binding.template.verb:
            segments[-1] = segments[-1].rpartition(b":")[0]
        return entry.target, [(capture.name, _value(capture, segments)) for capture in entry.captures]

    def _match_plain(self, http_method: str, raw_path: bytes) -> tuple[T, Variables]:
        """The same for a path whose segments are their own text."""
        texts = raw_path[1:].decode("ascii").split("/")
        methods = self._find(texts, texts[-1].rpartition(":"), raw_path)
        entry = methods.get(http_method) or self._other_method(methods, http_method, raw_path)
        if entry.singles is not None:
            return entry.target, [(name, texts[at]) for name, at in entry.singles]
        if entry.binding.template.verb:
            texts[-1] = texts[-1].rpartition(":")[0]
        plain = [(capture.name, "/".join(texts[capture.start : capture.end])) for capture in entry.captures]
        return entry.target, plain

    def _other_method(self, methods: _Methods[T], http_method: str, raw_path: bytes) -> _Entry[T]:
        shown = raw_path.decode("ascii", "replace")
        if http_method == "HEAD" and "GET" in methods:
            return methods["GET"]
        if http_method in ("GET", "HEAD") and WEBSOCKET in methods:
            raise FleetError("INVALID_PATH", f"{shown} is a WebSocket: connect to it with ws:// or wss://")
        if http_method == WEBSOCKET:
            raise FleetError("ROUTE_NOT_FOUND", f"{shown} takes no WebSocket; call it with {methods.allow}")
        allow = methods.allow
        raise MethodNotAllowedError(f"{shown} does not take {http_method}; it takes {allow}", allow)

    def _find_encoded(self, segments: list[bytes], raw_path: bytes) -> _Methods[T]:
        texts: list[str | None] = []
        if raw_path[:1] == b"/" and b"" not in segments:
            texts = [_decode(segment) for segment in segments]
        head, colon, verb = segments[-1].rpartition(b":") if texts else (b"", b"", b"")
        return self._find(texts, (_decode(head), colon.decode(), _decode(verb)), raw_path)

    def _find(
        self, texts: Sequence[str | None], last: tuple[str | None, str, str | None], raw_path: bytes
    ) -> _Methods[T]:
        """What answers decoded segments, the last of them also cut at its last colon; none at all match nothing."""
        if texts and "" not in texts:
            head, colon, verb = last
            if colon and head != "" and verb is not None and verb in self._verbs:
                found = _walk(self._root, [*texts[:-1], head], 0, verb)
                if found is not None:
                    return found
            found = _walk(self._root, texts, 0, "")
            if found is not None:
                return found
        shown = raw_path[:200].decode("ascii", "replace")
        raise FleetError("ROUTE_NOT_FOUND", f"{shown} is no path of this server; /openapi.json lists them")

    def _add(self, entry: _Entry[T]) -> None:
        binding = entry.binding
        node, pieces, verb = self._root, binding.template.pieces, binding.template.verb
        for piece in pieces:
            if isinstance(piece, Literal):
                node = node.literals.setdefault(piece.text, _Node())
            elif isinstance(piece, Wildcard):
                node.wildcard = node.wildcard or _Node()
                node = node.wildcard
        ends = node.rest if isinstance(pieces[-1], DoubleWildcard) else node.ends
        methods = ends.setdefault(verb, _Methods())
        methods[binding.http_method] = entry
        if verb:
            self._verbs.add(verb)
        path = binding.template.literal_path
        if path is not None and path.isascii() and "%" not in path:
            self._exact[path.encode()] = methods

    def _check_required(self, required: Iterable[str], specials: frozenset[tuple[str, str]]) -> None:
        for line in required:
            method, shape = _normal(line)
            if (method, shape) in specials:
                continue
            sample = shape.replace("**", "x").replace("*", "x")
            try:
                match = self._find_encoded(sample.encode().split(b"/")[1:], sample.encode())
            except FleetError:
                match = _Methods()
            entry = match.get(method)
            if entry is None:
                raise RouteError(f"{line}: no binding answers it; add a google.api.http rule for it")
            if _shape(entry.binding.template) != shape:
                raise RouteError(f"{line}: it is answered by another binding, {entry.binding}")


def _walk(node: _Node[T], segments: Sequence[str | None], at: int, verb: str) -> _Methods[T] | None:
    """The best match below `node`; each node is visited at most once, whatever the path."""
    while at < len(segments):
        segment = segments[at]
        child = node.literals.get(segment) if segment is not None else None
        if child is None:
            child = node.wildcard
            if child is None:
                return node.rest.get(verb)
        elif node.wildcard is not None:
            found = _walk(child, segments, at + 1, verb)
            if found is not None:
                return found
            child = node.wildcard
        if node.rest:
            return _walk(child, segments, at + 1, verb) or node.rest.get(verb)
        node, at = child, at + 1
    return node.ends.get(verb) or node.rest.get(verb)


def _decode(segment: bytes) -> str | None:
    """A segment's text, None where it is malformed (a variable that takes it then names the fault)."""
    if b"%" not in segment:
        return segment.decode() if segment.isascii() else None
    if _BAD_ESCAPE.search(segment):
        return None
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        return None


def _value(capture: _Capture, segments: list[bytes]) -> str:
    if not capture.multi_segment:
        text = _decode(segments[capture.start])
        if text is None or _FORBIDDEN.search(text):
            raise _bad_variable(capture.name, 'an encoded "/", "\\", NUL or a malformed escape')
        return text
    raw = b"/".join(segments[capture.start : capture.end])
    parts: list[str] = []
    for index, part in enumerate(_ENCODED_SLASH.split(raw)):
        text = part.decode() if index % 2 else _decode(part)
        if text is None or "\0" in text:
            raise _bad_variable(capture.name, "NUL or a malformed escape")
        parts.append(text)
    return "".join(parts)


def _bad_variable(name: str, what: str) -> FleetError:
    return FleetError(
        "INVALID_PATH", f"{name}: the path segment must not hold {what}; percent-encode it once, as UTF-8"
    )


def _captures(template: Template) -> tuple[_Capture, ...]:
    captures: list[_Capture] = []
    at = 0
    for segment in template.segments:
        width = 1
        if not isinstance(segment, Literal | Wildcard | DoubleWildcard):
            width = len(segment.pieces)
            open_end = isinstance(segment.pieces[-1], DoubleWildcard)
            captures.append(_Capture(segment.name, at, None if open_end else at + width, segment.multi_segment))
        at += width
    return tuple(captures)


def _singles(template: Template, captures: Sequence[_Capture]) -> tuple[tuple[str, int], ...] | None:
    if template.verb or any(capture.multi_segment for capture in captures):
        return None
    return tuple((capture.name, capture.start) for capture in captures)


def _shape(template: Template) -> str:
    verb = f":{template.verb}" if template.verb else ""
    return "/" + "/".join(map(str, template.pieces)) + verb


def _normal(line: str) -> tuple[str, str]:
    method, _, path = line.partition(" ")
    return method, "/" if path == "/" else _shape(parse_template(path))


def _check_overlaps(bindings: Sequence[Binding]) -> None:
    for index, one in enumerate(bindings):
        for other in bindings[index + 1 :]:
            if one.http_method != other.http_method or one.template.verb != other.template.verb:
                continue
            left, right = one.template.pieces, other.template.pieces
            if left == right:
                raise RouteError(f"{one} and {other} answer the same paths; change one of them")
            if _meet(left, right) and not _covers(left, right) and not _covers(right, left):
                raise RouteError(f"{one} and {other} overlap and neither is the narrower; change one of them")


def _meet(left: Sequence[Piece], right: Sequence[Piece]) -> bool:
    """Whether some path matches both."""
    for one, other in zip(left, right, strict=False):
        if isinstance(one, DoubleWildcard) or isinstance(other, DoubleWildcard):
            return True
        if isinstance(one, Literal) and isinstance(other, Literal) and one != other:
            return False
    longer = left if len(left) > len(right) else right
    rest = longer[min(len(left), len(right)) :]
    return not rest or isinstance(rest[0], DoubleWildcard)


def _covers(wide: Sequence[Piece], narrow: Sequence[Piece]) -> bool:
    """Whether `wide` matches every path that `narrow` matches."""
    for index, piece in enumerate(wide):
        if isinstance(piece, DoubleWildcard):
            return True
        if index >= len(narrow) or isinstance(narrow[index], DoubleWildcard):
            return False
        if isinstance(piece, Literal) and piece != narrow[index]:
            return False
    return len(wide) == len(narrow)
