"""How commands speak: results on standard output, all else on standard error, exit codes that scripts can trust."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fleet_client.errors import ApiError, ConnectionFailedError, FleetError, JobFailedError

FAILED, USAGE, UNREACHABLE, NOT_FOUND, INTERRUPTED = 1, 2, 3, 4, 130
"""Exit codes: the work failed or the server refused; bad arguments; no server; no such thing; Ctrl-C."""

UrlOption = Annotated[
    str | None,
    typer.Option("--url", envvar="FLEET_URL", help="Address of the server.", show_default="http://localhost:8765"),
]
KeyOption = Annotated[str | None, typer.Option("--api-key", envvar="FLEET_API_KEY", help="API key, where one is set.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

out = Console()
err = Console(stderr=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def print_line(value: Any) -> None:
    """One JSON document on one line."""
    sys.stdout.write(orjson.dumps(value).decode() + "\n")
    sys.stdout.flush()


def print_table(columns: list[str], rows: list[list[str]], empty: str) -> None:
    """A table for people; `empty` where there are no rows."""
    if not rows:
        err.print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Says what is wrong and ends with `code`."""
    err.print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(code)


@contextmanager
def errors_told() -> Iterator[None]:
    """Turns the client's errors into a sentence and an exit code."""
    try:
        yield
    except ConnectionFailedError as error:
        fail(f"{error}\nIs the server running? Start it with `fleet up`, or name it with --url.", UNREACHABLE)
    except ApiError as error:
        hint = " Give the key with --api-key or FLEET_API_KEY." if error.status == 401 else ""
        fail(f"{error.detail}{hint}", NOT_FOUND if error.status == 404 else FAILED)
    except JobFailedError as error:
        fail(f"{error.reason}: {error}")
    except FleetError as error:
        fail(str(error))
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None
