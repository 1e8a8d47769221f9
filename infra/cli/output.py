"""What the commands print: results on standard output, progress and errors on standard error.

With `--json` standard output carries exactly one JSON document, an error included. A user meets a traceback only with
`--debug`.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.errors import GanymedeError


def _remember(context: typer.Context, parameter: typer.CallbackParam, value: bool) -> bool:
    context.find_root().meta[str(parameter.name)] = value
    return value


Json = Annotated[
    bool,
    typer.Option("--json", callback=_remember, help="Print one JSON document on standard output and nothing else."),
]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember, help="Show the traceback of an error.", show_default=False)
]

Tracker = Annotated[
    Literal["mlflow", "jsonl", "none"],
    typer.Option(help="Where metrics and scores go; $MLFLOW_TRACKING_URI is honoured."),
]


def wants(context: typer.Context, option: str) -> bool:
    """Whether `--json` (`as_json`) or `--debug` (`debug`) was given to the command that runs."""
    return bool(context.find_root().meta.get(option))


def out() -> Console:
    """Standard output. Lines are cut by a terminal's width only."""
    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False)


def err() -> Console:
    """Standard error."""
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False)


def say(line: str) -> None:
    """One line of progress or advice on standard error."""
    err().print(Text(line))


def print_json(document: Any) -> None:
    """The one JSON document of a command."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """A table on standard output; full width in a file or a pipe, so that nothing is cut there."""
    console = out()
    if not console.is_terminal:
        console.width = 10_000
    console.print(table(columns, rows, title=title))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> Table:
    """A table without markup: brackets in cells are text; a column whose name begins with `# ` holds numbers."""
    result = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith("#") else "left"
        result.add_column(Text(column.removeprefix("# ")), overflow="fold", justify=justify)
    for row in rows:
        result.add_row(*(Text(cell) for cell in row))
    return result


def show_error(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Prints one message block for `error` and returns the exit code.

    What is not a `GanymedeError` is a bug of ours: it is named, its traceback is in the log.
    """
    if not isinstance(error, GanymedeError):
        logging.getLogger("ganymede").error("unexpected", exc_info=error)
        cause = error
        error = GanymedeError(
            f"unexpected {type(cause).__name__}: {str(cause).strip()}",
            next_step="run the command again with --debug for the traceback, and report it",
        )
        error.__cause__ = cause
    if debug:
        err().print(Text("".join(traceback.format_exception(error))))
    err().print(Text("error: ", style="bold red") + Text(error.what))
    details = [("received", None if error.received is None else repr(error.received))]
    details += [("allowed", error.allowed), ("next", error.next_step)]
    for label, value in details:
        if value is not None:
            err().print(Text(f"  {label}: ", style="bold") + Text(value))
    if as_json:
        fields = {"code": error.code, "what": error.what, "allowed": error.allowed, "next": error.next_step}
        print_json({"error": {**fields, "received": error.received}})
    return error.exit_code


def size(count: float) -> str:
    """Bytes for people: `31.2 MB` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: `3.4 s`, `2 min 05 s`, `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def figure(value: float) -> str:
    """A number for people: thousands apart above 100, three digits below."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
