"""Path templates of google.api.http: the complete grammar of google/api/http.proto.

    Template = "/" Segments [ Verb ] ;
    Segments = Segment { "/" Segment } ;
    Segment  = "*" | "**" | LITERAL | Variable ;
    Variable = "{" FieldPath [ "=" Segments ] "}" ;
    FieldPath = IDENT { "." IDENT } ;
    Verb     = ":" LITERAL ;

Beyond the grammar, as the text of http.proto asks: `**` is the last segment, variables do not nest, and no
two variables name the same field. A LITERAL is a run of RFC 3986 path characters without `*` and `:`; its
percent escapes are decoded.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

_LITERAL_CHARS: Final = frozenset(string.ascii_letters + string.digits + "-._~!$&'()+,;=@")
_HEX: Final = frozenset(string.hexdigits)
_IDENT_START: Final = frozenset(string.ascii_letters + "_")
_IDENT: Final = frozenset(string.ascii_letters + string.digits + "_")


class TemplateError(ValueError):
    """A template that breaks the grammar; `position` counts characters from 0."""

    def __init__(self, template: str, position: int, problem: str) -> None:
        super().__init__(f"path template {template!r}, position {position}: {problem}")
        self.template = template
        self.position = position
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Literal:
    """A segment that matches itself (percent escapes decoded)."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Wildcard:
    """`*`: exactly one segment, not empty."""

    def __str__(self) -> str:
        return "*"


@dataclass(frozen=True, slots=True)
class DoubleWildcard:
    """`**`: all segments that are left, none included."""

    def __str__(self) -> str:
        return "**"


Piece = Literal | Wildcard | DoubleWildcard


@dataclass(frozen=True, slots=True)
class Variable:
    """A field of the request and the pieces of the path that are its value."""

    field_path: tuple[str, ...]
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """The field path as written: `a.b`."""
        return ".".join(self.field_path)

    @property
    def multi_segment(self) -> bool:
        """Whether the value may hold slashes (and so keeps `%2F` undecoded)."""
        return len(self.pieces) != 1 or isinstance(self.pieces[0], DoubleWildcard)

    def __str__(self) -> str:
        if self.pieces == (Wildcard(),):
            return f"{{{self.name}}}"
        return f"{{{self.name}={'/'.join(map(str, self.pieces))}}}"


Segment = Piece | Variable


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template; `str()` gives its canonical text (`{a=*}` is `{a}`)."""

    segments: tuple[Segment, ...]
    verb: str = ""

    @property
    def variables(self) -> tuple[Variable, ...]:
        """The variables, in order."""
        return tuple(segment for segment in self.segments if isinstance(segment, Variable))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The path's shape with the variables taken apart: what decides which paths match."""
        out: list[Piece] = []
        for segment in self.segments:
            out.extend(segment.pieces if isinstance(segment, Variable) else (segment,))
        return tuple(out)

    @property
    def literal_path(self) -> str | None:
        """The path itself where the template has neither variables nor wildcards nor a verb, else None."""
        if self.verb or not all(isinstance(segment, Literal) for segment in self.segments):
            return None
        return str(self)

    def __str__(self) -> str:
        verb = f":{self.verb}" if self.verb else ""
        return "/" + "/".join(map(str, self.segments)) + verb


def parse_template(text: str) -> Template:
    """Parse a template. Raises TemplateError, which names the position, and nothing else for any string."""
    return _Parser(text).template()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._fields: set[tuple[str, ...]] = set()

    def template(self) -> Template:
        self._expect("/", "a template begins with '/'")
        segments = [self._segment()]
        while self._take("/"):
            if isinstance(self._last_piece(segments[-1]), DoubleWildcard):
                raise self._error("'**' must be the last segment", self._at - 1)
            segments.append(self._segment())
        verb = self._literal("a verb") if self._take(":") else ""
        if self._at < len(self._text):
            raise self._error(f"unexpected {self._text[self._at]!r}")
        return Template(tuple(segments), verb)

    @staticmethod
    def _last_piece(segment: Segment) -> Piece:
        return segment.pieces[-1] if isinstance(segment, Variable) else segment

    def _segment(self) -> Segment:
        start = self._at
        if not self._take("{"):
            return self._piece()
        field_path = [self._identifier()]
        while self._take("."):
            field_path.append(self._identifier())
        if tuple(field_path) in self._fields:
            raise self._error(f"the field {'.'.join(field_path)!r} is bound twice", start)
        self._fields.add(tuple(field_path))
        pieces: list[Piece] = [Wildcard()]
        if self._take("="):
            pieces = [self._piece()]
            while self._take("/"):
                if isinstance(pieces[-1], DoubleWildcard):
                    raise self._error("'**' must be the last segment", self._at - 1)
                pieces.append(self._piece())
        self._expect("}", "a variable ends with '}'")
        return Variable(tuple(field_path), tuple(pieces))

    def _piece(self) -> Piece:
        if self._take("*"):
            return DoubleWildcard() if self._take("*") else Wildcard()
        if self._peek() == "{":
            raise self._error("variables do not nest")
        return Literal(self._literal("a segment"))

    def _identifier(self) -> str:
        start = self._at
        if self._peek() not in _IDENT_START:
            raise self._error("expected a field name: a letter or '_', then letters, digits and '_'")
        while self._peek() in _IDENT:
            self._at += 1
        return self._text[start : self._at]

    def _literal(self, what: str) -> str:
        start = self._at
        while (char := self._peek()) in _LITERAL_CHARS or char == "%":
            if char == "%":
                escape = self._text[self._at + 1 : self._at + 3]
                if len(escape) != 2 or not _HEX.issuperset(escape):
                    raise self._error("'%' must be followed by two hexadecimal digits")
                self._at += 2
            self._at += 1
        if start == self._at:
            raise self._error(f"expected {what}: at least one letter, digit or other path character")
        try:
            text = unquote_to_bytes(self._text[start : self._at]).decode()
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8 when its escapes are decoded", start) from None
        if "/" in text or "\0" in text:
            raise self._error(f"{what} must hold neither an encoded '/' nor NUL", start)
        return text

    def _peek(self) -> str:
        return self._text[self._at] if self._at < len(self._text) else ""

    def _take(self, char: str) -> bool:
        if self._peek() != char:
            return False
        self._at += 1
        return True

    def _expect(self, char: str, problem: str) -> None:
        if not self._take(char):
            raise self._error(problem)

    def _error(self, problem: str, position: int | None = None) -> TemplateError:
        return TemplateError(self._text, self._at if position is None else position, problem)
