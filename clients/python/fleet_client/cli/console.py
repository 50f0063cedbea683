"""How commands speak: results on standard output, all else on standard error, exit codes that scripts can trust."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import orjson
import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fleet_client.cli.words import plain
from fleet_client.errors import ApiError, ConnectionFailedError, FleetError, JobFailedError, SettingError

FAILED, USAGE, UNREACHABLE, NOT_FOUND, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 4, 130, 141
EXIT_CODES = (
    "Exit codes: 0 done, 1 the work failed or the server refused, 2 bad arguments, 3 no server, 4 no such thing, "
    "130 interrupted."
)
CONTEXT = {"help_option_names": ["-h", "--help"]}

UrlOption = Annotated[
    str | None,
    typer.Option("--url", envvar="FLEET_URL", help="Address of the server.", show_default="http://localhost:8765"),
]
KeyOption = Annotated[
    str | None,
    typer.Option("--api-key", envvar="FLEET_API_KEY", help="API key, where one is set; better in the variable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class _Output(Console):
    """Standard output, whose reader may go."""

    def on_broken_pipe(self) -> None:
        reader_gone()


out = _Output(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def write(data: str | bytes) -> None:
    """Data on standard output, at once. Raises SystemExit where its reader has gone, as in `fleet events | head`."""
    try:
        if isinstance(data, bytes):
            sys.stdout.buffer.write(data)
        else:
            sys.stdout.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        reader_gone()


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def print_line(value: Any) -> None:
    """One JSON document on one line, at once."""
    write(orjson.dumps(value).decode() + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], empty: str) -> None:
    """A table for people; `empty` where there are no rows. Each row is one line where the output is no terminal."""
    if not rows:
        err.print(empty, markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        # The first names the thing: whole, to be copied.
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(plain(cell)) if isinstance(cell, str) else cell for cell in row))
    _print(table)


def print_fields(fields: Sequence[tuple[str, RenderableType | None]]) -> None:
    """Names and values, one a line, without those that are empty."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        if value:
            table.add_row(name, Text(_plain_lines(value)) if isinstance(value, str) else value)
    _print(table)


def _plain_lines(text: str) -> str:
    return "\n".join(plain(line) for line in text.split("\n"))


def _print(table: Table) -> None:
    if out.is_terminal:
        out.print(table)
        return
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(table)
    write("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))


def say(text: str, style: str = "") -> None:
    """A message on standard error."""
    err.print(plain(text), style=style, markup=False)


def fail(message: str, code: int = FAILED, hint: str = "") -> NoReturn:
    """Says what is wrong, and on a second line what to do, and ends with `code`."""
    err.print(f"[bold red]error:[/] {escape(plain(message))}")
    if hint:
        err.print(hint, markup=False)
    raise typer.Exit(code)


@contextmanager
def errors_told() -> Iterator[None]:
    """Turns the client's errors into a sentence, what to do next, and an exit code."""
    try:
        yield
    except SettingError as error:
        fail(str(error), USAGE)
    except ConnectionFailedError as error:
        fail(str(error), UNREACHABLE, "Is the server running? Start it with `fleet up`, or name it with --url.")
    except ApiError as error:
        fail(error.detail, _CODES.get(error.status, FAILED), _hint(error))
    except JobFailedError as error:
        fail(f"{error.reason}: {error}", FAILED, f"Look at it with `fleet jobs show {error.job['job_id']}`.")
    except FleetError as error:
        fail(str(error))
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None


_CODES = {400: USAGE, 404: NOT_FOUND}


def _hint(error: ApiError) -> str:
    if error.status == 401:
        return "Give the key with --api-key or FLEET_API_KEY."
    if error.retry_after_seconds is not None:
        return f"Try again in {error.retry_after_seconds:g} s."
    if error.status >= 500 and error.request_id:
        return f"In the server's log it is request {error.request_id}."
    return ""


def reader_gone() -> NoReturn:
    """Ends quietly, with the code of a program that a closed pipe has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(PIPE_CLOSED)
